"""The control socket's language, and its blocking client: how a command talks to the node's daemon.

    client                                    daemon (admin.py), a unix socket
    {"op":"promote", ...}              --->
                                       <---   {"progress":{...}}     while it takes long, at least every BEAT_S
                                       <---   {"ok":...}  or  {"error":{"code":exit code,"message":sentence}}

Rules:
- One JSON object a line. A request is at most MAX_REQUEST bytes; each is validated by `decode_request`, once: its
  JSON, its op, every field. An unknown op or field is an error and never a guess: an older daemon must not do half of
  what a newer command asks.
- A daemon says something every BEAT_S while it works. One that is silent for PATIENCE_S hangs: exit code 13.
- What the daemon says is validated too; whatever it is, a method returns its struct or raises a MirrorpairError.
- No asyncio here: a command pays for a socket and msgspec alone.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Annotated, Self, TypeVar

import msgspec

from mirrorpair.errors import (
    LocalError,
    NotAllowedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    UnreachableError,
)
from mirrorpair.explain import Explanation
from mirrorpair.history import Amount  # noqa: TC001 - msgspec reads it at run time
from mirrorpair.jsontypes import decoder
from mirrorpair.status import Condition, Event, Status, Volume
from mirrorpair.text import printable
from mirrorpair.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

MAX_REQUEST = 64 * 1024
MAX_ANSWER = 16 * 1024 * 1024
MAX_SOCKET_PATH = 107  # sockaddr_un.sun_path holds 108 with its NUL
MAX_TIMEOUT_S = 10 * 365 * 86400.0
BEAT_S = 1.0
PATIENCE_S = 10.0


class ResyncPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a resync of one volume would do, or why it is refused: `amount` as history.decide says it, `source` and
    `target` are node names (None when nobody is overwritten), `bytes` what would be compared and, where it differs,
    sent (0 for "none"), `rule` the row of the handshake table, `reason` one sentence that names nodes."""

    volume: str
    amount: Amount
    source: str | None
    target: str | None
    bytes: int
    rule: str
    reason: str


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How a change of roles, a pause, a resync or a wait ended well."""

    message: str
    status: Status


class Working(msgspec.Struct, frozen=True, kw_only=True):
    """A sign of life of a long operation. Of a resync that is watched also its `volumes`, and the status's reason."""

    op: str
    seconds: float
    volumes: list[Volume] = []
    reason: str = ""


# --- requests: the edge at which they are validated

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    pass


class StatusRequest(_Request, frozen=True, kw_only=True, tag="status"):
    pass


class PromoteRequest(_Request, frozen=True, kw_only=True, tag="promote"):
    """`dry_run`: only what would be done, or why it would be refused; of a demotion too."""

    accept_data_loss: bool = False
    force: bool = False
    dry_run: bool = False


class DemoteRequest(_Request, frozen=True, kw_only=True, tag="demote"):
    dry_run: bool = False


class SwitchoverRequest(_Request, frozen=True, kw_only=True, tag="switchover"):
    """`to`: the node that shall be primary; None: the one that is not."""

    to: _Name | None = None
    dry_run: bool = False


class ExplainRequest(_Request, frozen=True, kw_only=True, tag="explain"):
    pass


class PauseRequest(_Request, frozen=True, kw_only=True, tag="pause"):
    """`paused` False: the end of a pause, and of a latch."""

    paused: bool = True


class PlanRequest(_Request, frozen=True, kw_only=True, tag="plan-resync"):
    volume: _Name | None = None
    full: bool = False


class ResyncRequest(_Request, frozen=True, kw_only=True, tag="resync"):
    """`wait`: answered when the volume is in sync, with `progress` until then."""

    volume: _Name | None = None
    full: bool = False
    wait: bool = False


class WaitRequest(_Request, frozen=True, kw_only=True, tag="wait"):
    condition: Condition
    timeout: Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMEOUT_S)] | None = None


class EventsRequest(_Request, frozen=True, kw_only=True, tag="events"):
    since: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0


Request = (
    StatusRequest
    | PromoteRequest
    | DemoteRequest
    | SwitchoverRequest
    | PauseRequest
    | ExplainRequest
    | PlanRequest
    | ResyncRequest
    | WaitRequest
    | EventsRequest
)

