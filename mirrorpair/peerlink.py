"""The way to the peer: who dials, who is let in, and when to try again. Control words, and data links for the engine.

Rules:
- One listener per node. The node whose name sorts lower dials, so there is never a pair of crossing connections; a new
  control connection of the peer replaces the old one, which it must have lost.
- Whoever connects is a stranger until its hello was checked: bounded in number, bytes and time, and never more than a
  line in the log. A data connection is taken only while the control connection is up, and has to name its session.
- A refusal is told to both sides with its reason, and tried again after 1 s, then twice as long each time, up to 60 s
  (H3); mere loss after 0.1 s, up to 1 s, with jitter.
- A sentinel is heard whoever dials, whether the control connection is up or not (peersentinel.py).
- Further paths of heartbeats (peerpath.py) belong to the session of the control connection. While one of them is alive
  the peer is not silent, whatever becomes of the control connection: it is not reported as gone (`peer_down`), so
  nobody takes over, promises are given and counted on as before, and the session is over only when the last path is
  silent too, or a new one begins. What is lost with the control connection is the data link (`link_down`): that goes
  over the same address and belongs to the same connection (W9). So the primary waits for it, and then goes on without
  its peer, as after any lost link; and a request has nobody to go to until there is a control connection again.
- Nothing here decides: who may talk, what a request does and what a data link is for is the handler's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mirrorpair.address import Address, UnixAddress
from mirrorpair.errors import MirrorpairError, PeerTimeoutError, UnreachableError
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.peerbeat import Heart
from mirrorpair.peercontrol import Control, ControlHandler
from mirrorpair.peerdata import DataConnection, Stopped
from mirrorpair.peermessages import (
    MAX_LINE,
    PREAMBLE_BEATS,
    PREAMBLE_BYTES,
    PREAMBLE_CONTROL,
    PREAMBLE_DATA,
    PREAMBLE_SENTINEL,
    Ask,
    Hello,
)
from mirrorpair.peerpath import Path
from mirrorpair.peersentinel import SentinelHandler, Sentinels
from mirrorpair.peersocket import Backoff, LineLimit, bind, connect
from mirrorpair.text import printable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Sequence

    from mirrorpair.liveness import Timing

NEGOTIATE_S = 10.0
REQUEST_S = 10.0
MAX_DATA_WAITING = 3
STRANGERS = 16
FAST_S = (0.1, 1.0)
REFUSED_S = (1.0, 60.0)

assert {len(one) for one in (PREAMBLE_CONTROL, PREAMBLE_DATA, PREAMBLE_SENTINEL, PREAMBLE_BEATS)} == {PREAMBLE_BYTES}

_NO_PATH = (MirrorpairError, OSError, EOFError, ValueError, asyncio.LimitOverrunError)
"""what a connection that was to be a path ends with before it is one"""

log = logging.getLogger("mirrorpair.peer")


class PeerHandler(ControlHandler, SentinelHandler, Protocol):
    """The node, as seen from here."""

    def peer_up(self, hello: Hello) -> None: ...

    def peer_down(self, reason: str, last_heard_ns: int | None) -> None: ...

    def link_down(self, reason: str, last_heard_ns: int | None) -> None:
        """The control connection is lost, and the data link with it, while the peer is heard over another path. After
        that comes `peer_down`, or `peer_up` of the same process. `last_heard_ns`: over what was lost."""
        ...

    def path_up(self, path: Path) -> None: ...

    def path_down(self, path: Path, reason: str) -> None: ...

    async def on_data(self, data: DataConnection, *, dialed: bool) -> None:
        """Negotiates on a new data connection and hands its channel to the engine; raises what stopped it. The
        connection is closed afterwards in every case (the engine has a descriptor of its own)."""
        ...


class PeerLink:
    """Both connections of one node to its peer. `start`, then it looks after itself until `stop`."""

    def __init__(
        self,
        handler: PeerHandler,
        *,
        node: str,
        peer: str,
        listen: Address,
        dial: Address,
        timing: Timing,
        listen_more: Sequence[Address] = (),
        dial_more: Sequence[Address] = (),
        rng: random.Random | None = None,
        negotiate_s: float = NEGOTIATE_S,
    ) -> None:
        """`listen_more`, `dial_more`: further paths of heartbeats, addresses of this node and of the peer."""
        self.node, self.peer = node, peer
        self.dials = node < peer
        self.heart = Heart(timing)
        self._handler = handler
        self._listen, self._dial = listen, dial
        self._negotiate_s = negotiate_s
        self._sentinels = Sentinels(handler, self.heart.lives, peer, negotiate_s)
        self._rng = rng or random.Random()
        self._fast = Backoff(FAST_S, self._rng)
        self._slow = Backoff(REFUSED_S, self._rng)
        self._data_fast = Backoff(FAST_S, self._rng)
        self._data_slow = Backoff(REFUSED_S, self._rng)
        self._hurry = asyncio.Event()
        self._limit = LineLimit()
        self._servers: dict[Address, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._control: Control | None = None
        self._half: Control | None = None
        """the control connection that was lost, while a path of its session is left"""
        self._up = asyncio.Event()
        self._met = asyncio.Event()
        """there is a session"""
        self.paths = [Path(handler, self.heart, node, peer, one, ours=True) for one in listen_more]
        self.paths += [Path(handler, self.heart, node, peer, one, ours=False) for one in dial_more]
        self._data_wanted = asyncio.Event()
        self._data_again = asyncio.Event()
        self._data_turn = asyncio.Lock()
        self._data_waiting = 0

    async def listen(self) -> None:
        """Takes the place; whoever connects waits until `start`. RefusedError: the address is in use. UsageError: it
        cannot be bound."""
        try:
            for address in (self._listen, *(path.address for path in self.paths if path.ours)):
                self._servers[address] = await bind(address)
        except BaseException:
            self._close_servers()
            raise

    async def start(self) -> None:
        """Listens, if it does not yet, and dials if it is ours to dial. Raises as `listen`."""
        if not self._servers:
            await self.listen()
        self._spawn(self._accept_loop(self._servers[self._listen], self._stranger))
        for path in self.paths:
            if path.ours:
                self._spawn(self._accept_loop(self._servers[path.address], partial(self._path_stranger, path)))
            else:
                self._spawn(self._path_loop(path))
        if self.dials:
            self._spawn(self._dial_loop())
            self._spawn(self._data_loop())

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._control is not None:
            self._control.hang_up("this node stops")
        self._close_servers()

    def _close_servers(self) -> None:
        while self._servers:
            address, server = self._servers.popitem()
            server.close()
            if isinstance(address, UnixAddress):
                with contextlib.suppress(OSError):
                    os.unlink(address.path)

    @property
    def control(self) -> Control | None:
        """The control connection, while both have accepted each other."""
        return self._control if self._control is not None and self._control.up else None

    @property
    def connected(self) -> bool:
        return self.control is not None

    @property
    def session(self) -> Control | None:
        """The control connection whose session goes on: it is up, or a path of it is left."""
        return self.control or self._half

    def beat(self) -> None:
        """One more over every path, ahead of its turn, when there is something new to say."""
        now = clock_boottime_ns()
        for pulse in (
            self._control.pulse if self.connected and self._control else None,
            *(p.pulse for p in self.paths),
        ):
            if pulse is not None:
                pulse.beat(now)

    def want_data(self) -> None:
        """A data link is to be made as soon as the control connection is up (the dialer acts, the acceptor waits)."""
        self._data_wanted.set()
        self._data_again.set()

    def hurry(self) -> None:
        """Tries again at once what a refusal had put off."""
        self._slow.reset()
        self._data_slow.reset()
        self._hurry.set()

    def bury(self, process: str, why: str) -> None:
        """This process of the peer is dead: a connection of it that is up, or about to end, is none. Told by
        `peer_down` before this returns, if it has not been told yet."""
        control = self._control or self._half
        if control is None or control.hello is None or control.hello.process != process:
            return
        control.hang_up(why)
        self._end_session(why)

    async def ask(self, ask: Ask, timeout: float = REQUEST_S) -> str:
        """The reply's one word. UnreachableError: not connected, or lost before the reply (it may have been done).
        PeerTimeoutError: no reply in time. PeerError: the peer says why not."""
        control = self.control
        if control is None:
            raise UnreachableError(f"{self.peer} is not connected")
        return await control.ask(ask, timeout)

    # --- accepting

    async def _accept_loop(
        self, server: socket.socket, hear: Callable[[socket.socket, Callable[[], None]], Coroutine[None, None, None]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(server)
            except OSError as error:
                self._note(f"cannot accept a connection of {self.peer}: {error.strerror}")
                await asyncio.sleep(0.1)
                continue
            if self._strangers >= STRANGERS:
                sock.close()
                self._note("too many connections that have not said who they are")
                continue
            self._spawn(self._counted(sock, hear))

    async def _counted(
        self, sock: socket.socket, hear: Callable[[socket.socket, Callable[[], None]], Coroutine[None, None, None]]
    ) -> None:
        """A new connection; it counts as a stranger until it has said which of them it is and, but for data, who."""
        sock.setblocking(False)
        self._strangers += 1
        counted = True

        def known() -> None:
            nonlocal counted
            self._strangers -= counted
            counted = False

        try:
            await hear(sock, known)
        finally:
            known()
            sock.close()

    async def _stranger(self, sock: socket.socket, known: Callable[[], None]) -> None:
        preamble = await self._preamble(sock)
        if preamble == PREAMBLE_CONTROL:
            await self._run_control(sock, dialed=False, known=known)
        elif preamble == PREAMBLE_DATA:
            known()
            await self._accepted_data(sock)
        elif preamble == PREAMBLE_SENTINEL:
            await self._sentinels.hear(sock, known, self._note)
        else:
            self._strange(preamble)

    async def _path_stranger(self, path: Path, sock: socket.socket, known: Callable[[], None]) -> None:
        preamble = await self._preamble(sock)
        if preamble != PREAMBLE_BEATS:
            self._strange(preamble)
            return

        def came_up() -> None:
            known()
            self._path_up(path)

        try:
            reason = await path.accept(sock, lambda: self.session, self._negotiate_s, came_up)
        except _NO_PATH as error:
            self._note(f"somebody on {path.address}: {printable(str(error), 300) or 'hung up'}")
        else:
            self._path_down(path, reason)

    def _strange(self, preamble: bytes) -> None:
        if preamble:
            shown = printable(preamble.decode("latin-1"), 60)
            self._note(f"somebody on the peer's port spoke something else: {shown}")
        else:
            self._note("somebody connected to the peer's port and did not say what for")

    async def _preamble(self, sock: socket.socket) -> bytes:
        """Empty: it did not come, or not whole."""
        loop = asyncio.get_running_loop()
        preamble = b""
        try:
            async with asyncio.timeout(self._negotiate_s):
                while len(preamble) < PREAMBLE_BYTES:
                    piece = await loop.sock_recv(sock, PREAMBLE_BYTES - len(preamble))
                    if not piece:
                        return b""
                    preamble += piece
        except OSError:  # TimeoutError is one
            return b""
        return preamble

    def _note(self, text: str) -> None:
        self._limit.line(text, clock_boottime_ns())

    async def _accepted_data(self, sock: socket.socket) -> None:
        """The dialer gives an attempt up before it makes the next one, which waits until that is noticed here."""
        if self.dials or self._data_waiting >= MAX_DATA_WAITING:
            return
        self._data_waiting += 1
        try:
            async with self._data_turn:
                if self.connected:
                    await self._negotiate(sock, 0, dialed=False)
        finally:
            self._data_waiting -= 1

    # --- dialing

    async def _dial_loop(self) -> None:
        while True:
            try:
                sock = await connect(self._dial, PREAMBLE_CONTROL)
            except OSError as error:
                log.debug("%s at %s: %s", self.peer, self._dial, error)
                await asyncio.sleep(self._fast.delay())
                continue
            if await self._run_control(sock, dialed=True):
                self._fast.reset()
                self._slow.reset()
                await asyncio.sleep(self._fast.delay())
            else:
                await self._wait(self._slow.delay())

    async def _path_loop(self, path: Path) -> None:
        """One of the peer's further addresses, as long as there is a session that it can belong to."""
        backoff = Backoff(FAST_S, self._rng)

        def came_up() -> None:
            backoff.reset()
            self._path_up(path)

        while True:
            await self._met.wait()
            if self.session is not None:
                try:
                    sock = await connect(path.address, PREAMBLE_BEATS)
                    reason = await path.dial(sock, lambda: self.session, self._negotiate_s, came_up)
                except _NO_PATH as error:
                    log.debug("no heartbeats over %s: %s", path.address, error)
                else:
                    self._path_down(path, reason)
            await asyncio.sleep(backoff.delay())

    async def _data_loop(self) -> None:
        """Whenever a data link is wanted and the control connection is up."""
        while True:
            await self._data_wanted.wait()
            await self._up.wait()
            try:
                sock = await connect(self._dial, PREAMBLE_DATA)
            except OSError:
                await asyncio.sleep(self._data_fast.delay())
                continue
            self._data_wanted.clear()
            self._data_again.clear()
            outcome = await self._negotiate(sock, secrets.randbits(63) + 1, dialed=True)
            if outcome is None:
                self._data_slow.reset()
                self._data_fast.reset()
                continue
            self._data_wanted.set()
            if outcome:
                await self._wait(self._data_slow.delay())
            else:
                await self._pause_of_data(self._data_fast.delay())

    async def _pause_of_data(self, seconds: float) -> None:
        """Ends early when it was wanted anew since the attempt began: the roles were not settled, and are now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._data_again.wait()
                self._data_fast.reset()

    async def _wait(self, seconds: float) -> None:
        """Ends early when somebody hurries."""
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def _negotiate(self, sock: socket.socket, session: int, *, dialed: bool) -> bool | None:
        """None: the data link is made. True: refused, so back off; False: merely lost."""
        data = DataConnection(sock, session, self.peer)
        made = False
        try:
            await self._handler.on_data(data, dialed=dialed)
            made = True
            return None
        except Stopped as stopped:
            log.info("no data link with %s: %s", self.peer, stopped)
            return stopped.stop.kind != "retry"
        except (UnreachableError, PeerTimeoutError) as error:
            log.info("no data link with %s: %s", self.peer, error)
            return False
        except MirrorpairError as error:
            log.warning("no data link with %s: %s", self.peer, error)
            return True
        finally:
            await data.close(shutdown=not made)

    # --- the control connection

    async def _run_control(
        self, sock: socket.socket, *, dialed: bool, known: Callable[[], None] = lambda: None
    ) -> bool:
        """Whether the two had accepted each other."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        control = Control(
            self._handler, self.heart, self.peer, reader, writer, dialed=dialed, negotiate_s=self._negotiate_s
        )

        def came_up(control: Control) -> None:
            known()
            self._came_up(control)

        reason: str | None = "this node stops"
        try:
            reason = await control.run(came_up, self._note)
        finally:
            writer.transport.abort()
            if self._control is control:
                self._lost(control, reason or "")
        return reason is not None

    def _lost(self, control: Control, reason: str) -> None:
        if not any(path.alive for path in self.paths):
            self._end_session(reason)
            return
        self._control, self._half = None, control
        self._up.clear()
        self._handler.link_down(f"{reason}; it is heard over another path", control.pulse.hearing.last_ns)

    def _end_session(self, reason: str) -> None:
        self._control = self._half = None
        self._up.clear()
        self._met.clear()
        for path in self.paths:
            path.hang_up()
        self._handler.peer_down(reason, self.heart.hearing.last_ns)

    def _came_up(self, control: Control) -> None:
        """Paths of an earlier session are none of this one; it takes a moment until they have come over."""
        assert control.hello is not None
        old, half = self._control, self._half
        if old is not None:
            # Its own end would come later than this beginning, in the wrong order for the handler.
            old.hang_up(f"{self.peer} connected anew")
            self._end_session(f"{self.peer} connected anew")
        elif half is not None and half.hello is not None and half.hello.process != control.hello.process:
            self._end_session(f"{self.peer} was started anew")
        self._control, self._half = control, None
        for path in self.paths:
            path.hang_up()
        self._up.set()
        self._met.set()
        self._handler.peer_up(control.hello)

    # --- further paths

    def _path_up(self, path: Path) -> None:
        log.info("heartbeats with %s also go over %s", self.peer, path.address)
        self._handler.path_up(path)

    def _path_down(self, path: Path, reason: str) -> None:
        """`reason` empty: it was ended here, because there is another session, or none."""
        if not reason:
            return
        log.warning("no heartbeats over %s any more: %s", path.address, reason)
        self._handler.path_down(path, reason)
        if self._half is not None and not any(one.alive for one in self.paths):
            self._end_session(f"{self.peer} is not heard over any path any more: {reason}")

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the peer link ended", exc_info=error)
