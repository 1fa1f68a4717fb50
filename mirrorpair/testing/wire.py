"""Between the two nodes in the simulation: sessions, heartbeats, partitions, and what sentinels report.

Rules:
- Beats and their answers are lost, late, overtaken by others, and come twice; one that belongs to an earlier session
  counts for nothing. With one way dead (`mute`) nobody gets an answer, and both suspect each other in the end.
- A cut is noticed by each end at a moment of its own: what is in an inbox is what was not noticed yet.
- A report of a sentinel comes at once, late, repeatedly, when a later process serves, or never.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from mirrorpair.proofs import Life
from mirrorpair.rolewords import PeerDown, PeerFloor, PeerSaid, PeerUp
from mirrorpair.testing.words import NODES, Beat

if TYPE_CHECKING:
    from mirrorpair.testing.machine import Machine
    from mirrorpair.testing.world import World


class Wire:
    def __init__(self, world: World, loss: float) -> None:
        self.world = world
        self.loss = loss
        """of beats and of their answers, 0 to 1"""
        self.up = False
        self.broken_until = 0
        self.mute = dict.fromkeys(NODES, False)
        """nothing that it sends arrives"""
        self.beats: list[Beat] = []
        self.reports: list[tuple[str, list[Life]]] = []
        """on their way to the peer of who died"""
        self._sessions = itertools.count(1)

    def cut(self, why: str) -> None:
        if not self.up:
            return
        self.up = False
        self.world.mirror.cut(why)
        for machine in self.world.machines:
            machine.session = None
            machine.beats.forget()
            if machine.up:
                machine.inbox.append(PeerDown(why, machine.hearing.last_ns, machine.bound_until))

    def join(self) -> None:
        machines = self.world.machines
        if self.up or self.world.now < self.broken_until or any(self.mute.values()):
            return
        if not all(machine.awake and not machine.quiet and not machine.inbox for machine in machines):
            return
        self.up = True
        session = next(self._sessions)
        said = [(machine.state.role, machine.state.epoch) for machine in machines]
        for machine, (role, epoch) in zip(machines, said[::-1], strict=True):
            life = Life(machine.name, machine.process, str(session), (machine.incarnation.id, machine.incarnation.n))
            machine.sessions.append(life)
            machine.other.lives.met = life
            machine.session, machine.peer_leaves = session, False
            machine.hearing.heard(machine.clock())
            machine.inbox.append(PeerUp(role, epoch))
            machine.look |= epoch > machine.state.epoch

    def send(self, machine: Machine) -> None:
        if not self.up or not machine.awake or machine.session is None:
            return
        state = machine.state
        seq = machine.beats.send(machine.clock())
        floor = max(state.epoch, machine.floor)
        beat = Beat(machine.session, machine.name, seq, None, state.role, state.epoch, floor, machine.version)
        if not self.mute[machine.name]:
            self.beats.append(beat)

    def deliver(self) -> None:
        """Any of those on their way; in order where nothing fails."""
        if not self.beats:
            return
        rng, faults = self.world.rng, self.world.faults
        at = rng.randrange(len(self.beats)) if faults else 0
        beat = self.beats[at]
        if not faults or rng.random() < 0.9:
            del self.beats[at]
        if faults and rng.random() < self.loss:
            return
        sender = self.world.node[beat.sender]
        if beat.promise is None:
            self.hear(sender.other, beat)
        elif sender.awake and sender.session == beat.session:
            now = sender.clock()
            sender.hearing.heard(now)
            sender.beats.reply(beat.seq, beat.promise, now)

    def hear(self, machine: Machine, beat: Beat) -> None:
        """As nodepeer.py."""
        if not machine.awake or machine.session != beat.session:
            return
        state, now = machine.state, machine.clock()
        machine.hearing.heard(now)
        if (state.peer_role, state.peer_epoch) != (beat.role, beat.epoch):
            machine.inbox.append(PeerSaid(beat.role, beat.epoch))
        machine.look |= beat.epoch > state.epoch or beat.version > machine.version
        if beat.floor > state.epoch and state.role == "primary":
            machine.inbox.append(PeerFloor(beat.floor))
        promise = 0
        if beat.role == "primary" and machine.promises(beat.epoch):
            promise = machine.promised.give(now)
            machine.lives.promised = machine.lives.met
        if not self.mute[machine.name]:
            self.beats.append(beat._replace(promise=promise))

    def exchange(self, machine: Machine) -> None:
        """A beat of this machine and its answer, at once."""
        self.beats.clear()
        self.send(machine)
        while self.beats:
            beat = self.beats.pop(0)
            if beat.promise is None:
                self.hear(machine.other, beat)
            else:
                machine.beats.reply(beat.seq, beat.promise, machine.clock())

    def suspect(self, machine: Machine) -> None:
        """Silence for too long ends the session."""
        if self.up and machine.awake and machine.hearing.suspected(machine.clock()):
            self.cut(f"{machine.peer} is silent")

    def report(self) -> None:
        """A sentinel's report arrives, and may be sent once more."""
        if not self.reports:
            return
        rng = self.world.rng
        at = rng.randrange(len(self.reports))
        name, died = self.reports[at]
        if rng.random() < 0.2:
            del self.reports[at]
        machine = self.world.node[name]
        if machine.awake:
            machine.told_of_death(died)
