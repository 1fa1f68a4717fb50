"""A planned change of roles, decision by decision; test_arbitrated.py plays it with everything else."""

from __future__ import annotations

from typing import Any

import pytest
from roleside import BOTH, S, codes, kinds, primary, run

from mirrorpair import roles
from mirrorpair.foresee import foresee
from mirrorpair.handoff import obstacle
from mirrorpair.rolesteps import change
from mirrorpair.rolewords import (
    FAILED,
    REFUSED,
    WRONG_ROLE,
    Answer,
    Demote,
    Drain,
    DropLink,
    Event,
    Handoff,
    HangUp,
    LinkLost,
    LinkUp,
    Mode,
    PauseClients,
    PeerDown,
    PeerFloor,
    PeerLeft,
    PeerSaid,
    Phase,
    Promote,
    Quiet,
    RecordChanged,
    ResumeClients,
    State,
    Stop,
    Swap,
    Swapped,
    Synced,
    Tick,
)

DELAY = 60 * S
GIVEN = Swap("handoff", 8, "beta", BOTH, needs_peer=True)


PAUSING, _ = run(primary(), Handoff())
ASKED, _ = run(PAUSING, Quiet())
UNKNOWN, _ = run(ASKED, Swapped(GIVEN, False, "no answer", unknown=True, code=13))


# --- as it goes


def test_clients_are_paused_then_nothing_is_answered_then_the_register_says_who() -> None:
    assert kinds(run(primary(), Handoff())[1]) == [PauseClients]
    assert (PAUSING.handing, PAUSING.phase, roles.mode_of(PAUSING)) == ("pausing", Phase.PAIRED, Mode.PEER)
    asked, actions = run(PAUSING, Quiet())
    assert actions == [Swap("handoff", 8, "beta", None, needs_peer=True)]
    assert (asked.role, roles.mode_of(asked)) == ("primary", Mode.NONE)
    gone, actions = run(asked, Swapped(GIVEN, True))
    assert kinds(actions) == [Answer, DropLink]
    assert codes(actions) == [0]
    assert (gone.role, gone.primary, gone.epoch, gone.in_sync, gone.linked) == ("secondary", "beta", 8, BOTH, False)


@pytest.mark.parametrize(
    ("event", "now"),
    [(PeerSaid("primary", 9), 1), (PeerDown("gone", 5), 1), (Tick(), 2 * S)],
)
def test_paused_clients_are_hung_up_on_once_when_the_peer_serves_or_does_not_in_time(event: Event, now: int) -> None:
    gone, _ = run(ASKED, Swapped(GIVEN, True))
    waiting, actions = run(gone, PeerSaid("secondary", 8), now=1)
    assert not any(isinstance(action, HangUp) for action in actions)
    after, actions = run(waiting, event, now=now)
    assert kinds(actions).count(HangUp) == 1
    assert not any(isinstance(action, HangUp) for action in run(after, Tick(), PeerSaid("primary", 9), now=9 * S)[1])


def test_whose_peer_is_gone_when_it_gave_the_role_away_hangs_up_at_once() -> None:
    lost, _ = run(ASKED, PeerDown("gone", 5))
    assert HangUp in kinds(run(lost, Swapped(GIVEN, True))[1])


def named(peer_role: str) -> State:
    """beta, which the primary of epoch 7 mirrors to."""
    return primary(me="beta", peer="alpha", phase=Phase.SECONDARY, peer_role=peer_role, equal=False)


@pytest.mark.parametrize("peer_role", ["primary", "secondary"])
def test_who_is_named_takes_an_epoch_of_its_own_with_both_in_the_set(peer_role: str) -> None:
    """Whatever the peer's last heartbeat said: the record is newer."""
    after, actions = run(named(peer_role), RecordChanged(8, "beta", BOTH))
    assert after.phase is Phase.ACQUIRING
    assert [action for action in actions if isinstance(action, Swap)] == [Swap("readopt", 9, "beta", BOTH, True)]


def test_who_lost_its_boot_takes_no_handoff() -> None:
    after, actions = run(change(named("primary"), boot_lost=True), RecordChanged(8, "beta", BOTH))
    assert after.phase is Phase.SECONDARY
    assert not actions


