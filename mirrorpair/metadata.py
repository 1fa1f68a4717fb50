"""What a node remembers about itself (node file) and about each of its volumes (superblock, activity log, bitmap).

    <folder>/node            the node file: two copies (twofold.py)
    <folder>/<volume>.meta   0       superblock, two copies
                             8192    activity log, 4 records of 8192   | written by the C journal,
                             65536   bitmap, one bit per block         | through the same descriptor

Rules:
- M1 The superblock says which image it speaks of, its size and its block size. What differs from the configuration is
  refused (`check_owner`); another image (`identity.difference`) or a superblock from an older copy (`rolled_back`) is
  distrusted: neither its data nor its bits count.
- M2 Two copies; neither valid: refused.
- M7 A new file has one valid, empty record in its log: a log without any was damaged.
- M9 What belongs to the node and not to a volume is in the node file.
- M10 Pair and volume uuid are empty until the first handshake. A volume is new as long as it has no generation id.
- A new epoch is written to the superblocks of all volumes first and to the node file last; so is the pair's uuid. So a
  superblock never has less than the node file, unless it was restored from an older copy (F15).
- The whole file is reserved when it is made: later there is always space (F10).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import msgspec

from mirrorpair._core import digest128
from mirrorpair.errors import ImageError, RefusedError
from mirrorpair.history import MAX_ID, DiskState, Ids, Role
from mirrorpair.identity import Identity  # noqa: TC001 - msgspec looks the annotations up at run time
from mirrorpair.text import printable
from mirrorpair.twofold import (
    READS,
    TWOFOLD_BYTES,
    Copy,
    Kind,
    Stored,
    T,
    create_stored,
    damage_of,
    error_text,
    look,
    newest,
    open_stored,
    open_to_look,
    unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

NODE_FILE = "node"
EXTENT_BLOCKS = 64
LOG_OFFSET = 8192
LOG_RECORD_BYTES = 8192
LOG_RECORDS = 4
LOG_EXTENTS = 1024
BITMAP_OFFSET = 65536

MAX_NAME = 255
MAX_UUID = 64
_MAX_NUMBER = 2**63 - 1
_LOG_MAGIC = b"MPRACTLG"
_LOG_DIGEST = slice(24, 40)
_LOG_TABLE = 64
_LAST_SEQUENCE = 2**63 - 1 - LOG_RECORDS
_PAGE = 4096
_PIECE = 1 << 20


class Superblock(msgspec.Struct, frozen=True, kw_only=True):
    """One volume on one node. Times are not in it. ValueError: out of range."""

    pair: str
    node: str
    volume: str
    identity: Identity
    """the image's"""
    size: int
    """bytes, of the volume"""
    block_size: int
    """bytes per bit"""
    extent_blocks: int = EXTENT_BLOCKS
    pair_uuid: str = ""
    volume_uuid: str = ""
    ids: Ids = Ids()
    disk: DiskState = "consistent"
    peer_disk: DiskState | None = None
    """the peer's, when last heard; None: never"""
    clean: bool = True
    """stopped cleanly: everything is durable, the log is empty. False while the daemon runs"""
    discard: bool = False
    """a person said that this side's data may be overwritten; until that has happened"""
    distrusted: bool = False
    """once `rolled_back` or `identity.difference` found something: until everything was copied here again. The epoch
    and the identity that showed it are brought up to date meanwhile, and would hide it after a restart"""
    epoch: int = 0
    """the node's, when it last acquired or learned one"""
    incarnation: int = 0
    boot_id: str = ""
    """the boot in which this was written"""
    full_id: int = 0
    """R6: see history.Side"""
    verify_cursor: int = 0

    def __post_init__(self) -> None:
        _names(self.pair, self.node, self.volume)
        _uuids(self.pair_uuid, self.volume_uuid, self.boot_id)
        _numbers(self.size, self.epoch, self.incarnation, self.verify_cursor)
        if not 0 <= self.full_id <= MAX_ID:
            raise ValueError("the number of a full compare is out of range")
        if not 0 < self.block_size <= _MAX_NUMBER or self.extent_blocks != EXTENT_BLOCKS:
            raise ValueError("the block or extent size is out of range")

    @property
    def new(self) -> bool:
        """Made by `init`, zeros, nothing written since."""
        return self.ids.current == 0

    @property
    def inconsistent(self) -> bool:
        """A resync into it has begun and not ended (R1), or worse."""
        return self.disk in ("inconsistent", "failed", "diskless")


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs to the node (M9). ValueError: out of range."""

    pair: str
    node: str
    incarnation_id: str
    """random, made by `init` (A8)"""
    incarnation: int = 0
    """n of (id, n)"""
    pair_uuid: str = ""
    epoch: int = 0
    """the highest acquired or learned"""
    epoch_floor: int = 0
    """A13: raised before a promotion is asked for"""
    role: Role = "secondary"
    """the role it has, or had when it ended: with `clean` false, primary means crashed as primary"""
    boot_id: str = ""
    """the boot in which it last ran"""
    promise_ns: int = 0
    """A11: the longest promise it has given that may still run after a restart"""
    register_epoch: int = 0
    register_version: int = 0
    """A15: the highest (epoch, version) of the register it has seen"""
    position: int = 0
    """A8: stream position up to which everything received is flushed here"""
    clean: bool = True
    """stopped cleanly (A18). False while the daemon runs"""
    peer_connected: bool = False
    """the peer was connected when this was written"""

    def __post_init__(self) -> None:
        _names(self.pair, self.node)
        _uuids(self.incarnation_id, self.pair_uuid, self.boot_id)
        _numbers(self.incarnation, self.epoch, self.epoch_floor, self.promise_ns, self.position)
        _numbers(self.register_epoch, self.register_version)

    @property
    def crashed_primary(self) -> bool:
        """It ended as primary without a clean stop; to be asked before the file is written again."""
        return self.role == "primary" and not self.clean

    def boot_lost(self, boot_id: str) -> bool:
        """The host's boot is another one and there was no clean stop: unflushed writes may be gone (A4, A7)."""
        return not self.clean and self.boot_id != boot_id


