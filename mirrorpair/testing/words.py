"""What the simulation's parts have in common: its numbers, what travels, and how a broken promise is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mirrorpair.liveness import RHO_PER_MILLE, Timing

if TYPE_CHECKING:
    from mirrorpair.arbiter import Incarnation
    from mirrorpair.rolewords import RoleName, Swap

S = 10**9
TIMING = Timing(interval_ns=S // 4, promise_ns=3 * S, suspect_after=4)
"""the product's defaults"""
RHO = RHO_PER_MILLE / 1000
BLOCKS = 24
TORN = -1
"""neither the old nor the new content of a block, after a lost boot"""
NODES = ("alpha", "beta")
ATTEMPTS = 5
FAILBACK_NS = 4 * S
HOUR_NS = 3600 * S
LAST_WORDS = 80


class BrokenError(AssertionError):
    """An invariant does not hold. `invariant`: its id; `trace`: what happened before, oldest first."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant, self.what = invariant, what
        self.trace: list[str] = []

    def __str__(self) -> str:
        return "\n".join([f"{self.invariant}: {self.what}", *self.trace[-LAST_WORDS:]])

    def __reduce__(self) -> tuple[type[BrokenError], tuple[str, str], dict[str, list[str]]]:
        return BrokenError, (self.invariant, self.what), {"trace": self.trace}


class Beat(NamedTuple):
    """A heartbeat on its way in one session, from `sender`; its answer when `promise` is given."""

    session: int
    sender: str
    seq: int
    promise: int | None
    role: RoleName
    epoch: int
    floor: int
    version: tuple[int, int]


class Frame(NamedTuple):
    """On a data link. `write` and `copy` carry a block, `ack` answers a write, `done` ends a resync and is answered by
    `over`."""

    link: int
    epoch: int
    kind: str
    block: int = 0
    value: int = 0


class Flight(NamedTuple):
    """A write that a client waits for. `there`: the peer has answered for it in this link. `lost`: this node's disk has
    failed at it (A14)."""

    value: int
    there: bool = False
    lost: bool = False


class Attempt:
    """A swap that is being carried out."""

    def __init__(self, action: Swap, session: int | None, equal: Incarnation | None) -> None:
        self.action = action
        self.nonces: set[int] = set()
        self.unknown = False
        self.tries = 0
        self.tried = -1
        """the highest version that it was sent on"""
        self.session, self.equal = session, equal
        """in which the peer was found equal, and who that was"""
        self.pause = self.latched = False
