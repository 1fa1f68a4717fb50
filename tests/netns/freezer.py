"""The freezer of the control groups, of version 1 or 2, whichever there is: processes stand still, all of them, and do
not know it. As a paused virtual machine.

Rules:
- A group of its own below the root, which is gone at the end; whoever is in it then is thawed and leaves it.
- Frozen means that the kernel says so.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Self

LIMIT = 10_000_000
_V1 = Path("/sys/fs/cgroup/freezer")
_V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


class Freezer:
    """A context manager. OSError: no group can be made here."""

    def __init__(self) -> None:
        self._old = (_V1 / "cgroup.procs").exists()
        self.root = _V1 if self._old else next((root for root in _V2 if (root / "cgroup.procs").exists()), _V2[0])
        self._group = Path(tempfile.mkdtemp(prefix="mirrorpair-test-", dir=self.root))
        if not (self._group / self._switch).exists():
            self._group.rmdir()
            raise FileNotFoundError(f"{self.root} has no freezer")

    @property
    def _switch(self) -> str:
        return "freezer.state" if self._old else "cgroup.freeze"

    def freeze(self, *pids: int) -> None:
        for pid in pids:
            (self._group / "cgroup.procs").write_text(str(pid))
        (self._group / self._switch).write_text("FROZEN" if self._old else "1")
        self._until(frozen=True)

    def thaw(self) -> None:
        (self._group / self._switch).write_text("THAWED" if self._old else "0")
        self._until(frozen=False)

    def _until(self, *, frozen: bool) -> None:
        for _ in range(LIMIT):
            if self._frozen() == frozen:
                return
            os.sched_yield()
        raise AssertionError(f"{self._group} is not {'frozen' if frozen else 'thawed'}")

    def _frozen(self) -> bool:
        if self._old:
            return (self._group / self._switch).read_text().strip() == "FROZEN"
        return "frozen 1" in (self._group / "cgroup.events").read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        for pid in (self._group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (self.root / "cgroup.procs").write_text(pid)
        self._group.rmdir()
