"""NBD negotiation, the server's side of fixed newstyle: bytes in, bytes and events out, never a socket.

    server   GREETING                 magic, option magic, handshake flags
    client   client flags
    client   option ...               LIST, INFO, GO, EXPORT_NAME, ABORT; the server answers each
    ... until GO or EXPORT_NAME names an export: then the transmission phase begins, which is C's.

Rules:
- Whatever a client sends, `feed` returns; it never raises for it. What cannot be answered ends in Abort.
- A length is compared with its limit before anything is kept. At most MAX_OPTION bytes are ever held. What is refused
  is dropped as it comes, and answered when all of it came, so that the client stays in step. Nobody is drained of
  more than MAX_DRAIN by one option, nor answered more than MAX_OPTIONS times.
- A refusal is about one option: the client may ask again. Only EXPORT_NAME has no way to say no, there we hang up.
- A node that does not serve refuses INFO and GO with REP_ERR_POLICY and the text that it was given (which names the
  primary). LIST tells the names all the same.
- The empty name is the only export, when there is just one.
- Structured replies, metadata contexts and TLS are answered "unsupported", as the protocol has it for older servers.
- Bytes behind the end of the negotiation already belong to the transmission phase: they are handed on, not read.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from mirrorpair.text import printable
from mirrorpair.units import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x0003E889045565A9

# Both sides' handshake flags: the client answers with those that it takes.
FIXED_NEWSTYLE = 1 << 0
NO_ZEROES = 1 << 1
GREETING = INIT_MAGIC + OPTION_MAGIC + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES)

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_ERROR = 1 << 31  # the bit that all errors have
REP_ERR_UNSUP = REP_ERROR | 1
REP_ERR_POLICY = REP_ERROR | 2
REP_ERR_INVALID = REP_ERROR | 3
REP_ERR_UNKNOWN = REP_ERROR | 6
REP_ERR_TOO_BIG = REP_ERROR | 9

INFO_EXPORT = 0
INFO_NAME = 1
INFO_BLOCK_SIZE = 3

# Transmission flags: what the export can do.
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
CAN_MULTI_CONN = 1 << 8

MIN_BLOCK = 1
PREFERRED_BLOCK = 4096
MAX_REQUEST = 32 * 1024 * 1024  # bytes of payload in one READ or WRITE

MAX_NAME = 4096  # bytes; the protocol's limit for every string
MAX_INFOS = 1024  # kinds of information that one INFO or GO asks for; a handful are defined
MAX_OPTION = 4 + MAX_NAME + 2 + 2 * MAX_INFOS
MAX_DRAIN = 1 << 20
MAX_OPTIONS = 4096  # a client that asks about a thousand exports, one by one, stays below
MAX_TEXT = 1000  # characters; four bytes each still fit a string
OLD_PADDING = 124  # zeroes behind the answer to EXPORT_NAME, for clients that did not say NO_ZEROES

CLIENT_FLAGS = struct.Struct(">I")
OPTION_HEADER = struct.Struct(">8sII")  # magic, option, length of what follows
REPLY_HEADER = struct.Struct(">QIII")  # magic, option, type, length of what follows
EXPORT_INFO = struct.Struct(">QH")  # size, transmission flags
BLOCK_INFO = struct.Struct(">III")  # smallest, preferred, largest

_KNOWN_NAMES = {
    OPT_STARTTLS: "TLS",
    OPT_STRUCTURED_REPLY: "structured replies",
    OPT_LIST_META_CONTEXT: "metadata contexts",
    OPT_SET_META_CONTEXT: "metadata contexts",
}


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as its clients see it. `size` in bytes. `multi_conn` may be said only where a FLUSH covers what was
    answered on every connection (W5)."""

    size: int
    read_only: bool = False
    multi_conn: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_BYTES:
            raise ValueError(f"an export of {self.size} bytes; it must be from 0 to {MAX_BYTES}")

    @property
    def flags(self) -> int:
        """The transmission flags, 16 bits."""
        flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | (CAN_MULTI_CONN if self.multi_conn else 0)
        return flags | (READ_ONLY if self.read_only else SEND_TRIM | SEND_WRITE_ZEROES)


class Go(msgspec.Struct, frozen=True):
    """The negotiation succeeded: transmission of `export` begins once all bytes that came before this event are sent.
    `leftover` are the first bytes of it that were read already."""

    export: str
    leftover: bytes


