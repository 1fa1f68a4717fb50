"""A14: a primary whose disk fails gives its role away, decision by decision; the engine's part is in test_cover.py."""

from __future__ import annotations

from typing import Any

import pytest
from roleside import BOTH, S, kinds, primary, run

from mirrorpair import roles
from mirrorpair.abdication import cover_of
from mirrorpair.rolesteps import change
from mirrorpair.rolewords import (
    FAILED,
    WRONG_ROLE,
    Answer,
    Cover,
    DiskFailed,
    DiskWell,
    DropLink,
    Forgive,
    Handoff,
    HangUp,
    LinkLost,
    LinkUp,
    Mode,
    PeerDown,
    PeerLeft,
    Phase,
    Quiet,
    RecordChanged,
    ResumeClients,
    Stop,
    Swap,
    Swapped,
    Synced,
    Tick,
)
from mirrorpair.swaprules import Read, objection

BAD = DiskFailed("volume data: write of 4096 bytes at offset 0: Input/output error")
GIVEN = Swap("abdicate", 8, "beta", ("beta",), needs_peer=True, unasked=True)
ASKED, _ = run(primary(), BAD)
UNKNOWN, _ = run(ASKED, Swapped(GIVEN, False, "no answer", unknown=True, code=13))


def asks(actions: list[Any]) -> bool:
    return any(isinstance(action, Swap) and action.purpose == "abdicate" for action in actions)


def test_the_role_is_given_at_once_and_nothing_is_drained_or_flushed() -> None:
    asked, actions = run(primary(), BAD)
    assert actions == [GIVEN]
    assert (asked.role, roles.mode_of(asked), cover_of(asked)) == ("primary", Mode.NONE, Cover.READS | Cover.HOLD)
    gone, actions = run(asked, Swapped(GIVEN, True))
    assert kinds(actions) == [Forgive, HangUp, DropLink]
    assert (gone.role, gone.primary, gone.epoch, gone.in_sync) == ("secondary", "beta", 8, ("beta",))
    assert (roles.mode_of(gone), cover_of(gone)) == (Mode.NONE, Cover.NONE)


def test_what_this_node_might_forget_is_not_forgiven() -> None:
    gone, actions = run(ASKED, Swapped(GIVEN, True, lasting=False))
    assert kinds(actions) == [HangUp, DropLink]
    assert gone.role == "secondary"


@pytest.mark.parametrize(
    "state",
    [
        primary(equal=False),
        primary(in_sync=("alpha",)),
        primary(expanding="asked"),
        primary(expanding="unknown"),
        primary(peer_left=True),
        primary(paused=True),
        primary(stopping=True),
        primary(answering=True),
        primary(raising=True),
        primary(draining=True),
        primary(arbitrated=False),
        primary(phase=Phase.WAITING, linked=False, equal=False),
        primary(phase=Phase.ALONE, linked=False, equal=False, in_sync=("alpha",), alone_began=True),
        primary(phase=Phase.SECONDARY, primary="beta", peer_role="primary"),
    ],
)
def test_it_is_not_given_to_who_cannot_take_it(state: Any) -> None:
    after, actions = run(state, BAD)
    assert not asks(actions)
    assert after.ailing == BAD.why


def test_it_is_given_as_soon_as_somebody_can_take_it() -> None:
    after, actions = run(primary(phase=Phase.WAITING, linked=False, equal=False, deadline_ns=S), BAD, LinkUp())
    assert not asks(actions)
    assert asks(run(after, Synced())[1])
    alone = primary(phase=Phase.ALONE, linked=False, equal=False, in_sync=("alpha",), alone_began=True)
    after, actions = run(alone, BAD, LinkUp(), Synced())
    assert not asks(actions)
    assert asks(run(after, Swapped(Swap("expand", 7, "alpha", BOTH, needs_peer=True), True))[1])


def test_a_paused_pair_keeps_its_primary_until_it_is_resumed() -> None:
    """A19."""
    after, actions = run(primary(paused=True), BAD)
    assert not actions
    assert cover_of(after) is Cover.READS  # and a write's error is told: nothing is coming that would mend it
    assert asks(run(after, RecordChanged(7, "alpha", BOTH))[1])
    assert asks(run(primary(latched=True), BAD)[1])  # F16: as a dead primary is failed over


