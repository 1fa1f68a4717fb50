"""A model of a disk: which bytes a client may read when its requests overlap others that are in flight.

Rules:
- Every byte has a list of candidates: the base (what the last `settle` found) and the writes that may be its newest.
- A write precedes another one if it had ended before the other began, or came before it on the same connection: the
  engine keeps a connection's order (W2), which is more than NBD asks for.
- An acknowledged write takes away all that precede it. One whose fate is unknown (its connection ended, or an error
  came instead of an answer) has ended, takes away nothing, and may be there or not.
- What a read returned, later reads do not go behind: of the writes that had ended when it began only what it saw stays.
- Candidates are judged by pieces, cut at the bounds of all requests: two writes never mix within a piece, as they are
  serialised as a whole.
- Time counts the calls of the model. An answer that is noticed late makes the model demand less, never more.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Write:
    """One write, trim or zero (no `data`)."""

    def __init__(self, number: int, connection: int, offset: int, length: int, data: bytes | None, began: int) -> None:
        self.number = number
        self.connection = connection
        self.offset = offset
        self.length = length
        self.data = data
        self.began = began
        self.ended: int | None = None
        self.acknowledged = False

    @property
    def end(self) -> int:
        return self.offset + self.length

    def part(self, low: int, high: int) -> bytes:
        return bytes(high - low) if self.data is None else self.data[low - self.offset : high - self.offset]

    def precedes(self, other: Write) -> bool:
        if self.connection == other.connection:
            return self.number < other.number
        return self.ended is not None and self.ended < other.began

    def __str__(self) -> str:
        state = "acknowledged" if self.acknowledged else "sent" if self.ended is None else "unknown"
        kind = "zero" if self.data is None else "write"
        return f"{kind} {self.number} [{self.offset}, {self.end}) of connection {self.connection} ({state})"


class Spans:
    """A range of the disk in pieces, each with its candidates."""

    def __init__(self, low: int, high: int) -> None:
        self._bounds = [low, high]
        self._candidates: list[list[Write | None]] = [[None]]

    def copy(self, low: int, high: int) -> Spans:
        made = Spans(low, high)
        found = list(self.within(low, high))
        made._bounds = [piece[0] for piece in found] + [high]
        made._candidates = [list(piece[2]) for piece in found]
        return made

    def _cut(self, at: int) -> int:
        """The index of the piece that begins there."""
        index = bisect_right(self._bounds, at) - 1
        if self._bounds[index] != at:
            index += 1
            self._bounds.insert(index, at)
            self._candidates.insert(index, list(self._candidates[index - 1]))
        return index

    def within(self, low: int, high: int) -> Iterator[tuple[int, int, list[Write | None]]]:
        """Cuts at both ends; (low, high, candidates) of each piece between. The candidate None is the base. The lists
        may be changed."""
        low, high = max(low, self._bounds[0]), min(high, self._bounds[-1])
        if low >= high:
            return
        first, last = self._cut(low), self._cut(high)
        for index in range(first, last):
            yield self._bounds[index], self._bounds[index + 1], self._candidates[index]

    def add(self, write: Write) -> None:
        for _, _, candidates in self.within(write.offset, write.end):
            candidates.append(write)

    def supersede(self, by: Write) -> None:
        for _, _, candidates in self.within(by.offset, by.end):
            candidates[:] = [c for c in candidates if c is by or not (c is None or c.precedes(by))]


class Read:
    def __init__(self, connection: int, offset: int, length: int, began: int, base: bytes, spans: Spans) -> None:
        self.connection = connection
        self.offset = offset
        self.length = length
        self.began = began
        self.base = base
        self.spans = spans


class ModelDisk:
    """What a volume may hold, for its clients."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.base = bytes(size)
        self._spans = Spans(0, size)
        self._clock = 0
        self._numbers = 0
        self._flying: list[Write] = []
        self._reads: list[Read] = []

    def _now(self) -> int:
        self._clock += 1
        return self._clock

    @property
    def busy(self) -> bool:
        return bool(self._flying or self._reads)

    # --- requests

    def begin_write(self, connection: int, offset: int, length: int, data: bytes | None) -> Write:
        self._numbers += 1
        write = Write(self._numbers, connection, offset, length, data, self._now())
        self._flying.append(write)
        self._spans.add(write)
        for read in self._reads:
            if read.connection != connection:  # its own earlier read does not see it
                read.spans.add(write)
        return write

    def end_write(self, write: Write, *, acknowledged: bool) -> None:
        self._flying.remove(write)
        write.ended = self._now()
        write.acknowledged = acknowledged
        if acknowledged:
            self._spans.supersede(write)

    def begin_read(self, connection: int, offset: int, length: int) -> Read:
        end = offset + length
        spans = self._spans.copy(offset, end)
        for write in self._flying:
            if write.connection == connection:  # it stands behind it in line
                spans.supersede(write)
        read = Read(connection, offset, length, self._now(), self.base[offset:end], spans)
        self._reads.append(read)
        return read

    def end_read(self, read: Read, data: bytes | None) -> None:
        """AssertionError: it may not have returned that. Without data: it was never answered."""
        self._reads.remove(read)
        if data is None:
            return
        assert len(data) == read.length
        for low, high, candidates in read.spans.within(read.offset, read.offset + read.length):
            found = data[low - read.offset : high - read.offset]
            base = read.base[low - read.offset : high - read.offset]
            seen = self._matching(low, high, found, base, candidates, "a read returned")
            for _, _, kept in self._spans.within(low, high):
                kept[:] = [
                    c for c in kept if c in seen or not (c is None or (c.ended is not None and c.ended < read.began))
                ]

    # --- images

    def settle(self, content: bytes) -> None:
        """AssertionError: an image may not hold that. Nothing is in flight; from now on it is the base."""
        assert not self.busy
        self.judge(content)
        self.base = content
        self._spans = Spans(0, self.size)

    def judge(self, content: bytes) -> None:
        assert len(content) == self.size
        for low, high, candidates in self._spans.within(0, self.size):
            self._matching(low, high, content[low:high], self.base[low:high], candidates, "the image holds")

    def _matching(
        self, low: int, high: int, found: bytes, base: bytes, candidates: list[Write | None], told: str
    ) -> list[Write | None]:
        seen = [c for c in candidates if found == (base if c is None else c.part(low, high))]
        if not seen:
            raise AssertionError(f"{told} in [{low}, {high}) {self._shown(low, high, found, base, candidates)}")
        return seen

    @staticmethod
    def _shown(low: int, high: int, found: bytes, base: bytes, candidates: list[Write | None]) -> str:
        lines = [f"{found[:16].hex()}, which is none of"]
        for c in candidates:
            part = base if c is None else c.part(low, high)
            same = next(i for i in range(high - low) if part[i] != found[i])
            lines.append(f"  {c or 'what was there'}: {part[:16].hex()}, equal in the first {same} bytes")
        return "\n".join(lines)
