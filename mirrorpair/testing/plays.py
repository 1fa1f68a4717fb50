"""What is played with a seed: storms of everything, and the worst moments one by one, which storms meet too rarely.

Rules:
- A play takes dice, makes a world, and ends with all invariants checked; what it wants to show is an assertion in it.
- `PLAYS` names them; a campaign goes through all of them, and a seed with its play is a failure that can be repeated.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mirrorpair.rolewords import Handoff, Phase, Tick
from mirrorpair.testing.words import TIMING, BrokenError, S
from mirrorpair.testing.world import FAIR_NS, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from mirrorpair.testing.machine import Machine

STEPS = 1500
LATE_ONLY = [0, 0, 0, 1]
SLACK_NS = S // 2
"""for the swap, and for the steps in which time passes here"""


def storm(dice: random.Random, steps: int = STEPS, *, sentinels: bool = False, **traits: object) -> World:
    """Everything fails, then nothing does. `traits`: what the world's own dice have chosen otherwise."""
    world = World(dice, sentinels=sentinels)
    for name, value in traits.items():
        assert hasattr(world, name)
        setattr(world, name, value)
    world.run(steps)
    world.heal()
    return world


def deaths(dice: random.Random, steps: int = STEPS) -> World:
    """A storm with sentinels."""
    return storm(dice, steps, sentinels=True)


def rare(dice: random.Random, steps: int = STEPS) -> World:
    """A storm with failed disks, blank and restored ones, persons who force, stops, and a restored record."""
    return storm(dice, steps, rare=3)


