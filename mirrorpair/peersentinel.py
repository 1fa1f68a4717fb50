"""The receiving end of a sentinel: who may say here that the peer's daemon is dead, and what is done with it.

Rules:
- Whoever connects is a stranger until it has named a control session of the peer with this node: 64 random bits that
  only the two of them know. A report has to name the one in which the promise was given.
- What is reported counts only by what this node knows itself (proofs.py); it is answered in every case.
- Bounded in number, bytes, time and words. Nothing that is sent here can raise out of here, and it is never more than a
  line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Protocol

from mirrorpair.errors import PeerProtocolError
from mirrorpair.peermessages import (
    MAX_SENTINEL_LINE,
    Died,
    Ready,
    Reply,
    Watch,
    decode_sentinel_line,
    encode_line,
    refused,
)
from mirrorpair.proofs import Life
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mirrorpair.peermessages import Session
    from mirrorpair.proofs import Lives, Proof

MAX_SENTINELS = 4
MAX_REPORTS = 16
log = logging.getLogger("mirrorpair.peer")

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class _UnmetError(PeerProtocolError):
    """Nothing is wrong with it: the daemon that it watches has not been here yet, or this one has just begun."""


class SentinelHandler(Protocol):
    def check_sentinel(self, watch: Watch) -> str | None:
        """Why it is none of our peer's, or None."""
        ...

    def peer_died(self, process: str, proof: Proof, status: int | None) -> None:
        """It is proven that this process of the peer has ended; told once."""
        ...


class Sentinels:
    """The connections of the peer's sentinels: of the daemon that runs, and of earlier ones that are still there."""

    def __init__(self, handler: SentinelHandler, lives: Lives, peer: str, negotiate_s: float) -> None:
        self._handler, self._lives, self._peer = handler, lives, peer
        self._negotiate_s = negotiate_s
        self._open: list[asyncio.StreamWriter] = []

    async def hear(self, sock: socket.socket, known: Callable[[], None], note: Callable[[str], None]) -> None:
        """One connection to its end. `known` is called when it is no stranger any more; `note` takes a line."""
        if sock.family != socket.AF_UNIX:
            # Nothing is said for days: a host that is gone has to be noticed.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_SENTINEL_LINE)
        try:
            async with asyncio.timeout(self._negotiate_s):
                watch = await self._introduce(reader, writer)
            known()
            self._open.append(writer)
            if len(self._open) > MAX_SENTINELS:
                self._open[0].transport.abort()
            for _ in range(MAX_REPORTS):
                word = await _read(reader)
                if not isinstance(word, Died):
                    raise PeerProtocolError("it introduced itself twice")
                writer.write(encode_line(Reply(id=0, result=self._reported(watch, word))))
                async with asyncio.timeout(self._negotiate_s):
                    await writer.drain()
        except (EOFError, OSError):  # TimeoutError is one
            return
        except _UnmetError as error:
            log.debug("a sentinel is not heard yet: %s", error)
        except (PeerProtocolError, ValueError, asyncio.LimitOverrunError) as error:
            note(f"a sentinel on the peer's port: {printable(str(error), 400)}")
        finally:
            if writer in self._open:
                self._open.remove(writer)
            writer.transport.abort()

    async def _introduce(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Watch:
        word = await _read(reader)
        if not isinstance(word, Watch):
            raise PeerProtocolError("it reported before it said whom it watches")
        reason = self._handler.check_sentinel(word)
        if reason is None and word.node != self._peer:
            reason = f"it watches {printable(word.node, 80)}, not {self._peer}"
        unmet = reason is None and not self._lives.knows(_lives(word, word.sessions))
        if unmet:
            reason = f"it watches a process of {self._peer} that was not here"
        if reason is not None:
            writer.write(encode_line(refused(12, reason)))
            writer.write_eof()
            await writer.drain()
            raise _UnmetError(reason) if unmet else PeerProtocolError(reason)
        writer.write(encode_line(Ready()))
        return word

    def _reported(self, watch: Watch, died: Died) -> str:
        proof = self._lives.prove(_lives(watch, died.sessions))
        if proof.fresh:
            self._handler.peer_died(watch.process, proof, died.status)
        return "noted" if proof.known else "void"


def _lives(watch: Watch, sessions: list[Session]) -> list[Life]:
    return [Life(watch.node, watch.process, one.session, (one.incarnation.id, one.incarnation.n)) for one in sessions]


async def _read(reader: asyncio.StreamReader) -> Watch | Died:
    """EOFError: it hung up. ValueError (asyncio's own), LimitOverrunError: a line that never ends."""
    return decode_sentinel_line(await reader.readuntil(b"\n"))
