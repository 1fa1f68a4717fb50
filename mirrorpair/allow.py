"""What a serving end lets its clients open: `--allow PATH` (repeatable) and `--read-only`.

Rules:
- A request is matched by its words alone: absolute, no `..`, equal to an allowed file or beneath an allowed folder,
  whole names only (/srv/img does not cover /srv/imgX).
- It is then opened relative to a folder that has been held open since the start, by openat2 with RESOLVE_BENEATH:
  whatever links or renames happen below, the way never leaves that folder.
- An allowed path that is itself a link (as /dev/vg0/data is) is followed once, at the start; the one who allowed it
  meant that.
- Every refusal has the same text, whether the path exists or not.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from mirrorpair.errors import LocalError, NotAllowedError, UsageError
from mirrorpair.linux import openat2_beneath
from mirrorpair.text import printable

if TYPE_CHECKING:
    from types import TracebackType

    from mirrorpair.newfile import Opener


class Access(Protocol):
    """Decides about one request: the opener to use for it (None: open it by its path), or NotAllowedError."""

    def grant(self, path: str, *, write: bool) -> Opener | None: ...


class Anything:
    """`serve --stdio` without `--allow`: who may log in may read and write what the account may."""

    def __init__(self, *, read_only: bool = False) -> None:
        self._read_only = read_only

    def grant(self, path: str, *, write: bool) -> Opener | None:  # noqa: ARG002 - the protocol's
        _check_write(write, self._read_only)
        return None


class _Entry(msgspec.Struct, frozen=True):
    """`parts`: the allowed path as it was given. `name`: the file's name in the folder, None for all beneath the
    folder."""

    parts: tuple[str, ...]
    folder_fd: int
    name: str | None


class Allowed:
    """The list of `--allow`; holds one folder open for each. A context manager."""

    def __init__(self, paths: list[str], *, read_only: bool = False) -> None:
        self._read_only = read_only
        self._entries: list[_Entry] = []
        try:
            for path in paths:
                self._entries.append(_open_entry(path))
        except BaseException:
            self.close()
            raise

    def grant(self, path: str, *, write: bool) -> Opener:
        parts = _split(path)
        for entry in self._entries:
            if _covers(entry, parts):
                _check_write(write, self._read_only)
                assert parts is not None
                return _Beneath(entry, parts)
        raise _not_allowed()

    def close(self) -> None:
        while self._entries:
            os.close(self._entries.pop().folder_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Beneath:
    """Opens one granted path, and the folder it is in (to sync a new name, to take it back); nothing else."""

    def __init__(self, entry: _Entry, parts: tuple[str, ...]) -> None:
        self._entry = entry
        self._parts = parts

    def __call__(self, path: str, flags: int, mode: int = 0) -> int:
        asked = _split(path)
        entry, below = self._entry, self._parts[len(self._entry.parts) :]
        if asked == self._parts:
            relative = entry.name if entry.name is not None else "/".join(below)
            if entry.name is not None:
                flags |= (
                    os.O_NOFOLLOW
                )  # it was followed at the start; a link in its place since then is not what was allowed
        elif asked == self._parts[:-1] and flags & os.O_DIRECTORY:
            relative = "" if entry.name is not None else "/".join(below[:-1])
        else:
            raise _not_allowed()
        try:
            return openat2_beneath(
                entry.folder_fd, relative or ".", flags | os.O_CLOEXEC, mode if flags & os.O_CREAT else 0
            )
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ELOOP):
                raise _not_allowed() from None
            if error.errno == errno.ENOSYS:
                raise LocalError("this kernel lacks openat2 (Linux 5.6 or newer is needed for --allow)") from None
            raise


def _open_entry(path: str) -> _Entry:
    shown = os.path.abspath(path)
    if "\0" in path or not path:
        raise UsageError("--allow needs a path of a file or a folder")
    real = os.path.realpath(shown)
    folder, name = (real, None) if os.path.isdir(real) else (os.path.dirname(real), os.path.basename(real))
    try:
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"--allow {printable(path)}: the folder {printable(folder)}: {error.strerror}") from error
    parts = _split(shown)
    assert parts is not None
    return _Entry(parts=parts, folder_fd=folder_fd, name=name)


def _covers(entry: _Entry, parts: tuple[str, ...] | None) -> bool:
    if parts is None:
        return False
    if entry.name is not None:
        return parts == entry.parts
    return parts[: len(entry.parts)] == entry.parts


def _split(path: str) -> tuple[str, ...] | None:
    """The names in an absolute path; None when it is not absolute or climbs."""
    if not path.startswith("/"):
        return None
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    return None if ".." in parts else parts


def _check_write(write: bool, read_only: bool) -> None:
    if write and read_only:
        raise NotAllowedError("this end serves read-only: it can be a source or be verified, not be written")


def _not_allowed() -> NotAllowedError:
    return NotAllowedError(
        "this end does not serve that path; `mirrorpair serve --allow PATH` there says what it serves"
    )
