"""Who is primary, and how it answers writes: `step(state, event, now) -> (state, actions, one sentence)`. Pure.

The table `TABLE` has a handler for every phase and every kind of event; what is not in it changes nothing. Phases:

    SECONDARY   --promote-->  ACQUIRING  --swap ok-->  WAITING or ALONE         --conflict-->  SECONDARY
    RETURNING   the primary of record after a start: --peer is there, or time is over-->  ACQUIRING or SECONDARY
    PAIRED      --link lost-->  WAITING        WAITING, ALONE, FROZEN  --link up-->  PAIRED
    WAITING     --deadline-->  SHRINKING  --swap ok-->  ALONE
                --deadline, survivor = "secondary"-->  FROZEN: only the peer may go on alone

In an arbitrated pair (`state.arbitrated`: the register is kept by a witness) nobody waits in RETURNING: the register
says at once whether the role may be taken back, and a SECONDARY whose primary is silent takes it over by itself:

    SECONDARY   --own promise over, the primary of record silent or without its role-->  ACQUIRING
    SECONDARY   --the process of the primary of record is proven to have ended-->  ACQUIRING
    SECONDARY   --the register names it-->  ACQUIRING
    SECONDARY   --nobody was ever primary, it is preferred, the linked peer holds nothing more-->  ACQUIRING (A15)

Rules:
- A0 After a swap of which nothing is known the safer of both outcomes is assumed, until a later one is ok.
- A1 No answer without the peer before the swap that takes it out of `in_sync` is ok: WAITING and SHRINKING hold writes.
- A2 A joining peer is required from before the swap that takes it in, whatever becomes of that.
- A3 Only a member of `in_sync`, with usable disks, becomes primary; a person may override what would lose data
  (`accept_data_loss`), never what would serve garbage. In an arbitrated pair who is one is read from the register
  within the swap (swaprules.py), so what a state says of it may be old.
- A4 Every acquisition raises the epoch, also after a restart. Who lost its boot without a clean stop does not take the
  role back while another member is in the set. Who crashed takes it back without the peer in the set.
- A11 Nobody takes over while its own promise binds it, unless the peer said that it does not serve, or is proven to be
  dead, or a person forces.
- A link that is lost while the peer is heard, over another path, is a lost link like any other for the primary, and
  nothing for the other one: it takes over from a silent peer only.
- A17 A link that is back before the deadline changes nothing: no swap, no new generation, the writes are sent again.
- A18 A node that stops accepts no role. The one that stopped cleanly while the peer was in sync may have been replaced
  since: alone it does not take the role back.
- A planned change of roles is in handoff.py: PAIRED with `state.handing`, then SECONDARY. A14 One for the sake of a
  failing disk is in abdication.py.
- The grant follows from the state (`mode_of`), so it cannot be forgotten in a transition.
- Time is CLOCK_BOOTTIME ns; `state.wake_ns` says when a Tick is due at the latest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair import abdication, handoff, rolecommands
from mirrorpair.rolesteps import (
    Step,
    change,
    expand,
    give_way,
    go_alone,
    lose_link,
    pair_up,
    readopt,
    shrink,
    stay,
    watch,
)
from mirrorpair.rolewords import (
    ACQUISITIONS,
    FAILED,
    PRIMARY,
    WRONG_ROLE,
    Action,
    Answer,
    CaughtUp,
    Demote,
    DiskFailed,
    DiskWell,
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
    RoleName,
    Started,
    State,
    Stop,
    Swapped,
    Synced,
    Tick,
)
from mirrorpair.takeover import (
    acquire_again,
    bootstrap,
    new_epoch,
    overtaken,
    peer_died,
    peer_floor,
    raised,
    secondary_tick,
    take_back,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def mode_of(state: State) -> Mode:
    """What the engine may do in this state."""
    if state.handing in ("asked", "unknown"):
        return Mode.NONE  # the role is given away, or may be
    if state.phase is Phase.ALONE:
        return Mode.ALONE if state.alone_began else Mode.ALONE_FIRST
    return Mode.PEER if state.phase in PRIMARY else Mode.NONE


def bounded(state: State) -> bool:
    """Whether the grant ends with the peer's promise (A10): only where the peer could take over on silence."""
    peer_may = state.arbitrated or state.survivor == "secondary"
    return peer_may and state.phase in PRIMARY and state.peer_in_sync


