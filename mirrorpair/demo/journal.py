"""The journal of a volume's writes, kept outside the volume, and what every block may hold by it.

    mirrorpair-demo-journal 1 seed 7302957 block 4096 size 268435456
    sent 1 40960 8192          write 1, of 8192 bytes at 40960, is about to be sent
    done 1                     ... and was acknowledged

Rules:
- `sent` is recorded before a request leaves, `done` after its answer came: it demands too little, never too much.
- A block may hold what its last acknowledged write wrote, or what a later write wrote that was sent and not answered;
  nothing else. Writes to one block never overlap in time (writer.py sees to it), so their numbers are their order.
- A block's content follows from the journal's seed, the write's number and the block's: it says itself who wrote it,
  and no two writes, blocks or runs have the same. Number 0 is the volume's first content: zeros.
- The final verdict is read from the file, not from the memory of whoever wrote.
"""

from __future__ import annotations

import struct
import threading
from array import array
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, NamedTuple, Self

from mirrorpair.errors import LocalError
from mirrorpair.text import printable

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4096
ZEROS = bytes(BLOCK)

_HEADER = "mirrorpair-demo-journal 1"
_STAMP = struct.Struct("<8sQQQ")  # magic, seed, number, block
_MAGIC = b"MPDEMO1\n"
_DIGEST = 64


def content(seed: int, number: int, block: int) -> bytes:
    """What write `number` makes of `block`. 64 bytes of its own repeat, so that a block of two halves is found."""
    if number == 0:
        return ZEROS
    stamp = _STAMP.pack(_MAGIC, seed, number, block)
    return stamp + (blake2b(stamp, digest_size=_DIGEST).digest() * (BLOCK // _DIGEST))[len(stamp) :]


def payload(seed: int, number: int, first: int, count: int) -> bytes:
    return b"".join(content(seed, number, block) for block in range(first, first + count))


def origin(seed: int, block: int, data: bytes) -> int | None:
    """The number of the write that left `data` in `block`; None: no write of this journal can have."""
    if data == ZEROS:
        return 0
    magic, _, number, _ = _STAMP.unpack_from(data)
    return number if magic == _MAGIC and number and data == content(seed, number, block) else None


class Bounds(NamedTuple):
    """What some blocks may hold: of each the number of the write that must be there at least, and of the last that may
    be."""

    least: list[int]
    last: list[int]


class Ledger:
    """Who wrote which block last. Not for several threads at once."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed = seed
        self.size = size
        self.sent = 0
        self.acknowledged = 0
        self._least = array("Q", bytes(8 * (size // BLOCK)))
        self._last = array("Q", bytes(8 * (size // BLOCK)))
        self._open: dict[int, tuple[int, int]] = {}

    @property
    def unanswered(self) -> int:
        """Writes that were sent and not acknowledged, up to now."""
        return len(self._open)

    def unanswered_until(self, number: int) -> int:
        """Of the writes up to this one."""
        return sum(1 for one in self._open if one <= number)

    def add(self, number: int, first: int, count: int) -> None:
        self.sent += 1
        self._open[number] = (first, count)
        for block in range(first, first + count):
            self._last[block] = max(self._last[block], number)

    def acknowledge(self, number: int) -> None:
        first, count = self._open.pop(number)
        self.acknowledged += 1
        for block in range(first, first + count):
            self._least[block] = max(self._least[block], number)

    def bounds(self, first: int, count: int) -> Bounds:
        return Bounds(list(self._least[first : first + count]), list(self._last[first : first + count]))


class Journal:
    """A journal that is being written, by any number of threads; `path` must not exist. Its owner closes it."""

    def __init__(self, path: Path, seed: int, size: int) -> None:
        self.seed = seed
        self.size = size
        self._lock = threading.Lock()
        self._ledger = Ledger(seed, size)
        self._acknowledged_after = 0
        self._mark = 0
        self._file: IO[str] = path.open("x", encoding="ascii")
        self._file.write(f"{_HEADER} seed {seed} block {BLOCK} size {size}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sent(self) -> int:
        """How many writes were ever sent, which is also the number of the last one."""
        return self._ledger.sent

    @property
    def acknowledged(self) -> int:
        return self._ledger.acknowledged

    @property
    def unanswered(self) -> int:
        return self._ledger.unanswered

    def start(self, first: int, count: int) -> int:
        """The number of a write that is about to be sent."""
        with self._lock:
            number = self._ledger.sent + 1
            self._ledger.add(number, first, count)
            self._file.write(f"sent {number} {first * BLOCK} {count * BLOCK}\n")
        return number

    def acknowledge(self, number: int) -> None:
        with self._lock:
            self._ledger.acknowledge(number)
            self._file.write(f"done {number}\n")
            if number > self._mark:
                self._acknowledged_after += 1

    def mark(self) -> int:
        """From here on `since_mark` counts. The number of the last write that was announced before."""
        with self._lock:
            self._mark = self._ledger.sent
            self._acknowledged_after = 0
            return self._mark

    def since_mark(self) -> tuple[int, int]:
        """Of the writes that were announced after the last `mark`: how many, and how many of them are acknowledged."""
        with self._lock:
            return self._ledger.sent - self._mark, self._acknowledged_after

    def bounds(self, first: int, count: int) -> Bounds:
        with self._lock:
            return self._ledger.bounds(first, count)

    def unanswered_until(self, number: int) -> int:
        with self._lock:
            return self._ledger.unanswered_until(number)

    def flush(self) -> None:
        with self._lock:
            self._file.flush()


def load(path: Path) -> Ledger:
    """The journal in a file; LocalError says which line is none of a journal's."""
    ledger: Ledger | None = None
    with path.open(encoding="ascii", errors="replace") as file:
        for at, line in enumerate(file, start=1):
            try:
                if ledger is None:
                    ledger = _begin(line)
                else:
                    _enter(ledger, line.split())
            except (ValueError, KeyError, IndexError, OverflowError):
                raise LocalError(
                    f"{printable(str(path))}: line {at} is not a journal's: {printable(line.rstrip(), 100)!r}"
                ) from None
    if ledger is None:
        raise LocalError(f"{printable(str(path))} is empty: not a journal")
    return ledger


def _begin(line: str) -> Ledger:
    name, version, _, seed, _, block, _, size = words = line.split()
    if words != [name, version, "seed", seed, "block", str(BLOCK), "size", size] or f"{name} {version}" != _HEADER:
        raise ValueError(block)
    return Ledger(int(seed), int(size))


def _enter(ledger: Ledger, words: list[str]) -> None:
    if words[0] == "done" and len(words) == 2:
        ledger.acknowledge(int(words[1]))
    elif words[0] == "sent" and len(words) == 4:
        number, offset, length = map(int, words[1:])
        if offset % BLOCK or length % BLOCK or not 0 <= offset < offset + length <= ledger.size:
            raise ValueError(offset)
        if number != ledger.sent + 1:
            raise ValueError(number)
        ledger.add(number, offset // BLOCK, length // BLOCK)
    else:
        raise ValueError(words)
