"""What a volume may hold after a crash: a writer with several requests in flight, and its journal outside the volume.

Rules:
- Every sector says which one it is and which request wrote it. Requests are numbered; zeros are a request's too.
- A sector may hold what its last acknowledged request wrote, or what a later one wrote that was sent; nothing else.
  After a power cut of all who had it the last *flushed* one takes the place of the acknowledged.
- The writes go through one connection, so that their order is known; every other FLUSH comes through a second one,
  and covers what was answered on the first (W5).
- What was once read after a recovery was an answer too: `settle` makes it the least that must be there (I2).
- Times are CLOCK_MONOTONIC ns: sent before the request left, acknowledged after its answer came. So whoever cuts at a
  time in between demands too little, never too much.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

from mirrorpair.errors import RemoteError
from mirrorpair.nbdclient import NbdError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from mirrorpair.nbdclient import NbdClient, Pending

SECTOR = 512
DEPTH = 16
FOREVER = 1 << 63
LENGTHS = (1, 1, 3, 8, 8, 8, 8, 9, 16, 40, 128, 264, 640)  # sectors; 640: larger than what is written in line
_STAMP = struct.Struct("<4sIII")
_MAGIC = b"ORCL"
_ZEROS = bytes(SECTOR)

Content = dict[int, bytes]
"""sector -> what it holds; one that is not there is zeros"""


class Request:
    """One write, trim or zero; number 0 is the volume's first content, zeros."""

    __slots__ = ("acked_ns", "first", "flushed_ns", "number", "sectors", "sent_ns", "zero")

    def __init__(self, number: int, first: int, sectors: int, zero: bool) -> None:
        self.number = number
        self.first = first
        self.sectors = sectors
        self.zero = zero
        self.sent_ns = time.monotonic_ns()
        self.acked_ns = FOREVER
        self.flushed_ns = FOREVER

    def sector(self, sector: int) -> bytes:
        return _ZEROS if self.zero else _STAMP.pack(_MAGIC, sector, self.number, 0) * (SECTOR // _STAMP.size)

    def payload(self) -> bytes:
        return b"".join(self.sector(self.first + i) for i in range(self.sectors))

    def __str__(self) -> str:
        state = "flushed" if self.flushed_ns < FOREVER else "acknowledged" if self.acked_ns < FOREVER else "sent"
        return f"{'zero' if self.zero else 'write'} {self.number} ({state})"


Flying = tuple["Pending", Request | None, list[Request]]


class Oracle:
    """Knows every request; `history[sector]` from the least that must be there to the last that was sent."""

    def __init__(self, size: int, rng: random.Random, place: Callable[[int], int] | None = None) -> None:
        """`place(sectors)` chooses where a request of that length begins; anywhere unless given."""
        self.size = size
        self.rng = rng
        self.place = place or (lambda sectors: rng.randrange(size // SECTOR - sectors + 1))
        self.origin = Request(0, 0, size // SECTOR, True)
        self.origin.acked_ns = self.origin.flushed_ns = 0
        self.history: dict[int, list[Request]] = {}
        self.number = 0
        self.acknowledged = 0
        self.flushes = 0
        self._unflushed: list[Request] = []

    # --- the writer

    def write(
        self,
        client: NbdClient,
        most: int,
        *,
        other: NbdClient | None = None,
        until: Callable[[], bool] = lambda: False,
        finish: Callable[[], object] = lambda: None,
        lengths: tuple[int, ...] = LENGTHS,
        stopping: bool = False,
    ) -> bool:
        """Up to `most` requests, several in flight, until `until()`; False: the connection was lost. `other` takes part
        in the flushing. `finish` is called while the last ones are in flight. NbdError: the server answered with an
        error, which no crash excuses; but for ESHUTDOWN while it is `stopping`."""
        flying: deque[Flying] = deque()
        try:
            for _ in range(most):
                if until():
                    break
                flying.append(self._start(client, other, lengths))
                while len(flying) >= DEPTH:
                    self._wait(flying, stopping)
            finish()
            while flying:
                self._wait(flying, stopping)
        except NbdError:
            raise
        except RemoteError:
            self._answered(flying)
            return False
        return True

    def put(self, client: NbdClient, first: int, sectors: int) -> Flying:
        """Starts one write at a place of the caller's choice; to be given to `landed`."""
        request = self._request(first, sectors, False)
        return client.start_write(first * SECTOR, request.payload()), request, []

    def landed(self, flying: list[Flying]) -> None:
        waiting = deque(flying)
        while waiting:
            self._wait(waiting, False)

    def flush(self, client: NbdClient) -> None:
        covered = [one for one in self._unflushed if one.acked_ns < FOREVER]
        client.flush()
        now = time.monotonic_ns()
        for request in covered:
            request.flushed_ns = min(request.flushed_ns, now)
        self._unflushed = [one for one in self._unflushed if one.flushed_ns == FOREVER]

    def _request(self, first: int, sectors: int, zero: bool) -> Request:
        self.number += 1
        request = Request(self.number, first, sectors, zero)
        for sector in range(first, first + sectors):
            self.history.setdefault(sector, [self.origin]).append(request)
        return request

    def _start(self, client: NbdClient, other: NbdClient | None, lengths: tuple[int, ...]) -> Flying:
        kind = self.rng.random()
        if kind < 0.08:
            covered = [one for one in self._unflushed if one.acked_ns < FOREVER]
            return (other or client).start_flush() if self.flushes % 2 else client.start_flush(), None, covered
        sectors = self.rng.choice(lengths)
        request = self._request(self.place(sectors), sectors, 0.08 <= kind < 0.18)
        fua = self.rng.random() < 0.15
        at, length = request.first * SECTOR, sectors * SECTOR
        if request.zero:
            start = client.start_trim if self.rng.random() < 0.5 else client.start_write_zeroes
            return start(at, length, fua=fua), request, [request] if fua else []
        return client.start_write(at, request.payload(), fua=fua), request, [request] if fua else []

    def _wait(self, flying: deque[Flying], stopping: bool) -> None:
        try:
            flying[0][0].wait()
        except NbdError as error:
            if not stopping or error.number != errno.ESHUTDOWN:
                raise
            flying.popleft()
        self._answered(flying)

    def _answered(self, flying: deque[Flying]) -> None:
        """Takes out of `flying` whatever has been answered."""
        now = time.monotonic_ns()
        for one in list(flying):
            pending, request, flushed = one
            if not pending.done or pending.error is not None:
                continue
            flying.remove(one)
            if request is not None:
                request.acked_ns = now
                self.acknowledged += 1
                self._unflushed.append(request)
            else:
                self.flushes += 1
            for covered in flushed:
                covered.flushed_ns = min(covered.flushed_ns, now)
            if flushed:
                self._unflushed = [r for r in self._unflushed if r.flushed_ns == FOREVER]

    # --- the judge

    def problems(self, found: Content, *, at_ns: int = FOREVER - 1, flushed: bool = False) -> list[str]:
        """What is there that must not be, for a crash at this time; at most ten sentences."""
        wrong = [
            f"sector {sector} was never written: {_shown(found[sector])}" for sector in found.keys() - self.history
        ]
        for sector, history in self.history.items():
            data = found.get(sector, _ZEROS)
            allowed = []
            for request in reversed(history):  # the last that must be there ends it; no list has only later ones
                if request.sent_ns <= at_ns:
                    allowed.append(request)
                    if (request.flushed_ns if flushed else request.acked_ns) <= at_ns:
                        break
            if not any(request.sector(sector) == data for request in allowed):
                must = ", ".join(map(str, reversed(allowed)))
                wrong.append(f"sector {sector}: {_shown(data)}, not one of {must}")
            if len(wrong) >= 10:
                break
        return wrong[:10]

    def settle(self, found: Content) -> None:
        """What was found is right, durable, and on both nodes: nothing older may come back."""
        now = time.monotonic_ns()
        for sector, history in self.history.items():
            data = found.get(sector, _ZEROS)
            newest = max(i for i, request in enumerate(history) if request.sector(sector) == data)
            last = history[newest]
            if newest < len(history) - 1 or last.flushed_ns == FOREVER:
                # It counts for this sector alone: of a request in flight another sector may not be there.
                kept = Request(last.number, last.first, last.sectors, last.zero)
                kept.acked_ns = kept.flushed_ns = now
                history.append(kept)


def content(path: Path) -> Content:
    """Every sector of the image that is not zeros; holes are not read."""
    found: Content = {}
    with path.open("rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            take(found, at, os.pread(file.fileno(), hole - at, at))
            at = hole
    return found


def take(found: Content, at: int, data: bytes) -> None:
    """Puts bytes that were read at the offset `at` there."""
    for i in range(0, len(data), SECTOR):
        if (sector := data[i : i + SECTOR]) != _ZEROS:
            found[(at + i) // SECTOR] = sector


def _shown(sector: bytes) -> str:
    if sector == _ZEROS:
        return "zeros"
    magic, place, number, _ = _STAMP.unpack_from(sector)
    if magic != _MAGIC or sector != _STAMP.pack(magic, place, number, 0) * (SECTOR // _STAMP.size):
        return f"rubbish {sector[:16].hex()}"
    return f"request {number} of sector {place}"
