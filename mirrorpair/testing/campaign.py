"""Many seeds of many plays, side by side on all CPUs; what failed, by play and invariant.

Rules:
- A run is a play and a seed, and comes out the same in every process and on every machine.
- Results come in the order of the seeds, whatever was done first. No trace is kept: its seed makes it again.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING, NamedTuple

from mirrorpair.testing.plays import PLAYS, play
from mirrorpair.testing.words import BrokenError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK = 8


class Result(NamedTuple):
    """Of one run. `invariant`: its id, "" where all held, "error" where the simulation itself failed."""

    play: str
    seed: int
    invariant: str
    what: str
    acks: int
    acquisitions: int


def one(name: str, seed: int, steps: int | None = None) -> Result:
    try:
        world = play(name, seed, steps)
    except BrokenError as broken:
        return Result(name, seed, broken.invariant, broken.what, 0, 0)
    except AssertionError as error:
        return Result(name, seed, "error", repr(error), 0, 0)
    return Result(name, seed, "", "", world.checks.acks, world.acquisitions)


def trace(name: str, seed: int, steps: int | None = None) -> tuple[Result, list[str]]:
    """One run again, and all that happened in it."""
    try:
        world = play(name, seed, steps)
    except BrokenError as broken:
        return Result(name, seed, broken.invariant, broken.what, 0, 0), broken.trace
    return Result(name, seed, "", "", world.checks.acks, world.acquisitions), world.trace


def _run(job: tuple[str, int, int | None]) -> Result:
    return one(*job)


def campaign(
    seeds: Iterable[int], plays: Iterable[str] = tuple(PLAYS), steps: int | None = None, jobs: int = 0
) -> Iterator[Result]:
    """Every play with every seed. `jobs`: processes; 0: one for each CPU of this process."""
    names = list(plays)
    work = [(name, seed, steps) for seed in seeds for name in names]
    jobs = jobs or len(os.sched_getaffinity(0))
    if jobs == 1 or len(work) <= CHUNK:
        yield from map(_run, work)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_run, work, CHUNK)
