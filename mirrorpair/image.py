"""Opens disk images, files and block devices alike, so that nothing can be lost by opening the wrong one.

Rules:
- An image is looked at before it is opened: first O_PATH, which has no effect on anything and never blocks (a FIFO, a
  tape, a socket), then the very same inode again by /proc/self/fd. A path that changes in between cannot lead
  elsewhere.
- A target is changed (made, resized) only when its type was checked, it is not the source, its lock is held and no loop
  device shows its bytes.
- A target device is opened with O_EXCL: the kernel refuses one that is mounted, swapped to or part of another device.
- Locks are those of open file descriptions over the whole file: they collide with another mirrorpair's and with QEMU's,
  they survive the fork of the engine, and they end with the process, however it ends. A source is locked shared.
- How a new file is made is in newfile.py.
- The errors are `errors.py`'s: UsageError for what was asked wrongly, RefusedError for what would lose data, ImageError
  for what the storage could not do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Literal

from mirrorpair.blockstack import extents, loops_upon, overlap
from mirrorpair.errors import ImageError, MirrorpairError, RefusedError, UsageError
from mirrorpair.linux import block_device_read_only, block_device_size, ofd_lock
from mirrorpair.newfile import closed, closed_on_error
from mirrorpair.newfile import create as create_file
from mirrorpair.text import printable
from mirrorpair.units import MAX_BYTES, format_exact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from mirrorpair.newfile import Opener

Kind = Literal["file", "device"]

_ALLOCATION_UNIT_BYTES = 512  # of st_blocks, whatever the file system's blocks are

_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFLNK: "a symbolic link",
}
_WRONG_PATH = {
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "too many symbolic links, or one that may not be followed",
    errno.ENAMETOOLONG: "the path is too long",
}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_BUSY = {errno.EBUSY, errno.ETXTBSY}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Image:
    """An open image. Its owner closes it; nothing is closed by garbage collection."""

    __slots__ = ("created", "fd", "kind", "path", "size")

    def __init__(self, path: str, fd: int, size: int, kind: Kind, created: bool = False) -> None:
        self.path = path
        """as it was given; to show it, pass it through `printable`"""
        self.fd = fd
        """the descriptor; -1 once closed"""
        self.size = size
        """bytes; a device's own size, even when less of it is needed"""
        self.kind = kind
        self.created = created
        """made by `open_target`"""

    def close(self) -> None:
        """Closes the image and so ends its lock. Again: no effect."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Image {self.path!r} {self.kind} of {self.size} bytes{' (closed)' if self.fd < 0 else ''}>"


def open_source(path: str, *, opener: Opener | None = None) -> Image:
    """Opens an image for reading, under a shared lock.

    UsageError: it does not exist, or is neither file nor block device. RefusedError: another mirrorpair writes it.
    ImageError: it cannot be read. `opener(path, flags, mode)` stands in for `os.open` (by which `serve` stays in a
    folder).
    """
    shown = printable(path)
    try:
        with _looked_at(path, opener or os.open) as node:
            kind = _kind(shown, os.fstat(node))
            fd = _reopen(node, os.O_RDONLY)
        with closed_on_error(fd):
            _lock_source(fd, shown)
            size = _size(fd, kind)
            if kind == "device" and size == 0:
                raise ImageError(f"{shown} has no size: no medium is in it, or nothing is attached to it")
            return Image(path, fd, size, kind)
    except OSError as error:
        raise _source_error(shown, error) from error


def open_target(
    path: str,
    *,
    size: int,
    resize: bool = False,
    create: bool = True,
    source: Image | None = None,
    opener: Opener | None = None,
) -> Image:
    """Opens an image for writing `size` bytes, under an exclusive lock.

    A missing file is made, sparse, when `create` says so. An existing file of another size is refused, unless `resize`
    says to change it. A device may be larger. UsageError: a wrong path, neither file nor block device, or the same data
    as `source` (which is looked for before anything else, because the source's own lock would be in the way).
    RefusedError: size, mounted, busy, locked, shown by a loop device, read-only. ImageError: no space, or the storage
    failed.
    """
    shown = printable(path)
    if not 0 <= size <= MAX_BYTES:
        raise UsageError(f"{shown} cannot be made {size} bytes long: sizes go from 0 to {MAX_BYTES} bytes")
    opener = opener or os.open
    try:
        try:
            return _open_existing(path, shown, size, resize=resize, source=source, opener=opener)
        except FileNotFoundError:
            if not create:
                raise
        try:
            return Image(path, create_file(path, size, opener), size, "file", created=True)
        except FileNotFoundError:
            raise UsageError(f"cannot create {shown}: its folder does not exist") from None
        except FileExistsError:
            pass  # somebody else made it at this moment; or the name is a symbolic link, then it is still missing
        try:
            return _open_existing(path, shown, size, resize=resize, source=source, opener=opener)
        except FileNotFoundError:
            raise UsageError(f"{shown} is a symbolic link that leads nowhere") from None
    except OSError as error:
        raise _target_error(shown, error) from error


def same_image(one: Image, other: Image) -> bool:
    """Whether writing one image may change the other: the same inode or device by any name, a loop device and its file,
    a disk and its partition."""
    return overlap(extents(os.fstat(one.fd)), extents(os.fstat(other.fd)))


def allocated_bytes(fd: int) -> int:
    """Bytes of storage that a file occupies, holes left out; a device counts whole."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return block_device_size(fd)
    return status.st_blocks * _ALLOCATION_UNIT_BYTES


def _open_existing(path: str, shown: str, size: int, *, resize: bool, source: Image | None, opener: Opener) -> Image:
    """FileNotFoundError: there is none."""
    with _looked_at(path, opener) as node:
        seen = os.fstat(node)
        kind = _kind(shown, seen)
        if source is not None and overlap(extents(seen), extents(os.fstat(source.fd))):
            raise UsageError(f"{printable(source.path)} and {shown} are the same image")
        fd = _reopen(node, os.O_RDWR | (os.O_EXCL if kind == "device" else 0))
    with closed_on_error(fd):
        ofd_lock(fd, exclusive=True)
        if seen.st_nlink and not os.fstat(fd).st_nlink:
            raise ImageError(f"{shown} was removed while it was being opened")
        if loops := loops_upon(seen):
            raise RefusedError(f"{shown} is in use: {', '.join(loops)} stands on it (losetup -d detaches it)")
        found = _size(fd, kind)
        if kind == "device":
            if block_device_read_only(fd):
                raise RefusedError(f"{shown} cannot be written: the device is read-only")
            if found < size:
                raise RefusedError(
                    f"{shown} is too small: it has {format_exact(found)}, {format_exact(size)} are needed"
                )
        elif found != size:
            if not resize:
                raise RefusedError(
                    f"{shown} has {format_exact(found)}, the source {format_exact(size)}: not the same size "
                    "(--resize changes the target's)"
                )
            os.ftruncate(fd, size)
            found = size
        return Image(path, fd, found, kind)


@contextlib.contextmanager
def _looked_at(path: str, opener: Opener) -> Iterator[int]:
    """A descriptor that only names the inode: it can be asked what it is, and opening it disturbs nobody."""
    try:
        node = opener(path, os.O_PATH | os.O_CLOEXEC, 0)
    except ValueError:  # a NUL, or characters that no file name can hold
        raise UsageError(f"{printable(path)} is not a valid path") from None
    with closed(node):
        yield node


def _reopen(node: int, flags: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{node}", flags | os.O_CLOEXEC)
    except FileNotFoundError:
        # The inode is held by `node`, so this is not about the image.
        raise OSError(errno.ENOSYS, "/proc is not mounted") from None


def _kind(shown: str, status: os.stat_result) -> Kind:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISBLK(status.st_mode):
        return "device"
    found = _TYPES.get(stat.S_IFMT(status.st_mode), "something else")
    raise UsageError(f"{shown} is {found}: an image must be a file or a block device")


def _size(fd: int, kind: Kind) -> int:
    return block_device_size(fd) if kind == "device" else os.fstat(fd).st_size


def _lock_source(fd: int, shown: str) -> None:
    try:
        ofd_lock(fd, exclusive=False)
    except BlockingIOError:
        raise RefusedError(f"{shown} is being written by another mirrorpair or a virtual machine") from None
    except OSError as error:
        # Where locks do not exist nobody can hold one. A target is refused there: two writers would not see each other.
        if error.errno not in _NO_LOCKS:
            raise


def _source_error(shown: str, error: OSError) -> MirrorpairError:
    if error.errno in _WRONG_PATH:
        return UsageError(f"cannot open {shown}: {_WRONG_PATH[error.errno]}")
    return ImageError(f"cannot read {shown}: {_text(error)}")


def _target_error(shown: str, error: OSError) -> MirrorpairError:
    if error.errno in _WRONG_PATH:
        return UsageError(f"cannot open {shown}: {_WRONG_PATH[error.errno]}")
    if error.errno in _READ_ONLY:
        return RefusedError(f"{shown} cannot be written: {_text(error)}")
    if error.errno in _BUSY:
        return RefusedError(f"{shown} is mounted or in use by another program: {_text(error)}")
    if error.errno == errno.EAGAIN:
        return RefusedError(f"{shown} is in use by another mirrorpair or a virtual machine")
    if error.errno == errno.ENOLCK:
        return RefusedError(f"{shown} cannot be locked, so another program could write it too: {_text(error)}")
    return ImageError(f"cannot open {shown} for writing: {_text(error)}")


def _text(error: OSError) -> str:
    return error.strerror or f"error {error.errno}"
