"""Reads a volume back and judges every block of it by the journal.

Rules:
- A block is right when what it holds was written by a write that it may hold: not older than the bound from before the
  read was asked for, not newer than the bound from after it was answered. At rest both are the same, and the check is
  exact; beside writers it stays true.
- What nobody wrote must still be zeros: a write that landed elsewhere is found too.
- Through NBD, as any client; never by looking into an image.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mirrorpair.demo.journal import BLOCK, Bounds, origin

if TYPE_CHECKING:
    from mirrorpair.nbdclient import NbdClient, Pending

PIECE = 64  # blocks of one request
DEPTH = 8


class Wrong(NamedTuple):
    """A block that holds what it may not. `least`: the write that must be there at least, 0 for none; `found`: whose
    content it is, None for nobody's."""

    block: int
    least: int
    found: int | None

    def __str__(self) -> str:
        due = f"acknowledged write {self.least}" if self.least else "no acknowledged write"
        held = "what nobody wrote" if self.found is None else f"write {self.found}" if self.found else "zeros"
        return f"block {self.block} (offset {self.block * BLOCK}): {due}, but it holds {held}"


class Book(Protocol):
    """A journal: one that is being written, or one that was read from its file."""

    seed: int
    size: int

    def bounds(self, first: int, count: int) -> Bounds: ...


def wrong_blocks(seed: int, first: int, data: bytes | bytearray, before: Bounds, after: Bounds) -> list[Wrong]:
    wrong = []
    for at, (least, last) in enumerate(zip(before.least, after.last, strict=True)):
        found = origin(seed, first + at, bytes(data[at * BLOCK : (at + 1) * BLOCK]))
        if found is None or not least <= found <= last:
            wrong.append(Wrong(first + at, least, found))
    return wrong


def read_back(client: NbdClient, book: Book) -> list[Wrong]:
    """What is wrong in the whole volume."""
    wrong: list[Wrong] = []
    flying: deque[tuple[int, Bounds, Pending]] = deque()

    def take() -> None:
        first, before, pending = flying.popleft()
        data = pending.wait()
        wrong.extend(wrong_blocks(book.seed, first, data, before, book.bounds(first, len(before.least))))

    blocks = book.size // BLOCK
    for first in range(0, blocks, PIECE):
        count = min(PIECE, blocks - first)
        flying.append((first, book.bounds(first, count), client.start_read(first * BLOCK, count * BLOCK)))
        if len(flying) == DEPTH:
            take()
    while flying:
        take()
    return wrong


def lost(wrong: list[Wrong]) -> set[int]:
    """The acknowledged writes that are not there."""
    return {one.least for one in wrong if one.least}
