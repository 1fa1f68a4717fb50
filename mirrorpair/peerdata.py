"""A data connection during its handshake: frames of JSON through the channel that the engine then takes over.

Rules:
- The channel blocks, so each call runs in a thread, one at a time; closing shuts the socket first, which ends a call
  that waits.
- Every end has a type: `Stopped` with the peer's reason, UnreachableError for a connection that broke,
  PeerTimeoutError for one that is silent, PeerProtocolError for one that speaks something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from mirrorpair._core import FRAME_ERROR, Channel, ProtocolError
from mirrorpair.errors import MirrorpairError, PeerError, PeerProtocolError, PeerTimeoutError, UnreachableError
from mirrorpair.peermessages import MAX_FRAME, Stop, decode_frame, encode_frame
from mirrorpair.text import printable

HANDSHAKE_S = 10.0


class Stopped(PeerError):  # noqa: N818 - an end that was said, not a failure
    """The data link's handshake was ended, by the peer or by us, with a reason. `stop.kind` says which."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(printable(stop.message), stop.code)
        self.args = (stop,)
        self.stop = stop


class DataConnection:
    """A data connection during its handshake; each call runs in a thread, one at a time."""

    def __init__(self, sock: socket.socket, session: int, name: str) -> None:
        self.name = name
        self._socket = sock
        self._channel = Channel(sock.fileno(), sock.fileno(), session)
        self._lock = asyncio.Lock()

    @property
    def channel(self) -> Channel:
        return self._channel

    @property
    def session(self) -> int:
        """0 at the acceptor before the first frame."""
        return self._channel.session

    async def send(self, kind: int, payload: bytes, timeout: float = HANDSHAKE_S) -> None:
        """PeerTimeoutError, PeerProtocolError."""
        async with self._lock:
            try:
                await asyncio.to_thread(self._channel.send, kind, payload, timeout)
            except TimeoutError:
                raise PeerTimeoutError(f"{self.name} does not take the data link's handshake") from None
            except (OSError, EOFError) as error:
                raise UnreachableError(f"the data connection to {self.name} broke: {error}") from None

    async def recv(self, kind: int, timeout: float = HANDSHAKE_S) -> bytes:
        """The payload of the next frame, which must be of this kind. PeerError: the peer ended the handshake, with the
        kind of end in front (`Stop`)."""
        async with self._lock:
            try:
                found, payload = await asyncio.to_thread(self._channel.recv, timeout, MAX_FRAME)
            except TimeoutError:
                raise PeerTimeoutError(f"{self.name} did not answer in the data link's handshake") from None
            except ProtocolError as error:
                raise PeerProtocolError(f"{self.name} spoke something else on the data link: {error}") from None
            except (OSError, EOFError) as error:
                raise UnreachableError(f"the data connection to {self.name} broke: {error}") from None
        if found == FRAME_ERROR:
            raise Stopped(decode_frame(Stop, payload))
        if found != kind:
            raise PeerProtocolError(f"{self.name} sent a frame of kind {found} where {kind} was due")
        return payload

    async def stop(self, stop: Stop) -> None:
        """Tells the peer why the handshake ends; whether it hears it does not matter."""
        with contextlib.suppress(MirrorpairError):
            await self.send(FRAME_ERROR, encode_frame(stop), 1.0)

    async def close(self, *, shutdown: bool) -> None:
        """`shutdown` False: the engine goes on with its own descriptor."""
        if shutdown:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        async with self._lock:  # a thread may still be in the channel
            self._socket.close()
