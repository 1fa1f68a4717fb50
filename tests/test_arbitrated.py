"""The roles of an arbitrated pair, played with a witness, lost and late swaps, promises, crashes (witnessworld.py); and
what a swap may follow from."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import witnessworld
from witnessworld import Attempt, Machine, World

from mirrorpair import handoff, roles
from mirrorpair.proofs import Lives, Proof
from mirrorpair.rolesteps import Step, change
from mirrorpair.rolewords import Mode, State, Swap, Swapped
from mirrorpair.swaprules import Read, objection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mirrorpair.proofs import Life

BOTH = ("alpha", "beta")


def simulate(rng: random.Random, *, sentinels: bool = False, **traits: object) -> World:
    """`traits`: what the world's own dice have chosen otherwise."""
    world = World(rng, sentinels=sentinels)
    for name, value in traits.items():
        assert hasattr(world, name)
        setattr(world, name, value)
    world.run(3000)
    world.heal(6000)
    return world


def parted(rng: random.Random) -> World:
    """The two lose each other for a while, again and again, when all was well; nothing else fails."""
    world = World(rng)
    for _ in range(6):
        world.heal(6000)
        for machine in world.machines:
            world.beat(machine)
        world.part()
        world.run(250)
    return world


def late_takeover(rng: random.Random) -> World:
    world = World(rng)
    world.worst_takeover()
    return world


def late_expand(rng: random.Random) -> World:
    world = World(rng)
    world.worst_expand()
    return world


def stormy(rng: random.Random) -> None:
    simulate(rng, storm=1)


def test_no_acknowledged_write_is_lost_and_nobody_acknowledges_beside_another(rng: random.Random) -> None:
    """And once nothing fails any more both are in sync again. Those who took over, and what was acknowledged, say that
    there was something to be lost."""
    worlds = [simulate(rng) for _ in range(60)]
    assert sum(len(world.acked) for world in worlds) > 1000
    assert sum(world.acquisitions for world in worlds) > 150


def test_nor_with_sentinels_whose_reports_come_at_once_late_repeatedly_or_never(rng: random.Random) -> None:
    worlds = [simulate(rng, sentinels=True) for _ in range(40)]
    assert sum(len(world.acked) for world in worlds) > 500
    assert sum(world.released for world in worlds) > 10


def late_reports(rng: random.Random) -> World:
    """Kills whose proofs come when both are in sync again and have just lost each other: then they are dangerous."""
    world = World(rng, sentinels=True)
    for _ in range(4):
        world.heal(6000)
        world.kill(next(machine for machine in world.machines if machine.state.role == "primary"))
        world.heal(6000)
        world.faults = True
        world.part()
        world.prove()
        world.run(250)
    world.heal(6000)
    return world


def test_a_report_that_comes_when_the_next_process_serves_ends_nothing_of_it(rng: random.Random) -> None:
    worlds = [late_reports(rng) for _ in range(30)]
    assert sum(len(world.acked) for world in worlds) > 500


# --- it bites


def forgetful_end(self: Machine, ok: bool, why: str = "") -> None:
    attempt: Attempt = self.attempts.pop(0)
    self.inbox.append(Swapped(attempt.action, ok, why))


def keen_objection(swap: Swap, me: str, read: Read) -> str | None:
    return objection(swap, me, read._replace(in_sync=()))


def heedless_objection(swap: Swap, me: str, read: Read) -> str | None:
    return objection(swap, me, read._replace(pause=False))


def forgetful_handoff(state: State, event: Swapped, now: int) -> Step:
    """A handoff of which nothing is known counts as not done."""
    return SWAPPED(state, msgspec.structs.replace(event, unknown=False), now)


def trusting(before: State, done: Step, now: int) -> Step:
    """After an unknown handoff a record that still names this node is taken for a proof."""
    if before.handing == "unknown" and done.state.role == "primary" and done.sentence.startswith("the record says"):
        done = done._replace(state=change(done.state, handing="no"))
    return SETTLE(before, done, now)


def generous(state: State) -> Mode:
    """What is being given away is answered for all the same."""
    return MODE_OF(change(state, handing="no"))


SWAPPED, SETTLE, MODE_OF = handoff.swapped, handoff.settle, roles.mode_of


def credulous_proof(self: Lives, died: Iterable[Life]) -> Proof:
    return Proof(True, True, releases=True, gone=False)


def never(value: Any) -> property:
    return property(lambda _: value, lambda _, __: None)


