"""A small record kept twice in one file, so that one torn write loses nothing (M2).

    0      copy A (4096 bytes): the even sequence numbers
    4096   copy B (4096 bytes): the odd ones
    8192   whatever else the file holds; not this module's

    a copy: magic 8 | u32 version | u32 length | u64 sequence | digest 16 | JSON (length bytes) | zeros; little-endian,
    the digest (XXH3-128) is over header and JSON with its own field zero

Rules:
- Writes alternate: the newest copy is never the one that is being written. Each is durable when `write` returns.
- The valid copy with the highest sequence wins. None valid: refused; nothing is ever made anew silently (M2).
- A copy is valid as a whole: digest, place, version, padding, and a value that its type accepts. Any flipped bit makes
  it invalid.
- Opened means locked: two programs never write the same file (RefusedError, exit 12). What an open finds is made
  durable before it is believed: a killed process may have left it in the cache only.
- A failed write or flush is not tried again (the kernel forgets the pages of a failed flush): the file stays failed
  until it is opened anew.
- A new file gets its name only when it is complete and durable, and its space is reserved: being killed or out of space
  leaves no half-made one. `<name>.new` is where it is made; the next attempt takes over one that was left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from mirrorpair._core import digest128
from mirrorpair.errors import ImageError, RefusedError, UsageError
from mirrorpair.jsontypes import decoder
from mirrorpair.linux import ofd_lock
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self

VERSION = 1
COPY_BYTES = 4096
PLACES = ("A", "B")
TWOFOLD_BYTES = COPY_BYTES * len(PLACES)
MODE = 0o600

_HEADER = struct.Struct("<8sIIQ16s")
_NO_DIGEST = bytes(16)
MAX_JSON = COPY_BYTES - _HEADER.size
READS = 3  # a reader without the lock may meet a copy that is just being written
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

T = TypeVar("T", bound=msgspec.Struct)

CopyState = Literal["good", "empty", "bad", "newer"]


class Kind(NamedTuple, Generic[T]):
    """What a file holds."""

    magic: bytes
    type: type[T]
    noun: str
    """for sentences: "superblock", "node file" """


class Copy(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One of the two, as it was found."""

    place: str
    """A or B"""
    state: CopyState
    reason: str = ""
    """why it is not good"""
    sequence: int | None = None
    value: T | None = None


