"""A program of its own that writes to a file durably, piece after piece, until its standard input ends.

    durable_writer.py FILE SIZE SEED     prints a line for each piece that is durable, at last "good" after reading all

Rules:
- Not a thread of the tests: whoever starts a process closes that one's copies of its descriptors, each close of a file
  on FUSE asks the file's server, and that would have to wait for the very daemon which is being started.
- What it writes follows from the seed alone: `content_after(size, seed, count)` is what `count` lines promise.
"""

from __future__ import annotations

import os
import random
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 16384
MIB = 1 << 20


def pieces(size: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Round and round, with an offset that lies on no block after the first round."""
    rng = random.Random(seed)
    number = 0
    while True:
        yield number * PIECE % (size - PIECE), rng.randbytes(PIECE)
        number += 1


def content_after(size: int, seed: int, count: int) -> bytes:
    content = bytearray(size)
    for (at, data), _ in zip(pieces(size, seed), range(count), strict=False):
        content[at : at + PIECE] = data
    return bytes(content)


def main(file: str, size: int, seed: int) -> None:
    fd = os.open(file, os.O_RDWR)
    count = 0
    for at, data in pieces(size, seed):
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        written = os.pwrite(fd, data, at)
        if written != PIECE:
            raise OSError(f"{written} of {PIECE} bytes were written")
        os.fsync(fd)
        count += 1
        print(count, flush=True)
    content = content_after(size, seed, count)
    for at in range(0, size, MIB):
        if os.pread(fd, MIB, at) != content[at : at + MIB]:
            raise OSError(f"another content than was written, near offset {at}")
    print("good", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
