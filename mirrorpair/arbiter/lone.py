"""`arbiter = "none"`: the two nodes keep the register themselves, each a copy.

Rules:
- L0 A swap is durable at the peer first and then here. A peer that is not connected is not asked: with two hosts and
  nothing else, silence must not stop the survivor. No reply is "unknown": nothing is written here, and the next swap,
  made when the peer is back or known to be gone, decides.
- A0 After an unknown swap the peer may be one version ahead: the next one that is written here alone takes a number
  above that, so that it is the newer one when the nodes meet.
- When the nodes meet, each gets the other's copy; the higher epoch wins, then the higher version (`newer`); of two
  different ones with equal numbers, both take the same by a fixed order.
- One swap at a time and node. A swap of the peer that arrives during one of ours is a conflict, so that two promotions
  at the same moment cannot both succeed.
- The file (recordfile.py) is owned by the node's incarnation id: one that an earlier node of this name left behind,
  before `init --force`, says nothing about this one and counts as missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.arbiter import Register, Swap, Versioned, check_successor, encode, newer
from mirrorpair.arbiter.recordfile import DamagedRecordError, load, save
from mirrorpair.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    AskPeer = Callable[[int, Register], Awaitable[Swap]]


class LoneRegister:
    """This node's copy, and by `ask_peer` the peer's. `ask_peer` is None while the peer is not connected."""

    def __init__(self, path: str, owner: str) -> None:
        """Reads the file; a missing one is the empty record. RefusedError: damaged. ImageError: unreadable."""
        self._path = path
        self._owner = owner
        try:
            self._copy = load(path, owner)
        except DamagedRecordError as error:
            remedy = "remove it, and this node learns its peer's, or a person promotes one node"
            raise RefusedError(f"{error}: {remedy}") from None
        self._swapping = False
        self._skip = 0
        self.ask_peer: AskPeer | None = None

    @property
    def copy(self) -> Versioned:
        return self._copy

    async def read(self) -> Versioned:
        return self._copy

    async def cas(self, version: int, new: Register) -> Swap:
        """ImageError: it cannot be made durable here."""
        if self._swapping or version != self._copy.version or check_successor(self._copy.register, new) is not None:
            return Swap.CONFLICT
        self._swapping = True
        try:
            if (ask := self.ask_peer) is not None:
                said = await ask(version, new)
                if said is not Swap.OK:
                    self._skip += said is Swap.UNKNOWN
                    return said
            if version != self._copy.version:  # the copies met meanwhile, and the peer's was newer
                return Swap.CONFLICT
            self._store(Versioned(version=version + 1 + self._skip, register=new))
            return Swap.OK
        finally:
            self._swapping = False

    def receive(self, version: int, new: Register) -> Swap:
        """The peer's swap: durable here when it is OK."""
        if self._swapping or version != self._copy.version or check_successor(self._copy.register, new) is not None:
            return Swap.CONFLICT
        self._store(Versioned(version=version + 1, register=new))
        return Swap.OK

    def meet(self, theirs: Versioned) -> bool:
        """Takes the peer's copy if it is newer; whether it did. RefusedError: the record of another pair."""
        mine = self._copy
        ours, other = mine.register.pair_uuid, theirs.register.pair_uuid
        if ours and other and ours != other:
            raise RefusedError("the peer's record of the roles is that of another pair")
        self._skip = 0
        best = newer(mine, theirs)
        if newer(theirs, mine) is not best and encode(theirs) != encode(mine):
            # The smaller set is the safer one: who is not in it may lack writes.
            best = max(mine, theirs, key=lambda copy: (-len(copy.register.in_sync), encode(copy)))
        if best is mine:
            return False
        self._store(best)
        return True

    def _store(self, record: Versioned) -> None:
        save(self._path, self._owner, record)
        self._copy = record
