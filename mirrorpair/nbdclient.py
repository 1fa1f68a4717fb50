"""A small NBD client over a blocking socket, for tests, the demo and benchmarks: several requests in flight, FUA.

    with connect("/run/mirrorpair/alpha.nbd", "data") as client:
        client.write(0, b"hello", fua=True)
        window = [client.start_read(at, 4096) for at in range(0, 65536, 4096)]
        blocks = [pending.wait() for pending in window]

Rules:
- One thread at a time; a thread that wants its own requests in flight connects anew.
- Replies are taken in while requests are sent: a server that waits for us to read can never make both wait for ever.
- A request is sent as it was asked for. Range, alignment and the largest size are the server's to judge: that is what
  tests want to see. Only what does not fit the fields is refused here.
- An error reply is NbdError and spoils nothing. What is no NBD, or ends with requests unanswered, ends the connection,
  and every request in flight and later raises that error.
- Simple replies, no TLS, nothing else: what it does not ask for, a server does not do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Self
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from mirrorpair.endpoint import join_address, parse_address
from mirrorpair.errors import (
    MirrorpairError,
    PeerProtocolError,
    PeerTimeoutError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from mirrorpair.handshake import (
    BLOCK_INFO,
    CLIENT_FLAGS,
    EXPORT_INFO,
    FIXED_NEWSTYLE,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INIT_MAGIC,
    MAX_REQUEST,
    NO_ZEROES,
    OPT_GO,
    OPTION_HEADER,
    OPTION_MAGIC,
    READ_ONLY,
    REP_ACK,
    REP_ERROR,
    REP_INFO,
    REPLY_HEADER,
    REPLY_MAGIC,
)
from mirrorpair.text import printable

if TYPE_CHECKING:
    from types import TracebackType

Buffer = bytes | bytearray | memoryview

DEFAULT_PORT = 10809
TIMEOUT_S = 30.0

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6
FLAG_FUA = 1 << 0
FLAG_NO_HOLE = 1 << 1

MAX_ANSWER = 64 * 1024  # bytes of one reply to an option; a string has at most 4096
MAX_ANSWERS = 64

_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
_TIMEVAL = struct.Struct("@ll")
_NAMES = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_DISC: "disconnect",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_WRITE_ZEROES: "write-zeroes",
}


class NbdError(RemoteError):
    """The server answered a request with an error: `errno` is its number, with NBD's meanings."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.args = (message, number)
        self.errno = number


