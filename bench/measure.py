"""Runs one command and says what it cost. Nothing here knows what the command does.

Rules:
- Time runs from before the spawn to the exit of the command itself (pidfd), by the monotonic clock.
- The command is the leader of a process group of its own. When it has ended, whatever is left of the group is waited
  for, then killed, by id: a straggler would be measured in the next run.
- Output goes to files: a full pipe would block the command, a reader would take time from it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_POLL_S = 0.002


@dataclass(frozen=True)
class Run:
    argv: tuple[str, ...]
    seconds: float
    user_s: float
    system_s: float
    status: int
    """Exit code, or minus the signal."""
    stdout: str
    stderr: str
    cut: bool
    """It was still running at the limit."""

    def tail(self) -> str:
        """The end of what it said, for a message."""
        text = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return " | ".join(text[-3:])[-400:]


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    limit_s: float = 600.0,
    cwd: Path | None = None,
    started: Callable[[int], None] | None = None,
) -> Run:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=cwd, start_new_session=True
        )
        cut = False
        try:
            if started is not None:
                started(process.pid)
            pidfd = os.pidfd_open(process.pid)
            try:
                ready, _, _ = select.select([pidfd], [], [], limit_s)
                seconds = time.perf_counter() - start
                if not ready:
                    cut = True
                    os.killpg(process.pid, signal.SIGKILL)
            finally:
                os.close(pidfd)
            _, wait_status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(wait_status)
        except BaseException:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
        finally:
            end_group(process.pid)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Run(
        argv=tuple(argv),
        seconds=seconds,
        user_s=usage.ru_utime,
        system_s=usage.ru_stime,
        status=process.returncode,
        stdout=texts[0],
        stderr=texts[1],
        cut=cut,
    )


def end_group(group: int, patience_s: float = 5.0) -> None:
    """Returns when no process of the group is left. Its leader was waited for already."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            os.killpg(group, 0 if time.monotonic() < deadline else signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError:  # only zombies of another user are left: not ours to reap
            return
        time.sleep(_POLL_S)


def idle_share(over_s: float = 0.05) -> float:
    """Share of all cores that nobody used just now: tells a quiet machine from a busy one."""

    def read() -> tuple[int, int]:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    idle_before, all_before = read()
    time.sleep(over_s)
    idle_after, all_after = read()
    return (idle_after - idle_before) / max(1, all_after - all_before)


# --- memory ---------------------------------------------------------------------------------------------------------


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def memory_bytes(pid: int) -> int:
    """What the process holds beyond the page cache: its share of anonymous and of shared memory, never a mapped file.

    The proportional share, because an engine forked from Python shares most of its pages with it."""
    fields = _fields(f"/proc/{pid}/smaps_rollup")
    if "Pss_Anon" in fields:
        return fields["Pss_Anon"] + fields.get("Pss_Shmem", 0)
    fields = _fields(f"/proc/{pid}/status")
    return fields.get("RssAnon", 0) + fields.get("RssShmem", 0)


def _fields(path: str) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, rest = line.partition(":")
            words = rest.split()
            if len(words) == 2 and words[1] == "kB":
                found[name] = int(words[0]) * 1024
    return found


def is_far_end(pid: int) -> bool:
    """A `mirrorpair serve`: in real life another host's memory."""
    with contextlib.suppress(OSError):
        return b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


class MemoryWatch:
    """Samples the trees below some processes; `peaks` are those of each end, all its processes together.

    A sample walks the page tables of the mapped images, so a watched run is never a timed one."""

    def __init__(self, interval_s: float = 0.005) -> None:
        self.peaks = {"near": 0, "far": 0}
        self.samples = 0
        self._interval_s = interval_s
        self._roots: list[int] = []
        self._stop = Event()
        self._thread = Thread(target=self._watch, name="memory-watch", daemon=True)

    def add(self, pid: int) -> None:
        self._roots.append(pid)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            sums = {"near": 0, "far": 0}
            for root in tuple(self._roots):
                self._add_tree(root, "near", sums)
            for end, total in sums.items():
                self.peaks[end] = max(self.peaks[end], total)
            self.samples += 1

    def _add_tree(self, pid: int, end: str, sums: dict[str, int]) -> None:
        end = "far" if end == "far" or is_far_end(pid) else "near"
        sums[end] += memory_bytes(pid)
        for child in _direct_children(pid):
            self._add_tree(child, end, sums)


def _direct_children(pid: int) -> Iterable[int]:
    for task in _listed(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            yield from map(int, Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii").split())