def parted(dice: random.Random, steps: int = STEPS) -> World:
    """The two lose each other for a while, again and again, when all was well; nothing else fails."""
    world = World(dice)
    for _ in range(max(1, steps // 250)):
        world.heal()
        for machine in world.machines:
            world.wire.exchange(machine)
        world.faults = True
        world.fault.part()
        world.run(250)
    return world


def late_reports(dice: random.Random, steps: int = STEPS) -> World:
    """Kills whose proofs come when both are in sync again and have just lost each other: then they are dangerous."""
    world = World(dice, sentinels=True)
    for _ in range(max(1, steps // 400)):
        world.heal()
        old = world.primary()
        assert old is not None
        world.fault.kill(old, proven=1)
        world.heal()
        world.faults = True
        world.fault.part()
        world.wire.report()
        world.run(250)
    world.heal()
    return world


def bad_disk(dice: random.Random, steps: int = STEPS) -> World:
    """A14: when all is well the primary's disk fails, in a storm; later it is another one."""
    world = World(dice, sentinels=dice.random() < 0.5)
    for _ in range(max(1, steps // 300)):
        old = world.ready()
        world.faults = True
        for _ in range(dice.randrange(4)):
            world.mirror.write()
        world.fault.disk_fails(old)
        world.run(250)
    world.heal()
    return world


# --- the worst moments


def _swap_late(world: World, machine: Machine) -> None:
    """Its next swap is on its way, and nothing is known of it."""
    faults, fates, attempts = world.faults, world.fates, world.attempts
    world.faults, world.fates, world.attempts = True, LATE_ONLY, 1
    machine.ask()
    machine.ask()
    world.faults, world.fates, world.attempts = faults, fates, attempts
    assert world.witness.late


def _end_apart(world: World, old: Machine) -> None:
    """The late swap lands when the old primary hears neither the new one nor the witness any more; the new one serves
    alone."""
    new = old.other
    world.wire.cut("cut")
    world.wire.broken_until = world.now + 3600 * S
    world.way[old.name] = False
    assert world.witness.land()
    assert world.witness.record.register.primary == new.name
    before = world.checks.acks
    world.fair(lambda: world.checks.acks > before + 20 and new.acknowledges(), 4 * TIMING.promise_ns)


def late_handoff(dice: random.Random) -> World:
    """The role is given away by a swap that comes late, when the two hear nothing of each other any more, and the old
    primary nothing of the witness either; then the new one answers writes alone. All else goes well."""
    world = World(dice)
    old = world.ready()
    world.wire.exchange(old)
    old.step(Handoff())
    old.work_off()
    while old.pausing:
        old.go_quiet()
        old.work_off()
    world.pause(paused=True)  # so that the swap is made on a version which the old primary has not looked at before
    _swap_late(world, old)
    old.work_off()
    old.look = True
    old.ask()
    old.work_off()
    _end_apart(world, old)
    return world


def late_takeover(dice: random.Random) -> World:
    """The standby takes over by a swap that comes late; before that the two meet again, and lose each other."""
    world = World(dice)
    old = world.ready()
    new = old.other
    world.wire.exchange(old)
    world.way[old.name] = False
    world.wire.cut("cut")
    world.now += 2 * TIMING.promise_ns
    old.work_off()
    new.work_off()
    new.step(Tick())
    _swap_late(world, new)
    new.work_off()
    world.wire.join()
    for machine in world.machines:
        machine.work_off()
    world.wire.exchange(old)
    _end_apart(world, old)
    return world


def _write_alone(world: World, machine: Machine) -> None:
    for _ in range(8):
        machine.work_off()
        world.mirror.write()
        world.mirror.generation(machine)
        world.checks.check()


def late_expand(dice: random.Random) -> World:
    """The standby is taken into the set again by a swap that comes late; before that the two lose each other once more,
    and the primary the witness. Then the standby takes over."""
    world = World(dice)
    old = world.ready()
    new = old.other
    world.wire.cut("cut")
    old.work_off()
    new.work_off()
    world.now += 2 * TIMING.suspect_ns
    old.step(Tick())
    old.ask()
    old.work_off()
    assert old.state.phase is Phase.ALONE
    _write_alone(world, old)
    world.wire.join()
    for _ in range(3):
        for machine in world.machines:
            machine.work_off()
            if not machine.attempts:
                machine.look = True
                machine.ask()
            machine.work_off()
        world.mirror.join()
    assert world.mirror.drain()
    old.work_off()
    new.work_off()
    _swap_late(world, old)
    old.work_off()
    world.way[old.name] = False
    world.wire.cut("cut")
    world.wire.broken_until = world.now + 3600 * S
    _write_alone(world, old)
    assert world.witness.land()
    world.now += 2 * TIMING.promise_ns
    world.fair(new.acknowledges, 4 * TIMING.promise_ns)
    return world


def flap_then_death(dice: random.Random) -> World:
    """A17: the link flaps while writes are in flight, and before they were all sent again the primary dies: the standby
    takes over at once. Or it was the standby's host that flapped: then it may not, while it lacks them (A7)."""
    world = World(dice, sentinels=True)
    world.cap, world.rare = 0, 0
    old = world.ready()
    new = old.other
    reboots = dice.random() < 0.5
    for _ in range(12):
        world.mirror.write()
        if dice.random() < 0.7:
            world.mirror.deliver(new)
            world.mirror.deliver(old)
    if reboots:
        world.fault.power(new)
        new.start()
    else:
        world.mirror.cut("flap")
    began = world.now
    for _ in range(100):
        for machine in world.machines:
            machine.work_off()
            machine.look = True
            machine.ask()
            machine.work_off()
        world.wire.join()
        for machine in world.machines:
            machine.work_off()
        world.mirror.join()
        if world.mirror.link is not None:
            break
    assert world.mirror.link is not None
    for _ in range(dice.randrange(4)):
        world.mirror.deliver(new)
    old.work_off()
    new.work_off()
    world.checks.check()
    world.fault.crash(old)
    before = world.checks.acks
    limit = TIMING.obligation_ns(TIMING.promise_ns) + SLACK_NS
    if reboots:
        world.fair(lambda: world.now - began > 2 * limit, 3 * limit)
        assert world.checks.acks == before, "who lacks acknowledged writes serves"
        return world
    world.fair(lambda: world.checks.acks > before, limit)
    return world


def blank_then_death(dice: random.Random) -> World:
    """A8: the standby is replaced by a blank one of the same name, and before that has anything the primary dies: the
    blank one may not take over, whatever the record says of its name."""
    world = World(dice)
    old = world.ready()
    new = old.other
    world.fault.blank(new)
    new.start()
    world.fault.crash(old)
    began, before = world.now, world.checks.acks
    world.fair(lambda: world.now - began > 3 * TIMING.promise_ns, 4 * TIMING.promise_ns)
    if world.checks.acks != before:
        raise BrokenError("I4", "a blank one serves")
    world.heal()
    return world


ONE_FAULT = (
    "kill",
    "silent kill",
    "power",
    "cut off",
    "freeze",
    "standby dies",
    "link cut",
    "witness away",
    "loss",
    "disk",
)


def one_fault(dice: random.Random) -> World:
    """I8: all is well, one thing fails, and writes are answered again within the formula: a promise and a bit where the
    primary fell silent, the time of suspicion where the standby did, at once where the death is proven."""
    world = World(dice, sentinels=True)
    old = world.ready()
    for machine in world.machines:
        world.wire.exchange(machine)
    fault = dice.choice(ONE_FAULT)
    silent = TIMING.obligation_ns(TIMING.promise_ns) + SLACK_NS
    limit = silent
    far = world.now + 3600 * S
    if fault == "kill":
        world.fault.kill(old, proven=1)
        world.wire.report()
        limit = SLACK_NS
    elif fault == "silent kill":
        world.fault.crash(old)
    elif fault == "power":
        world.fault.power(old)
    elif fault == "cut off":
        world.wire.cut("cut")
        world.wire.broken_until = far
        world.way[old.name] = False
    elif fault == "freeze":
        world.fault.freeze(old, 3 * TIMING.promise_ns)
    elif fault == "standby dies":
        world.fault.crash(old.other)
        limit = 2 * TIMING.suspect_ns
    elif fault == "link cut":
        world.wire.cut("cut")
        world.wire.broken_until = far
        limit = 2 * TIMING.suspect_ns
    elif fault == "disk":
        world.fault.disk_fails(old)
        limit = TIMING.suspect_ns + SLACK_NS  # who is there without a disk is waited for by writes, not by reads
    elif fault == "loss":
        world.wire.mute[old.name] = True
        limit = 2 * TIMING.suspect_ns + SLACK_NS
    else:
        world.witness.up = False
        limit = 4 * FAIR_NS
    world.say(f"the one fault: {fault}")
    before = world.checks.acks
    world.fair(lambda: world.checks.acks > before, limit)
    if fault in ("silent kill", "power", "cut off", "freeze", "kill", "disk"):
        serving = world.primary() if fault != "freeze" and fault != "cut off" else old.other
        if serving is None or serving.name != old.peer:
            raise BrokenError("I8", f"after {fault} the standby does not serve")
    world.fair(lambda: world.now > far - 3590 * S, 20 * S)
    world.heal()
    return world


PLAYS: dict[str, Callable[[random.Random], World]] = {
    "storm": storm,
    "deaths": deaths,
    "rare": rare,
    "parted": parted,
    "late-reports": late_reports,
    "bad-disk": bad_disk,
    "late-handoff": late_handoff,
    "late-takeover": late_takeover,
    "late-expand": late_expand,
    "flap-then-death": flap_then_death,
    "blank-then-death": blank_then_death,
    "one-fault": one_fault,
}


SCALED: dict[str, Callable[[random.Random, int], World]] = {
    "storm": storm,
    "deaths": deaths,
    "rare": rare,
    "parted": parted,
    "late-reports": late_reports,
    "bad-disk": bad_disk,
}
"""those that have a length"""


def play(name: str, seed: int, steps: int | None = None) -> World:
    """One of PLAYS, by default as long as it is of itself. BrokenError: an invariant does not hold."""
    dice = random.Random(seed)
    if steps is not None and name in SCALED:
        return SCALED[name](dice, steps)
    return PLAYS[name](dice)
