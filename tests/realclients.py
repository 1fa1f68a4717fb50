"""Real NBD clients as subprocesses, and what they leave in the kernel: FUSE mounts, loop devices, mounted file systems.

Rules:
- Each thing that is made is a context manager, and is gone behind it, also when the test failed. Taking down never
  waits for ever: a mount over a dead server may hang in the kernel until the FUSE process below it is killed, and that
  comes last.
- Only processes that were started here are ended, by their id.
- A client's word is not enough: `qemu_io` also fails on what it prints, since its exit code is 0 for some failures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HANG_S = 60.0
TAKE_DOWN_S = 10.0
GLANCE_S = 0.02
# The system's Python has its own modules; ours are not for it.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"LC_ALL": "C"}


hanging: list[subprocess.Popen[bytes]] = []  # killed, but in the kernel until the mount below them is gone


def needs(*names: str, mounts: bool = False) -> pytest.MarkDecorator:
    """A test with this mark is skipped where one of these tools is missing, or what a mount takes."""
    missing = [f"{name} is not installed" for name in names if path_of(name) is None]
    if mounts:
        missing += [] if os.geteuid() == 0 else ["loop devices and mounts need root"]
        missing += [f"there is no {path}" for path in ("/dev/fuse", "/dev/loop-control") if not Path(path).exists()]
    return pytest.mark.skipif(bool(missing), reason=", ".join(missing) or "all is here")


def path_of(name: str) -> str | None:
    # Tools of the system's administrator are often left out of PATH.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def tool(*words: str | Path, code: int | None = 0, limit_s: float = HANG_S, debug: bool = False) -> str:
    """Runs it; what it printed, stdout before stderr. `code`: the exit code that is right, None for any but 0. `debug`:
    libnbd also prints what the server said."""
    done = _run([str(word) for word in words], limit_s, debug=debug)
    said = done.stdout + done.stderr
    right = done.returncode != 0 if code is None else done.returncode == code
    right = right and done.returncode >= 0  # a crash is never right
    assert right, f"{words}: exit code {done.returncode}\n{said}"
    return said


def _run(words: list[str], limit_s: float, *, debug: bool = False) -> subprocess.CompletedProcess[str]:
    words[0] = path_of(words[0]) or words[0]
    environment = ENVIRONMENT | {"LIBNBD_DEBUG": "1" if debug else "0"}
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # Not waited for: it may hang in the kernel until something below it has been taken down.
        process.kill()
        hanging.append(process)
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        raise AssertionError(f"{words} hangs") from None
    return subprocess.CompletedProcess(words, process.returncode, out.decode(), err.decode())


def qemu_io(uri: str, *commands: str) -> str:
    """Runs the commands in one connection, with no cache of qemu's own."""
    steps = [word for command in commands for word in ("-c", command)]
    said = tool("qemu-io", "-f", "raw", "-t", "none", "-d", "unmap", *steps, uri)
    # "Pattern verification failed", "write failed", and commands that qemu-io does not understand.
    wrong = ("failed", "error", "not found", "invalid", "non-numeric", "bad argument")
    assert not any(word in said.lower() for word in wrong), f"{commands}\n{said}"
    return said


def until(happened: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for what a program of others tells nobody about; its end, or HANG_S, is a failure."""
    for _ in range(int(HANG_S / GLANCE_S)):
        if happened():
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(GLANCE_S)
            raise AssertionError(f"{process.args} ended with {code}\n{log.read_text()}")
    raise AssertionError(f"{process.args}: nothing happens\n{log.read_text()}")


@contextlib.contextmanager
def background(*words: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs beside the test."""
    command = [str(word) for word in words]
    command[0] = path_of(command[0]) or command[0]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=ENVIRONMENT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(TAKE_DOWN_S)


@contextlib.contextmanager
def nbdfuse(uri: str, folder: Path) -> Iterator[Path]:
    """The export as a file in `folder`, which is made (chain A)."""
    point = folder / "fuse"
    point.mkdir(exist_ok=True)
    pid_file = folder / "nbdfuse.pid"
    pid_file.unlink(missing_ok=True)
    log = folder / "nbdfuse.log"
    with background("nbdfuse", "-P", pid_file, point / "nbd", uri, log=log) as process:
        try:
            until(pid_file.exists, process, log)
            yield point / "nbd"
            tool("fusermount3", "-u", point, limit_s=TAKE_DOWN_S)
            assert process.wait(HANG_S) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(TAKE_DOWN_S)
            _unmount_fuse(point)


@contextlib.contextmanager
def storage_daemon(socket: Path, folder: Path, export: str = "data") -> Iterator[Path]:
    """The export as a file in `folder`, by way of qemu, which comes back after an outage of the server (chain B)."""
    file = folder / "qemu.raw"
    file.touch()
    pid_file = folder / "qemu.pid"
    pid_file.unlink(missing_ok=True)
    log = folder / "qemu.log"
    block = f"driver=nbd,node-name=n0,server.type=unix,server.path={socket},export={export}"
    block += ",reconnect-delay=60,open-timeout=10,discard=unmap"
    fuse = f"type=fuse,id=f0,node-name=n0,mountpoint={file},writable=on"
    words = ("qemu-storage-daemon", "--pidfile", pid_file, "--blockdev", block, "--export", fuse)
    with background(*words, log=log) as process:
        try:
            # It is written when the export is there.
            until(pid_file.exists, process, log)
            yield file
            process.terminate()
            assert process.wait(HANG_S) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(TAKE_DOWN_S)
            _unmount_fuse(file)


def _unmount_fuse(point: Path) -> None:
    if _is_mounted(point):
        with contextlib.suppress(AssertionError):
            _run(["fusermount3", "-uz", str(point)], TAKE_DOWN_S)

    while hanging:
        hanging.pop().wait(TAKE_DOWN_S)


def _is_mounted(path: Path) -> bool:
    """Asks the kernel's list: a mount of a server that is dead cannot be looked at."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


@contextlib.contextmanager
def loop(file: Path, *, direct: bool) -> Iterator[str]:
    """A loop device over `file`. `direct`: never over qemu's FUSE export."""
    options = ["--direct-io=on"] if direct else []
    done = _run(["losetup", *options, "--find", "--show", str(file)], HANG_S)
    if done.returncode:
        pytest.skip(f"no loop device can be had: {done.stderr.strip()}")
    device = done.stdout.strip()
    backing = Path("/sys/block", Path(device).name, "loop", "backing_file")
    try:
        yield device
        tool("losetup", "-d", device)
        assert not backing.exists(), f"{device} is still in use"
    finally:
        with contextlib.suppress(OSError):
            if backing.read_text().strip() == str(file):  # not somebody else's who got the number since
                with contextlib.suppress(AssertionError):
                    _run(["losetup", "-d", device], TAKE_DOWN_S)


@contextlib.contextmanager
def mounted(device: str, point: Path) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    tool("mount", device, point)
    try:
        yield point
        tool("umount", point)
    finally:
        if _is_mounted(point):
            with contextlib.suppress(AssertionError):
                _run(["umount", "--lazy", str(point)], TAKE_DOWN_S)
