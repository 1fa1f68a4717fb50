"""What requests cost while they wait for a grant: every look at them compares each with those in front of it.

One run holds all sizes, so the table's ratios tell how the cost grows; 64 times as many may cost 64 times as much, not
4096 times. `idle` is what a node uses of a core while thousands of held writes wait and nothing happens.

The engine runs in a process of its own: pytest puts the source tree in front of `sys.path`, where an installed
mirrorpair has no compiled core. `python -P` finds the installed one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.replay import clock, replay

pytestmark = pytest.mark.benchmark(timer=clock)

SCRIPT = Path(__file__).with_name("waiting.py")
LIMIT_S = 120


def measure(what: str, clients: int) -> list[float]:
    run = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), what, str(clients)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seconds: list[float] = json.loads(run.stdout)
    return seconds


@pytest.mark.parametrize("clients", [1, 16, 64])
def test_a_look_at_those_that_wait(benchmark: Any, clients: int) -> None:
    benchmark.group = "waiting: two barriers while so many trims wait"
    benchmark.extra_info["waiting"] = 250 * clients
    replay(benchmark, measure("look", clients))


def test_idle(benchmark: Any) -> None:
    benchmark.group = "waiting: processor seconds in half a second, 4000 held writes"
    replay(benchmark, measure("idle", 16))
