"""One node in the simulation: what survives its process, and the process around the product's role machine.

Rules:
- What decides is the product's: `roles.step`, `roles.mode_of`, `swaprules.objection`, `successor.successor`,
  `liveness.Beats`, `Promises` and `Hearing`, `proofs.Lives`. What is played here is what the daemon does around them
  (nodecore.py, nodepeer.py, noderegister.py, node.py), in steps that anything may come between.
- What the daemon makes durable before something follows from it is an attribute that `start` does not touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mirrorpair import roles
from mirrorpair.abdication import cover_of
from mirrorpair.arbiter import Incarnation, Versioned
from mirrorpair.liveness import Beats, Hearing, Promises
from mirrorpair.proofs import Life, Lives
from mirrorpair.rolewords import (
    ACQUISITIONS,
    Cover,
    Drain,
    Drained,
    DropLink,
    Event,
    Forgive,
    HangUp,
    LinkLost,
    Mode,
    PauseClients,
    PeerDied,
    PeerDown,
    Phase,
    Quiet,
    RecordChanged,
    ResumeClients,
    Started,
    State,
    Swap,
    Swapped,
)
from mirrorpair.successor import Author, successor
from mirrorpair.swaprules import Read, objection
from mirrorpair.testing.disk import Disk
from mirrorpair.testing.words import FAILBACK_NS, RHO, TIMING, Attempt, Flight, S

if TYPE_CHECKING:
    from mirrorpair.testing.world import World

UNREACHED = "the witness does not answer"


class Machine:
    def __init__(self, world: World, name: str, peer: str) -> None:
        self.world, self.name, self.peer = world, name, peer
        self.rate = 1.0 + world.rng.uniform(-RHO, RHO) / 2
        self.up = False
        self.frozen_until = 0
        self.boots = 0
        """how often its host lost power"""
        self.anew()
        self.start()

    def anew(self) -> None:
        """As `init` makes it: blank."""
        self.incarnation = Incarnation(id=f"{next(self.world.numbers):x}", n=0)
        self.disk = Disk()
        self.epoch = self.floor = 0
        self.seen = (0, 0)
        """the newest record (F17)"""
        self.was_primary, self.clean, self.boot_lost = False, True, False
        self.pair_uuid = ""

    def clock(self) -> int:
        return int(self.world.now * self.rate) + 10**12

    @property
    def other(self) -> Machine:
        return self.world.node[self.peer]

    @property
    def awake(self) -> bool:
        return self.up and self.world.now >= self.frozen_until

    @property
    def bound_until(self) -> int:
        return self.promised.bound_until_ns

    @property
    def settled(self) -> bool:
        return not (self.state.crashed or self.state.boot_lost)

    @property
    def obstacle(self) -> str | None:
        return "failed" if self.disk.failed else self.disk.obstacle

    @property
    def serving(self) -> bool:
        """Clients are there, and are read."""
        state = self.state
        if state.role != "primary" or self.paused_clients or state.draining:
            return False
        return not self.disk.failed or Cover.HOLD in self.cover

    @property
    def cover(self) -> Cover:
        """A14."""
        return cover_of(self.state)

    def start(self) -> None:
        self.state = State(
            me=self.name,
            peer=self.peer,
            survivor="primary",
            arbitrated=True,
            suspect_ns=TIMING.suspect_ns,
            retry_ns=TIMING.interval_ns,
            failback_ns=FAILBACK_NS if self.world.prefer == self.peer else None,
            preferred=self.world.prefer == self.name,
        )
        self.up = True
        self.disk.failed = False
        self.disk.parted()
        self.paused_clients = self.pausing = False
        self.flying: dict[int, Flight] = {}
        self.attached: int | None = None
        """the data link at this end"""
        self.wants_generation = False
        """writes are held until new ids are durable (G2)"""
        self.facts_version = 0
        """what a handshake was begun with is not true any more when this has changed"""
        self.survivor = False
        """its peer was lost as a connected primary (F18)"""
        self.inbox: list[Event] = []
        self.attempts: list[Attempt] = []
        self.process = f"{next(self.world.numbers):x}"
        self.sessions: list[Life] = []
        """what its sentinel was told"""
        self.lives = Lives()
        self.version = (0, 0)
        """of the record that the state is made of"""
        self.members: dict[str, Incarnation] = {}
        self.beats = Beats(TIMING)
        self.hearing = Hearing(TIMING)
        self.promised = Promises(TIMING, self.clock())
        self.session: int | None = None
        self.equal_in: int | None = None
        """the session in which the peer was found equal, and who that was (A8)"""
        self.equal: Incarnation | None = None
        self.peer_leaves = False
        self.stopping = self.drained = self.durable = self.quiet = self.told = False
        self.look = True
        self.step(
            Started(
                epoch=self.epoch,
                primary=None,
                in_sync=(),
                was_primary=self.was_primary,
                clean=self.clean,
                boot_lost=self.boot_lost,
                wait_ns=max(0, self.bound_until - self.clock()),
                obstacle=self.obstacle,
            )
        )
        if self.settled:
            self.was_primary = False
        self.clean = False

    # --- events and actions

    def step(self, event: Event) -> None:
        if self.quiet and not isinstance(event, RecordChanged):
            return
        before = self.state
        if isinstance(event, LinkLost | PeerDown):
            self.detach()
        step = roles.step(before, event, self.clock())
        self.state = step.state
        self.world.say(f"{self.name}: {type(event).__name__}: {step.sentence} [{step.state.phase.value}]")
        after = step.state
        if step.actions or _facts(before) != _facts(after):
            self.facts_version += 1
        if any(isinstance(action, Forgive) for action in step.actions):
            self.world.mirror.forgive(self)
        if before.role != after.role:
            self.role_changed()
        if Cover.HOLD not in self.cover and roles.mode_of(after) is not Mode.NONE:
            self.flying = {block: one for block, one in self.flying.items() if not one.lost}  # their clients are told
        for action in step.actions:
            if isinstance(action, Swap):
                self.attempts.append(Attempt(action, self.equal_in, self.equal))
            elif isinstance(action, PauseClients):
                self.paused_clients = self.pausing = True
            elif isinstance(action, ResumeClients | HangUp):
                self.paused_clients = self.pausing = False
            elif isinstance(action, DropLink):
                self.detach()
                self.world.mirror.cut("dropped on purpose", lost=False)
            elif isinstance(action, Drain):
                self.durable = self.world.mirror.flush(self)
                self.drained = True
                self.inbox.append(Drained())

    def role_changed(self) -> None:
        if self.state.role == "primary":
            self.world.acquisitions += 1
        self.flying = {}  # nobody is left who waits for them

    def detach(self) -> None:
        """Of the engine: what is in flight is sent again in the next link, or completes alone (A6)."""
        if self.attached is not None:
            self.attached = None
            self.disk.parted()
            self.flying = {
                block: one if one.lost and one.there else one._replace(there=False)
                for block, one in self.flying.items()
            }

    def work_off(self) -> None:
        while self.inbox:
            self.step(self.inbox.pop(0))

    def go_quiet(self) -> None:
        """Once nothing is in flight, all is made durable on both (handoff.py); or that took too long."""
        if not self.pausing:
            return
        world = self.world
        slow = world.faults and world.rng.random() < 0.1
        if slow or world.mirror.flush(self):
            self.pausing = False
            self.inbox.append(Quiet("too slow" if slow else ""))
        elif world.rng.random() < 0.1:
            self.pausing = False
            self.inbox.append(Quiet("the link is lost"))

    # --- what it may do

    def valid(self) -> bool:
        return not roles.bounded(self.state) or self.clock() < self.beats.valid_until_ns

    def acknowledges(self) -> bool:
        """Whether an answer to a write could leave now."""
        mode = roles.mode_of(self.state)
        if mode is Mode.NONE or not self.awake or self.disk.failed or not self.valid():
            return False
        if mode is Mode.PEER:
            return self.world.mirror.carries(self)
        return mode is Mode.ALONE

    def granted(self) -> bool:
        return self.awake and roles.mode_of(self.state) is not Mode.NONE and self.valid()

    def serves_reads(self) -> bool:
        """From its own disk."""
        return self.granted() and not self.disk.failed

    def promises(self, epoch: int) -> bool:
        """To a primary of this epoch (A13; nodepeer.py)."""
        if self.state.role == "primary" or self.state.phase is Phase.ACQUIRING or self.peer_leaves:
            return False
        return epoch >= max(self.state.epoch, self.floor)

    def told_of_death(self, died: list[Life]) -> None:
        """As peersentinel.py and nodepeer.py."""
        proof = self.lives.prove(died)
        if not proof.fresh:
            return
        if proof.releases:
            self.promised.release(self.clock())
            self.world.released += 1
        if proof.gone:
            self.world.wire.cut("its process has ended")
        self.inbox.append(PeerDied(f"{self.peer} is dead", proof.gone, self.bound_until))

    # --- the register (noderegister.py)

    def stale(self, record: Versioned) -> bool:
        """F17 (witness/client.py)."""
        return (record.register.epoch, record.version) < self.seen

    def take(self, record: Versioned) -> None:
        r = record.register
        number = (r.epoch, record.version)
        if number == self.version:
            return
        self.learn(record)
        if self.settled:
            self.was_primary = r.primary == self.name and self.state.role == "primary"
        self.inbox.append(RecordChanged(r.epoch, r.primary, r.in_sync, r.pause, r.latched))

    def learn(self, record: Versioned) -> None:
        self.version = (record.register.epoch, record.version)
        self.seen = max(self.seen, self.version)
        self.members = record.register.members
        self.epoch = max(self.epoch, record.register.epoch)
        self.floor = max(self.floor, self.epoch)

    def ask(self) -> None:
        """One more try of the swap that is due, or a look."""
        world = self.world
        witness = world.witness
        reached = witness.up and world.way[self.name]
        record = witness.record
        if not self.attempts:
            if self.look and reached and not self.stale(record):
                self.look = False
                self.take(record)
            return
        attempt = self.attempts[0]
        if (why := self._prevented(attempt, reached=reached)) is not None:
            self.end(False, why)
            return
        action = attempt.action
        if self.stale(record) and not action.overrides:
            self.end(False, "the record is not believed")
            return
        if (reason := objection(action, self.name, self._read(attempt, record))) is not None:
            self.take(record)
            attempt.unknown = attempt.unknown and record.version <= attempt.tried
            self.end(False, reason)
            return
        if action.purpose != "abdicate":  # A14
            self.floor = max(self.floor, action.epoch)
        self._send(attempt, record)

    def _prevented(self, attempt: Attempt, *, reached: bool) -> str | None:
        action = attempt.action
        acquires = action.purpose in ACQUISITIONS
        attempt.tries += 1
        if attempt.tries == 1 and acquires:
            if (obstacle := self.obstacle) is not None:
                return obstacle
            self.disk.flush()  # W8
        if action.purpose in ("expand", "handoff", "abdicate") and (
            self.session is None or self.session != attempt.session
        ):
            return f"{self.peer} is not connected any more"
        if attempt.tries > self.world.attempts or not reached or (acquires and self.stopping):
            return UNREACHED
        return None

    def _read(self, attempt: Attempt, record: Versioned) -> Read:
        old = record.register
        member = old.members.get(self.name)
        return Read(
            old.epoch,
            old.primary,
            old.in_sync,
            pause=old.pause,
            known=member is None or member == self.incarnation,
            boot_lost=self.state.boot_lost,
            bound=self.clock() < self.bound_until,
            own=old.writer is not None and old.writer.node == self.name and old.writer.nonce in attempt.nonces,
            latched=old.latched,
        )

    def _send(self, attempt: Attempt, record: Versioned) -> None:
        world, action = self.world, attempt.action
        nonce = next(world.nonces)
        attempt.nonces.add(nonce)
        attempt.tried = record.version
        if action.purpose in ("promote", "readopt") or (action.purpose == "handoff" and not action.unasked):
            world.asked.add(nonce)
        if action.unasked and action.purpose != "abdicate":
            world.unasked.add(nonce)
        if action.overrides and action.purpose == "promote":
            world.overriding.add(nonce)
        author = Author(
            node=self.name,
            incarnation=self.incarnation,
            peer=self.peer,
            equal=attempt.equal,
            pair_uuid=self.pair_uuid,
            mode="sync",
            cap=world.cap,
        )
        believed = not self.stale(record)
        new = successor(record.register, action, author, believed=believed, now_s=world.now // S + 1, nonce=nonce)
        fate = world.rng.choices(("done", "request lost", "reply lost", "late"), world.fates)[0]
        if not world.faults:
            fate = "done"
        if fate == "done":
            told = action.purpose in ACQUISITIONS and self.boot_lost and record.register.in_sync == (self.name,)
            if told:
                world.checks.boot_told(self)
            if not world.witness.cas(record.version, new):
                return
            self.learn(Versioned(version=record.version + 1, register=new))
            if action.purpose in ACQUISITIONS:
                self.was_primary, self.boot_lost = True, False
            elif action.purpose in ("release", "handoff", "abdicate") and self.settled:
                self.was_primary = False
            attempt.pause, attempt.latched = new.pause, new.latched
            attempt.action = msgspec.structs.replace(action, in_sync=new.in_sync)
            self.end(True)
            return
        attempt.unknown = True
        if fate == "reply lost":
            world.witness.cas(record.version, new)
        elif fate == "late":
            world.witness.late.append((record.version, new))

    def end(self, ok: bool, why: str = "") -> None:
        attempt = self.attempts.pop(0)
        unknown = attempt.unknown and not ok
        self.inbox.append(
            Swapped(
                attempt.action,
                ok,
                why,
                unknown=unknown,
                paused=ok and attempt.pause,
                latched=ok and attempt.latched,
            )
        )


def _facts(state: State) -> tuple[object, ...]:
    return state.role, state.phase, state.epoch, state.in_sync, state.linked
