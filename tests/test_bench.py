"""The benchmarks at a tiny size: every subject runs, leaves the right bytes. No timing is judged."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.append(ROOT)  # behind the installed package, so that it is that one which is measured

from bench.smoke import groups, run_group  # noqa: E402
from bench.workshop import CannotRun  # noqa: E402


@pytest.mark.parametrize("name", groups())
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the floors")
    try:
        run_group(name, tmp_path)
    except CannotRun as reason:
        pytest.skip(str(reason))
