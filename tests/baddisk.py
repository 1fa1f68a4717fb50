"""A disk that fails or hangs on demand: a file of a FUSE mount, behind it nbdkit with its filters "error" and "pause".

Rules:
- What fails does so because a file is there, what hangs because nbdkit was told so: a test decides when, not a clock.
- The content is in an ordinary file beneath, which can be looked at when the mount is gone.
- Taking down lets go of what hangs first: nothing may be left in the kernel.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from realclients import HANG_S, TAKE_DOWN_S, background, needs, tool, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_bad_disks = needs("nbdfuse", "nbdkit", "fusermount3", mounts=True)
KINDS = ("pread", "pwrite", "trim", "zero")


class BadDisk:
    """`path`: the disk; `beneath`: what it really holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "mnt" / "disk"
        self.beneath = folder / "beneath"

    def fail(self, *kinds: str) -> None:
        """From now on these fail: KINDS."""
        for kind in kinds:
            (self.folder / kind).touch()

    def well(self) -> None:
        for kind in KINDS:
            (self.folder / kind).unlink(missing_ok=True)

    def hang(self) -> None:
        """When this returns nothing that is asked of it ends any more, and nothing is in hand."""
        self._say(b"p", b"P")

    def go_on(self) -> None:
        self._say(b"r", b"R")

    def _say(self, word: bytes, answer: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(HANG_S)
            control.connect(str(self.folder / "pause"))
            control.sendall(word)
            assert control.recv(1) == answer


@contextlib.contextmanager
def bad_disk(folder: Path, size: int, error: str = "EIO") -> Iterator[BadDisk]:
    """A good one, until it is told otherwise. `folder` is made for it."""
    folder.mkdir()
    disk = BadDisk(folder)
    with disk.beneath.open("wb") as file:
        file.truncate(size)
    disk.path.parent.mkdir()
    mounted, log = folder / "mounted", folder / "log"
    triggers = [f"error-{kind}-{what}" for kind in KINDS for what in ("rate=100%", f"file={folder / kind}")]
    server = ["nbdkit", "-s", "--exit-with-parent", "--filter=pause", "--filter=error", "file", str(disk.beneath)]
    with background(
        *("nbdfuse", "-P", mounted, disk.path, "--command", *server),
        *(f"error={error}", f"pause-control={folder / 'pause'}", *triggers),
        log=log,
    ) as process:
        try:
            until(mounted.exists, process, log)
            yield disk
        finally:
            with contextlib.suppress(OSError):
                disk.go_on()
            disk.well()
            with contextlib.suppress(AssertionError):
                tool("fusermount3", "-u", disk.path.parent, limit_s=TAKE_DOWN_S)
            with contextlib.suppress(Exception):
                process.wait(TAKE_DOWN_S)
            if process.poll() is None:
                process.kill()
                process.wait(TAKE_DOWN_S)
                tool("fusermount3", "-u", "-z", disk.path.parent, limit_s=TAKE_DOWN_S)
