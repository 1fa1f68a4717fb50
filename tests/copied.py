"""Copies through a wire that may be damaged, each judged: what test_damage.py asks for by the thousand.

Rules, judged after every run, whatever was done to the line:
- Both ends end by themselves, soon, and none of them by a signal or an internal error.
- The target's end is well only if all it was sent arrived as it was sent; the source's only if the answers did too.
- Whoever says it went well is right: the target equals the source.
- Whoever says it did not has harmed nothing: every byte of the target is the old one or the source's at that place.

The runs are made by small processes of their own (`python -m copied` with a pickle on standard input): every run forks
twice, and a fork costs what the process weighs.
"""

from __future__ import annotations

import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import frames
from relay import Damage, Relay

import mirrorpair
from mirrorpair import _core

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from relay import Stream

KIB = 1024
PIECE = 4 * KIB
WINDOW = 8 * KIB * KIB
SEED, SESSION = 7, 5
END_S = 30.0
WORKERS = 2

ENDINGS = {
    _core.OUTCOME_OK,
    _core.OUTCOME_PEER_GONE,
    _core.OUTCOME_PEER_GARBAGE,
    _core.OUTCOME_PEER_SILENT,
    _core.OUTCOME_PEER_ERROR,
}


# --- images in memory


@dataclass(frozen=True)
class Pair:
    """A source, an old target, and how they are to be compared."""

    size: int
    block: int
    source: dict[int, bytes]
    target: dict[int, bytes]

    def open_source(self) -> int:
        return memory(self.size, self.source)

    def open_target(self) -> int:
        return memory(self.size, self.target)


