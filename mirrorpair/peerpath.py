"""A further way for heartbeats (`heartbeat-address`): one address of one of the two nodes, dialled by the other one.

    who dials                                   whose address it is
    PREAMBLE beats  ------------->
    Join            ------------->              the control session that it belongs to
                    <-------------              Ready or Refused
    Beat, Promise   <------------>              until one hangs up, or the session is over

Rules:
- A path belongs to a control session that both have accepted, and names both of its numbers, which only the two know:
  so a beat or a promise that comes this way counts as if it had come over the control connection, for the same life of
  the peer (A11, proofs.py). A new session begins with new paths; a path never begins one.
- The loss of a path is said, and changes nothing by itself. What the loss of the control connection means while a path
  is left is in peerlink.py.
- Nothing but heartbeats goes this way: neither requests nor data, and no disk is waited for.
- Bounded in bytes, time and words, as everything from a stranger; one connection for each address at a time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mirrorpair.errors import PeerProtocolError, RefusedError
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.peerbeat import BeatHandler, Heart, Pulse
from mirrorpair.peercontrol import Control, life_of
from mirrorpair.peermessages import (
    MAX_LINE,
    Beat,
    Join,
    Promise,
    Ready,
    Refused,
    Word,
    decode_line,
    encode_line,
    refused,
)
from mirrorpair.text import printable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from mirrorpair.address import Address


class Path:
    """One address, and the connection there is of it."""

    def __init__(
        self, handler: BeatHandler, heart: Heart, node: str, peer: str, address: Address, *, ours: bool
    ) -> None:
        """`ours`: this node listens there, and the peer dials."""
        self._handler, self._heart = handler, heart
        self._node, self._peer = node, peer
        self.address = address
        self.ours = ours
        self.pulse: Pulse | None = None
        """of the connection, while it is accepted and has not been ended"""
        self._writer: asyncio.StreamWriter | None = None

    @property
    def alive(self) -> bool:
        """Whether the peer has been heard here lately."""
        return self.pulse is not None and not self.pulse.hearing.suspected(clock_boottime_ns())

    def hang_up(self) -> None:
        """Ends the connection, if there is one; it is read no further."""
        self.pulse = None
        if self._writer is not None:
            self._writer.transport.abort()

    async def dial(
        self,
        sock: socket.socket,
        current: Callable[[], Control | None],
        negotiate_s: float,
        came_up: Callable[[], None],
    ) -> str:
        """A connection of ours, whose preamble is sent, to its end, and why it ended. `current`: the session that there
        is. RefusedError: the peer does not want it, or the session is over; PeerProtocolError, OSError, EOFError,
        ValueError: it was none."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        try:
            session = current()
            if session is None:
                raise RefusedError("there is no control session")
            async with asyncio.timeout(negotiate_s):
                writer.write(encode_line(self._join(session)))
                verdict = await _read(reader)
            if isinstance(verdict, Refused):
                raise RefusedError(printable(verdict.message))
            if not isinstance(verdict, Ready):
                raise PeerProtocolError(f"{type(verdict).__name__} came where a verdict was due")
            if current() is not session:
                raise RefusedError("the control session was over before the path was up")
            return await self._run(reader, writer, session, came_up)
        finally:
            writer.transport.abort()

    async def accept(
        self,
        sock: socket.socket,
        current: Callable[[], Control | None],
        negotiate_s: float,
        came_up: Callable[[], None],
    ) -> str:
        """A connection of the peer, or of a stranger, behind its preamble. Arguments, result and errors as of
        `dial`."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        try:
            async with asyncio.timeout(negotiate_s):
                join = await _read(reader)
            session = current()
            if not isinstance(join, Join) or session is None or not self._is_of(join, session):
                why = "no control session is known by these numbers"
                writer.write(encode_line(refused(12, why)))
                writer.write_eof()
                raise RefusedError(why)
            writer.write(encode_line(Ready()))
            return await self._run(reader, writer, session, came_up)
        finally:
            writer.transport.abort()

    def _join(self, session: Control) -> Join:
        assert session.hello is not None
        assert session.mine is not None
        return Join(node=self._node, session=session.mine.session, peer_session=session.hello.session)

    def _is_of(self, join: Join, session: Control) -> bool:
        assert session.hello is not None
        assert session.mine is not None
        named = (join.node, join.session, join.peer_session)
        return named == (self._peer, session.hello.session, session.mine.session)

    async def _run(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Control, came_up: Callable[[], None]
    ) -> str:
        """From both having accepted it to its end, and why; nothing when it was ended by `hang_up`."""
        self.hang_up()  # on an earlier one, which must be lost
        assert session.hello is not None
        life = life_of(session.hello)
        pulse = Pulse(self._handler, self._heart, self._peer, writer)
        pulse.heard(clock_boottime_ns())
        self.pulse, self._writer = pulse, writer
        why = ""

        def end(reason: str) -> None:
            nonlocal why
            why = why or reason
            if self.pulse is pulse:
                self.hang_up()

        came_up()
        beating = asyncio.create_task(pulse.run(end))
        try:
            while self.pulse is pulse:
                try:
                    word = await _read(reader)
                except (EOFError, OSError, PeerProtocolError, ValueError, asyncio.LimitOverrunError) as error:
                    if self.pulse is pulse:
                        end(self._broken(error))
                    break
                if self.pulse is not pulse:
                    break  # hung up on meanwhile: to who is proven to be dead nothing is promised
                now = clock_boottime_ns()
                pulse.heard(now)
                if isinstance(word, Beat | Promise):
                    pulse.take(word, now, life)
                else:
                    end(f"{self._peer} sent a {type(word).__name__}")
            return why
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            if self.pulse is pulse:
                self.pulse = None
            if self._writer is writer:
                self._writer = None

    def _broken(self, error: Exception) -> str:
        if isinstance(error, EOFError | OSError):
            return f"{self._peer} closed the connection"
        return f"{self._peer} sent what is no heartbeat: {printable(str(error), 300)}"


async def _read(reader: asyncio.StreamReader) -> Word:
    """EOFError: it hung up. ValueError (asyncio's own), LimitOverrunError: a line that never ends."""
    return decode_line(await reader.readuntil(b"\n"))
