"""The data link of the simulation: the handshake, frames, resyncs, writes, reads and flushes.

Rules:
- Who is source and how much is copied is decided by the product (`history.decide` through `pairing.compare` and
  `agree`), from what both disks' metadata say; what the engine does with that is played here, by its rules:
- A5 A frame counts only in the link and in the epoch that it was sent in; older ones may still come.
- A6 A write in flight is sent again in the next link, or completes alone; a read of its block waits.
- A7 What is written since the last barrier on both has a bit as soon as a link or a process ends.
- R1, G4 The target of a copy is inconsistent until it has everything, durably; then it takes the source's ids, and
  when the source knows that, it forgets its own bits. Either end may miss the other one's word.
- W5 A FLUSH is answered when all before it is durable at every node that is required.
- Frames of one link keep their order; a cut may leave any of them undelivered.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from mirrorpair import roles
from mirrorpair.history import Side, adopt, began_alone, decide, first, forget_bitmap
from mirrorpair.pairing import Agreement, agree
from mirrorpair.rolewords import CaughtUp, Cover, GenerationBegan, LinkLost, LinkUp, Mode, Phase, Synced
from mirrorpair.testing.words import BLOCKS, NODES, Flight, Frame

if TYPE_CHECKING:
    from mirrorpair.history import DiskState, Ids
    from mirrorpair.testing.machine import Machine
    from mirrorpair.testing.world import World

VOLUME = "data"


class Link(NamedTuple):
    number: int
    source: str
    session: int
    epoch: int
    ids: Ids
    """of the source, when it began"""


class Mirror:
    def __init__(self, world: World) -> None:
        self.world = world
        self.link: Link | None = None
        self.busy = False
        """a resync is on its way"""
        self.frames: dict[str, deque[Frame]] = {name: deque() for name in NODES}
        """to each node; also of links that are over"""
        self.refused: str | None = None
        """why the last handshake came to nothing that time would mend"""
        self.resyncs = self.refusals = 0
        self.boots = 0
        """of the target, when the link began"""
        self._numbers = itertools.count(1)
        self._meeting: tuple[Machine, str, bool, tuple[object, ...]] | None = None
        """a handshake that has begun: what it came to, and from what"""

    def carries(self, machine: Machine) -> bool:
        """Whether what this node sends could be answered by the other one."""
        link = self.link
        if link is None or link.source != machine.name or machine.attached != link.number:
            return False
        return machine.state.linked and machine.other.up

    # --- its beginning and end

    def cut(self, why: str, *, lost: bool = True) -> None:
        """`lost`: nobody wanted it."""
        if self.link is None:
            return
        self.link = None
        for machine in self.world.machines:
            if machine.up and machine.attached is not None:
                state = machine.state
                machine.survivor |= lost and state.peer_role == "primary" and not state.peer_left
                machine.look |= not lost  # the roles have changed
                machine.inbox.append(LinkLost(why))

    def disk_state(self, machine: Machine) -> DiskState:
        """As nodeview.py, without a link."""
        disk, state = machine.disk, machine.state
        if disk.failed:
            return "failed"
        if disk.inconsistent:
            return "inconsistent"
        if state.role == "primary":
            return "up-to-date"
        return "outdated" if state.in_sync and state.me not in state.in_sync else "consistent"

    def side(self, machine: Machine) -> Side:
        """As nodepeer.py and volumes.py."""
        disk, state = machine.disk, machine.state
        return Side(
            node=machine.name,
            size=BLOCKS,
            block_size=1,
            ids=disk.ids,
            new=disk.new,
            role=state.role,
            disk=self.disk_state(machine),
            crashed_primary=state.crashed,
            boot_lost=state.boot_lost,
            connected_survivor=machine.survivor,
            dirty=bool(disk.bits),
            alone=state.phase is Phase.ALONE and state.alone_began,
            epoch=state.epoch,
            discard=disk.discard,
            distrusted=disk.distrusted,
        )

    def may_be_target(self, machine: Machine) -> bool:
        """A16 (nodepeer.py)."""
        state = machine.state
        return state.peer_role == "primary" or machine.peer in state.in_sync or not state.epoch

    def join(self) -> None:
        """One half of a handshake: what both say, then the link that follows from it, if that is still true (W9)."""
        meeting, self._meeting = self._meeting, None
        if not self._may_join():
            return
        if meeting is None:
            self._meeting = self._meet()
            return
        source, amount, flap, facts = meeting
        if facts == self._facts():
            self.begin(source, amount, flap=flap)

    def _facts(self) -> tuple[object, ...]:
        machines = self.world.machines
        return (*((one.session, one.process, one.facts_version) for one in machines),)

    def _may_join(self) -> bool:
        world = self.world
        machines = world.machines
        if self.link is not None or not world.wire.up:
            return False
        if any(one.inbox or one.attempts or one.stopping or not one.awake for one in machines):
            return False
        if len({one.state.epoch for one in machines}) > 1 or any(one.attached is not None for one in machines):
            return False
        if any(one.state.phase is Phase.ACQUIRING for one in machines):
            return False
        return not any(self.unread(one) for one in machines)

    @staticmethod
    def unread(machine: Machine) -> bool:
        """A16 (nodepeer.py)."""
        state = machine.state
        primary = "primary" in (state.role, state.peer_role)
        return not primary and not machine.version[1] and machine.seen[0] > 0

    def _meet(self) -> tuple[Machine, str, bool, tuple[object, ...]] | None:
        for machine in self.world.machines:
            machine.disk.parted()
        found = self.agreed()
        if isinstance(found, str):
            self.refusals += self.refused is None
            self.refused = found
            return None
        source = self.world.node[found.source]
        amount = found.decisions[0].amount
        if amount != "none" and not self.may_be_target(source.other):
            return None
        self.refused = None
        return source, amount, found.flap, self._facts()

    def agreed(self) -> Agreement | str:
        """What both nodes come to, or why they do not."""
        alpha, beta = self.world.machines
        mine, theirs = self.side(alpha), self.side(beta)
        decision = decide(mine, theirs)
        assert decision == decide(theirs, mine), "H4"
        found = agree(
            {VOLUME: decision},
            {VOLUME: mine},
            {VOLUME: theirs},
            i_flap=self.flap(alpha),
            they_flap=self.flap(beta),
        )
        return found if isinstance(found, Agreement) else found.message

    def flap(self, machine: Machine) -> bool:
        state = machine.state
        return state.phase is Phase.WAITING and state.peer_in_sync and not machine.other.state.boot_lost

    def begin(self, source: Machine, amount: str, *, flap: bool) -> None:
        """Both ends attach; the source sends what differs, and what is in flight once more."""
        world, target = self.world, source.other
        if any(one.lost for one in source.flying.values()):
            if roles.mode_of(source.state) is Mode.NONE:
                return  # those blocks are held, and the resync waits for them
            source.flying = {block: one for block, one in source.flying.items() if not one.lost}
        self.boots = target.boots
        number = next(self._numbers)
        if source.disk.new and target.disk.new:
            source.disk.ids = target.disk.ids = first(next(world.numbers))
        uuid = source.pair_uuid or target.pair_uuid or f"{next(world.numbers):x}"
        source.pair_uuid = target.pair_uuid = uuid
        if amount != "none" and not flap:
            target.disk.inconsistent = True
        only = world.witness.record.register.in_sync == (source.name,)
        if source.boot_lost and (only or target.boot_lost or target.disk.new or target.obstacle):
            world.checks.boot_told(source)
        assert source.session is not None
        self.link = Link(number, source.name, source.session, source.state.epoch, source.disk.ids)
        self.busy = amount != "none"
        for machine in world.machines:
            machine.attached = number
            machine.inbox.append(LinkUp(machine is source))
        world.say(f"data link: {amount} from {source.name}{', a flap' if flap else ''}")
        if amount == "none":
            source.disk.ids = forget_bitmap(source.disk.ids)
            for machine in world.machines:
                self.equal(machine)
        else:
            blocks = range(BLOCKS) if amount == "full" else sorted(source.disk.bits | target.disk.bits)
            for block in blocks:
                self.send(target, "copy", block, source.disk.now[block])
        for block, flight in source.flying.items():
            self.send(target, "write", block, flight.value)
        if amount != "none":
            self.send(target, "done")

    def equal(self, machine: Machine) -> None:
        """This end knows that both have the same (nodecore.py, `all_equal`)."""
        link = self.link
        assert link is not None
        machine.survivor = False
        machine.was_primary = machine.state.role == "primary"
        machine.boot_lost = False
        machine.inbox.append(CaughtUp())
        if link.source == machine.name:
            other = machine.other
            machine.equal_in, machine.equal = link.session, other.incarnation
            machine.inbox.append(Synced(machine.members.get(other.name, other.incarnation) == other.incarnation))

    # --- frames

    def send(self, to: Machine, kind: str, block: int = 0, value: int = 0) -> None:
        link = self.link
        assert link is not None
        self.frames[to.name].append(Frame(link.number, link.epoch, kind, block, value))

    def accepts(self, machine: Machine, frame: Frame) -> bool:
        """A5."""
        return frame.link == machine.attached

    def deliver(self, machine: Machine) -> None:
        """The next one to this node; one of a link that is over may come late, or never."""
        frames, world = self.frames[machine.name], self.world
        if not frames or not machine.awake:
            return
        if frames[0].link != machine.attached:
            if world.rng.random() < 0.2:
                frames.rotate(-1)  # later
                return
            if world.rng.random() < 0.3:
                frames.popleft()
                return
        frame = frames.popleft()
        if self.accepts(machine, frame) and (frame.kind == "ack" or not machine.disk.failed):
            self.take(machine, frame)

    def take(self, machine: Machine, frame: Frame) -> None:
        link = self.link if self.link is not None and self.link.number == frame.link else None
        disk = machine.disk
        if frame.kind in ("write", "copy"):
            disk.write(frame.block, frame.value)
            if frame.kind == "write" and link is not None:
                self.send(machine.other, "ack", frame.block, frame.value)
        elif frame.kind == "ack":
            flight = machine.flying.get(frame.block)
            if flight is not None and flight.value == frame.value:
                machine.flying[frame.block] = flight._replace(there=True)
                self.complete(machine)
        elif link is None:
            return  # the question cannot be answered any more
        elif frame.kind == "done":
            disk.flush()
            disk.ids = adopt(link.ids)
            disk.bits, disk.hot = set(), set()
            disk.inconsistent = disk.distrusted = disk.discard = False
            self.equal(machine)
            self.send(machine.other, "over")
        else:
            disk.flush()
            disk.ids = forget_bitmap(disk.ids)
            disk.bits = set()
            self.busy = False
            self.resyncs += 1
            self.equal(machine)

    def drain(self) -> bool:
        """All frames of the link arrive, in order; whether none is left."""
        for _ in range(1000):
            link = self.link
            if link is None:
                return False
            waiting = [
                machine
                for machine in self.world.machines
                if any(frame.link == link.number for frame in self.frames[machine.name])
            ]
            if not waiting:
                return True
            machine = waiting[0]
            if not machine.awake or machine.attached != link.number:
                return False
            frame = self.frames[machine.name].popleft()
            if self.accepts(machine, frame) and (frame.kind == "ack" or not machine.disk.failed):
                self.take(machine, frame)
        return False

    # --- clients

    def write(self) -> None:
        world = self.world
        for machine in world.machines:
            if not machine.serving or not machine.granted():
                continue
            block = world.rng.randrange(BLOCKS)
            if block in machine.flying:
                continue  # A6: it waits
            value = next(world.numbers)
            if machine.disk.failed:
                machine.disk.bits.add(block)
            else:
                machine.disk.write(block, value)
            machine.flying[block] = Flight(value, lost=machine.disk.failed)
            if self.link is not None and self.link.number == machine.attached:
                self.send(machine.other, "write", block, value)
            self.complete(machine)

    def complete(self, machine: Machine) -> None:
        """Answers what may be answered (A1, A10, G2)."""
        mode = roles.mode_of(machine.state)
        if mode is Mode.NONE or not machine.flying:
            return
        if not machine.awake or not machine.valid():
            return
        alone = machine.attached is None
        if alone and mode is Mode.ALONE_FIRST and not any(isinstance(one, GenerationBegan) for one in machine.inbox):
            machine.wants_generation = True
        for block, flight in list(machine.flying.items()):
            if self.held(flight):
                continue
            if alone and mode is Mode.ALONE:
                machine.disk.bits.add(block)
            elif alone or not flight.there:
                continue
            del machine.flying[block]
            self.world.checks.acknowledged(machine, block, flight.value)

    def held(self, flight: Flight) -> bool:
        """A14: until the peer is primary, or nobody can make it so."""
        return flight.lost

    def forgive(self, machine: Machine) -> None:
        """A14: it is."""
        for block, flight in machine.flying.items():
            if flight.lost and flight.there:
                self.world.checks.forgiven(machine, block, flight.value, rebooted=machine.other.boots != self.boots)

    def generation(self, machine: Machine) -> None:
        """G2: the new ids are durable before a write completes alone."""
        if not machine.awake or not machine.wants_generation:
            return
        machine.wants_generation = False
        if machine.attached is None:
            machine.disk.ids = began_alone(machine.disk.ids, next(self.world.numbers))
            machine.facts_version += 1
            machine.inbox.append(GenerationBegan())

    def read(self) -> None:
        for machine in self.world.machines:
            block = self.world.rng.randrange(BLOCKS)
            if not machine.serving or not machine.granted() or not self.readable(machine, block):
                continue
            if not machine.disk.failed:
                self.world.checks.read(machine, block)
            elif Cover.READS in machine.cover and self.carries(machine) and not machine.other.disk.failed:
                self.world.checks.read_there(machine, block)

    def readable(self, machine: Machine, block: int) -> bool:
        """A6."""
        return block not in machine.flying

    def flush(self, machine: Machine) -> bool:
        """W5, and a client's answer to it. False: it cannot be had now."""
        mode, disk = roles.mode_of(machine.state), machine.disk
        if disk.failed:
            return False
        if machine.attached is not None and mode is not Mode.NONE:
            link, other = self.link, machine.other
            if link is None or not self.carries(machine) or other.attached != link.number or other.disk.failed:
                return False
            if not other.awake or not self.drain():
                return False
            self.complete(machine)
            if machine.flying:
                return False
            other.disk.barrier(set())
            disk.barrier(set())
        elif mode is Mode.ALONE:
            self.complete(machine)
            disk.flush()
            disk.bits, disk.hot = disk.bits | disk.hot, set()
        else:
            disk.flush()
            return mode is Mode.NONE
        if machine.acknowledges():
            self.world.checks.flushed()
        return True