class ExportRefusedError(RemoteError):
    """The server does not give us this export: `reply` is the kind of its answer, the message holds its text."""

    def __init__(self, message: str, reply: int) -> None:
        super().__init__(message)
        self.args = (message, reply)
        self.reply = reply


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where an export is: a unix socket (`path`), or `host` and `port`."""

    path: str | None = None
    host: str = ""
    port: int = DEFAULT_PORT
    export: str = ""

    def __str__(self) -> str:
        return printable(f"unix:{self.path}" if self.path is not None else f"tcp:{join_address(self.host, self.port)}")


def parse_target(text: str, export: str | None = None) -> Target:
    """`nbd://host[:port]/export`, `nbd+unix:///export?socket=PATH`, `unix:PATH`, `tcp:HOST:PORT` or the path of a unix
    socket. `export` overrules what the text names. UsageError for anything else."""
    kind, _, rest = text.partition(":")
    if "://" not in text:
        if kind == "tcp":
            host, port = parse_address(rest)
            return Target(host=host, port=port, export=export or "")
        path = rest if kind == "unix" else text
        if not path or "\0" in path:
            raise UsageError(f"{printable(text)!r} names no NBD server; write nbd://host/export, or a socket's path")
        return Target(path=path, export=export or "")
    try:
        parts = urlsplit(text)
        name, named = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{printable(text)}: {error}") from None
    chosen = unquote(parts.path.removeprefix("/")) if export is None else export
    if parts.scheme == "nbd" and name:
        return Target(host=name, port=DEFAULT_PORT if named is None else named, export=chosen)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme == "nbd+unix" and not parts.netloc and len(sockets) == 1:
        return Target(path=sockets[0], export=chosen)
    if parts.scheme.startswith("nbds"):
        raise UsageError(f"{printable(text)}: this client has no TLS, and never falls back to clear")
    raise UsageError(f"{printable(text)}: write nbd://host[:port]/export or nbd+unix:///export?socket=PATH")


def connect(target: str | os.PathLike[str], export: str | None = None, *, timeout: float = TIMEOUT_S) -> NbdClient:
    """Connects and negotiates; `target` as for `parse_target`. `timeout` in seconds is for each of: connecting,
    negotiating, and later each wait for a reply.

    Raises UnreachableError, ExportRefusedError, PeerTimeoutError, PeerProtocolError.
    """
    where = parse_target(os.fspath(target), export)
    sock = _open(where, timeout)
    try:
        return NbdClient(sock, where, timeout)
    except BaseException:
        sock.close()
        raise


class Pending:
    """A request in flight."""

    def __init__(self, client: NbdClient, command: int, offset: int, length: int) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.error: MirrorpairError | None = None
        self.done = False
        self.data = bytearray()
        self._client = client

    def wait(self, timeout: float | None = None) -> bytes:
        """A READ's data, else b""; raises NbdError, or what ended the connection. PeerTimeoutError when there is no
        answer within `timeout` seconds (the client's when None): it stays in flight, and may be waited for again."""
        self._client.settle(self, timeout)
        if self.error is not None:
            raise self.error
        return bytes(self.data)

    def __str__(self) -> str:
        return f"{_NAMES.get(self.command, f'request {self.command}')} of {self.length} bytes at {self.offset}"


class NbdClient:
    """A connection in its transmission phase; made by `connect`.

    `size` in bytes; `flags` are the transmission flags; `block_sizes` (smallest, preferred, largest request) in bytes
    as the server said, or NBD's defaults.
    """

    def __init__(self, sock: socket.socket, target: Target, timeout: float) -> None:
        self.target = target
        self.timeout = timeout
        self._socket = sock
        self._lost: MirrorpairError | None = None
        self._pending: dict[int, Pending] = {}
        self._cookie = 0
        self._header = bytearray(_REPLY.size)
        self._reading: Pending | None = None  # whose data is being received; None: a header is
        self._space = memoryview(self._header)  # what is still to be received of it
        self.size, self.flags, self.block_sizes = _negotiate(sock, target, timeout)
        sock.setblocking(False)

    @property
    def socket(self) -> socket.socket:
        """For tests that send what no client should. Non-blocking."""
        return self._socket

    @property
    def read_only(self) -> bool:
        return bool(self.flags & READ_ONLY)

    @property
    def in_flight(self) -> int:
        return len(self._pending) + (self._reading is not None)

    def start(
        self, command: int, offset: int = 0, length: int = 0, *, payload: Buffer = b"", flags: int = 0
    ) -> Pending:
        """Sends any request at all, right or wrong; ValueError when a number does not fit its field."""
        if self._lost is not None:
            raise self._lost
        self._cookie += 1
        try:
            head = _REQUEST.pack(_REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        except struct.error:
            raise ValueError(
                f"a request cannot hold offset {offset}, length {length}, command {command}, flags {flags}"
            ) from None
        pending = Pending(self, command, offset, length)
        self._pending[self._cookie] = pending
        self._send(head, payload)
        return pending

    def start_read(self, offset: int, length: int) -> Pending:
        return self.start(CMD_READ, offset, length)

    def start_write(self, offset: int, data: Buffer, *, fua: bool = False) -> Pending:
        """`data` is sent when this returns and may be changed."""
        size = memoryview(data).nbytes
        return self.start(CMD_WRITE, offset, size, payload=data, flags=FLAG_FUA if fua else 0)

    def start_flush(self) -> Pending:
        return self.start(CMD_FLUSH)

    def start_trim(self, offset: int, length: int, *, fua: bool = False) -> Pending:
        return self.start(CMD_TRIM, offset, length, flags=FLAG_FUA if fua else 0)

    def start_write_zeroes(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False) -> Pending:
        flags = (FLAG_FUA if fua else 0) | (FLAG_NO_HOLE if no_hole else 0)
        return self.start(CMD_WRITE_ZEROES, offset, length, flags=flags)

    def read(self, offset: int, length: int) -> bytes:
        return self.start_read(offset, length).wait()

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        self.start_write(offset, data, fua=fua).wait()

    def flush(self) -> None:
        self.start_flush().wait()

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.start_trim(offset, length, fua=fua).wait()

    def write_zeroes(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False) -> None:
        self.start_write_zeroes(offset, length, fua=fua, no_hole=no_hole).wait()

    def close(self) -> None:
        """Says that it leaves, and leaves. Nobody waits for what is in flight."""
        if self._lost is None:
            with contextlib.suppress(OSError):  # without room for it there is nobody to hear it
                self._socket.send(_REQUEST.pack(_REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        self.hang_up()

    def hang_up(self) -> None:
        """Leaves without a word, as a client that was killed does."""
        self._lose(UsageError("this NBD connection was closed"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def settle(self, pending: Pending, timeout: float | None = None) -> None:
        """Takes in replies until `pending` is done, well or badly; PeerTimeoutError as `Pending.wait`."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not pending.done:
            if not self._wait_for(select.POLLIN, deadline):
                raise PeerTimeoutError(f"{self.target}: no answer to a {pending} within {limit:g} s")
            self._receive()

    def _send(self, head: bytes, payload: Buffer) -> None:
        parts = [memoryview(head), memoryview(payload).cast("B")]
        while parts:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                self._await_room()
            except OSError as error:
                # What it answered before it hung up is not lost.
                while self._lost is None and self._wait_for(select.POLLIN, 0.0):
                    self._receive()
                self._lose(PeerProtocolError(f"{self.target}: the connection was lost: {error.strerror}"))
            else:
                parts = _behind(parts, sent)
            if self._lost is not None:
                raise self._lost

    def _await_room(self) -> None:
        """Until something can be sent, or was received: both bring us on."""
        ready = self._wait_for(select.POLLIN | select.POLLOUT, time.monotonic() + self.timeout)
        if not ready:
            # Half a request is out: whatever was sent next would be taken for its other half.
            self._lose(PeerTimeoutError(f"{self.target}: the server took nothing for {self.timeout:g} s"))
        elif ready & ~select.POLLOUT:
            self._receive()

    def _wait_for(self, events: int, deadline: float) -> int:
        poll = select.poll()
        poll.register(self._socket, events)
        left = max(0.0, deadline - time.monotonic())
        return sum(event for _, event in poll.poll(left * 1000))

    def _receive(self) -> None:
        """Takes in what has come, at least once and until a piece is complete."""
        try:
            got = self._socket.recv_into(self._space)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(PeerProtocolError(f"{self.target}: the connection was lost: {error.strerror}"))
            return
        if not got:
            unanswered = f" with {len(self._pending)} requests unanswered" if self._pending else ""
            self._lose(PeerProtocolError(f"{self.target}: the server hung up{unanswered}"))
            return
        self._space = self._space[got:]
        if not self._space.nbytes:
            self._complete()

    def _complete(self) -> None:
        if self._reading is not None:
            self._reading.done = True
            self._reading = None
            self._space = memoryview(self._header)
            return
        self._space = memoryview(self._header)
        magic, number, cookie = _REPLY.unpack(self._header)
        pending = self._pending.pop(cookie, None) if magic == _REPLY_MAGIC else None
        if pending is None:
            self._lose(PeerProtocolError(f"{self.target}: the server sent what answers no request"))
        elif number:
            reason = os.strerror(number) if number in errno.errorcode else f"error {number}"
            pending.error = NbdError(f"{self.target}: a {pending} failed at the server: {reason}", number)
            pending.done = True
        elif pending.command == CMD_READ and pending.length:
            pending.data = bytearray(pending.length)
            self._reading = pending
            self._space = memoryview(pending.data)
        else:
            pending.done = True

    def _lose(self, error: MirrorpairError) -> None:
        """The end of the connection; the first reason stays."""
        if self._lost is None:
            self._lost = error
            unanswered = [*self._pending.values(), *([self._reading] if self._reading is not None else [])]
            for pending in unanswered:
                pending.error = error
                pending.done = True
            self._pending.clear()
            self._reading = None
        self._socket.close()


def _behind(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts` behind the first `sent` bytes; no empty piece is."""
    left = []
    for part in parts:
        skipped = min(sent, part.nbytes)
        sent -= skipped
        if skipped < part.nbytes:
            left.append(part[skipped:])
    return left


def _open(target: Target, timeout: float) -> socket.socket:
    try:
        if target.path is None:
            sock = socket.create_connection((target.host, target.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Python's own time-out makes connect non-blocking, which fails at once while the server's queue is full.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(*divmod(int(timeout * 1e6), 10**6)))
            sock.connect(target.path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
        except BaseException:
            sock.close()
            raise
        return sock
    except (TimeoutError, BlockingIOError) as error:
        raise UnreachableError(f"{target}: no connection within {timeout:g} s") from error
    except (OSError, UnicodeError) as error:
        # Some have no errno, such as the one for a path that is too long for a socket.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UnreachableError(f"{target}: {reason}; does an NBD server run there?") from error


def _negotiate(sock: socket.socket, target: Target, timeout: float) -> tuple[int, int, tuple[int, int, int]]:
    """Size, transmission flags, block sizes."""
    reader = _Reader(sock, target, timeout)
    if reader.take(len(INIT_MAGIC)) != INIT_MAGIC or reader.take(len(OPTION_MAGIC)) != OPTION_MAGIC:
        raise PeerProtocolError(f"{target}: what answers there is not a newstyle NBD server")
    offered = int.from_bytes(reader.take(2), "big")
    if not offered & FIXED_NEWSTYLE:
        raise PeerProtocolError(f"{target}: this NBD server is too old: it does not speak fixed newstyle")
    name = target.export.encode("utf-8", "surrogateescape")
    question = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
    reader.send(
        CLIENT_FLAGS.pack(offered & (FIXED_NEWSTYLE | NO_ZEROES))
        + OPTION_HEADER.pack(OPTION_MAGIC, OPT_GO, len(question))
        + question
    )
    export: tuple[int, int] | None = None
    block_sizes = (1, 4096, MAX_REQUEST)
    for _ in range(MAX_ANSWERS):
        magic, option, kind, length = REPLY_HEADER.unpack(reader.take(REPLY_HEADER.size))
        if magic != REPLY_MAGIC or option != OPT_GO or length > MAX_ANSWER:
            raise PeerProtocolError(f"{target}: the server's answer to our request for an export is not valid")
        data = reader.take(length)
        if kind & REP_ERROR:
            said = printable(data.decode("utf-8", "surrogateescape"), 1000) or f"error {kind & ~REP_ERROR}"
            raise ExportRefusedError(f"{target}: refused export {printable(target.export, 100)!r}: {said}", kind)
        info = int.from_bytes(data[:2], "big") if len(data) >= 2 else None
        if kind == REP_ACK and export is not None:
            return *export, block_sizes
        if kind != REP_INFO or info is None:
            raise PeerProtocolError(f"{target}: the server's answer to our request for an export is not valid")
        if info == INFO_EXPORT and len(data) == 2 + EXPORT_INFO.size:
            export = EXPORT_INFO.unpack(data[2:])
        elif info == INFO_BLOCK_SIZE and len(data) == 2 + BLOCK_INFO.size:
            block_sizes = BLOCK_INFO.unpack(data[2:])
    raise PeerProtocolError(f"{target}: the server answers a request for an export without end")


class _Reader:
    """Exact reads and writes before one deadline, which is for the whole negotiation."""

    def __init__(self, sock: socket.socket, target: Target, timeout: float) -> None:
        self._socket = sock
        self._target = target
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    def take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                self._arm()
                got = self._socket.recv(count - len(data))
            except OSError as error:
                raise self._failed(error) from error
            if not got:
                raise PeerProtocolError(f"{self._target}: the server hung up during the negotiation")
            data += got
        return bytes(data)

    def send(self, data: bytes) -> None:
        try:
            self._arm()
            self._socket.sendall(data)
        except OSError as error:
            raise self._failed(error) from error

    def _arm(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _failed(self, error: OSError) -> RemoteError:
        if isinstance(error, TimeoutError):
            return PeerTimeoutError(f"{self._target}: no answer within {self._timeout:g} s")
        return PeerProtocolError(f"{self._target}: the server hung up during the negotiation: {error.strerror}")
