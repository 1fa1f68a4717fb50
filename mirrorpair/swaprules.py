"""Arbitrated pair: whether a swap still follows from the record that was read for it. Pure.

Rules:
- A3, A8 A node acquires the role only as a member of the in-sync set of the record read, by the incarnation that is
  written there; a person may override that. A node that was made anew is none, whatever its name is.
- A4 The epoch of an acquisition is above the record's. Otherwise somebody acquired it since this was decided. Who lost
  its boot acquires nothing while the record lists another member, which may hold what was lost.
- A11 Nothing is taken from the primary of record while this node's own promise to it runs, unless a person forces it,
  who knows that it serves no more.
- A19 A paused pair changes its primary only when a person asks; F16 a latched one still fails over from a dead primary.
- A15 The first epoch follows only from a record in which nobody was ever primary; as it is unasked, not while the pair
  is paused.
- A1 The set changes only at the epoch and under the primary for which that was decided.
- A0 A record that an earlier attempt of the same swap has written is no reason against the next one, which must follow:
  only its success says that none of them is still on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mirrorpair.rolewords import ACQUISITIONS

if TYPE_CHECKING:
    from mirrorpair.rolewords import Swap


class Read(NamedTuple):
    """What was read. `known`: this node's incarnation is the one that the record has for it, or it has none; `own`: an
    earlier attempt of this swap wrote it. `boot_lost`: this node's, and it has not been made good since.
    `bound`: by its own promise."""

    epoch: int
    primary: str | None
    in_sync: tuple[str, ...]
    pause: bool = False
    known: bool = True
    boot_lost: bool = False
    bound: bool = False
    own: bool = False
    latched: bool = False


def _unwanted(read: Read) -> str | None:
    """A19, F16."""
    if read.pause:
        return "the pair is paused"
    return "there were too many role changes within an hour: `mirrorpair resume` ends that" if read.latched else None


def objection(swap: Swap, me: str, read: Read) -> str | None:
    """Why the swap must not be made, one sentence, or None."""
    if read.own:
        return None
    if swap.purpose == "raise":
        if swap.overrides and read.epoch < swap.epoch:
            return None
        if read.primary != me or read.epoch >= swap.epoch:
            return f"the register says that {read.primary or 'nobody'} is primary of epoch {read.epoch}"
        return None
    if swap.purpose in ("handoff", "abdicate"):
        if read.primary != me or read.epoch >= swap.epoch:
            return f"the register says that {read.primary or 'nobody'} is primary of epoch {read.epoch}"
        if swap.primary not in read.in_sync:
            return f"{swap.primary} is not in sync any more"
        if swap.purpose == "abdicate":  # as for a dead primary
            return "the pair is paused" if read.pause else None
        return _unwanted(read) if swap.unasked else None
    if swap.purpose not in ACQUISITIONS:
        wanted = me if swap.purpose in ("shrink", "release") else swap.primary
        if (read.epoch, read.primary) != (swap.epoch, wanted):
            return f"the register says that {read.primary or 'nobody'} is primary of epoch {read.epoch}"
        return None
    if read.epoch >= swap.epoch:
        return f"the register is at epoch {read.epoch} already, of which {read.primary or 'nobody'} is primary"
    if swap.purpose == "readopt" and read.primary != me:
        return f"the register says that {read.primary or 'nobody'} is primary"
    if swap.purpose == "takeover" and read.primary in (None, me):
        return f"the register says that {read.primary or 'nobody'} is primary, from whom there is nothing to take over"
    if swap.purpose == "bootstrap" and (read.epoch or read.primary is not None):
        return f"the register is not new: somebody was primary of epoch {read.epoch}"
    if swap.purpose in ("bootstrap", "takeover") and read.pause:
        return "the pair is paused"
    if read.bound and read.primary not in (None, me) and not swap.forced:
        return f"{me} has promised {read.primary} not to take over yet"
    if swap.overrides:
        return None
    if read.in_sync and me not in read.in_sync:
        return f"{me} is not in sync: the register says that only {' and '.join(read.in_sync)} has everything"
    if read.in_sync and not read.known:
        return f"the register knows {me} as another one than this: it was made anew, or its state replaced"
    if read.boot_lost and any(member != me for member in read.in_sync):
        return f"{me} lost its boot, and the register lists another member, which may hold what was lost"
    return None
