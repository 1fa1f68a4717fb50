"""The witness of the simulation: one record, swaps that are lost or late, and a copy from a backup (F7, F14, F17).

Rules:
- What may follow what is decided by the product's own `check_successor`, as in the real one.
- A change of primary is judged here, at the moment at which it happens (I4, I7, A19).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.arbiter import Register, Versioned, check_successor

if TYPE_CHECKING:
    from mirrorpair.testing.world import World

KEPT = 6


class Witness:
    """`up`: it answers at all. `late`: swaps that are on their way, also of nodes that are dead by now."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.record = Versioned()
        self.older = [self.record]
        self.newest = self.record
        """of all that were ever there"""
        self.up = True
        self.late: list[tuple[int, Register]] = []

    def cas(self, version: int, new: Register, *, late: bool = False) -> bool:
        old = self.record.register
        if version != self.record.version or check_successor(old, new) is not None:
            return False
        self.record = Versioned(version=version + 1, register=new)
        self.older = [*self.older[1 - KEPT :], self.record]
        self.newest = max(self.newest, self.record, key=lambda one: (one.register.epoch, one.version))
        world = self.world
        world.say(f"witness: epoch {new.epoch}, {new.primary}, {new.in_sync}{', late' if late else ''}")
        nonce = 0 if new.writer is None else new.writer.nonce
        if old.primary is not None and new.primary not in (None, old.primary):
            world.changes += 1
            world.checks.role_changed(new, asked=nonce in world.asked, unasked=nonce in world.unasked)
        if new.primary is not None and new.epoch > old.epoch:
            node = world.node[new.primary]
            if nonce in world.overriding:
                world.checks.given_up(node)
            world.checks.named(node, late=late)
        return True

    def land(self, at: int = -1) -> bool:
        """A late swap arrives; whether it changed the record."""
        return self.cas(*self.late.pop(at), late=True)

    def restore(self) -> None:
        """F17: to a copy that both nodes know to be old. What is on its way to it goes with its connections."""
        copy = self.world.rng.choice(self.older)
        if not all(machine.stale(copy) for machine in self.world.machines):
            return
        self.record = copy
        self.older, self.late = [self.record], []
        self.world.say(f"witness: restored, epoch {self.record.register.epoch}, version {self.record.version}")
