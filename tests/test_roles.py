"""The role decisions, rule by rule, and two state machines joined by a fake wire, a fake disk and a seed."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from roleside import run

from mirrorpair import roles, rolewords
from mirrorpair.rolewords import (
    PRIMARY,
    Answer,
    CaughtUp,
    Demote,
    Drain,
    Drained,
    DropLink,
    Event,
    GenerationBegan,
    Handoff,
    HangUp,
    LinkLost,
    LinkUp,
    Mode,
    PeerDied,
    PeerDown,
    PeerFloor,
    PeerLeft,
    PeerSaid,
    PeerUp,
    Phase,
    Promote,
    Quiet,
    RecordChanged,
    Started,
    State,
    Stop,
    Swap,
    Swapped,
    Synced,
    Tick,
)

S = 10**9
SUSPECT = S
WAIT = 3030 * 10**6
BOTH = ("alpha", "beta")


def state(**changes: Any) -> State:
    plain = State(me="alpha", peer="beta", survivor="primary", suspect_ns=SUSPECT, retry_ns=S // 4)
    return msgspec.structs.replace(plain, **changes)


def primary(phase: Phase = Phase.PAIRED, **changes: Any) -> State:
    plain: dict[str, Any] = {
        "phase": phase,
        "epoch": 7,
        "primary": "alpha",
        "in_sync": BOTH,
        "peer_up": True,
        "peer_role": "secondary",
        "peer_epoch": 7,
        "linked": phase is Phase.PAIRED,
        "last_heard_ns": 0,
    }
    return state(**{**plain, **changes})


def started(**changes: Any) -> Started:
    plain: dict[str, Any] = {
        "epoch": 7,
        "primary": "alpha",
        "in_sync": BOTH,
        "was_primary": True,
        "clean": False,
        "boot_lost": False,
        "wait_ns": WAIT,
    }
    return Started(**{**plain, **changes})


def promote(**changes: Any) -> Promote:
    plain: dict[str, Any] = {"accept_data_loss": False, "force": False, "obstacle": None, "bound_until_ns": 0}
    return Promote(**{**plain, **changes})


def swap_of(actions: list[Any]) -> Swap:
    (swap,) = [action for action in actions if isinstance(action, Swap)]
    return swap


def answer_of(actions: list[Any]) -> Answer:
    (answer,) = [action for action in actions if isinstance(action, Answer)]
    return answer


# --- the table


def test_every_handler_of_the_table_is_for_an_event_and_every_event_is_in_it() -> None:
    kinds = set(Event.__args__)
    assert {kind for _, kind in roles.TABLE} == kinds
    assert len({(phase, kind) for phase, kind in roles.TABLE}) == len(roles.TABLE)


EVENTS: list[Event] = [
    PeerUp("secondary", 9),
    PeerSaid("primary", 9),
    PeerFloor(9),
    PeerDown("gone", 5),
    PeerDied("dead", True, 5),
    PeerDied("dead", False, 5),
    PeerLeft(),
    LinkUp(),
    LinkLost("cut"),
    Synced(),
    CaughtUp(),
    RecordChanged(8, "beta", ("beta",)),
    RecordChanged(7, "alpha", BOTH),
    Swapped(Swap("expand", 7, "alpha", BOTH), True),
    Swapped(Swap("expand", 7, "alpha", BOTH), False, "no", unknown=True),
    Swapped(Swap("shrink", 7, "alpha", ("alpha",)), False, "no"),
    promote(),
    promote(accept_data_loss=True, force=True),
    Demote(),
    Handoff(),
    Quiet(),
    Quiet("no space"),
    Swapped(Swap("handoff", 8, "beta", BOTH), True),
    Swapped(Swap("handoff", 8, "beta", BOTH), False, "no", unknown=True),
    Drained(),
    GenerationBegan(),
    Stop(),
    Tick(),
]


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_any_event_in_any_phase_has_a_sentence_and_keeps_the_rules(phase: Phase, event: Event) -> None:
    for in_sync in (BOTH, ("alpha",)):
        if phase is Phase.ALONE and in_sync == BOTH:
            continue  # no way leads there
        before = primary(phase, in_sync=in_sync, deadline_ns=3)
        after, actions = run(before, event, now=10)
        # A1: alone only when the peer is not in the set.
        if after.phase is Phase.ALONE:
            assert not after.peer_in_sync
        # A4: nobody becomes primary without a swap of a new epoch.
        if before.role == "secondary":
            assert after.role == "secondary"
            for action in actions:
                if isinstance(action, Swap) and action.primary == "alpha" and action.purpose != "expand":
                    assert action.epoch > before.epoch
        for action in actions:
            if isinstance(action, Swap) and action.primary is not None:
                assert action.primary in action.in_sync


# --- A11: a proof of death


def standby(**changes: Any) -> State:
    """Of an arbitrated pair whose primary was just lost; it is bound by its promise until 60 s."""
    plain: dict[str, Any] = {
        "arbitrated": True,
        "epoch": 7,
        "primary": "beta",
        "in_sync": BOTH,
        "bound_until_ns": 60 * S,
        "deadline_ns": 60 * S,
    }
    return state(**{**plain, **changes})


def test_a11_a_proof_that_ends_the_promise_leads_to_a_takeover_at_once() -> None:
    after, actions = run(standby(), PeerDied("beta is dead", True, 3 * S), now=4 * S)
    assert after.phase is Phase.ACQUIRING
    assert (swap_of(actions).purpose, swap_of(actions).epoch) == ("takeover", 8)


def test_a11_a_proof_that_leaves_the_promise_leads_to_none_before_its_end() -> None:
    """A process died that this node met, but its word was given to another one."""
    after, actions = run(standby(), PeerDied("beta is dead", True, 60 * S), now=4 * S)
    assert (after.phase, after.deadline_ns, actions) == (Phase.SECONDARY, 60 * S, [])


def test_a11_the_end_of_an_earlier_process_takes_nothing_from_the_one_that_is_there() -> None:
    there = standby(peer_up=True, peer_role="primary", peer_epoch=7, deadline_ns=None)
    after, actions = run(there, PeerDied("an earlier one", False, 3 * S), Tick(), now=4 * S)
    assert (after.phase, after.deadline_ns, actions) == (Phase.SECONDARY, None, [])
    alone = primary(Phase.WAITING, arbitrated=True, peer_up=True, deadline_ns=9 * S)
    after, actions = run(alone, PeerDied("an earlier one", False, 0), now=4 * S)
    assert (after.phase, after.deadline_ns, actions) == (Phase.WAITING, 9 * S, [])


@pytest.mark.parametrize("event", [PeerDied("beta is dead", True, 0), PeerDied("an earlier one", False, 0)])
def test_a11_whoever_of_it_died_a_standby_that_has_it_connected_takes_nothing_over(event: PeerDied) -> None:
    there = standby(peer_up=True, peer_role="primary", peer_epoch=7, deadline_ns=None)
    assert run(there, event, now=4 * S)[1] == []


@pytest.mark.parametrize(
    "changes", [{"stopping": True}, {"boot_lost": True}, {"primary": None}, {"peer_up": True, "peer_role": "primary"}]
)
def test_a11_a_proof_is_no_reason_for_who_may_not_take_over(changes: dict[str, Any]) -> None:
    after, actions = run(standby(**changes), PeerDied("beta is dead", True, 0), now=4 * S)
    assert (after.phase, actions) == (Phase.SECONDARY, [])


def test_a11_a_dead_standby_is_not_waited_for_but_taken_out_of_the_set() -> None:
    after, actions = run(
        primary(arbitrated=True), PeerDown("closed", 0), PeerDied("beta is dead", True, 0), now=S // 100
    )
    assert after.phase is Phase.SHRINKING
    assert swap_of(actions) == Swap("shrink", 7, "alpha", ("alpha",))
    again, more = run(after, PeerDied("beta is dead", True, 0), now=S // 100)
    assert (again, more) == (after, [])


def test_a11_an_acquisition_that_is_under_way_is_not_asked_for_twice() -> None:
    acquiring, _ = run(standby(), PeerDied("beta is dead", True, 0), now=S)
    assert run(acquiring, PeerDied("beta is dead", True, 0), now=S)[1] == []


# --- the grant


@pytest.mark.parametrize(
    ("phase", "mode"),
    [
        (Phase.SECONDARY, Mode.NONE),
        (Phase.RETURNING, Mode.NONE),
        (Phase.ACQUIRING, Mode.NONE),
        (Phase.PAIRED, Mode.PEER),
        (Phase.WAITING, Mode.PEER),
        (Phase.SHRINKING, Mode.PEER),
        (Phase.FROZEN, Mode.PEER),
        (Phase.ALONE, Mode.ALONE_FIRST),
    ],
)
def test_the_grant_follows_from_the_phase(phase: Phase, mode: Mode) -> None:
    assert roles.mode_of(state(phase=phase)) is mode


def test_g2_alone_without_waiting_only_after_the_generation_is_durable() -> None:
    alone, _ = run(primary(Phase.ALONE, in_sync=("alpha",), linked=False), GenerationBegan())
    assert roles.mode_of(alone) is Mode.ALONE
    linked, _ = run(alone, LinkUp())
    assert roles.mode_of(linked) is Mode.PEER
    again, _ = run(linked, LinkLost("cut"))
    assert roles.mode_of(again) is Mode.ALONE_FIRST


def test_a10_the_grant_ends_with_the_promise_only_where_the_peer_could_take_over() -> None:
    assert not roles.bounded(primary())
    assert roles.bounded(primary(survivor="secondary"))
    assert not roles.bounded(primary(Phase.ALONE, survivor="secondary", in_sync=("alpha",)))


# --- the link


def test_a17_a_flap_before_the_deadline_changes_nothing() -> None:
    before = primary()
    waiting, actions = run(before, LinkLost("cut"), now=5)
    assert (waiting.phase, waiting.deadline_ns, actions) == (Phase.WAITING, 5 + SUSPECT, [])
    back, actions = run(waiting, Tick(), LinkUp(), now=5 + SUSPECT - 1)
    assert (back.phase, back.in_sync, back.epoch, actions) == (Phase.PAIRED, BOTH, 7, [])


def test_the_deadline_counts_from_the_last_word_of_a_peer_that_is_silent() -> None:
    waiting, actions = run(primary(), PeerDown("silent", last_heard_ns=100), now=50 + SUSPECT)
    assert waiting.deadline_ns == 100 + SUSPECT
    assert isinstance(actions[0], DropLink)


def test_the_deadline_of_a_silent_link_counts_from_its_last_word_though_the_peer_is_heard_over_another_path() -> None:
    """Neither the loss nor the silence of one path makes anybody take over; the primary's writes wait no longer."""
    waiting, actions = run(primary(), LinkLost("silent", last_heard_ns=100), now=50 + SUSPECT)
    assert (waiting.phase, waiting.deadline_ns, waiting.peer_up, actions) == (Phase.WAITING, 100 + SUSPECT, True, [])
    standby = state(arbitrated=True, epoch=7, primary="beta", in_sync=BOTH, peer_up=True, peer_role="primary")
    kept, actions = run(standby, LinkLost("silent", last_heard_ns=100), Tick(), now=90 * SUSPECT)
    assert (kept.phase, kept.wake_ns, actions) == (Phase.SECONDARY, None, [])


