"""What a power cut leaves of one host's files, from the record of its writes (shim.c).

Rules:
- Durable is what an fdatasync or fsync covers that has ended: of the same file, and writes that had ended before it
  began. A write with RWF_DSYNC is durable when it has ended. The rest is pending, in the page cache or the disk's.
- Of pending sectors each holds any of its versions: none ("drop"), all ("keep", as after a kill), whole writes by
  chance ("some"), or each sector for itself ("torn"). Chance is the caller's `rng`: a seed repeats it.
- A file that was renamed is there as the old one or the new one until the folder was synced; one that was not synced
  before holds what was durable of it.
- Time is CLOCK_MONOTONIC ns; a call that has begun and not ended may have happened.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from oracle import SECTOR, content

if TYPE_CHECKING:
    import random
    from pathlib import Path

_HEAD = struct.Struct("<IBBHQQqqQ")
_PWRITE, _PWRITEV2, _WRITE, _FDATASYNC, _FSYNC, _FALLOCATE, _RENAME = range(7)
_OPEN = 9
_DSYNC = 0x2 | 0x4  # RWF_DSYNC, RWF_SYNC
_ZEROS = bytes(SECTOR)
MODES = ("drop", "keep", "some", "torn")
Sectors = dict[int, bytes]


class Event(NamedTuple):
    clock_ns: int
    end: bool
    call: int
    id: int
    name: str
    offset: int
    length: int
    flags: int
    data: bytes


def read_log(path: Path) -> list[Event]:
    """Its records in their order; the last one of a process that was killed may lack its end."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size, kind, call, name, number, clock_ns, offset, length, flags = _HEAD.unpack_from(data, at)
        text = data[at + _HEAD.size : at + _HEAD.size + name].decode()
        payload = data[at + _HEAD.size + name : at + size]
        found.append(Event(clock_ns, bool(kind), call, number, text, offset, length, flags, payload))
        at += size
    return sorted(found, key=lambda event: event.clock_ns)


class Pending:
    """A write that is not durable."""

    __slots__ = ("ended_ns", "sectors")

    def __init__(self, sectors: Sectors) -> None:
        self.sectors = sectors
        self.ended_ns: int | None = None


class File:
    def __init__(self, durable: Sectors) -> None:
        self.durable = durable
        self.pending: list[Pending] = []

    def flushed(self, began_ns: int) -> None:
        left = []
        for one in self.pending:
            if one.ended_ns is not None and one.ended_ns <= began_ns:
                self.durable.update(one.sectors)
            else:
                left.append(one)
        self.pending = left

    def alone(self, write: Pending) -> None:
        """RWF_DSYNC has ended: it is durable, and nothing older of these sectors can come."""
        self.pending.remove(write)
        self.durable.update(write.sectors)
        for one in self.pending:
            one.sectors = {at: data for at, data in one.sectors.items() if at not in write.sectors}

    def left(self, mode: str, rng: random.Random) -> Sectors:
        found = dict(self.durable)
        if mode == "torn":
            versions: dict[int, list[bytes]] = {}
            for one in self.pending:
                for at, data in one.sectors.items():
                    versions.setdefault(at, [found.get(at, _ZEROS)]).append(data)
            found.update({at: rng.choice(each) for at, each in versions.items()})
            return found
        kept = {"drop": 0.0, "keep": 1.0, "some": rng.random()}[mode]
        for one in self.pending:
            if mode == "keep" or rng.random() < kept:
                found.update(one.sectors)
        return found


class Host:
    """The files of one host as they are at a time that moves on."""

    def __init__(self, folder: Path, names: list[str], log: Path) -> None:
        """As they are now, durable; `log` may not be there yet."""
        self._log = log
        self.files = {name: File(content(folder / name)) for name in names if (folder / name).exists()}
        self._renamed: dict[str, File] = {}
        """name -> what else it may still be"""

    def record(self) -> list[Event]:
        return read_log(self._log)

    def play(self, event: Event, open_calls: dict[int, tuple[Event, Pending | None]]) -> None:
        if event.end:
            began, write = open_calls.pop(event.id)
            if event.length < 0:
                return
            file = self.files.get(began.name)
            if write is not None and file is not None:
                write.ended_ns = event.clock_ns
                if began.call == _PWRITEV2 and began.flags & _DSYNC:
                    file.alone(write)
            elif began.call in (_FDATASYNC, _FSYNC) and file is not None:
                file.flushed(began.clock_ns)
            elif began.call == _FSYNC:
                for name in [one for one in self._renamed if os.path.dirname(one) == began.name]:
                    del self._renamed[name]
            elif began.call == _RENAME:
                new = began.data.decode()
                self._renamed.setdefault(new, self.files.get(new, File({})))
                self.files[new] = self.files.pop(began.name)
            return
        write = None
        if event.call == _OPEN:
            self.files[event.name] = File({})
        elif event.call in (_PWRITE, _PWRITEV2, _WRITE, _FALLOCATE):
            write = Pending(self._sectors(event))
            self.files.setdefault(event.name, File({})).pending.append(write)
        open_calls[event.id] = (event, write)

    def _sectors(self, event: Event) -> Sectors:
        if event.call == _FALLOCATE:
            assert event.offset % SECTOR == event.length % SECTOR == 0
            return dict.fromkeys(range(event.offset // SECTOR, (event.offset + event.length) // SECTOR), _ZEROS)
        assert event.offset % SECTOR == 0
        data = event.data + bytes(-len(event.data) % SECTOR)
        return {(event.offset + i) // SECTOR: data[i : i + SECTOR] for i in range(0, len(data), SECTOR)}

    def cut(self, name: str, mode: str, rng: random.Random) -> Sectors:
        file = self.files[name]
        if name in self._renamed and (mode == "drop" or (mode != "keep" and rng.random() < 0.5)):
            file = self._renamed[name]
        return file.left(mode, rng)


def joined(sectors: Sectors, size: int) -> bytes:
    data = bytearray(size)
    for at, one in sectors.items():
        data[at * SECTOR : (at + 1) * SECTOR] = one
    return bytes(data[:size])


def put(path: Path, sectors: Sectors) -> None:
    """Into the same file: an image with another inode would be another image."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(size)
        for at, one in sectors.items():
            if one != _ZEROS:
                file.seek(at * SECTOR)
                file.write(one)
        file.flush()
        os.fsync(file.fileno())
