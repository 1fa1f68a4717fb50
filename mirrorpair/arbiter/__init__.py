"""The register: the one record of who is primary and who has every acknowledged write, and how it changes.

Rules:
- It changes only by compare-and-swap on a version. Every backend keeps that, whatever it is made of: `lone.py` (both
  nodes hold it), later the witness and etcd. One conformance suite is for all of them.
- The result of a swap is one of three, and "unknown" is not "no": it may still land (A0).
- The epoch grows with every acquisition of the primary role (A4) and never falls. A swap by which it would fall is
  refused here, in one place (`check_successor`), so that no backend can be talked into it.
- Only members of `in_sync` have every acknowledged write; a primary is always one of them.
"""

from __future__ import annotations

import enum
from typing import Annotated, Protocol

import msgspec

from mirrorpair.errors import PeerProtocolError
from mirrorpair.text import printable

FORMAT = 1
MAX_RECORD_BYTES = 64 * 1024
MAX_REGISTER_BYTES = MAX_RECORD_BYTES - 100
"""its version goes with it"""
MAX_EPOCH = 2**62

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]


class Incarnation(msgspec.Struct, frozen=True, kw_only=True):
    """A8: which life of which metadata a member was admitted with. `id` is hexadecimal, made by `init`."""

    id: Annotated[str, msgspec.Meta(max_length=64)]
    n: _Count


class Writer(msgspec.Struct, frozen=True, kw_only=True):
    """Who wrote the record, and in which attempt: tells its own swap from another's with the same content (A0)."""

    node: _Name
    nonce: _Count


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """The record. `handoff`: who was given the role and has not acquired it yet; `pause`: a person's wish that nothing
    changes the primary unasked (A19); `role_changes`: when it changed, seconds since 1970, the last hour's; `latched`:
    these were too many (F16). `primary` None: nobody is primary (before the first promotion, after a demotion)."""

    format: Annotated[int, msgspec.Meta(ge=1, le=65535)] = FORMAT
    pair_uuid: Annotated[str, msgspec.Meta(max_length=64)] = ""
    epoch: _Epoch = 0
    primary: _Name | None = None
    in_sync: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=2)] = ()
    members: Annotated[dict[_Name, Incarnation], msgspec.Meta(max_length=2)] = {}
    mode: str = "sync"
    handoff: _Name | None = None
    failed: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=2)] = ()
    pause: bool = False
    role_changes: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=64)] = ()
    latched: bool = False
    writer: Writer | None = None

    def __post_init__(self) -> None:
        if self.primary is not None and self.primary not in self.in_sync:
            raise ValueError("the primary is not in the in-sync set")
        if len(set(self.in_sync)) != len(self.in_sync):
            raise ValueError("a member is named twice")


class Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """A record and the version to swap it on. Version 0: nothing was ever written."""

    version: _Count = 0
    register: Register = Register()


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Versioned)


class Swap(enum.Enum):
    OK = "ok"
    CONFLICT = "conflict"
    """it holds another version, or may not become this; nothing was changed"""
    UNKNOWN = "unknown"
    """no answer: it may have happened, or may still happen (A0)"""


class Arbiter(Protocol):
    """What a backend can do."""

    async def read(self) -> Versioned:
        """The record now. UnreachableError: nobody answers."""
        ...

    async def cas(self, version: int, new: Register) -> Swap:
        """Replaces the record if its version is still `version`; OK means durable. The new version is one more."""
        ...


def check_successor(old: Register, new: Register) -> str | None:
    """Why `new` may not follow `old`, or None."""
    if new.format < old.format:
        return "the format would go back"
    if new.format > FORMAT:
        return f"format {new.format} is not known here"
    if old.pair_uuid and new.pair_uuid != old.pair_uuid:
        return "it is the record of another pair"
    if new.epoch < old.epoch:
        return f"the epoch would fall from {old.epoch} to {new.epoch}"
    if new.primary is not None and new.primary != old.primary and new.epoch == old.epoch:
        return "a new primary needs a new epoch"
    if len(_ENCODER.encode(new)) > MAX_REGISTER_BYTES:
        return f"it is longer than {MAX_REGISTER_BYTES} bytes"
    return None


def newer(one: Versioned, other: Versioned) -> Versioned:
    """L0: of two copies the one of the higher epoch, then of the higher version; equal ones: `one`."""
    return max(one, other, key=lambda copy: (copy.register.epoch, copy.version))


def encode(record: Versioned) -> bytes:
    return _ENCODER.encode(record)


def decode(data: bytes) -> Versioned:
    """PeerProtocolError: not a record, or of a format that this version does not know."""
    try:
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"it is longer than {MAX_RECORD_BYTES} bytes")
        record = _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerProtocolError(f"a record of the pair's roles is not valid: {printable(str(error), 300)}") from None
    if record.register.format > FORMAT:
        raise PeerProtocolError(
            f"the record of the pair's roles has format {record.register.format}, this version knows {FORMAT}"
        )
    return record
