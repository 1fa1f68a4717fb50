"""Makes one node of a pair: its images, its folder, and in it the metadata of each volume and the node file (`init`).

Rules:
- All or nothing. Whatever fails or is interrupted, files and folders that this call made are removed again, of every
  volume. Everything that can fail without harm (locks, sizes, space for the metadata) is done before the first byte of
  an existing image is touched.
- Nothing that exists is overwritten without `force`: images, metadata, node file (RefusedError, 12). Not even with it
  while a daemon of this node, or any other program, has them locked.
- M10 An image whose metadata say "new" is zeros from its first to its last byte, durably, before these metadata have
  their names: only then may two new nodes agree to copy nothing. Pair and volume uuid stay empty.
- With `keep_data` the content is the data: the volume is not new but has a generation of its own, and the image is not
  written at all.
- A kill in the middle leaves no node file, which comes last: `init` then goes on where it is told to, with `force` for
  an image that is there already. Old metadata lose their names before the image that they speak of is zeroed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from mirrorpair.blockstack import extents, overlap
from mirrorpair.errors import ImageError, MirrorpairError, RefusedError, UsageError
from mirrorpair.history import MAX_ID, Ids
from mirrorpair.identity import boot_id, identify
from mirrorpair.image import Image, open_target
from mirrorpair.linux import blk_zeroout, logical_block_size, ofd_lock
from mirrorpair.metadata import NodeFile, Superblock, create_node, create_volume
from mirrorpair.text import printable
from mirrorpair.units import format_exact
from mirrorpair.unwritten import remove_created, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mirrorpair.config import Config, Node, Volume
    from mirrorpair.identity import Identity

FOLDER_MODE = 0o700
_ZEROED_AT_ONCE = 64 << 20  # of a device: often enough to be interrupted and to tell how far it is
_STAGED = ".init"  # ends the name of a file that is not complete


class MadeVolume(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of one volume. `content`: "made" (a new file of zeros), "zeroed" or "kept"."""

    name: str
    size: int
    block_size: int
    image: str
    kind: str
    content: str
    metadata: str


class MadeNode(msgspec.Struct, frozen=True, kw_only=True):
    """`init --json`."""

    schema: str = "mirrorpair.init/1"
    pair: str
    node: str
    folder: str
    volumes: tuple[MadeVolume, ...]


class _Opened(msgspec.Struct, frozen=True):
    volume: Volume
    image: Image
    content: str


