"""What the decisions of roles.py are made of: a changed state, the actions that go with it, one sentence. Pure.

Rules:
- A1, A2 Who is in the set is waited for; who is not is not. The swap that takes a peer in makes it required at once.
- A4 Every acquisition takes a new epoch, above everything seen.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mirrorpair.rolewords import REFUSED, Action, Answer, Event, Phase, Purpose, State, Swap


class Step(NamedTuple):
    state: State
    actions: tuple[Action, ...]
    sentence: str


def change(state: State, **changes: object) -> State:
    return msgspec.structs.replace(state, **changes)


def nothing(state: State) -> str:
    link = f"{state.peer} linked" if state.linked else f"no link with {state.peer}"
    return f"no action: I am {state.me}, {state.role} ({state.phase.value}) of epoch {state.epoch}, {link}"


def stay(state: State, sentence: str = "") -> Step:
    return Step(state, (), sentence or nothing(state))


def refuse(state: State, message: str, retry_at_ns: int | None = None, *, code: int = REFUSED) -> Step:
    return Step(state, (Answer(code, message, retry_at_ns),), f"refused: {message}")


def acquire(
    state: State,
    purpose: Purpose,
    in_sync: tuple[str, ...],
    why: str,
    *,
    overrides: bool = False,
    forced: bool = False,
) -> Step:
    """A4: always a new epoch, above everything seen."""
    epoch = max(state.epoch, state.peer_epoch) + 1
    swap = Swap(purpose, epoch, state.me, in_sync, state.peer_up, overrides, forced)
    changed = change(
        state,
        phase=Phase.ACQUIRING,
        deadline_ns=None,
        answering=purpose == "promote",
        asked=swap,
        released=False,
    )
    return Step(changed, (swap,), f"{state.me} takes epoch {epoch}: {why}")


def lose_link(state: State, now: int, why: str, silent_since: int | None = None) -> Step:
    """The primary has no peer to send to. Who is not in the set is not waited for. `silent_since`: of the lost link, if
    it was found out by that."""
    state = change(state, linked=False, equal=False)
    if not state.peer_in_sync:
        return go_alone(state, f"{why}; {state.peer} is not in sync, so {state.me} goes on alone")
    if state.peer_left:
        return shrink(state, f"{why}; {state.peer} stopped gracefully")
    since = silent_since if state.peer_up else state.last_heard_ns
    since = now if since is None else since
    deadline = max(now, since + state.suspect_ns)
    return Step(
        change(state, phase=Phase.WAITING, deadline_ns=deadline),
        (),
        f"{why}; writes wait up to {(deadline - now) / 1e9:.2f} s for {state.peer} to come back",
    )


def shrink(state: State, why: str) -> Step:
    changed = change(state, phase=Phase.SHRINKING, deadline_ns=None)
    swap = Swap("shrink", state.epoch, state.me, (state.me,))
    return Step(changed, (swap,), f"{why}; {state.me} takes {state.peer} out of the in-sync set")


def go_alone(state: State, why: str) -> Step:
    return Step(change(state, phase=Phase.ALONE, deadline_ns=None, alone_began=False), (), why)


def pair_up(state: State, why: str) -> Step:
    return Step(change(state, phase=Phase.PAIRED, linked=True, deadline_ns=None, peer_left=False), (), why)


def watch(state: State, at_ns: int) -> State:
    """Arbitrated: looks at that time whether there is something to take over."""
    if not state.arbitrated or state.phase is not Phase.SECONDARY:
        return state
    return change(state, deadline_ns=None if state.peer_up and state.peer_role == "primary" else at_ns)


def expand(state: State, *, anew: bool = False) -> Step:
    """Takes a linked, equal peer into the set, if this is the time for it. `anew`: who is in it by that name is another
    one, whom this one has replaced (A8)."""
    both = tuple(sorted((state.me, state.peer)))
    if not state.equal or state.expanding == "asked":
        return stay(state)
    if state.in_sync == both and state.expanding == "no" and not anew:
        return stay(state)  # (one of which nothing is known is asked for again, whatever the record says: A0)
    # Without a primary the link's source does it; where there is one, the set is the primary's alone.
    if state.phase is not Phase.PAIRED and (state.phase is not Phase.SECONDARY or state.peer_role == "primary"):
        return stay(state)
    swap = Swap("expand", state.epoch, state.primary, both, needs_peer=True)
    changed = change(state, expanding="asked" if state.expanding == "no" else "unknown", deadline_ns=None)
    return Step(changed, (swap,), f"{state.peer} has everything: it enters the in-sync set")


def expand_again(state: State, _event: Event, now: int) -> Step:
    if state.deadline_ns is None or now < state.deadline_ns:
        return stay(state)
    return expand(change(state, deadline_ns=None))


def readopt(state: State, why: str) -> Step:
    if state.stopping:
        return stay(state)
    in_sync = (state.me,) if state.crashed or state.peer not in state.in_sync else state.in_sync
    return acquire(state, "readopt", in_sync, why)


def give_way(state: State) -> Step:
    return stay(
        change(state, phase=Phase.SECONDARY, deadline_ns=None),
        f"{state.peer} is primary of epoch {state.peer_epoch}: {state.me} does not take the role back",
    )
