"""One node's image and what its metadata keep of it, in the simulation.

Rules:
- A block holds the number of the write that is there; a later write has a higher number.
- What was not flushed may be gone, or torn, after a lost boot. What is durable stays.
- The ids and their changes are the product's (history.py): `began_alone`, `adopt`, `forget_bitmap`. They and the bits
  are durable at once (the journal's own rules are the engine's, tested there).
- `hot`: blocks that may differ from the peer's, since no barrier on both came after their last write (A4, A7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.history import Ids
from mirrorpair.testing.words import BLOCKS, TORN

if TYPE_CHECKING:
    import random


class Disk:
    def __init__(self) -> None:
        self.now = [0] * BLOCKS
        self.durable = [0] * BLOCKS
        self.ids = Ids()
        self.bits: set[int] = set()
        self.hot: set[int] = set()
        self.inconsistent = False
        """a resync into it has not ended"""
        self.distrusted = False
        """F15: restored from an older copy, or another image"""
        self.discard = False
        """a person gives up what is on it"""
        self.failed = False
        """in this run of the daemon: EIO (A14)"""
        self.copy: list[int] | None = None
        """what somebody keeps elsewhere"""

    @property
    def new(self) -> bool:
        return self.ids.current == 0

    @property
    def obstacle(self) -> str | None:
        if self.distrusted:
            return "restored from an older copy"
        return "inconsistent" if self.inconsistent else None

    def write(self, block: int, value: int) -> None:
        self.now[block] = value
        self.hot.add(block)

    def flush(self) -> None:
        self.durable = list(self.now)

    def barrier(self, flying: set[int]) -> None:
        """Durable here, and known to be so at the peer: nothing but what is in flight can differ."""
        self.flush()
        self.hot &= flying

    def parted(self) -> None:
        """A link or a process has ended: what is in doubt gets bits."""
        self.bits |= self.hot

    def lose_boot(self, rng: random.Random) -> None:
        for block, (now, durable) in enumerate(zip(self.now, self.durable, strict=True)):
            if now != durable:
                self.now[block] = rng.choice((now, durable, TORN))
        self.flush()

    def restore(self) -> None:
        """F15: an older copy takes the image's place; the image's own identity tells that to the product."""
        if self.copy is not None:
            self.now, self.distrusted = list(self.copy), True
            self.flush()
