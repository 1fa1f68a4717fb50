"""The words two ends exchange before the C core takes the channel over: JSON in the payload of four kinds of frame.

    near (the command)                            far (`mirrorpair serve`)
    Hello    what the far end shall open   --->
                                           <---   Welcome   what it opened      or   Failure   why it did not
    Start    the numbers both ends use     --->
    ... from here on both sides' engines speak; a near end that closes instead of Start has changed nothing.

Rules:
- Every value that a peer supplies is validated here, once: types, ranges, lengths. Behind `decode_*` it is used freely.
- Whatever the bytes are, `decode_*` returns a valid struct or raises PeerProtocolError; no other exception.
- Unknown keys are skipped, so that a newer peer may say more. What an older one must not ignore gets a new protocol
  number.
- `encode` refuses (ValueError) what the other side's `decode_*` would refuse for its size.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from mirrorpair.errors import PeerProtocolError
from mirrorpair.text import printable

MAGIC = "mirrorpair"
PROTOCOL = (1, 1)  # the oldest and the newest this version speaks

MAX_PAYLOAD = 16 * 1024
MAX_IMAGE_BYTES = 2**63 - 1
MAX_PATH_BYTES = 4096
MAX_MESSAGE = 2000  # characters; four bytes each still fit a payload
MIN_BLOCK = 4096
MAX_BLOCK = 256 * 1024
MIN_TIMEOUT_S = 0.1
MAX_TIMEOUT_S = 3600.0
MAX_THREADS = 256
MAX_SEED = 2**64 - 1

Role = Literal["source", "target"]
Kind = Literal["file", "device"]

_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_IMAGE_BYTES)]
_Version = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Feature = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """near -> far. `role` is what the far end plays; `write` says whether the target, on either side, will be
    written."""

    magic: str = MAGIC
    protocol: tuple[_Number, _Number] = PROTOCOL
    version: _Version
    features: Annotated[list[_Feature], msgspec.Meta(max_length=64)] = []
    role: Role
    path: str
    write: bool
    size: _Size | None = None
    create: bool = False
    resize: bool = False

    def __post_init__(self) -> None:
        if self.magic != MAGIC:
            raise ValueError(f"magic is not {MAGIC!r}")
        if self.protocol[0] > self.protocol[1]:
            raise ValueError("protocol range is empty")
        if not self.path.startswith("/"):
            raise ValueError("path is not absolute")
        if "\0" in self.path:
            raise ValueError("path holds a NUL")
        if len(self.path.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
            raise ValueError(f"path is longer than {MAX_PATH_BYTES} bytes")
        if self.role == "target" and self.size is None and (self.create or self.resize or self.write):
            raise ValueError("a target that is written or made needs a size")


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """far -> near: the image is open. `created`: it did not exist (in a dry run: it would be created). `before`: its
    size before it was resized, when that was another."""

    protocol: _Number
    version: _Version
    size: _Size
    kind: Kind
    created: bool = False
    before: _Size | None = None


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """near -> far: begin. `size` is the number of bytes to make equal, the same at both ends; `timeout` is in
    seconds."""

    size: _Size
    block_size: int
    seed: int
    recheck: bool = False
    rate: _Size = 0
    timeout: Annotated[float, msgspec.Meta(ge=MIN_TIMEOUT_S, le=MAX_TIMEOUT_S)]
    threads: Annotated[int, msgspec.Meta(ge=0, le=MAX_THREADS)] = 0

    def __post_init__(self) -> None:
        if not is_block_size(self.block_size):
            raise ValueError("block_size is not a power of two from 4096 to 262144")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError("seed is not a 64-bit number")


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Either way: it cannot be done. `code` is the exit code the near command shall end with."""

    code: Annotated[int, msgspec.Meta(ge=1, le=255)]
    message: str


Message = Hello | Welcome | Start | Failure

_T = TypeVar("_T", Hello, Welcome, Start, Failure)

_ENCODER = msgspec.json.Encoder()
_HELLO = msgspec.json.Decoder(Hello)
_WELCOME = msgspec.json.Decoder(Welcome)
_START = msgspec.json.Decoder(Start)
_FAILURE = msgspec.json.Decoder(Failure)


def is_block_size(value: int) -> bool:
    return MIN_BLOCK <= value <= MAX_BLOCK and value & (value - 1) == 0


def encode(message: Message) -> bytes:
    """The payload; ValueError when it does not fit a frame (a path of thousands of control characters)."""
    payload = _ENCODER.encode(message)
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a {type(message).__name__} of {len(payload)} bytes does not fit a frame of {MAX_PAYLOAD}")
    return payload


def failure(code: int, message: str) -> Failure:
    """A Failure that always fits: the text on one line, shortened, the code within its range."""
    return Failure(code=code if 1 <= code <= 255 else 1, message=printable(message, MAX_MESSAGE))


def decode_hello(payload: bytes) -> Hello:
    return _decode(_HELLO, payload, "hello")


def decode_welcome(payload: bytes) -> Welcome:
    return _decode(_WELCOME, payload, "welcome")


def decode_start(payload: bytes) -> Start:
    return _decode(_START, payload, "start")


def decode_failure(payload: bytes) -> Failure:
    return _decode(_FAILURE, payload, "error")


def choose_protocol(ours: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """The newest number both ranges hold, or None."""
    newest = min(ours[1], theirs[1])
    return newest if newest >= max(ours[0], theirs[0]) else None


def _decode(decoder: msgspec.json.Decoder[_T], payload: bytes, name: str) -> _T:
    if len(payload) > MAX_PAYLOAD:
        raise PeerProtocolError(f"the peer sent a {name} of {len(payload)} bytes, more than {MAX_PAYLOAD}")
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = printable(str(error), 300)
        shown = printable(payload[:80].decode("utf-8", "surrogateescape"), 200)
        raise PeerProtocolError(f"the peer sent a {name} that is not valid: {reason} (it begins: {shown})") from None
