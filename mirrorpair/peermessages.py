"""The words of two nodes: JSON lines on the control connection, JSON frames before a data link begins.

    control   dialer                              acceptor
              PREAMBLE control  ------------->
              Hello             <------------>    Hello
              Ready or Refused  <------------>    Ready or Refused
              Beat, Promise, Request, Reply  <->  the same, until one hangs up

    data      PREAMBLE data     ------------->
              HELLO   Facts + one frame per volume   ->   (control session, epoch, ids, bits)
              <-   WELCOME   Facts + one frame per volume
              START   Plan      ------------->    computed by both, compared by the acceptor (H4)
              <-   START   Plan  the target has made durable what R1 asks for; from here on the frames are the engine's

    sentinel  (sentinel.py, from either node)     the peer's daemon
              PREAMBLE sentinel ------------->
              Watch             ------------->
                                <-------------    Ready or Refused
              ... once its daemon is dead
              Died              ------------->
                                <-------------    Reply: "noted", or "void" if it ends nothing here

    beats     (peerpath.py, a further path)
              PREAMBLE beats    ------------->
              Join              ------------->
                                <-------------    Ready or Refused
              Beat, Promise     <------------>    the same, until one hangs up

Rules:
- Every value of the peer is validated here, once: types, ranges, lengths. Whatever the bytes are, `decode_*` returns a
  valid struct or raises PeerProtocolError.
- Unknown keys are skipped, so that a newer peer may say more; what an older one must not ignore gets a new protocol
  number.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from mirrorpair.arbiter import MAX_EPOCH, Incarnation, Register, Versioned
from mirrorpair.errors import PeerProtocolError
from mirrorpair.jsontypes import decoder
from mirrorpair.liveness import MAX_PROMISE_NS
from mirrorpair.text import printable

MAGIC = "mirrorpair-peer"
PROTOCOL = (1, 1)

PREAMBLE_BYTES = 16
PREAMBLE_CONTROL = b"mirrorpair ctl\r\n"
PREAMBLE_DATA = b"mirrorpair dat\r\n"
PREAMBLE_SENTINEL = b"mirrorpair sen\r\n"
PREAMBLE_BEATS = b"mirrorpair hbt\r\n"

MAX_LINE = 256 * 1024
MAX_SENTINEL_LINE = 16 * 1024
MAX_SESSIONS = 8
MAX_FRAME = 16 * 1024
MAX_VOLUMES = 64
MAX_MESSAGE = 2000
MAX_HISTORY = 32

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Short = Annotated[str, msgspec.Meta(max_length=64)]
_Sentence = Annotated[str, msgspec.Meta(max_length=4 * MAX_MESSAGE)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Block = Annotated[int, msgspec.Meta(ge=4096, le=256 * 1024)]
_Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]
_Seq = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_PromiseNs = Annotated[int, msgspec.Meta(ge=0, le=MAX_PROMISE_NS)]
_Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{0,32}$")]  # 64- and 128-bit numbers: JSON's own lose bits
_Secret = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,32}$")]
_Code = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Status = Annotated[int, msgspec.Meta(ge=-64, le=255)]

RoleName = Literal["primary", "secondary"]
DiskName = Literal["diskless", "failed", "inconsistent", "outdated", "consistent", "up-to-date"]
Amount = Literal["none", "bitmap", "full"]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What both nodes must have alike of a volume."""

    name: _Name
    size: _Size
    block_size: _Block


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", tag_field="t"):
    """The first word of each node. `process` is a number made at every start of the daemon, `session` one made for this
    connection; `record` is its copy of the register (lone pairs)."""

    magic: str = MAGIC
    protocol: tuple[_Number, _Number] = PROTOCOL
    version: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    pair: _Name
    pair_uuid: _Hex
    node: _Name
    mode: _Short
    arbiter: _Short
    survivor: _Short
    boot_id: _Short
    incarnation: Incarnation
    process: _Hex
    session: _Hex
    role: RoleName
    epoch: _Epoch
    record: Versioned | None = None
    shapes: Annotated[list[Shape], msgspec.Meta(max_length=MAX_VOLUMES)]

    def __post_init__(self) -> None:
        if self.magic != MAGIC:
            raise ValueError(f"magic is not {MAGIC!r}")
        if self.protocol[0] > self.protocol[1]:
            raise ValueError("protocol range is empty")
        if not self.session:
            raise ValueError("session is empty")


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready", tag_field="t"):
    """Your hello is accepted."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", tag_field="t"):
    """Your hello is not accepted, for this reason."""

    code: _Code = 1
    message: _Sentence


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat", tag_field="t"):
    """Every interval. `floor`: A13. `disks` and `dirty` (bytes that may differ) by volume; `linked`: the data link is
    attached here; `version`: of the register, as last seen here."""

    seq: _Seq
    epoch: _Epoch
    version: _Seq
    floor: _Epoch
    role: RoleName
    linked: bool
    disks: Annotated[dict[_Name, DiskName], msgspec.Meta(max_length=MAX_VOLUMES)]
    dirty: Annotated[dict[_Name, _Size], msgspec.Meta(max_length=MAX_VOLUMES)]


class Promise(msgspec.Struct, frozen=True, kw_only=True, tag="promise", tag_field="t"):
    """The answer to a beat (A11); 0: nothing is promised."""

    seq: _Seq
    promise_ns: _PromiseNs


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join", tag_field="t"):
    """The first word on a further path of heartbeats: the control session of this node and its peer that it belongs
    to."""

    magic: str = MAGIC
    node: _Name
    session: _Secret
    peer_session: _Secret

    def __post_init__(self) -> None:
        if self.magic != MAGIC:
            raise ValueError(f"magic is not {MAGIC!r}")


class SwapAsk(msgspec.Struct, frozen=True, kw_only=True, tag="swap", tag_field="op"):
    """L0: make this record durable if yours has this version."""

    version: _Seq
    register: Register


class SyncedAsk(msgspec.Struct, frozen=True, kw_only=True, tag="synced", tag_field="op"):
    """The resync of a volume on this data session is over at the source: take over its ids, clear the flag, then
    say so (R1, G4)."""

    session: _Hex
    volume: _Name
    current: _Hex
    history: Annotated[list[_Hex], msgspec.Meta(max_length=MAX_HISTORY)]


class RelinkAsk(msgspec.Struct, frozen=True, kw_only=True, tag="relink", tag_field="op"):
    """The data link is taken down on purpose, to be made anew; no loss."""

    why: _Sentence


class LeaveAsk(msgspec.Struct, frozen=True, kw_only=True, tag="leave", tag_field="op"):
    """This node stops gracefully: it serves no more, and what it acknowledged is durable on both nodes as far as both
    are in sync. The answer comes when the peer needs it no more (A18)."""

    role: RoleName


class HandoffAsk(msgspec.Struct, frozen=True, kw_only=True, tag="handoff", tag_field="op"):
    """A person at this node wants it to be primary: give the role up to it. Answered when the register says so;
    `dry_run`: whether it would be done now."""

    dry_run: bool = False


Ask = SwapAsk | SyncedAsk | RelinkAsk | LeaveAsk | HandoffAsk


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request", tag_field="t"):
    id: _Seq
    ask: Ask


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply", tag_field="t"):
    """`code` 0: done, `result` one word; else an exit code and a sentence."""

    id: _Seq
    code: _Code = 0
    message: _Sentence = ""
    result: _Short = ""


Word = Hello | Ready | Refused | Beat | Promise | Join | Request | Reply


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A control session of a node: the number and the incarnation of its hello there."""

    session: _Secret
    incarnation: Incarnation