def consents(state: State, epoch: int, primary: str | None) -> str | None:
    """Why the peer may not change the register to this, or None. While this node is primary, or about to be, nobody
    else changes anything: a set that the peer widens would hide what is answered alone here (A1)."""
    if state.arbitrated:
        return "the register of this pair is not kept by its nodes"
    if state.role == "primary":
        return f"{state.me} is primary: `mirrorpair demote` there first"
    if state.phase is Phase.ACQUIRING:
        return f"{state.me} is becoming primary itself"
    if primary == state.me and state.primary != state.me:
        return f"{state.me} did not ask to be primary"
    return None if epoch >= state.epoch else f"epoch {epoch} is older than {state.epoch}"


def step(state: State, event: Event, now: int) -> Step:
    """The next state, what to do, and one sentence that says what was done and why."""
    before = state
    if isinstance(event, Swapped) and event.ok:
        swap = event.swap
        # A0: whatever was unknown before, this one came after it.
        assert swap.in_sync is not None
        found = "no" if state.handing == "unknown" else state.handing
        state = change(
            state,
            epoch=swap.epoch,
            primary=swap.primary,
            in_sync=swap.in_sync,
            expanding="no",
            handing=found,
            paused=event.paused,
            latched=event.latched,
        )
    handler = TABLE.get((state.phase, type(event)))
    done = stay(state) if handler is None else handler(state, event, now)
    return abdication.settle(handoff.settle(before, _alone_only_without_peer(done), now), now)


# --- pieces of decisions


def _alone_only_without_peer(done: Step) -> Step:
    if done.state.phase is Phase.ALONE and done.state.peer_in_sync:
        # A1, whatever led here: nobody but this node takes the peer in, and it answers writes that the peer lacks.
        shrunk = shrink(done.state, done.sentence)
        return Step(shrunk.state, (*done.actions, *shrunk.actions), shrunk.sentence)
    return done


def _lost_role(state: State, event: RecordChanged) -> Step:
    was = state.role
    changed = change(
        state,
        phase=Phase.SECONDARY,
        epoch=event.epoch,
        primary=event.primary,
        in_sync=event.in_sync,
        deadline_ns=None,
        draining=False,
        releasing=False,
        raising=False,
        answering=False,
        handing="no",
        redirecting=False,
    )
    message = f"{event.primary or 'nobody'} is primary of epoch {event.epoch} now, not {state.me}"
    actions: tuple[Action, ...] = (Answer(WRONG_ROLE, message),) if state.answering else ()
    if was == "primary":
        actions = (*actions, HangUp(), DropLink("the roles changed"))
    return Step(changed, actions, message)


# --- handlers


def _started(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, Started)
    crashed = event.was_primary and not event.clean
    state = change(
        state,
        epoch=event.epoch,
        primary=event.primary,
        in_sync=event.in_sync,
        crashed=crashed,
        boot_lost=event.boot_lost,
    )
    if event.primary != state.me:
        if event.obstacle is None:
            state = watch(change(state, bound_until_ns=now + event.wait_ns), now + event.wait_ns)
        return stay(state, f"{state.me} starts as secondary of epoch {event.epoch}")
    if event.obstacle is not None:
        return stay(state, f"{state.me} was primary and does not take the role back: {event.obstacle}")
    if event.boot_lost and state.peer_in_sync:
        return stay(
            state,
            f"{state.me} was primary and lost its boot; {state.peer} was in sync and may hold what was lost, so "
            f"{state.me} does not take the role back by itself",
        )
    return Step(
        change(state, phase=Phase.RETURNING, deadline_ns=now + event.wait_ns),
        (),
        f"{state.me} was primary of epoch {event.epoch}; it looks for {state.peer} for {event.wait_ns / 1e9:.2f} s",
    )


def _returning_meets(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, PeerUp | PeerSaid)
    state = _note_peer(state, event, now)
    if state.peer_role == "primary":
        return give_way(state)
    if isinstance(event, PeerSaid):
        return stay(state)
    return readopt(state, f"it was primary and {state.peer} is secondary")