Value: TypeAlias = Superblock | NodeFile

SUPERBLOCK = Kind(b"MPRSUPER", Superblock, "superblock")
NODE = Kind(b"MPRNODE\0", NodeFile, "node file")


def node_path(folder: str) -> str:
    return os.path.join(folder, NODE_FILE)


def volume_path(folder: str, volume: str) -> str:
    return os.path.join(folder, f"{volume}.meta")


def blocks_of(size: int, block_size: int) -> int:
    return -(-size // block_size)


def bitmap_bytes(size: int, block_size: int) -> int:
    """Bytes of the bitmap in the file: whole words, rounded up to whole pages."""
    words = -(-blocks_of(size, block_size) // EXTENT_BLOCKS)
    return -(-words * 8 // _PAGE) * _PAGE


def metadata_bytes(size: int, block_size: int) -> int:
    """Bytes of the metadata file of a volume: 64 KiB, and 2 MiB for each TiB of 64 KiB blocks."""
    return BITMAP_OFFSET + bitmap_bytes(size, block_size)


def create_volume(path: str, superblock: Superblock, *, force: bool = False) -> Stored[Superblock]:
    """Makes a volume's metadata: no bit set, the log empty. Open and locked; errors as `twofold.create_stored`."""
    length = metadata_bytes(superblock.size, superblock.block_size)
    return create_stored(SUPERBLOCK, path, superblock, length=length, rest={LOG_OFFSET: empty_record()}, force=force)


def open_volume(path: str) -> Stored[Superblock]:
    """Opens and locks a volume's metadata. RefusedError also: the file is too short for its bitmap; else as
    `twofold.open_stored`."""
    stored = open_stored(SUPERBLOCK, path)
    try:
        if too_short := _too_short(stored.value, os.fstat(stored.fd).st_size):
            raise RefusedError(
                f"{printable(path)} was truncated ({too_short}): `mirrorpair meta check` says what can be saved"
            )
    except BaseException:
        stored.close()
        raise
    return stored


def create_node(path: str, node: NodeFile, *, force: bool = False) -> Stored[NodeFile]:
    """Makes the node file, open and locked; errors as `twofold.create_stored`."""
    return create_stored(NODE, path, node, force=force)


def open_node(path: str) -> Stored[NodeFile]:
    """Opens and locks the node file; errors as `twofold.open_stored`."""
    return open_stored(NODE, path)


def check_owner(
    value: Value,
    *,
    pair: str,
    node: str,
    volume: str | None = None,
    size: int | None = None,
    block_size: int | None = None,
    pair_uuid: str = "",
) -> None:
    """RefusedError: the metadata are of another pair, node or volume, or of another size than the configuration says
    (M1). `pair_uuid`: the node file's or the peer's; an empty one fits all (M10)."""
    what = f"of node {value.node} of pair {value.pair}"
    if (value.pair, value.node) != (pair, node):
        raise RefusedError(f"the metadata are {what}, not of node {node} of pair {pair}")
    if value.pair_uuid and pair_uuid and value.pair_uuid != pair_uuid:
        raise RefusedError(
            f"the metadata {what} are of another pair of this name ({value.pair_uuid}, not {pair_uuid}): "
            "a pair that was made anew does not take over the old one's"
        )
    if isinstance(value, NodeFile):
        return
    if volume is not None and value.volume != volume:
        raise RefusedError(f"the metadata are those of volume {value.volume}, not of {volume}")
    for name, recorded, expected in (("size", value.size, size), ("block size", value.block_size, block_size)):
        if expected is not None and recorded != expected:
            raise RefusedError(
                f"volume {value.volume} was made with a {name} of {recorded} bytes, the configuration says {expected}"
            )


def rolled_back(superblock: Superblock, node: NodeFile) -> str | None:
    """F15: why the superblock must be from an older copy than the node file, one sentence; None: nothing says so.
    Whoever opens such a volume makes `distrusted` durable, and says it in its `Side`, before it writes a new epoch."""
    if superblock.distrusted:
        return (
            f"volume {superblock.volume} was found with metadata of another or an older image, and not everything was "
            "copied to it since"
        )
    if superblock.epoch < node.epoch:
        return (
            f"the metadata of volume {superblock.volume} know epoch {superblock.epoch}, the node {node.epoch}: "
            "they were restored from an older copy"
        )
    if node.pair_uuid and not superblock.pair_uuid:
        return f"the metadata of volume {superblock.volume} are from before the pair first met"
    return None


def empty_record(sequence: int = 0) -> bytes:
    """A record of the activity log without extents."""
    record = bytearray(LOG_RECORD_BYTES)
    record[:8] = _LOG_MAGIC
    record[8:16] = sequence.to_bytes(8, "little")
    record[_LOG_DIGEST] = digest128(record)
    return bytes(record)


class LogRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One of the four records of the activity log, as it was found."""

    place: int
    state: Literal["good", "empty", "bad"]
    reason: str = ""
    sequence: int | None = None
    extents: tuple[int, ...] = ()


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a metadata file holds and what is wrong with it."""

    path: str
    good: bool
    """nothing is damaged"""
    usable: bool
    """it can be opened"""
    problems: tuple[str, ...] = ()
    recoverable: str
    """one or two sentences: what is lost, what is not, and what to do"""
    copies: tuple[Copy[Superblock], Copy[Superblock]] | tuple[Copy[NodeFile], Copy[NodeFile]]
    sequence: int | None = None
    value: Superblock | NodeFile | None = None
    """of the copy that counts"""
    bytes_found: int
    bytes_expected: int | None = None
    """None: the superblock that would say is unreadable"""
    log: tuple[LogRecord, ...] = ()
    active_extents: tuple[int, ...] = ()
    """of the record that counts: they are dirty after a crash, beside the bits"""
    log_lost: bool = False
    """M7: no record can be believed: at the next start all bits are set"""
    dirty_blocks: int | None = None
    """bits set in the file; while a daemon runs it may hold more in memory"""


def check(path: str) -> Found:
    """Looks at a node file (the name `node`) or a volume's metadata (any other), without a lock: also while a daemon
    has it. Whatever the bytes are, it says so. UsageError: there is no such file. ImageError: it cannot be read."""
    if os.path.basename(path) == NODE_FILE:
        return _check_node(path)
    return _check_volume(path)


def dump(path: str) -> Found:
    """As `check`, but RefusedError if nothing can be shown because no copy is valid."""
    found = check(path)
    if found.value is None:
        kind = "node file" if os.path.basename(path) == NODE_FILE else "superblock"
        raise RefusedError(f"the {kind} {printable(path)} cannot be read: {found.recoverable}")
    return found


def _check_node(path: str) -> Found:
    copies, length, _ = _look(NODE, path)
    best = newest(copies)
    problems = _copy_problems(NODE, path, copies)
    return Found(
        path=path,
        good=not problems,
        usable=best is not None,
        problems=problems,
        recoverable=_advice(NODE, copies, problems),
        copies=copies,
        sequence=best.sequence if best else None,
        value=best.value if best else None,
        bytes_found=length,
        bytes_expected=TWOFOLD_BYTES,
    )


def _check_volume(path: str) -> Found:
    copies, length, log = _look(SUPERBLOCK, path)
    best = newest(copies)
    superblock = best.value if best else None
    problems = list(_copy_problems(SUPERBLOCK, path, copies))
    last = newest_record(log)
    torn = [record for record in log if record.state == "bad"]
    problems += [f"record {record.place} of the activity log: {record.reason}" for record in torn]
    too_short = _too_short(superblock, length) if superblock else None
    if too_short:
        problems.append(f"truncated: {too_short}")
    if last is None:
        problems.append("no record of the activity log can be believed")
    dirty = None
    if superblock is not None and not too_short:
        dirty, stray = _count_bits(path, superblock)
        if stray:
            problems.append(f"{stray} bits are set behind the last block")
    advice = _advice(SUPERBLOCK, copies, tuple(problems))
    if best is not None and too_short:
        advice = (
            "the generation ids are whole, the bits are lost. If the peer has the data, `mirrorpair init --force` here "
            "makes this node new and everything is copied from there"
        )
    elif best is not None and last is None:
        advice = "the ids are whole, the log cannot be believed: at the next start every block counts as different"
    return Found(
        path=path,
        good=not problems,
        usable=best is not None and not too_short,
        problems=tuple(problems),
        recoverable=advice,
        copies=copies,
        sequence=best.sequence if best else None,
        value=superblock,
        bytes_found=length,
        bytes_expected=metadata_bytes(superblock.size, superblock.block_size) if superblock else None,
        log=log,
        active_extents=last.extents if last else (),
        log_lost=last is None,
        dirty_blocks=dirty,
    )


def parse_record(place: int, data: bytes) -> LogRecord:
    """What the bytes of this record (0 to 3) are. Any bytes will do; nothing is raised."""

    def bad(reason: str) -> LogRecord:
        return LogRecord(place=place, state="bad", reason=reason)

    if len(data) < LOG_RECORD_BYTES:
        return bad("the file ends before it")
    if not any(data):
        return LogRecord(place=place, state="empty")
    if data[:8] != _LOG_MAGIC:
        return bad("it does not begin like a record")
    bare = bytearray(data)
    bare[_LOG_DIGEST] = bytes(16)
    if digest128(bare) != data[_LOG_DIGEST]:
        return bad("its digest is wrong: torn or damaged")
    sequence, count = int.from_bytes(data[8:16], "little"), int.from_bytes(data[16:20], "little")
    if sequence % LOG_RECORDS != place or sequence >= _LAST_SEQUENCE:
        return bad("it belongs to another place")
    table = memoryview(data)[_LOG_TABLE : _LOG_TABLE + 4 * LOG_EXTENTS]
    slots = (int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), 4))
    extents = tuple(sorted(slot - 1 for slot in slots if slot))
    if len(extents) != count:
        return bad(f"it holds {len(extents)} extents and says {count}")
    return LogRecord(place=place, state="good", sequence=sequence, extents=extents)


def newest_record(log: Sequence[LogRecord]) -> LogRecord | None:
    """The record that counts, by the journal's own rule; None: none can be believed (M7).

    The record behind the newest may be torn: nothing was written under that one. If the next place is unreadable too,
    a whole record may have been in one of them.
    """
    newest = max((record for record in log if record.state == "good"), key=lambda one: one.sequence or 0, default=None)
    if newest is None or newest.sequence is None:
        return None
    for ahead in (1, 2):
        behind = log[(newest.place + ahead) % LOG_RECORDS]
        never_written = behind.state == "empty" and newest.sequence < LOG_RECORDS and behind.place > newest.place
        if behind.state == "good" or never_written:
            return newest
    return None


def _look(kind: Kind[T], path: str) -> tuple[tuple[Copy[T], Copy[T]], int, tuple[LogRecord, ...]]:
    """Both copies, the file's length, and the four records of the log (of a node file: none)."""
    fd = open_to_look(kind, path)
    try:
        copies, log = look(kind, fd), _read_log(fd) if kind.noun == SUPERBLOCK.noun else ()
        for _ in range(READS - 1):
            if all(record.state != "bad" for record in log):
                break
            log = _read_log(fd)
        return copies, os.fstat(fd).st_size, log
    except OSError as error:
        raise ImageError(f"cannot read the {kind.noun} {printable(path)}: {error_text(error)}") from error
    finally:
        os.close(fd)


def _read_log(fd: int) -> tuple[LogRecord, ...]:
    return tuple(
        parse_record(place, os.pread(fd, LOG_RECORD_BYTES, LOG_OFFSET + LOG_RECORD_BYTES * place))
        for place in range(LOG_RECORDS)
    )


def _copy_problems(kind: Kind[T], path: str, copies: tuple[Copy[T], Copy[T]]) -> tuple[str, ...]:
    shown = printable(path)
    if newest(copies) is None:
        return (unreadable(kind, shown, copies),)
    damage = damage_of(kind, shown, copies)
    return (damage,) if damage else ()


def _advice(kind: Kind[T], copies: tuple[Copy[T], Copy[T]], problems: tuple[str, ...]) -> str:
    if any(copy.state == "newer" for copy in copies):
        return "nothing is lost: a newer mirrorpair can read it"
    if newest(copies) is not None:
        return "nothing is lost: what is damaged is written anew by the daemon" if problems else "nothing is damaged"
    if kind.noun == NODE.noun:
        return (
            "what this node knew of epochs and roles is lost, the images and the volumes' metadata are not. While the "
            "peer has the data, `mirrorpair init --force` here makes this node new, and everything is copied from there"
        )
    return (
        "which generation this volume is of is lost, its image is not. If the peer has the data, "
        "`mirrorpair init --force` here makes this node new, and everything is copied from there. If only this image "
        "has it, `mirrorpair init --keep-data --force` makes its content the data: never do that on both nodes"
    )


def _too_short(superblock: Superblock, length: int) -> str | None:
    expected = metadata_bytes(superblock.size, superblock.block_size)
    return f"{length} bytes, {expected} are needed" if length < expected else None


def _count_bits(path: str, superblock: Superblock) -> tuple[int, int]:
    """Bits set for blocks, and bits set behind the last block."""
    blocks = blocks_of(superblock.size, superblock.block_size)
    left, counted, stray = bitmap_bytes(superblock.size, superblock.block_size), 0, 0
    fd = open_to_look(SUPERBLOCK, path)
    try:
        offset = BITMAP_OFFSET
        while left:
            piece = os.pread(fd, min(left, _PIECE), offset)
            if not piece:
                raise ImageError(f"{printable(path)} shrank while it was read")
            bits = int.from_bytes(piece, "little")
            inside = max(0, min(blocks - (offset - BITMAP_OFFSET) * 8, len(piece) * 8))
            counted += (bits & ((1 << inside) - 1)).bit_count()
            stray += (bits >> inside).bit_count()
            left, offset = left - len(piece), offset + len(piece)
    except OSError as error:
        raise ImageError(f"cannot read {printable(path)}: {error_text(error)}") from error
    finally:
        os.close(fd)
    return counted, stray


def _names(*names: str) -> None:
    if any(not name or not name.isprintable() or len(name.encode()) > MAX_NAME for name in names):
        raise ValueError(f"a name is printable and has 1 to {MAX_NAME} bytes")


def _uuids(*uuids: str) -> None:
    if any(not uuid.isascii() or not uuid.isprintable() or len(uuid) > MAX_UUID for uuid in uuids):
        raise ValueError(f"an id is at most {MAX_UUID} printable ASCII characters")


def _numbers(*numbers: int) -> None:
    if any(not 0 <= number <= _MAX_NUMBER for number in numbers):
        raise ValueError("a number is out of range")
