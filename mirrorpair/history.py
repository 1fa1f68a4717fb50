"""Generation ids of a volume: which of two nodes holds the newer data, and how much must be copied. Pure.

A generation id is a random 64-bit number that names a stretch of a volume's history. While two nodes are connected they
have the same `current`. The first write that one completes alone makes a new one and keeps the old as `bitmap`: "my
bits cover all that may differ from data of that generation". Older ones move to `history`. A node meets its peer with a
`Side`; both compute `decide` from both sides and must come to the same `Decision`.

Invariants of `Ids` (checked whenever one is made, so also for a peer's):
- ids are 1 to 2^64 - 1 and all different; 0 stands for none; a volume without a current id has no other id.
- a volume is `new` exactly as long as it has no current id. `init --keep-data` makes one; so does the first handshake
  of two new nodes (both get the same, `first`), and the first write alone.

The handshake (`H`). The rows in their order, first match wins; `rule` of the decision is the name before the colon:
- options: node names equal, size or block size differ, both say discard, a disk is failed or missing: refuse.
- both-new: nothing to copy. Only if both are sound: a new node may hold a part of an earlier peer's data. With bits
  (writes that were never answered, before the first id) the source is that of equal ids.
- one-new: it is the target of everything.
- ids equal: the rows of `_EQUAL_ROWS` name the source, and both sides' bits are copied; without bits, crash, or
  half-copied target nothing is (`reconnect`).
- bitmap: the older one's current is the newer one's bitmap id: the newer one's bits, and the older one's.
- history: it is only in the newer one's history: full compare.
- split-brain, unrelated: nothing is copied, unless one side says discard: then that one is the target.

A full compare that was cut off goes on (R6): its target, and its source once all bits are durable there, keep the
compare's number. Two that have the same one differ at most where the source's bits are, whatever row they meet in.

Which rule stands above the rows:
- H1 A side that is not sound (inconsistent, missed the end of a resync, distrusted) is never a source, in any row, nor
  is a new one over data; if that leaves no source: refuse. A primary is never a target, in any row (its clients would
  see their data change).
- H2 is the same for a primary with writes that its peer lacks, with a reason of its own.
- H4 The result does not depend on who asks: the sides are ordered by name first, and every row is symmetric.
- H5 With `register_source` the register names the source and the rows only the amount. It can turn a direction only
  against a side that says discard.

Where the table is silent, this was chosen; each so that no acknowledged write is lost without a person's word:
- One side distrusted (M1, A8: image replaced or rolled back): never the source, and always a full compare. A daemon
  that finds it forgets the number of an earlier one, so that this one is not taken for its continuation.
- Equal ids, the better disk is source (H1): what counts is inconsistent < outdated < the others. `consistent` (not
  compared yet) and `up-to-date` are told apart only after the crash rows, since a boot that was lost weighs more: with
  equal ids both nodes were sent every acknowledged write, so the node that kept its boot has them all (A4, A7), the
  other may have lost the unflushed ones.
- A crashed primary whose peer has a higher epoch was replaced. The peer flushed all when it was promoted (W8) and has
  served since: it is the source, also after a lost boot.
- Both crashed as primary: the higher epoch; the same: the boot that was kept, then the lower node name.
- One crashed secondary: no row of its own. Its peer is source; after a lost boot A7 copies the bits even if it says
  that it has none.
- A primary that lost its boot meets a peer that survived its crash connected, ids equal: the peer may have what the
  primary lost, the primary must not change under its clients: refuse until it is demoted (or the peer says discard).
- Equal ids, both not sound: refuse. The newer one not sound: refuse, for the older one lacks acknowledged writes;
  unless the newer one says discard.
- Both primary: refuse (after split brain and unrelated, which say more).
- Each is older than the other: the ids contradict each other: refuse.
- discard counts only where nothing else helps, or where equal ids and equal fates leave the choice open. Where the side
  that says it would be the source all the same: refuse.

These rows hold for `sync`, where an acknowledged write is on both nodes while the ids are equal (G1-G3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY_IDS = 32
NO_ID = 0
MAX_ID = 2**64 - 1
MAX_NODE_NAME = 255
_MAX_NUMBER = 2**63 - 1

DiskState = Literal["diskless", "failed", "inconsistent", "outdated", "consistent", "up-to-date"]
Role = Literal["primary", "secondary"]
Amount = Literal["none", "bitmap", "full", "refuse", "split-brain", "unrelated"]

DISK_STATES: tuple[DiskState, ...] = ("diskless", "failed", "inconsistent", "outdated", "consistent", "up-to-date")
"""from the worst to the best"""

_RANK = {state: rank for rank, state in enumerate(DISK_STATES)}


class Ids(msgspec.Struct, frozen=True):
    """The generation ids of one volume on one node. ValueError (msgspec.ValidationError when decoded): not valid."""

    current: int = NO_ID
    bitmap: int = NO_ID
    """the generation since which the dirty bits are kept; 0: they are only what one barrier left"""
    history: tuple[int, ...] = ()
    """newest first, at most 32"""

    def __post_init__(self) -> None:
        known = [one for one in (self.current, self.bitmap) if one != NO_ID] + list(self.history)
        if len(self.history) > HISTORY_IDS:
            raise ValueError(f"more than {HISTORY_IDS} ids of history")
        if not (0 <= self.current <= MAX_ID and 0 <= self.bitmap <= MAX_ID):
            raise ValueError("a generation id is not a 64-bit number")
        if any(not 0 < one <= MAX_ID for one in self.history):
            raise ValueError("an id of the history is not a 64-bit number above 0")
        if len(set(known)) != len(known):
            raise ValueError("a generation id stands twice")
        if self.current == NO_ID and known:
            raise ValueError("ids of history without a current one")


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """What one node tells about one volume when it meets its peer. Valid whatever the peer sent, or ValueError."""

    node: str
    size: int
    """bytes"""
    block_size: int
    """bytes per dirty bit"""
    ids: Ids
    new: bool
    """made by `init`, zeros, no id yet"""
    role: Role
    """what it is now; a crashed primary that has not been made primary again says secondary"""
    disk: DiskState
    crashed_primary: bool = False
    """it was primary when it ended without a clean stop"""
    boot_lost: bool = False
    """the host's boot changed without a clean stop: unflushed writes may be gone. Like the flags beside it, until this
    side's next resync is durably over: a target's when it takes over the ids, a source's when it forgets its own"""
    connected_survivor: bool = False
    """its peer crashed as primary while both were connected and in sync, and they have not been in sync since"""
    missed_end: bool = False
    """the target of a resync whose end it did not learn"""
    dirty: bool = False
    """it has dirty bits, those of the active extents after a crash included"""
    alone: bool = False
    """primary with writes that the peer lacks"""
    epoch: int = 0
    """the highest it acquired or learned; a higher one than the peer's was therefore acquired by this node"""
    discard: bool = False
    """a person said that this side's data may be overwritten"""
    distrusted: bool = False
    """M1, A8: the image is not the one its metadata speak of; neither its data nor its bits count"""
    full_id: int = 0
    """R6: of the full compare whose target this is, or all of whose bits this source keeps durably; 0: none"""

    def __post_init__(self) -> None:
        if not 1 <= len(self.node) <= MAX_NODE_NAME or not self.node.isprintable():
            raise ValueError(f"a node name is 1 to {MAX_NODE_NAME} printable characters")
        if not (0 <= self.size <= _MAX_NUMBER and 0 < self.block_size <= _MAX_NUMBER):
            raise ValueError("a size is out of range")
        if not 0 <= self.epoch <= _MAX_NUMBER:
            raise ValueError("the epoch is out of range")
        if not 0 <= self.full_id <= MAX_ID:
            raise ValueError("the number of a full compare is not a 64-bit number")
        if self.new != (self.ids.current == NO_ID):
            raise ValueError("a volume is new exactly as long as it has no current id")


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What two nodes do about one volume. Both compute it and compare: when theirs differ, facts changed meanwhile and
    the handshake is done again."""

    amount: Amount
    rule: str
    """the row that decided, as in the module's text"""
    reason: str
    """one sentence that names the nodes"""
    source: str | None = None
    """the node whose data is copied; None: nothing is"""
    target: str | None = None


