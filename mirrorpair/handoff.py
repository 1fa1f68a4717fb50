"""Planned change of roles (arbitrated pair): the primary gives its role to the peer, without loss and without resync.

    PAIRED  --asked, or the preferred node has been in sync for long enough-->  clients paused ("pausing")
            --no write in hand, all durable on both-->  it answers nothing; swap to {next epoch, peer} ("asked")
            --swap ok-->  SECONDARY; the peer finds itself named, acquires the role as after a restart, and serves

Rules:
- A client sees a pause, then the end of its connection when the peer serves; no write fails, and none that was answered
  is lost: what was not read has not happened (C1).
- Before the swap is sent, whatever goes wrong (a lost link, a slow flush, `handoff_ns`) resumes the clients here.
- A0 After a swap of which nothing is known this node answers nothing until a later one of its own is ok ("hold"), or
  the record shows that the role is gone. A record that still names this node proves nothing: the swap may come later.
- A3 Only a member of the in-sync set is given the role (swaprules.py looks at it once more), and only once it has all
  on this very link: a member that is being sent again what was in flight could not take it.
- A11 Who is named does not wait for a promise; an acquisition of its own, of yet another epoch, comes before it serves.
- A19 A failback that nobody asked for is left undone while the pair is paused, or latched (F16).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.rolesteps import Step, change, expand_again, stay
from mirrorpair.rolewords import (
    FAILED,
    REFUSED,
    WRONG_ROLE,
    Answer,
    DropLink,
    Forgive,
    HangUp,
    PauseClients,
    Phase,
    Quiet,
    ResumeClients,
    Swap,
    Swapped,
)

if TYPE_CHECKING:
    from mirrorpair.rolewords import Action, Event, State


def obstacle(state: State) -> str | None:
    """Why the peer cannot be given the role now, or None."""
    me, peer = state.me, state.peer
    if not state.arbitrated:
        return f'arbiter = "none": `mirrorpair demote` on {me}, then `mirrorpair promote` on {peer}'
    if state.stopping or state.draining or state.answering or state.raising or state.handing != "no":
        return f"a change of roles is under way on {me}: try again"
    if not state.peer_up:
        return f"{peer} is not connected"
    if state.peer_left:
        return f"{peer} is stopping"
    if state.phase is not Phase.PAIRED:
        return f"{me} and {peer} are not linked"
    if state.expanding != "no" or set(state.in_sync) != {me, peer} or not state.equal:
        return f"{peer} is not in sync: it would lose what it has not got yet"
    return None


def asked(state: State, _event: Event, now: int) -> Step:
    """By a person, at the primary."""
    why_not = obstacle(state)
    if why_not is not None:
        return Step(state, (Answer(REFUSED, why_not),), f"refused: {why_not}")
    return _begin(state, now, f"a person gives the role to {state.peer}", answering=True)


def asked_elsewhere(state: State, _event: Event, _now: int) -> Step:
    """At a node that is not primary."""
    message = f"{state.me} is not primary: there is nothing that it could hand over"
    return Step(state, (Answer(WRONG_ROLE, message),), message)


def _begin(state: State, now: int, why: str, *, answering: bool) -> Step:
    pausing = change(state, handing="pausing", answering=answering, deadline_ns=now + state.handoff_ns)
    return Step(pausing, (PauseClients(),), f"{why}: its clients are paused")


def quiet(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, Quiet)
    if state.handing != "pausing":
        return stay(state)
    if event.failure:
        return give_up(state, event.failure)
    epoch = max(state.epoch, state.peer_epoch) + 1
    swap = Swap("handoff", epoch, state.peer, None, needs_peer=True, unasked=not state.answering)
    handing = change(state, handing="asked", deadline_ns=None)
    return Step(handing, (swap,), f"no write is in hand and all is durable on both: {state.peer} gets epoch {epoch}")


def give_up(state: State, why: str) -> Step:
    """Before the swap was sent: nothing has changed."""
    message = f"{state.me} stays primary: {why}"
    answer = (Answer(FAILED, message),) if state.answering else ()
    return Step(change(state, handing="no", answering=False, deadline_ns=None), answer, message)


def swapped(state: State, event: Swapped, now: int) -> Step:
    """The outcome of a handoff, an abdication or a hold."""
    if event.swap.purpose == "hold":
        if event.ok or state.handing != "unknown":
            return stay(state, f"{state.me} is still primary")  # `handing` was cleared by the swap's success
        return stay(change(state, deadline_ns=now + state.retry_ns), f"whether {state.peer} is primary is not known")
    if state.handing != "asked":
        return stay(state)  # the record has been seen meanwhile
    answered = state.answering
    state = change(state, answering=False)
    if event.unknown and not event.ok:
        message = f"{state.peer} may be primary or not: {event.why}"
        answer = (Answer(event.code, message),) if answered else ()
        return Step(change(state, handing="unknown", deadline_ns=now + state.retry_ns), answer, message)
    if not event.ok:
        message = f"{state.me} stays primary: {event.why}"
        answer = (Answer(event.code, message),) if answered else ()
        again = now + state.retry_ns if event.swap.purpose == "abdicate" else None
        return Step(change(state, handing="no", again_ns=again), answer, message)
    message = f"{state.me} has given the role to {state.peer}, for epoch {state.epoch}"
    handed = change(
        state,
        phase=Phase.SECONDARY,
        handing="no",
        redirecting=True,
        linked=False,
        equal=False,
        peer_role="secondary",
        deadline_ns=now + state.suspect_ns,
    )
    if event.swap.purpose == "abdicate":
        # Its clients are not kept until the peer serves: what hangs here ends for them with the connection.
        ended = change(handed, redirecting=False)
        # Who forgot it could overwrite the peer with what this disk lacks: then nothing of that may have been answered.
        forgiven: tuple[Action, ...] = (Forgive(),) if event.lasting else ()
        return Step(ended, (*forgiven, HangUp(), DropLink("the roles changed")), message)
    answer = (Answer(0, message),) if answered else ()
    return Step(handed, (*answer, DropLink("the roles changed")), message)


def paired_tick(state: State, event: Event, now: int) -> Step:
    """PAIRED: a time is over."""
    if state.failback_at_ns is not None and now >= state.failback_at_ns:
        if state.paused or state.latched or obstacle(state) is not None:
            return stay(change(state, steady_since_ns=now))
        return _begin(state, now, f"{state.peer} is preferred and has been in sync for long enough", answering=False)
    if state.deadline_ns is None or now < state.deadline_ns:
        return stay(state)
    if state.handing == "pausing":
        return give_up(state, f"its clients or {state.peer} took longer than {state.handoff_ns / 1e9:g} s")
    if state.handing == "unknown":
        swap = Swap("hold", state.epoch, state.me, None)
        return Step(change(state, deadline_ns=None), (swap,), f"{state.me} asks whether it is still primary")
    if state.handing == "asked":
        return stay(change(state, deadline_ns=None))
    return expand_again(state, event, now)


def _steady(state: State) -> bool:
    both = state.expanding == "no" and set(state.in_sync) == {state.me, state.peer} and state.equal
    return state.phase is Phase.PAIRED and state.handing == "no" and both


def settle(before: State, done: Step, now: int) -> Step:
    """After every step: what follows for the clients, whatever led here, and since when the pair is steady."""
    state, actions, sentence = done
    if state.handing == "pausing" and (state.phase is not Phase.PAIRED or state.stopping or state.peer_left):
        gave_up = give_up(state, sentence)
        # The deadline is that of the new phase.
        state, sentence = change(gave_up.state, deadline_ns=state.deadline_ns), gave_up.sentence
        actions = (*actions, *gave_up.actions)
    if state.handing == "unknown" and state.phase is Phase.PAIRED and before.phase is not Phase.PAIRED:
        state = change(state, deadline_ns=now + state.retry_ns)
    if before.handing != "no" and state.handing == "no" and state.role == "primary":
        actions = (*actions, ResumeClients())
    over = state.peer_role == "primary" or not state.peer_up or state.deadline_ns is None or now >= state.deadline_ns
    if state.redirecting and (over or state.phase is not Phase.SECONDARY):
        state = change(state, redirecting=False)
        actions = (*actions, HangUp())
    if not _steady(state):
        if state.steady_since_ns is not None:
            state = change(state, steady_since_ns=None)
    elif state.steady_since_ns is None:
        state = change(state, steady_since_ns=now)
    return Step(state, actions, sentence)
