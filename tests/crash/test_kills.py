"""kill -9 of either daemon, or of both, at the Nth system call of a kind: nothing acknowledged is lost, and the images
are equal again.

Rules:
- Every kind of call that a daemon makes in a phase kills it there at least once. CALLS says how many are made.
- A round ends with the call, not with its own steps: what these have not made, be it that N was too many for them this
  time or that the machine was slow, `goes_on` brings about with the work that makes such calls, until it happens.
- N is chosen by the test's seed. MIRRORPAIR_TEST_EVERY=1 takes every N, before and after the call: for the night, some
  hours. MIRRORPAIR_TEST_SEED=n repeats a run.
- Nobody but the oracle says what must be there, and no round needs --accept-data-loss.
- Several pairs are at it at a time: a round waits more than it works. Which pair a case goes to is fixed.
"""

from __future__ import annotations

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest
from rig import EVERY, WRITES, Rig, lost

from mirrorpair.errors import MirrorpairError

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen

    from pair import Daemon

LANES = 4
RECORD = ("write", "fsync", "rename")


class Shot(NamedTuple):
    name: str
    call: str
    when: int
    after: bool


Phase = "Callable[[Rig, Daemon, Shot | None], None]"


def arm(rig: Rig, shot: Shot | None) -> None:
    if shot is not None:
        rig.arm(*shot)


FOREVER = 1 << 30


