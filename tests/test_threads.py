"""The parts of the data plane that threads share, and the whole of it, under the thread and address sanitizers.

Rules:
- The programs of tests/c are compiled here with the core's sources (native.py). What they check holds in every flavour;
  the sanitizers add races, bad memory and leaks.
- The journal has its own, in test_journal.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from native import FLAVOURS, HERE, Native

if TYPE_CHECKING:
    import random
    from pathlib import Path

C = HERE / "c"


@pytest.fixture(scope="module")
def native(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tmp_path_factory.mktemp("threads"))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bitmap_threads", [20000]),
        ("flight_model", [30000]),
        ("loop_threads", [2000]),
        ("loop_threads", [2000, 1_000_000]),  # looks for work for a while before it sleeps
        ("pool_threads", [10000]),
    ],
)
def test_a_shared_part(native: Native, rng: random.Random, name: str, arguments: list[int], flavour: str) -> None:
    print(native.program(FLAVOURS[flavour], C / f"{name}.c").passes(rng.getrandbits(40), *arguments))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_engines_through_cuts_kills_and_changes_of_role(
    native: Native, rng: random.Random, tmp_path: Path, flavour: str
) -> None:
    program = native.program(FLAVOURS[flavour], C / "engine_threads.c", C / "player.c")
    print(program.passes(tmp_path, rng.getrandbits(40), 8))
