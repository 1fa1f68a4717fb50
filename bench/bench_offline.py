"""The benchmarks themselves: each subject of each group, the limits of the machine, the start of a process.

A case fails when its subject ends otherwise than it should or leaves a wrong result; it is skipped when its tool is
not here. It never fails for being slow.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench import machine
from bench.handover import group_of, hand_over
from bench.replay import clock, replay
from bench.session import Case, Session, cases

pytestmark = pytest.mark.benchmark(timer=clock)


def test_limits(benchmark: Any, bench_session: Session) -> None:
    group = group_of(benchmark, bench_session, machine.LIMITS)
    benchmark.group = group.title
    benchmark.extra_info.update(
        {x.name: x.facts["bytes"] / x.seconds for x in group.series.values() if x.seconds is not None}
    )
    replay(benchmark, [sum(x.seconds or 0.0 for x in group.series.values())])


@pytest.mark.parametrize("name", [machine.HELP, machine.VERSION, machine.BARE])
def test_start_up(benchmark: Any, bench_session: Session, name: str) -> None:
    group = group_of(benchmark, bench_session, machine.START_UP)
    hand_over(benchmark, group, group.series[name])


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases()])
def test_offline(benchmark: Any, bench_session: Session, case: Case) -> None:
    group = group_of(benchmark, bench_session, case.group)
    hand_over(benchmark, group, group.series[case.subject])
