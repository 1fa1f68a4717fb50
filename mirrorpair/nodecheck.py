"""What one node's files say, and whether they fit each other, the configuration and the images: `meta dump`, `check`.

Rules:
- Nothing is written and nothing is locked: it can be asked while the daemon runs.
- The node file is read before the superblocks, which are written before it: a daemon at work is never mistaken for
  metadata from an older copy.
- Whatever the files hold there is an answer. Only a node without any file is an error: `init` was not run.
- Generation ids are text in JSON, 16 hexadecimal digits: many readers of JSON round 64-bit numbers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mirrorpair.arbiter.recordfile import load
from mirrorpair.errors import MirrorpairError, UsageError
from mirrorpair.identity import difference, identify
from mirrorpair.linux import block_device_size
from mirrorpair.metadata import Found, NodeFile, Superblock, check, check_owner, rolled_back
from mirrorpair.text import printable
from mirrorpair.units import format_exact

if TYPE_CHECKING:
    from mirrorpair.config import Config, Node, Volume
    from mirrorpair.history import Ids

_LOOKS = 3  # a daemon may be writing just what is being read
_ASK_US = ": `mirrorpair meta check` says what can be saved"
_NOT_FITTING = "the file itself is whole; nothing in it is used until this fits again"
_DISTRUSTED = (
    "the metadata are whole, but speak of another image: its content counts as unknown, and all of it is compared with "
    "the peer's"
)


class FileCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One file; `volume` is None for the node file, and for the record of the roles, which is named only when it is
    damaged."""

    what: Literal["node", "volume", "record"]
    volume: str | None
    path: str
    good: bool
    """nothing is wrong"""
    usable: bool
    """the daemon can start with it"""
    problems: tuple[str, ...]
    recoverable: str
    """what is lost, what is not, and what to do"""


class NodeCheck(msgspec.Struct, frozen=True, kw_only=True):
    """`meta check --json`."""

    schema: str = "mirrorpair.meta-check/1"
    pair: str
    node: str
    folder: str
    good: bool
    files: tuple[FileCheck, ...]