def memory(size: int, pieces: dict[int, bytes]) -> int:
    fd = os.memfd_create("mirrorpair-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    for offset, data in pieces.items():
        os.pwrite(fd, data, offset)
    return fd


def pages(fd: int) -> dict[int, bytes]:
    """The pages that are not zero."""
    found, at, size = {}, 0, os.fstat(fd).st_size
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        for offset in range(at, end, PIECE):
            page = os.pread(fd, min(PIECE, end - offset), offset)
            if page.count(0) != len(page):
                found[offset] = page
        at = end
    return found


def changed_pages(pair: Pair) -> dict[int, int]:
    """Where the two differ, in pieces: what a dry run has to report."""
    first, second = pair.open_source(), pair.open_target()
    try:
        a, b = pages(first), pages(second)
    finally:
        os.close(first)
        os.close(second)
    return {at: min(PIECE, pair.size - at) for at in sorted(a.keys() | b.keys()) if a.get(at) != b.get(at)}


def only_old_or_new(now: dict[int, bytes], old: dict[int, bytes], new: dict[int, bytes]) -> bool:
    for at in now.keys() | old.keys() | new.keys():
        blank = bytes(PIECE)
        page, before, after = (each.get(at, blank) for each in (now, old, new))
        if page in (before, after):
            continue
        if any(x not in (a, b) for x, a, b in zip(page, before, after, strict=False)):
            return False
    return True


@cache
def every_frame() -> Pair:
    """A hole at the source over data of the target (ZEROS); an equal block, a zero one that is not zero at the target,
    and a differing one of which only the last 100 bytes differ (DIGESTS, WANT, DATA): little data, hence few offsets.
    """
    rng = random.Random(SEED)
    equal, first = rng.randbytes(8 * KIB), rng.randbytes(PIECE)
    at = WINDOW
    return Pair(
        size=at + 16 * KIB + PIECE + 100,
        block=8 * KIB,
        source={at: equal, at + 16 * KIB: first, at + 20 * KIB: rng.randbytes(100)},
        target={
            40 * KIB: rng.randbytes(100),
            at: equal,
            at + 8 * KIB: rng.randbytes(8 * KIB),
            at + 16 * KIB: first,
            at + 20 * KIB: rng.randbytes(100),
        },
    )


@cache
def every_want() -> Pair:
    """Blocks that are refined, wanted because nothing is there, wanted whole, and zeroed piece by piece."""
    rng = random.Random(SEED)
    block = 16 * KIB
    source, target = {}, {}
    for i in range(6):
        source[i * block] = target[i * block] = rng.randbytes(block)
    target[0 * block + PIECE] = rng.randbytes(5)  # one piece of a block
    source[1 * block] = bytes(PIECE) + source[1 * block][PIECE:]  # a piece becomes zero
    del target[2 * block]
    target[3 * block] = rng.randbytes(block)
    del source[4 * block]
    return Pair(size=6 * block + 1000, block=block, source=source, target=target)


@cache
def unasked() -> Pair:
    """So much of the first window differs that the later ones are sent without asking (BULK), zero blocks too."""
    rng = random.Random(SEED)
    source = {0: rng.randbytes(64 * PIECE)}
    target = {0: rng.randbytes(64 * PIECE)}
    for window in range(1, 12):
        at = window * WINDOW
        source[at], target[at] = rng.randbytes(2 * PIECE), rng.randbytes(PIECE)
        source[at + 3 * KIB * KIB], target[at + 3 * KIB * KIB + PIECE] = rng.randbytes(100), rng.randbytes(PIECE)
    return Pair(size=12 * WINDOW + 10, block=PIECE, source=source, target=target)


# --- one run


@dataclass
class Mode:
    write: bool = True
    recheck: bool = False
    timeout: float = END_S


class Ended(NamedTuple):
    """An outcome of the core, which itself cannot be pickled."""

    status: int
    errno: int
    offset: int
    side: str
    text: str


@dataclass
class Run:
    pair: Pair
    mode: Mode
    damage: Damage
    source: Ended
    target: Ended
    forth: bytes  # what was sent to the target; empty when it is of no interest
    back: bytes
    differing: list[tuple[int, list[tuple[int, int]]]]
    problems: list[str] = field(default_factory=list)


def settings(pair: Pair, mode: Mode) -> dict[str, int | float | bool]:
    # One thread each: the order of the frames, and so what lies at an offset, is then the same in every run.
    return {
        "size": pair.size,
        "block_size": pair.block,
        "seed": SEED,
        "write": mode.write,
        "recheck": mode.recheck,
        "ranges": not mode.write,
        "threads": 1,
        "timeout": mode.timeout,
    }


def ended(helper: _core.Helper, limit_s: float = END_S) -> bool:
    deadline = time.monotonic() + limit_s
    while not helper.poll(1.0):
        if time.monotonic() > deadline:
            return False
    return True


@contextmanager
def closing(*fds: int) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def go(pair: Pair, damage: Damage, mode: Mode | None = None, pool: ThreadPoolExecutor | None = None) -> Run:
    """Copies `pair` through the damaged line, whose threads are taken from `pool`, and judges."""
    mode = mode or Mode()
    source_fd, target_fd = pair.open_source(), pair.open_target()
    near, first = socket.socketpair()
    second, far = socket.socketpair()
    with closing(source_fd, target_fd):
        old, new = pages(target_fd), pages(source_fd)
        with Relay(first, second, damage, pool) as relay:
            helpers = []
            try:
                for begin, fd, sock in (
                    (_core.Helper.source, source_fd, near),
                    (_core.Helper.target, target_fd, far),
                ):
                    with sock:  # the helper has its own
                        channel = _core.Channel(sock.fileno(), sock.fileno(), SESSION)
                        helpers.append(begin(fd, channel, **settings(pair, mode)))  # type: ignore[arg-type]
                hung = [name for name, h in zip(("source", "target"), helpers, strict=True) if not ended(h)]
            finally:
                near.close()
                far.close()
                for helper in helpers:
                    helper.close()
        run = Run(
            pair=pair,
            mode=mode,
            damage=damage,
            source=Ended(*helpers[0].outcome()),
            target=Ended(*helpers[1].outcome()),
            forth=bytes(relay.forth.given),
            back=bytes(relay.back.given),
            differing=[(h.progress().differing_bytes, h.take_ranges()) for h in helpers],
        )
        counts = arrived(relay.forth, frames.SYNC), arrived(relay.back, frames.SYNCED)
        run.problems = [
            *(f"the {name} hung" for name in hung),
            *judge(run, counts, old, new, pages(target_fd), pages(source_fd)),
        ]
    return run


def judge(
    run: Run,
    syncs: tuple[int, int],
    old: dict[int, bytes],
    new: dict[int, bytes],
    now: dict[int, bytes],
    source_now: dict[int, bytes],
) -> list[str]:
    found = [
        f"the {name} ended with {outcome}"
        for name, outcome in (("source", run.source), ("target", run.target))
        if outcome.status not in ENDINGS
    ]
    well = run.source.status == _core.OUTCOME_OK, run.target.status == _core.OUTCOME_OK
    wanted = 2 if run.mode.recheck else 1
    if well[1] and syncs[0] != wanted:
        found.append("the target is content with a damaged stream")
    if well[0] and syncs[1] != wanted:
        found.append("the source is content with damaged answers")
    if well[0] and not well[1]:
        found.append("the source is content, the target is not")
    if source_now != new:
        found.append("the source was changed")
    if not run.mode.write:
        if now != old:
            found.append("a dry run wrote")
        expected = changed_pages(run.pair)
        for content, (count, ranges) in zip(well, run.differing, strict=True):
            if content and (count != sum(expected.values()) or sum(n for _, n in ranges) != count):
                found.append(f"a dry run reports {count} in {ranges}, not {expected}")
    elif any(well) and now != new:
        found.append("said to be equal, and differs")
    elif not only_old_or_new(now, old, new):
        found.append("the target holds what neither of the two images held")
    return found


def arrived(stream: Stream, kind: int) -> int:
    """How many frames of this kind came through unharmed, and everything before them."""
    return sum(frame.kind == kind for frame in frames.parse(bytes(stream.given[: stream.intact])))


def all_well(pair: Pair, cases: Sequence[Damage], mode: Mode | None = None, *, at_once: int = 2) -> list[Run]:
    """Runs every case, `at_once` of them in each worker; those that went wrong are shown as they can be repeated."""

    def work(some: Sequence[Damage]) -> list[Run]:
        search = os.pathsep.join((str(Path(__file__).parent), str(Path(mirrorpair.__file__).parent.parent)))
        done = subprocess.run(
            [sys.executable, "-m", "copied"],
            input=pickle.dumps((pair, some, mode, at_once)),
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONPATH": search},
        )
        assert done.returncode == 0, done.stderr.decode()
        assert not done.stderr, done.stderr.decode()  # a failed assertion of the core, say
        runs: list[Run] = pickle.loads(done.stdout)
        return runs

    with ThreadPoolExecutor(WORKERS) as pool:
        runs = [run for some in pool.map(work, [cases[i::WORKERS] for i in range(WORKERS)]) for run in some]
    wrong = [(run.damage, run.problems, run.source, run.target) for run in runs if run.problems]
    assert not wrong, f"{len(wrong)} of {len(cases)} went wrong, the first ones: {wrong[:3]}"
    return runs


def clean(pair: Pair, mode: Mode | None = None) -> Run:
    run = go(pair, Damage(), mode)
    assert run.problems == []
    assert run.source.status == run.target.status == _core.OUTCOME_OK
    return run


def kinds_of(stream: bytes) -> set[int]:
    return {frame.kind for frame in frames.parse(stream)}


def offsets(run: Run) -> list[tuple[int, bool]]:
    return [(at, back) for back, stream in ((False, run.forth), (True, run.back)) for at in range(len(stream))]


def all_started(count: int) -> ThreadPoolExecutor:
    """A pool whose threads all run already. A thread that starts or ends during a fork may hold locks of ASan's own,
    which it would hold for ever in the child.
    """
    pool = ThreadPoolExecutor(count)
    together = threading.Barrier(count)
    for _ in pool.map(lambda _: together.wait(END_S), range(count)):
        pass
    return pool


def main() -> None:
    pair, cases, mode, at_once = pickle.loads(sys.stdin.buffer.read())
    with all_started(at_once) as pool, all_started(2 * at_once) as relays:
        runs = list(pool.map(lambda damage: go(pair, damage, mode, relays), cases))
    for run in runs:
        run.forth = run.back = b""
    sys.stdout.buffer.write(pickle.dumps(runs))


if __name__ == "__main__":
    import copied  # what is pickled must not belong to __main__

    copied.main()
