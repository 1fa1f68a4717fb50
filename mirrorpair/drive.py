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

import msgspec

from mirrorpair import _core
from mirrorpair.interrupts import Hold
from mirrorpair.report import Meter, Progress, Ranges

LOOK_S = 0.1  # how often the caller hears of it; the helper's end is noticed at once
STOP_S = 30.0  # an fdatasync of a slow disk's whole write cache

OnProgress = Callable[[Progress], object]
OnDifference = Callable[[int, int], object]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. `finished`: all was done and nothing went wrong; then `interrupted` may be True as well."""

    counters: _core.Progress
    outcome: _core.Outcome
    finished: bool
    interrupted: bool
    average_rate: float


def drive(
    helper: _core.Helper,
    *,
    progress: OnProgress | None = None,
    on_difference: OnDifference | None = None,
    tail: tuple[int, int] = (0, 0),
    stopping: Callable[[], bool] | None = None,
    stop_s: float = STOP_S,
    hold: Hold | None = None,
) -> Run:
    """Waits for `helper`, which is ended when this returns or raises. `stopping` is asked at every look.

    `tail` is a range (offset, length) that is known to differ and that the helper does not look at: it is told last,
    when all before it has been looked at. `hold` is the caller's, entered before the helper was started; interrupts
    are let through while the helper is waited for.
    """
    hold = hold or Hold()
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
            with hold.released():
                while not helper.poll(LOOK_S):
                    look()
                    if stopping is not None and stopping():
                        interrupted = True
                        _stop(helper, stop_s, hold)
                        break
                look()
        except KeyboardInterrupt:
            interrupted = True
            _stop(helper, stop_s, hold)
        counters, outcome = helper.progress(), helper.outcome()
        finished = outcome.status == _core.OUTCOME_OK
        if on_difference is not None:
            rest = [*helper.take_ranges(), *([tail] if finished and tail[1] else [])]
            for offset, length in [*joined.add(rest), *joined.finish()]:
                on_difference(offset, length)
    finally:
        helper.close()
    seconds = meter.seconds(time.monotonic())
    return Run(
        counters=counters,
        outcome=outcome,
        finished=finished,
        interrupted=interrupted,
        average_rate=counters.done_bytes / seconds if seconds > 0 else 0.0,
    )


def _stop(helper: _core.Helper, stop_s: float, hold: Hold) -> None:
    deadline = time.monotonic() + stop_s
    try:
        helper.cancel()
        with hold.released():  # who cannot wait for that asks again
            while not helper.poll(LOOK_S):
                if time.monotonic() >= deadline:
                    break
    except KeyboardInterrupt:
        pass
    helper.close()
