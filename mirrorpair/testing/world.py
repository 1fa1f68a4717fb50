"""The simulated pair as a whole: what happens next is thrown by one seed, and after each step all invariants hold.

Rules:
- One seed decides everything: no clock, no thread, no hash order. The same seed makes the same run, in every process.
- A step is the smallest thing that something else may come between: one event in one node, one attempt at a swap, one
  beat, one frame.
- `faults` False: nothing fails any more, and nobody hinders; what was broken is mended (`heal`).
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import msgspec

from mirrorpair.handoff import obstacle
from mirrorpair.rolewords import Demote, Handoff, Phase, Tick
from mirrorpair.testing.faults import Faults
from mirrorpair.testing.invariants import Invariants
from mirrorpair.testing.machine import Machine
from mirrorpair.testing.mirror import Mirror
from mirrorpair.testing.wire import Wire
from mirrorpair.testing.witness import Witness
from mirrorpair.testing.words import ATTEMPTS, NODES, TIMING, BrokenError, S

if TYPE_CHECKING:
    from collections.abc import Callable

LIVENESS_STEPS = 8000
FAIR_NS = S // 20

EVERYDAY = {
    "event": 30,
    "ask": 14,
    "tick": 10,
    "beat": 16,
    "deliver": 45,
    "wire": 8,
    "link": 16,
    "frame": 30,
    "write": 12,
    "read": 4,
    "flush": 2,
    "quiet": 4,
    "generation": 10,
    "start": 4,
    "alone": 4,
    "stopping": 6,
    "idle": 0.3,
}
FAULTS = {
    "late": 3,
    "cut": 1,
    "unlink": 1,
    "crash": 0.7,
    "power": 0.3,
    "promote": 1,
    "handoff": 2,
    "pause": 0.3,
    "witness": 0.6,
    "way": 0.8,
    "sleep": 1,
    "freeze": 0.2,
    "mute": 0.3,
    "suspect": 4,
    "report": 4,
}
RARE = {
    "disk": 0.1,
    "blank": 0.1,
    "backup": 0.3,
    "rollback": 0.1,
    "force": 0.1,
    "stop": 0.2,
    "demote": 0.1,
    "restore": 0.03,
}


class World:
    """`seed`: a number, or dice that are thrown on. `sentinels`: there are some, so that crashes may be proven."""

    def __init__(self, seed: int | random.Random, *, sentinels: bool = False, faults: bool = True) -> None:
        rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.rng, self.sentinels, self.faults = rng, sentinels, faults
        self.now = 0
        self.trace: list[str] = []
        self.nonces, self.numbers = itertools.count(1), itertools.count(1)
        self.asked: set[int] = set()
        """attempts at a change that somebody wants, or that takes a node's own role back"""
        self.unasked: set[int] = set()
        self.overriding: set[int] = set()
        self.acquisitions = self.changes = self.released = 0
        bad = rng.choice([1, 1, 8])
        self.fates = [80, 5 * bad, 8 * bad, 7 * bad]
        """of a swap, in hundredths or so; of some worlds most come to nothing, or come late"""
        self.attempts = rng.choice([1, ATTEMPTS])
        self.storm: float = rng.choice([1, 0.2])
        self.rare = rng.choice([0, 0, 1])
        """whether what is rare happens at all; what is common finds more without it"""
        self.prefer: str | None = rng.choice([None, *NODES])
        self.cap = rng.choice([0, 0, 3])
        """F16: so many changes within an hour latch the record; 0: none does"""
        self.way = dict.fromkeys(NODES, True)
        """to the witness"""
        self.checks = Invariants(self)
        self.witness = Witness(self)
        self.wire = Wire(self, rng.choice([0.02, 0.1, 0.3]))
        self.mirror = Mirror(self)
        self.fault = Faults(self)
        self.node: dict[str, Machine] = {}
        for name, peer in (NODES, NODES[::-1]):
            self.node[name] = Machine(self, name, peer)
        self._dice: dict[tuple[bool, float, int, bool], tuple[list[Callable[[Machine], None]], list[float]]] = {}

    @property
    def machines(self) -> list[Machine]:
        return list(self.node.values())

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now / S:9.3f} {text}")

    def primary(self) -> Machine | None:
        return next((one for one in self.machines if one.up and one.state.role == "primary"), None)

    # --- running

    def dice(self) -> tuple[list[Callable[[Machine], None]], list[float]]:
        key = (self.faults, self.storm, self.rare, self.sentinels)
        if key not in self._dice:
            weights: dict[str, float] = dict(EVERYDAY)
            if self.faults:
                weights |= {kind: weight * self.storm for kind, weight in FAULTS.items()}
                weights |= {kind: weight * self.storm * self.rare for kind, weight in RARE.items()}
                if not self.sentinels:
                    del weights["report"]
            steps = [getattr(self, f"_{kind}") for kind in weights]
            self._dice[key] = steps, list(itertools.accumulate(weights.values()))
        return self._dice[key]

    def turn(self) -> None:
        """One step of whatever the dice say."""
        rng = self.rng
        machine = self.node[NODES[rng.random() < 0.5]]
        steps, weights = self.dice()
        rng.choices(steps, cum_weights=weights)[0](machine)
        self.fault.unfence()
        self.now += int(rng.random() * (S // 50))
        self.checks.check()

    def run(self, steps: int) -> None:
        """BrokenError: an invariant does not hold; it carries the trace."""
        try:
            for _ in range(steps):
                self.turn()
        except BrokenError as broken:
            broken.trace = self.trace
            raise

    def heal(self, steps: int = LIVENESS_STEPS) -> None:
        """Nothing fails any more; a person does what is left to one. Ends when all is well (I8, I6)."""
        self.faults = False
        self.wire.broken_until = 0
        self.wire.beats.clear()
        self.wire.mute = dict.fromkeys(self.wire.mute, False)
        self.witness.up = True
        self.way = dict.fromkeys(self.way, True)
        self.fault.fenced = None
        self.pause(paused=False)
        for machine in self.machines:
            machine.frozen_until = 0
            if machine.disk.failed:
                self.fault.crash(machine)  # the disk was replaced, or its cable
        for _ in range(steps):
            self.run(1)
            if self.well():
                return
            self.fault.help()
        broken = BrokenError("I8", "they do not come together")
        broken.trace = self.trace
        raise broken

    def well(self) -> bool:
        primary = self.primary()
        if primary is None or primary.paused_clients or self.prefer not in (None, primary.name):
            return False
        if not primary.acknowledges() or self.witness.record.register.in_sync != NODES or not primary.state.equal:
            return False
        if self.mirror.busy or not self.mirror.flush(primary):
            return False
        try:
            self.checks.identical()
        except BrokenError as broken:
            broken.trace = self.trace
            raise
        return True

    def ready(self) -> Machine:
        """Goes on until all is well, and the primary could hand over; the primary."""
        while True:
            self.heal()
            old = self.primary()
            assert old is not None
            if obstacle(old.state) is None and not any(one.inbox or one.attempts for one in self.machines):
                return old
            self.run(1)

    def fair(self, until: Callable[[], bool], limit_ns: int) -> int:
        """Lets time pass in which everybody who can does what is due, at once; how much it took until `until()`, or
        BrokenError if it took longer than `limit_ns`."""
        began = self.now
        try:
            while not until():
                if self.now - began > limit_ns:
                    raise BrokenError("I8", f"nothing within {limit_ns / S:.2f} s")
                for machine in self.machines:
                    self._fair(machine)
                self.mirror.write()
                self.now += FAIR_NS
                self.checks.check()
        except BrokenError as broken:
            broken.trace = self.trace
            raise
        return self.now - began

    def _fair(self, machine: Machine) -> None:
        if not machine.awake:
            return
        self._suspect(machine)
        machine.work_off()
        if machine.state.wake_ns is not None and machine.clock() >= machine.state.wake_ns:
            machine.step(Tick())
        machine.work_off()
        self.wire.join()
        self.mirror.join()
        self.mirror.complete(machine)
        self.mirror.generation(machine)
        machine.work_off()
        self.mirror.complete(machine)
        machine.look = True
        machine.ask()
        machine.work_off()
        machine.go_quiet()
        machine.work_off()
        self.wire.exchange(machine)
        self.mirror.drain()
        machine.work_off()

    # --- the steps

    def _event(self, machine: Machine) -> None:
        if machine.awake and machine.inbox:
            machine.step(machine.inbox.pop(0))

    def _ask(self, machine: Machine) -> None:
        if machine.awake:
            machine.ask()

    def _tick(self, machine: Machine) -> None:
        if not machine.awake or machine.state.wake_ns is None:
            return
        if self.rng.random() < (0.5 if self.faults else 0.05) and not machine.pausing:
            self.now = max(self.now, int((machine.state.wake_ns - 10**12) / machine.rate) + 1)
        machine.step(Tick())

    def _beat(self, machine: Machine) -> None:
        self.wire.send(machine)

    def _deliver(self, _machine: Machine) -> None:
        self.wire.deliver()

    def _suspect(self, machine: Machine) -> None:
        self.wire.suspect(machine)

    def _wire(self, _machine: Machine) -> None:
        self.wire.join()

    def _link(self, _machine: Machine) -> None:
        self.mirror.join()

    def _frame(self, machine: Machine) -> None:
        self.mirror.deliver(machine)

    def _write(self, _machine: Machine) -> None:
        self.mirror.write()

    def _read(self, _machine: Machine) -> None:
        self.mirror.read()

    def _flush(self, machine: Machine) -> None:
        if machine.awake and machine.acknowledges():
            self.mirror.flush(machine)

    def _quiet(self, machine: Machine) -> None:
        if machine.awake:
            machine.go_quiet()

    def _generation(self, machine: Machine) -> None:
        self.mirror.generation(machine)

    def _start(self, machine: Machine) -> None:
        if not machine.up and machine is not self.fault.fenced:
            machine.start()

    def _alone(self, machine: Machine) -> None:
        if machine.state.phase is Phase.ALONE:
            self.mirror.complete(machine)
            machine.look = True

    def _idle(self, machine: Machine) -> None:
        machine.look = True

    def _stopping(self, machine: Machine) -> None:
        if machine.stopping and machine.awake:
            self.fault.stop(machine)

    def _late(self, _machine: Machine) -> None:
        if self.witness.late:
            self.witness.land(self.rng.randrange(len(self.witness.late)))

    def _cut(self, _machine: Machine) -> None:
        self.wire.cut("cut")

    def _unlink(self, _machine: Machine) -> None:
        self.mirror.cut("flap")

    def _crash(self, machine: Machine) -> None:
        self.fault.kill(machine)
        if self.sentinels and self.rng.random() < 0.3:
            self.wire.report()

    def _power(self, machine: Machine) -> None:
        self.fault.power(machine)

    def _promote(self, machine: Machine) -> None:
        if machine.awake and (machine.other.disk.new or not machine.disk.new):
            self.fault.promote(machine)

    def _handoff(self, machine: Machine) -> None:
        if machine.awake:
            machine.step(Handoff())

    def _pause(self, _machine: Machine) -> None:
        self.pause(paused=not self.witness.record.register.pause)

    def _witness(self, _machine: Machine) -> None:
        self.witness.up = not self.witness.up

    def _way(self, machine: Machine) -> None:
        self.way[machine.name] = not self.way[machine.name]

    def _sleep(self, _machine: Machine) -> None:
        self.now += self.rng.randrange(5 * S)  # all of it: machines that stand still, answers that are late

    def _freeze(self, machine: Machine) -> None:
        self.fault.freeze(machine, self.rng.randrange(2 * TIMING.promise_ns))

    def _mute(self, machine: Machine) -> None:
        self.wire.mute[machine.name] = not self.wire.mute[machine.name]

    def _report(self, _machine: Machine) -> None:
        self.wire.report()

    def _disk(self, machine: Machine) -> None:
        self.fault.disk_fails(machine)

    def _blank(self, machine: Machine) -> None:
        self.fault.blank(machine)

    def _backup(self, machine: Machine) -> None:
        self.fault.back_up(machine)

    def _rollback(self, machine: Machine) -> None:
        self.fault.roll_back(machine)

    def _force(self, machine: Machine) -> None:
        self.fault.force(machine)

    def _stop(self, machine: Machine) -> None:
        if machine.awake:
            self.fault.stop(machine)

    def _demote(self, machine: Machine) -> None:
        if machine.awake:
            machine.step(Demote())

    def _restore(self, _machine: Machine) -> None:
        self.witness.restore()

    def pause(self, *, paused: bool) -> None:
        """By a person, as noderegister.py's `set_pause`; read and written at once."""
        record = self.witness.record
        if not record.version:
            return
        old = record.register
        new = msgspec.structs.replace(
            old,
            pause=paused,
            latched=old.latched and paused,
            role_changes=old.role_changes if paused else (),
            writer=None,
        )
        if self.witness.cas(record.version, new) and not paused:
            self.checks.resumed()
