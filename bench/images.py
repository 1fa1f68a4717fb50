"""The two images of a group, how they differ, and what their pages look like in memory.

Rules:
- Both are always built in the same way, by writes of `chunk` bytes from a fixed seed: the chunk decides the size of
  the folios, and that changes the price of a random 4 KiB write up to twelve times and the speed of a scan up to two
  times. What the kernel made of it is read back and shown.
- Before each run the differing pieces of the target are written anew, with other bytes than ever before, and flushed:
  no writeback leaks into the timing.
- After each run the target is compared with the source in full. That also leaves both of them read.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.settings import BLOCK, MIB, PIECE

if TYPE_CHECKING:
    from pathlib import Path

    from bench.workshop import Workshop

_SEED = 20261
_RESIDENT = 0.999


@dataclass(frozen=True)
class Pattern:
    """Which pieces of the target differ."""

    name: str
    title: str
    share: float
    piece: int

    def pieces(self, size: int) -> list[tuple[int, int]]:
        """Merged (offset, length), in order; the same for the same size."""
        if self.share <= 0:
            return []
        if self.share >= 1:
            return [(0, size)]
        total = size // self.piece
        count = max(1, round(total * self.share))
        chosen = sorted(random.Random(f"{_SEED} {self.name} {size}").sample(range(total), count))
        merged: list[tuple[int, int]] = []
        for index in chosen:
            offset = index * self.piece
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + self.piece)
            else:
                merged.append((offset, self.piece))
        return merged


EQUAL = Pattern("equal", "equal", 0.0, PIECE)
SCATTERED_64K = Pattern("1pct-64KiB", "1 % in 64 KiB", 0.01, BLOCK)
SCATTERED_4K = Pattern("1pct-4KiB", "1 % in 4 KiB", 0.01, PIECE)
MANY_4K = Pattern("10pct-4KiB", "10 % in 4 KiB", 0.10, PIECE)
ALL = Pattern("all", "all differ", 1.0, PIECE)
PATTERNS = (EQUAL, SCATTERED_64K, SCATTERED_4K, MANY_4K, ALL)


@dataclass
class Pair:
    shop: Workshop
    pattern: Pattern
    source: Path
    target: Path
    dirty_list: Path
    size: int
    dirty_bytes: int
    """What differs after a reset, in whole 4 KiB pieces."""
    chunk: int
    facts: dict[str, Any] = field(default_factory=dict)
    _resets: int = 0

    @staticmethod
    def build(shop: Workshop, pattern: Pattern, size: int, *, chunk: int = MIB, data: int | None = None) -> Pair:
        """`data` makes it sparse: so many bytes of it are allocated, the rest are holes."""
        folder = shop.images
        pieces = pattern.pieces(size)
        pair = Pair(
            shop=shop,
            pattern=pattern,
            source=folder / "source.img",
            target=folder / "target.img",
            dirty_list=folder / "dirty.list",
            size=size,
            dirty_bytes=sum(length for _, length in pieces),
            chunk=chunk,
        )
        pair.remove()
        pair.dirty_list.write_bytes(b"".join(struct.pack("=QQ", *piece) for piece in pieces))
        if data is None:
            shop.image_tool("build", pair.source, size, f"--seed={_SEED}", f"--chunk={chunk}")
        else:
            shop.image_tool("sparse", pair.source, size, data, f"--seed={_SEED}", f"--chunk={chunk}")
        shop.image_tool("clone", pair.source, pair.target, f"--chunk={chunk}")
        pair.facts["hash"] = None if data is not None else pair.hash(pair.source)
        return pair

    def remove(self) -> None:
        for path in (self.source, self.target, self.dirty_list, self.scratch):
            path.unlink(missing_ok=True)

    @property
    def scratch(self) -> Path:
        """For a tool that replaces its target: the third image, and the last one that there is room for."""
        return self.target.with_name("scratch.img")

    def reset(self) -> None:
        self._resets += 1
        if self.dirty_bytes:
            self.shop.image_tool("dirty", self.target, self.dirty_list, f"--seed={_SEED + self._resets}")

    def rebuild_target(self) -> None:
        """After a run that left something wrong: the folios must come from the same kind of writes again."""
        self.target.unlink(missing_ok=True)
        self.shop.image_tool("clone", self.source, self.target, f"--chunk={self.chunk}")

    def different_bytes(self, path: Path | None = None) -> int:
        return int(self.shop.image_tool("equal", self.source, path or self.target)[0]["different"])

    def hash(self, path: Path) -> str:
        return str(self.shop.image_tool("hash", path)[0]["hash"])

    # --- the page cache ----------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Every page in memory, and touched once: on a virtual machine the first touch may cost the host a fault."""
        if not self.resident():
            self.shop.image_tool("warm", self.source, self.target)
            self.facts["read back"] = "by readahead: other folios than those that were written"
        self.different_bytes()
        self.note_state()

    def resident(self) -> bool:
        states = self.shop.image_tool("state", self.source, self.target)
        return min(float(state["resident"]) for state in states) >= _RESIDENT

    def chill(self) -> None:
        self.shop.image_tool("evict", self.source, self.target)
        states = self.shop.image_tool("state", self.source, self.target)
        if max(state["resident"] for state in states) > 0.01:
            # Pages that somebody else still maps, or that were still being written. Needs root; else the
            # figure is shown.
            try:
                with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
                    file.write("1\n")
            except OSError as error:
                self.facts["drop_caches"] = f"not permitted ({error.strerror})"
        self.note_state()

    def note_state(self) -> None:
        a, b = self.shop.image_tool("state", self.source, self.target)
        self.facts["resident"] = (a["resident"], b["resident"])
        if a["folio_kib"] is not None and b["folio_kib"] is not None:
            self.facts["folio_kib"] = (a["folio_kib"], b["folio_kib"])
