"""The benchmarks themselves: each subject of each group, the limits of the machine, the start of a process.

A case fails when its subject ends otherwise than it should or leaves a wrong result; it is skipped when its tool is
not here. It never fails for being slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench import machine
from bench.replay import clock, replay
from bench.session import Case, Session, cases
from bench.workshop import CannotRun, Failed

if TYPE_CHECKING:
    from bench.campaign import Group, Series

pytestmark = pytest.mark.benchmark(timer=clock)


def _raise(series: Series) -> None:
    raise Failed(f"{series.name}: {series.reason}")


def _hand_over(benchmark: Any, group: Group, series: Series) -> None:
    if series.state == "absent":
        pytest.skip(f"{series.name}: {series.reason}")
    if series.state == "failed":
        if series.kind == "peer":
            pytest.skip(f"{series.name}: {series.reason}")
        benchmark.pedantic(_raise, args=(series,))
    benchmark.group = group.title
    told = {"engine_s": series.engine_s, "kind": series.kind, "state": series.state, "reason": series.reason}
    benchmark.extra_info.update(told | series.facts)
    replay(benchmark, [sample.seconds for sample in series.samples])


def _group(benchmark: Any, session: Session, name: str) -> Group:
    if benchmark.disabled:
        pytest.skip("measuring is switched off (--benchmark-disable)")
    try:
        return session.group(name)
    except CannotRun as reason:
        pytest.skip(str(reason))


def test_limits(benchmark: Any, bench_session: Session) -> None:
    group = _group(benchmark, bench_session, machine.LIMITS)
    benchmark.group = group.title
    benchmark.extra_info.update(
        {x.name: x.facts["bytes"] / x.seconds for x in group.series.values() if x.seconds is not None}
    )
    replay(benchmark, [sum(x.seconds or 0.0 for x in group.series.values())])


@pytest.mark.parametrize("name", [machine.HELP, machine.VERSION, machine.BARE])
def test_start_up(benchmark: Any, bench_session: Session, name: str) -> None:
    group = _group(benchmark, bench_session, machine.START_UP)
    _hand_over(benchmark, group, group.series[name])


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases()])
def test_offline(benchmark: Any, bench_session: Session, case: Case) -> None:
    group = _group(benchmark, bench_session, case.group)
    _hand_over(benchmark, group, group.series[case.subject])