def first(new_id: int) -> Ids:
    """What a new volume gets: at the first handshake of two new nodes (the same on both, durable before either serves),
    or from `init --keep-data`."""
    return Ids(current=_checked(new_id))


def began_alone(ids: Ids, new_id: int) -> Ids:
    """G1: the ids before the first write completes alone; to be durable first (G2).

    After every promotion and every lost link, also if the bits are those of an earlier time alone: the peer may have
    taken over the current id at the end of a resync, and its word of that was lost with the link. Without a new id the
    two would seem equal while one has written alone.

    A bitmap id that is there stays: the bits are kept since that one, and a peer of that generation needs no more.
    ValueError: `new_id` is not a new id.
    """
    if _checked(new_id) in (ids.current, ids.bitmap, *ids.history):
        raise ValueError("the new generation id is an old one")
    if ids.bitmap != NO_ID:
        return Ids(new_id, ids.bitmap, _older(ids.current, *ids.history))
    return Ids(new_id, ids.current, ids.history)


def adopt(source: Ids) -> Ids:
    """G4: the target's ids once it has everything: the source's, as they will be when it has forgotten its bitmap
    id."""
    return forget_bitmap(source)


def forget_bitmap(ids: Ids) -> Ids:
    """G4: the source's ids after the target's durable "done". Also right after a handshake of equal ids that copied
    nothing: the "done" was lost then."""
    return Ids(ids.current, NO_ID, _older(ids.bitmap, *ids.history))


