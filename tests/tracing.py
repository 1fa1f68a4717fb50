"""System calls that fail, kill or stop at the N-th time, by strace.

Rules:
- `when=N` counts per thread. An image is therefore worked on by one thread here, so that N means the same in every run.
- A process that is attached to is in a known state: it waits for its peer. strace has said that it is there before the
  test goes on.
- strace is ended by its own process object; what it traced is ended by who started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from farside import LIMIT_S, MIRRORPAIR, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MARK = "MIRRORPAIR_TEST_MARK"


def kill(call: str, when: int) -> str:
    """The process dies instead of making this call for the N-th time."""
    return f"inject={call}:signal=KILL:when={when}"


def fail(call: str, error: str, when: int | str = 1) -> str:
    return f"inject={call}:error={error}:when={when}"


def stop(call: str, when: int) -> str:
    """The process stops (SIGSTOP) after its N-th such call."""
    return f"inject={call}:signal=STOP:when={when}"


@cache
def _strace() -> str | None:
    """strace, if it may trace here: it cannot in many containers."""
    found = shutil.which("strace")
    if found is None:
        return None
    tried = subprocess.run([found, "-qq", "-o", os.devnull, "true"], capture_output=True, check=False)
    return found if tried.returncode == 0 else None


def need_strace() -> str:
    found = _strace()
    if found is None:
        pytest.skip("strace is not installed, or may not trace here")
    return found


def command(log: Path | str, *rules: str) -> list[str]:
    """The words in front of a command that trace it and its helpers, but not the far end that it starts (-b execve)."""
    return [need_strace(), "-f", "-qq", "-b", "execve", "-o", str(log), *_flags(rules)]


def _flags(rules: Sequence[str]) -> list[str]:
    calls = sorted({rule.partition("=")[2].partition(":")[0] for rule in rules})
    return ["-e", f"trace={','.join(calls) or 'none'}", *(word for rule in rules for word in ("-e", rule))]


@contextlib.contextmanager
def attached(pid: int, log: Path | str, *rules: str) -> Iterator[None]:
    """Traces a process that runs already, and its children to come."""
    tracer = subprocess.Popen(
        [need_strace(), "-f", "-o", str(log), *_flags(rules), "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    try:
        said = tracer.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"strace cannot attach here: {said.strip()}")
        yield
    finally:
        tracer.terminate()
        try:
            tracer.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait(LIMIT_S)
        tracer.stderr.close()


def happened(log: Path) -> bool:
    """Whether somebody was killed in the traced run."""
    return "+++ killed by SIGKILL" in log.read_text(encoding="utf-8", errors="replace")


class Marked:
    """A command whose every process can be found again, however it was started and whoever is its parent now."""

    def __init__(self, *args: object, prefix: Sequence[str] = (), **options: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*prefix, *MIRRORPAIR, *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT, MARK: self.mark, **options},
        )

    def finish(self, limit_s: float = LIMIT_S) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=limit_s)
        return self.process.returncode, out, err

    def pids(self) -> set[int]:
        return marked(self.mark)

    def close(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def marked(mark: str) -> set[int]:
    """The living processes with this mark in their environment."""
    found, wanted = set(), f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


@contextlib.contextmanager
def marked_command(*args: object, prefix: Sequence[str] = (), **options: str) -> Iterator[Marked]:
    made = Marked(*args, prefix=prefix, **options)
    try:
        yield made
    finally:
        made.close()


def wait_until_gone(pids: set[int], limit_s: float = LIMIT_S) -> None:
    """Waits for processes that may be nobody's children here."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], limit_s)[0], f"process {pid} is still there"
        finally:
            os.close(fd)


def wait_until_unlocked(path: Path) -> None:
    """Waits until nobody holds the image: an ended session's helper may be the last to go."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(fd)


def _too_long(*_: object) -> None:
    raise AssertionError("the image is still locked")


class Watch:
    """Tells of the first write to a file, by inotify; made before the writer starts."""

    _MODIFY = 2

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(path), self._MODIFY) < 0:
            pytest.skip(f"no inotify here: {os.strerror(ctypes.get_errno())}")

    def wait(self) -> None:
        assert select.select([self._fd], [], [], LIMIT_S)[0], "nothing was written"

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stops:
    """The log of a traced run as it is written: tells when a process has stopped."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        self._seen = b""

    @property
    def log(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._write}"

    def wait(self) -> int:
        """The process (its first thread) that stopped."""
        while not (found := re.search(rb"^(\d+) .*stopped by SIGSTOP", self._seen, re.MULTILINE)):
            assert select.select([self._read], [], [], LIMIT_S)[0], f"nobody stopped: {self._seen[-500:]!r}"
            self._seen += os.read(self._read, 65536)
        status = Path(f"/proc/{int(found[1])}/status").read_text(encoding="utf-8")
        return int(status.partition("Tgid:")[2].split()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        os.close(self._write)
