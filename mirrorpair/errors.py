"""Every error that mirrorpair raises on purpose. The type says whose fault it is; the exit code is the command's.

    MirrorpairError            1
    |-- LocalError             1   our side: this host, its images, its command line
    |   |-- UsageError         2   the caller: wrong arguments, missing source, wrong file type, same image
    |   |-- ConfigError       10   the pair's configuration file
    |   |-- RefusedError      12   nobody's: it would lose data (size, mounted, busy, locked, read-only target)
    |   |-- WrongRoleError    15   nobody's: another node is primary, so this one cannot be
    |   |-- SplitBrainError   20   nobody's: two histories of one volume; a person has to choose
    |   |-- ImageError         1   the image or the storage below it: unreadable, I/O error, no space, shrank
    |   `-- Interrupted      130   a signal or the caller; `.result` tells what was done before
    `-- RemoteError            1   the peer, or the way to it
        |-- UnreachableError  11   the way: unknown host, closed port, failed ssh
        |-- PeerTimeoutError  13   silent for too long
        |-- NotAllowedError   14   the peer does not let us: outside --allow, read-only
        |-- PeerProtocolError  1   the peer spoke garbage or another version, or died
        `-- PeerError          *   the peer says what failed there, with the exit code that it gave

Rules:
- The text is one sentence that a person can act on. It names the image, never a line of our code.
- All survive pickling, so that they pass through multiprocessing's pools.
"""

from __future__ import annotations


class MirrorpairError(Exception):
    """The root: `except MirrorpairError` catches all that can be expected to go wrong."""

    exit_code: int = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class LocalError(MirrorpairError):
    """Something on this side failed or was asked for wrongly."""


class UsageError(LocalError):
    """Asked for wrongly: arguments, a missing source, a file of the wrong type, the same image twice."""

    exit_code = 2


class ConfigError(LocalError):
    """The configuration file is missing or wrong."""

    exit_code = 10


class RefusedError(LocalError):
    """Not done, because it would lose data or disturb another program: size, mounted, busy, locked, read-only."""

    exit_code = 12


class WrongRoleError(LocalError):
    """The roles do not allow it as they are now: the other node is primary, or has just become it."""

    exit_code = 15


class SplitBrainError(LocalError):
    """Both nodes hold data that the other one lacks, or unrelated data. Nothing is overwritten until a person says
    which of the two stays."""

    exit_code = 20


class ImageError(LocalError):
    """An image could not be opened, read, written or made: permission, I/O error, no space, shrank."""

    exit_code = 1


class Interrupted(LocalError):  # noqa: N818 - not an error but an end that was asked for
    """Ended early because somebody asked. `result` is what was done until then, or None."""

    exit_code = 130

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.args = (message, result)
        self.result = result


class RemoteError(MirrorpairError):
    """The peer failed, or the way to it."""


class UnreachableError(RemoteError):
    """No connection: unknown host, closed port, failed ssh."""

    exit_code = 11


class PeerTimeoutError(RemoteError):
    """The peer was silent for too long."""

    exit_code = 13


class NotAllowedError(RemoteError):
    """The serving end does not let its client do this: outside `--allow`, or a write to `--read-only`."""

    exit_code = 14


class PeerProtocolError(RemoteError):
    """What the peer sent is not our protocol, or of another version, or ended in the middle."""

    exit_code = 1


class PeerError(RemoteError):
    """The peer reported an error of its own. `exit_code` is the code it gave."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.args = (message, code)
        # The code came over the wire: nothing that a peer says may turn a failure into exit status 0.
        self.exit_code = code if 1 <= code <= 255 else 1


def error_of(code: int, message: str) -> MirrorpairError:
    """The error of our own that ends with this exit code."""
    kinds: tuple[type[MirrorpairError], ...] = (RefusedError, WrongRoleError, SplitBrainError)
    kinds += (UsageError, UnreachableError, PeerTimeoutError)
    return next((kind for kind in kinds if kind.exit_code == code), LocalError)(message)
