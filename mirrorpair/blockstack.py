"""What a block device stands on, and which loop devices stand on an image: two names may be the same bytes.

A loop device shows bytes of a file (from an offset on), a partition those of its disk; both may be stacked. So each
image is a list of extents, one for every storage down the stack: writing the image changes all of them. Two images are
the same data when any of their extents overlap: hard links and symbolic links (same inode), two nodes of one device
(same number), a loop device and its file, a disk and its partition; but not two partitions, nor two loop devices that
show disjoint parts of one file.

Rules:
- Everything follows from `os.stat_result`: nothing here opens the image itself, so it can be asked before any lock.
- Loop devices are asked by ioctl; where their node may not be opened (not root, container), /sys names the backing
  file.
- What cannot be found out is left out; there is no error. Device mapper and md are not followed: they claim their
  parts, so opening one of these for writing fails with EBUSY.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from mirrorpair.linux import LoopBacking, loop_backing

SYS_DEVICES = Path("/sys/dev/block")
SYS_BLOCK = Path("/sys/block")
DEV = Path("/dev")
SECTOR_BYTES = 512  # the unit of /sys, whatever the device's own blocks are
_ENDLESS = 1 << 63  # a file can grow
_DEEPEST = 8  # the kernel refuses to attach loop devices to each other in a ring; this ends a walk over wrong answers


class Storage(NamedTuple):
    """A file by device and inode, or a block device by its number."""

    kind: str
    device: int
    inode: int


class Extent(NamedTuple):
    """Bytes `start` to `end` (not included) of one storage."""

    storage: Storage
    start: int
    end: int


def extents(status: os.stat_result) -> list[Extent]:
    """The image itself first, then what it stands on, down to the last storage that can be seen."""
    if stat.S_ISBLK(status.st_mode):
        return _device_extents(status.st_rdev)
    return [Extent(Storage("file", status.st_dev, status.st_ino), 0, _ENDLESS)]


def overlap(ours: list[Extent], theirs: list[Extent]) -> bool:
    """Whether writing the one image may change the other."""
    return any(
        one.storage == other.storage and one.start < other.end and other.start < one.end
        for one in ours
        for other in theirs
    )


def loops_upon(status: os.stat_result) -> list[str]:
    """The attached loop devices that show bytes of this image, without itself: `/dev/loop3`, sorted."""
    ours = extents(status)
    storages = {extent.storage for extent in ours}
    found = []
    for folder in sorted(SYS_BLOCK.glob("loop*")):
        if not (folder / "loop").is_dir() or (number := _number(folder)) is None:
            continue  # nothing is attached, or no longer
        if Storage("device", number, 0) not in storages and overlap(ours, _device_extents(number)):
            found.append(f"{DEV / folder.name}")
    return found


def _device_extents(number: int) -> list[Extent]:
    found: list[Extent] = []
    start, length = 0, None
    for _ in range(_DEEPEST):
        folder = SYS_DEVICES / f"{os.major(number)}:{os.minor(number)}"
        if length is None:
            # An empty device still is itself.
            length = max(1, _sectors(folder / "size")) if folder.exists() else _ENDLESS
        found.append(Extent(Storage("device", number, 0), start, start + length))
        if (folder / "partition").exists():
            # The link's real place is a folder inside that of the whole disk.
            parent = _number(folder.resolve().parent)
            if parent is None:
                break
            number, start = parent, start + _sectors(folder / "start")
            continue
        backing = _loop(folder)
        if backing is None:
            break
        start += backing.offset
        if not backing.raw_device:
            found.append(Extent(Storage("file", backing.device, backing.inode), start, start + length))
            break
        number = backing.raw_device
    return found


def _loop(folder: Path) -> LoopBacking | None:
    """What stands below the loop device of this /sys folder; None: it is none, or nothing is attached."""
    if not (folder / "loop").is_dir():
        return None
    try:
        fd = os.open(DEV / folder.resolve().name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return _loop_by_name(folder / "loop")
    try:
        return loop_backing(fd)
    except OSError:
        return _loop_by_name(folder / "loop")
    finally:
        os.close(fd)


def _loop_by_name(folder: Path) -> LoopBacking | None:
    try:
        name = (folder / "backing_file").read_bytes().removesuffix(b"\n")
        offset = int((folder / "offset").read_text())
        status = os.stat(name)
    except (OSError, ValueError):
        return None  # detached meanwhile, or the file is of another mount namespace, or removed
    return LoopBacking(status.st_dev, status.st_ino, status.st_rdev if stat.S_ISBLK(status.st_mode) else 0, offset)


def _number(folder: Path) -> int | None:
    try:
        major, _, minor = (folder / "dev").read_text().strip().partition(":")
        return os.makedev(int(major), int(minor))
    except (OSError, ValueError):
        return None


def _sectors(file: Path) -> int:
    """A number of sectors in a file of /sys, as bytes; 0 when it went away meanwhile."""
    try:
        return int(file.read_text()) * SECTOR_BYTES
    except (OSError, ValueError):
        return 0
