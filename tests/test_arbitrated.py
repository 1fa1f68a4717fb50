"""The roles of an arbitrated pair in the simulation (mirrorpair/testing/): many seeds, every seed that ever
failed, and every rule weakened, which has to be found. And what a swap may follow from.

- A seed is enough to repeat a failure: `python -m mirrorpair.testing --play PLAY --replay SEED`.
- The length is bounded by steps, not by time.
"""

from __future__ import annotations

import doctest
import json
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import mirrorpair.testing
from mirrorpair import abdication, handoff, roles
from mirrorpair.proofs import Lives, Proof
from mirrorpair.rolesteps import Step, change
from mirrorpair.rolewords import Mode, State, Swap, Swapped
from mirrorpair.swaprules import Read, objection
from mirrorpair.testing import PLAYS, BrokenError, play
from mirrorpair.testing import __main__ as cli
from mirrorpair.testing import machine as machines
from mirrorpair.testing.campaign import campaign, one
from mirrorpair.testing.disk import Disk
from mirrorpair.testing.machine import Machine
from mirrorpair.testing.mirror import Mirror

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mirrorpair.proofs import Life

BOTH = ("alpha", "beta")
PARTS = 8
STEPS = 600
SEEDS = {
    "storm": 400,
    "deaths": 160,
    "rare": 400,
    "parted": 40,
    "late-reports": 40,
    "bad-disk": 160,
    "late-handoff": 80,
    "late-takeover": 80,
    "late-expand": 80,
    "flap-then-death": 80,
    "blank-then-death": 80,
    "one-fault": 80,
}
"""of each play, in every run of the tests"""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_invariant_holds_in_more_than_a_thousand_runs(part: int) -> None:
    """Always the same ones, so that a failure is the change's; new ones are a campaign's. Those who took over, and what
    was acknowledged, say that there was something to be lost."""
    first = part * 10**6
    assert set(SEEDS) == set(PLAYS)
    acks: Counter[str] = Counter()
    roles_taken = 0
    for name, count in SEEDS.items():
        for result in campaign(range(first, first + count // PARTS), [name], STEPS, 1):
            assert not result.invariant, result
            acks[name] += result.acks
            roles_taken += result.acquisitions
    assert all(acks[name] > 10 * count // PARTS for name, count in SEEDS.items()), acks
    assert roles_taken > sum(SEEDS.values()) // PARTS


FAILED = json.loads((Path(__file__).parent / "failed_seeds.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", FAILED, ids=[f"{case['play']}-{case['seed']}" for case in FAILED])
def test_every_seed_that_ever_failed_does_so_no_more(case: dict[str, Any]) -> None:
    assert case["what"]
    result = one(case["play"], case["seed"], case.get("steps"))
    assert not result.invariant, result


# --- the same for a user


def test_the_example_is_true() -> None:
    found = doctest.testmod(mirrorpair.testing, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 5
    assert not found.failed


@pytest.mark.parametrize("name", PLAYS)
def test_the_same_seed_is_the_same_run(name: str) -> None:
    assert play(name, 3, 200).trace == play(name, 3, 200).trace


def test_a_campaign_on_several_cpus_finds_what_one_finds() -> None:
    alone = list(campaign(range(8), ["storm", "rare"], 200, 1))
    assert list(campaign(range(8), ["storm", "rare"], 200, 2)) == alone
    assert len(alone) == 16


def test_the_command_counts_its_runs_and_can_repeat_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--seeds", "4", "--steps", "200", "--play", "storm", "--jobs", "1", "--json"]) == 0
    (summary,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert summary["runs"] == 4
    assert summary["failed"] == 0
    assert summary["acknowledged"] == sum(play("storm", seed, 200).checks.acks for seed in range(4))
    assert cli.main(["--play", "storm", "--replay", "3", "--steps", "200"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:-1] == play("storm", 3, 200).trace
    assert shown[-1] == "storm 3: all invariants hold"


def test_the_command_tells_which_invariant_broke_and_with_which_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Machine, "valid", lambda _: True)
    words = ["--seeds", "4", "--play", "parted", "--jobs", "1"]
    assert cli.main(words) == 1
    told = capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 1
    *failures, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert summary["failed"] == len(failures) > 0
    assert f"parted {failures[0]['seed']}: {failures[0]['what']}" in told
    assert cli.main(["--play", "parted", "--replay", str(failures[0]["seed"]), "--json"]) == 1
    again = json.loads(capsys.readouterr().out)
    assert (again["invariant"], again["what"]) == (failures[0]["invariant"], failures[0]["what"])
    assert again["trace"]


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--play", "calm"], ["--replay", "3"]])
def test_the_command_refuses_what_it_does_not_understand(words: list[str]) -> None:
    assert cli.main(words) == 2


# --- it bites


def forgetful_end(self: Machine, ok: bool, why: str = "") -> None:
    attempt = self.attempts.pop(0)
    self.inbox.append(Swapped(attempt.action, ok, why))


def keen_objection(swap: Swap, me: str, read: Read) -> str | None:
    return objection(swap, me, read._replace(in_sync=()))


def trustful_objection(swap: Swap, me: str, read: Read) -> str | None:
    return objection(swap, me, read._replace(known=True))


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


def credulous_proof(self: Lives, died: Iterable[Life]) -> Proof:
    return Proof(True, True, releases=True, gone=False)


def keeps_set(purpose: Any, epoch: int, primary: str | None, _in_sync: Any, **more: Any) -> Swap:
    return Swap(purpose, epoch, primary, None, **more)


SWAPPED, SETTLE, MODE_OF = handoff.swapped, handoff.settle, roles.mode_of


def never(value: Any) -> property:
    return property(lambda _: value, lambda _, __: None)


Change = tuple[object, str, object]
WEAKENED: dict[str, tuple[str, int, list[Change]]] = {
    # rule: the play that shows it, within how many seeds, and what is changed
    "A0 an unknown swap counts as none": ("late-expand", 5, [(Machine, "end", forgetful_end)]),
    "A0 an unknown handoff counts as none": ("late-handoff", 5, [(handoff, "swapped", forgetful_handoff)]),
    "A0 a record proves that a handoff did not happen": ("late-handoff", 5, [(handoff, "settle", trusting)]),
    "A1 alone without the shrink": ("storm", 1000, [(State, "peer_in_sync", property(lambda _: False))]),
    "A2 required only once it is known": (
        "late-expand",
        5,
        [(State, "peer_in_sync", property(lambda state: state.peer in state.in_sync))],
    ),
    "A3 who is no member takes over": ("storm", 1000, [(machines, "objection", keen_objection)]),
    "A4 a lost boot is no reason": ("storm", 1000, [(Machine, "boot_lost", never(False))]),
    "A5 frames of an older link count": ("storm", 1000, [(Mirror, "accepts", lambda *_: True)]),
    "A6 a write in flight is read": ("storm", 1000, [(Mirror, "readable", lambda *_: True)]),
    "A6 what is in flight is forgotten with its link": ("storm", 1000, [(Disk, "parted", lambda _: None)]),
    "A7 who lost its boot is sent only what is in flight": (
        "flap-then-death",
        100,
        [(Machine, "boot_lost", never(False)), (Mirror, "flap", lambda *_: True)],
    ),
    "A8 another one of that name takes over": ("blank-then-death", 5, [(machines, "objection", trustful_objection)]),
    "A10 validity is not looked at": ("parted", 5, [(Machine, "valid", lambda _: True)]),
    "A11 promises are not kept": ("parted", 5, [(Machine, "bound_until", never(0))]),
    "A11 any process's death ends the promise": ("late-reports", 20, [(Lives, "prove", credulous_proof)]),
    "A13 promises beside an attempt": (
        "late-takeover",
        5,
        [(Machine, "promises", lambda self, epoch: epoch >= self.state.epoch)],
    ),
    "A14 answers before the peer is primary": ("bad-disk", 100, [(Mirror, "held", lambda *_: False)]),
    "A14 who abdicates stays in the set": ("bad-disk", 100, [(abdication, "Swap", keeps_set)]),
    "A17 after a flap the standby may not take over": ("flap-then-death", 20, [(Mirror, "flap", lambda *_: False)]),
    "A19 a pause is not looked at": ("storm", 1000, [(machines, "objection", heedless_objection)]),
    "W9 facts that changed during the handshake do not count": ("storm", 1000, [(Mirror, "_facts", lambda _: ())]),
    "the role is answered for while it is given away": ("late-handoff", 5, [(roles, "mode_of", generous)]),
}


@pytest.mark.parametrize("rule", WEAKENED)
def test_it_bites_when_a_rule_is_weakened(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    name, within, changes = WEAKENED[rule]
    for owner, attribute, value in changes:
        monkeypatch.setattr(owner, attribute, value, raising=False)

    def many() -> None:
        for seed in range(within):
            PLAYS[name](random.Random(seed))

    with pytest.raises(BrokenError, match=r"^(I\d|A19):"):
        many()


@pytest.mark.parametrize("name", PLAYS)
def test_what_shows_a_weakened_rule_shows_nothing_else(name: str) -> None:
    """The very seeds, up to the tenth."""
    for seed in range(10):
        PLAYS[name](random.Random(seed))


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
