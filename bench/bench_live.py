"""The live benchmarks: a served volume with and without its peer, what a returning peer costs, what an idle node costs.

A case fails when mirrorpair or a floor ends otherwise than it should or a pair ends with unequal images; it is skipped
when its tool is not here, or another project's server failed. It never fails for being slow.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.handover import group_of, hand_over
from bench.replay import clock
from bench.session import Case, Session, live_cases

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in live_cases()])
def test_live(benchmark: Any, bench_session: Session, case: Case) -> None:
    group = group_of(benchmark, bench_session, case.group)
    hand_over(benchmark, group, group.series[case.subject])
