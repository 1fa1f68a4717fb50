"""Arbitrated pair: a primary whose own disk fails or hangs gives its role to the peer (F8, F9). Pure; see roles.py.

    PAIRED  --its disk failed, the peer has everything-->  it answers nothing; swap to {next epoch, peer, [peer]}
            --swap ok-->  SECONDARY, out of the set; what the peer has and this disk lacks is answered well

Rules:
- A14 Nothing is drained and nothing is flushed here: that is what the disk cannot do. Until the swap is ok the engine
  holds the answers to what only the peer has (`cover_of`), and reads there what this disk cannot read.
- A3 Only to a member of the in-sync set that is linked and equal. Where there is none, the disk's errors are told.
- A0 An unknown swap is resolved as a handoff's is (handoff.py); what stays primary then asks again.
- A19 Not while the pair is paused. F16 does not keep from it: a primary without a disk is as good as dead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair import handoff
from mirrorpair.rolesteps import Step, change, stay
from mirrorpair.rolewords import Cover, DiskFailed, DiskWell, Phase, Swap

if TYPE_CHECKING:
    from mirrorpair.rolewords import Event, State

_WAITING = frozenset({Phase.WAITING, Phase.SHRINKING})


def cover_of(state: State) -> Cover:
    """How far the engine may rely on the peer for what this node's disk cannot do."""
    if state.role != "primary" or state.expanding != "no" or state.peer not in state.in_sync:
        return Cover.NONE
    equal = state.phase is Phase.PAIRED and state.linked and state.equal
    cover = Cover.READS if equal else Cover.NONE
    # Also before anything failed: the first error must not be told to a client. While a new link is being made equal
    # nothing is held: what is held keeps its blocks, for which the resync would wait, and the abdication for that.
    held = equal or state.phase in _WAITING
    return cover | Cover.HOLD if state.arbitrated and not state.paused and held else cover


def disk_failed(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, DiskFailed)
    ailing = change(state, ailing=event.why)
    if state.handing == "pausing":  # what it waits for may never end
        return handoff.give_up(ailing, f"its disk failed: {event.why}")
    return stay(ailing, f"{state.me}'s disk: {event.why}")


def disk_well(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, DiskWell)
    return stay(change(state, ailing=None), f"{state.me}'s disk answers again")


def settle(done: Step, now: int) -> Step:
    """After every step: whether the role is to be given away for the disk's sake."""
    state = done.state
    if state.ailing is None or state.phase is not Phase.PAIRED or state.handing != "no":
        return done
    if state.again_ns is not None:
        if now < state.again_ns:
            return done
        state = change(state, again_ns=None)
    if state.paused or handoff.obstacle(state) is not None:
        return done._replace(state=state)
    epoch = max(state.epoch, state.peer_epoch) + 1
    swap = Swap("abdicate", epoch, state.peer, (state.peer,), needs_peer=True, unasked=True)
    giving = change(state, handing="asked", deadline_ns=None)
    sentence = f"{state.me}'s disk failed ({state.ailing}): {state.peer} has everything and gets epoch {epoch}"
    return Step(giving, (*done.actions, swap), sentence)
