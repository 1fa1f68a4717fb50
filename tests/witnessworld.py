"""Two role machines, a witness, clients and a seed: what an arbitrated pair may go through, without I/O and time.

The machines are the product's (`roles.step`, `swaprules.objection`, `arbiter.check_successor`); what is played here is
what lies around them: a wire and a data link that break apart or together; a witness that is away for one or both,
loses a request, loses a reply, or does a swap late, also after its sender has died; handoffs, asked for or by
themselves to a preferred node, and a pair that is paused; promises and their ends; clocks
that drift by up to rho and stand still; crashes of daemons; one lost boot at a time; disks in the middle of a resync.
A crash of a daemon may be proven by its sentinel (`proofs.Lives`): at once, late, more than once, when a later process
of the node has begun, or never. The end of a host is not.

What is checked (AssertionError, with the last steps):
- I3 Two nodes never acknowledge at the same moment. I1 Whoever serves reads has every acknowledged write.
- I4 Who becomes primary has every acknowledged write and no half-copied disk.
- A19 Nobody takes over, and nobody is handed the role unasked, while the record says that the pair is paused.
- I8 Once nothing fails any more, one node serves and both are in sync, within a bound of turns; its clients are not
  paused, and where a node is preferred it is that one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec

from mirrorpair import roles
from mirrorpair.arbiter import Register, Versioned, Writer, check_successor
from mirrorpair.handoff import obstacle
from mirrorpair.proofs import Life, Lives
from mirrorpair.rolewords import (
    ACQUISITIONS,
    CaughtUp,
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
    PauseClients,
    PeerDied,
    PeerDown,
    PeerFloor,
    PeerSaid,
    PeerUp,
    Phase,
    Promote,
    Quiet,
    RecordChanged,
    ResumeClients,
    Started,
    State,
    Swap,
    Swapped,
    Synced,
    Tick,
)
from mirrorpair.swaprules import Read, objection

if TYPE_CHECKING:
    import random

S = 10**9
SUSPECT = S
PROMISE = 3 * S
RHO = 0.01
DELTA = S // 10
ATTEMPTS = 5


class Attempt:
    """A swap that is being carried out."""

    def __init__(self, action: Swap, session: int) -> None:
        self.action = action
        self.nonces: set[int] = set()
        self.unknown = False
        self.tries = 0
        self.tried = -1
        """the highest version that it was sent on"""
        self.session = session
        self.pause = False


class Witness:
    def __init__(self, world: World) -> None:
        self.world = world
        self.record = Versioned()
        self.up = True
        self.late: list[tuple[int, Register]] = []
        """swaps that are still on their way"""

    def cas(self, version: int, new: Register, *, late: bool = False) -> bool:
        if version != self.record.version or check_successor(self.record.register, new) is not None:
            return False
        before = self.record.register.primary
        self.world.say(f"witness: epoch {new.epoch}, {new.primary}, {new.in_sync}")
        if before is not None and new.primary not in (None, before):
            self.world.changes += 1
            assert not new.pause or (new.writer and new.writer.nonce in self.world.wanted), "A19: changed in a pause"
        raised = new.epoch > self.record.register.epoch
        self.record = Versioned(version=version + 1, register=new)
        if new.primary is not None and raised:
            self.world.named(new.primary, late=late)
        return True


class Machine:
    """One node: what survives a crash, and the process."""

    def __init__(self, world: World, name: str, peer: str) -> None:
        self.world, self.name, self.peer = world, name, peer
        self.rate = 1.0 + world.rng.uniform(-RHO, RHO) / 2
        self.epoch = 0
        self.floor = 0
        self.data: set[int] = set()
        self.flushed: set[int] = set()
        self.sound = True
        self.was_primary, self.clean, self.boot_lost = False, True, False
        self.up = False
        self.start()

    def clock(self) -> int:
        return int(self.world.now * self.rate) + 10**12

    @property
    def other(self) -> Machine:
        return self.world.node[self.peer]

    def start(self) -> None:
        self.state = State(
            me=self.name,
            peer=self.peer,
            survivor="primary",
            arbitrated=True,
            suspect_ns=SUSPECT,
            retry_ns=S // 4,
            failback_ns=4 * S if self.world.prefer == self.peer else None,
            preferred=self.world.prefer == self.name,
        )
        self.paused_clients = False
        self.up = True
        self.inbox: list[Event] = []
        self.attempts: list[Attempt] = []
        self.process = f"{next(self.world.numbers):x}"
        self.sessions: list[Life] = []
        """what its sentinel was told"""
        self.lives = Lives()
        self.version = 0
        self.valid_until = 0
        self.bound_until = self.clock() + int(PROMISE * (1 + RHO))
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
                obstacle=None if self.sound else "inconsistent",
            )
        )

    def step(self, event: Event) -> None:
        before = self.state
        step = roles.step(before, event, self.clock())
        self.state = step.state
        self.world.say(f"{self.name}: {type(event).__name__}: {step.sentence} [{step.state.phase.value}]")
        if before.role != "primary" and self.state.role == "primary":
            self.world.acquisitions += 1
        for action in step.actions:
            if isinstance(action, Swap):
                self.attempts.append(Attempt(action, self.world.session))
            elif isinstance(action, PauseClients):
                self.paused_clients = True
                self.inbox.append(Quiet("too slow" if self.world.faults and self.world.rng.random() < 0.1 else ""))
                if self.world.link:
                    self.flushed, self.other.flushed = set(self.data), set(self.other.data)
            elif isinstance(action, ResumeClients | HangUp):
                self.paused_clients = False
            elif isinstance(action, DropLink):
                self.world.cut_link("dropped on purpose")
            elif isinstance(action, Drain):
                self.inbox.append(Drained())

    # --- what it may do

    def valid(self) -> bool:
        return not roles.bounded(self.state) or self.clock() < self.valid_until

    def acknowledges(self) -> bool:
        """Whether an answer to a write could leave now."""
        mode = roles.mode_of(self.state)
        if not self.up or mode is Mode.NONE or not self.valid():
            return False
        if mode is Mode.PEER:
            return self.world.link and self.world.source is self and self.state.linked and self.other.up
        return mode is Mode.ALONE

    def serves_reads(self) -> bool:
        return self.up and roles.mode_of(self.state) is not Mode.NONE and self.valid()

    def promises(self, epoch: int) -> bool:
        """To a primary of this epoch (A13; nodepeer.py)."""
        if self.state.role == "primary" or self.state.phase is Phase.ACQUIRING:
            return False
        return epoch >= max(self.state.epoch, self.floor)

    def told_of_death(self, died: list[Life]) -> None:
        """As peersentinel.py and nodepeer.py."""
        proof = self.lives.prove(died)
        if not proof.fresh:
            return
        if proof.releases:
            self.bound_until = min(self.bound_until, self.clock())
            self.world.released += 1
        if proof.gone:
            assert not self.world.wire, "who is proven to be dead is connected"
        self.inbox.append(PeerDied(f"{self.peer} is dead", proof.gone, self.bound_until))

    # --- the register

    def take(self, record: Versioned) -> None:
        if record.version == self.version:
            return
        self.version = record.version
        r = record.register
        self.epoch = max(self.epoch, r.epoch)
        self.floor = max(self.floor, self.epoch)
        self.inbox.append(RecordChanged(r.epoch, r.primary, r.in_sync, r.pause))

    def ask(self) -> None:
        """One more try of the swap that is due, or a look."""
        witness, rng = self.world.witness, self.world.rng
        reached = witness.up and self.world.way[self.name]
        if not self.attempts:
            if self.look and reached:
                self.look = False
                self.take(witness.record)
            return
        attempt = self.attempts[0]
        action = attempt.action
        attempt.tries += 1
        if attempt.tries == 1 and action.purpose in ACQUISITIONS:
            if not self.sound:
                self.end(False, "inconsistent")
                return
            self.flushed = set(self.data)
        if attempt.tries > self.world.attempts or not reached:
            self.end(False, "the witness does not answer")
            return
        if action.purpose in ("expand", "handoff") and (not self.world.wire or self.world.session != attempt.session):
            self.end(False, "the peer is not connected any more")
            return
        record = witness.record
        old = record.register
        read = Read(
            old.epoch,
            old.primary,
            old.in_sync,
            pause=old.pause,
            boot_lost=self.state.boot_lost,
            bound=self.clock() < self.bound_until,
            own=old.writer is not None and old.writer.node == self.name and old.writer.nonce in attempt.nonces,
        )
        if (reason := objection(action, self.name, read)) is not None:
            self.take(record)
            attempt.unknown = attempt.unknown and record.version <= attempt.tried
            self.end(False, reason)
            return
        self.floor = max(self.floor, action.epoch)
        nonce = next(self.world.nonces)
        attempt.nonces.add(nonce)
        attempt.tried = record.version
        if action.purpose in ("promote", "readopt") or (action.purpose == "handoff" and not action.unasked):
            self.world.wanted.add(nonce)
        new = msgspec.structs.replace(
            old,
            epoch=action.epoch,
            primary=action.primary,
            in_sync=old.in_sync if action.in_sync is None else action.in_sync,
            writer=Writer(node=self.name, nonce=nonce),
        )
        fate = rng.choices(["done", "request lost", "reply lost", "late"], self.world.fates)[0]
        if not self.world.faults:
            fate = "done"
        if fate == "done":
            if witness.cas(record.version, new):
                self.version = record.version + 1
                self.epoch = max(self.epoch, new.epoch)
                self.floor = max(self.floor, self.epoch)
                if action.purpose in ACQUISITIONS:
                    self.was_primary, self.clean, self.boot_lost = True, False, False
                elif action.purpose in ("release", "handoff"):
                    self.was_primary = False
                attempt.pause = new.pause
                attempt.action = msgspec.structs.replace(action, in_sync=new.in_sync)
                self.end(True)
            return
        attempt.unknown = True
        if fate == "reply lost":
            witness.cas(record.version, new)
        elif fate == "late":
            witness.late.append((record.version, new))

    def end(self, ok: bool, why: str = "") -> None:
        attempt = self.attempts.pop(0)
        unknown = attempt.unknown and not ok
        self.inbox.append(Swapped(attempt.action, ok, why, unknown=unknown, paused=ok and attempt.pause))


class World:
    """`sentinels`: there are some, so that crashes may be proven."""

    def __init__(self, rng: random.Random, *, sentinels: bool = False) -> None:
        self.rng = rng
        self.sentinels = sentinels
        self.now = 0
        self.faults = True
        self.wire = self.link = False
        self.broken_until = 0
        self.way = {"alpha": True, "beta": True}
        self.trace: list[str] = []
        self.acked: set[int] = set()
        self.nonces = itertools.count(1)
        self.numbers = itertools.count(1)
        self.told = False
        self.acquisitions = 0
        self.changes = 0
        self.wanted: set[int] = set()
        """attempts at a change that somebody asked for, or that takes a node's own role back"""
        self.session = 0
        bad = rng.choice([1, 1, 8])
        self.fates = [80, 5 * bad, 8 * bad, 7 * bad]
        """of a swap, in hundredths or so; of some worlds most come to nothing, or come late"""
        self.attempts = rng.choice([1, ATTEMPTS])
        self.storm = rng.choice([1, 0.2])
        self.prefer = rng.choice([None, "alpha", "beta"])
        self.proofs: list[tuple[Machine, list[Life]]] = []
        """reports of sentinels on their way to the peer of who died"""
        self.released = 0
        self.node: dict[str, Machine] = {}
        self.witness = Witness(self)
        for name, peer in (("alpha", "beta"), ("beta", "alpha")):
            self.node[name] = Machine(self, name, peer)
        self.source = self.node["alpha"]

    @property
    def machines(self) -> list[Machine]:
        return list(self.node.values())

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now / S:9.3f} {text}")

    # --- what must hold

    def named(self, name: str, *, late: bool) -> None:
        """I4, at the moment at which the register names it. Who lost its boot, or is in the middle of a resync, is
        named at most by a late swap from before that, and does not serve (A4, its disks)."""
        machine = self.node[name]
        if machine.boot_lost:
            return
        lost = self.acked - machine.data
        assert not lost, f"I4: {name} is named primary without {len(lost)} acknowledged writes"
        assert machine.sound or late, f"I4: {name} is named primary in the middle of a resync"

    def check(self) -> None:
        assert sum(machine.acknowledges() for machine in self.machines) <= 1, "I3: both acknowledge"
        for machine in self.machines:
            if machine.serves_reads():
                assert not self.acked - machine.data, f"I1: {machine.name} serves reads without what was acknowledged"

    # --- what lies around the machines

    def cut_link(self, why: str) -> None:
        if self.link:
            self.link = False
            for machine in self.machines:
                if machine.up:
                    machine.inbox.append(LinkLost(why))

    def cut_wire(self, why: str) -> None:
        """Both notice at a moment of their own: what is still in the inbox is what they have not noticed yet."""
        if self.wire:
            self.wire = False
            self.cut_link(why)
            for machine in self.machines:
                if machine.up:
                    machine.inbox.append(PeerDown(why, machine.clock(), machine.bound_until))

    def join_wire(self) -> None:
        if self.wire or self.now < self.broken_until:
            return
        if not all(machine.up and not machine.inbox for machine in self.machines):
            return
        self.wire = True
        self.session += 1
        for machine in self.machines:
            life = Life(machine.name, machine.process, f"{next(self.numbers):x}", ("", 0))
            machine.sessions.append(life)
            machine.other.lives.met = life
        said = [(machine.state.role, machine.state.epoch) for machine in self.machines]
        for machine, (role, epoch) in zip(self.machines, said[::-1], strict=True):
            machine.inbox.append(PeerUp(role, epoch))
            machine.look |= epoch > machine.state.epoch

    def beat(self, machine: Machine) -> None:
        """A heartbeat of this machine, its answer, and what it says."""
        other = machine.other
        if not self.wire or not machine.up or not other.up:
            return
        sent = machine.clock()
        state = machine.state
        if (other.state.peer_role, other.state.peer_epoch) != (state.role, state.epoch):
            other.inbox.append(PeerSaid(state.role, state.epoch))
        other.look |= state.epoch > other.state.epoch or machine.version > other.version
        if other.floor > state.epoch and state.role == "primary":
            # What the peer's own beat will tell.
            machine.inbox.append(PeerFloor(other.floor))
        if state.role != "primary" or not other.promises(state.epoch):
            return
        other.bound_until = max(other.bound_until, other.clock() + int(PROMISE * (1 + RHO)))
        other.lives.promised = other.lives.met
        if self.faults and self.rng.random() < 0.2:
            return  # the answer is lost
        self.now += self.rng.randrange(S // 100)
        machine.valid_until = max(machine.valid_until, sent + int(PROMISE * (1 - RHO)) - DELTA)

    def join_link(self) -> None:
        if self.link or not self.wire or any(machine.inbox or machine.attempts for machine in self.machines):
            return
        if len({machine.state.epoch for machine in self.machines}) > 1:
            return
        if any(machine.state.phase is Phase.ACQUIRING for machine in self.machines):
            return
        primaries = [one for one in self.machines if one.state.role == "primary"]
        if len(primaries) > 1:
            return
        # Without a primary: who kept its boot, then who has more (the table of the ids, in short).
        by_data = sorted(self.machines, key=lambda one: (one.sound, not one.boot_lost, len(one.data & self.acked)))
        source = primaries[0] if primaries else by_data[-1]
        if not source.sound or self.acked - source.data:
            return
        self.link, self.source = True, source
        if source.other.data != source.data or not source.other.sound:
            source.other.sound = False
        for machine in self.machines:
            machine.inbox.append(LinkUp(machine is source))
        self.told = False

    def resync(self) -> None:
        if not self.link or self.told or any(machine.inbox for machine in self.machines):
            return
        self.told = True  # once for each link, as the nodes do
        target = self.source.other
        target.data = set(self.source.data)
        target.flushed, target.sound = set(target.data), True
        for machine in self.machines:
            machine.was_primary = machine.state.role == "primary"
            machine.clean, machine.boot_lost = False, False
            machine.inbox.append(CaughtUp())
        self.source.inbox.append(Synced())

    def write(self) -> None:
        for machine in self.machines:
            if not machine.up or machine.state.role != "primary":
                continue
            if not machine.serves_reads() or machine.paused_clients:
                continue
            number = next(self.numbers)
            machine.data.add(number)
            if roles.mode_of(machine.state) is Mode.ALONE_FIRST:
                machine.inbox.append(GenerationBegan())
            elif machine.acknowledges():
                if roles.mode_of(machine.state) is Mode.PEER:
                    machine.other.data.add(number)
                self.acked.add(number)

    def crash(self, machine: Machine) -> None:
        if machine.up:
            machine.up = False
            self.cut_wire(f"{machine.name} is gone")

    def kill(self, machine: Machine) -> None:
        """The daemon alone dies; its sentinel lives, or not."""
        if machine.up and machine.sessions and self.rng.random() < 0.8:
            self.proofs.append((machine.other, machine.sessions[-8:]))
        self.crash(machine)

    def part(self) -> None:
        """A cut that lasts, for about as long as a promise."""
        self.cut_wire("cut")
        self.broken_until = self.now + self.rng.randrange(2 * PROMISE)

    def prove(self) -> None:
        """A report arrives, and may be sent once more."""
        if self.proofs:
            at = self.rng.randrange(len(self.proofs))
            machine, died = self.proofs[at]
            if self.rng.random() < 0.2:
                del self.proofs[at]
            if machine.up:
                machine.told_of_death(died)

    def power(self, machine: Machine) -> None:
        """Its host loses power, and with it what was never flushed; while the other one is a member that has it all."""
        other = machine.other
        members = self.witness.record.register.in_sync
        if not machine.up or not other.up or other.boot_lost or other.name not in members or not other.sound:
            return
        self.crash(machine)
        kept = {number for number in machine.data - machine.flushed if self.rng.random() < 0.5}
        machine.data = machine.flushed | kept
        machine.boot_lost = not machine.clean
        self.say(f"{machine.name} lost its boot")

    def turn(self) -> None:
        rng = self.rng
        machine = rng.choice(self.machines)
        kinds = {
            "event": 30,
            "ask": 14,
            "tick": 10,
            "beat": 25,
            "wire": 8,
            "link": 8,
            "resync": 6,
            "write": 15,
            "start": 4,
            "alone": 4,
            "idle": 0.3,
            "handoff": 2,
        }
        if self.faults:
            faults = {"late": 3, "cut": 1, "unlink": 1, "crash": 0.7, "power": 0.3, "person": 1, "pause": 0.3}
            faults |= {"witness": 0.6, "way": 0.8, "sleep": 1, "flush": 2}
            if self.sentinels:
                faults["proof"] = 4
            kinds |= {fault: weight * self.storm for fault, weight in faults.items()}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "event" and machine.up and machine.inbox:
            machine.step(machine.inbox.pop(0))
        elif kind == "ask" and machine.up:
            machine.ask()
        elif kind == "tick" and machine.up and machine.state.wake_ns is not None:
            if rng.random() < 0.5:
                self.now = max(self.now, int((machine.state.wake_ns - 10**12) / machine.rate) + 1)
            machine.step(Tick())
        elif kind == "beat":
            self.beat(machine)
        elif kind == "wire":
            self.join_wire()
        elif kind == "link":
            self.join_link()
        elif kind == "resync":
            self.resync()
        elif kind == "write":
            self.write()
        elif kind == "start" and not machine.up:
            machine.start()
        elif kind == "idle" or (kind == "alone" and machine.state.phase is Phase.ALONE):
            machine.look = True
        elif kind == "late" and self.witness.late:
            self.witness.cas(*self.witness.late.pop(rng.randrange(len(self.witness.late))), late=True)
        elif kind == "cut":
            self.cut_wire("cut")
        elif kind == "unlink":
            self.cut_link("flap")
        elif kind == "crash":
            if not self.sentinels:
                self.crash(machine)
            else:
                self.kill(machine)
                if rng.random() < 0.3:
                    self.prove()
        elif kind == "proof":
            self.prove()
        elif kind == "power":
            self.power(machine)
        elif kind == "flush" and self.link and not any(one.inbox for one in self.machines):
            for one in self.machines:
                one.flushed = set(one.data)
        elif kind == "person" and machine.up:
            machine.step(
                Promote(
                    accept_data_loss=False,
                    force=False,
                    obstacle=None if machine.sound else "inconsistent",
                    bound_until_ns=machine.bound_until,
                )
            )
        elif kind == "handoff" and machine.up and self.faults:
            machine.step(Handoff())
        elif kind == "pause":
            self.pause(paused=not self.witness.record.register.pause)
        elif kind == "witness":
            self.witness.up = not self.witness.up
        elif kind == "way":
            self.way[machine.name] = not self.way[machine.name]
        elif kind == "sleep":
            self.now += rng.randrange(5 * S)  # all of it: a machine that stands still, answers that are late
        self.now += rng.randrange(S // 50)
        self.check()

    def pause(self, *, paused: bool) -> None:
        """By a person; what the swap is made from is read and written at once."""
        record = self.witness.record
        if record.version:
            self.witness.cas(record.version, msgspec.structs.replace(record.register, pause=paused, writer=None))

    def run(self, turns: int) -> None:
        try:
            for _ in range(turns):
                self.turn()
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.trace[-80:])) from error

    def heal(self, turns: int) -> None:
        """Nothing fails any more; a person promotes if nobody ever was."""
        self.faults = False
        self.broken_until = 0
        self.witness.up = True
        self.way = dict.fromkeys(self.way, True)
        self.pause(paused=False)
        for _ in range(turns):
            self.run(1)
            if self.well():
                return
        raise AssertionError("I8: they do not come together\n" + "\n".join(self.trace[-80:]))

    def ready(self) -> Machine:
        """Goes on until all is well, and the primary could hand over; the primary."""
        while True:
            self.heal(6000)
            old = next(one for one in self.machines if one.state.role == "primary")
            if obstacle(old.state) is None and not any(one.inbox or one.attempts for one in self.machines):
                return old
            self.run(1)

    def worst_handoff(self) -> None:
        """The role is given away by a swap that comes late, when the two hear nothing of each other any more, and the
        old primary nothing of the witness either; then the new one answers writes alone. All else goes well."""
        old = self.ready()
        self.beat(old)
        old.step(Handoff())
        self.work_off(old)
        self.pause(paused=True)  # so that the swap is made on a version which the old primary has not looked at before
        self.faults, self.fates, self.attempts = True, [0, 0, 0, 1], 1
        old.ask()
        old.ask()
        self.faults = False
        self.work_off(old)
        old.look = True
        old.ask()
        self.work_off(old)
        self.end_apart(old)

    def worst_takeover(self) -> None:
        """The standby takes over by a swap that comes late; before that the two meet again, and lose each other."""
        old = self.ready()
        new = old.other
        self.beat(old)
        self.way[old.name] = False
        self.cut_wire("cut")
        self.now += 2 * PROMISE
        self.work_off(old)
        self.work_off(new)
        self.faults, self.fates, self.attempts = True, [0, 0, 0, 1], 1
        new.step(Tick())
        new.ask()
        new.ask()
        self.faults = False
        self.work_off(new)
        self.join_wire()
        for machine in self.machines:
            self.work_off(machine)
        self.beat(old)
        self.end_apart(old)

    def worst_expand(self) -> None:
        """The standby is taken into the set again by a swap that comes late; before that the two lose each other once
        more, and the primary the witness. Then the standby takes over."""
        old = self.ready()
        new = old.other
        self.cut_wire("cut")
        self.work_off(old)
        self.work_off(new)
        self.now += 2 * SUSPECT
        old.step(Tick())
        old.ask()
        self.work_off(old)
        assert old.state.phase is Phase.ALONE
        self.write_alone(old)
        self.join_wire()
        for step in (self.join_link, self.resync):
            for machine in self.machines:
                self.work_off(machine)
                machine.look = True
                machine.ask()
                self.work_off(machine)
            step()
        self.work_off(old)
        self.work_off(new)
        self.faults, self.fates, self.attempts = True, [0, 0, 0, 1], 1
        old.ask()
        old.ask()
        self.faults = False
        self.work_off(old)
        self.way[old.name] = False
        self.cut_wire("cut")
        self.write_alone(old)
        assert self.witness.cas(*self.witness.late.pop(), late=True)
        self.now += 2 * PROMISE
        for _ in range(200):
            self.work_off(new)
            new.step(Tick())
            new.look = True
            new.ask()
            self.write()
            self.now += S // 50
            self.check()
        assert new.acknowledges(), "the standby does not take over"

    def write_alone(self, machine: Machine) -> None:
        for _ in range(5):
            self.work_off(machine)
            self.write()
            self.check()

    def end_apart(self, old: Machine) -> None:
        """The late swap lands when the old primary hears neither the new one nor the witness any more; the new one
        serves alone."""
        new = old.other
        self.cut_wire("cut")
        self.way[old.name] = False
        assert self.witness.cas(*self.witness.late.pop(), late=True)
        assert self.witness.record.register.primary == new.name
        before = len(self.acked)
        for _ in range(500):
            for machine in self.machines:
                self.work_off(machine)
                if machine.state.wake_ns is not None and machine.clock() >= machine.state.wake_ns:
                    machine.step(Tick())
                machine.look = True
                machine.ask()
            self.write()
            self.now += S // 50
            self.check()
        assert new.acknowledges(), "the new primary does not serve"
        assert len(self.acked) > before

    def work_off(self, machine: Machine) -> None:
        while machine.inbox:
            machine.step(machine.inbox.pop(0))

    def well(self) -> bool:
        primaries = [one for one in self.machines if one.up and one.state.role == "primary"]
        if not primaries and self.witness.record.register.primary is None and not self.node["alpha"].attempts:
            if all(one.up and one.state.phase is Phase.SECONDARY for one in self.machines) and self.link:
                self.node["alpha"].step(Promote(accept_data_loss=False, force=False, obstacle=None, bound_until_ns=0))
            return False
        both = ("alpha", "beta")
        if len(primaries) != 1 or primaries[0].paused_clients or self.prefer not in (None, primaries[0].name):
            return False
        return primaries[0].acknowledges() and self.witness.record.register.in_sync == both
