"""Makes a new image file: with its full size and a name that survives a power cut, or not at all.

Rules:
- The file is made without a name (O_TMPFILE), locked, sized, and only then linked into its folder: being killed at any
  point leaves either nothing or a whole sparse file, which the next run can go on with.
- Where that is not possible (NFS, FUSE, a folder that `opener` does not open) the name comes first and is taken back
  when anything fails. Only a kill between the two calls then leaves an empty file.
- An existing name is never replaced: FileExistsError.
- For its owner alone (0600): what the image will hold may be private.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from mirrorpair.errors import MirrorpairError
from mirrorpair.linux import ofd_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Opener = Callable[[str, int, int], int]
    """Stands in for `os.open(path, flags, mode)`; `serve` uses one that cannot leave a folder."""

MODE = 0o600


def create(path: str, size: int, opener: Opener) -> int:
    """A descriptor (read and write) of the new file, exclusively locked. Errors are OSError, as the kernel gave
    them."""
    fd = _create_whole(path, size, opener)
    return _create_by_name(path, size, opener) if fd is None else fd


@contextlib.contextmanager
def closed_on_error(fd: int) -> Iterator[int]:
    """Whatever goes wrong inside, the descriptor does not leak; when nothing does, it stays open."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def closed(fd: int) -> Iterator[int]:
    """Closes the descriptor in every case."""
    try:
        yield fd
    finally:
        os.close(fd)


def _create_whole(path: str, size: int, opener: Opener) -> int | None:
    """None: not possible here. The other way then works, or fails with the error that is worth telling."""
    folder, name = os.path.split(path)
    try:
        parent = opener(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)
    except (OSError, MirrorpairError):
        return None
    with closed(parent):
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE, dir_fd=parent)
        except OSError:
            return None
        with closed_on_error(fd):
            ofd_lock(fd, exclusive=True)
            os.ftruncate(fd, size)
            try:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)
            except FileExistsError:
                raise
            except OSError:
                os.close(fd)
                return None
            with _unlinked_on_error(name, parent):
                _sync_folder(parent)
            return fd


def _create_by_name(path: str, size: int, opener: Opener) -> int:
    fd = opener(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    with closed_on_error(fd):
        # Where the file really is: `path` may mean something to the opener only.
        place = os.readlink(f"/proc/self/fd/{fd}")
        with _unlinked_on_error(place):
            ofd_lock(fd, exclusive=True)
            os.ftruncate(fd, size)
            with contextlib.suppress(PermissionError):  # a folder that may be written but not read cannot be synced
                parent = os.open(os.path.dirname(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                with closed(parent):
                    _sync_folder(parent)
    return fd


@contextlib.contextmanager
def _unlinked_on_error(name: str, folder: int | None = None) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise  # somebody else found and locked the new file already: it is theirs now
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(name, dir_fd=folder)
        raise


def _sync_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders need none
            raise
