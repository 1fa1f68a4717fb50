"""What a person asks of a node's role: promotion and demotion, allowed or refused with a reason. Pure; see roles.py.

Rules:
- A3 Only a member of the in-sync set, with usable disks, is promoted; a person may override what would lose data, never
  what would serve garbage. What would be lost is told.
- A11 A promise is waited for, or overridden by force.
- F17 A register that was lost is made anew only by a person. Before an empty one the node with the lower recorded epoch
  is not promoted: the other one may hold what it lacks.
- One change of roles at a time: who comes meanwhile is told to try again.
"""

from __future__ import annotations

from mirrorpair.rolesteps import Step, acquire, change, refuse, shrink, stay
from mirrorpair.rolewords import (
    FAILED,
    SPLIT_BRAIN,
    WRONG_ROLE,
    Answer,
    Drain,
    Event,
    HangUp,
    Phase,
    Promote,
    State,
    Swap,
)


def promote(state: State, event: Event, now: int) -> Step:
    """A3, A11: may this node become primary, now, on a person's word?"""
    assert isinstance(event, Promote)
    me, peer = state.me, state.peer
    if state.stopping:
        return refuse(state, f"{me} is stopping", code=FAILED)
    if event.obstacle is not None:
        return refuse(state, event.obstacle)
    if state.peer_up and state.peer_role == "primary":
        message = f"{peer} is primary of epoch {state.peer_epoch}: `mirrorpair demote` there first"
        return refuse(state, message, code=WRONG_ROLE)
    member, unknown = _member(state), _unknown(state)
    if not event.accept_data_loss:
        if event.divided is not None and state.peer_up:
            return refuse(state, event.divided, code=SPLIT_BRAIN)
        if not member:
            return refuse(
                state,
                f"{me} is not in sync: {peer} has acknowledged writes that would be lost "
                "(--accept-data-loss gives them up)",
            )
        if (reason := outlived(state)) is not None:
            return refuse(state, f"{reason} (--accept-data-loss gives up what only {peer} has)")
        if state.boot_lost and state.peer_in_sync:
            return refuse(
                state,
                f"{me} lost its boot, and {peer} may hold acknowledged writes that were lost with it: promote {peer}, "
                f"or wait until {me} has them (--accept-data-loss gives them up)",
            )
        if unknown and not state.arbitrated:  # there the register says who has everything
            return refuse(
                state,
                f"{peer} is silent and may be serving: what it acknowledged alone would be lost "
                "(--accept-data-loss gives it up)",
            )
    if unknown and now < event.bound_until_ns and not event.force:
        left = (event.bound_until_ns - now) / 1e9
        return refuse(
            state,
            f"{me} has promised {peer} not to take over for another {left:.1f} s (--force does not wait)",
            event.bound_until_ns,
        )
    keeps = state.peer_up and state.peer_in_sync and member and not state.crashed and not state.boot_lost
    in_sync = tuple(sorted((me, peer))) if keeps else (me,)
    why = f"a person promotes it{given_up(state)}"
    return acquire(state, "promote", in_sync, why, overrides=event.accept_data_loss, forced=event.force)


def _member(state: State) -> bool:
    return state.me in state.in_sync or not state.in_sync


def outlived(state: State) -> str | None:
    """F17, A15: who was in sync is not known here, and the peer remembers more than this node. Why that matters."""
    if state.in_sync or state.peer_epoch <= state.epoch:
        return None
    return (
        f"{state.peer} has recorded epoch {state.peer_epoch}, {state.me} only {state.epoch}, and the register names "
        f"nobody: it was lost, or not read yet, and {state.peer} may hold acknowledged writes that {state.me} lacks"
    )


def _unknown(state: State) -> bool:
    """Whether the peer may hold writes that nobody here has heard of."""
    return not state.peer_up and not state.peer_left and not state.sole


def given_up(state: State) -> str:
    """What a promotion of this node would lose, as the end of a sentence."""
    unknown = _unknown(state) and not state.arbitrated
    lacks = not _member(state) or unknown or outlived(state) is not None or (state.boot_lost and state.peer_in_sync)
    return f"; what only {state.peer} has is given up" if lacks else ""


def promote_primary(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, Promote)
    if state.arbitrated and event.accept_data_loss:
        if state.phase is Phase.SHRINKING or state.raising or state.draining or state.handing != "no":
            return busy(state, event, now)
        # F17: the register was lost, or restored from an older copy, and a person wants it made anew from here.
        swap = Swap("raise", state.epoch + 1, state.me, state.in_sync, overrides=True)
        why = f"{state.me} is primary already; a person has the register made anew from what it knows"
        return Step(change(state, raising=True, answering=True), (swap,), why)
    message = f"{state.me} is primary already, of epoch {state.epoch}"
    return Step(state, (Answer(0, message),), message)


def promote_frozen(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, Promote)
    if not event.accept_data_loss:
        return refuse(
            state,
            f"{state.me} is primary but frozen: {state.peer} is silent and may have taken over "
            "(--accept-data-loss goes on alone)",
        )
    shrunk = shrink(state, "a person says that it may go on alone")
    return Step(change(shrunk.state, answering=True), shrunk.actions, shrunk.sentence)


def busy(state: State, _event: Event, _now: int) -> Step:
    return refuse(state, f"a change of roles is under way on {state.me}: try again", code=FAILED)


def demote_secondary(state: State, _event: Event, _now: int) -> Step:
    message = f"{state.me} is secondary already"
    return Step(state, (Answer(0, message),), message)


def demote_returning(state: State, _event: Event, _now: int) -> Step:
    message = f"{state.me} does not take the role back"
    return Step(change(state, phase=Phase.SECONDARY, deadline_ns=None), (Answer(0, message),), message)


def demote(state: State, event: Event, now: int) -> Step:
    if state.draining or state.answering or state.handing != "no":
        return busy(state, event, now)
    if state.phase is Phase.FROZEN:
        # Nothing can be drained without the peer: the role is given up as it is.
        release = Swap("release", state.epoch, None, None)
        return Step(
            change(state, draining=True, releasing=True, answering=True), (HangUp(), release), "a person demotes it"
        )
    return Step(change(state, draining=True, answering=True), (Drain(),), f"a person demotes {state.me}: clients drain")


def drained(state: State, _event: Event, _now: int) -> Step:
    if not state.draining or state.releasing or state.stopping:
        return stay(state)
    release = Swap("release", state.epoch, None, (state.me,) if state.phase is Phase.ALONE else None)
    return Step(change(state, releasing=True), (release,), "no client is left: the role is given up")
