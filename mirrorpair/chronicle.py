"""What became of this node's role and disks, kept on its disk: `<folder>/history`, one line a change.

    digest of the rest, one blank, the change as JSON

Rules:
- A line is appended by one write and is durable when `append` returns. A crash leaves at most a torn last line: the
  next writer cuts it off, readers pass it over. What was there before it stays.
- Bounded: a file that would grow beyond MAX_BYTES is replaced by the newest half of it, beside, synced, renamed; a
  crash leaves the old one or the new one.
- A damaged line costs itself alone.
- It is told of what was decided and decides nothing: a disk that is full or slow delays lines, never a role (`Scribe`).
  What could not be written is tried again with the next line, up to MAX_WAITING of them.
- One writer at a time: the daemon, which has the node file locked. It may be read at any time, daemon or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections import deque
from typing import Literal, NamedTuple

import msgspec

from mirrorpair._core import digest128
from mirrorpair.errors import ImageError
from mirrorpair.jsontypes import decoder
from mirrorpair.text import printable

MAX_BYTES = 1 << 20
MAX_LINE_BYTES = 8192
MAX_WAITING = 1000
MAX_REASON = 1000
_SEED = 0x48495354
_DIGEST_CHARS = 32
_TYPES = os.O_CLOEXEC | os.O_NOFOLLOW

log = logging.getLogger("mirrorpair.node")


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One change. `seq` counts from 1 in the life of this node; `time_s` is wall-clock time in seconds since 1970."""

    schema: str = "mirrorpair.history/1"
    seq: int
    time_s: float
    node: str
    epoch: int
    kind: Literal["role", "disk"]
    volume: str | None = None
    old: str | None = msgspec.field(default=None, name="from")
    new: str = msgspec.field(name="to")
    reason: str


class Found(NamedTuple):
    """`entries`: oldest first; `damaged`: how many lines say nothing; `whole`: up to where the file is made of whole
    lines, bytes; `size`: its length."""

    entries: list[Entry]
    damaged: int
    whole: int
    size: int


def load(path: str) -> Found:
    """Nothing when there is no file. ImageError: it cannot be read. A last line without its end is not counted as
    damaged: it may just be being written."""
    try:
        fd = os.open(path, os.O_RDONLY | _TYPES)
        with open(fd, "rb") as file:
            data = file.read(2 * MAX_BYTES)
    except FileNotFoundError:
        return Found([], 0, 0, 0)
    except OSError as error:
        raise _cannot("read", path, error) from error
    entries: list[Entry] = []
    damaged = 0
    lines = data.split(b"\n")
    torn = lines.pop()
    for line in lines:
        entry = _decode(line)
        if entry is None:
            damaged += 1
        elif not entries or entry.seq > entries[-1].seq:  # else written once more, since nobody knew that it was
            entries.append(entry)
    return Found(entries, damaged, len(data) - len(torn), len(data))


class Chronicle:
    """The file, to be appended to. Every method blocks; one thread at a time is let in."""

    def __init__(self, path: str) -> None:
        """ImageError: what is there cannot be read."""
        self._path = path
        self._one = threading.Lock()
        found = load(path)
        self._kept = deque((entry, _encode(entry)) for entry in found.entries)
        self._size = found.size
        self._whole = found.whole
        self._there = found.size > 0

    @property
    def entries(self) -> list[Entry]:
        return [entry for entry, _ in self._kept]

    def append(self, entries: list[Entry]) -> None:
        """Durable when it returns. ImageError: none of them counts as written."""
        lines = [(entry, _encode(entry)) for entry in entries]
        new = b"".join(line for _, line in lines)
        with self._one:
            try:
                if self._size + len(new) > MAX_BYTES:
                    self._replace(lines)
                else:
                    self._append(new)
                    self._kept.extend(lines)
            except OSError as error:
                raise _cannot("write", self._path, error) from error

    def _append(self, new: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _TYPES, 0o600)
        try:
            os.ftruncate(fd, self._whole)  # what an earlier writer, or a failed write, left of a line
            self._size = self._whole
            written = os.write(fd, new)
            if written != len(new):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(fd)
        finally:
            os.close(fd)
        if not self._there:
            _sync_folder(self._path)
            self._there = True
        self._size = self._whole = self._whole + len(new)

    def _replace(self, lines: list[tuple[Entry, bytes]]) -> None:
        """The newest of all that half of the room holds."""
        kept: deque[tuple[Entry, bytes]] = deque()
        room = MAX_BYTES // 2
        for entry, line in reversed([*self._kept, *lines]):
            room -= len(line)
            if room < 0:
                break
            kept.appendleft((entry, line))
        data = b"".join(line for _, line in kept)
        beside = self._path + ".new"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _TYPES, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        finally:
            os.close(fd)
        os.rename(beside, self._path)
        self._kept, self._size, self._whole, self._there = kept, len(data), len(data), True
        _sync_folder(self._path)