class Abort(msgspec.Struct, frozen=True):
    """The negotiation ended without an export: send what came before this event, then hang up. `fault`: the client
    broke the protocol or had to be refused; otherwise it left by itself. `reason` is one clause for the log."""

    reason: str
    fault: bool


Event = Go | Abort


class ServerHandshake:
    """One connection's negotiation. Send GREETING first, then feed it all that comes until it returns an event.

    `exports` is looked up when a client asks, so it may change meanwhile; so may `refusal`: None to serve, else the
    sentence with which INFO and GO are refused.
    """

    def __init__(self, exports: Mapping[str, Export], refusal: str | None = None) -> None:
        for name in exports:
            if not name or "\0" in name or len(name.encode("utf-8")) > MAX_NAME:
                raise ValueError(f"{printable(name, 100)!r} cannot be the name of an export")
        self.refusal = refusal
        self._exports = exports
        self._held = bytearray()  # the beginning of a piece of which _need bytes are wanted
        self._need = CLIENT_FLAGS.size
        self._drain = 0
        self._after_drain = b""
        self._option: int | None = None  # whose payload is awaited; None: a header is
        self._options = 0
        self._greeted = False
        self._fixed = False
        self._zeroes = True
        self._chosen: str | None = None
        self._abort: Abort | None = None

    @property
    def ended(self) -> bool:
        """An event was returned: there is nothing more to feed."""
        return self._chosen is not None or self._abort is not None

    @property
    def held_bytes(self) -> int:
        """How much of the client's data is kept for later, in bytes; at most MAX_OPTION."""
        return len(self._held)

    def feed(self, data: bytes) -> list[bytes | Event]:
        """What to send, in order; an event, if there is one, is the last item. RuntimeError after an event."""
        if self.ended:
            raise RuntimeError("the negotiation is over")
        out: list[bytes | Event] = []
        at = 0
        while not self.ended:
            if self._drain:
                dropped = min(self._drain, len(data) - at)
                self._drain -= dropped
                at += dropped
                if self._drain:
                    break
                out.append(self._after_drain)
            wanted = self._need - len(self._held)
            self._held += data[at : at + wanted]
            at += min(wanted, len(data) - at)
            if len(self._held) < self._need:
                break
            piece = bytes(self._held)
            self._held.clear()
            out += self._take(piece)
        if self._chosen is not None:
            out.append(Go(self._chosen, bytes(data[at:])))
        elif self._abort is not None:
            out.append(self._abort)
        return out

    def _take(self, piece: bytes) -> list[bytes]:
        if not self._greeted:
            self._client_flags(piece)
            return []
        if self._option is None:
            return self._header(piece)
        option, self._option = self._option, None
        self._need = OPTION_HEADER.size
        return self._answer(option, piece)

    def _client_flags(self, piece: bytes) -> None:
        (flags,) = CLIENT_FLAGS.unpack(piece)
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            self._give_up(f"it sent handshake flags that nobody offered ({flags:#x})")
        self._greeted = True
        self._fixed = bool(flags & FIXED_NEWSTYLE)
        self._zeroes = not flags & NO_ZEROES
        self._need = OPTION_HEADER.size

    def _header(self, piece: bytes) -> list[bytes]:
        magic, option, length = OPTION_HEADER.unpack(piece)
        self._options += 1
        if magic != OPTION_MAGIC:
            self._give_up("what it sent is no NBD option")
        elif self._options > MAX_OPTIONS:
            self._give_up(f"it sent more than {MAX_OPTIONS} options")
        elif not self._fixed and option != OPT_EXPORT_NAME:
            self._give_up(f"it sent option {option}, for which a client must have chosen fixed newstyle")
        elif length > MAX_DRAIN:
            self._give_up(f"it sent an option of {length} bytes")
        elif option == OPT_ABORT:
            # Answered at once: it may be gone before a payload, which it should not have, has come.
            self._abort = Abort("it ended the negotiation", fault=False)
            return [_reply(option, REP_ACK)]
        elif option == OPT_EXPORT_NAME:
            if length > MAX_NAME:
                self._give_up(f"it asked for an export with a name of {length} bytes")
            self._option, self._need = option, length
        elif option in (OPT_INFO, OPT_GO):
            if length > MAX_OPTION:
                return self._refuse(option, length, REP_ERR_TOO_BIG, f"{length} bytes are too many for this option")
            self._option, self._need = option, length
        elif option == OPT_LIST:
            if length:
                return self._refuse(option, length, REP_ERR_INVALID, "the option to list exports has no data")
            return [*(_server(name) for name in self._exports), _reply(option, REP_ACK)]
        else:
            what = _KNOWN_NAMES.get(option, f"option {option}")
            return self._refuse(option, length, REP_ERR_UNSUP, f"{what}: not supported by this server")
        return []

    def _refuse(self, option: int, length: int, error: int, text: str) -> list[bytes]:
        """The answer, after the `length` bytes that are still to come."""
        answer = _refusal(option, error, text)
        if not length:
            return [answer]
        self._drain, self._after_drain = length, answer
        return []

    def _answer(self, option: int, payload: bytes) -> list[bytes]:
        if option == OPT_EXPORT_NAME:
            return self._export_name(payload)
        name, wanted, error, text = _parse_info(payload)
        if not error:
            name, error, text = self._find(name)
        if error:
            return [_refusal(option, error, text)]
        export = self._exports[name]
        answer = [_info(option, INFO_EXPORT, EXPORT_INFO.pack(export.size, export.flags))]
        if INFO_NAME in wanted:
            answer.append(_info(option, INFO_NAME, name.encode("utf-8")))
        if INFO_BLOCK_SIZE in wanted:
            sizes = BLOCK_INFO.pack(MIN_BLOCK, PREFERRED_BLOCK, MAX_REQUEST)
            answer.append(_info(option, INFO_BLOCK_SIZE, sizes))
        answer.append(_reply(option, REP_ACK))
        if option == OPT_GO:
            self._chosen = name
        return answer

    def _export_name(self, payload: bytes) -> list[bytes]:
        try:
            name = payload.decode("utf-8")
        except UnicodeDecodeError:
            self._give_up("it asked for an export whose name is not UTF-8")
            return []
        name, error, text = self._find(name)
        if error:
            self._give_up(f"this option cannot say no: {text}")
            return []
        export = self._exports[name]
        self._chosen = name
        return [EXPORT_INFO.pack(export.size, export.flags) + (bytes(OLD_PADDING) if self._zeroes else b"")]

    def _find(self, name: str) -> tuple[str, int, str]:
        """The export's full name, or an error and its text."""
        if not name and len(self._exports) == 1:
            name = next(iter(self._exports))
        if name not in self._exports:
            return name, REP_ERR_UNKNOWN, f"there is no volume {printable(name, 100)!r} here"
        if self.refusal is not None:
            return name, REP_ERR_POLICY, self.refusal
        return name, 0, ""

    def _give_up(self, reason: str) -> None:
        self._abort = Abort(reason, fault=True)