_Sessions = Annotated[list[Session], msgspec.Meta(min_length=1, max_length=MAX_SESSIONS)]


class Watch(msgspec.Struct, frozen=True, kw_only=True, tag="watch", tag_field="t"):
    """The first word of a sentinel: it watches this process of this node, which had these sessions, the last first."""

    magic: str = MAGIC
    pair: _Name
    node: _Name
    process: _Secret
    sessions: _Sessions

    def __post_init__(self) -> None:
        if self.magic != MAGIC:
            raise ValueError(f"magic is not {MAGIC!r}")


class Died(msgspec.Struct, frozen=True, kw_only=True, tag="died", tag_field="t"):
    """The process has ended. `sessions`: by now; `status`: its exit code, or a signal's number negated."""

    sessions: _Sessions
    status: _Status | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the handshake of a data link begins with. `sessions`: those of the control connection, dialer's first.
    `flap`: this primary has not shrunk the in-sync set since the last data link, and this is still the same life of
    the peer (A17)."""

    sessions: tuple[_Hex, _Hex]
    epoch: _Epoch
    role: RoleName
    flap: bool
    pair_uuid: _Hex
    volumes: Annotated[int, msgspec.Meta(ge=0, le=MAX_VOLUMES)]


class VolumeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One volume's, one frame each: `history.Side` as it travels."""

    name: _Name
    size: _Size
    block_size: _Block
    volume_uuid: _Hex
    current: _Hex
    bitmap: _Hex
    history: Annotated[list[_Hex], msgspec.Meta(max_length=MAX_HISTORY)]
    new: bool
    disk: DiskName
    crashed_primary: bool
    boot_lost: bool
    connected_survivor: bool
    missed_end: bool
    dirty: bool
    alone: bool
    discard: bool
    distrusted: bool
    full: _Hex


class VolumePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to one volume. `volume_uuid`: both have this one from now on; `first`: the generation id of a volume
    that is new on both nodes, else empty (M10); `full`: the number of a full compare that begins, else empty (R6)."""

    name: _Name
    amount: Amount
    volume_uuid: _Hex
    first: _Hex
    full: _Hex


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Computed by both ends, sent by the dialer, compared and answered by the acceptor."""

    source: _Name
    epoch: _Epoch
    pair_uuid: _Hex
    flap: bool
    volumes: Annotated[list[VolumePlan], msgspec.Meta(max_length=MAX_VOLUMES)]


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """In an ERROR frame: the handshake ends. `kind` "refused", "split-brain", "unrelated" or "retry"."""

    code: _Code
    kind: Literal["refused", "split-brain", "unrelated", "retry"]
    message: _Sentence


_T = TypeVar("_T", Facts, VolumeFacts, Plan, Stop)

_ENCODER = msgspec.json.Encoder()
_WORD = msgspec.json.Decoder(Word)
_SENTINEL_WORD = msgspec.json.Decoder(Watch | Died)


def encode_line(word: Word) -> bytes:
    """One line; ValueError when it would be longer than the peer accepts."""
    line = _ENCODER.encode(word) + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"a {type(word).__name__} of {len(line)} bytes, more than {MAX_LINE}")
    return line


def decode_line(line: bytes) -> Word:
    if len(line) > MAX_LINE:
        raise PeerProtocolError(f"the peer sent a line of more than {MAX_LINE} bytes")
    try:
        word: Word = _WORD.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _not_valid("message", line, error) from None
    return word


def decode_sentinel_line(line: bytes) -> Watch | Died:
    if len(line) > MAX_SENTINEL_LINE:
        raise PeerProtocolError(f"the sentinel sent a line of more than {MAX_SENTINEL_LINE} bytes")
    try:
        word: Watch | Died = _SENTINEL_WORD.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _not_valid("message", line, error) from None
    return word


def encode_frame(word: Facts | VolumeFacts | Plan | Stop) -> bytes:
    payload = _ENCODER.encode(word)
    if len(payload) > MAX_FRAME:
        raise ValueError(f"a {type(word).__name__} of {len(payload)} bytes does not fit a frame of {MAX_FRAME}")
    return payload


def decode_frame(kind: type[_T], payload: bytes) -> _T:
    try:
        if len(payload) > MAX_FRAME:
            raise ValueError("it is too long")
        return decoder(kind).decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _not_valid(kind.__name__, payload, error) from None


def refused(code: int, message: str) -> Refused:
    """A Refused that always fits."""
    return Refused(code=code if 1 <= code <= 255 else 1, message=printable(message, MAX_MESSAGE))


def to_hex(number: int) -> str:
    """64- or 128-bit numbers as they travel; 0 is the empty text."""
    return f"{number:x}" if number else ""


def from_hex(text: str) -> int:
    return int(text, 16) if text else 0


def _not_valid(what: str, data: bytes, error: Exception) -> PeerProtocolError:
    shown = printable(data[:80].decode("utf-8", "surrogateescape"), 200)
    return PeerProtocolError(
        f"the peer sent a {what} that is not valid: {printable(str(error), 300)} (it begins: {shown})"
    )
