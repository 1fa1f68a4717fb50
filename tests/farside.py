"""Far ends for tests: real servers, scripts in ssh's place, and a hand-written peer that says what it is told to.

Rules:
- Every process is started and ended here, by its own process object; nothing outlives its `with`.
- Ports are the kernel's choice. Waiting is for a line of output or for an end, with a limit, never for a time.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING

import mirrorpair
from mirrorpair import _core
from mirrorpair.messages import Welcome, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 30.0
MIB = 1 << 20
MIRRORPAIR = [sys.executable, "-m", "mirrorpair"]
# This very package, whether it is installed or not, wherever a process starts.
ROOT = str(Path(mirrorpair.__file__).resolve().parent.parent)

FAR_COMMAND = f'export PYTHONPATH="{ROOT}"\nexec "{sys.executable}" -m mirrorpair "$@"'


def environment(**options: str) -> dict[str, str]:
    """Ours, with which a new process finds this package wherever it starts."""
    return {**os.environ, "PYTHONPATH": ROOT, **options}


def run_cli(*args: object, timeout: float = 120.0, **options: str) -> subprocess.CompletedProcess[str]:
    """`mirrorpair ARGS` to its end; `options` are environment variables."""
    return subprocess.run(
        [*MIRRORPAIR, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=environment(**options),
    )


class Reader:
    """The lines of a process's stream, read by a thread so that the process never waits for us."""

    def __init__(self, stream: IO[str]) -> None:
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stream = stream
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for line in self._stream:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line that matches."""
        while True:
            line = self._queue.get(timeout=LIMIT_S)
            assert line is not None, f"ended without {pattern!r}: {self.lines}"
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found

    def rest(self) -> list[str]:
        self._thread.join(LIMIT_S)
        while not self._queue.empty():
            if (line := self._queue.get()) is not None:
                self.lines.append(line)
        return self.lines


class Program:
    """`mirrorpair ARGS`, running; with `group` in a process group of its own, as a shell does it."""

    def __init__(self, *args: object, group: bool = False, **options: str) -> None:
        self.process = subprocess.Popen(
            [*MIRRORPAIR, *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**options),
            process_group=0 if group else None,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out = Reader(self.process.stdout)
        self.err = Reader(self.process.stderr)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT_S)
        self.out.rest()
        self.err.rest()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def running(*args: object, group: bool = False, **options: str) -> Iterator[Program]:
    program = Program(*args, group=group, **options)
    try:
        yield program
    finally:
        program.close()


class Server(Program):
    """`mirrorpair serve --listen` on a free port of this host, ready."""

    def __init__(self, *args: object) -> None:
        super().__init__("serve", "--listen", "127.0.0.1:0", *args)
        try:
            self.port = int(self.out.wait_for(r"^listening 127\.0\.0\.1:(\d+)$")[1])
        except BaseException:
            self.close()
            raise

    def url(self, path: object) -> str:
        return f"tcp://127.0.0.1:{self.port}{path}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), LIMIT_S)


@contextlib.contextmanager
def serving(*args: object) -> Iterator[Server]:
    server = Server(*args)
    try:
        yield server
    finally:
        server.close()


def write_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_ssh(folder: Path) -> Path:
    """Stands in for ssh: leaves the host out and runs this mirrorpair in place of the word for it."""
    return write_script(folder / "fake-ssh", f"shift 2\n{FAR_COMMAND}")


def silent_after_start(channel: _core.Channel, connection: socket.socket) -> None:
    """A far end that welcomes, and then reads and says nothing."""
    channel.recv(LIMIT_S)
    channel.send(_core.FRAME_WELCOME, encode(Welcome(protocol=1, version="x", size=MIB, kind="file")), LIMIT_S)
    channel.recv(LIMIT_S)
    connection.settimeout(LIMIT_S)
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass


@contextlib.contextmanager
def peer(talk: Callable[[_core.Channel, socket.socket], None]) -> Iterator[int]:
    """A server for one client that only does what `talk` does; yields its port."""
    failed: list[BaseException] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(LIMIT_S)

    def serve() -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(True)
                talk(_core.Channel(connection.fileno(), connection.fileno()), connection)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join(LIMIT_S)
        listener.close()
    assert not failed, failed
    assert not thread.is_alive()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port of this host that nobody listens on: a socket holds it, which does not listen but lets others do so."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children() -> set[int]:
    """Children of this process, ended ones that were not waited for included."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (task / "children").read_text(encoding="utf-8").split()}
    return found
