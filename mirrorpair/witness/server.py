"""The witness's daemon: its listener and its connections.

Rules:
- A client can only spoil its own connection: rubbish, silence, half a request, one that does not read. At most CAP
  connections; a newcomer takes the place of the one that has been idle longest.
- A connection's requests are done one after the other, so one that does not read its replies asks nothing more.
- No timers: what it says depends on the records alone.
- SIGTERM: what has begun is finished, then the end. After a kill the next start believes only what is durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from typing import TYPE_CHECKING

from mirrorpair.address import UnixAddress
from mirrorpair.arbiter import Swap
from mirrorpair.errors import MirrorpairError, PeerProtocolError
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.peersocket import LineLimit, bind
from mirrorpair.service import Termination, notify
from mirrorpair.text import printable
from mirrorpair.witness import (
    MAX_LINE,
    MAX_MESSAGE,
    PREAMBLE,
    CasRequest,
    Reply,
    Request,
    decode_request,
    encode_line,
)
from mirrorpair.witness.store import Store

if TYPE_CHECKING:
    import socket

    from mirrorpair.config import Witness

CAP = 4096
_OTHER_FILES = 64

log = logging.getLogger("mirrorpair.witness")


class _Client:
    def __init__(self, writer: asyncio.StreamWriter, turn: int) -> None:
        self.writer = writer
        self.turn = turn
        """grows with every request: the least one is idle longest"""
        self.busy = False


class WitnessServer:
    """Serves the records below `witness.state_dir` at `witness.address` between start() and close()."""

    def __init__(self, witness: Witness, *, cap: int = CAP) -> None:
        self._address = witness.address
        self._folder = witness.state_dir
        self._cap = cap
        self._store: Store | None = None
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._turns = 0
        self._limit = LineLimit()

    async def start(self) -> None:
        """RefusedError: another witness has the folder, or the address. UsageError: the address cannot be bound.
        ImageError: the folder cannot be used."""
        store = Store(self._folder)
        try:
            sock: socket.socket = await bind(self._address, "witness")
            try:
                self._server = await asyncio.start_server(self._arrived, sock=sock, limit=MAX_LINE)
            except BaseException:
                sock.close()
                raise
        except BaseException:
            await store.close()
            raise
        self._store = store

    async def close(self) -> None:
        """Finishes what has begun, hangs up on everyone, and gives the address and the folder back."""
        if self._server is not None:
            self._server.close()
            self._server = None
            if isinstance(self._address, UnixAddress):
                with contextlib.suppress(OSError):
                    os.unlink(self._address.path)
        for task in list(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        if self._store is not None:
            await self._store.close()
            self._store = None

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # With no buffer above the kernel's, drain() returns when a reply has been taken from us.
        writer.transport.set_write_buffer_limits(high=0)
        if len(self._clients) >= self._cap and not self._make_room():
            self._note(f"a connection is refused: all {self._cap} are busy")
            writer.transport.abort()
            return
        self._turns += 1
        client = _Client(writer, self._turns)
        task = asyncio.get_running_loop().create_task(self._serve(client, reader))
        self._clients[task] = client
        task.add_done_callback(self._left)

    def _make_room(self) -> bool:
        idle = [(client.turn, task) for task, client in self._clients.items() if not client.busy]
        if not idle:
            return False
        _, task = min(idle, key=lambda pair: pair[0])
        self._clients.pop(task).writer.transport.abort()
        task.cancel()
        return True

    def _left(self, task: asyncio.Task[None]) -> None:
        client = self._clients.pop(task, None)
        if client is not None:
            client.writer.transport.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection ended by an internal error", exc_info=error)

    async def _serve(self, client: _Client, reader: asyncio.StreamReader) -> None:
        try:
            preamble = await reader.readexactly(len(PREAMBLE))
            if preamble != PREAMBLE:
                self._note(f"somebody spoke something else: {printable(preamble.decode('latin-1'), 60)}")
                return
            while line := await reader.readline():
                if not line.endswith(b"\n"):
                    return
                request = decode_request(line)
                self._turns += 1
                client.turn, client.busy = self._turns, True
                reply = await self._answer(request)
                client.busy = False
                client.writer.write(encode_line(reply))
                await client.writer.drain()
        except PeerProtocolError as error:
            self._note(str(error))
        except ValueError:  # asyncio's own: a line that never ends
            self._note(f"a request of more than {MAX_LINE} bytes")
        except (OSError, asyncio.IncompleteReadError):
            pass

    async def _answer(self, request: Request) -> Reply:
        assert self._store is not None
        try:
            if isinstance(request, CasRequest):
                swap = await self._store.cas(request.pair, request.version, request.register)
                if swap is Swap.OK:
                    log.info("pair %s: %s", request.pair, _told(request))
                return Reply(id=request.id, swap="ok" if swap is Swap.OK else "conflict")
            return Reply(id=request.id, record=await self._store.read(request.pair))
        except MirrorpairError as error:
            log.error("pair %s: %s", request.pair, error)
            return Reply(id=request.id, code=error.exit_code, message=printable(str(error), MAX_MESSAGE))

    def _note(self, text: str) -> None:
        self._limit.line(text, clock_boottime_ns())


def _told(request: CasRequest) -> str:
    new = request.register
    return (
        f"epoch {new.epoch}, primary {new.primary or 'nobody'}, in sync {', '.join(new.in_sync) or 'nobody'} "
        f"(version {request.version + 1})"
    )


def run(witness: Witness) -> int:
    """The daemon in the foreground, until SIGTERM or SIGINT; its exit code. MirrorpairError: it cannot start."""
    return asyncio.run(_run(witness))


async def _run(witness: Witness) -> int:
    with Termination() as termination:
        server = WitnessServer(witness, cap=_most_connections())
        await server.start()
        try:
            log.info("listening on %s, records in %s", witness.address, printable(witness.state_dir))
            notify("READY=1")
            await termination.asked.wait()
            notify("STOPPING=1")
        finally:
            await server.close()
        log.info("stopped")
        return 0


def _most_connections() -> int:
    """As many as files may be open, once that is as high as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CAP + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(CAP + _OTHER_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return CAP if soft == resource.RLIM_INFINITY else max(1, min(CAP, soft - _OTHER_FILES))
