"""The kernel's cold calls that Python's `os` lacks, typed: block-device ioctls, holes, clocks, locks, openat2.

Rules:
- One function, one system call. What to do about an answer is the caller's business (`image.py`, `blockstack.py`).
- Every failure is an OSError with the errno and its plain text, of the class that Python gives this errno
  (BlockingIOError, PermissionError, ...). No path is in it: these functions know descriptors only.
- Offsets, lengths and sizes are bytes, times are nanoseconds; numbers out of the C type's range raise OverflowError.
- A call that a signal broke off (EINTR) is made again, after Python's own signal handlers ran (PEP 475).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from mirrorpair._linux import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

# openat2 answers EAGAIN when something below the path was renamed during the walk: the manual says to try again.
_OPEN_ATTEMPTS = 64


class LoopBacking(NamedTuple):
    """What a loop device stands on: numbers as `os.stat` shows them."""

    device: int
    """`st_dev` of the backing file"""
    inode: int
    """`st_ino` of the backing file"""
    raw_device: int
    """`st_rdev` when the backing file is itself a block device, else 0"""
    offset: int
    """first byte of the backing file that the loop device shows"""


def block_device_size(fd: int) -> int:
    """Bytes that the block device holds (BLKGETSIZE64). ENOTTY: not a block device."""
    return _call(lambda: lib.mp_device_size(fd))


def logical_block_size(fd: int) -> int:
    """Bytes of the device's smallest request (BLKSSZGET), the alignment that O_DIRECT needs. ENOTTY: not a block
    device."""
    return _call(lambda: lib.mp_sector_size(fd))


def block_device_read_only(fd: int) -> bool:
    """Whether the kernel refuses writes to the block device (BLKROGET); opening it for writing works all the same."""
    return bool(_call(lambda: lib.mp_device_read_only(fd)))


def punch(fd: int, offset: int, length: int) -> None:
    """Frees the bytes, which then read as zeros; the size stays. EOPNOTSUPP: not possible here."""
    _call(lambda: lib.mp_punch(fd, offset, length))


def zero_range(fd: int, offset: int, length: int) -> None:
    """Makes the bytes zeros that stay allocated; the size stays. EOPNOTSUPP: not possible here."""
    _call(lambda: lib.mp_zero_range(fd, offset, length))


def blk_zeroout(fd: int, offset: int, length: int) -> None:
    """Makes bytes of a block device zeros (BLKZEROOUT), by discard where that is certain to give zeros. EINVAL: not
    aligned to the logical block size."""
    _call(lambda: lib.mp_device_zero(fd, offset, length))


def blk_discard(fd: int, offset: int, length: int) -> None:
    """Tells a block device that the bytes are not needed (BLKDISCARD). What they read as afterwards is the device's
    choice. EOPNOTSUPP: the device cannot."""
    _call(lambda: lib.mp_device_discard(fd, offset, length))


def seek_data(fd: int, offset: int) -> int | None:
    """Where the first data at or after `offset` begins; None: only a hole is left, or `offset` is not before the end.
    Moves the descriptor's position."""
    found = _answer(lambda: lib.mp_seek_data(fd, offset))
    return None if found == -errno.ENXIO else _checked(found)


def seek_hole(fd: int, offset: int) -> int:
    """Where the first hole at or after `offset` begins; the end counts as one. ENXIO: `offset` is not before the end.
    Moves the descriptor's position."""
    return _call(lambda: lib.mp_seek_hole(fd, offset))


def clock_boottime_ns() -> int:
    """Nanoseconds since boot; goes on while the machine sleeps. What promises between hosts are counted in."""
    return _call(lib.mp_clock_boottime)


def clock_monotonic_ns() -> int:
    """Nanoseconds since some start; stands still while the machine sleeps."""
    return _call(lib.mp_clock_monotonic)


def loop_backing(fd: int) -> LoopBacking | None:
    """What the loop device stands on; None: not a loop device, or nothing is attached to it."""
    found = ffi.new("struct mp_loop *")
    status = _answer(lambda: lib.mp_loop_status(fd, found))
    # Other drivers know no such ioctl; each says so in its own way.
    if status in (-errno.ENXIO, -errno.ENOTTY, -errno.EINVAL):
        return None
    _checked(status)
    return LoopBacking(found.device, found.inode, found.raw_device, found.offset)


def openat2_beneath(dirfd: int, path: str, flags: int, mode: int = 0) -> int:
    """Opens `path` beneath the folder `dirfd` and nowhere else. The caller closes the descriptor.

    EXDEV: an absolute path, `..` or a symbolic link would lead out of the folder. ELOOP: a magic link of /proc, or too
    many links. ENOSYS: Linux before 5.6. `mode` counts only with O_CREAT, and is EINVAL without it.
    """
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    for _ in range(_OPEN_ATTEMPTS - 1):
        fd = _answer(lambda: lib.mp_open_beneath(dirfd, name, flags, mode))
        if fd != -errno.EAGAIN:
            return _checked(fd)
    return _call(lambda: lib.mp_open_beneath(dirfd, name, flags, mode))


def ofd_lock(fd: int, exclusive: bool) -> None:
    """Locks the whole file for this open file description, at once or not at all. BlockingIOError: somebody else holds
    it.

    The lock is shared by descriptors that were duplicated or inherited, and ends when the last of them is closed.
    `exclusive` needs a descriptor open for writing, shared one for reading (EBADF).
    """
    _call(lambda: lib.mp_lock(fd, int(exclusive)))


def _answer(call: Callable[[], int]) -> int:
    while (result := call()) == -errno.EINTR:
        pass
    return result


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _call(call: Callable[[], int]) -> int:
    return _checked(_answer(call))
