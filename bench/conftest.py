"""Joins the benchmarks to pytest: one session for all of them, and the tables at the end.

Rules: with `--benchmark-skip`, `--benchmark-disable` or `--collect-only` nothing is measured. A missing tool skips
its benchmarks with the reason. Nothing runs beside a benchmark. What stays on the disk after a run is the results, as
JSON, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import report
from bench.session import Case, Session
from bench.settings import Settings
from bench.workshop import CannotRun

if TYPE_CHECKING:
    from collections.abc import Iterator

_SESSION = pytest.StashKey[Session]()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    return 0


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    try:
        session = Session.open(Settings.from_environment())
    except CannotRun as reason:
        pytest.skip(str(reason))
    wanted: dict[str, set[str]] = {}
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        case = None if callspec is None else callspec.params.get("case")
        if isinstance(case, Case):
            wanted.setdefault(case.group, set()).add(case.subject)
    session.wanted = wanted
    request.config.stash[_SESSION] = session
    try:
        yield session
    finally:
        session.close()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(_SESSION, None)
    if session is None or not session.groups:
        return
    terminalreporter.section("mirrorpair beside floors and peers")
    for line in report.render(session.groups, session.about):
        terminalreporter.write_line(line)
    path = report.save(session.groups, session.about, session.shop.settings)
    if path is not None:
        terminalreporter.write_line("")
        terminalreporter.write_line(f"kept as {path.name} and latest.json in the results folder")
