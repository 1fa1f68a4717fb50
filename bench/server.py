"""The far end over TCP: a `mirrorpair serve --listen` of our own, and a relay that counts what passes.

Rules: port 0, the port is read from what the server prints; the server is ended by its id; the relay changes nothing
and decodes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import time
from threading import Lock, Thread
from typing import TYPE_CHECKING, Self

from bench.measure import end_group
from bench.workshop import Failed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PATIENCE_S = 30.0


class Server:
    def __init__(self, command: str, allow: Path, env: Mapping[str, str]) -> None:
        argv = [command, "serve", "--listen", "127.0.0.1:0", "--allow", str(allow)]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._said = b""
        try:
            self.host, self.port = self._wait_until_listening()
        except BaseException:
            self.close()
            raise
        # Somebody has to read what it goes on to say: a full pipe would stop it.
        Thread(target=self._drain, name="serve-output", daemon=True).start()

    def url(self, path: Path, relay: Relay | None = None) -> str:
        host, port = (self.host, self.port) if relay is None else relay.address
        return f"tcp://{host}:{port}{path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        end_group(self.pid)

    def _wait_until_listening(self) -> tuple[str, int]:
        output = self._process.stdout
        assert output is not None
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            found = re.search(rb"^listening (\S+):(\d+)\s*$", self._said, re.MULTILINE)
            if found:
                return found[1].decode(), int(found[2])
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(output.fileno(), 4096) if ready else b""
            if not chunk:
                said = self._said.decode(errors="replace")
                raise Failed(f"mirrorpair serve did not start to listen; it said: {said!r}")
            self._said += chunk

    def _drain(self) -> None:
        output = self._process.stdout
        assert output is not None
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(output.fileno(), 65536):
                self._said = (self._said + chunk)[-4096:]
        output.close()


class Relay:
    """Passes every connection on and counts: `sent` by the one that connects, `received` by it."""

    def __init__(self, host: str, port: int) -> None:
        self.sent = 0
        self.received = 0
        self._to = (host, port)
        self._lock = Lock()
        self._threads: list[Thread] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._acceptor = Thread(target=self._accept, name="relay", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept
        self._acceptor.join()
        self._listener.close()
        for thread in self._threads:
            thread.join(_PATIENCE_S)
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._to)
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            for source, sink, name in ((near, far, "sent"), (far, near, "received")):
                thread = Thread(target=self._pump, args=(source, sink, name), name=f"relay-{name}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                sink.sendall(view[:count])
                with self._lock:
                    setattr(self, name, getattr(self, name) + count)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