def decide(mine: Side, peers: Side, *, register_source: str | None = None) -> Decision:
    """Who is source and how much is copied; see the module's text. `decide(a, b) == decide(b, a)` (H4).

    `register_source`: the node that the register names (H5); None in a lone pair. Never raises.
    """
    low, high = sorted((mine, peers), key=lambda side: side.node)
    plan = _options(low, high, register_source) or _compared(low, high, register_source)
    if isinstance(plan, Decision):
        return plan
    if register_source is not None and plan.source.node != register_source:
        if not plan.source.discard:
            return _refuse(
                "H5",
                f"the register names {register_source} as the source, but {plan.source.node} holds data that would be "
                f"lost: a person has to say which to keep",
            )
        reason = f"{plan.source.node} discards its data, the register names {register_source} as the source"
        plan = plan._replace(source=plan.target, target=plan.source, rule="discard", reason=reason)
    return _allowed(plan)


class _Plan(NamedTuple):
    amount: Literal["bitmap", "full"]
    source: Side
    target: Side
    rule: str
    reason: str


class _Row(NamedTuple):
    """Who is source when the ids are equal: decides when `holds(source, target)` is true one way round only."""

    rule: str
    holds: Callable[[Side, Side], bool]
    reason: str


def _sound(side: Side) -> bool:
    """H1: whether it could be a source at all."""
    return _RANK[side.disk] > _RANK["inconsistent"] and not side.missed_end and not side.distrusted


_EQUAL_ROWS = (
    _Row(
        "missed-end",
        lambda s, t: _sound(s) and t.missed_end,
        "{t} missed the end of a resync: it is finished from {s}",
    ),
    _Row("H1", lambda s, t: _sound(s) and not _sound(t), "{s} has the better disk, {t} is {disk}"),
    _Row("primary", lambda s, t: s.role == "primary" != t.role, "{s} is primary and stays the source"),
    _Row(
        "H1",
        lambda s, t: t.disk == "outdated" and _RANK[s.disk] > _RANK[t.disk],
        "{s} has the better disk, {t} is {disk}",
    ),
    _Row(
        "replaced",
        lambda s, t: t.crashed_primary and s.epoch > t.epoch,
        "{t} crashed as primary and {s} has taken the role since",
    ),
    _Row(
        "survivor",
        lambda s, t: t.boot_lost and not s.boot_lost,
        "{t} lost its boot and with it perhaps unflushed writes, {s} did not",
    ),
    _Row(
        "crashed-primary",
        lambda s, t: s.crashed_primary and not t.crashed_primary and not s.boot_lost,
        "{s} crashed as primary and nobody replaced it: its active extents are copied",
    ),
    _Row(
        "both-off",
        lambda s, t: s.crashed_primary and not t.crashed_primary,
        "both were off and only {s} crashed as primary",
    ),
    _Row("discard", lambda s, t: t.discard and not s.discard, "{t} discards its data, {s} has the same generation"),
    _Row(
        "both-off",
        lambda s, t: s.crashed_primary and t.crashed_primary and s.node < t.node,
        "both crashed as primary in the same epoch: {s} has the lower name",
    ),
    _Row(
        "survivor",
        lambda s, t: s.connected_survivor and not t.connected_survivor,
        "{t} crashed as primary while {s} was connected and lived on",
    ),
    _Row("H1", lambda s, t: _RANK[s.disk] > _RANK[t.disk], "{s} has the better disk, {t} is {disk}"),
    _Row("left-over-bits", lambda s, t: s.dirty and not t.dirty, "bits were left over on {s}"),
    _Row("left-over-bits", lambda s, t: s.epoch > t.epoch, "bits were left over, {s} has the higher epoch"),
    _Row("left-over-bits", lambda s, t: s.node < t.node, "bits were left over on equal terms: {s} has the lower name"),
)