def _returning_waited(state: State, _event: Event, now: int) -> Step:
    if state.deadline_ns is None or now < state.deadline_ns:
        return stay(state)
    if state.peer_up:
        return give_way(state) if state.peer_role == "primary" else readopt(state, f"{state.peer} is secondary")
    if state.sole:
        return readopt(state, f"it was primary, is the only one in sync, and {state.peer} is not there")
    if state.survivor == "secondary":
        return stay(
            change(state, deadline_ns=None),
            f"{state.me} was primary; {state.peer} may have taken over in silence, so it is waited for",
        )
    if not state.crashed:
        return stay(
            change(state, phase=Phase.SECONDARY, deadline_ns=None),
            f"{state.me} stopped cleanly while {state.peer} was in sync, and {state.peer} may have been promoted "
            f"since: {state.me} does not take the role back alone",
        )
    return readopt(state, f"it was primary and {state.peer} is not there")


def _note_peer(state: State, event: PeerUp | PeerSaid, now: int) -> State:
    if state.peer_left and isinstance(event, PeerSaid):
        # A beat behind the farewell says nothing new: only a new session makes the peer one that has not left.
        return change(state, last_heard_ns=now)
    return change(state, peer_up=True, peer_role=event.role, peer_epoch=event.epoch, peer_left=False, last_heard_ns=now)


def _peer_up(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, PeerUp | PeerSaid)
    return stay(
        watch(_note_peer(state, event, now), now + state.suspect_ns),
        f"{state.peer} is there: {event.role} of epoch {event.epoch}",
    )


def _forget_peer(state: State, event: PeerDown) -> State:
    return change(
        state,
        peer_up=False,
        peer_role=None,
        last_heard_ns=event.last_heard_ns,
        bound_until_ns=max(state.bound_until_ns if not state.peer_left else 0, event.bound_until_ns),
    )


def _peer_down(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, PeerDown)
    was = state.linked
    drop = (DropLink(event.why),) if was else ()
    gone = change(_forget_peer(state, event), linked=False, equal=False)
    return Step(watch(gone, max(now, event.bound_until_ns)), drop, event.why)


def _primary_loses_peer(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, PeerDown)
    was = state.linked
    state = _forget_peer(state, event)
    if not was:
        return stay(state, event.why)
    lost = lose_link(state, now, event.why)
    return Step(lost.state, (DropLink(event.why), *lost.actions), lost.sentence)


def _peer_left(state: State, _event: Event, now: int) -> Step:
    """The session goes on until its connection ends; the promise to it is void (A11)."""
    state = change(state, peer_left=True, peer_role="secondary")
    why = f"{state.peer} stops gracefully"
    if state.phase not in PRIMARY:
        return Step(change(state, linked=False, equal=False), (DropLink(why),), why)
    if state.phase in (Phase.ALONE, Phase.SHRINKING):
        return Step(change(state, linked=False, equal=False), (DropLink(why),), why)
    lost = lose_link(state, now, why)
    return Step(lost.state, (DropLink(why), *lost.actions), lost.sentence)


def _link_up(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, LinkUp)
    return stay(change(state, linked=True, whole=event.source), f"{state.me} and {state.peer} are linked")


def _primary_link_up(state: State, _event: Event, _now: int) -> Step:
    return pair_up(state, f"{state.peer} is linked: writes go to both")


def _shrinking_link_up(state: State, _event: Event, _now: int) -> Step:
    """The swap is on its way and may have happened: until its outcome is known nothing is answered alone."""
    return stay(change(state, linked=True), f"{state.peer} is linked again while it is being taken out of the set")


def _link_lost(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, LinkLost)
    return stay(change(state, linked=False, equal=False), event.why)


def _primary_link_lost(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, LinkLost)
    return lose_link(state, now, event.why, event.last_heard_ns)


def _waited(state: State, _event: Event, now: int) -> Step:
    if state.deadline_ns is None or now < state.deadline_ns:
        return stay(state)
    if state.releasing:
        return stay(change(state, deadline_ns=now + state.retry_ns), f"{state.me} is giving the role up")
    why = f"{state.peer} did not come back"
    if not state.peer_in_sync:
        return go_alone(state, f"{why}; {state.me} goes on alone")
    if state.survivor == "secondary" and not state.peer_left:
        return stay(
            change(state, phase=Phase.FROZEN, deadline_ns=None),
            f'{why}, and survivor = "secondary": {state.me} answers nothing until it is back',
        )
    return shrink(state, why)


