"""The plain reference that the engine is tested against: slow, obvious, and sharing no code with it.

Rules: an image here is a file small enough to be held in memory; a difference is a list of (offset, length) in merged
4 KiB pieces, as the contract says.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from mirrorpair import linux

if TYPE_CHECKING:
    import random
    from pathlib import Path

PIECE = 4096
Ranges = list[tuple[int, int]]


def differing(a: bytes, b: bytes) -> Ranges:
    """Where two images of one size differ."""
    assert len(a) == len(b)
    found: Ranges = []
    for offset in range(0, len(a), PIECE):
        if a[offset : offset + PIECE] == b[offset : offset + PIECE]:
            continue
        length = min(PIECE, len(a) - offset)
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


def blocks_of(ranges: Ranges, block: int) -> int:
    """How many blocks the ranges touch."""
    return len(
        {number for offset, length in ranges for number in range(offset // block, (offset + length - 1) // block + 1)}
    )


def random_size(rng: random.Random) -> int:
    """Sizes that meet every edge: empty, below and above a piece, a window, or anything up to 32 MiB."""
    window = 8 << 20
    return rng.choice(
        [
            *(0, 1, 4095, 4096, 4097, 65536, window + rng.choice([-1, 0, 1, 4097])),
            *(rng.randrange(1 << 20), rng.randrange(1 << 24), rng.randrange(1 << 25)),
        ]
    )


def dirty(path: Path, rng: random.Random, times: int, longest: int) -> None:
    """Writes data, writes zeros, punches holes, at random places."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        for _ in range(times if size else 0):
            offset = rng.randrange(size)
            if rng.random() < 0.3:
                offset -= offset % PIECE
            length = min(rng.choice([1, 100, PIECE, 65536, longest]), size - offset)
            kind = rng.random()
            if kind < 0.5:
                os.pwrite(descriptor, rng.randbytes(length), offset)
            elif kind < 0.7:
                os.pwrite(descriptor, bytes(length), offset)
            else:
                with contextlib.suppress(OSError):  # a file system without holes
                    linux.punch(descriptor, offset, length)
    finally:
        os.close(descriptor)


def random_pair(source: Path, target: Path, rng: random.Random) -> None:
    """Two images of one random size: unrelated, equal, or equal but for some dirt; warm, cold or half and half."""
    size = random_size(rng)
    for path in (source, target):
        path.write_bytes(b"")
        os.truncate(path, size)
    if rng.random() < 0.7:
        data = rng.randbytes(rng.choice([size, rng.randrange(size + 1)]))
        with source.open("r+b") as file:
            file.write(data)
        if rng.random() < 0.8:
            with target.open("r+b") as file:
                file.write(data)
    longest = rng.choice([PIECE, 1 << 20, 5 << 20])
    dirty(source, rng, rng.randrange(30), longest)
    dirty(target, rng, rng.randrange(30), longest)
    if rng.random() < 0.3:
        dirty(target, rng, 600, PIECE)
    for path in (source, target):
        if rng.random() < 0.3:
            forget(path)


def forget(path: Path) -> None:
    """Makes the image cold: the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
