"""What the crash tests work with: the library that kills and records, and pairs that are rigged with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE.parent / "e2e"))  # pair.py

from pair import Pair  # noqa: E402
from rig import SIZE, Rig  # noqa: E402

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for LD_PRELOAD."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(
        [compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", made, HERE / "shim.c"],
        check=True,
    )
    return made


@pytest.fixture
def make_rig(tmp_path: Path, shim: Path, rng: random.Random) -> Iterator[Callable[..., Rig]]:
    """`make_rig(size=..., rng=..., place=...)`; its processes end with the test."""
    made: list[Pair] = []

    def make(*, size: int = SIZE, rng: random.Random = rng, place: Any = None) -> Rig:
        folder = tmp_path / f"p{len(made)}"
        folder.mkdir()
        made.append(Pair(folder, size=size))
        return Rig(made[-1], shim, rng, place)

    try:
        yield make
    finally:
        for one in made:
            one.end()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()
