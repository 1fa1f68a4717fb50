"""kill -9 of either daemon, or of both, at the Nth system call of a kind: nothing acknowledged is lost, and the images
are equal again.

Rules:
- N is a spread by the test's seed; MIRRORPAIR_TEST_EVERY=1 takes every N.
- A round that does not reach its N kills at the end of its phase: every round has a crash.
- Nobody but the oracle says what must be there, and no round needs --accept-data-loss.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import pytest
from rig import EVERY, Rig, spread

from mirrorpair.errors import MirrorpairError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from subprocess import Popen

# How often each is made in one phase, about.
WRITING = {"pwrite": 80, "pwritev2": 10, "fdatasync": 20, "fallocate": 15, "sendmsg": 100, "recv": 100}
RESYNC = {"pwrite": 30, "fdatasync": 8, "sendmsg": 40, "recv": 40}
METADATA = {"pwrite": 12, "fdatasync": 12, "rename": 2, "fsync": 4}


def rounds(rng: random.Random, calls: dict[str, int], few: int) -> list[tuple[str, int, bool]]:
    """(call, N, after the call instead of before it): all of them, or `few`, of different calls first."""
    if EVERY:
        return [(call, when, after) for call, most in calls.items() for when in range(1, most + 1) for after in (0, 1)]
    names = rng.sample(sorted(calls), len(calls)) * few
    return [(call, *spread(rng, calls[call], 1), rng.random() < 0.5) for call in names[:few]]


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_killed_while_clients_write(rig: Rig, rng: random.Random, name: str) -> None:
    """A4, A7, A17, W7, M4: a process that dies, at any call, on either node."""
    rig.up()
    for shot in rounds(rng, WRITING, 4):
        rig.arm(name, *shot)
        rig.write_until_death(getattr(rig.pair, name))
        assert rig.recover() is rig.pair.alpha
    assert rig.oracle.acknowledged > 50


def test_both_killed_while_clients_write(rig: Rig, rng: random.Random) -> None:
    """The second one dies as soon as the first one has."""
    rig.up()
    for shot in rounds(rng, WRITING, 2):
        one, other = rng.sample([rig.pair.alpha, rig.pair.beta], 2)
        rig.arm(one.name, *shot)
        chase = threading.Thread(target=_chase, args=(one.process, other.process))
        chase.start()
        rig.write_until_death(one)
        chase.join()
        rig.kill(other)
        assert rig.recover() is rig.pair.alpha


def _chase(first: Popen[bytes], second: Popen[bytes]) -> None:
    """SIGKILL for the second one once the first one has ended."""
    first.wait()
    second.kill()


def test_killed_while_the_sole_member_writes(rig: Rig, rng: random.Random) -> None:
    """A4, G1, G2: alone, with a generation of its own that may just be beginning; it takes its role back by itself."""
    rig.up()
    for shot in rounds(rng, {"pwrite": 20, "fdatasync": 6, "sendmsg": 30}, 2):
        rig.kill(rig.pair.beta)
        with rig.pair.alpha.client() as client:
            rig.oracle.write(client, 5)  # alone from here on
        rig.arm("alpha", *shot)
        rig.write_until_death(rig.pair.alpha)
        rig.start(rig.pair.alpha)
        rig.pair.alpha.wait("primary")
        with rig.pair.alpha.client() as client:
            assert rig.oracle.write(client, 5)
        assert rig.recover() is rig.pair.alpha


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_killed_during_a_resync(rig: Rig, rng: random.Random, name: str) -> None:
    """R1, R3, R6, G4: broken off at any call at the source (alpha) or the target, while clients write onto it."""
    rig.up()
    for shot in rounds(rng, RESYNC, 2):
        rig.kill(rig.pair.beta)
        with rig.pair.alpha.client() as client:
            rig.oracle.write(client, 60)
            if name == "alpha":
                rig.arm(name, *shot)
                rig.start(rig.pair.beta, wait=False)
            else:
                rig.start(rig.pair.beta, wait=False)
                rig.arm(name, *shot)
            rig.oracle.write(client, 60, until=lambda: rig.died(getattr(rig.pair, name)))
        rig.kill(getattr(rig.pair, name))
        assert rig.recover() is rig.pair.alpha


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_killed_at_the_first_meeting(rig: Rig, rng: random.Random, name: str) -> None:
    """M10: uuids and first ids are being written on both sides."""
    for shot in rounds(rng, METADATA, 2):
        rig.fresh()
        rig.init()
        rig.arm(name, *shot)
        for node in rig.pair.nodes:
            rig.start(node, wait=False)
        victim = getattr(rig.pair, name)
        if rig.reach(rig.pair.alpha, "connected", victim):
            with contextlib.suppress(MirrorpairError):  # it may die before anything works
                rig.pair.alpha.promote()
                rig.reach(rig.pair.alpha, "synced", victim)
        rig.kill(victim)
        primary = rig.recover()
        with primary.client() as client:
            assert rig.oracle.write(client, 10)
        rig.check(primary)
        for node in rig.pair.nodes:
            rig.kill(node)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_killed_while_the_roles_change(rig: Rig, rng: random.Random, name: str) -> None:
    """A4, A13, L0: node file, superblocks and record are being written on both sides, for demote or promote."""
    rig.up()
    primary = rig.pair.alpha
    for shot in rounds(rng, METADATA, 3):
        with primary.client() as client:
            rig.oracle.write(client, 20)
        other = next(node for node in rig.pair.nodes if node is not primary)
        late = rng.random() < 0.5
        if not late:
            rig.arm(name, *shot)
        with contextlib.suppress(MirrorpairError):
            primary.demote()
            if late:
                rig.arm(name, *shot)
            other.promote()
        rig.kill(getattr(rig.pair, name))
        primary = rig.recover(other)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_killed_during_a_clean_stop(rig: Rig, rng: random.Random, name: str) -> None:
    """A18, M6: a stop that does not end is a crash, whatever was marked before."""
    rig.up()
    victim = getattr(rig.pair, name)
    for shot in rounds(rng, {"pwrite": 6, "fdatasync": 6}, 2):
        with rig.pair.alpha.client() as client:
            rig.oracle.write(client, 30)
        rig.arm(name, *shot)
        process = victim.process
        process.terminate()
        process.wait()
        rig.kill(victim)
        assert rig.recover() is rig.pair.alpha


def test_every_round_is_repeated_by_its_seed(rng: random.Random, make_rig: Callable[..., Rig]) -> None:
    """What a failure prints is enough: the same seed chooses the same calls."""
    state = rng.getstate()
    first = rounds(rng, WRITING, 5)
    rng.setstate(state)
    assert rounds(rng, WRITING, 5) == first
