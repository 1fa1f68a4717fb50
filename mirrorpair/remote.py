"""The near half of a session with a far end: hello, welcome, start.

Rules:
- The far end's answers are checked against what was asked before anything here is opened for writing.
- Each way a handshake can fail has its own error: no way there 11, silence 13, its own refusal with its own code,
  anything that is not the protocol 1 with the first bytes shown.
- Until `start`, leaving is harmless: the far end undoes what opening the image did.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from mirrorpair import __version__, _core
from mirrorpair.errors import MirrorpairError, PeerProtocolError, PeerTimeoutError, UsageError
from mirrorpair.messages import (
    PROTOCOL,
    Hello,
    Kind,
    Role,
    Start,
    Welcome,
    decode_failure,
    decode_welcome,
    encode,
)
from mirrorpair.outcome import peer_error
from mirrorpair.text import printable
from mirrorpair.transport import Connection, connect

if TYPE_CHECKING:
    from types import TracebackType

    from mirrorpair.endpoint import RemoteEndpoint


class FarImage:
    """An image that a far end has opened for us; a context manager that hangs up."""

    def __init__(self, connection: Connection, welcome: Welcome, timeout: float) -> None:
        self.connection = connection
        self.size = welcome.size
        self.kind: Kind = welcome.kind
        self.created = welcome.created
        found = 0 if welcome.created else welcome.size
        self.found_size = found if welcome.before is None else welcome.before
        self.name = connection.name
        self._timeout = timeout

    @property
    def channel(self) -> _core.Channel:
        return self.connection.channel

    def start(self, start: Start) -> None:
        """Says go; from here on the channel belongs to the engine."""
        try:
            self.channel.send(_core.FRAME_START, encode(start), self._timeout)
        except TimeoutError:
            raise _silent(self.name, self._timeout) from None
        except OSError:
            raise PeerProtocolError(
                f"{self.name}: the far end is gone: {self.connection.ending() or 'closed'}"
            ) from None

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_far(
    endpoint: RemoteEndpoint,
    role: Role,
    *,
    write: bool,
    size: int | None,
    create: bool,
    resize: bool,
    timeout: float,
    rsh: str | None,
    remote_command: str | None,
) -> FarImage:
    """Connects and has the far end open its image; `role` is what the far end plays. Raises MirrorpairError."""
    hello = Hello(
        version=__version__, role=role, path=endpoint.path, write=write, size=size, create=create, resize=resize
    )
    try:
        payload = encode(hello)
    except ValueError as error:
        raise UsageError(f"{endpoint}: {error}") from None
    connection = connect(endpoint, session=new_session(), timeout=timeout, rsh=rsh, remote_command=remote_command)
    try:
        welcome = _greet(connection, payload, timeout)
        _check(welcome, hello, connection.name)
    except BaseException:
        connection.close()
        raise
    return FarImage(connection, welcome, timeout)


def new_session() -> int:
    """A number that tells this session's frames from any other's; 0 would mean "adopt the peer's"."""
    return int.from_bytes(os.urandom(8)) or 1


def _greet(connection: Connection, hello: bytes, timeout: float) -> Welcome:
    channel = connection.channel
    try:
        channel.send(_core.FRAME_HELLO, hello, timeout)
    except TimeoutError:
        raise _silent(connection.name, timeout) from None
    except OSError:
        # It may have said why before it closed, and a far end that printed a greeting and died spoke garbage first:
        # what can still be read decides.
        pass
    try:
        kind, payload = channel.recv(timeout)
    except TimeoutError:
        raise _silent(connection.name, timeout) from None
    except (EOFError, OSError):
        raise connection.lost_before_welcome() from None
    except _core.ProtocolError as error:
        raise PeerProtocolError(
            f"{connection.name}: the far end does not speak mirrorpair's protocol: {printable(str(error), 300)}; "
            "a login script that prints (.bashrc, a banner), another service or another version does this"
        ) from None
    if kind == _core.FRAME_ERROR:
        raise peer_error(decode_failure(payload), connection.name)
    if kind != _core.FRAME_WELCOME:
        raise PeerProtocolError(f"{connection.name}: the far end answered the hello with a frame of kind {kind}")
    return decode_welcome(payload)


def _check(welcome: Welcome, hello: Hello, name: str) -> None:
    if not PROTOCOL[0] <= welcome.protocol <= PROTOCOL[1]:
        raise PeerProtocolError(
            f"{name}: the far end (mirrorpair {printable(welcome.version)}) chose protocol {welcome.protocol}, "
            f"this is {__version__} with {PROTOCOL[0]} to {PROTOCOL[1]}; install the same version on both hosts"
        )
    if not hello.write or hello.role != "target" or hello.size is None:
        return
    # Trust, but check: the far end promised to refuse these itself.
    if welcome.size < hello.size or (welcome.kind == "file" and welcome.size != hello.size):
        raise PeerProtocolError(f"{name}: the far end opened a target of {welcome.size} bytes for {hello.size}")


def _silent(name: str, timeout: float) -> MirrorpairError:
    return PeerTimeoutError(
        f"{name}: no answer within {timeout:g} s; if it is merely slow (a password to type, a disk to wake), "
        "give a longer --timeout"
    )