def test_a_handoff_under_way_goes_on_or_makes_room() -> None:
    pausing, _ = run(primary(), Handoff())
    _, actions = run(pausing, BAD)
    assert kinds(actions) == [Answer, ResumeClients, Swap]
    assert (actions[0].code, actions[2]) == (FAILED, GIVEN)
    asked, _ = run(pausing, Quiet())
    after, actions = run(asked, BAD, Swapped(Swap("handoff", 8, "beta", BOTH, needs_peer=True), True))
    assert after.role == "secondary"
    assert not asks(actions)


# --- what may go wrong


def test_after_a_refusal_it_asks_again_and_not_at_once() -> None:
    after, actions = run(ASKED, Swapped(GIVEN, False, "somebody else changes the register", code=WRONG_ROLE), now=S)
    assert not asks(actions)
    assert (after.handing, roles.mode_of(after), after.wake_ns) == ("no", Mode.PEER, S + S // 4)
    assert cover_of(after) == Cover.READS | Cover.HOLD
    assert not asks(run(after, Tick(), now=S + 1)[1])
    assert asks(run(after, Tick(), now=S + S // 4)[1])


def test_a_second_try_that_cannot_be_made_keeps_nobody_busy() -> None:
    after, _ = run(ASKED, Swapped(GIVEN, False, "busy", code=WRONG_ROLE), now=S)
    after, actions = run(change(after, answering=True), Tick(), now=9 * S)
    assert not asks(actions)
    assert after.wake_ns is None


def test_a0_after_an_unknown_one_nothing_is_answered_until_it_is_known() -> None:
    assert (roles.mode_of(UNKNOWN), UNKNOWN.handing) == (Mode.NONE, "unknown")
    asked, actions = run(UNKNOWN, Tick(), now=9 * S)
    hold = Swap("hold", 7, "alpha", None)
    assert actions == [hold]
    still, actions = run(asked, Swapped(Swap("hold", 7, "alpha", BOTH), True), now=9 * S)
    assert asks(actions)  # it has not landed and cannot any more; the disk is as bad as it was
    assert roles.mode_of(still) is Mode.NONE
    gone, actions = run(asked, RecordChanged(8, "beta", ("beta",)))
    assert gone.role == "secondary"
    assert HangUp in kinds(actions)


def test_while_it_is_asked_a_lost_peer_brings_nothing_back() -> None:
    for event in (LinkLost("gone"), PeerDown("gone"), PeerLeft()):
        after, actions = run(ASKED, event)
        assert roles.mode_of(after) is Mode.NONE
        # A peer that stops is to leave the set: at the old epoch, which loses against the swap on its way.
        assert [a for a in actions if isinstance(a, Swap)] in ([], [Swap("shrink", 7, "alpha", ("alpha",))])
        gone, _ = run(after, Swapped(GIVEN, True))
        assert (gone.role, roles.mode_of(gone)) == ("secondary", Mode.NONE)


def test_what_answers_again_keeps_its_role() -> None:
    after, _ = run(primary(equal=False), BAD, DiskWell())
    assert not asks(run(after, Synced())[1])


def test_a_node_that_stops_gives_nothing_away_for_its_disk() -> None:
    assert not asks(run(primary(), Stop(), BAD)[1])


# --- cover


@pytest.mark.parametrize(
    ("state", "cover"),
    [
        (primary(), Cover.READS | Cover.HOLD),
        (primary(arbitrated=False), Cover.READS),
        (primary(equal=False), Cover.NONE),
        (primary(phase=Phase.WAITING, linked=False, equal=False), Cover.HOLD),
        (primary(phase=Phase.SHRINKING, linked=False, equal=False), Cover.HOLD),
        (primary(in_sync=("alpha",)), Cover.NONE),
        (primary(expanding="unknown"), Cover.NONE),
        (primary(phase=Phase.ALONE, in_sync=("alpha",)), Cover.NONE),
        (primary(phase=Phase.SECONDARY), Cover.NONE),
    ],
)
def test_the_peer_covers_only_as_long_as_it_has_everything(state: Any, cover: Cover) -> None:
    assert cover_of(state) == cover


# --- what the swap looks at


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (Read(7, "alpha", BOTH), None),
        (Read(7, "alpha", BOTH, latched=True), None),
        (Read(7, "alpha", BOTH, pause=True), "paused"),
        (Read(7, "alpha", ("alpha",)), "not in sync any more"),
        (Read(8, "beta", BOTH), "beta is primary of epoch 8"),
        (Read(8, "beta", ("beta",), own=True), None),
    ],
)
def test_the_register_has_the_last_word(read: Read, reason: str | None) -> None:
    found = objection(GIVEN, "alpha", read)
    assert (found is None) if reason is None else (found is not None and reason in found)
