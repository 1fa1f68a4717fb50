"""What a person's word would do to the roles: the answer of `--dry-run`. Pure.

Rules:
- It asks the table itself (`roles.step`) and looks at the state and the actions that come out, so that a dry run cannot
  promise what the real run refuses; nothing of it is carried out.
- A refusal has the code and the sentence of the real one. One that only holds for now (our own promise, A11) is waited
  for by the real run: then what comes after it is told, and for how long it would wait.
- What a node would be granted is read from the state that a successful swap leads to (`roles.mode_of`).
- What the peer would object to when it is asked is not known here.
"""

from __future__ import annotations

from mirrorpair import roles
from mirrorpair.rolecommands import given_up
from mirrorpair.rolewords import Answer, Demote, Drain, Handoff, Mode, Phase, Promote, State, Swap, Swapped


def foresee(state: State, event: Promote | Demote | Handoff, now: int) -> Answer:
    """Code 0 and what would happen, or why it would be refused."""
    step = roles.step(state, event, now)
    answer = next((action for action in step.actions if isinstance(action, Answer)), None)
    if answer is not None and answer.retry_at_ns is not None:
        later = foresee(state, event, answer.retry_at_ns)
        left_s = (answer.retry_at_ns - now) / 1e9
        waits = f"after its promise to {state.peer} is over, in {left_s:.1f} s, {later.message}"
        return Answer(later.code, waits if later.code == 0 else later.message)
    if answer is not None:
        return _at_once(state, step.state, answer)
    if isinstance(event, Handoff):
        return Answer(
            0,
            f"{state.peer} would become primary: {state.me}'s clients are paused until everything is durable on both "
            "nodes, then their connections end; nothing is lost, nothing is resynced",
        )
    if isinstance(event, Demote):
        return Answer(0, _demotion(state, drains=any(isinstance(action, Drain) for action in step.actions)))
    swap = next(action for action in step.actions if isinstance(action, Swap))
    return Answer(0, _acquisition(state, step.state, swap, now))


def _at_once(before: State, after: State, answer: Answer) -> Answer:
    if answer.code:
        return answer
    if before.phase is not after.phase:
        return Answer(0, f"{before.me} would not take back the role that it had before it was started")
    return Answer(0, f"{answer.message}: nothing would be done")


def _acquisition(before: State, asked: State, swap: Swap, now: int) -> str:
    me, peer = before.me, before.peer
    kept = swap.in_sync or ()
    won = roles.step(asked, Swapped(swap, True), now).state
    if swap.purpose == "shrink":
        text = f"{me} would stay primary, of epoch {swap.epoch}, and take {peer} out of the in-sync set"
    else:
        text = f"{me} would become primary of epoch {swap.epoch}"
    if roles.mode_of(won) is not Mode.PEER:
        text += "; it would answer writes alone"
    elif peer in kept:
        text += f"; it would answer writes that {peer} has too, and no others until the two have lost each other"
    else:
        text += f"; it would answer writes once {peer} is linked, or alone when that fails"
    if peer not in kept:
        text += f"; {peer} would not be in sync: it gets what differs when the two are linked"
    return text + given_up(before)


def _demotion(state: State, *, drains: bool) -> str:
    me, peer = state.me, state.peer
    if not drains:
        return (
            f"{me} would become secondary: its clients are hung up on, and what waits for {peer} is not answered; "
            "nobody serves until a node is promoted"
        )
    where = "on both nodes" if state.phase is Phase.PAIRED else f"on {me}"
    return (
        f"{me} would become secondary: its clients get their answers and are hung up on, everything is made durable "
        f"{where}, the role of epoch {state.epoch} is given up; nobody serves until a node is promoted"
    )