# --- refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arbitrated": False}, "arbiter"),
        ({"in_sync": ("alpha",)}, "not in sync"),
        ({"expanding": "asked"}, "not in sync"),
        ({"equal": False}, "not in sync"),
        ({"expanding": "unknown"}, "not in sync"),
        ({"phase": Phase.WAITING, "linked": False}, "not linked"),
        ({"phase": Phase.ALONE, "linked": False}, "not linked"),
        ({"peer_up": False}, "not connected"),
        ({"peer_left": True}, "stopping"),
        ({"stopping": True}, "under way"),
        ({"draining": True}, "under way"),
        ({"answering": True}, "under way"),
        ({"raising": True}, "under way"),
        ({"handing": "asked"}, "under way"),
    ],
)
def test_it_is_refused_with_a_reason_and_nothing_is_paused(changes: dict[str, Any], reason: str) -> None:
    at = primary(**changes)
    after, actions = run(at, Handoff())
    assert codes(actions) == [REFUSED]
    assert reason in actions[0].message
    assert not any(isinstance(action, PauseClients) for action in actions)
    assert after.handing == at.handing
    assert foresee(at, Handoff(), 0) == actions[0]


def test_who_is_not_primary_has_nothing_to_hand_over() -> None:
    for phase in (Phase.SECONDARY, Phase.ACQUIRING):
        assert codes(run(primary(phase=phase), Handoff())[1]) == [WRONG_ROLE]


def test_a_dry_run_says_what_would_happen() -> None:
    told = foresee(primary(), Handoff(), 0)
    assert told.code == 0
    assert "beta would become primary" in told.message


def test_other_changes_of_roles_wait_for_it() -> None:
    for at in (PAUSING, ASKED, UNKNOWN):
        assert codes(run(at, Demote())[1]) == [FAILED]
        assert not run(at, PeerFloor(9))[1]
        again = Promote(accept_data_loss=True, force=False, obstacle=None, bound_until_ns=0)
        assert codes(run(at, again)[1]) == [FAILED]


# --- given up before the swap


@pytest.mark.parametrize(
    ("event", "now"),
    [
        (LinkLost("cut"), 0),
        (PeerDown("silent", 0), 0),
        (PeerLeft(), 0),
        (Quiet("no space"), 0),
        (Tick(), 10 * S),
        (Stop(), 0),
    ],
)
def test_what_fails_before_the_swap_resumes_the_clients_and_says_so(event: Event, now: int) -> None:
    after, actions = run(PAUSING, event, now=now)
    assert (after.handing, after.role) == ("no", "primary")
    assert kinds(actions).count(ResumeClients) == 1
    assert codes(actions) == [FAILED]
    assert not any(isinstance(action, Swap) and action.purpose == "handoff" for action in actions)
    assert roles.mode_of(after) is not Mode.NONE
    assert not any(isinstance(action, Swap) for action in run(after, Quiet())[1])  # of the pause that was given up


def test_it_is_not_given_up_early() -> None:
    after, actions = run(PAUSING, Tick(), now=10 * S - 1)
    assert after.handing == "pausing"
    assert not actions


# --- the swap's outcome


def test_a_swap_that_certainly_failed_resumes_the_clients() -> None:
    after, actions = run(ASKED, Swapped(GIVEN, False, "the witness is away", code=11))
    assert kinds(actions) == [Answer, ResumeClients]
    assert codes(actions) == [11]
    assert roles.mode_of(after) is Mode.PEER