def goes_on(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """The steps of the phase are over, and it lives: writes, trims, FUA and FLUSH go on, or (for the calls that change
    a small file as a whole) the role goes to and fro."""
    while shot is not None and not rig.died(victim):
        try:
            primary = rig.primary()
            if shot.call in RECORD:
                primary.demote()
        except MirrorpairError:  # it dies of this
            continue
        if shot.call not in RECORD:
            with lost(), rig.clients(primary) as (client, other):
                rig.oracle.write(client, FOREVER, other=other, until=lambda: rig.died(victim))
    rig.kill(victim)


# --- the phases: each ends with the victim dead


def writing(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """A4, A7, A17, M4, W5, W7: writes, trims, FUA, FLUSH; extents enter the activity log."""
    arm(rig, shot)
    rig.write_until_death(victim, most=WRITES if shot is None else FOREVER)


def alone(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """A4, G1, G2: the other one is lost, and a generation begins; its sole member takes its role back by itself."""
    at_once = shot is not None and shot.call in RECORD  # it may be written before the kill of the other one returns
    if at_once:
        arm(rig, shot)
    rig.kill(rig.pair.beta)
    if not at_once:
        arm(rig, shot)
    rig.write_until_death(victim, most=60 if shot is None else FOREVER)
    rig.start(victim)
    victim.wait("primary")
    with victim.client() as client:
        assert rig.oracle.write(client, 5)


def resync(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """R1, R3, R6, G4: broken off at the source (alpha) or the target, while clients write onto it."""
    rig.kill(rig.pair.beta)
    _comes_back(rig, victim, shot)


def replaced(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """R6: likewise a full compare, whose number and bits are being written."""
    rig.kill(rig.pair.beta)
    rig.blank(rig.pair.beta)
    _comes_back(rig, victim, shot)


def _comes_back(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    beta = rig.pair.beta
    with lost(), rig.clients() as (client, other):
        rig.oracle.write(client, 60)
        arm(rig, shot)
        rig.start(beta, wait=False)
        rig.oracle.write(client, 60, other=other, until=lambda: rig.died(victim))
        rig.reach(rig.pair.alpha, "synced", victim)
    goes_on(rig, victim, shot)


def meeting(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """M10: uuids, first ids and the record are being written on both sides."""
    for node in rig.pair.nodes:
        rig.kill(node)
    rig.fresh()
    rig.init()
    arm(rig, shot)
    for node in rig.pair.nodes:
        rig.start(node, wait=False)
    if rig.reach(rig.pair.alpha, "connected", victim):
        with contextlib.suppress(MirrorpairError):  # it may die before anything works
            rig.pair.alpha.promote()
            rig.reach(rig.pair.alpha, "synced", victim)
    goes_on(rig, victim, shot)


def roles(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """A4, A13, L0: node file, superblocks and record are being written on both sides, while a client still writes."""
    alpha, beta = rig.pair.nodes

    def demote() -> None:
        with contextlib.suppress(MirrorpairError):  # it, or its peer, dies of this
            alpha.demote()

    with lost(), rig.clients() as (client, _):
        arm(rig, shot)
        rig.oracle.write(client, 20, stopping=True, finish=demote)
    with contextlib.suppress(MirrorpairError):
        beta.promote()
        rig.reach(beta, "synced", victim)
    goes_on(rig, victim, shot)
    if beta.process is not None and beta.status().role == "primary":
        rig.recover(beta)
        beta.demote()


def restart(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """M6, M7, A4: it dies again while it starts, with what its first death left open."""
    rig.kill(victim) if victim is rig.pair.beta else rig.write_until_death(victim, most=20)
    arm(rig, shot)
    rig.start(victim, wait=False)
    rig.reach(rig.pair.alpha if victim is rig.pair.beta else rig.pair.beta, "synced", victim)
    goes_on(rig, victim, shot)


def stop(rig: Rig, victim: Daemon, shot: Shot | None) -> None:
    """A18, M6: a stop that does not end is a crash, whatever was marked before. Of the calls that each stop makes."""
    with lost(), rig.clients() as (client, _):
        rig.oracle.write(client, 30)
    arm(rig, shot)
    process = victim.process
    assert process is not None
    process.terminate()
    process.wait()
    rig.kill(victim)


PHASES = {one.__name__: one for one in (writing, alone, resync, replaced, meeting, roles, restart, stop)}

# How often each call is made in a phase, about; what is not here is not made.
_DATA = {"pwritev2": 2, "fallocate": 3}
_RECORD = {"write": 1, "fsync": 2, "rename": 1}
CALLS: dict[tuple[str, str], dict[str, int]] = {
    ("writing", "alpha"): {
        "pwrite": 150,
        "pwritev2": 20,
        "fdatasync": 20,
        "fallocate": 15,
        "sendmsg": 200,
        "recv": 200,
    },
    ("writing", "beta"): {"pwrite": 150, "pwritev2": 20, "fdatasync": 18, "fallocate": 15, "sendmsg": 100, "recv": 150},
    ("alone", "alpha"): {"pwrite": 40, "fdatasync": 10, "sendmsg": 25, "recv": 30, **_DATA, **_RECORD},
    ("resync", "alpha"): {"pwrite": 40, "fdatasync": 8, "sendmsg": 120, "recv": 120, **_DATA, **_RECORD},
    ("resync", "beta"): {"pwrite": 35, "fallocate": 2, "fdatasync": 6, "sendmsg": 20, "recv": 70, **_RECORD},
    ("replaced", "alpha"): {"pwrite": 40, "fdatasync": 8, "sendmsg": 120, "recv": 120},
    ("replaced", "beta"): {"pwrite": 35, "fallocate": 2, "fdatasync": 8, "sendmsg": 20, "recv": 70, **_RECORD},
    ("meeting", "alpha"): {"pwrite": 9, "fdatasync": 10, "sendmsg": 6, "recv": 50, **_RECORD},
    ("meeting", "beta"): {"pwrite": 9, "fdatasync": 10, "sendmsg": 6, "recv": 50, **_RECORD},
    ("roles", "alpha"): {"pwrite": 35, "fdatasync": 15, "sendmsg": 30, "recv": 80, "fallocate": 1, **_RECORD},
    ("roles", "beta"): {"pwrite": 15, "fdatasync": 6, "sendmsg": 10, "recv": 50, **_RECORD},
    ("restart", "alpha"): {"pwrite": 6, "fdatasync": 8, "sendmsg": 20, "recv": 40, **_RECORD},
    ("restart", "beta"): {"pwrite": 4, "fdatasync": 6, "sendmsg": 8, "recv": 50, **_RECORD},
    ("stop", "alpha"): {"pwrite": 3, "fdatasync": 4, "recv": 2},
    ("stop", "beta"): {"pwrite": 3, "fdatasync": 4, "recv": 2, **_RECORD},
}


def rounds(rng: random.Random, calls: dict[str, int], name: str) -> list[Shot]:
    """One of each call, or all."""
    if EVERY:
        return [
            Shot(name, call, n, after) for call, most in calls.items() for n in range(1, most + 1) for after in (0, 1)
        ]
    return [Shot(name, call, max(1, int(most ** rng.random())), rng.random() < 0.5) for call, most in calls.items()]


def run(rig: Rig, phase: str, shot: Shot) -> None:
    """One round, from both in sync to both in sync."""
    victim = getattr(rig.pair, shot.name)
    rig.hit = False
    PHASES[phase](rig, victim, shot)
    assert rig.hit or EVERY, f"{shot.name} does not make {shot.when} {shot.call} in the phase {phase}"
    primary = rig.recover()
    if primary is not rig.pair.alpha:
        primary.demote()
        rig.recover(rig.pair.alpha, check=False)


def in_lanes(make_rig: Callable[..., Rig], rng: random.Random, cases: list[tuple[str, Shot]]) -> None:
    """Case i is the pair's number i % LANES."""
    rigs = [make_rig(rng=random.Random(rng.getrandbits(32))) for _ in range(LANES)]

    def lane(number: int) -> None:
        rigs[number].up()
        for case in cases[number::LANES]:
            run(rigs[number], *case)

    with ThreadPoolExecutor(LANES) as pool:
        for done in [pool.submit(lane, number) for number in range(LANES)]:
            done.result()


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_killed_at_any_call(make_rig: Callable[..., Rig], rng: random.Random, name: str) -> None:
    """The primary (alpha), or the secondary."""
    cases = [(phase, shot) for (phase, who), calls in CALLS.items() if who == name for shot in rounds(rng, calls, name)]
    rng.shuffle(cases)
    in_lanes(make_rig, rng, cases)


def test_both_killed_while_clients_write(rig: Rig, rng: random.Random) -> None:
    """The second one dies as soon as the first one has."""
    rig.up()
    shots = [shot for name in ("alpha", "beta") for shot in rounds(rng, CALLS["writing", name], name)]
    for shot in shots if EVERY else rng.sample(shots, 3):
        one = getattr(rig.pair, shot.name)
        other = rig.pair.beta if one is rig.pair.alpha else rig.pair.alpha
        arm(rig, shot)
        chase = threading.Thread(target=_chase, args=(one.process, other.process))
        chase.start()
        rig.write_until_death(one)
        chase.join()
        rig.kill(other)
        assert rig.recover() is rig.pair.alpha
    assert rig.oracle.acknowledged > 0


def _chase(first: Popen[bytes], second: Popen[bytes]) -> None:
    """SIGKILL for the second one once the first one has ended."""
    first.wait()
    second.kill()


def test_every_round_is_repeated_by_its_seed(rng: random.Random) -> None:
    """What a failure prints is enough: the same seed chooses the same calls."""
    state = rng.getstate()
    first = rounds(rng, CALLS["writing", "alpha"], "alpha")
    rng.setstate(state)
    assert rounds(rng, CALLS["writing", "alpha"], "alpha") == first
