"""Frames as bytes, written and read by hand from csrc/frame.h and csrc/wire.h: what a damaged line is judged by, and
what a hostile peer is made of.

Rules:
- Nothing here asks the engine how a frame looks; only the digest function is the core's, and that is tested against
  xxHash elsewhere.
- `Peer` says exactly what it is told to, right or wrong. It waits for bytes, with a limit, never for a time.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mirrorpair import _core

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ERROR = 4
PING, DIGESTS, ZEROS, BULK, DATA, MARKS, SYNC, WANT, SETTLED, SYNCED = range(16, 26)
WRITE, ZERO, ACK, BARRIER, FLUSHED, BITS, BITS_END, MERGED, RESYNC_DONE, READ, READ_DATA = range(32, 43)
FUA = 0x100  # flag of WRITE and ZERO, beside the volume's number
WHOLE = 1  # flag of a data entry
WANT_REFINE, WANT_EMPTY, WANT_WHOLE, WANT_ZERO = range(4)
RECHECK = 1  # flag of DIGESTS

HEADER = struct.Struct("<4sHHIIQQQQ16sQII")
CHECKSUM_SEED = 0x6D6972726F727072
CHECKSUM_AT = 64
LIMIT_S = 20.0


class Frame(NamedTuple):
    kind: int
    unit: int
    offset: int
    meta: bytes
    data: bytes
    start: int = 0  # where it lies in its stream
    end: int = 0


def _folded(data: bytes, seed: int) -> int:
    low, high = struct.unpack("<QQ", _core.digest128(data, seed))
    return int(low ^ high)


def digest(session: int, meta: bytes, data: bytes) -> bytes:
    """The payload's digest: the data's, seeded with the meta's, seeded with the session."""
    return _core.digest128(data, _folded(meta, session)) if data else _core.digest128(meta, session)


def encode(
    kind: int,
    meta: bytes = b"",
    data: bytes = b"",
    *,
    session: int,
    sequence: int,
    count: int = 0,
    offset: int = 0,
    length: int | None = None,
    meta_length: int | None = None,
    payload_digest: bytes | None = None,
    magic: bytes = b"MPR1",
    flags: int = 0,
    epoch: int = 0,
) -> bytes:
    """One frame. The lengths and the digest may be made to lie; the header's checksum is always right."""
    fields = (
        magic,
        kind,
        flags,
        len(meta) + len(data) if length is None else length,
        len(meta) if meta_length is None else meta_length,
        sequence,
        session,
        epoch,
        offset,
        digest(session, meta, data) if payload_digest is None else payload_digest,
    )
    blank = HEADER.pack(*fields, 0, count, 0)
    return HEADER.pack(*fields, _folded(blank, CHECKSUM_SEED), count, 0) + meta + data


def parse(stream: bytes) -> Iterator[Frame]:
    """The complete frames at the beginning of a stream that nothing has damaged."""
    at = 0
    while at + HEADER.size <= len(stream):
        magic, kind, _, length, meta, _, _, _, offset, _, _, count, _ = HEADER.unpack_from(stream, at)
        assert magic == b"MPR1", f"no frame at {at}"
        body = at + HEADER.size
        if body + length > len(stream):
            return
        end = body + length
        yield Frame(kind, count, offset, stream[body : body + meta], stream[body + meta : end], at, end)
        at = end


# --- the meta parts


def digests(length: int, blocks: list[bytes | None], *, flags: int = 0, absent: Iterable[int] = ()) -> bytes:
    """DIGESTS: a 16-byte digest per block, None for a zero block; those in `absent` are not asked about."""
    words, left_out = (len(blocks) + 63) // 64, set(absent)
    present = sum(1 << i for i in range(len(blocks)) if i not in left_out)
    zero = sum(1 << i for i, block in enumerate(blocks) if block is None and i not in left_out)
    bits = present.to_bytes(8 * words, "little") + zero.to_bytes(8 * words, "little")
    found = b"".join(block for i, block in enumerate(blocks) if block is not None and i not in left_out)
    return struct.pack("<II", length, flags) + bits + found


def bulk(length: int, blocks: int, zero: int = 0) -> bytes:
    return struct.pack("<II", length, 0) + zero.to_bytes(8 * ((blocks + 63) // 64), "little")


def entry(block: int, pieces: int, zeros: int = 0, flags: int = 0) -> bytes:
    """One entry of DATA or MARKS."""
    return struct.pack("<IIQQ", block, flags, pieces, zeros)


def want(block: int, kind: int, more: bytes = b"") -> bytes:
    return struct.pack("<II", block, kind) + more


def want_kinds(meta: bytes, length: int, block: int) -> set[int]:
    """The kinds of wish in a WANT of a unit of `length` bytes, cut into blocks."""
    found, at = set(), 0
    while at < len(meta):
        index, kind = struct.unpack_from("<II", meta, at)
        pieces = -(-min(block, length - index * block) // 4096)
        at += 8 + (4 * pieces if kind == WANT_REFINE else 8 if kind == WANT_ZERO else 0)
        found.add(kind)
    assert at == len(meta)
    return found


def settled(equal: int, written: int = 0, punched: int = 0, changed: int = 0, differing_blocks: int = 0) -> bytes:
    return struct.pack("<QQQQQ", equal, written, punched, changed, differing_blocks)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


@dataclass
class Peer:
    """The other end of a session, by hand."""

    sock: socket.socket
    session: int
    sequence: int = 0
    epoch: int = 0
    _input: bytes = b""
    _held: bytes = b""

    def __post_init__(self) -> None:
        self.sock.settimeout(LIMIT_S)

    def send(
        self,
        kind: int,
        meta: bytes = b"",
        data: bytes = b"",
        *,
        count: int = 0,
        offset: int = 0,
        session: int | None = None,
        skip: int = 0,
        length: int | None = None,
        meta_length: int | None = None,
        payload_digest: bytes | None = None,
        magic: bytes = b"MPR1",
        flags: int = 0,
        epoch: int | None = None,
        hold: bool = False,
    ) -> None:
        """`skip` is added to this frame's sequence number alone; with `hold` it goes together with the next one."""
        frame = encode(
            kind,
            meta,
            data,
            session=self.session if session is None else session,
            sequence=self.sequence + skip,
            count=count,
            offset=offset,
            length=length,
            meta_length=meta_length,
            payload_digest=payload_digest,
            magic=magic,
            flags=flags,
            epoch=self.epoch if epoch is None else epoch,
        )
        self.sequence += 1
        self._held += frame
        if not hold:
            self.sock.sendall(self._held)
            self._held = b""

    def receive(self) -> Frame | None:
        """The next frame that is no PING; None at the end of the stream."""
        while True:
            for frame in parse(self._input):
                self._input = self._input[frame.end :]
                if frame.kind == PING:
                    break
                return frame
            else:
                try:
                    more = self.sock.recv(1 << 20)
                except ConnectionResetError:
                    return None
                if not more:
                    return None
                self._input += more

    def expect(self, kind: int) -> Frame:
        frame = self.receive()
        assert frame is not None, f"the stream ended where a frame of kind {kind} belongs"
        assert frame.kind == kind, frame
        return frame

    def told(self) -> tuple[int, str] | None:
        """Reads to the end; the code and the message of the ERROR frame, if one came."""
        found = None
        while (frame := self.receive()) is not None:
            if frame.kind == ERROR:
                said = json.loads(frame.meta)
                found = (said["code"], said["message"])
                self.sock.shutdown(socket.SHUT_WR)
        return found
