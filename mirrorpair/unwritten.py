"""Targets before and without a write: what a dry run compares with, what a target was, what a failed run takes back.

Rules:
- A missing target is compared as what it would be made as: zeros. They cost no memory (a sparse memfd).
- Only a file that this process made is removed, and only while its name still leads to it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from mirrorpair.errors import ImageError, MirrorpairError, UsageError
from mirrorpair.image import Image, open_source
from mirrorpair.newfile import closed, closed_on_error
from mirrorpair.text import printable

if TYPE_CHECKING:
    from mirrorpair.newfile import Opener


def open_or_zeros(path: str, size: int, opener: Opener | None = None) -> Image:
    """`path` for reading; `size` zeros with `created` set when it does not exist, though its folder does."""
    if not _missing(path, opener):
        return open_source(path, opener=opener)
    folder = os.path.dirname(path) or "."
    try:
        os.close((opener or os.open)(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0))
    except OSError as error:
        raise UsageError(
            f"{printable(path)} cannot be made: its folder {printable(folder)}: {error.strerror}; make the folder first"
        ) from error
    try:
        fd = os.memfd_create("mirrorpair-zeros", os.MFD_CLOEXEC)
        with closed_on_error(fd):
            os.ftruncate(fd, size)
    except OSError as error:
        raise ImageError(f"{printable(path)}: zeros to compare with cannot be made: {error.strerror}") from error
    return Image(path=path, fd=fd, size=size, kind="file", created=True)


def size_of(path: str, opener: Opener | None = None) -> int | None:
    """The size of a file before anything is done to it; None when there is none, or it is no file. Never an error."""
    with suppress(OSError, ValueError, MirrorpairError):
        with closed((opener or os.open)(path, os.O_PATH | os.O_CLOEXEC, 0)) as node:
            status = os.fstat(node)
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


def remove_created(image: Image, opener: Opener | None = None) -> bool:
    """Removes the file that `image` is, if it still bears its name. False when it could not be."""
    folder, name = os.path.split(image.path)
    with suppress(OSError):
        parent = (opener or os.open)(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0)
        with closed(parent):
            there, ours = os.stat(name, dir_fd=parent, follow_symlinks=False), os.fstat(image.fd)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                os.unlink(name, dir_fd=parent)
                return True
    return False


def _missing(path: str, opener: Opener | None) -> bool:
    """Whether nothing is there. A dangling link is something: making a file through it is refused elsewhere."""
    try:
        os.close((opener or os.open)(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0))
    except OSError as error:
        return error.errno == errno.ENOENT
    return False