def test_a1_alone_only_after_the_shrink_is_ok() -> None:
    late = 5 + SUSPECT
    shrinking, actions = run(primary(), LinkLost("cut"), now=5)
    shrinking, actions = run(shrinking, Tick(), now=late)
    swap = swap_of(actions)
    assert (shrinking.phase, swap.purpose, swap.epoch, swap.in_sync) == (Phase.SHRINKING, "shrink", 7, ("alpha",))
    assert roles.mode_of(shrinking) is Mode.PEER
    for failed in (Swapped(swap, False, "conflict"), Swapped(swap, False, "silent", unknown=True)):
        again, _ = run(shrinking, failed, now=late)
        assert (again.phase, again.deadline_ns) == (Phase.WAITING, late + S // 4)
    alone, _ = run(shrinking, Swapped(swap, True), now=late)
    assert (alone.phase, alone.in_sync) == (Phase.ALONE, ("alpha",))


@pytest.mark.parametrize("late", ["primary", "secondary"])
def test_a18_a_beat_behind_the_farewell_changes_nothing(late: rolewords.RoleName) -> None:
    """Or a `promote` right after a graceful stop of the primary would be refused: it may be serving in silence."""
    secondary = primary(Phase.SECONDARY, primary="beta", peer_role="primary")
    left, _ = run(secondary, PeerLeft(), PeerSaid(late, 7), PeerDown("it hung up", 0))
    assert left.peer_left
    _, actions = run(left, promote())
    assert swap_of(actions).purpose == "promote"
    back, _ = run(left, PeerUp("secondary", 7))
    assert not back.peer_left


def test_a_peer_that_is_not_in_sync_is_not_waited_for() -> None:
    alone, actions = run(primary(in_sync=("alpha",)), LinkLost("cut"))
    assert (alone.phase, actions) == (Phase.ALONE, [])


def test_a18_a_peer_that_leaves_is_taken_out_at_once() -> None:
    shrinking, actions = run(primary(), PeerLeft())
    assert shrinking.phase is Phase.SHRINKING
    assert swap_of(actions).purpose == "shrink"


def test_a_link_that_is_back_during_the_shrink_waits_for_its_outcome() -> None:
    shrinking = primary(Phase.SHRINKING, linked=False)
    linked, _ = run(shrinking, LinkUp(), Synced())
    assert linked.phase is Phase.SHRINKING
    swap = Swap("shrink", 7, "alpha", ("alpha",))
    paired, actions = run(linked, Swapped(swap, True))
    assert (paired.phase, swap_of(actions).purpose) == (Phase.PAIRED, "expand")
    stays, actions = run(linked, Swapped(swap, False, "conflict"))
    assert (stays.phase, stays.in_sync, actions) == (Phase.PAIRED, BOTH, [])


def test_a2_a_joining_peer_is_required_from_before_the_swap() -> None:
    joining, actions = run(primary(in_sync=("alpha",)), Synced())
    swap = swap_of(actions)
    assert (swap.purpose, swap.in_sync) == ("expand", BOTH)
    unknown, _ = run(joining, Swapped(swap, False, "silent", unknown=True))
    for required in (joining, unknown):
        waiting, _ = run(required, LinkLost("cut"))
        assert waiting.phase is Phase.WAITING
        _, actions = run(waiting, Tick(), now=2 * SUSPECT)
        assert swap_of(actions).purpose == "shrink"
    known, _ = run(joining, Swapped(swap, False, "conflict"))
    assert not known.peer_in_sync
    _, actions = run(known, Tick(), now=S)  # tried again
    assert swap_of(actions).purpose == "expand"


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_a_primary_of_record_that_asked_for_an_expand_takes_its_role_back_whatever_became_of_that(
    ok: bool, linked: bool
) -> None:
    """Also when the link was lost meanwhile: else nobody would serve, as the peer is not in the set."""
    named = state(arbitrated=True, epoch=7, primary="alpha", in_sync=("alpha",), peer_up=True, peer_role="secondary")
    asked, actions = run(named, LinkUp(), Synced(), now=S)
    lost = () if linked else (LinkLost("cut"),)
    after, _ = run(asked, *lost, Swapped(swap_of(actions), ok, "" if ok else "no answer", unknown=not ok), now=2 * S)
    assert after.deadline_ns is not None
    _, actions = run(after, Tick(), now=after.deadline_ns)
    assert swap_of(actions).purpose == "readopt"


def test_a1_the_set_of_a_primary_is_widened_by_nobody_else() -> None:
    """The link's source takes its peer in, without a primary; the peer has become primary since (seed 51834)."""
    source = state(epoch=1, in_sync=("beta",), peer_up=True, peer_role="secondary", linked=True, equal=True)
    _, actions = run(source, Synced())
    assert swap_of(actions).purpose == "expand"
    for event in (RecordChanged(2, "beta", ("beta",)), RecordChanged(1, "beta", ("beta",)), PeerSaid("primary", 1)):
        after, actions = run(source, event, Synced())
        assert actions == []
        _, actions = run(msgspec.structs.replace(after, deadline_ns=1), Tick(), now=1)
        assert actions == []


def test_the_outcome_of_an_earlier_expand_is_not_taken_for_that_of_a_promotion() -> None:
    acquiring, actions = run(state(peer_up=True, peer_role="secondary", linked=True), Synced(), promote())
    expand = next(action for action in actions if isinstance(action, Swap) and action.purpose == "expand")
    after, actions = run(acquiring, Swapped(expand, True))
    assert (after.phase, after.role, actions) == (Phase.ACQUIRING, "secondary", [])


def test_survivor_secondary_freezes_instead_of_going_on() -> None:
    frozen, actions = run(primary(survivor="secondary"), LinkLost("cut"), Tick(), now=0)
    frozen, actions = run(frozen, Tick(), now=SUSPECT)
    assert (frozen.phase, actions) == (Phase.FROZEN, [])
    assert roles.bounded(frozen)
    back, _ = run(frozen, LinkUp())
    assert back.phase is Phase.PAIRED
    gone, actions = run(primary(survivor="secondary"), PeerLeft())
    assert (gone.phase, swap_of(actions).purpose) == (Phase.SHRINKING, "shrink")
    _, actions = run(frozen, promote())
    assert answer_of(actions).code == 12
    forced, actions = run(frozen, promote(accept_data_loss=True))
    assert swap_of(actions).purpose == "shrink"
    _, actions = run(forced, Swapped(swap_of(actions), True))
    assert answer_of(actions).code == 0


# --- promotion


# --- the first primary (A15)


def unborn(**changes: Any) -> State:
    """alpha, preferred; nobody was ever primary."""
    plain: dict[str, Any] = {"arbitrated": True, "preferred": True, "deadline_ns": 0}
    return state(**{**plain, **changes})


MEETING: list[Event] = [PeerUp("secondary", 0), LinkUp(source=True)]
EXPANDED = Swapped(Swap("expand", 0, None, BOTH, needs_peer=True), True)


def test_a15_the_preferred_of_two_new_nodes_takes_the_first_epoch_once_both_are_in_the_set() -> None:
    met, actions = run(unborn(), *MEETING, CaughtUp(), Synced())
    assert swap_of(actions).purpose == "expand"
    begun, actions = run(met, Tick(), now=5 * S)
    assert (begun.phase, actions) == (Phase.SECONDARY, [])  # the peer enters the set first
    begun, actions = run(met, EXPANDED, now=5 * S)
    assert swap_of(actions) == Swap("bootstrap", 1, "alpha", BOTH, needs_peer=True)
    first, _ = run(begun, Swapped(swap_of(actions), True))
    assert (first.role, first.epoch, first.in_sync) == ("primary", 1, BOTH)


def test_a15_also_at_the_other_end_of_the_link_which_reads_that_both_are_in_sync() -> None:
    met, actions = run(unborn(), PeerUp("secondary", 0), LinkUp(source=False), CaughtUp(), RecordChanged(0, None, BOTH))
    assert swap_of(actions) == Swap("bootstrap", 1, "alpha", BOTH, needs_peer=True)
    assert met.phase is Phase.ACQUIRING


def test_a15_who_alone_holds_data_does_not_wait_until_they_are_copied() -> None:
    met, _ = run(unborn(), *MEETING)
    begun, actions = run(met, Tick(), now=5 * S)
    assert swap_of(actions) == Swap("bootstrap", 1, "alpha", ("alpha",), needs_peer=True)
    first, actions = run(begun, Swapped(swap_of(actions), True))
    assert (first.role, first.in_sync) == ("primary", ("alpha",))


def test_a15_who_lacks_the_peers_data_waits_until_it_has_them() -> None:
    met, actions = run(unborn(), PeerUp("secondary", 0), LinkUp(source=False), Tick(), now=5 * S)
    assert actions == []
    assert met.deadline_ns is not None  # it looks again
    _, actions = run(met, CaughtUp(), RecordChanged(0, None, BOTH), now=9 * S)
    assert swap_of(actions).purpose == "bootstrap"


@pytest.mark.parametrize(
    "changes",
    [
        {"preferred": False},
        {"arbitrated": False},
        {"epoch": 3},
        {"paused": True},
        {"boot_lost": True},
        {"stopping": True},
        {"linked": False},
        {"whole": False},
        {"peer_up": False},
        {"peer_epoch": 7},
        {"peer_role": "primary"},
        {"expanding": "unknown"},
        {"primary": "beta"},
    ],
)
def test_a15_otherwise_nobody_is_primary_before_a_person_says_so(changes: dict[str, Any]) -> None:
    """F17 among them: where either has recorded an epoch an empty register is one that was lost."""
    plain: dict[str, Any] = {"peer_up": True, "peer_role": "secondary", "linked": True, "whole": True, "in_sync": BOTH}
    _, actions = run(unborn(**plain), Tick(), now=5 * S)
    assert swap_of(actions).purpose == "bootstrap"
    for event in (Tick(), RecordChanged(changes.get("epoch", 0), changes.get("primary"), BOTH, "paused" in changes)):
        _, actions = run(unborn(**{**plain, **changes}), event, now=5 * S)
        assert not any(isinstance(action, Swap) and action.purpose == "bootstrap" for action in actions)


def test_a15_a_first_epoch_that_nobody_could_be_asked_for_is_asked_for_again_later() -> None:
    met, _ = run(unborn(), *MEETING)
    begun, actions = run(met, Tick(), now=5 * S)
    failed = Swapped(swap_of(actions), False, "the witness cannot be reached")
    waiting, actions = run(begun, failed, now=6 * S)
    assert actions == []
    assert waiting.wake_ns == 6 * S + SUSPECT
    _, actions = run(waiting, Tick(), now=6 * S + SUSPECT)
    assert swap_of(actions).purpose == "bootstrap"


def test_f17_a_blank_node_before_an_empty_register_is_not_promoted_beside_one_that_remembers_an_epoch() -> None:
    for peer_up in (True, False):
        blank = state(arbitrated=True, peer_up=peer_up, peer_role="secondary" if peer_up else None, peer_epoch=7)
        _, actions = run(blank, promote())
        assert answer_of(actions).code == 12
        assert "beta has recorded epoch 7, alpha only 0" in answer_of(actions).message
        _, actions = run(blank, promote(accept_data_loss=True))
        assert (swap_of(actions).epoch, swap_of(actions).overrides) == (8, True)
    _, actions = run(state(arbitrated=True, peer_up=True, peer_role="secondary", peer_epoch=7, epoch=7), promote())
    assert swap_of(actions).epoch == 8


def test_a3_a_member_is_promoted_and_the_epoch_rises() -> None:
    before = state(epoch=7, in_sync=BOTH, peer_up=True, peer_role="secondary", peer_epoch=9, linked=True)
    acquiring, actions = run(before, promote())
    swap = swap_of(actions)
    assert (swap.epoch, swap.primary, swap.in_sync) == (10, "alpha", BOTH)
    assert roles.mode_of(acquiring) is Mode.NONE
    after, actions = run(acquiring, Swapped(swap, True))
    assert (after.phase, after.epoch) == (Phase.WAITING, 10)
    assert answer_of(actions).code == 0
    assert any(isinstance(action, DropLink) for action in actions)


@pytest.mark.parametrize(
    ("before", "asked", "text"),
    [
        ({}, {}, "silent"),
        ({"in_sync": ("beta",), "peer_up": True, "peer_role": "secondary"}, {}, "not in sync"),
        ({"peer_up": True, "peer_role": "secondary", "boot_lost": True}, {}, "lost its boot"),
        ({"peer_up": True, "peer_role": "secondary"}, {"obstacle": "volume data is inconsistent"}, "inconsistent"),
        ({}, {"obstacle": "volume data is failed", "accept_data_loss": True, "force": True}, "failed"),
    ],
)
def test_a3_who_could_lose_data_is_refused(before: dict[str, Any], asked: dict[str, Any], text: str) -> None:
    after, actions = run(state(**{"in_sync": BOTH, **before}), promote(**asked))
    answer = answer_of(actions)
    assert (after.phase, answer.code, answer.retry_at_ns) == (Phase.SECONDARY, 12, None)
    assert text in answer.message


@pytest.mark.parametrize(
    ("before", "code", "text"),
    [
        ({"peer_role": "primary", "peer_epoch": 9}, 15, "beta is primary of epoch 9: `mirrorpair demote` there first"),
        ({"stopping": True, "peer_role": "secondary"}, 1, "stopping"),
        ({"phase": Phase.ACQUIRING, "peer_role": "secondary"}, 1, "under way"),
    ],
)
@pytest.mark.parametrize("accepted", [False, True])
def test_what_the_roles_forbid_no_word_of_a_person_allows(
    before: dict[str, Any], code: int, text: str, accepted: bool
) -> None:
    began = state(**{"in_sync": BOTH, "peer_up": True, **before})
    after, actions = run(began, promote(accept_data_loss=accepted, force=accepted))
    assert (after, answer_of(actions).code) == (began, code)
    assert text in answer_of(actions).message


def test_a11_a_silent_peer_is_replaced_only_after_our_own_promise() -> None:
    asked = promote(accept_data_loss=True, bound_until_ns=100)
    _, actions = run(state(in_sync=BOTH), asked, now=99)
    assert (answer_of(actions).code, answer_of(actions).retry_at_ns) == (12, 100)
    for now, force in ((100, False), (99, True)):
        _, actions = run(state(in_sync=BOTH), msgspec.structs.replace(asked, force=force), now=now)
        assert swap_of(actions).in_sync == ("alpha",)


def test_what_a_person_may_do_without_loss_needs_no_word_about_it() -> None:
    for safe in ({"in_sync": ("alpha",)}, {"in_sync": BOTH, "peer_left": True}):
        _, actions = run(state(**safe), promote(bound_until_ns=10**18))
        assert swap_of(actions).purpose == "promote"


def test_a_promotion_without_a_peer_serves_alone() -> None:
    acquiring, actions = run(state(in_sync=("alpha",)), promote())
    after, actions = run(acquiring, Swapped(swap_of(actions), True))
    assert after.phase is Phase.ALONE
    assert answer_of(actions).code == 0


def test_a_promotion_that_met_another_is_refused() -> None:
    acquiring, actions = run(state(in_sync=BOTH, peer_up=True, peer_role="secondary"), promote())
    swap = swap_of(actions)
    after, actions = run(acquiring, Swapped(swap, False, "beta is becoming primary itself"))
    assert (after.phase, answer_of(actions).code) == (Phase.SECONDARY, 15)
    silent = Swapped(swap, False, "beta did not answer", unknown=True, code=13)
    after, actions = run(acquiring, silent)
    assert (after.phase, answer_of(actions).code) == (Phase.SECONDARY, 13)
    lost, actions = run(acquiring, RecordChanged(8, "beta", ("beta",)))
    assert lost.phase is Phase.ACQUIRING  # the swap's own outcome is still to come


# --- start


def test_a4_a_crashed_primary_takes_its_role_back_without_the_peer_in_the_set() -> None:
    returning, _ = run(state(), started())
    assert (returning.phase, returning.deadline_ns) == (Phase.RETURNING, WAIT)
    for event, now in ((PeerUp("secondary", 7), 1), (Tick(), WAIT)):
        _, actions = run(returning, event, now=now)
        swap = swap_of(actions)
        assert (swap.purpose, swap.epoch, swap.in_sync) == ("readopt", 8, ("alpha",))


def test_a4_who_lost_its_boot_does_not_take_the_role_from_another_member() -> None:
    after, _ = run(state(), started(boot_lost=True))
    assert (after.phase, after.deadline_ns, after.boot_lost) == (Phase.SECONDARY, None, True)
    sole, _ = run(state(), started(boot_lost=True, in_sync=("alpha",)))
    assert sole.phase is Phase.RETURNING
    _, actions = run(sole, Tick(), now=WAIT)
    assert swap_of(actions).purpose == "readopt"


def test_a18_who_stopped_cleanly_before_its_peer_waits_for_it() -> None:
    returning, _ = run(state(), started(clean=True))
    alone, actions = run(returning, Tick(), now=WAIT)
    assert (alone.phase, actions) == (Phase.SECONDARY, [])
    _, actions = run(returning, PeerUp("secondary", 7), now=1)
    assert swap_of(actions).in_sync == BOTH


def test_a_replaced_primary_does_not_take_its_role_back() -> None:
    returning, _ = run(state(), started())
    replaced, actions = run(returning, RecordChanged(8, "beta", ("beta",)))
    assert (replaced.phase, actions) == (Phase.SECONDARY, [])
    seen, actions = run(returning, PeerUp("primary", 8))
    assert (seen.phase, actions) == (Phase.SECONDARY, [])


def test_broken_disks_and_survivor_secondary_keep_it_from_returning_alone() -> None:
    broken, _ = run(state(), started(obstacle="volume data is failed"))
    assert broken.phase is Phase.SECONDARY
    waiting, _ = run(state(survivor="secondary"), started())
    waiting, actions = run(waiting, Tick(), now=WAIT)
    assert (waiting.phase, waiting.deadline_ns, actions) == (Phase.RETURNING, None, [])


# --- giving up


def test_a_demotion_drains_before_the_role_is_given_up() -> None:
    draining, actions = run(primary(), Demote())
    assert actions == [Drain()]
    assert roles.mode_of(draining) is Mode.PEER
    releasing, actions = run(draining, Drained())
    swap = swap_of(actions)
    assert (swap.purpose, swap.epoch, swap.primary, swap.in_sync) == ("release", 7, None, None)
    swap = msgspec.structs.replace(swap, in_sync=BOTH)
    assert roles.mode_of(releasing) is Mode.PEER
    after, actions = run(releasing, Swapped(swap, True))
    assert (after.phase, answer_of(actions).code) == (Phase.SECONDARY, 0)
    left, actions = run(releasing, Swapped(swap, False, "silent", unknown=True))
    assert (left.phase, left.draining, answer_of(actions).code) == (Phase.SECONDARY, False, 0)
    stays, actions = run(releasing, Swapped(swap, False, "conflict"))
    assert (stays.phase, stays.draining, answer_of(actions).code) == (Phase.PAIRED, False, 1)


def test_a_lost_link_while_draining_still_leads_to_an_end() -> None:
    draining, _ = run(primary(), Demote(), LinkLost("cut"))
    shrinking, actions = run(draining, Tick(), now=SUSPECT)
    alone, _ = run(shrinking, Swapped(swap_of(actions), True))
    assert alone.phase is Phase.ALONE
    _, actions = run(alone, Drained())
    assert swap_of(actions).purpose == "release"


@pytest.mark.parametrize("phase", sorted(PRIMARY, key=lambda phase: phase.value))
def test_a_higher_epoch_ends_the_role_at_once(phase: Phase) -> None:
    after, actions = run(primary(phase), RecordChanged(8, "beta", ("beta",)))
    assert (after.phase, after.epoch) == (Phase.SECONDARY, 8)
    assert HangUp() in actions


def test_the_peers_swaps_are_consented_to_only_where_they_take_nothing_from_us() -> None:
    assert roles.consents(primary(), 8, "beta") is not None
    assert roles.consents(primary(), 7, "alpha") is not None
    assert roles.consents(state(phase=Phase.ACQUIRING, epoch=7), 8, "beta") is not None
    assert roles.consents(state(epoch=7), 8, "beta") is None
    assert roles.consents(state(epoch=7), 6, "beta") is not None
    assert roles.consents(state(epoch=7, primary="beta"), 7, None) is None
    assert roles.consents(state(epoch=7), 8, "alpha") is not None


# --- two machines


class Copy(msgspec.Struct):
    """One node's copy of the record."""

    version: int = 0
    epoch: int = 0
    primary: str | None = None
    in_sync: tuple[str, ...] = ()

    def key(self) -> tuple[int, int, int]:
        return (self.epoch, self.version, -len(self.in_sync))


class Machine:
    """One node: what survives a crash (disk), and the process (state, inbox)."""

    def __init__(self, world: World, name: str, peer: str) -> None:
        self.world, self.name, self.peer = world, name, peer
        self.copy = Copy()
        self.skip = 0
        self.data: set[int] = set()
        self.sound = True
        self.was_primary = False
        self.clean = True
        self.up = False
        self.inbox: list[Event] = []
        self.swaps: list[Swap] = []
        self.state = state()

    def start(self, boot_lost: bool = False) -> None:
        self.state = State(me=self.name, peer=self.peer, survivor="primary", suspect_ns=SUSPECT, retry_ns=S // 4)
        self.up, self.inbox, self.swaps = True, [], []
        c = self.copy
        began = Started(
            c.epoch,
            c.primary,
            c.in_sync,
            self.was_primary,
            self.clean,
            boot_lost and not self.clean,
            WAIT,
            obstacle=None if self.sound else "inconsistent",
        )
        if not (self.was_primary and not self.clean) and not began.boot_lost:
            self.was_primary, self.clean = False, False
        self.step(began)

    def step(self, event: Event) -> None:
        before = self.state
        step = roles.step(before, event, self.world.now)
        self.state = step.state
        self.world.trace.append(f"{self.world.now / S:8.3f} {self.name}: {type(event).__name__}: {step.sentence}")
        if before.role != "primary" and self.state.role == "primary":
            self.world.acquired(self)
        for action in step.actions:
            if isinstance(action, Swap):
                self.swaps.append(action)
            elif isinstance(action, DropLink):
                self.world.cut_link("dropped on purpose")
            elif isinstance(action, Drain):
                self.inbox.append(Drained())

    @property
    def other(self) -> Machine:
        return self.world.node[self.peer]

    def swap(self) -> None:
        """Carries one swap out: at the peer first, if it is there, and then here; a reply may be lost."""
        if not self.swaps:
            return
        action = self.swaps.pop(0)
        in_sync = self.copy.in_sync if action.in_sync is None else action.in_sync
        action = msgspec.structs.replace(action, in_sync=in_sync)
        world, rng = self.world, self.world.rng
        ok = unknown = False
        why = ""
        if world.wire and self.other.up:
            why = roles.consents(self.other.state, action.epoch, action.primary) or ""
            if not why and self.other.copy.version == self.copy.version and not self.other.swaps:
                lost = rng.random() < 0.2
                self.other.copy = Copy(self.copy.version + 1, action.epoch, action.primary, in_sync)
                self.other.step(RecordChanged(action.epoch, action.primary, in_sync))
                if lost:
                    unknown = True
                    self.skip += 1
                    world.cut_wire("a reply was lost")
                else:
                    ok = True
        else:
            ok = not action.needs_peer
        if ok:
            self.copy = Copy(self.copy.version + 1 + self.skip, action.epoch, action.primary, in_sync)
            if action.purpose in ("promote", "readopt"):
                self.was_primary, self.clean = True, False
            elif action.purpose == "release":
                self.was_primary = False
        self.step(Swapped(action, ok, why or "conflict", unknown=unknown))


class World:
    """Two machines, a wire that breaks, crashes, clients that write, and people who never accept a loss."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0
        self.wire = False
        self.link = False
        self.trace: list[str] = []
        self.acked: set[int] = set()
        self.next = 1
        self.node = {"alpha": Machine(self, "alpha", "beta"), "beta": Machine(self, "beta", "alpha")}
        for machine in self.node.values():
            machine.start()

    @property
    def machines(self) -> list[Machine]:
        return list(self.node.values())

    def acquired(self, machine: Machine) -> None:
        lost = self.acked - machine.data
        assert not lost, f"{machine.name} became primary without {len(lost)} acknowledged writes"
        assert machine.sound, f"{machine.name} became primary in the middle of a resync"
        others = [one for one in self.machines if one is not machine and one.up and one.state.role == "primary"]
        assert not others, f"{others[0].name} is primary too"

    def cut_link(self, why: str) -> None:
        if self.link:
            self.link = False
            for machine in self.machines:
                if machine.up:
                    machine.inbox.append(LinkLost(why))

    def cut_wire(self, why: str) -> None:
        if self.wire:
            self.wire = False
            self.cut_link(why)
            for machine in self.machines:
                if machine.up:
                    machine.inbox.append(PeerDown(why, self.now))

    def join_wire(self) -> None:
        if self.wire or not all(machine.up and not machine.inbox for machine in self.machines):
            return
        self.wire = True
        best = max((machine.copy for machine in self.machines), key=Copy.key)
        for machine in self.machines:
            machine.skip = 0
            if machine.copy != best:
                machine.copy = msgspec.structs.replace(best)
                machine.step(RecordChanged(best.epoch, best.primary, best.in_sync))
        said = [(machine.state.role, machine.state.epoch) for machine in self.machines]
        for machine, (role, epoch) in zip(self.machines, said[::-1], strict=True):
            machine.inbox.append(PeerUp(role, epoch))

    def join_link(self) -> None:
        """The handshake: a primary is source; else the one whose data holds the other's; who lacks something is
        unsound until it has everything."""
        if self.link or not self.wire or any(machine.inbox or machine.swaps for machine in self.machines):
            return
        if len({machine.state.epoch for machine in self.machines}) > 1:
            return
        sources = [one for one in self.machines if one.state.role == "primary"]
        if len(sources) > 1:
            return
        if not sources:
            sources = [one for one in self.machines if one.sound and one.data >= one.other.data]
        if not sources:
            return
        source = sources[0]
        if not source.sound or not (source.data >= source.other.data & self.acked):
            return
        self.link = True
        if source.other.data != source.data or not source.other.sound:
            source.other.sound = False
        for machine in self.machines:
            machine.inbox.append(LinkUp())
        self.source = source

    def resync(self) -> None:
        if not self.link or any(machine.inbox for machine in self.machines):
            return
        target = self.source.other
        target.data = set(self.source.data)
        target.sound = True
        for machine in self.machines:
            machine.was_primary = machine.state.role == "primary"
            machine.clean = False
            machine.inbox.append(CaughtUp())
        self.source.inbox.append(Synced())

    def write(self) -> None:
        for machine in self.machines:
            if not machine.up or machine.state.role != "primary":
                continue
            mode = roles.mode_of(machine.state)
            number, self.next = self.next, self.next + 1
            machine.data.add(number)
            if mode is Mode.PEER and self.link and self.source is machine and machine.state.linked:
                machine.other.data.add(number)
                self.acked.add(number)
            elif mode is Mode.ALONE_FIRST:
                machine.inbox.append(GenerationBegan())
            elif mode is Mode.ALONE:
                self.acked.add(number)

    def crash(self, machine: Machine) -> None:
        if machine.up:
            machine.up = False
            self.cut_wire(f"{machine.name} is gone")

    def turn(self) -> None:
        rng = self.rng
        machine = rng.choice(self.machines)
        kind = rng.choices(
            ["event", "swap", "tick", "wire", "link", "resync", "write", "cut", "unlink", "crash", "start", "person"],
            [30, 12, 10, 8, 8, 6, 15, 1, 1, 0.7, 4, 2],
        )[0]
        if kind == "event" and machine.up and machine.inbox:
            machine.step(machine.inbox.pop(0))
        elif kind == "swap" and machine.up:
            machine.swap()
        elif kind == "tick" and machine.up:
            deadline = machine.state.deadline_ns
            if deadline is not None:
                self.now = max(self.now, deadline)
                machine.step(Tick())
        elif kind == "wire":
            self.join_wire()
        elif kind == "link":
            self.join_link()
        elif kind == "resync":
            self.resync()
        elif kind == "write":
            self.write()
        elif kind == "cut":
            self.cut_wire("cut")
        elif kind == "unlink":
            self.cut_link("flap")
        elif kind == "crash":
            self.crash(machine)
        elif kind == "start" and not machine.up:
            machine.start()
        elif kind == "person" and machine.up:
            obstacle = None if machine.sound else "inconsistent"
            machine.step(rng.choice([promote(obstacle=obstacle), Demote()]))
        self.now += rng.randrange(S // 50)


def simulate(rng: random.Random, turns: int) -> World:
    world = World(rng)
    for _ in range(turns):
        try:
            world.turn()
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(world.trace[-60:])) from error
    return world


def test_no_acknowledged_write_is_lost_and_never_two_primaries(rng: random.Random) -> None:
    """A1, A2, A3, A4 with crashes of processes, cuts, flaps and lost replies; no boot is lost and nobody accepts a
    loss."""
    acked = 0
    for _ in range(60):
        acked += len(simulate(rng, 3000).acked)
    assert acked > 1000  # they did serve


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("A1", {"peer_in_sync": property(lambda _: False)}),
        ("A3", {"sole": property(lambda _: True)}),
    ],
)
def test_the_simulation_bites_when_a_rule_is_weakened(
    monkeypatch: pytest.MonkeyPatch, rule: str, broken: dict[str, Any]
) -> None:
    """With a seed that is known to find it soon: with any, A1 takes up to some hundred runs."""
    rng = random.Random(7)
    for name, value in broken.items():
        monkeypatch.setattr(rolewords.State, name, value)

    def many() -> None:
        for _ in range(1000):
            simulate(rng, 3000)

    with pytest.raises(AssertionError, match=r"acknowledged writes|primary"):
        many()
