"""From a measured group to one pytest-benchmark test: what is skipped, what fails, what is replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench.replay import replay
from bench.workshop import CannotRun, Failed

if TYPE_CHECKING:
    from bench.campaign import Group, Series
    from bench.session import Session


def _raise(series: Series) -> None:
    raise Failed(f"{series.name}: {series.reason}")


def hand_over(benchmark: Any, group: Group, series: Series) -> None:
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


def group_of(benchmark: Any, session: Session, name: str) -> Group:
    if benchmark.disabled:
        pytest.skip("measuring is switched off (--benchmark-disable)")
    try:
        return session.group(name)
    except CannotRun as reason:
        pytest.skip(str(reason))
