"""Which image this is, in a way that lasts over reboots: so that a replaced or restored one is noticed (A8, M1).

Rules:
- A file is its inode number and, where the file system has it, its birth time. Not the number of its device (`st_dev`),
  which changes at every boot, nor its times of change, which every write moves.
- A block device is the first of: device mapper's uuid, partition uuid, WWN, serial number; a loop device what it stands
  on. Never its number or its node's inode, which change at every boot.
- What was recorded and is no longer there to be seen counts as changed: the price is a full compare, never lost data.
- An image that has no identity at all (a device that tells nothing) is told apart by its size only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
from pathlib import Path
from typing import Literal

import msgspec

from mirrorpair.linux import loop_backing

SYS_DEVICES = Path("/sys/dev/block")
BY_PARTUUID = Path("/dev/disk/by-partuuid")
MAX_ID = 256

# From the kernel's ABI (linux/stat.h), the same on every processor.
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_STATX_BORN = 0x50  # offset of stx_btime: s64 seconds, u32 nanoseconds
_ORDER = sys.byteorder


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What can be told of an image. Two are of the same image if they are equal."""

    kind: Literal["file", "device"]
    inode: int = 0
    """of a file"""
    born_ns: int | None = None
    """of a file: when it was made, nanoseconds since 1970; None: the file system does not know"""
    id: str = ""
    """of a device: "dm-uuid:...", "partuuid:...", "wwn:...", "serial:...", "loop:..."; empty: it tells nothing"""

    def __post_init__(self) -> None:
        if not (0 <= self.inode < 2**64 and len(self.id) <= MAX_ID and self.id.isascii() and self.id.isprintable()):
            raise ValueError("an image's identity is out of range")


def identify(fd: int) -> Identity:
    """The identity of the open image. OSError: the descriptor cannot be asked."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return Identity(kind="device", id=_device_id(fd, status.st_rdev)[:MAX_ID])
    return Identity(kind="file", inode=status.st_ino, born_ns=_born_ns(fd))


def difference(recorded: Identity, found: Identity) -> str | None:
    """Why the image that was found is not the recorded one, as a part of a sentence; None: it is."""
    if recorded == found:
        return None
    if recorded.kind != found.kind:
        return f"it was a {recorded.kind} and is a {found.kind} now"
    if recorded.kind == "device":
        return f"it was the device {recorded.id or 'without an id'} and is {found.id or 'one without an id'} now"
    if recorded.inode != found.inode:
        return f"it was the file with inode {recorded.inode} and is the one with inode {found.inode} now"
    return "it was made at another time than the file that was recorded"


def boot_id() -> str:
    """The kernel's name for this boot. OSError: /proc is not mounted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _born_ns(fd: int) -> int | None:
    call = getattr(ctypes.CDLL(None), "statx", None)
    if call is None:  # a C library from before 2018
        return None
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if call(fd, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_BTIME), answer) != 0:
        return None
    raw = answer.raw
    if not int.from_bytes(raw[:4], _ORDER) & _STATX_BTIME:
        return None
    seconds = int.from_bytes(raw[_STATX_BORN : _STATX_BORN + 8], _ORDER, signed=True)
    return seconds * 10**9 + int.from_bytes(raw[_STATX_BORN + 8 : _STATX_BORN + 12], _ORDER)


def _device_id(fd: int, number: int) -> str:
    folder = SYS_DEVICES / f"{os.major(number)}:{os.minor(number)}"
    if uuid := _line(folder / "dm/uuid"):
        return f"dm-uuid:{uuid}"
    if (folder / "partition").exists():
        if uuid := _partition_uuid(number):
            return f"partuuid:{uuid}"
        # A table without uuids: the disk, and where on it.
        disk, start = _disk_id(folder.resolve().parent), _line(folder / "start")
        return f"{disk}+{start}" if disk and start else ""
    if disk := _disk_id(folder):
        return disk
    with contextlib.suppress(OSError):
        if backing := loop_backing(fd):
            return f"loop:{backing.inode}+{backing.offset}"
    return ""


def _disk_id(folder: Path) -> str:
    for name, file in (("wwn", "wwid"), ("wwn", "device/wwid"), ("serial", "serial"), ("serial", "device/serial")):
        if value := _line(folder / file):
            return f"{name}:{value}"
    return ""


def _partition_uuid(number: int) -> str:
    with contextlib.suppress(OSError):
        for link in sorted(BY_PARTUUID.iterdir()):
            with contextlib.suppress(OSError):
                if link.name.isascii() and link.name.isprintable() and link.stat().st_rdev == number:
                    return link.name
    return ""


def _line(file: Path) -> str:
    """The file as one line of printable ASCII, without whatever is none; empty: there is no such file."""
    try:
        text = " ".join(file.read_text(encoding="ascii", errors="ignore").split())
    except OSError:
        return ""
    return "".join(char for char in text if char.isprintable())
