"""Engines of one process, joined by sockets: what the tests of the data plane stand on.

Rules:
- Real images, real metadata files, real sockets; only the negotiations are left out, which are Python's.
- Everything waits for an event or for bytes, with a limit, never for a time.
- `Client` speaks NBD's transmission phase by hand and checks what it reads against nothing: the test does.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from mirrorpair import _core

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1024
MIB = 1024 * KIB
BLOCK = 64 * KIB
LIMIT_S = 30.0

READ, WRITE, DISCONNECT, FLUSH, TRIM, _, ZEROES = range(7)
FUA, NO_HOLE = 1, 2
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW = 1, 5, 22, 28, 75

LOG_AT, RECORD, BITMAP_AT = 8192, 8192, 65536


class Event(NamedTuple):
    kind: str
    a: int
    b: int
    text: str


def new_metadata(path: Path, size: int, block: int = BLOCK) -> int:
    """An empty activity log and an empty bitmap, as `init` makes them."""
    blocks = -(-size // block)
    words = -(-blocks // 64)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, BITMAP_AT + -(-words * 8 // 4096) * 4096)
    record = bytearray(RECORD)
    record[:8] = b"MPRACTLG"
    record[24:40] = _core.digest128(bytes(record))
    os.pwrite(fd, record, LOG_AT)
    return fd


class Node:
    """One engine with its images. `close` is a kill: nothing is made durable that was not."""

    def __init__(
        self,
        folder: Path,
        name: str,
        sizes: tuple[int, ...] = (16 * MIB,),
        block: int = BLOCK,
        resync_rate: int = 0,
    ) -> None:
        self.paths = [folder / f"{name}.{i}.img" for i in range(len(sizes))]
        self.sizes = sizes
        self.block = block
        self.resync_rate = resync_rate
        self.fds, self.metas = [], []
        for i, (path, size) in enumerate(zip(self.paths, sizes, strict=True)):
            self.fds.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            os.ftruncate(self.fds[-1], size)
            self.metas.append(new_metadata(folder / f"{name}.{i}.meta", size, block))
        self.events: list[Event] = []
        self.sockets: list[socket.socket] = []  # closed with it
        self.engine = self._open()

    def _open(self) -> _core.Engine:
        engine = _core.Engine(
            [(fd, size, meta, self.block) for fd, size, meta in zip(self.fds, self.sizes, self.metas, strict=True)],
            resync_rate=self.resync_rate,
        )
        engine.start()
        return engine

    def reopen(self) -> None:
        """As after a kill of the process: the page cache is what it was."""
        self.engine.stop()
        self.events.clear()
        self.engine = self._open()

    def close(self) -> None:
        self.engine.stop()
        for sock in self.sockets:
            sock.close()
        for fd in [*self.fds, *self.metas]:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, kind: str) -> Event:
        """The next event of this kind; others are kept."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            for i, event in enumerate(self.events):
                if event.kind == kind:
                    return self.events.pop(i)
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind} came, but {self.events}"
            select.select([self.engine.event_fd], [], [], left)
            self.events += [Event(*event) for event in self.engine.take_events()]

    def grant(self, mode: int, epoch: int = 1, until: int = _core.NO_LIMIT, cover: int = 0) -> None:
        self.engine.set_grant(epoch, until, mode, cover)

    def flush(self, token: int = 1) -> Event:
        self.engine.barrier(token)
        return self.wait("flushed")

    def content(self, volume: int = 0) -> bytes:
        return self.paths[volume].read_bytes()

    def dirty(self, volume: int = 0) -> int:
        return self.engine.volume_status(volume).dirty_blocks


def join(
    source: Node,
    target: Node,
    plans: list[int] | None = None,
    *,
    epoch: int = 1,
    session: int = 77,
    timeout: float = 20.0,
    ends: tuple[socket.socket, socket.socket] | None = None,
) -> None:
    """A session between two engines. `ends`: the source's and the target's, which may have something between them."""
    near, far = ends or socket.socketpair()
    plans = plans or [_core.PLAN_NONE] * len(source.sizes)
    for node, sock, is_source in ((target, far, False), (source, near, True)):
        with sock:
            channel = _core.Channel(sock.fileno(), sock.fileno(), session)
            node.engine.attach_link(channel, epoch=epoch, source=is_source, plans=plans, timeout=timeout)


def in_sync(source: Node, target: Node) -> None:
    for _ in source.sizes:
        source.wait("resync-done")
        target.wait("resync-done")


class MakeNode(Protocol):
    """conftest's fixture; without sizes, one volume of 16 MiB."""

    def __call__(self, name: str, *sizes: int, block: int = BLOCK, resync_rate: int = 0) -> Node: ...


@dataclass
class Client:
    """An NBD client behind its negotiation."""

    node: Node
    volume: int = 0
    read_only: bool = False
    cookie: int = 0
    reads: dict[int, int] = field(default_factory=dict)
    answers: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sock, far = socket.socketpair()
        self.sock.settimeout(LIMIT_S)
        self.node.sockets.append(self.sock)
        with far:
            self.node.engine.add_client(far.fileno(), self.volume, read_only=self.read_only)

    def start(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        self.cookie += 1
        if kind == READ:
            self.reads[self.cookie] = length
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, self.cookie, offset, length) + data)
        return self.cookie

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = self.sock.recv(count - len(found))
            if not piece:
                raise EOFError("hung up")
            found += piece
        return found

    def wait(self, cookie: int) -> tuple[int, bytes]:
        """(error, data) of one request; answers to others are kept."""
        while cookie not in self.answers:
            magic, error, which = struct.unpack(">IIQ", self._exactly(16))
            assert magic == 0x67446698
            data = self._exactly(self.reads.pop(which)) if which in self.reads and not error else b""
            assert which not in self.answers
            self.answers[which] = (error, data)
        return self.answers.pop(cookie)

    def pending(self, cookie: int) -> bool:
        """Whether no byte of an answer has come: what is asked for twice is held, not slow."""
        return cookie not in self.answers and not select.select([self.sock], [], [], 0)[0]

    def call(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        return self.wait(self.start(kind, offset, length, data, flags))

    def read(self, offset: int, length: int) -> bytes:
        error, data = self.call(READ, offset, length)
        assert error == 0
        return data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        assert self.call(WRITE, offset, len(data), data, flags) == (0, b"")

    def close(self) -> None:
        self.sock.close()