class CopyState(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two copies of a superblock or node file."""

    place: str
    state: str
    reason: str
    sequence: int | None


class LogState(msgspec.Struct, frozen=True, kw_only=True):
    """One of the four records of the activity log; `extents` is their number."""

    place: int
    state: str
    reason: str
    sequence: int | None
    extents: int


class FileDump(msgspec.Struct, frozen=True, kw_only=True):
    """A FileCheck and what the file holds. `content` is None when no copy is valid."""

    what: Literal["node", "volume", "record"]
    volume: str | None
    path: str
    good: bool
    usable: bool
    problems: tuple[str, ...]
    recoverable: str
    copies: tuple[CopyState, ...] = ()
    sequence: int | None = None
    content: dict[str, Any] | None = None
    log: tuple[LogState, ...] = ()
    active_extents: tuple[int, ...] = ()
    log_lost: bool = False
    dirty_blocks: int | None = None
    """bits set in the file; a daemon that runs may hold more in memory"""
    dirty_bytes: int | None = None
    bytes_found: int | None = None
    bytes_expected: int | None = None


class NodeDump(msgspec.Struct, frozen=True, kw_only=True):
    """`meta dump`."""

    schema: str = "mirrorpair.meta-dump/1"
    pair: str
    node: str
    folder: str
    good: bool
    files: tuple[FileDump, ...]


class Look(msgspec.Struct, frozen=True):
    """One file as it was found; `found` is None when it is not there or cannot be read."""

    check: FileCheck
    found: Found | None


def look_at(config: Config, node: Node) -> list[Look]:
    """The node file, the metadata of every volume, and a damaged record, in this order. UsageError: there is none of
    them at all."""
    first = _read(node.node_file, None)
    own = first.found.value if first.found is not None and isinstance(first.found.value, NodeFile) else None
    looks = [_fitted(first, _node_misfits(config, node, own))]
    for volume in config.volumes:
        look = _read(node.meta_path(volume.name), volume.name)
        looks.append(_fitted(look, _volume_misfits(config, node, volume, look, own)))
    if not any(os.path.lexists(look.check.path) for look in looks):
        raise UsageError(
            f"node {node.name} of pair {config.name} has no files in {printable(node.folder)}: "
            "`mirrorpair init` makes them"
        )
    return looks + _record(node, own)


def _record(node: Node, own: NodeFile | None) -> list[Look]:
    """The lone pair's copy of the register, if the daemon would refuse it. Which node's it is stands in the node
    file."""
    if own is None:
        return []
    try:
        load(node.record_file, own.incarnation_id)
    except MirrorpairError as error:
        file = FileCheck(
            what="record",
            volume=None,
            path=node.record_file,
            good=False,
            usable=False,
            problems=(str(error),),
            recoverable="images and metadata are whole; who was primary and who in sync is lost here, the peer's copy "
            "is not: remove this file while the peer is there",
        )
        return [Look(file, None)]
    return []


def checked(config: Config, node: Node, looks: list[Look]) -> NodeCheck:
    files = tuple(look.check for look in looks)
    good = all(file.good for file in files)
    return NodeCheck(pair=config.name, node=node.name, folder=node.folder, good=good, files=files)


def dumped(config: Config, node: Node, looks: list[Look]) -> NodeDump:
    files = tuple(_dump(look) for look in looks)
    good = all(file.good for file in files)
    return NodeDump(pair=config.name, node=node.name, folder=node.folder, good=good, files=files)


def _read(path: str, volume: str | None) -> Look:
    what: Literal["node", "volume"] = "node" if volume is None else "volume"
    try:
        found = check(path)
        for _ in range(_LOOKS - 1):
            if found.good:
                break
            found = check(path)
    except MirrorpairError as error:
        # Missing while others are there, or unreadable.
        file = FileCheck(
            what=what,
            volume=volume,
            path=path,
            good=False,
            usable=False,
            problems=(str(error),),
            recoverable=(
                "what stood in this file is lost; the image is not. While the peer has the data, `mirrorpair init "
                "--force` here makes this node new, and everything is copied from there"
                if not os.path.lexists(path)
                else "nothing can be said before the file can be read"
            ),
        )
        return Look(file, None)
    file = FileCheck(
        what=what,
        volume=volume,
        path=path,
        good=found.good,
        usable=found.usable,
        # This is the command that some of them send people to.
        problems=tuple(problem.removesuffix(_ASK_US) for problem in found.problems),
        recoverable=found.recoverable,
    )
    return Look(file, found)


def _fitted(look: Look, misfits: list[tuple[str, str]]) -> Look:
    """With what does not fit added: (problem, what that means)."""
    if not misfits:
        return look
    file = look.check
    return Look(
        msgspec.structs.replace(
            file,
            good=False,
            usable=file.usable and all(meaning != _NOT_FITTING for _, meaning in misfits),
            problems=(*file.problems, *(problem for problem, _ in misfits)),
            # What damage means stands first: it is the greater loss.
            recoverable=file.recoverable if not file.good else misfits[0][1],
        ),
        look.found,
    )


def _node_misfits(config: Config, node: Node, own: NodeFile | None) -> list[tuple[str, str]]:
    if own is None:
        return []
    try:
        check_owner(own, pair=config.name, node=node.name)
    except MirrorpairError as error:
        return [(str(error), _NOT_FITTING)]
    return []


def _volume_misfits(
    config: Config, node: Node, volume: Volume, look: Look, own: NodeFile | None
) -> list[tuple[str, str]]:
    superblock = look.found.value if look.found is not None else None
    if not isinstance(superblock, Superblock):
        return []
    misfits = []
    try:
        check_owner(
            superblock,
            pair=config.name,
            node=node.name,
            volume=volume.name,
            size=volume.size,
            block_size=volume.block_size,
            pair_uuid=own.pair_uuid if own is not None else "",
        )
    except MirrorpairError as error:
        misfits.append((str(error), _NOT_FITTING))
    if own is not None and (older := rolled_back(superblock, own)):
        misfits.append((older, _DISTRUSTED))
    return misfits + _image_misfits(node.images[volume.name], superblock)


def _image_misfits(path: str, superblock: Superblock) -> list[tuple[str, str]]:
    shown = printable(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return [(f"the image {shown} cannot be opened: {error.strerror}", _NOT_FITTING)]
    try:
        other = difference(superblock.identity, identify(fd))
        size = block_device_size(fd) if superblock.identity.kind == "device" and not other else os.fstat(fd).st_size
    except OSError as error:
        return [(f"the image {shown} cannot be read: {error.strerror}", _NOT_FITTING)]
    finally:
        os.close(fd)
    if other:
        return [(f"the image {shown} is not the one that was recorded: {other}", _DISTRUSTED)]
    if size < superblock.size or (size > superblock.size and superblock.identity.kind == "file"):
        return [
            (f"the image {shown} has {format_exact(size)}, the volume {format_exact(superblock.size)}", _NOT_FITTING)
        ]
    return []


def _dump(look: Look) -> FileDump:
    file, found = look.check, look.found
    common = {name: getattr(file, name) for name in file.__struct_fields__}
    if found is None:
        return FileDump(**common)
    value = found.value
    dirty = found.dirty_blocks
    return FileDump(
        **common,
        copies=tuple(
            CopyState(place=copy.place, state=copy.state, reason=copy.reason, sequence=copy.sequence)
            for copy in found.copies
        ),
        sequence=found.sequence,
        content=None if value is None else _content(value),
        log=tuple(
            LogState(
                place=record.place,
                state=record.state,
                reason=record.reason,
                sequence=record.sequence,
                extents=len(record.extents),
            )
            for record in found.log
        ),
        active_extents=found.active_extents,
        log_lost=found.log_lost,
        dirty_blocks=dirty,
        dirty_bytes=dirty * value.block_size if dirty is not None and isinstance(value, Superblock) else None,
        bytes_found=found.bytes_found,
        bytes_expected=found.bytes_expected,
    )


def _content(value: Superblock | NodeFile) -> dict[str, Any]:
    """All fields, and what follows from them; 64-bit ids as text."""
    content: dict[str, Any] = msgspec.to_builtins(value)
    if isinstance(value, Superblock):
        content["ids"] = _ids(value.ids)
        content["new"] = value.new
        content["inconsistent"] = value.inconsistent
    return content


def _ids(ids: Ids) -> dict[str, Any]:
    def text(one: int) -> str | None:
        return f"{one:016x}" if one else None

    return {"current": text(ids.current), "bitmap": text(ids.bitmap), "history": [text(one) for one in ids.history]}
