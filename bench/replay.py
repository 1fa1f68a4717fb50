"""Hands figures that were measured elsewhere to pytest-benchmark.

pytest-benchmark times one function at a time; our subjects take turns, across tests. So a group is measured as a
whole when its first test runs, and each test then replays its own samples: the marker `timer=` gives pytest-benchmark
a clock that only moves when a sample is replayed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_now = 0.0


def clock() -> float:
    return _now


def replay(benchmark: Any, seconds: Sequence[float]) -> None:
    left = iter(seconds)

    def advance() -> None:
        global _now
        _now += next(left)

    benchmark.pedantic(advance, rounds=len(seconds), iterations=1)
