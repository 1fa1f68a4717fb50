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
- The file is a line each with the digest, the owner and the record; it is written beside, synced, renamed, and its
  folder synced: always the old one or the new one. One that cannot be read is refused, never made anew (F17).
- The owner is the node's incarnation id: a file that an earlier node of this name left behind, before `init --force`,
  says nothing about this one and counts as missing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from mirrorpair._core import digest128
from mirrorpair.arbiter import (
    MAX_RECORD_BYTES,
    Register,
    Swap,
    Versioned,
    check_successor,
    decode,
    encode,
    newer,
)
from mirrorpair.errors import ImageError, PeerProtocolError, RefusedError
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    AskPeer = Callable[[int, Register], Awaitable[Swap]]

_SEED = 0x4C4F4E45


class LoneRegister:
    """This node's copy, and by `ask_peer` the peer's. `ask_peer` is None while the peer is not connected."""

    def __init__(self, path: str, owner: str) -> None:
        """Reads the file; a missing one is the empty record. RefusedError: damaged. ImageError: unreadable."""
        self._path = path
        self._owner = owner
        self._copy = _load(path, owner)
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
        _save(self._path, self._owner, record)
        self._copy = record


def _load(path: str, owner: str) -> Versioned:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1000)
    except FileNotFoundError:
        return Versioned()
    except OSError as error:
        raise ImageError(f"cannot read {printable(path)}: {error.strerror}") from error
    lines = data.split(b"\n")
    if len(lines) != 4 or lines[3] or _digest(lines[1], lines[2]) != lines[0]:
        raise RefusedError(
            f"{printable(path)}, the record of the pair's roles, is damaged: remove it, and this "
            "node learns its peer's, or a person promotes one node"
        )
    if lines[1] != owner.encode():
        return Versioned()
    try:
        return decode(lines[2])
    except PeerProtocolError as error:
        raise RefusedError(f"{printable(path)}: {error}") from None


def _digest(owner: bytes, record: bytes) -> bytes:
    return digest128(owner + b"\n" + record + b"\n", _SEED).hex().encode()


def _save(path: str, owner: str, record: Versioned) -> None:
    beside = path + ".new"
    body = encode(record)
    data = b"\n".join((_digest(owner.encode(), body), owner.encode(), body, b""))
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise ImageError(f"cannot write {printable(path)}: {error.strerror}") from error
