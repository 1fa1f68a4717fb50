"""Arbitrated pair: the record that a swap makes of the one that was read. Pure.

Rules:
- A8 A node writes its own incarnation; the peer's only when it takes it into the set: the one that was found equal.
- F16 Each change of the primary is written down with its time; too many within an hour latch the record.
- F17 A person's raise gives a record that is not believed the set that this node knows; one that is believed keeps its
  own, which may be newer.
- An acquisition ends a handoff; a handoff names who was given the role. A14 So does an abdication, which also says
  whose disk failed, until that one is in sync again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from mirrorpair.arbiter import Incarnation, Register, Writer
from mirrorpair.rolewords import ACQUISITIONS

if TYPE_CHECKING:
    from mirrorpair.rolewords import Swap

MAX_CHANGES = 63


class Author(NamedTuple):
    """Who writes. `equal`: the peer's incarnation when it was found equal; `cap`: so many changes within an hour latch
    the record, 0: none does."""

    node: str
    incarnation: Incarnation
    peer: str
    equal: Incarnation | None
    pair_uuid: str
    mode: str
    cap: int


def successor(old: Register, swap: Swap, by: Author, *, believed: bool, now_s: int, nonce: int) -> Register:
    """`believed`: `old` is no older than what this node has seen. `now_s`: seconds since 1970."""
    members = {**old.members, by.node: by.incarnation}
    if swap.purpose == "expand" and by.equal is not None:
        members[by.peer] = by.equal
    in_sync = swap.in_sync
    if swap.purpose == "raise" and believed:
        in_sync = None  # the record is there, and says it better
    changes = old.role_changes
    if swap.primary is not None and old.primary not in (None, swap.primary):
        changes = (*recent(changes, now_s), now_s)
    handoff = old.handoff
    if swap.purpose in ("handoff", "abdicate"):
        handoff = swap.primary
    elif swap.purpose in ACQUISITIONS:
        handoff = None
    failed = set(old.failed)
    if swap.purpose == "abdicate":
        failed.add(by.node)
    elif swap.purpose == "expand":
        failed -= set(in_sync or ())
    return msgspec.structs.replace(
        old,
        pair_uuid=by.pair_uuid or old.pair_uuid,
        epoch=swap.epoch,
        primary=swap.primary,
        in_sync=old.in_sync if in_sync is None else in_sync,
        members=members,
        mode=by.mode,
        handoff=handoff,
        failed=tuple(sorted(failed)),
        role_changes=changes,
        latched=old.latched or len(changes) >= by.cap > 0,
        writer=Writer(node=by.node, nonce=nonce),
    )


def recent(changes: tuple[int, ...], now_s: int) -> tuple[int, ...]:
    """Those within an hour of `now_s`; a clock that was set back makes none of them old."""
    return tuple(at for at in changes if at > now_s - 3600)[-MAX_CHANGES:]
