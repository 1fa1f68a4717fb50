"""The same groups at a tiny size, for the test suite: so that a benchmark cannot rot between two real runs.

    from bench.smoke import groups, run_group
    @pytest.mark.parametrize("name", groups())
    def test_benchmark_runs(name, tmp_path):
        run_group(name, tmp_path)

It measures nothing worth reading. It checks that every subject runs, finds exactly what differs, leaves the right
bytes, and that the report and the goals can be made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import machine, report
from bench.campaign import plans
from bench.liveplans import PLANS
from bench.session import Session
from bench.settings import MIB, Settings
from bench.workshop import Failed

if TYPE_CHECKING:
    from pathlib import Path

    from bench.campaign import Group

SIZE = 8 * MIB


def groups() -> list[str]:
    return [machine.LIMITS, machine.START_UP, *(plan.name for plan in plans()), *PLANS]


def run_group(name: str, folder: Path, *, command: str | None = None, size: int = SIZE) -> Group:
    """Runs one group once. Raises `Failed` when mirrorpair or a floor does, `CannotRun` when the group cannot run here.

    Peers that are not installed are left out; the caller may look at `series[...].state`."""
    session = Session.open(Settings(size=size, rounds=1, limit_s=60.0, patience_s=60.0, command=command), folder)
    try:
        group = session.group(name)
        lines = report.render(session.groups, session.about)
        report.document(session.groups, session.about)
    finally:
        session.close()
    wrong = [f"{x.name}: {x.reason}" for x in group.series.values() if x.state == "failed" and x.kind != "peer"]
    if wrong:
        raise Failed("; ".join(wrong))
    if not any(name in line for line in lines):
        raise Failed(f"the report does not show {name}")
    return group
