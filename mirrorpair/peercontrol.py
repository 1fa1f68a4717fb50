"""One control connection to the peer, from the hellos to its end: heartbeats, their promises, requests and replies.

Rules:
- The hello comes first, from both; each says Ready or Refused with its reason, so that both logs name it.
- Silence of `suspect_ns` on it ends the connection (peerbeat.py). Whether the peer is silent is another question, where
  there are further paths (peerlink.py).
- A11 A connection that was hung up on is read no further: nothing is promised any more to who is proven to be dead, and
  a process that is does not come in again.
- A peer that asks for too much at once or sends what is no message is hung up on. Nothing is queued for
  it without bound, and nothing that it sends can raise out of here.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Protocol

from mirrorpair.errors import (
    MirrorpairError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    RefusedError,
    UnreachableError,
)
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.peerbeat import BeatHandler, Heart, Pulse
from mirrorpair.peermessages import (
    MAX_LINE,
    PROTOCOL,
    Ask,
    Beat,
    Hello,
    Promise,
    Ready,
    Refused,
    Reply,
    Request,
    Word,
    decode_line,
    encode_line,
    refused,
)
from mirrorpair.proofs import Life
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_REQUESTS = 16


class ControlHandler(BeatHandler, Protocol):
    """What the node does with it. The synchronous ones must be short."""

    def hello(self, session: str) -> Hello:
        """Our hello, with this session number."""
        ...

    def check(self, hello: Hello) -> str | None:
        """Why this node is not accepted as our peer, or None."""
        ...

    def peer_refused(self, reason: str) -> None:
        """Our hello was not accepted, or we did not accept theirs."""
        ...

    async def on_request(self, ask: Ask) -> str:
        """One word for the reply; a MirrorpairError becomes its code and message."""
        ...


class Control:
    """One connection. `came_up` is called when both have accepted each other."""

    def __init__(
        self,
        handler: ControlHandler,
        heart: Heart,
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        dialed: bool,
        negotiate_s: float,
    ) -> None:
        self._handler, self._heart, self._peer = handler, heart, peer
        self._reader, self._writer = reader, writer
        self._dialed = dialed
        self._negotiate_s = negotiate_s
        self._session = secrets.token_hex(8)
        self._next_id = 1
        self._asked: dict[int, asyncio.Future[str]] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._why = ""
        self.pulse = Pulse(handler, heart, peer, writer)
        self.up = False
        self.hello: Hello | None = None
        """the peer's, once it is accepted"""
        self.mine: Hello | None = None
        """ours, once it is sent"""

    @property
    def sessions(self) -> tuple[str, str]:
        """The session numbers of the dialer and of the acceptor."""
        assert self.hello is not None
        return (self._session, self.hello.session) if self._dialed else (self.hello.session, self._session)

    async def run(self, came_up: Callable[[Control], None], tell: Callable[[str], None]) -> str | None:
        """Why it ended; None when the two had not accepted each other, which `tell` is then told about."""
        try:
            async with asyncio.timeout(self._negotiate_s):
                self.hello = await self._introduce()
        except (TimeoutError, EOFError, ValueError, OSError, asyncio.LimitOverrunError, MirrorpairError) as error:
            tell(self._not_accepted(error))
            return None
        self.up = True
        self.pulse.heard(clock_boottime_ns())
        life = life_of(self.hello)
        self._heart.begin(life)
        came_up(self)
        beating = asyncio.create_task(self.pulse.run(self.hang_up))
        try:
            reason = await self._read_loop(life)
        finally:
            self.up = False
            tasks = [beating, *self._work]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(UnreachableError(f"the connection to {self._peer} broke before it answered"))
        return self._why or reason

    def hang_up(self, why: str) -> None:
        """Ends the connection; its task then reports it."""
        self._why = self._why or why
        self.up = False
        self._writer.transport.abort()

    async def ask(self, ask: Ask, timeout: float) -> str:
        number = self._next_id
        self._next_id += 1
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._send(Request(id=number, ask=ask))
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise PeerTimeoutError(f"{self._peer} did not answer within {timeout:g} s") from None
        finally:
            self._asked.pop(number, None)

    async def _introduce(self) -> Hello:
        """Both hellos, both verdicts. Refused ones end here."""
        self.mine = self._handler.hello(self._session)
        self._send(self.mine)
        hello = await self._read_word()
        if isinstance(hello, Refused):
            raise RefusedError(f"{self._peer} refuses this node: {printable(hello.message)}")
        if not isinstance(hello, Hello):
            raise PeerProtocolError(f"{type(hello).__name__} came where the peer's hello was due")
        reason = _wrong_protocol(hello) or (
            None if hello.node == self._peer else f"it calls itself {printable(hello.node, 80)}, not {self._peer}"
        )
        if reason is None and self._heart.lives.dead(hello.process):
            reason = "this process of it has ended: its sentinel said so"
        reason = reason or self._handler.check(hello)
        if reason is not None:
            self._send(refused(12, reason))
            with contextlib.suppress(OSError):
                await self._writer.drain()
                self._writer.write_eof()
                # It may be refusing us at the same moment; let it read before we reset the connection.
                await self._reader.read(MAX_LINE)
            raise RefusedError(f"{self._peer} is refused: {reason}")
        self._send(Ready())
        verdict = await self._read_word()
        if isinstance(verdict, Refused):
            raise RefusedError(f"{self._peer} refuses this node: {printable(verdict.message)}")
        if not isinstance(verdict, Ready):
            raise PeerProtocolError(f"{type(verdict).__name__} came where the peer's verdict was due")
        return hello

    def _not_accepted(self, error: Exception) -> str:
        """One line for the log."""
        if isinstance(error, RefusedError):
            self._handler.peer_refused(str(error))
            return str(error)
        who = self._peer if self._dialed else "somebody on the peer's port"
        if isinstance(error, TimeoutError):
            return f"{who} did not say who it is in time"
        if isinstance(error, EOFError | OSError):
            return f"{who} hung up before it had said who it is"
        return f"{who}: {printable(str(error), 400)}"

    async def _read_word(self) -> Word:
        """ValueError (asyncio's own): a line that never ends."""
        return decode_line(await self._reader.readuntil(b"\n"))

    async def _read_loop(self, life: Life) -> str:
        """Why it ended."""
        while True:
            try:
                word = await self._read_word()
            except asyncio.IncompleteReadError:
                return f"{self._peer} closed the connection"
            except (PeerProtocolError, ValueError, asyncio.LimitOverrunError) as error:
                return f"{self._peer} sent what is no message: {printable(str(error), 300)}"
            except OSError as error:
                return f"the connection to {self._peer} broke: {error.strerror or error}"
            if not self.up:
                return ""  # hung up on, for a reason that was said then
            now = clock_boottime_ns()
            self.pulse.heard(now)
            if isinstance(word, Beat | Promise):
                self.pulse.take(word, now, life)
                continue
            self._heart.hearing.heard(now)
            if isinstance(word, Request):
                if len(self._work) >= MAX_REQUESTS:
                    return f"{self._peer} asks for too much at once"
                self._serve(word)
            elif isinstance(word, Reply):
                self._answered(word)
            else:
                return f"{self._peer} sent a {type(word).__name__} in the middle of the session"

    def _serve(self, request: Request) -> None:
        task = asyncio.create_task(self._answer(request))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _answer(self, request: Request) -> None:
        try:
            reply = Reply(id=request.id, result=await self._handler.on_request(request.ask))
        except MirrorpairError as error:
            reply = Reply(id=request.id, code=error.exit_code, message=printable(str(error), 2000))
        if self.up:
            self._send(reply)

    def _answered(self, reply: Reply) -> None:
        future = self._asked.get(reply.id)
        if future is None or future.done():
            return
        if reply.code:
            future.set_exception(PeerError(f"{self._peer}: {printable(reply.message)}", reply.code))
        else:
            future.set_result(reply.result)

    def _send(self, word: Word) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(encode_line(word))


def life_of(hello: Hello) -> Life:
    """Who it says that it is."""
    return Life(hello.node, hello.process, hello.session, (hello.incarnation.id, hello.incarnation.n))


def _wrong_protocol(hello: Hello) -> str | None:
    if min(PROTOCOL[1], hello.protocol[1]) >= max(PROTOCOL[0], hello.protocol[0]):
        return None
    return (
        f"it is version {printable(hello.version)} and speaks protocol {hello.protocol[0]} to {hello.protocol[1]}, "
        f"we {PROTOCOL[0]} to {PROTOCOL[1]}"
    )