def _waiting_for_the_dead(state: State, event: Event, now: int) -> Step:
    """The standby's process is proven to have ended: it does not come back within the time that writes wait for it."""
    assert isinstance(event, PeerDied)
    if not event.gone or state.peer_up:
        return stay(state, event.why)
    done = _waited(change(state, deadline_ns=now), event, now)
    return done._replace(sentence=f"{event.why}: {done.sentence}")


def _synced(state: State, event: Event, _now: int) -> Step:
    assert isinstance(event, Synced)
    return expand(change(state, crashed=False, boot_lost=False, equal=True), anew=not event.known)


def _caught_up(state: State, _event: Event, _now: int) -> Step:
    changed = change(state, crashed=False, boot_lost=False, whole=state.linked)
    return stay(changed, f"{state.me} has the same data as {state.peer}")


def _record_changed(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, RecordChanged)
    changed = change(
        state,
        epoch=event.epoch,
        primary=event.primary,
        in_sync=event.in_sync,
        paused=event.paused,
        latched=event.latched,
        equal=state.equal and event.epoch == state.epoch,
        released=state.released and event.primary == state.me,
    )
    sentence = (
        f"the record says: {event.primary or 'nobody'} is primary of epoch {event.epoch}, "
        f"in sync: {', '.join(event.in_sync) or 'nobody'}"
    )
    if state.arbitrated:
        if changed.phase is Phase.ACQUIRING and changed.deadline_ns is not None and overtaken(changed):
            changed = change(changed, phase=Phase.SECONDARY, asked=None)  # whatever was on its way is too late now
        if event.primary == state.me and event.epoch > state.peer_epoch and changed.peer_role == "primary":
            changed = change(changed, peer_role="secondary")  # it has handed over; its next beat will say so
        if changed.phase is Phase.SECONDARY and event.primary == state.me:
            done = take_back(changed)
            return done if done.actions else stay(watch(done.state, now + state.suspect_ns), done.sentence)
        if (begun := bootstrap(changed)) is not None:
            return begun
        at = now + state.suspect_ns if changed.peer_up else max(now, changed.bound_until_ns)
        return stay(watch(changed, at), sentence)
    # The peer's own swap comes here before its next heartbeat does.
    theirs: RoleName | None = "primary" if event.primary == state.peer else "secondary"
    return stay(change(changed, peer_role=theirs if state.peer_up else None), sentence)


def _primary_record_changed(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, RecordChanged)
    if event.primary != state.me:
        lost = _lost_role(state, event)
        return lost._replace(state=watch(lost.state, max(now + state.suspect_ns, state.bound_until_ns)))
    changed = _record_changed(state, event, now)
    if event.epoch > state.epoch:  # a raise of which nothing was known has landed
        return new_epoch(changed.state, now)
    if changed.state.arbitrated and changed.state.phase is Phase.PAIRED:
        expanded = expand(changed.state)  # a shrink of which nothing was known may have landed
        return Step(expanded.state, expanded.actions, changed.sentence)
    return changed


def _returning_record_changed(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, RecordChanged)
    if event.primary != state.me:
        return _lost_role(state, event)
    return _record_changed(state, event, now)


def _swapped_acquiring(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, Swapped)
    if event.swap.purpose not in ACQUISITIONS:
        return _swapped(state, event, now)  # of one that was asked for before
    answered = state.answering
    state = change(state, answering=False)
    if not event.ok and event.unknown and state.arbitrated and not overtaken(state):
        # A0, A13: it may still land. Nothing is promised until that is over, and no link is made.
        message = f"{state.me} may become primary or not: {event.why}"
        actions = (Answer(event.code, message),) if answered else ()
        return Step(change(state, deadline_ns=now + state.suspect_ns), actions, message)
    state = change(state, asked=None)
    if not event.ok:
        back = Phase.RETURNING if event.swap.purpose == "readopt" and not state.arbitrated else Phase.SECONDARY
        deadline = now + state.retry_ns if back is Phase.RETURNING else None
        message = f"{state.me} did not become primary: {event.why}"
        actions = (Answer(event.code, message),) if answered else ()
        again = watch(change(state, phase=back, deadline_ns=deadline), now + state.suspect_ns)
        return Step(again, actions, message)
    state = change(state, crashed=False, boot_lost=False, alone_began=False)
    message = f"{state.me} is primary of epoch {state.epoch}"
    answer: tuple[Action, ...] = (Answer(0, message),) if answered else ()
    if state.peer_up:
        # A new session, in which this end is the source.
        waiting = change(state, phase=Phase.WAITING, linked=False, equal=False, deadline_ns=now + state.suspect_ns)
        return Step(waiting, (*answer, DropLink("the roles changed")), message)
    alone = go_alone(state, message) if not state.peer_in_sync else lose_link(state, now, message)
    return Step(alone.state, (*answer, *alone.actions), alone.sentence)