def _options(low: Side, high: Side, register_source: str | None) -> Decision | None:
    """The rows before any data is looked at."""
    if low.node == high.node:
        return _refuse("options", f"both nodes are named {low.node}")
    names = f"{low.node} and {high.node}"
    if low.size != high.size:
        return _refuse("options", f"{names} have volumes of {low.size} and {high.size} bytes: they must be equal")
    if low.block_size != high.block_size:
        return _refuse("options", f"{names} have blocks of {low.block_size} and {high.block_size} bytes")
    if low.discard and high.discard:
        return _refuse("options", f"{names} both say that their own data may go: nothing would be left")
    if register_source not in (None, low.node, high.node):
        return _refuse("options", f"the register names {register_source}, which is neither {low.node} nor {high.node}")
    for side in (low, high):
        if _RANK[side.disk] < _RANK["inconsistent"]:
            return _refuse("options", f"the disk of {side.node} is {side.disk}")
    return None


def _compared(low: Side, high: Side, register_source: str | None) -> Decision | _Plan:
    """The rows by the ids, in their order."""
    if low.new and high.new:
        return _both_primary(low, high) or _both_new(low, high, register_source)
    if low.new or high.new:
        source, target = (high, low) if low.new else (low, high)
        return _Plan("full", source, target, "one-new", f"{target.node} is new: it takes everything from {source.node}")
    if low.ids.current == high.ids.current:
        return _both_primary(low, high) or _equal(low, high, register_source)
    return _by_ancestry(low, high)


def _both_primary(low: Side, high: Side) -> Decision | None:
    if low.role == high.role == "primary":
        return _refuse("H1", f"{low.node} and {high.node} are both primary: demote one of them")
    return None


def _both_new(low: Side, high: Side, register_source: str | None) -> Decision | _Plan:
    if _sound(low) and _sound(high) and (low.dirty or high.dirty):
        plan = _equal(low, high, register_source)
        return plan if isinstance(plan, Decision) else plan._replace(amount="full")
    if _sound(low) and _sound(high):
        return Decision(
            amount="none", rule="both-new", reason=f"{low.node} and {high.node} are both new and hold only zeros"
        )
    source, target = (low, high) if _sound(low) else (high, low)
    return _Plan(
        "full",
        source,
        target,
        "both-new",
        f"{source.node} and {target.node} are both new, but {target.node} may hold something else than zeros",
    )


def _equal(low: Side, high: Side, register_source: str | None) -> Decision | _Plan:
    if not _sound(low) and not _sound(high):
        return _refuse("H1", f"neither {low.node} nor {high.node} has data that could be the source")
    quiet = all(
        _sound(side) and not (side.dirty or side.crashed_primary or side.boot_lost or side.connected_survivor)
        for side in (low, high)
    )
    if quiet:
        return Decision(
            amount="none",
            rule="reconnect",
            reason=f"{low.node} and {high.node} have the same data and no bits are left",
        )
    if register_source is not None:
        source, target = (low, high) if low.node == register_source else (high, low)
        return _Plan("bitmap", source, target, "H5", f"the same generation, and the register names {source.node}")
    for row in _EQUAL_ROWS:
        one, other = row.holds(low, high), row.holds(high, low)
        if one != other:
            source, target = (low, high) if one else (high, low)
            if _lost_to_survivor(source, target):
                return _refuse(
                    "A4",
                    f"{source.node} lost its boot as primary and {target.node} may hold writes that it lost: demote "
                    f"{source.node}, or let {target.node} discard its data",
                )
            reason = row.reason.format(s=source.node, t=target.node, disk=_disk(target))
            return _Plan("bitmap", source, target, row.rule, reason)
    raise AssertionError("the last row tells any two names apart")


