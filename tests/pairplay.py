"""A pair of nodes in a few lines, to play against `history.decide`: blocks that hold numbers, a cache that a lost boot
forgets, bits, ids, crashes at any point. No I/O and no time.

What is played as the rules say it: a write is acknowledged when both nodes have it (G1-G3: or alone, after a new
generation); a barrier makes both durable (W5); a lost link makes the unflushed dirty (W7); an active extent becomes
dirty after a crash (M3-M5); promotion only of an in-sync node, flushed first (A3, A4, W8); the target of a resync is
inconsistent before its first overwrite and takes the source's ids at the end (R1, G4); a full compare has a number,
which the target keeps with that, and the source at any moment once its bits are all there (R6).

What is checked (LostWriteError):
- The source of a resync, and a node that is promoted, has every acknowledged write; unless it was never flushed, and
  all who had to have it lost their boot.
- When a resync has ended or none was needed, both nodes hold the same.
- What was flushed is there when all is healed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.history import (
    Decision,
    DiskState,
    Ids,
    Role,
    Side,
    adopt,
    began_alone,
    decide,
    first,
    forget_bitmap,
)

if TYPE_CHECKING:
    import random

BLOCKS = 4
NAMES = ("alpha", "beta")


class LostWriteError(AssertionError):
    """The table lost a write."""


class Node:
    def __init__(self, name: str) -> None:
        self.name = name
        self.data = [0] * BLOCKS
        self.durable = [0] * BLOCKS
        self.bits: set[int] = set()
        self.lost_bits: set[int] = set()  # of those, what is not durable
        self.active: set[int] = set()  # written, not confirmed flushed by both; durable, as extents of the log
        self.ids = Ids()
        self.disk: DiskState = "consistent"
        self.epoch = 0
        self.needs_id = True  # G1
        self.full_id = 0  # R6
        self.up = True
        self.role: Role = "secondary"
        self.crashed_primary = self.boot_lost = self.survivor = False

    def flush(self) -> None:
        self.durable = list(self.data)

    def side(self, in_sync: set[str]) -> Side:
        return Side(
            node=self.name,
            size=BLOCKS,
            block_size=1,
            ids=self.ids,
            new=self.ids.current == 0,
            role=self.role,
            disk=self.disk,
            crashed_primary=self.crashed_primary,
            boot_lost=self.boot_lost,
            connected_survivor=self.survivor,
            missed_end=self.disk == "inconsistent",
            dirty=bool(self.bits),
            alone=self.role == "primary" and in_sync == {self.name} and bool(self.bits),
            epoch=self.epoch,
            full_id=self.full_id,
        )


class Pair:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.nodes = {name: Node(name) for name in NAMES}
        self.linked = False
        self.resync: Decision | None = None  # the one that runs
        self.in_sync = set(NAMES)
        self.acked = [0] * BLOCKS
        self.flushed = [0] * BLOCKS
        self.clock = 0
        self.amounts: set[str] = set()

    def new_number(self) -> int:
        self.clock += 1
        return self.clock

    def primary(self) -> Node | None:
        return next((node for node in self.nodes.values() if node.up and node.role == "primary"), None)

    def other(self, node: Node) -> Node:
        return self.nodes[NAMES[1 - NAMES.index(node.name)]]

    # What can happen

    def write(self) -> None:
        node = self.primary()
        if node is None:
            return
        block, value = self.rng.randrange(BLOCKS), self.new_number()
        node.active.add(block)
        if self.linked:
            places = [node, self.other(node)]
            if self.rng.random() < 0.2:  # a crash or a lost link finds it on one of them only
                places.pop(self.rng.randrange(2))
            for place in places:
                place.data[block] = value
            if len(places) == 2:
                self.acked[block] = value
                if self.resync and block in node.bits and self.other(node).disk == "inconsistent":
                    node.bits.discard(block)  # R5: a whole block, so it is the same on both now
                return
            (self.rng.choice([self.cut, self.kill_primary, self.power_primary]))()
            return
        if node.name not in self.in_sync:
            return
        self.in_sync = {node.name}
        if node.needs_id:
            node.ids, node.needs_id = began_alone(node.ids, self.new_number()), False  # G1, G2
        node.bits.add(block)
        node.lost_bits.discard(block)
        node.data[block] = value
        self.acked[block] = value

    def barrier(self) -> None:
        node = self.primary()
        if node is None:
            return
        node.flush()
        if self.linked:
            self.other(node).flush()
        if self.linked or self.in_sync == {node.name}:
            node.active.clear()
            self.flushed = list(self.acked)

    def cut(self) -> None:
        """The link is lost."""
        if not self.linked:
            return
        self.linked, self.resync = False, None
        for node in self.nodes.values():
            node.needs_id = True
            if node.up:
                node.bits |= node.active

    def kill(self, node: Node, *, power: bool = False) -> None:
        if not node.up:
            return
        other = self.other(node)
        was_linked = self.linked
        node.up = False
        self.cut()
        if node.role == "primary":
            node.crashed_primary = True
            if was_linked and other.up and self.in_sync == set(NAMES):
                other.survivor = True
        node.role = "secondary"
        node.survivor = False
        node.bits -= node.lost_bits
        node.lost_bits = set()
        if power:
            node.boot_lost = True
            node.data = [self.rng.choice(pair) for pair in zip(node.data, node.durable, strict=True)]
            node.flush()
        node.bits |= node.active

    def kill_primary(self) -> None:
        if node := self.primary():
            self.kill(node)

    def power_primary(self) -> None:
        if node := self.primary():
            self.kill(node, power=True)

    def kill_any(self) -> None:
        self.kill(self.rng.choice(list(self.nodes.values())))

    def power_any(self) -> None:
        node = self.rng.choice(list(self.nodes.values()))
        if node.up:
            self.kill(node, power=True)
        elif not node.boot_lost:  # its daemon was off when the host went
            node.boot_lost = True
            node.data = [self.rng.choice(pair) for pair in zip(node.data, node.durable, strict=True)]
            node.flush()

    def stop(self) -> None:
        """A clean stop."""
        node = self.rng.choice(list(self.nodes.values()))
        if not node.up or self.resync:
            return
        self.barrier()
        node.flush()
        linked = self.linked
        self.cut()
        if linked and node.role == "secondary" and self.primary():
            self.in_sync = {self.other(node).name}
            node.disk = "outdated"
        node.role, node.up = "secondary", False

    def replace(self) -> None:
        """A node that nobody needs gets a blank disk and is made new."""
        node = self.rng.choice(list(self.nodes.values()))
        other = self.other(node)
        if self.in_sync == {other.name} and other.ids.current:
            self.kill(node)
            blank = self.nodes[node.name] = Node(node.name)
            blank.up = False

    def start(self) -> None:
        for node in self.nodes.values():
            node.up = True

    def promote(self) -> None:
        """A3, A4: an in-sync node whose peer cannot be primary."""
        node = self.rng.choice(list(self.nodes.values()))
        other = self.other(node)
        sole = self.in_sync == {node.name}
        if not node.up or self.primary() or node.name not in self.in_sync or node.disk == "inconsistent":
            return
        if node.boot_lost and not sole:
            return
        if not self.linked and other.up and not sole:
            return
        if not self.linked and node.ids.current and other.name in self.in_sync and not node.survivor:
            return  # nobody has seen how the other one ended
        self.check_promoted(node, excused=node.boot_lost)
        node.flush()
        node.role, node.needs_id = "primary", True
        node.disk = "up-to-date"
        node.epoch = 1 + max(node.epoch, other.epoch if self.linked else 0)
        if self.linked:
            other.epoch = node.epoch
        if node.bits and not sole and not self.linked:
            node.bits |= node.active

    def demote(self) -> None:
        if (node := self.primary()) and (self.linked or self.in_sync == {node.name}):
            self.barrier()
            node.role = "secondary"

    def connect(self) -> None:
        one, other = self.nodes["alpha"], self.nodes["beta"]
        if self.linked or not (one.up and other.up):
            return
        found = decide(one.side(self.in_sync), other.side(self.in_sync))
        self.amounts.add(found.amount)
        if found.amount in ("split-brain", "unrelated"):
            raise LostWriteError(found.reason)
        if found.amount == "refuse":
            return
        self.linked = True
        one.epoch = other.epoch = max(one.epoch, other.epoch)
        if found.amount == "none":
            if found.rule == "both-new":
                one.ids = other.ids = first(self.new_number())
            self.check_equal(found)
            self.check_kept(one, other, found)
            self.settle()
            return
        assert found.source is not None
        source, target = self.nodes[found.source], self.other(self.nodes[found.source])
        self.check_kept(source, target, found)
        if found.amount == "full":
            target.full_id = self.new_number()
            source.lost_bits |= set(range(BLOCKS)) - source.bits
            source.bits = set(range(BLOCKS))
        source.bits |= target.bits
        self.in_sync = {source.name}
        target.disk = "inconsistent"
        target.bits, target.active = set(), set()
        self.resync = found
        if self.rng.random() < 0.5:
            self.keep_full(source, target)

    def keep_full(self, source: Node, target: Node) -> None:
        """The source's bits are durable (R2)."""
        source.lost_bits = set()
        if self.resync and self.resync.amount == "full":
            source.full_id = target.full_id

    def copy(self) -> None:
        """One block of the resync."""
        if self.resync is None or self.resync.source is None:
            return
        source = self.nodes[self.resync.source]
        target = self.other(source)
        if self.rng.random() < 0.5:
            self.keep_full(source, target)
        if source.bits:
            block = self.rng.choice(sorted(source.bits))
            target.data[block] = source.data[block]
            target.durable[block] = source.durable[block] = source.data[block]
            source.bits.discard(block)
            return
        target.flush()
        source.flush()
        target.ids, target.disk = adopt(source.ids), "up-to-date"
        target.crashed_primary = target.boot_lost = target.survivor = False
        target.full_id = 0
        if self.rng.random() < 0.1:
            self.cut()  # the source does not learn of the end
            return
        self.check_equal(self.resync)
        source.full_id = 0
        self.resync = None
        self.settle()

    def settle(self) -> None:
        """Both are the same: what was said of crashes is over."""
        for node in self.nodes.values():
            node.crashed_primary = node.boot_lost = node.survivor = False
            node.disk = "up-to-date"
            node.ids = forget_bitmap(node.ids)
            if node.role == "secondary":
                node.active = set()
        self.in_sync = set(NAMES)

    # What must hold

    def check_kept(self, source: Node, target: Node, found: Decision) -> None:
        """The source has what was acknowledged, or nobody has to: A4, the only member of record, or both, lost what
        nobody had asked to be flushed."""
        excused = source.boot_lost and (target.boot_lost or target.name not in self.in_sync)
        for block, value in enumerate(source.data):
            if value < self.flushed[block] or (value < self.acked[block] and not excused):
                raise LostWriteError(f"block {block} goes back from {self.acked[block]} to {value} ({found})")
        self.acked = list(source.data)

    def check_promoted(self, node: Node, *, excused: bool) -> None:
        """Clients see this node's data from here on."""
        for block, value in enumerate(node.data):
            if value < self.flushed[block] or (value < self.acked[block] and not excused):
                raise LostWriteError(f"{node.name} is primary without {self.acked[block]} in block {block}")
        self.acked = list(node.data)

    def check_equal(self, found: Decision) -> None:
        one, other = self.nodes["alpha"], self.nodes["beta"]
        if one.data != other.data:
            raise LostWriteError(f"{one.data} and {other.data} are taken for equal ({found})")

    def check_flushed(self) -> None:
        for node in self.nodes.values():
            for block in range(BLOCKS):
                if node.data[block] < self.flushed[block]:
                    raise LostWriteError(f"{node.name} block {block}: {node.data[block]} < {self.flushed[block]}")


EVENTS = [
    (Pair.write, 12),
    (Pair.barrier, 3),
    (Pair.connect, 6),
    (Pair.copy, 8),
    (Pair.promote, 6),
    (Pair.start, 3),
    (Pair.demote, 1),
    (Pair.cut, 1),
    (Pair.kill_any, 1),
    (Pair.power_any, 1),
    (Pair.stop, 1),
    (Pair.replace, 1),
]


def play(pair: Pair, steps: int) -> set[str]:
    """Plays so many events, then heals; the amounts that were decided."""
    events = [event for event, weight in EVENTS for _ in range(weight)]
    for _ in range(steps):
        pair.rng.choice(events)(pair)
    pair.start()
    for _ in range(200):
        pair.connect()
        if pair.linked and pair.resync is None:
            break
        pair.copy()
    else:
        raise LostWriteError("two healthy nodes do not come together")
    pair.check_flushed()
    return pair.amounts