WEAKENED: dict[str, tuple[object, str, object]] = {
    "A0 an unknown swap counts as none": (Machine, "end", forgetful_end),
    "A1 alone without the shrink": (State, "peer_in_sync", property(lambda _: False)),
    "A2 required only once it is known": (State, "peer_in_sync", property(lambda state: state.peer in state.in_sync)),
    "A3 who is no member takes over": (witnessworld, "objection", keen_objection),
    "A4 a lost boot is no reason": (Machine, "boot_lost", never(False)),
    "A10 validity is not looked at": (Machine, "valid", lambda _: True),
    "A11 promises are not kept": (Machine, "bound_until", never(0)),
    "A19 a pause is not looked at": (witnessworld, "objection", heedless_objection),
    "A11 any process's death ends the promise": (Lives, "prove", credulous_proof),
    "A13 promises beside an attempt": (Machine, "promises", lambda self, epoch: epoch >= self.state.epoch),
}


PLAYS = {
    "A0 an unknown swap counts as none": late_expand,
    "A2 required only once it is known": late_expand,
    "A10 validity is not looked at": parted,
    "A11 promises are not kept": parted,
    "A11 any process's death ends the promise": late_reports,
    "A13 promises beside an attempt": late_takeover,
}
"""what shows it soon, where storms do not"""