def _parse_info(payload: bytes) -> tuple[str, frozenset[int], int, str]:
    """An INFO's or GO's payload: length of the name, the name, a count, so many kinds of information. Returns the name,
    the kinds, and 0; or an error with its text."""

    def wrong(error: int, text: str) -> tuple[str, frozenset[int], int, str]:
        return "", frozenset(), error, text

    if len(payload) < 6:
        return wrong(REP_ERR_INVALID, "the option is too short to hold a name")
    length = int.from_bytes(payload[:4], "big")
    if length > MAX_NAME:
        return wrong(REP_ERR_TOO_BIG, f"a name of {length} bytes; at most {MAX_NAME} are allowed")
    if 4 + length + 2 > len(payload):
        return wrong(REP_ERR_INVALID, "the name is longer than the option that holds it")
    count = int.from_bytes(payload[4 + length : 6 + length], "big")
    kinds = payload[6 + length :]
    if len(kinds) != 2 * count:
        return wrong(REP_ERR_INVALID, "the length of the option does not fit what it holds")
    try:
        name = payload[4 : 4 + length].decode("utf-8")
    except UnicodeDecodeError:
        return wrong(REP_ERR_INVALID, "the name is not UTF-8")
    return name, frozenset(struct.unpack(f">{count}H", kinds)), 0, ""


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY_HEADER.pack(REPLY_MAGIC, option, kind, len(data)) + data


def _refusal(option: int, error: int, text: str) -> bytes:
    return _reply(option, error, printable(text, MAX_TEXT).encode("utf-8"))


def _info(option: int, kind: int, data: bytes) -> bytes:
    return _reply(option, REP_INFO, struct.pack(">H", kind) + data)


def _server(name: str) -> bytes:
    encoded = name.encode("utf-8")
    return _reply(OPT_LIST, REP_SERVER, struct.pack(">I", len(encoded)) + encoded)
