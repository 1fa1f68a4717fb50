"""What a volume may hold after a crash: a writer with several requests in flight, and its journal outside the volume.

Rules:
- Every sector says which block it is of and which request wrote it. Requests are numbered; zeros are a request's too.
- A block may hold what its last acknowledged request wrote, or what a later one wrote that was sent; nothing else.
  After a power cut of all hosts the last *flushed* one takes the place of the acknowledged.
- A sector, not a block, is what a power cut leaves whole.
- What was once read after a recovery was an answer too: `settle` makes it the least that must be there (I2).
- Times are CLOCK_MONOTONIC ns: sent before the request left, acknowledged after its answer came. So whoever cuts at a
  time in between demands too little, never too much.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import TYPE_CHECKING

from mirrorpair.errors import RemoteError
from mirrorpair.nbdclient import NbdError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from mirrorpair.nbdclient import NbdClient, Pending

SECTOR = 512
BLOCK = 4096
DEPTH = 12
_STAMP = struct.Struct("<4sIII")
_MAGIC = b"ORCL"
_ZEROS = bytes(SECTOR)
FOREVER = 1 << 63


class Request:
    """One write, trim or zero; number 0 is the volume's first content, zeros."""

    __slots__ = ("acked_ns", "blocks", "first", "flushed_ns", "number", "sent_ns", "zero")

    def __init__(self, number: int, first: int, blocks: int, zero: bool) -> None:
        self.number = number
        self.first = first
        self.blocks = blocks
        self.zero = zero
        self.sent_ns = time.monotonic_ns()
        self.acked_ns = FOREVER
        self.flushed_ns = FOREVER

    def sector(self, block: int) -> bytes:
        return _ZEROS if self.zero else _STAMP.pack(_MAGIC, block, self.number, 0) * (SECTOR // _STAMP.size)

    def payload(self) -> bytes:
        return b"".join(self.sector(self.first + i) * (BLOCK // SECTOR) for i in range(self.blocks))

    def __str__(self) -> str:
        state = "flushed" if self.flushed_ns < FOREVER else "acknowledged" if self.acked_ns < FOREVER else "sent"
        return f"{'zero' if self.zero else 'write'} {self.number} ({state})"


class Oracle:
    """Knows every request; `history[block]` from the least that must be there to the last that was sent."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size = size
        self.rng = rng
        origin = Request(0, 0, size // BLOCK, True)
        origin.acked_ns = origin.flushed_ns = 0
        self.history: list[list[Request]] = [[origin] for _ in range(size // BLOCK)]
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
        until: Callable[[], bool] = lambda: False,
        finish: Callable[[], object] = lambda: None,
    ) -> bool:
        """Up to `most` requests, several in flight, until `until()`; False: the connection was lost. `finish` is called
        while the last ones are in flight. NbdError: the server answered with an error, which no crash excuses."""
        flying: deque[tuple[Pending, Request | None, list[Request]]] = deque()
        try:
            for _ in range(most):
                if until():
                    break
                flying.append(self._start(client))
                while len(flying) >= DEPTH:
                    self._wait(flying)
            finish()
            while flying:
                self._wait(flying)
        except NbdError:
            raise
        except RemoteError:
            self._answered(flying)
            return False
        return True

    def flush(self, client: NbdClient) -> None:
        client.flush()
        now = time.monotonic_ns()
        for request in {id(r): r for history in self.history for r in history}.values():
            if request.acked_ns < now:
                request.flushed_ns = min(request.flushed_ns, now)

    def _start(self, client: NbdClient) -> tuple[Pending, Request | None, list[Request]]:
        kind = self.rng.random()
        if kind < 0.08:
            covered = [one for one in self._unflushed if one.acked_ns < FOREVER]
            return client.start_flush(), None, covered
        blocks = self.rng.choice([1, 1, 1, 1, 2, 3, 16, 33, 80])  # 80: larger than what is written in line
        first = self.rng.randrange(max(1, len(self.history) - blocks + 1))
        self.number += 1
        request = Request(self.number, first, blocks, zero=0.08 <= kind < 0.18)
        for block in range(first, first + blocks):
            self.history[block].append(request)
        fua = self.rng.random() < 0.15
        at, length = first * BLOCK, blocks * BLOCK
        if request.zero:
            start = client.start_trim if self.rng.random() < 0.5 else client.start_write_zeroes
            return start(at, length, fua=fua), request, [request] if fua else []
        return client.start_write(at, request.payload(), fua=fua), request, [request] if fua else []

    def _wait(self, flying: deque[tuple[Pending, Request | None, list[Request]]]) -> None:
        flying[0][0].wait()
        self._answered(flying)

    def _answered(self, flying: deque[tuple[Pending, Request | None, list[Request]]]) -> None:
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

    # --- the judge

    def problems(self, image: bytes, *, at_ns: int = FOREVER - 1, flushed: bool = False) -> list[str]:
        """What is in the image that must not be, for a crash at this time; at most ten sentences."""
        assert len(image) == self.size, f"{len(image)} bytes, {self.size} expected"
        found: list[str] = []
        for block, history in enumerate(self.history):
            times = [one.flushed_ns if flushed else one.acked_ns for one in history]
            least = max(i for i, done in enumerate(times) if done <= at_ns or i == 0)
            data = image[block * BLOCK : (block + 1) * BLOCK]
            if data == history[least].sector(block) * (BLOCK // SECTOR):
                continue
            allowed = {one.sector(block) for one in history[least:] if one.sent_ns <= at_ns}
            for i in range(0, BLOCK, SECTOR):
                if data[i : i + SECTOR] not in allowed:
                    must = ", ".join(map(str, history[least:]))
                    found.append(
                        f"block {block} sector {i // SECTOR}: {_shown(data[i : i + SECTOR])}, not one of {must}"
                    )
                    break
            if len(found) >= 10:
                break
        return found

    def settle(self, image: bytes) -> None:
        """The image is right, and both nodes have it: nothing older may come back."""
        for block, history in enumerate(self.history):
            data = image[block * BLOCK : (block + 1) * BLOCK]
            if len(history) == 1:
                continue
            sectors = {data[i : i + SECTOR] for i in range(0, BLOCK, SECTOR)}
            # The newest that could have written each sector; the oldest of these must stay.
            newest = [max(i for i, one in enumerate(history) if one.sector(block) == sector) for sector in sectors]
            kept = history[min(newest) :] if len(sectors) > 1 else [history[newest[0]]]
            self.history[block] = kept


def _shown(sector: bytes) -> str:
    if sector == _ZEROS:
        return "zeros"
    magic, block, number, _ = _STAMP.unpack_from(sector)
    if magic != _MAGIC or sector != _STAMP.pack(magic, block, number, 0) * (SECTOR // _STAMP.size):
        return f"rubbish {sector[:16].hex()}"
    return f"request {number} of block {block}"