@pytest.mark.parametrize("rule", WEAKENED)
def test_it_bites_when_a_rule_is_weakened(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    owner, name, value = WEAKENED[rule]
    monkeypatch.setattr(owner, name, value, raising=False)

    play = PLAYS.get(rule, stormy)

    def many() -> None:
        for seed in range(1000):
            play(random.Random(seed))

    with pytest.raises(AssertionError, match=r"^(I\d|A19):"):
        many()


@pytest.mark.parametrize("play", [parted, late_takeover, late_expand, late_reports])
def test_what_shows_a_weakened_rule_soon_shows_nothing_else(play: Any, rng: random.Random) -> None:
    for _ in range(10):
        play(rng)


def test_a_handoff_that_comes_late_at_the_worst_moment_makes_no_second_primary(rng: random.Random) -> None:
    for _ in range(20):
        World(rng).worst_handoff()


WEAKENED_HANDOFF: dict[str, tuple[object, str, object]] = {
    "A0 an unknown handoff counts as none": (handoff, "swapped", forgetful_handoff),
    "A0 a record proves that a handoff did not happen": (handoff, "settle", trusting),
    "the role is answered for while it is given away": (roles, "mode_of", generous),
}


@pytest.mark.parametrize("rule", WEAKENED_HANDOFF)
def test_it_bites_when_a_rule_of_the_handoff_is_weakened(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    owner, name, value = WEAKENED_HANDOFF[rule]
    monkeypatch.setattr(owner, name, value)

    def some() -> None:
        for seed in range(20):
            World(random.Random(seed)).worst_handoff()

    with pytest.raises(AssertionError, match=r"^I\d:"):
        some()


# --- what a swap may follow from


def swap(purpose: Any, epoch: int, primary: str | None = "alpha", **changes: Any) -> Swap:
    return Swap(purpose, epoch, primary, ("alpha",), **changes)


@pytest.mark.parametrize(
    ("action", "read", "reason"),
    [
        (swap("takeover", 8), Read(7, "beta", BOTH), None),
        (swap("takeover", 8), Read(7, "beta", ("beta",)), "only beta has everything"),
        (swap("takeover", 8), Read(7, "beta", BOTH, known=False), "it was made anew"),
        (swap("takeover", 8), Read(7, "beta", BOTH, pause=True), "paused"),
        (swap("takeover", 8), Read(7, "beta", BOTH, bound=True), "has promised beta"),
        (swap("promote", 8), Read(7, "beta", BOTH, bound=True), "has promised beta"),
        (swap("promote", 8, forced=True), Read(7, "beta", BOTH, bound=True), None),
        (swap("promote", 8), Read(7, None, BOTH, bound=True), None),
        (swap("readopt", 8), Read(7, "alpha", BOTH, bound=True), None),
        (swap("takeover", 8), Read(7, None, BOTH), "nobody is primary"),
        (swap("takeover", 8), Read(7, "beta", BOTH, boot_lost=True), "which may hold what was lost"),
        (swap("promote", 8), Read(7, "beta", BOTH, boot_lost=True), "which may hold what was lost"),
        (swap("promote", 8, overrides=True), Read(7, "beta", BOTH, boot_lost=True), None),
        (swap("readopt", 8), Read(7, "alpha", ("alpha",), boot_lost=True), None),
        (swap("readopt", 8), Read(7, "alpha", BOTH, boot_lost=True), "which may hold what was lost"),
        (swap("takeover", 8), Read(7, "alpha", BOTH), "nothing to take over"),
        (swap("takeover", 8), Read(8, "beta", BOTH), "at epoch 8 already"),
        (swap("takeover", 8), Read(8, "alpha", ("alpha",), own=True), None),
        (swap("readopt", 8), Read(7, "alpha", BOTH), None),
        (swap("readopt", 8), Read(7, "alpha", ("alpha",), pause=True), None),
        (swap("readopt", 8), Read(7, "alpha", ("alpha",), known=False), "it was made anew"),
        (swap("readopt", 8), Read(7, "beta", BOTH), "beta is primary"),
        (swap("promote", 1), Read(0, None, ()), None),
        (swap("bootstrap", 1), Read(0, None, ()), None),
        (swap("bootstrap", 1), Read(0, None, BOTH), None),
        (swap("bootstrap", 2), Read(1, None, BOTH), "the register is not new"),
        (swap("bootstrap", 1), Read(0, None, BOTH, pause=True), "paused"),
        (swap("bootstrap", 1), Read(0, None, ("beta",)), "only beta has everything"),
        (swap("bootstrap", 1), Read(0, None, BOTH, known=False), "it was made anew"),
        (swap("bootstrap", 1), Read(1, "beta", BOTH), "at epoch 1 already"),
        (swap("promote", 8), Read(7, "beta", ("beta",)), "only beta has everything"),
        (swap("promote", 8, overrides=True), Read(7, "beta", ("beta",)), None),
        (swap("promote", 8, overrides=True), Read(9, "beta", ("beta",)), "at epoch 9 already"),
        (swap("raise", 9), Read(7, "alpha", BOTH), None),
        (swap("raise", 9), Read(7, "beta", BOTH), "beta is primary"),
        (swap("raise", 9), Read(9, "alpha", BOTH), "primary of epoch 9"),
        (swap("raise", 9, overrides=True), Read(0, None, ()), None),
        (swap("raise", 9, overrides=True), Read(9, "beta", BOTH), "primary of epoch 9"),
        (swap("shrink", 7), Read(7, "alpha", BOTH), None),
        (swap("shrink", 7), Read(8, "beta", ("beta",)), "beta is primary of epoch 8"),
        (swap("shrink", 7), Read(8, "alpha", BOTH), "alpha is primary of epoch 8"),
        (swap("expand", 7), Read(7, "alpha", ("alpha",)), None),
        (swap("expand", 7, None), Read(7, None, ("alpha",)), None),
        (swap("expand", 7), Read(7, None, ("alpha",)), "nobody is primary of epoch 7"),
        (swap("release", 7, None), Read(7, "alpha", BOTH), None),
        (swap("release", 7, None), Read(8, "beta", BOTH), "beta is primary of epoch 8"),
        (swap("handoff", 8, "beta"), Read(7, "alpha", BOTH), None),
        (swap("handoff", 8, "beta"), Read(7, "alpha", BOTH, pause=True, latched=True), None),
        (swap("handoff", 8, "beta", unasked=True), Read(7, "alpha", BOTH), None),
        (swap("handoff", 8, "beta", unasked=True), Read(7, "alpha", BOTH, pause=True), "paused"),
        (swap("handoff", 8, "beta", unasked=True), Read(7, "alpha", BOTH, latched=True), "too many role changes"),
        (swap("handoff", 8, "beta"), Read(7, "alpha", ("alpha",)), "beta is not in sync"),
        (swap("handoff", 8, "beta"), Read(8, "alpha", BOTH), "alpha is primary of epoch 8"),
        (swap("handoff", 8, "beta"), Read(7, "beta", BOTH), "beta is primary of epoch 7"),
        (swap("handoff", 8, "beta"), Read(8, "beta", BOTH, own=True), None),
        (swap("takeover", 8), Read(7, "beta", BOTH, latched=True), None),
        (swap("hold", 7), Read(7, "alpha", BOTH), None),
        (swap("hold", 7), Read(8, "beta", BOTH), "beta is primary of epoch 8"),
    ],
)
def test_a_swap_follows_from_the_record_that_was_read_or_is_not_made(
    action: Swap, read: Read, reason: str | None
) -> None:
    found = objection(action, "alpha", read)
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")