def _swapped_shrinking(state: State, event: Event, now: int) -> Step:
    assert isinstance(event, Swapped)
    if event.swap.purpose != "shrink":
        return _swapped(state, event, now)  # of one that was asked for before
    if not event.ok:
        if event.unknown and state.arbitrated:
            # A0: it may still land. The peer is required, and the swap that takes it in again, or out, decides.
            state = change(state, in_sync=(state.me,), expanding="unknown")
            if state.linked:
                again = expand(pair_up(state, "").state)
                sentence = f"{state.peer} is linked, and may or may not be in the set ({event.why})"
                return Step(again.state, again.actions, sentence)
        waiting = change(state, phase=Phase.WAITING, deadline_ns=now + state.retry_ns)
        if state.linked:
            return pair_up(state, f"{state.peer} stays in the set ({event.why}) and is linked")
        return Step(waiting, (), f"{state.peer} could not be taken out of the set: {event.why}; again soon")
    message = f"{state.me} goes on alone in epoch {state.epoch}"
    answer = (Answer(0, message),) if state.answering else ()
    state = change(state, answering=False)
    if state.linked:
        linked = pair_up(state, f"{state.peer} is out of the set and linked: it enters again when it has everything")
        again = expand(linked.state)
        return Step(again.state, (*answer, *again.actions), linked.sentence)
    alone = go_alone(state, message)
    return Step(alone.state, answer, alone.sentence)


def _swapped(state: State, event: Event, now: int) -> Step:
    """Of an expand, a release, or a raise."""
    assert isinstance(event, Swapped)
    if event.swap.purpose == "raise":
        return raised(state, event, now)
    if event.swap.purpose in ("handoff", "abdicate", "hold"):
        return handoff.swapped(state, event, now)
    if event.swap.purpose == "expand" and not event.ok:
        changed = change(state, expanding="unknown" if event.unknown or state.expanding == "unknown" else "no")
        if changed.linked and changed.equal and changed.deadline_ns is None:
            changed = change(changed, deadline_ns=now + state.retry_ns)
        return stay(_watching(changed, now), f"{state.peer} is not known to be in the set: {event.why}")
    if event.swap.purpose != "release":
        if (begun := bootstrap(state)) is not None:
            return begun
        return stay(_watching(state, now), f"the in-sync set is {', '.join(state.in_sync)}")
    answered = state.answering
    if not event.ok and not event.unknown:
        message = f"{state.me} stays primary: {event.why}"
        return Step(
            change(state, releasing=False, draining=False, answering=False),
            (Answer(FAILED, message),) if answered else (),
            message,
        )
    # A0: if it is not known, the peer may be primary next. No client is left, so nothing is lost by leaving.
    message = f"{state.me} is secondary: it gave the role up in epoch {state.epoch}"
    unsure = event.unknown and state.arbitrated
    if event.unknown:
        where = "the register" if unsure else state.peer
        message += f", which {where} may not know: {event.why}"
    changed = change(
        state,
        phase=Phase.SECONDARY,
        releasing=False,
        draining=False,
        answering=False,
        deadline_ns=None,
        linked=False,
        equal=False,
        released=unsure,
    )
    code = FAILED if unsure else 0
    return Step(changed, (*((Answer(code, message),) if answered else ()), DropLink("the roles changed")), message)


def _watching(state: State, now: int) -> State:
    """Whoever asked for an expand without being primary did not look meanwhile whether there is a role to be taken."""
    return watch(state, now + state.suspect_ns) if state.deadline_ns is None else state


def _generation(state: State, _event: Event, _now: int) -> Step:
    return stay(change(state, alone_began=True), f"{state.me} writes a generation of its own")


def _stop(state: State, _event: Event, _now: int) -> Step:
    """A18. A primary drains first; what follows is the node's business, in order."""
    if state.phase in PRIMARY:
        # While the role is given away nothing is answered, so nobody is waited for.
        away = (HangUp(),) if mode_of(state) is Mode.NONE else ()
        changed = change(state, stopping=True, draining=True)
        return Step(changed, (*away, Drain()), f"{state.me} stops: clients drain")
    return stay(change(state, stopping=True), f"{state.me} stops")


