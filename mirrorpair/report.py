"""What a run has done so far and what it came to: the numbers people and scripts see.

Rules (R11): progress is always true.
- 0 <= done <= total, whatever the core counted; bytes that were compared twice are not done twice.
- The rate is that of the last seconds, so that a stall shows; the ETA follows from it and is None when nothing moves.
- `now` is a parameter (monotonic seconds); this file never looks at a clock.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import msgspec

WINDOW_S = 5.0  # the rate looks back this far
SAMPLE_S = 0.1  # and keeps samples no closer than this


class Counters(Protocol):
    """What the C core counts (`_core.Progress`)."""

    @property
    def total_bytes(self) -> int: ...
    @property
    def done_bytes(self) -> int: ...
    @property
    def skipped_bytes(self) -> int: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def differing_bytes(self) -> int: ...
    @property
    def differing_blocks(self) -> int: ...
    @property
    def written_bytes(self) -> int: ...
    @property
    def punched_bytes(self) -> int: ...
    @property
    def wire_out_bytes(self) -> int: ...
    @property
    def wire_in_bytes(self) -> int: ...
    @property
    def recheck_total_bytes(self) -> int: ...
    @property
    def recheck_done_bytes(self) -> int: ...


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One glance at a run. `rate` is in bytes compared per second, `eta_s` None when it cannot be told."""

    total_bytes: int
    done_bytes: int
    skipped_bytes: int
    sent_bytes: int
    differing_bytes: int
    written_bytes: int
    recheck_total_bytes: int
    recheck_done_bytes: int
    rate: float
    eta_s: float | None
    seconds: float


class CompareResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `compare` found. `size` bytes were compared; `ranges` are (offset, length) of what differs, merged, in
    order."""

    a: str
    b: str
    equal: bool
    size: int
    a_size: int
    b_size: int
    ignored_tail_bytes: int = 0
    differing_bytes: int = 0
    differing_blocks: int = 0
    ranges: list[tuple[int, int]] = []
    done_bytes: int = 0
    skipped_bytes: int = 0
    sent_bytes: int = 0
    wire_bytes: int = 0
    rate: float = 0.0
    seconds: float = 0.0


class ResyncResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `resync` did, or with `dry_run` would do.

    `skipped_bytes` were equal, `differing_bytes` were not; of those `written_bytes` were written and `punched_bytes`
    became holes. `sent_bytes` is the payload that travelled, or that was written here; `wire_bytes` is everything
    that crossed the connection, both ways. `target_size` is what the target had before, 0 when it was made.
    `verified`: what was written has been read back from the target and is right.
    """

    source: str
    target: str
    dry_run: bool
    size: int
    target_size: int
    created: bool = False
    resized: bool = False
    verified: bool = False
    ignored_tail_bytes: int = 0
    done_bytes: int = 0
    skipped_bytes: int = 0
    sent_bytes: int = 0
    differing_bytes: int = 0
    differing_blocks: int = 0
    written_bytes: int = 0
    punched_bytes: int = 0
    wire_bytes: int = 0
    ranges: list[tuple[int, int]] = []
    rate: float = 0.0
    seconds: float = 0.0


class Meter:
    """Turns the core's counters into Progress; starts at the first moment it is told."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._samples: deque[tuple[float, int]] = deque([(started, 0)])

    def seconds(self, now: float) -> float:
        return max(0.0, now - self._started)

    def update(self, counters: Counters, now: float) -> Progress:
        total = max(0, counters.total_bytes)
        done = clamp(counters.done_bytes, total)
        recheck_total = max(0, counters.recheck_total_bytes)
        recheck_done = clamp(counters.recheck_done_bytes, recheck_total)
        work_done, work_total = done + recheck_done, total + recheck_total
        rate = self._rate(work_done, now)
        eta = (work_total - work_done) / rate if rate > 0 else (0.0 if work_done == work_total else None)
        return Progress(
            total_bytes=total,
            done_bytes=done,
            skipped_bytes=clamp(counters.skipped_bytes, done),
            sent_bytes=max(0, counters.sent_bytes),
            differing_bytes=max(0, counters.differing_bytes),
            written_bytes=max(0, counters.written_bytes),
            recheck_total_bytes=recheck_total,
            recheck_done_bytes=recheck_done,
            rate=rate,
            eta_s=eta,
            seconds=self.seconds(now),
        )

    def _rate(self, done: int, now: float) -> float:
        samples = self._samples
        if now - samples[-1][0] >= SAMPLE_S:
            samples.append((now, done))
        while len(samples) > 2 and now - samples[1][0] >= WINDOW_S:
            samples.popleft()
        then, before = samples[0]
        return max(0, done - before) / (now - then) if now > then else 0.0


class Ranges:
    """Joins differing ranges that touch, although they arrive in portions; hands out what can no longer grow."""

    def __init__(self) -> None:
        self._open: tuple[int, int] | None = None

    def add(self, portion: list[tuple[int, int]]) -> list[tuple[int, int]]:
        closed: list[tuple[int, int]] = []
        for offset, length in portion:
            if self._open is None:
                self._open = (offset, length)
            elif self._open[0] + self._open[1] == offset:
                self._open = (self._open[0], self._open[1] + length)
            else:
                closed.append(self._open)
                self._open = (offset, length)
        return closed

    def finish(self) -> list[tuple[int, int]]:
        last, self._open = self._open, None
        return [] if last is None else [last]


def clamp(value: int, most: int) -> int:
    return max(0, min(value, most))


def blocks_between(start: int, end: int, block_size: int) -> int:
    """How many blocks begin in [start, end): a block that lies across `start` has been counted by whoever came
    before."""
    return -(-end // block_size) - -(-start // block_size)