_DECODER: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_ENCODER = msgspec.json.Encoder()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request was not done. `code` is the exit code that the command shall end with."""

    code: Annotated[int, msgspec.Meta(ge=1, le=255)]
    message: str


def decode_request(line: bytes) -> Request:
    """The request in a line; ValueError with a sentence for everything else, whatever the bytes are."""
    try:
        return _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a valid request: {printable(str(error), 300)}") from None


# --- the command's side

_T = TypeVar("_T")
_Bytes = TypeVar("_Bytes", bytes, msgspec.Raw)


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    ok: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: Failure | msgspec.UnsetType = msgspec.UNSET
    progress: Working | msgspec.UnsetType = msgspec.UNSET


_ANSWER = msgspec.json.Decoder(_Answer)


class AdminClient:
    """A blocking connection to the daemon whose control socket is at `path`; a context manager that closes it.

    Errors: UnreachableError (11) no daemon answers there, or it ended before it answered; PeerTimeoutError (13) it
    says nothing for `patience_s`; NotAllowedError (14) the socket is another user's; PeerProtocolError (1) it speaks
    another version; PeerError with the code and the sentence that the daemon gave.
    """

    def __init__(self, path: str, *, patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._patience_s = patience_s
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def status(self) -> Status:
        return self._call(StatusRequest(), Status)

    def events(self, since: int = 0) -> list[Event]:
        return self._call(EventsRequest(since=since), list[Event])

    def plan_resync(self, volume: str | None = None, *, full: bool = False) -> list[ResyncPlan]:
        return self._call(PlanRequest(volume=volume, full=full), list[ResyncPlan])

    def promote(self, *, accept_data_loss: bool = False, force: bool = False, dry_run: bool = False) -> Done:
        return self._call(PromoteRequest(accept_data_loss=accept_data_loss, force=force, dry_run=dry_run), Done)

    def demote(self, *, dry_run: bool = False) -> Done:
        return self._call(DemoteRequest(dry_run=dry_run), Done)

    def switchover(self, to: str | None = None, *, dry_run: bool = False) -> Done:
        """May be asked of either node."""
        return self._call(SwitchoverRequest(to=to, dry_run=dry_run), Done)

    def explain(self) -> Explanation:
        return self._call(ExplainRequest(), Explanation)

    def pause(self, *, paused: bool) -> Done:
        return self._call(PauseRequest(paused=paused), Done)

    def resync(
        self,
        volume: str | None = None,
        *,
        full: bool = False,
        wait: bool = False,
        on_progress: Callable[[Working], None] | None = None,
    ) -> Done:
        """`wait`: until the volume is in sync, with `on_progress` called several times a second."""
        return self._call(ResyncRequest(volume=volume, full=full, wait=wait), Done, on_progress)

    def wait_for(self, condition: Condition, *, timeout: float | None = None) -> Done:
        """PeerError with code 13 after `timeout` seconds, 20 when it is in vain."""
        return self._call(WaitRequest(condition=condition, timeout=timeout), Done)

    def _connect(self) -> None:
        # A time-out of Python's would make connect() fail at once while others are being accepted.
        patience = struct.pack("ll", *divmod(int(self._patience_s * 1e6), 10**6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        if len(os.fsencode(self._path)) > MAX_SOCKET_PATH:
            raise LocalError(f"the control socket's path is longer than {MAX_SOCKET_PATH} bytes: {self._path}")
        try:
            self._socket.connect(self._path)
        except PermissionError:
            raise NotAllowedError(
                f"the control socket {self._path} is not open to this user: be root or the daemon's own user"
            ) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise UnreachableError(
                f"no daemon answers at {self._path}: is `mirrorpair run` at work for this node?"
            ) from None
        except BlockingIOError:
            raise self._silent() from None
        except OSError as error:
            raise UnreachableError(f"no daemon can be reached at {self._path}: {error.strerror or error}") from None
        self._socket.settimeout(self._patience_s)

    def _call(self, request: Request, kind: type[_T], on_progress: Callable[[Working], None] | None = None) -> _T:
        line = _ENCODER.encode(request) + b"\n"
        try:
            self._socket.sendall(line)
        except TimeoutError:
            raise self._silent() from None
        except OSError:
            pass  # it hung up: what it said before stands to be read
        while True:
            answer = self._decode(self._read_line(), _ANSWER.decode)
            if isinstance(answer.progress, Working):
                if on_progress is not None:
                    on_progress(answer.progress)
            elif isinstance(answer.error, Failure):
                raise PeerError(answer.error.message, answer.error.code)
            elif isinstance(answer.ok, msgspec.Raw):
                return self._decode(answer.ok, decoder(kind).decode)
            else:
                raise self._foreign("an answer without a result")

    def _read_line(self) -> bytes:
        start = 0
        while (end := self._received.find(b"\n", start)) < 0:
            start = len(self._received)
            if start > MAX_ANSWER:
                raise self._foreign(f"an answer of more than {MAX_ANSWER} bytes")
            try:
                more = self._socket.recv(256 * 1024)
            except TimeoutError:
                raise self._silent() from None
            except OSError:
                more = b""
            if not more:
                raise UnreachableError(f"the daemon at {self._path} ended before it answered")
            self._received += more
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _decode(self, raw: _Bytes, decode: Callable[[_Bytes], _T]) -> _T:
        try:
            return decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._foreign(printable(str(error), 300)) from None

    def _silent(self) -> PeerTimeoutError:
        return PeerTimeoutError(
            f"the daemon at {self._path} has said nothing for {format_seconds(self._patience_s)}: it may hang"
        )

    def _foreign(self, what: str) -> PeerProtocolError:
        return PeerProtocolError(
            f"what answers at {self._path} is not a daemon of this version ({what}): restart it after an upgrade"
        )
