"""Format, lint, types and stubs, as tests: a change that breaks them fails like any other."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.not_sanitized("it reads the sources")


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def ruff() -> str:
    # Beside this Python first: a virtual environment that was not activated is not in PATH.
    found = shutil.which("ruff", path=sys.prefix + "/bin") or shutil.which("ruff")
    if found is None:
        pytest.skip("ruff is not installed")
    return found


def need_mypy() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")


def test_lint(repository: Path) -> None:
    run(repository, ruff(), "check", "--no-cache", ".")


def test_format(repository: Path) -> None:
    run(repository, ruff(), "format", "--check", "--no-cache", ".")


def test_types(repository: Path, tmp_path: Path) -> None:
    need_mypy()
    run(repository, sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}", "mirrorpair")


def test_the_stub_of_the_core_is_true(repository: Path) -> None:
    need_mypy()
    run(repository, sys.executable, "-m", "mypy.stubtest", "--concise", "mirrorpair._core")


OPENINGS = {
    ".py": ('"""', "#"),
    ".pyi": ("#", '"""'),
    ".pyx": ("#", '"""'),
    ".c": ("/*",),
    ".h": ("/*",),
    ".cdef": ("/*",),
}


@pytest.mark.parametrize("suffix", OPENINGS)
def test_every_file_begins_with_what_it_is_for(repository: Path, suffix: str) -> None:
    texts = {
        path: path.read_text(encoding="utf-8")
        for folder in ("mirrorpair", "csrc", "tests", "bench")
        for path in sorted((repository / folder).rglob(f"*{suffix}"))
    }
    bare = [str(path) for path, text in texts.items() if text and not text.startswith(OPENINGS[suffix])]
    assert bare == []
