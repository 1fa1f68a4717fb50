"""How a run of the engine ended, as an error people can act on: what, where, why, what next.

Rules:
- Every status of the core has its sentence here; one that is new to this file is an internal error, never a success.
- Whose fault it was decides the class (see errors.py): an image's trouble is ImageError, the peer's is a RemoteError.
- An exit code that a peer names is taken only when the contract knows it; anything else counts as 1.
"""

from __future__ import annotations

import errno
import os
import signal

import msgspec

from mirrorpair import _core
from mirrorpair.errors import (
    ImageError,
    LocalError,
    MirrorpairError,
    NotAllowedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    RefusedError,
)
from mirrorpair.messages import Failure, decode_failure
from mirrorpair.text import printable
from mirrorpair.units import format_exact

# Not 130: that says somebody stopped this command, and here it was the other end's.
KNOWN_CODES = frozenset({1, 2, 10, 11, 12, 13, 14, 15, 20})

AGAIN = "run the same command again: it goes on with what still differs"


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """Who took part, in words for messages. `peer` is empty when both images are here; `again` is what to do next."""

    source: str
    target: str
    peer: str = ""
    timeout: float = 0.0
    again: str = "run the same command again"


def error_of(outcome: _core.Outcome, scene: Scene, ending: str = "") -> MirrorpairError | None:
    """The error for `outcome`; None when it went well or was cancelled. `ending`: what the transport knows about its
    end."""
    status = outcome.status
    if status in (_core.OUTCOME_OK, _core.OUTCOME_CANCELLED):
        return None
    again = scene.again
    peer = scene.peer or "the peer"
    why = f" ({ending})" if ending else ""
    if status == _core.OUTCOME_IO:
        return _io_error(outcome, scene, again)
    if status == _core.OUTCOME_SHRANK:
        return ImageError(
            f"{_where(outcome, scene)} could not be read through: it became smaller than it was, or its device failed; "
            f"see that nothing cuts it while it is read, then {again}"
        )
    if status == _core.OUTCOME_PEER_GONE:
        return PeerProtocolError(f"{peer}: the connection ended before the work was done{why}; {again}")
    if status == _core.OUTCOME_PEER_GARBAGE:
        detail = f": {printable(outcome.text, 300)}" if outcome.text else ""
        return PeerProtocolError(
            f"{peer}: what arrived is not what a mirrorpair of this version sends, or was damaged on the way{detail}; "
            f"{again}"
        )
    if status == _core.OUTCOME_PEER_SILENT:
        return PeerTimeoutError(
            f"{peer}: nothing was heard for {scene.timeout:g} s; the host, the network or its disk hangs; "
            f"then {again}, with a longer --timeout if it is merely slow"
        )
    if status == _core.OUTCOME_PEER_ERROR:
        return _reported(outcome.text, peer)
    if status == _core.OUTCOME_SOURCE_CHANGED:
        return ImageError(f"{scene.source} changed while it was read; stop what writes to it, then {again}")
    if status == _core.OUTCOME_RECHECK:
        return ImageError(
            f"{scene.target}: what was written at offset {outcome.offset} does not read back as it was written; "
            "either the source changed meanwhile, or this disk or its path cannot be trusted: check the kernel's log"
        )
    if status == _core.OUTCOME_KILLED:
        return LocalError(
            f"the helper process was ended by {_signal_name(outcome.errno)}, not by this command; {again}"
        )
    detail = printable(outcome.text, 300) or f"status {status}"
    return LocalError(f"internal error in the engine: {detail}; please report it")


def peer_error(failure: Failure, peer: str) -> MirrorpairError:
    """What a far end reported instead of doing the work."""
    message = f"{peer}: {printable(failure.message, 2000)}"
    if failure.code == NotAllowedError.exit_code:
        return NotAllowedError(message)
    return PeerError(message, failure.code if failure.code in KNOWN_CODES else 1)


def _reported(text: str, peer: str) -> MirrorpairError:
    try:
        return peer_error(decode_failure(text.encode("utf-8", "surrogateescape")), peer)
    except PeerProtocolError:
        return PeerError(f"{peer}: it failed, and said: {printable(text, 300)}", 1)


def _io_error(outcome: _core.Outcome, scene: Scene, again: str) -> MirrorpairError:
    where, number = _where(outcome, scene), outcome.errno
    reason = os.strerror(number) if number else printable(outcome.text, 300) or "unknown reason"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ImageError(
            f"{where}: no room at offset {outcome.offset}: {reason}; what was written so far is kept: "
            f"make room, then {again}"
        )
    if number in (errno.EROFS, errno.EPERM, errno.EACCES) and outcome.side == "target":
        return RefusedError(f"{where} cannot be written: {reason}")
    return ImageError(f"{where}: {reason} at offset {format_exact(outcome.offset)}; see the kernel's log, then {again}")


def _where(outcome: _core.Outcome, scene: Scene) -> str:
    if outcome.side == "source":
        return scene.source
    return scene.target if outcome.side == "target" else f"{scene.source} or {scene.target}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
