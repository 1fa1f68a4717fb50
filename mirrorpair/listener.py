"""`serve --listen`: many clients at once, each a session in a thread of its own.

Rules:
- A client can only spoil its own session. Nothing it does, or leaves undone, stops or delays another, or the shutdown.
- At most CAP sessions. When there are more, the one that has been negotiating longest has to go: idle connections
  cannot keep a real client out. Only when all of them are at work is the newcomer told to come later.
- Beyond loopback nothing is served in clear unless `--insecure` says so.
- stop() may be called from a signal handler or another thread; serve() then returns within STOP_S and a little.
- The log is one line per session and a few lines per second, however many sessions there are.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from mirrorpair import _core
from mirrorpair.endpoint import join_address
from mirrorpair.errors import LocalError, UsageError
from mirrorpair.messages import encode, failure
from mirrorpair.serve import NEGOTIATE_S, Served, Session
from mirrorpair.transport import tune_socket

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mirrorpair.allow import Access

CAP = 100
STOP_S = 5.0
BACKLOG = 128
LINES_PER_S = 5
BUSY_CODE = 11


class Listener:
    """Bound when made; `address` is where. A context manager that closes it."""

    def __init__(
        self,
        host: str,
        port: int,
        access: Access,
        *,
        insecure: bool = False,
        log: Callable[[str], object],
        cap: int = CAP,
        negotiate_s: float = NEGOTIATE_S,
    ) -> None:
        self._access = access
        self._log = LineLimit(log)
        self._cap = cap
        self._negotiate_s = negotiate_s
        self._stopping = False
        self._clients: list[_Client] = []  # in order of arrival; touched by the accepting thread only
        self._socket = _bind(host, port, insecure=insecure)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return join_address(host, port)

    def serve(self) -> None:
        """Accepts until stop() is called, then ends the sessions."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        try:
            while not self._stopping:
                poll.poll()
                if not self._stopping:
                    self._accept()
        finally:
            self._stopping = True
            self._socket.close()
            self._end_sessions()
            self._log.flush()

    def stop(self) -> None:
        self._stopping = True
        with suppress(OSError):
            os.write(self._wake_write, b".")

    def close(self) -> None:
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        try:
            sock, peer = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._log.line(f"cannot accept: {error.strerror}")
                # The connection stays in the queue, so poll() would say so again at once: wait a little, or for a stop.
                select.select([self._wake_read], [], [], 0.1)
            return
        name = join_address(peer[0], peer[1])
        try:
            sock.setblocking(True)
            tune_socket(sock)
            if not self._make_room():
                self._log.line(f"{name} turned away: {self._cap} sessions are at work")
                _turn_away(sock, self._cap)
                return
            client = _Client(sock, name, self._access, self._negotiate_s, lambda: self._stopping, self._log.line)
            client.start()
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            self._log.line(f"{name} turned away: {error}")
            sock.close()
            return
        self._clients.append(client)

    def _make_room(self) -> bool:
        self._clients = [client for client in self._clients if client.is_alive()]
        counted = [client for client in self._clients if not client.dismissed]
        if len(counted) < self._cap:
            return True
        for client in counted:
            if not client.at_work:
                client.dismiss()
                return True
        return False

    def _end_sessions(self) -> None:
        for client in self._clients:
            if not client.at_work:
                client.dismiss()
        deadline = time.monotonic() + STOP_S + 2.0
        for client in self._clients:
            client.join(max(0.0, deadline - time.monotonic()))


class _Client(threading.Thread):
    def __init__(
        self,
        sock: socket.socket,
        name: str,
        access: Access,
        negotiate_s: float,
        stopping: Callable[[], bool],
        log: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"session {name}", daemon=True)
        self.dismissed = False
        self._socket = sock
        self._peer = name
        self._log = log
        self._closing = threading.Lock()
        self._session = Session(
            _core.Channel(sock.fileno(), sock.fileno()),
            access,
            negotiate_s=negotiate_s,
            stopping=stopping,
            stop_s=STOP_S,
        )

    @property
    def at_work(self) -> bool:
        return self._session.started

    def dismiss(self) -> None:
        """Hangs up on a client that is still negotiating; its thread then ends by itself."""
        self.dismissed = True
        self._hang_up()

    def run(self) -> None:
        try:
            served = self._session.run()
        finally:
            self._hang_up()
            with self._closing:
                self._socket.close()
        if self.dismissed:
            served = Served(code=served.code, text=f"{served.text} (hung up on: room was needed, or the server ends)")
        self._log(f"{self._peer} {served.text}")

    def _hang_up(self) -> None:
        # A helper process of another session may hold a copy of the descriptor: shutdown ends the connection itself.
        with self._closing, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class LineLimit:
    """Passes on a few lines a second and counts the rest."""

    def __init__(self, write: Callable[[str], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._lock = threading.Lock()
        self._second = float("-inf")
        self._lines = 0
        self._held = 0

    def line(self, text: str) -> None:
        with self._lock:
            now = self._clock()
            if now - self._second >= 1.0:
                self._tell_held()
                self._second, self._lines = now, 0
            if self._lines < LINES_PER_S:
                self._lines += 1
                self._write(text)
            else:
                self._held += 1

    def flush(self) -> None:
        with self._lock:
            self._tell_held()

    def _tell_held(self) -> None:
        if self._held:
            self._write(f"{self._held} more lines like these")
            self._held = 0


def _bind(host: str, port: int, *, insecure: bool) -> socket.socket:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--listen {join_address(host, port)}: unknown host {host}: {error}") from error
    for *_, address in found:
        if not insecure and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise UsageError(
                f"--listen {join_address(host, port)} is reachable from other hosts, nothing there is encrypted, and "
                "nobody has to log in: use ssh://host/path instead (it needs no server), listen on 127.0.0.1 behind a "
                "tunnel, or say --insecure when the network is yours alone"
            )
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise LocalError(f"--listen {join_address(host, port)}: {error.strerror}") from error
    return sock


def _turn_away(sock: socket.socket, cap: int) -> None:
    """Says why, without waiting: a fresh socket's buffer holds it. What the client sent is taken first, or the answer
    could be lost in a reset."""
    with sock, suppress(OSError, ValueError, EOFError):
        channel = _core.Channel(sock.fileno(), sock.fileno())
        with suppress(OSError, EOFError, ValueError):
            channel.recv(0.05)
        text = f"this server is busy: {cap} sessions are at work; try again later"
        channel.send(_core.FRAME_ERROR, encode(failure(BUSY_CODE, text)), 0.05)
        sock.shutdown(socket.SHUT_RDWR)