def _table() -> dict[tuple[Phase, type[Event]], Callable[[State, Event, int], Step]]:
    found: dict[tuple[Phase, type[Event]], Callable[[State, Event, int], Step]] = {}

    def put(phases: frozenset[Phase], event: type[Event], handler: Callable[[State, Event, int], Step]) -> None:
        for phase in phases:
            assert (phase, event) not in found
            found[phase, event] = handler

    def only(*phases: Phase) -> frozenset[Phase]:
        return frozenset(phases)

    every = frozenset(Phase)
    idle = every - PRIMARY
    held = only(Phase.WAITING, Phase.ALONE, Phase.FROZEN)
    put(only(Phase.SECONDARY), Started, _started)
    put(only(Phase.RETURNING), PeerUp, _returning_meets)
    put(every - only(Phase.RETURNING), PeerUp, _peer_up)
    put(only(Phase.RETURNING), PeerSaid, _returning_meets)
    put(every - only(Phase.RETURNING), PeerSaid, _peer_up)
    put(idle, PeerDown, _peer_down)
    put(only(Phase.PAIRED), PeerDown, _primary_loses_peer)
    put(only(Phase.WAITING, Phase.SHRINKING, Phase.ALONE, Phase.FROZEN), PeerDown, _peer_down)
    put(only(Phase.WAITING), PeerDied, _waiting_for_the_dead)
    put(every - only(Phase.WAITING), PeerDied, peer_died)
    put(every, PeerLeft, _peer_left)
    put(idle, LinkUp, _link_up)
    put(only(Phase.SHRINKING), LinkUp, _shrinking_link_up)
    put(held | only(Phase.PAIRED), LinkUp, _primary_link_up)
    put(idle | held | only(Phase.SHRINKING), LinkLost, _link_lost)
    put(only(Phase.PAIRED), LinkLost, _primary_link_lost)
    put(only(Phase.WAITING), Tick, _waited)
    put(only(Phase.RETURNING), Tick, _returning_waited)
    put(every, Synced, _synced)
    put(only(Phase.SECONDARY), Tick, secondary_tick)
    put(only(Phase.PAIRED), Tick, handoff.paired_tick)
    put(only(Phase.ACQUIRING), Tick, acquire_again)
    put(PRIMARY, PeerFloor, peer_floor)
    put(every, CaughtUp, _caught_up)
    put(only(Phase.SECONDARY, Phase.ACQUIRING), RecordChanged, _record_changed)
    put(only(Phase.RETURNING), RecordChanged, _returning_record_changed)
    put(PRIMARY, RecordChanged, _primary_record_changed)
    put(only(Phase.SECONDARY, Phase.RETURNING), Promote, rolecommands.promote)
    put(only(Phase.ACQUIRING), Promote, rolecommands.busy)
    put(PRIMARY - only(Phase.FROZEN), Promote, rolecommands.promote_primary)
    put(only(Phase.FROZEN), Promote, rolecommands.promote_frozen)
    put(only(Phase.ACQUIRING), Swapped, _swapped_acquiring)
    put(only(Phase.SHRINKING), Swapped, _swapped_shrinking)
    put(every - only(Phase.ACQUIRING, Phase.SHRINKING), Swapped, _swapped)
    put(only(Phase.SECONDARY), Demote, rolecommands.demote_secondary)
    put(only(Phase.RETURNING), Demote, rolecommands.demote_returning)
    put(only(Phase.ACQUIRING), Demote, rolecommands.busy)
    put(PRIMARY, Demote, rolecommands.demote)
    put(PRIMARY, Drained, rolecommands.drained)
    put(PRIMARY, Handoff, handoff.asked)
    put(idle, Handoff, handoff.asked_elsewhere)
    put(PRIMARY, Quiet, handoff.quiet)
    put(only(Phase.ALONE), GenerationBegan, _generation)
    put(every, DiskFailed, abdication.disk_failed)
    put(every, DiskWell, abdication.disk_well)
    put(every, Stop, _stop)
    return found


TABLE = _table()
"""(phase, kind of event) -> handler; what is not here changes nothing"""