def test_a0_after_an_unknown_swap_nothing_is_answered_until_a_later_one_is_ok() -> None:
    assert codes(run(ASKED, Swapped(GIVEN, False, "no answer", unknown=True, code=13))[1]) == [13]
    assert (UNKNOWN.handing, roles.mode_of(UNKNOWN)) == ("unknown", Mode.NONE)
    # A record that still names this node may be older than the swap that is on its way.
    at, actions = run(UNKNOWN, RecordChanged(7, "alpha", BOTH), LinkLost("cut"), LinkUp())
    assert roles.mode_of(at) is Mode.NONE
    assert not any(isinstance(action, ResumeClients) for action in actions)
    asks, actions = run(at, Tick(), now=at.deadline_ns or 0)
    assert actions == [Swap("hold", 7, "alpha", None)]
    hold = Swap("hold", 7, "alpha", BOTH)
    again, actions = run(asks, Swapped(hold, False, "no answer", unknown=True))
    assert (roles.mode_of(again), actions) == (Mode.NONE, [])
    assert run(again, Tick(), now=again.deadline_ns or 0)[1] == [Swap("hold", 7, "alpha", None)]
    after, actions = run(asks, Swapped(hold, True))
    assert kinds(actions) == [ResumeClients]
    assert roles.mode_of(after) is Mode.PEER


def test_a0_an_unknown_swap_that_landed_after_all_ends_the_role() -> None:
    for record in (RecordChanged(8, "beta", BOTH), RecordChanged(9, "beta", ("beta",))):
        after, actions = run(UNKNOWN, record)
        assert (after.role, after.handing, after.primary) == ("secondary", "no", "beta")
        assert HangUp in kinds(actions)


def test_a_shrink_after_an_unknown_handoff_settles_it_too() -> None:
    """The peer is gone and the swap may have named it; one of the two is what the register says."""
    lost, _ = run(UNKNOWN, PeerDown("gone", 0))
    assert lost.phase is Phase.WAITING
    shrinking, actions = run(lost, Tick(), now=5 * S)
    assert [action.purpose for action in actions if isinstance(action, Swap)] == ["shrink"]
    assert roles.mode_of(shrinking) is Mode.NONE
    alone, actions = run(shrinking, Swapped(Swap("shrink", 7, "alpha", ("alpha",)), True))
    assert (alone.phase, alone.handing, ResumeClients in kinds(actions)) == (Phase.ALONE, "no", True)


def test_a_node_that_stops_while_the_role_is_away_waits_for_no_client() -> None:
    assert kinds(run(ASKED, Stop())[1]) == [HangUp, Drain]


# --- by itself


def test_the_preferred_peer_gets_the_role_back_when_it_was_in_sync_for_so_long() -> None:
    at = primary(failback_ns=DELAY)
    assert at.wake_ns == DELAY
    assert not run(at, Tick(), now=DELAY - 1)[1]
    begun, actions = run(at, Tick(), now=DELAY)
    assert kinds(actions) == [PauseClients]
    (swap,) = run(begun, Quiet())[1]
    assert (swap.purpose, swap.primary, swap.unasked) == ("handoff", "beta", True)


def test_nobody_prefers_it() -> None:
    assert primary().wake_ns is None
    assert not run(primary(), Tick(), now=10 * DELAY)[1]


@pytest.mark.parametrize("changes", [{"paused": True}, {"latched": True}])
def test_a19_f16_not_while_paused_or_latched(changes: dict[str, Any]) -> None:
    at, actions = run(primary(failback_ns=DELAY, **changes), Tick(), now=DELAY)
    assert not actions
    assert at.wake_ns == 2 * DELAY
    free, _ = run(at, RecordChanged(7, "alpha", BOTH), now=DELAY + 1)
    assert kinds(run(free, Tick(), now=2 * DELAY)[1]) == [PauseClients]


@pytest.mark.parametrize("event", [LinkLost("cut"), PeerDown("gone", 5)])
def test_a_flap_begins_the_delay_anew(event: Event) -> None:
    at, _ = run(primary(failback_ns=DELAY), event, LinkUp(), now=DELAY - 1)
    assert (at.phase, at.failback_at_ns) == (Phase.PAIRED, None)
    at, _ = run(at, Synced(), now=DELAY - 1)
    assert at.failback_at_ns == 2 * DELAY - 1


def test_a_failback_that_failed_is_tried_again_after_the_delay() -> None:
    begun, _ = run(primary(failback_ns=DELAY), Tick(), now=DELAY)
    failed, _ = run(begun, Quiet("no space"), now=DELAY + 5)
    assert failed.failback_at_ns == 2 * DELAY + 5


def test_obstacle_is_none_only_where_the_role_can_be_given() -> None:
    assert obstacle(primary()) is None
