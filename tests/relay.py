"""A wire that can be told to go wrong: passes bytes on between two sockets, and at one byte of one direction does
damage.

Rules:
- Byte-exact: whatever chunks the kernel makes, the damage happens at the stated offset of that direction's stream.
- What each direction was given and what it passed on is kept, so that a test knows what was really done to the line.
- The end of a stream is passed on as one. Nothing outlives the `with`, but threads of a pool that was handed in.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 20.0

Kind = Literal["none", "flip", "cut", "drop", "duplicate", "insert", "stall", "hold"]


@dataclass(frozen=True)
class Damage:
    """`kind` at byte `offset` of what travels from the first socket to the second, or (`back`) the other way.

    flip       bit `bit` of that byte             cut        both directions end before that byte
    drop       `length` bytes from there on       duplicate  the `length` bytes before it come once more
    insert     `garbage` goes in front of it      stall      nothing passes from there on, nothing ends either
    hold       it and what follows wait for `release`, then pass as they are
    """

    kind: Kind = "none"
    offset: int = 0
    back: bool = False
    bit: int = 0
    length: int = 1
    garbage: bytes = b"\xff"


@dataclass
class Stream:
    """One direction."""

    damage: Damage | None
    given: bytearray = field(default_factory=bytearray)
    passed: bytearray = field(default_factory=bytearray)
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def pass_on(self, chunk: bytes) -> tuple[bytes, bool]:
        """What goes out for `chunk`, and whether the line is alive behind it."""
        begin = len(self.given)
        self.given += chunk
        out, alive = self._damaged(chunk, begin)
        self.passed += out
        return out, alive

    def held_at(self, length: int) -> int | None:
        """Where in the next `length` bytes the line is to wait."""
        if self.damage is None or self.damage.kind != "hold":
            return None
        at = self.damage.offset - len(self.given)
        return at if 0 <= at < length else None

    def _damaged(self, chunk: bytes, begin: int) -> tuple[bytes, bool]:
        damage = self.damage
        if damage is None or damage.kind in ("none", "hold"):
            return chunk, True
        at = damage.offset - begin
        if damage.kind == "drop":
            first, last = max(0, at), max(0, at + damage.length)
            if first < len(chunk) and last > 0:
                self.reached.set()
            return chunk[:first] + chunk[last:], True
        if not 0 <= at < len(chunk):
            return chunk, True
        self.reached.set()
        before, behind = chunk[:at], chunk[at:]
        if damage.kind == "flip":
            return before + bytes([behind[0] ^ 1 << damage.bit]) + behind[1:], True
        if damage.kind == "insert":
            return before + damage.garbage + behind, True
        if damage.kind == "duplicate":
            end = begin + at
            return before + bytes(self.given[max(0, end - damage.length) : end]) + behind, True
        return before, False

    @property
    def intact(self) -> int:
        """How many bytes at the beginning arrived as they were sent."""
        shared = min(len(self.given), len(self.passed))
        if self.given[:shared] == self.passed[:shared]:
            return shared
        return next(i for i, (a, b) in enumerate(zip(self.given, self.passed, strict=False)) if a != b)


class Relay:
    """Owns both sockets from the start on. A `pool` must have two threads free for each relay that lives."""

    def __init__(
        self, first: socket.socket, second: socket.socket, damage: Damage, pool: ThreadPoolExecutor | None = None
    ) -> None:
        self.forth = Stream(None if damage.back else damage)
        self.back = Stream(damage if damage.back else None)
        self._damage = damage
        self._sockets = (first, second)
        for sock in self._sockets:
            sock.settimeout(None)
        self._own_pool = pool is None
        self._pool = pool or ThreadPoolExecutor(2)
        submit = self._pool.submit
        self._ends = [submit(self._run, first, second, self.forth), submit(self._run, second, first, self.back)]

    def _run(self, source: socket.socket, sink: socket.socket, stream: Stream) -> None:
        with contextlib.suppress(OSError):  # one of the two has hung up, perhaps with a reset
            while chunk := source.recv(1 << 18):
                if (at := stream.held_at(len(chunk))) is not None:
                    sink.sendall(stream.pass_on(chunk[:at])[0])
                    chunk = chunk[at:]
                    stream.reached.set()
                    stream.release.wait()
                out, alive = stream.pass_on(chunk)
                sink.sendall(out)
                if alive:
                    continue
                if self._damage.kind == "cut":
                    self._shut()
                return
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _shut(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._shut()
        for stream in (self.forth, self.back):
            stream.release.set()
        for end in self._ends:
            end.result(LIMIT_S)
        if self._own_pool:
            self._pool.shutdown()
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Line:
    """A port of this host that leads to another one, through a Relay, for one connection."""

    def __init__(self, port: int, damage: Damage) -> None:
        self.relay: Relay | None = None
        self._to = port
        self._damage = damage
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LIMIT_S)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed before anybody came
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._to), LIMIT_S)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.relay = Relay(near, far, self._damage)

    @property
    def streams(self) -> tuple[Stream, Stream]:
        """What went to the server, and what came back."""
        self._thread.join(LIMIT_S)
        assert self.relay is not None, "nobody connected"
        return self.relay.forth, self.relay.back

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(LIMIT_S)
        if self.relay is not None:
            self.relay.close()


@contextlib.contextmanager
def line(port: int, damage: Damage | None = None) -> Iterator[Line]:
    made = Line(port, damage or Damage())
    try:
        yield made
    finally:
        made.close()


class Wire:
    """A unix socket that leads to another one, for any number of connections, and can be cut: then nothing passes and
    nothing ends, as on a network that swallows packets; `mend` lets pass what was held."""

    def __init__(self, near: str, far: str) -> None:
        self._far = far
        self._mended = threading.Event()
        self._mended.set()
        self._over = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(near)
        self._listener.listen(64)
        self._start(self._accept)

    def cut(self) -> None:
        self._mended.clear()

    def mend(self) -> None:
        self._mended.set()

    def close(self) -> None:
        self._over = True
        self._mended.set()
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:  # the first of them starts no other one any more once it has ended
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                self._sockets += [near, far]
                if self._over:
                    return
                self._start(self._connect, near, far)

    def _connect(self, near: socket.socket, far: socket.socket) -> None:
        self._mended.wait()
        try:
            far.connect(self._far)
        except OSError:
            self._end(near)  # nobody listens there now
            return
        if self._over:
            self._end(far)
        back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
        back.start()
        self._pass(near, far)
        back.join(LIMIT_S)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 18):
                self._mended.wait()
                sink.sendall(chunk)
        self._mended.wait()
        self._end(sink, socket.SHUT_WR)

    def _end(self, sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(how)