class Stored(Generic[T]):
    """An open, locked file; `value` is what it holds. Its owner closes it, which ends the lock."""

    def __init__(self, kind: Kind[T], path: str, fd: int, copy: Copy[T], damage: str | None = None) -> None:
        assert copy.value is not None
        assert copy.sequence is not None
        self.kind = kind
        self.path = path
        self.fd = fd
        """read and write; the C journal uses this one for its own regions; -1 once closed"""
        self.value: T = copy.value
        self.sequence: int = copy.sequence
        self.damage = damage
        """one copy was not valid when the file was opened: which and why, one sentence; the next write repairs it"""
        self._failed = False

    def write(self, value: T) -> None:
        """Makes `value` what the file holds, durably. ImageError: it failed, and so does every later write; then the
        file holds the old value or the new one."""
        shown = printable(self.path)
        if self._failed:
            raise ImageError(f"{shown} is not written any more, because an earlier write to it failed")
        data = pack(self.kind, self.sequence + 1, value)
        try:
            _write(self.fd, data, (self.sequence + 1) % 2 * COPY_BYTES)
            os.fdatasync(self.fd)
        except OSError as error:
            self._failed = True
            raise ImageError(f"cannot write the {self.kind.noun} {shown}: {error_text(error)}") from error
        self.value, self.sequence = value, self.sequence + 1

    def update(self, **changes: Any) -> T:
        """`write` with these fields changed; the new value. Unchanged values are not written."""
        value = msgspec.structs.replace(self.value, **changes)
        if value != self.value:
            self.write(value)
        return value

    def close(self) -> None:
        """Again: no effect."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()


def pack(kind: Kind[T], sequence: int, value: T) -> bytes:
    """The 4096 bytes of a copy. ValueError: the value does not fit, or is not what its type accepts."""
    text = msgspec.json.encode(value)
    if len(text) > MAX_JSON:
        raise ValueError(f"a {kind.noun} of {len(text)} bytes is longer than {MAX_JSON}")
    head = _HEADER.pack(kind.magic, VERSION, len(text), sequence, _NO_DIGEST)
    head = _HEADER.pack(kind.magic, VERSION, len(text), sequence, digest128(head + text))
    data = (head + text).ljust(COPY_BYTES, b"\0")
    back = parse(kind, sequence % 2, data)
    if back.value != value:
        raise ValueError(f"a {kind.noun} that would not be read back: {back.reason or 'another value'}")
    return data


def parse(kind: Kind[T], place: int, data: bytes) -> Copy[T]:
    """What the bytes at this place (0 or 1) are. Any bytes will do; nothing is raised."""

    def bad(reason: str, state: CopyState = "bad", sequence: int | None = None) -> Copy[T]:
        return Copy(place=PLACES[place], state=state, reason=reason, sequence=sequence)

    if len(data) < COPY_BYTES:
        return bad("the file ends before it")
    if not any(data):
        return bad("only zeros", "empty")
    magic, version, length, sequence, digest = _HEADER.unpack_from(data)
    if magic != kind.magic:
        return bad(f"it does not begin like a {kind.noun}")
    if length > MAX_JSON:
        return bad("its length is out of range")
    text = data[_HEADER.size : _HEADER.size + length]
    if digest128(_HEADER.pack(magic, version, length, sequence, _NO_DIGEST) + text) != digest:
        return bad("its digest is wrong: torn or damaged")
    if any(data[_HEADER.size + length :]):
        return bad("bytes behind its end: torn or damaged")
    if sequence % 2 != place:
        return bad("it belongs to the other place")
    if version != VERSION:
        return bad(f"format {version}, this version knows {VERSION}", "newer", sequence)
    try:
        value = decoder(kind.type).decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return bad(f"its content is not valid: {printable(str(error), 200)}")
    return Copy(place=PLACES[place], state="good", sequence=sequence, value=value)


def newest(copies: tuple[Copy[T], Copy[T]]) -> Copy[T] | None:
    """The good one of the highest sequence; None: there is none, or one is of a newer format."""
    good = [copy for copy in copies if copy.state == "good" and copy.sequence is not None]
    if any(copy.state == "newer" for copy in copies):
        return None
    return max(good, key=lambda copy: copy.sequence or 0, default=None)


def read_copies(kind: Kind[T], fd: int) -> tuple[Copy[T], Copy[T]]:
    """Both copies as they are now. OSError: the file cannot be read."""
    a, b = (parse(kind, place, os.pread(fd, COPY_BYTES, place * COPY_BYTES)) for place in (0, 1))
    return a, b


def look(kind: Kind[T], fd: int) -> tuple[Copy[T], Copy[T]]:
    """`read_copies` for one that has no lock: looks again when it may have met a write."""
    copies = read_copies(kind, fd)
    for _ in range(READS - 1):
        if all(copy.state == "good" for copy in copies):
            break
        copies = read_copies(kind, fd)
    return copies


def damage_of(kind: Kind[T], shown: str, copies: tuple[Copy[T], Copy[T]]) -> str | None:
    """One sentence about the copy that is not good, when the other one is."""
    for copy in copies:
        if copy.state != "good":
            return f"copy {copy.place} of the {kind.noun} {shown} is damaged ({copy.reason}); the other one is used"
    return None


def open_stored(kind: Kind[T], path: str) -> Stored[T]:
    """Opens and locks the file.

    UsageError: there is none. RefusedError: another program has it open; neither copy is valid (M2); a newer mirrorpair
    made it. ImageError: it cannot be read.
    """
    shown = printable(path)
    fd = _open(kind, path, os.O_RDWR)
    with _closed_on_error(fd):
        lock(fd, path)
        try:
            os.fdatasync(fd)
            copies = read_copies(kind, fd)
        except OSError as error:
            raise ImageError(f"cannot read the {kind.noun} {shown}: {error_text(error)}") from error
        best = newest(copies)
        if best is None:
            raise RefusedError(unreadable(kind, shown, copies))
        return Stored(kind, path, fd, best, damage_of(kind, shown, copies))


def open_to_look(kind: Kind[T], path: str) -> int:
    """A descriptor for reading, without a lock: works while a daemon has the file. Errors as those of `open_stored`."""
    return _open(kind, path, os.O_RDONLY)


def unreadable(kind: Kind[T], shown: str, copies: tuple[Copy[T], Copy[T]]) -> str:
    """The sentence for a file that holds no value for us."""
    if any(copy.state == "newer" for copy in copies):
        return f"the {kind.noun} {shown} was written by a newer mirrorpair: upgrade this node again"
    a, b = copies
    return (
        f"both copies of the {kind.noun} {shown} are damaged (A: {a.reason}; B: {b.reason}): "
        "`mirrorpair meta check` says what can be saved"
    )


def create_stored(
    kind: Kind[T],
    path: str,
    value: T,
    *,
    length: int = TWOFOLD_BYTES,
    rest: Mapping[int, bytes] | None = None,
    force: bool = False,
) -> Stored[T]:
    """Makes the file, `length` bytes, all of them reserved, with `rest` (offset: bytes) beside both copies; open and
    locked as by `open_stored`.

    RefusedError: it exists, and `force` was not said; or a program has it open, then always. ImageError: no space, or
    the storage failed; nothing is left behind. UsageError: its folder does not exist.
    """
    shown = printable(path)
    parts = {0: pack(kind, 0, value), COPY_BYTES: pack(kind, 1, value), **(rest or {})}
    try:
        # The scratch file's lock comes first: it keeps two that make the same file apart.
        with _scratch(path) as (fd, scratch), _replaceable(path, force):
            os.posix_fallocate(fd, 0, length)
            for offset, data in parts.items():
                _write(fd, data, offset)
            os.fsync(fd)
            os.rename(scratch, path)
            with _removed_on_error(path):
                _sync_folder(os.path.dirname(path) or ".")
            return Stored(kind, path, fd, Copy(place="B", state="good", sequence=1, value=value))
    except FileNotFoundError:
        raise UsageError(f"cannot make {shown}: its folder does not exist") from None
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ImageError(f"no space for {shown}, {length} bytes: {error_text(error)}") from error
        raise ImageError(f"cannot make {shown}: {error_text(error)}") from error


def lock(fd: int, path: str) -> None:
    """Locks the open file for this program alone. RefusedError: another one has it."""
    shown = printable(path)
    try:
        ofd_lock(fd, exclusive=True)
    except BlockingIOError:
        raise RefusedError(f"{shown} is in use: another mirrorpair runs for this node") from None
    except OSError as error:
        raise RefusedError(f"{shown} cannot be locked, so two could write it: {error_text(error)}") from error
    if not _still_named(fd, path):
        raise RefusedError(f"{shown} was replaced while it was being opened: try again")


def error_text(error: OSError) -> str:
    return error.strerror or f"error {error.errno}"


def _open(kind: Kind[T], path: str, flags: int) -> int:
    shown = printable(path)
    try:
        # Not to wait for the other end of a FIFO.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no {kind.noun} {shown}: `mirrorpair init` makes it") from None
    except ValueError:
        raise UsageError(f"{shown} is not a valid path") from None
    except OSError as error:
        raise ImageError(f"cannot open the {kind.noun} {shown}: {error_text(error)}") from error
    with _closed_on_error(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{shown} is not a file")
        return fd


@contextlib.contextmanager
def _replaceable(path: str, force: bool) -> Iterator[None]:
    """The name is free, or what has it may be replaced and is held meanwhile."""
    shown = printable(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG):
            raise
        raise RefusedError(f"{shown} exists already and is not a file: remove it") from error
    try:
        if not force:
            raise RefusedError(f"{shown} exists already: --force makes a new one and forgets what it says")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RefusedError(f"{shown} exists already and is not a file: remove it")
        lock(fd, path)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _scratch(path: str) -> Iterator[tuple[int, str]]:
    """An empty, locked file beside `path`, gone again when something fails; else the caller owns the descriptor."""
    scratch = f"{path}.new"
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, MODE)
    with _closed_on_error(fd):
        lock(fd, scratch)
        with _removed_on_error(scratch):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RefusedError(f"{printable(scratch)} is in the way: remove it")
            os.ftruncate(fd, 0)
            yield fd, scratch


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def _removed_on_error(path: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _still_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders need none
            raise
    finally:
        os.close(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
