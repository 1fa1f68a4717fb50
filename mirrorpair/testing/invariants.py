"""What must hold in the simulation, whatever happens. The rules of design/3-arbitration.md by their ids.

- I1 At every step, for whoever may serve a read: every block holds its last acknowledged write, or a later one.
- I2 At every step, for the same: no block is older than what was read of it before (a read waits for a write in flight,
  A6; what a read has shown stays, also if it was never acknowledged).
- I3 At every step no two nodes could acknowledge a write; at every acknowledgement, that nobody else has acknowledged
  one in that epoch, nor in a later one.
- I4 At every change of the record: who is named primary is in its set, has every acknowledged write and no half-copied
  image. (Who lost its boot, or is in the middle of a resync, is named at most by a late swap from before that, and does
  not serve: I1.)
- I5 At every step, for whoever serves, and at every change or flush for every member of the set that has its boot, by
  itself: every write that was acknowledged and then flushed is durable there. So any one of them may be lost.
- I6 At the end of the liveness phase, and of each resync without later writes: both images are the same, to the byte.
- I7 At every change of the record: there were at most `cap` changes of primary within an hour that nobody asked for and
  no failure forced. A19: none at all while the record says that the pair is paused.
- I8 Once nothing fails any more one node serves, both are in sync, its clients are not paused, and where a node is
  preferred it is that one, within a bound of steps; with one fault, within the formula (plays.py).

What is excused: writes that a person gave up (`promote --accept-data-loss`), and what was acknowledged and not flushed
where the only member lost its boot, or both did; its clients are told then (C3).
"""

from __future__ import annotations

from operator import lt
from typing import TYPE_CHECKING

from mirrorpair.testing.words import BLOCKS, HOUR_NS, TORN, BrokenError

if TYPE_CHECKING:
    from mirrorpair.arbiter import Register
    from mirrorpair.testing.machine import Machine
    from mirrorpair.testing.world import World


class Invariants:
    """What clients were told and saw, block by block, and whether that still holds."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.acked = [0] * BLOCKS
        self.seen = [0] * BLOCKS
        """acknowledged, or read"""
        self.safe = [0] * BLOCKS
        """acknowledged, and a FLUSH after that was acknowledged too"""
        self.acks = self.reads = 0
        self.last_acker: tuple[int, str] = (0, "")
        self._unasked: list[int] = []

    def holds(self, machine: Machine) -> bool:
        """Whether this node has everything that clients were told or saw."""
        return not any(map(lt, machine.disk.now, self.seen))

    # --- what happens

    def acknowledged(self, machine: Machine, block: int, value: int) -> None:
        epoch, (last, who) = machine.state.epoch, self.last_acker
        if epoch < last or (epoch == last and who not in ("", machine.name)):
            raise BrokenError("I3", f"{machine.name} acknowledges in epoch {epoch} after {who} did in epoch {last}")
        self.last_acker = (epoch, machine.name)
        self.acks += 1
        self.acked[block] = max(self.acked[block], value)
        self.seen[block] = max(self.seen[block], value)

    def read(self, machine: Machine, block: int) -> None:
        self.reads += 1
        self.seen[block] = max(self.seen[block], machine.disk.now[block])

    def read_there(self, machine: Machine, block: int) -> None:
        """By the peer, for a node whose disk has failed (A14)."""
        if machine.other.disk.now[block] < self.seen[block]:
            raise BrokenError("I1", f"{machine.name} reads of {machine.peer} what is older than what was acknowledged")
        self.read(machine.other, block)

    def forgiven(self, machine: Machine, block: int, value: int, *, rebooted: bool) -> None:
        """A14: an answer to a write of its epoch, that only the peer has. `rebooted`: the peer's host has lost power
        since: then it is as any write that the only member had not flushed."""
        if machine.other.disk.now[block] < value:
            if rebooted:
                return
            raise BrokenError("I1", f"{machine.name} answers a write that {machine.peer} does not have")
        self.acks += 1
        self.acked[block] = max(self.acked[block], value)
        self.seen[block] = max(self.seen[block], value)

    def flushed(self) -> None:
        self.safe = list(self.acked)
        self.members()

    def given_up(self, machine: Machine) -> None:
        """A person has this one promoted, and with it what it holds."""
        now = machine.disk.now
        for kept in (self.acked, self.seen, self.safe):
            kept[:] = map(min, kept, now)

    def boot_told(self, machine: Machine) -> None:
        """C3: what was not flushed is gone, and clients are told; what is torn there was being overwritten."""
        for block, value in enumerate(machine.disk.now):
            if value == TORN:
                self.safe[block] = TORN
        self.acked, self.seen = list(self.safe), list(self.safe)

    # --- what must hold

    def check(self) -> None:
        """At every step."""
        able = [machine for machine in self.world.machines if machine.acknowledges()]
        if len(able) > 1:
            raise BrokenError("I3", "both acknowledge")
        for machine in self.world.machines:
            if machine.serves_reads():
                self.serving(machine)

    def serving(self, machine: Machine) -> None:
        now = machine.disk.now
        if not any(map(lt, now, self.seen)):
            return
        if any(map(lt, now, self.safe)):
            raise BrokenError("I5", f"{machine.name} serves reads without what was flushed")
        if any(map(lt, now, self.acked)):
            raise BrokenError("I1", f"{machine.name} serves reads without what was acknowledged")
        raise BrokenError("I2", f"{machine.name} serves older content than was read before")

    def named(self, machine: Machine, *, late: bool) -> None:
        self.members()
        if machine.boot_lost or machine.disk.distrusted:
            return
        lost = sum(map(lt, machine.disk.now, self.acked))
        if lost:
            raise BrokenError("I4", f"{machine.name} is named primary without {lost} acknowledged writes")
        if machine.disk.inconsistent and not late:
            raise BrokenError("I4", f"{machine.name} is named primary in the middle of a resync")

    def members(self) -> None:
        """I5: each member for itself, so any one may be lost."""
        register = self.world.witness.record.register
        if self.world.witness.record is not self.world.witness.newest:
            return  # F17
        for name in register.in_sync:
            machine = self.world.node[name]
            known = register.members.get(name, machine.incarnation) == machine.incarnation
            if not known or machine.boot_lost or machine.disk.distrusted or machine.disk.failed:
                continue
            if any(map(lt, machine.disk.durable, self.safe)):
                raise BrokenError("I5", f"{name} is a member, and what was flushed is not durable there")

    def role_changed(self, new: Register, *, asked: bool, unasked: bool) -> None:
        if new.pause and not asked:
            raise BrokenError("A19", "changed in a pause")
        if not unasked:
            return
        now = self.world.now
        self._unasked = [at for at in self._unasked if at > now - HOUR_NS] + [now]
        if 0 < self.world.cap < len(self._unasked):
            raise BrokenError("I7", f"{len(self._unasked)} voluntary changes within an hour")

    def resumed(self) -> None:
        """A person looked, and lets them begin anew."""
        self._unasked = []

    def identical(self) -> None:
        alpha, beta = self.world.machines
        if alpha.disk.now != beta.disk.now:
            blocks = sum(one != other for one, other in zip(alpha.disk.now, beta.disk.now, strict=True))
            raise BrokenError("I6", f"the images differ in {blocks} blocks, though both are in sync")
