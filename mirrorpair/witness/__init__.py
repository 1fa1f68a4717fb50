"""The witness: a small process on a third host that keeps the register of many pairs. What it and its clients say.

    client (client.py, in each node's daemon)          witness (server.py over store.py)
    PREAMBLE                                --->
    {"op":"read","id":1,"pair":"shop"}      --->
                                            <---       {"id":1,"record":{"version":7,"register":{...}}}
    {"op":"cas","id":2,"pair":"shop",
     "version":7,"register":{...}}          --->
                                            <---       {"id":2,"swap":"ok"}  or  "conflict"
                                            <---       {"id":2,"code":1,"message":sentence}

Rules:
- It has no timers and is not in the heartbeat's path: it is asked when roles change, and whether it is there.
- Linearizable for each pair: requests are done one after the other, and nothing is told that is not durable.
- One JSON object a line, at most MAX_LINE bytes, validated at each edge, once. Replies come in the order of the
  requests. An unknown op or field is an error and never a guess.
- "ok" is the only word that says that a swap has happened, "conflict" the only one that says that it has not.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from mirrorpair.arbiter import MAX_RECORD_BYTES, Register, Versioned
from mirrorpair.errors import PeerProtocolError
from mirrorpair.text import printable

PREAMBLE = b"mirrorpair witness 1\n"
MAX_LINE = MAX_RECORD_BYTES + 4096
MAX_MESSAGE = 2000

_Pair = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]  # config.py's; it names a file
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    id: _Number
    pair: _Pair


class ReadRequest(_Request, frozen=True, kw_only=True, tag="read"):
    pass


class CasRequest(_Request, frozen=True, kw_only=True, tag="cas"):
    version: _Number
    register: Register


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of: `record` (read), `swap` (cas), or `code`, an exit code, with `message`."""

    id: _Number
    record: Versioned | None = None
    swap: Literal["ok", "conflict"] | None = None
    code: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    message: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE)] = ""


Request = ReadRequest | CasRequest

_ENCODER = msgspec.json.Encoder()
_REQUEST: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_REPLY = msgspec.json.Decoder(Reply)


def encode_line(word: Request | Reply) -> bytes:
    return _ENCODER.encode(word) + b"\n"


def decode_request(line: bytes) -> Request:
    """PeerProtocolError for everything else, whatever the bytes are."""
    try:
        return _REQUEST.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerProtocolError(f"not a valid request: {printable(str(error), 300)}") from None


def decode_reply(line: bytes) -> Reply:
    """PeerProtocolError."""
    try:
        return _REPLY.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerProtocolError(f"the witness sent what is no reply: {printable(str(error), 300)}") from None
