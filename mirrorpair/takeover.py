"""Arbitrated pair: how a node takes over from a silent peer, takes its own role back, or is the first primary. Pure.

Rules: A0, A3, A4, A11 and A13, as roles.py and swaprules.py have them, and
- A15 Before the first epoch nobody is primary. The preferred node takes it by itself once the two are linked and the
  peer holds nothing that it lacks (both were new, or it alone holds data, or it has been sent everything): only if
  neither of the two has ever recorded an epoch. Otherwise an empty register is one that was lost (F17).
"""

from __future__ import annotations

from mirrorpair.rolesteps import Step, acquire, change, expand_again, give_way, readopt, stay, watch
from mirrorpair.rolewords import Answer, DropLink, Event, PeerDied, PeerFloor, Phase, State, Swap, Swapped


def take_back(state: State) -> Step:
    """A4, arbitrated: the register names this node, which does not serve: it was started anew, or a swap of its own
    landed after all (A0). The swap is the judge if the peer wants the role at the same moment."""
    if state.released:
        return stay(state, f"{state.me} was demoted by a person; the register does not know it yet")
    if state.peer_up and state.peer_role == "primary":
        return give_way(state)
    if state.boot_lost and state.peer in state.in_sync:
        return stay(
            state,
            f"{state.me} was primary and lost its boot; {state.peer} is in sync and may hold what was lost, so "
            f"{state.me} does not take the role back by itself",
        )
    return readopt(state, "the register names it")


def take_over(state: State, now: int) -> Step:
    """A3, A11, arbitrated: the primary of record is silent, or there without its role. Whether a promise to it binds is
    looked at once more within the swap: it may have just become primary, and this node not have heard of it yet."""
    if state.stopping or (state.peer_up and state.peer_role == "primary"):
        return stay(change(state, deadline_ns=None))
    if not state.peer_up and now < state.bound_until_ns:
        return stay(change(state, deadline_ns=state.bound_until_ns))
    later = change(state, deadline_ns=now + state.suspect_ns)
    if state.primary == state.me:
        done = take_back(state)
        return done if done.actions else stay(later, done.sentence)
    if state.primary is None:
        # Not known yet; or nobody is, and a person has to promote one, unless this one begins (A15).
        return stay(later if state.preferred and not state.epoch else change(state, deadline_ns=None))
    if state.boot_lost:
        return stay(later, f"{state.me} lost its boot: it takes nothing over before it has what {state.peer} has")
    lost = f"{state.peer} is there without the role" if state.peer_up else f"{state.peer} is silent"
    return acquire(state, "takeover", (state.me,), lost)


def bootstrap(state: State) -> Step | None:
    """A15; None: this is not the time. A peer that is about to enter the set enters it first: then the two need not be
    compared anew."""
    if not (state.arbitrated and state.preferred) or state.phase is not Phase.SECONDARY or state.stopping:
        return None
    if state.epoch or state.peer_epoch or state.primary is not None or state.paused or state.boot_lost:
        return None
    if not (state.peer_up and state.peer_role == "secondary" and state.linked and state.whole):
        return None
    member = state.peer in state.in_sync
    if state.expanding != "no" or (state.equal and not member):
        return None
    in_sync = tuple(sorted((state.me, state.peer))) if member else (state.me,)
    why = f"nobody was ever primary, it is preferred, and {state.peer} holds nothing that it lacks"
    return acquire(state, "bootstrap", in_sync, why)


def secondary_tick(state: State, event: Event, now: int) -> Step:
    if state.deadline_ns is None or now < state.deadline_ns:
        return stay(state)
    if (begun := bootstrap(state)) is not None:
        return begun
    if state.arbitrated and (state.primary is not None or not (state.linked and state.equal)):
        return take_over(state, now)
    return expand_again(state, event, now)


def peer_died(state: State, event: Event, now: int) -> Step:
    """A11: a promise to who is dead binds no more, and who is dead is not waited for."""
    assert isinstance(event, PeerDied)
    freed = change(state, bound_until_ns=min(state.bound_until_ns, event.bound_until_ns))
    if state.peer_up or state.phase is not Phase.SECONDARY or not state.arbitrated:
        return stay(freed, event.why)
    if not event.gone:
        return stay(watch(freed, max(now, freed.bound_until_ns)), event.why)
    done = secondary_tick(change(freed, deadline_ns=now), event, now)
    return done._replace(sentence=f"{event.why}: {done.sentence}")


def overtaken(state: State) -> bool:
    return state.asked is None or state.epoch >= state.asked.epoch


def acquire_again(state: State, _event: Event, now: int) -> Step:
    """Nothing is known of the last attempt. While the peer is there as primary, it is the one to end that (A13)."""
    if state.deadline_ns is None or now < state.deadline_ns or state.asked is None:
        return stay(state)
    if overtaken(state):
        back = change(state, phase=Phase.SECONDARY, asked=None)
        return stay(watch(back, now), f"epoch {state.epoch} is there: what {state.me} asked for is too late")
    if state.peer_up and state.peer_role == "primary":
        return stay(change(state, deadline_ns=now + state.suspect_ns))
    return Step(
        change(state, deadline_ns=None), (state.asked,), f"{state.me} asks for epoch {state.asked.epoch} once more"
    )


def peer_floor(state: State, event: Event, _now: int) -> Step:
    """A13: above what the peer has asked for no late attempt of it can land, and it promises again."""
    assert isinstance(event, PeerFloor)
    if not state.arbitrated or state.raising or event.floor <= state.epoch or state.releasing or state.handing != "no":
        return stay(state)
    # One more: the peer may have seen that epoch with a record that was lost since (F17).
    swap = Swap("raise", event.floor + 1, state.me, None)
    why = f"{state.peer} has asked for epoch {event.floor}: {state.me} takes the next one"
    return Step(change(state, raising=True), (swap,), why)


def raised(state: State, event: Swapped, now: int) -> Step:
    answered = state.answering and event.swap.overrides
    state = change(state, raising=False, answering=state.answering and not answered)
    if not event.ok:
        sentence = f"{state.me} stays at epoch {state.epoch}: {event.why}"
        return Step(state, (Answer(event.code, sentence),) if answered else (), sentence)
    done = new_epoch(state, now)
    return done._replace(actions=(*((Answer(0, done.sentence),) if answered else ()), *done.actions))


def new_epoch(state: State, now: int) -> Step:
    """A primary's own: frames of the older epoch are refused, so the link is made anew (A5)."""
    if state.phase is Phase.PAIRED:
        state = change(state, phase=Phase.WAITING, deadline_ns=now + state.suspect_ns)
    changed = change(state, linked=False, equal=False)
    return Step(changed, (DropLink("the epoch was raised"),), f"{state.me} is primary of epoch {state.epoch} now")
