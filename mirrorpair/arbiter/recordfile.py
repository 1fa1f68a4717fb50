"""One record of a register in one file, always the old one or the new one.

    digest of the rest \\n owner \\n the record as JSON \\n

Rules:
- Written beside, synced, renamed, and the folder synced: durable when `save` returns. If it raises, nothing has
  changed; only after an UnsettledError nobody knows which of the two survives a loss of power, and `settle` comes
  before anything is believed again.
- One that cannot be read is refused, never made anew (F17).
- A file of another owner says nothing: an earlier node of this name (`init --force`) left it behind.
- Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os

from mirrorpair._core import digest128
from mirrorpair.arbiter import MAX_RECORD_BYTES, Versioned, decode, encode
from mirrorpair.errors import ImageError, PeerProtocolError, RefusedError
from mirrorpair.text import printable

_SEED = 0x4C4F4E45
_MAX_FILE_BYTES = MAX_RECORD_BYTES + 1000


class DamagedRecordError(RefusedError):
    """It is not what `save` wrote, or of a format that this version does not know."""


class UnsettledError(ImageError):
    """The new record has its name, and is not known to be durable."""


def load(path: str, owner: str) -> Versioned:
    """Version 0: there is none, or another owner's. DamagedRecordError; ImageError: it cannot be read."""
    shown = printable(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return Versioned()
    except OSError as error:
        raise ImageError(f"cannot read {shown}: {error.strerror}") from error
    lines = data.split(b"\n")
    if len(lines) != 4 or lines[3] or _digest(lines[1], lines[2]) != lines[0]:
        raise DamagedRecordError(f"{shown}, the record of the pair's roles, is damaged")
    if lines[1] != owner.encode():
        return Versioned()
    try:
        return decode(lines[2])
    except PeerProtocolError as error:
        raise DamagedRecordError(f"{shown}: {error}") from None


def save(path: str, owner: str, record: Versioned) -> None:
    """ImageError: it failed, and the old record stays. UnsettledError."""
    shown = printable(path)
    beside = path + ".new"
    body = encode(record)
    data = b"\n".join((_digest(owner.encode(), body), owner.encode(), body, b""))
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise ImageError(f"cannot write {shown}: {error.strerror}") from error
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UnsettledError(f"cannot make {shown} durable: {error.strerror}") from error


def settle(path: str, owner: str) -> Versioned:
    """`load`, with what it found made durable: a writer that was killed, or failed, may have left it in the cache only.
    It is written anew, since a flush that failed once says nothing the second time. Raises as both."""
    record = load(path, owner)
    if record.version:
        save(path, owner, record)
    return record


def _digest(owner: bytes, record: bytes) -> bytes:
    return digest128(owner + b"\n" + record + b"\n", _SEED).hex().encode()
