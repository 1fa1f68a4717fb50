"""Runs one helper of the engine to its end: progress out, differences out, interrupts in.

Rules:
- A KeyboardInterrupt never leaves the engine running and never loses its result: the helper is asked to stop, it
  flushes what it wrote, and what it did is reported. A second one, or `stop_s` of silence, ends it at once.
- The caller's functions (progress, differences) run here, between two looks at the helper, never in it; what they
  raise goes to the caller after the helper has been ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from mirrorpair.report import Meter, Progress, Ranges

if TYPE_CHECKING:
    from mirrorpair import _core

LOOK_S = 0.1  # how often the caller hears of it; the helper's end is noticed at once
STOP_S = 30.0  # an fdatasync of a slow disk's whole write cache

OnProgress = Callable[[Progress], object]
OnDifference = Callable[[int, int], object]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. `interrupted` is True also when it got everything done before it noticed."""

    counters: _core.Progress
    outcome: _core.Outcome
    interrupted: bool
    average_rate: float


def drive(
    helper: _core.Helper,
    *,
    progress: OnProgress | None = None,
    on_difference: OnDifference | None = None,
    stopping: Callable[[], bool] | None = None,
    stop_s: float = STOP_S,
) -> Run:
    """Waits for `helper`, which is ended when this returns or raises. `stopping` is asked at every look."""
    meter = Meter(time.monotonic())
    joined = Ranges()
    interrupted = False

    def look() -> None:
        if on_difference is not None:
            for offset, length in joined.add(helper.take_ranges()):
                on_difference(offset, length)
        if progress is not None:
            progress(meter.update(helper.progress(), time.monotonic()))

    try:
        try:
            while not helper.poll(LOOK_S):
                look()
                if stopping is not None and stopping():
                    interrupted = True
                    _stop(helper, stop_s)
                    break
            look()
        except KeyboardInterrupt:
            interrupted = True
            _stop(helper, stop_s)
        if on_difference is not None:
            for offset, length in [*joined.add(helper.take_ranges()), *joined.finish()]:
                on_difference(offset, length)
        counters, outcome = helper.progress(), helper.outcome()
    finally:
        helper.close()
    seconds = meter.seconds(time.monotonic())
    return Run(
        counters=counters,
        outcome=outcome,
        interrupted=interrupted,
        average_rate=counters.done_bytes / seconds if seconds > 0 else 0.0,
    )


def _stop(helper: _core.Helper, stop_s: float) -> None:
    deadline = time.monotonic() + stop_s
    try:
        helper.cancel()
        while not helper.poll(LOOK_S):
            if time.monotonic() >= deadline:
                break
    except KeyboardInterrupt:
        pass
    helper.close()
