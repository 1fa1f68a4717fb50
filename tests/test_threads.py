"""The parts of the data plane that threads share, and the whole of it, under the thread and address sanitizers.

Rules:
- The programs of tests/c are compiled here with the core's sources (native.py). What they check holds in every flavour;
  the sanitizers add races, bad memory and leaks.
- The journal has its own, in test_journal.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from native import FLAVOURS, HERE, NOT_SANITIZED, SOURCES, Native, each_flavour

if TYPE_CHECKING:
    import random
    from pathlib import Path

pytestmark = NOT_SANITIZED

C = HERE / "c"


@pytest.fixture(scope="module")
def native(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tmp_path_factory.mktemp("threads"))


@pytest.mark.parametrize("flavour", each_flavour("threads"))
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bitmap_threads", [20000]),
        ("flight_model", [30000]),
        ("loop_threads", [2000]),
        ("loop_threads", [2000, 1_000_000]),  # looks for work for a while before it sleeps
        ("pool_threads", [10000]),
        ("pace_rules", []),  # of one thread, as flight_model
    ],
)
def test_a_shared_part(native: Native, rng: random.Random, name: str, arguments: list[int], flavour: str) -> None:
    print(native.program(FLAVOURS[flavour], C / f"{name}.c").passes(rng.getrandbits(40), *arguments))


@pytest.mark.parametrize("flavour", each_flavour("threads"))
def test_two_engines_through_cuts_kills_and_changes_of_role(
    native: Native, rng: random.Random, tmp_path: Path, flavour: str
) -> None:
    program = native.program(FLAVOURS[flavour], C / "engine_threads.c", C / "player.c")
    print(program.passes(tmp_path, rng.getrandbits(40), 8))


# part: program, its arguments, flavour, file, what stands there, what stands there instead
DEFECTS = {
    "a job is given out without the lock": (
        "pool_threads",
        [10000],
        "thread",
        "pool.c",
        "    pthread_mutex_lock(&pool->lock);\n    put(&pool->jobs, job);",
        "    put(&pool->jobs, job);\n    pthread_mutex_lock(&pool->lock);",
    ),
    "a bit is set by reading and writing its word": (
        "bitmap_threads",
        [20000],
        "address",
        "bitmap.c",
        "    return atomic_fetch_or_explicit(&map->words[bit / 64], mask, memory_order_relaxed) & mask;",
        (
            "    extern int sched_yield(void);\n    uint64_t old = map->words[bit / 64];\n    sched_yield();\n"
            "    map->words[bit / 64] = old | mask;\n    return old & mask;"
        ),
    ),
    "an event of a source that is gone": (
        "loop_threads",
        [2000],
        "address",
        "loop.c",
        "    if (!source->ready || source->generation != ready->data.u64 >> 32)",
        "    if (!source->ready)",
    ),
    "a range that left still holds": (
        "flight_model",
        [30000],
        "address",
        "flight.c",
        "    flight->end[index] = flight->end[last];",
        "    flight->end[index] = flight->end[index];",
    ),
    "a command reaches the loop without the lock": (
        "engine_threads",
        [8],
        "thread",
        "engine.c",
        "        pthread_mutex_lock(&engine->lock);\n        mp_command *command = engine->mail;",
        "        mp_command *command = engine->mail;\n        pthread_mutex_lock(&engine->lock);",
    ),
}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=pytest.mark.xdist_group(f"threads-{defect[2]}")) for what, defect in DEFECTS.items()],
)
def test_a_defect_is_found(native: Native, rng: random.Random, tmp_path: Path, what: str) -> None:
    name, arguments, flavour, file, right, wrong = DEFECTS[what]
    text = (SOURCES / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    changed = tmp_path / file
    changed.write_text(text.replace(right, wrong), encoding="utf-8")
    engines = name == "engine_threads"
    more = [C / "player.c"] if engines else []
    program = native.program(FLAVOURS[flavour], C / f"{name}.c", *more, changed=changed)
    folder = tmp_path / "images"
    folder.mkdir()
    for _ in range(20):  # which threads meet when is theirs to say
        done = program(*([folder] if engines else []), rng.getrandbits(40), *arguments)
        if done.returncode != 0:
            break
    assert done.returncode != 0, done.stdout