class Scribe:
    """Writes changes down beside the event loop, in their order; `close` writes what is left."""

    def __init__(self, path: str) -> None:
        """Blocks. A file that cannot be read is told in the log, and left alone."""
        self._chronicle: Chronicle | None = None
        self._seq = 0
        self._last: dict[tuple[str, str | None], str] = {}
        self._waiting: deque[Entry] = deque(maxlen=MAX_WAITING)
        self._wanted = asyncio.Event()
        self._closing = False
        self._trouble = False
        try:
            self._chronicle = Chronicle(path)
        except ImageError as error:
            log.warning("this node's history is not kept: %s", error)
            return
        for entry in self._chronicle.entries:
            self._seq = max(self._seq, entry.seq)
            self._last[entry.kind, entry.volume] = entry.new

    async def write_on(self) -> None:
        """Until `close`, and then what is left."""
        while self._chronicle is not None:
            await self._wanted.wait()
            self._wanted.clear()
            closing = self._closing  # looked at first: what is added after that, nobody waits for
            if batch := list(self._waiting):
                self._written(batch, await asyncio.to_thread(self._try, batch))
            if closing:
                return

    def last(self, kind: Literal["role", "disk"], volume: str | None = None) -> str | None:
        """What was written last, also by an earlier daemon."""
        return self._last.get((kind, volume))

    def add(
        self,
        time_s: float,
        node: str,
        epoch: int,
        kind: Literal["role", "disk"],
        reason: str,
        *,
        volume: str | None = None,
        old: str | None,
        new: str,
    ) -> None:
        self._last[kind, volume] = new
        if self._chronicle is None:
            return
        self._seq += 1
        self._waiting.append(
            Entry(
                seq=self._seq,
                time_s=time_s,
                node=node,
                epoch=epoch,
                kind=kind,
                volume=volume,
                old=old,
                new=new,
                reason=printable(reason, MAX_REASON),
            )
        )
        self._wanted.set()

    def close(self) -> None:
        """Ends `write_on`."""
        self._closing = True
        self._wanted.set()

    def _try(self, batch: list[Entry]) -> ImageError | None:
        assert self._chronicle is not None
        try:
            self._chronicle.append(batch)
        except ImageError as error:
            return error
        return None

    def _written(self, batch: list[Entry], trouble: ImageError | None) -> None:
        if trouble is not None and not self._trouble:
            log.warning("what happens to this node is not written down for now: %s", trouble)
        self._trouble = trouble is not None
        while trouble is None and self._waiting and self._waiting[0].seq <= batch[-1].seq:
            self._waiting.popleft()


def _encode(entry: Entry) -> bytes:
    body = msgspec.json.encode(entry)
    line = b"%s %s\n" % (_digest(body), body)
    assert len(line) <= MAX_LINE_BYTES
    return line


def _decode(line: bytes) -> Entry | None:
    body = line[_DIGEST_CHARS + 1 :]
    if line[: _DIGEST_CHARS + 1] != _digest(body) + b" ":
        return None
    try:
        return decoder(Entry).decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _digest(body: bytes) -> bytes:
    return digest128(body, _SEED).hex().encode()


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cannot(what: str, path: str, error: OSError) -> ImageError:
    return ImageError(f"cannot {what} {printable(path)}: {error.strerror}")
