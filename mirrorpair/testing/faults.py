"""What can go wrong in the simulation, and what persons do; each one call.

Rules:
- A person forces only what she has fenced, replaces only a node whose peer has everything, and restores the image of
  no other one: what is lost by that is nobody's fault (A3, A8).
- A14 A disk that fails is told to the product at once; from then on no write reaches it and no read comes from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.rolewords import DiskFailed, PeerLeft, Promote, Stop
from mirrorpair.testing.words import TIMING

if TYPE_CHECKING:
    from mirrorpair.testing.machine import Machine
    from mirrorpair.testing.world import World


class Faults:
    def __init__(self, world: World) -> None:
        self.world = world
        self.fenced: Machine | None = None
        """a person keeps it off while its peer is promoted"""

    # --- processes and hosts

    def crash(self, machine: Machine) -> None:
        """The daemon ends, and nobody says so."""
        if machine.up:
            machine.up = False
            self.world.wire.cut(f"{machine.name} is gone")

    def kill(self, machine: Machine, *, proven: float = 0.8) -> None:
        """The daemon alone dies; its sentinel lives, or not."""
        world = self.world
        if machine.up and machine.sessions and world.sentinels and world.rng.random() < proven:
            world.wire.reports.append((machine.peer, machine.sessions[-8:]))
        self.crash(machine)

    def power(self, machine: Machine) -> None:
        """Its host loses power, and with it what was never flushed."""
        if not machine.up and (machine.clean or machine.boot_lost):
            return
        self.crash(machine)
        machine.disk.lose_boot(self.world.rng)
        machine.boot_lost = True
        machine.boots += 1
        self.world.say(f"{machine.name} lost its boot")

    def freeze(self, machine: Machine, for_ns: int) -> None:
        """F1: it stands still, its clock does not; the other one hears nothing."""
        if machine.awake:
            machine.frozen_until = self.world.now + for_ns
            self.world.say(f"{machine.name} is frozen for {for_ns / 1e9:.1f} s")

    def stop(self, machine: Machine) -> None:
        """A18, one part of node.py's stop() each time."""
        world, other = self.world, machine.other
        if not machine.stopping:
            machine.stopping = True
            machine.drained = machine.state.role != "primary"
            machine.durable = True
            machine.step(Stop())
        elif not machine.drained:
            return
        elif not machine.quiet:
            machine.quiet = True
        elif world.wire.up and not machine.told:
            if not other.awake:
                return
            machine.told = True
            other.peer_leaves = True
            if machine.state.role == "primary":
                other.promised.release(other.clock())
            other.inbox.append(PeerLeft())
        elif world.wire.up and not self._answers(other) and world.rng.random() < 0.9:
            return
        else:
            clean = machine.durable and not machine.disk.failed
            if clean:
                machine.disk.flush()
            self.crash(machine)
            machine.clean = clean and machine.settled
            world.say(f"{machine.name} stopped, {'clean' if machine.clean else 'not clean'}")

    @staticmethod
    def _answers(machine: Machine) -> bool:
        """Whether this one has answered a peer that leaves."""
        state = machine.state
        return machine.quiet or (state.peer_left and not (state.role == "primary" and state.peer_in_sync))

    # --- disks

    def disk_fails(self, machine: Machine) -> None:
        """EIO from now on, in this run of the daemon."""
        if machine.up and not machine.disk.failed:
            machine.disk.failed = True
            machine.inbox.append(DiskFailed("EIO"))
            self.world.say(f"the disk of {machine.name} fails")

    def _spare(self, machine: Machine) -> bool:
        """Whether the other one has everything and is known for it, so that this one's data may go."""
        world, other = self.world, machine.other
        whole = not other.obstacle and not other.boot_lost and world.checks.holds(other)
        register = world.witness.record.register
        if not whole or other.name not in register.in_sync or world.witness.late or self.fenced is not None:
            return False
        known = register.members.get(other.name, other.incarnation) == other.incarnation
        return known and world.witness.record is world.witness.newest

    def blank(self, machine: Machine) -> None:
        """F15: another host of its name takes its place."""
        if self._spare(machine):
            self.crash(machine)
            machine.anew()
            self.world.say(f"{machine.name} is replaced by a blank one")

    def back_up(self, machine: Machine) -> None:
        machine.disk.copy = list(machine.disk.now)

    def roll_back(self, machine: Machine) -> None:
        """F15: the image is restored from an older copy while the daemon is off."""
        if machine.disk.copy is not None and not machine.disk.new and self._spare(machine):
            self.crash(machine)
            machine.disk.restore()
            self.world.say(f"the image of {machine.name} is restored from an older copy")

    # --- the network

    def part(self) -> None:
        """A cut that lasts, for about as long as a promise."""
        world = self.world
        world.wire.cut("cut")
        world.wire.broken_until = world.now + world.rng.randrange(2 * TIMING.promise_ns)

    # --- persons

    def force(self, machine: Machine) -> None:
        """Promotes it after the other one was fenced; what only that one has is given up."""
        if self.fenced is not None or not machine.awake or machine.obstacle or machine.disk.new:
            return
        if machine.attempts or machine.inbox or machine.state.role == "primary" or self.world.witness.late:
            return
        self.crash(machine.other)
        self.fenced = machine.other
        self.promote(machine, accept_data_loss=True, force=True)

    def unfence(self) -> None:
        """Once what was asked for has come to an end."""
        if self.fenced is not None and not self.fenced.other.attempts and not self.fenced.other.inbox:
            self.fenced = None

    def promote(self, machine: Machine, *, accept_data_loss: bool = False, force: bool = False) -> None:
        machine.step(
            Promote(
                accept_data_loss=accept_data_loss,
                force=force,
                obstacle=machine.obstacle,
                bound_until_ns=machine.bound_until,
            )
        )

    def help(self) -> None:
        """What only a person may do, who knows what a node has: nobody is primary for the register, or the record was
        lost (F17), or the two have written apart after a promotion that was forced."""
        world = self.world
        if any(one.attempts or one.inbox or not one.awake for one in world.machines):
            return
        record, newest = world.witness.record, world.witness.newest
        primaries = [one for one in world.machines if one.state.role == "primary"]
        if world.mirror.refused is not None and world.mirror.link is None and len(primaries) == 1:
            primaries[0].disk.discard, primaries[0].other.disk.discard = False, True
        if record.register.latched:
            world.pause(paused=False)
        if all(world.node[name].boot_lost for name in newest.register.in_sync):
            for name in newest.register.in_sync:
                if world.node[name].boot_lost and name == newest.register.primary:
                    world.checks.boot_told(world.node[name])
        known = record.register.members
        whole = [
            one
            for one in world.machines
            if not one.obstacle and world.checks.holds(one) and known.get(one.name, one.incarnation) == one.incarnation
        ]
        lost = any(one.stale(record) for one in world.machines)
        if lost and primaries:
            if world.checks.holds(primaries[0]):
                self.promote(primaries[0], accept_data_loss=True)
        elif (lost or record.register.primary is None) and whole:
            listed = [one for one in whole if one.name in record.register.in_sync]
            best = min(listed or whole, key=lambda one: one.boot_lost)
            gives_up = lost or best.boot_lost or (not listed and bool(record.register.in_sync))
            self.promote(best, accept_data_loss=gives_up, force=gives_up)