def make_node(
    config: Config,
    node: Node,
    *,
    keep_data: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> MadeNode:
    """Makes the node and says what it made; `progress(volume, done_bytes, total_bytes)` while a device is zeroed.

    RefusedError: something exists (without `force`), is in use, or has another size than the volume. UsageError: an
    image that should be there is not, or is neither file nor block device. ImageError: no space, or the storage failed.
    """
    with ExitStack() as held, ExitStack() as undo:  # what is undone still needs what is held
        folder = _folder(node.folder, undo, held)
        _check_absent([node.node_file, *(node.meta_path(one.name) for one in config.volumes)], force, held)
        opened: list[_Opened] = []
        for volume in config.volumes:
            one = _image(volume, node, keep_data, force, opened)
            held.callback(one.image.close)
            if one.image.created:
                undo.callback(remove_created, one.image)
            opened.append(one)
        staged = _stage(config, node, opened, undo)
        # From here on what exists may be changed.
        _unname([path for path, _ in staged], folder)
        for one in opened:
            _settle(one, progress)
        _name(staged, folder, undo)
        undo.pop_all()
    volumes = tuple(_made(one, node) for one in opened)
    return MadeNode(pair=config.name, node=node.name, folder=node.folder, volumes=volumes)


# --- what is there already


def _folder(path: str, undo: ExitStack, held: ExitStack) -> int:
    """The folder's descriptor, locked against another `init`; folders are made where they are missing."""
    missing: list[str] = []
    parent = path
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    try:
        for one in reversed(missing):
            os.mkdir(one, FOLDER_MODE if one == path else 0o755)
            undo.callback(_remove_folder, one)
            _sync_folder(os.path.dirname(one))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(path, "cannot make the folder", error) from error
    held.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(f"another `mirrorpair init` works in {printable(path)} at this moment") from None
    return fd


def _check_absent(paths: Iterable[str], force: bool, held: ExitStack) -> None:
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            continue
        shown = printable(path)
        if not stat.S_ISREG(mode):
            raise RefusedError(f"{shown} is in the way and is not a file: remove it")
        if not force:
            raise RefusedError(
                f"{shown} exists, so this node was made already; --force makes it anew, and forgets what differs from "
                "its peer"
            )
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            held.callback(os.close, fd)
            ofd_lock(fd, exclusive=True)
        except BlockingIOError:
            raise RefusedError(f"{shown} is in use: the daemon of this node runs; stop it first") from None
        except OSError as error:
            raise _failed(path, "cannot replace", error) from error


def _image(volume: Volume, node: Node, keep_data: bool, force: bool, others: list[_Opened]) -> _Opened:
    path = node.images[volume.name]
    shown = printable(path)
    exists = os.path.lexists(path)
    if keep_data and not exists:
        raise UsageError(f"{shown} does not exist: --keep-data takes an image that is there as the volume's data")
    if exists and not keep_data and not force:
        raise RefusedError(
            f"{shown} exists: --keep-data takes its content as the data of {volume.name}, --force makes it zeros"
        )
    size = size_of(path)  # None: not there, or no file
    if keep_data and size is not None and size != volume.size:
        raise RefusedError(
            f"{shown} has {format_exact(size)}, volume {volume.name} {format_exact(volume.size)}: with --keep-data the "
            "two must be the same"
        )
    _check_apart(path, others)
    image = open_target(path, size=volume.size if size is None else size, create=not exists)
    if not exists and not image.created:
        image.close()
        raise RefusedError(f"{shown} was made by another program at this moment")
    return _Opened(volume, image, "made" if image.created else "kept" if keep_data else "zeroed")


def _check_apart(path: str, others: list[_Opened]) -> None:
    """Looked at before the image is opened: its own lock would say only that somebody uses it."""
    try:
        found = extents(os.stat(path))
    except OSError:
        return  # not there yet, or opening it will say what is wrong
    for other in others:
        if overlap(found, extents(os.fstat(other.image.fd))):
            raise RefusedError(
                f"{printable(path)} and {printable(other.image.path)} (volume {other.volume.name}) are the same image"
            )


# --- what is made


def _stage(config: Config, node: Node, opened: list[_Opened], undo: ExitStack) -> list[tuple[str, str]]:
    """The metadata of all volumes and, last, the node file, complete and durable under names that nobody reads: pairs
    of the right path and that one. Their space is reserved, so this is where a full file system is noticed."""
    staged: list[tuple[str, str]] = []

    def stage(path: str) -> str:
        temporary = path + _STAGED
        staged.append((path, temporary))
        undo.callback(_remove, temporary)
        return temporary

    for one in opened:
        superblock = Superblock(
            pair=config.name,
            node=node.name,
            volume=one.volume.name,
            identity=_identity(one.image),
            size=one.volume.size,
            block_size=one.volume.block_size,
            # M10: without an id the volume is new. Data that are kept are a generation that nobody else has.
            ids=Ids(current=_new_id()) if one.content == "kept" else Ids(),
            boot_id=boot_id(),
        )
        # What a killed `init` left under this name may go: the folder is locked.
        create_volume(stage(node.meta_path(one.volume.name)), superblock, force=True).close()
    file = NodeFile(pair=config.name, node=node.name, incarnation_id=os.urandom(16).hex(), boot_id=boot_id())
    create_node(stage(node.node_file), file, force=True).close()
    return staged


def _identity(image: Image) -> Identity:
    try:
        return identify(image.fd)
    except OSError as error:
        raise _failed(image.path, "cannot tell the identity of", error) from error


def _new_id() -> int:
    return secrets.randbelow(MAX_ID) + 1


def _unname(paths: list[str], folder: int) -> None:
    """Removes old files, the node file (the last of them) first: without it the node does not exist."""
    try:
        for path in reversed(paths):
            _remove(path)
        os.fsync(folder)
    except OSError as error:
        raise _failed(paths[-1], "cannot replace", error) from error


def _name(staged: list[tuple[str, str]], folder: int, undo: ExitStack) -> None:
    """Gives the new files their names; the node file's comes last and only when all others are durable."""
    path = staged[-1][0]
    try:
        for path, temporary in staged:
            if path == staged[-1][0]:
                os.fsync(folder)
            undo.callback(_remove, path)
            os.rename(temporary, path)
        os.fsync(folder)
    except OSError as error:
        raise _failed(path, "cannot make", error) from error


def _settle(one: _Opened, progress: Callable[[str, int, int], None] | None) -> None:
    """Makes the image what its metadata will say, durably."""
    fd, size = one.image.fd, one.volume.size
    try:
        if one.content == "zeroed" and one.image.kind == "file":
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        elif one.content == "zeroed":
            _zero_device(fd, size, lambda done: progress(one.volume.name, done, size) if progress else None)
        os.fsync(fd)
    except OSError as error:
        raise _failed(one.image.path, "cannot write", error) from error


def _zero_device(fd: int, size: int, progress: Callable[[int], object]) -> None:
    """The first `size` bytes of a block device."""
    aligned = size - size % logical_block_size(fd)
    for offset in range(0, aligned, _ZEROED_AT_ONCE):
        blk_zeroout(fd, offset, min(_ZEROED_AT_ONCE, aligned - offset))
        progress(min(offset + _ZEROED_AT_ONCE, aligned))
    while aligned < size:
        aligned += os.pwrite(fd, bytes(size - aligned), aligned)
    progress(size)


def _made(one: _Opened, node: Node) -> MadeVolume:
    return MadeVolume(
        name=one.volume.name,
        size=one.volume.size,
        block_size=one.volume.block_size,
        image=one.image.path,
        kind=one.image.kind,
        content=one.content,
        metadata=node.meta_path(one.volume.name),
    )


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_folder(path: str) -> None:
    with contextlib.suppress(OSError):  # somebody else put something into it
        os.rmdir(path)


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _failed(path: str, what: str, error: OSError) -> MirrorpairError:
    reason = error.strerror or f"error {error.errno}"
    if error.errno == errno.ENOSPC:
        reason = "no space is left there"
    return ImageError(f"{what} {printable(path)}: {reason}")