def _lost_to_survivor(source: Side, target: Side) -> bool:
    """A4, F18: what a survivor holds is not overwritten from a node that may have lost it."""
    return (
        source.role == "primary"
        and source.boot_lost
        and target.connected_survivor
        and not target.boot_lost
        and _sound(target)
        and not target.discard
    )


def _disk(side: Side) -> str:
    return "another image than its metadata speak of" if side.distrusted else side.disk


def _by_ancestry(low: Side, high: Side) -> Decision | _Plan:
    """Unequal current ids: which of both is a descendant of the other one?"""
    older_than_high, older_than_low = _is_ancestor(low.ids, high.ids), _is_ancestor(high.ids, low.ids)
    if older_than_high and older_than_low:
        return _refuse(
            "contradiction", f"the histories of {low.node} and {high.node} each say that the other one is newer"
        )
    if not older_than_high and not older_than_low:
        return _diverged(low, high)
    newer, older = (high, low) if older_than_high else (low, high)
    if both := _both_primary(low, high):
        return both
    if older.ids.current == newer.ids.bitmap:
        plan = _Plan("bitmap", newer, older, "bitmap", f"{newer.node} has gone on alone since {older.node} left")
    else:
        plan = _Plan("full", newer, older, "history", f"{older.node} is older than the bits that {newer.node} keeps")
    if not _sound(newer) and newer.discard:
        reason = f"{newer.node} is {_disk(newer)}, and its newer data may go: {older.node} is the source"
        return plan._replace(source=older, target=newer, rule="discard", reason=reason)
    return plan


def _diverged(low: Side, high: Side) -> Decision | _Plan:
    known = [{side.ids.current, side.ids.bitmap, *side.ids.history} - {NO_ID} for side in (low, high)]
    same_bitmap = low.ids.bitmap == high.ids.bitmap != NO_ID
    rule: Literal["split-brain", "unrelated"] = "split-brain" if known[0] & known[1] else "unrelated"
    if low.discard or high.discard:
        source, target = (high, low) if low.discard else (low, high)
        reason = f"{rule.replace('-', ' ')}: {target.node} discards its data for {source.node}'s"
        # With the same bitmap id both sides' bits count from the same data.
        return _Plan("bitmap" if same_bitmap else "full", source, target, "discard", reason)
    if rule == "split-brain":
        reason = f"split brain: {low.node} and {high.node} were both written since they had the same data"
    else:
        reason = f"{low.node} and {high.node} hold unrelated data: their histories have nothing in common"
    return Decision(amount=rule, rule=rule, reason=reason)


def _is_ancestor(older: Ids, newer: Ids) -> bool:
    return older.current == newer.bitmap or older.current in newer.history


def _allowed(plan: _Plan) -> Decision:
    """H1, H2 for every row."""
    source, target = plan.source, plan.target
    if source.discard:
        return _refuse(
            "discard",
            f"{source.node} says that its data may go, but it is the source ({plan.reason}): take that back first",
        )
    if source.new and not target.new:
        return _refuse("H1", f"{source.node} is new: its zeros are never copied over the data of {target.node}")
    if not _sound(source):
        return _refuse("H1", f"{source.node} would be the source ({plan.reason}), but it is {_disk(source)}")
    if target.role == "primary":
        if target.alone:
            return _refuse(
                "H2", f"{target.node} would be overwritten ({plan.reason}), but is primary with unreplicated writes"
            )
        return _refuse("H1", f"{target.node} would be overwritten ({plan.reason}), but is primary: demote it first")
    amount: Amount = "full" if target.distrusted else plan.amount
    reason = plan.reason
    if amount == "full" and source.full_id == target.full_id != 0:
        amount = "bitmap"
        reason += ", and goes on with what the last compare had left"
    return Decision(
        amount=amount,
        rule=plan.rule,
        reason=reason,
        source=source.node,
        target=target.node,
    )


def _refuse(rule: str, reason: str) -> Decision:
    return Decision(amount="refuse", rule=rule, reason=reason)


def _checked(new_id: int) -> int:
    if not 0 < new_id <= MAX_ID:
        raise ValueError("a generation id is a 64-bit number above 0")
    return new_id


def _older(*ids: int) -> tuple[int, ...]:
    """History, newest first, without what is none, at most as many as are kept."""
    return tuple(one for one in ids if one != NO_ID)[:HISTORY_IDS]
