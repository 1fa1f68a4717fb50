"""The way to a far end: a TCP connection, or a command (ssh, --rsh) whose standard input and output carry the frames.

Rules:
- `connect` returns an open Connection or raises; it never leaves a socket, a pipe, a process or a thread behind.
- A command belongs to its Connection: it is ended by its own process id (pipes closed, then SIGTERM, then SIGKILL,
  each with a short grace) and waited for on every way out. Its own children see their standard input end.
- argv is exactly: `ssh [-p PORT] -- [user@]host mirrorpair serve --stdio`, or the words of --rsh followed by
  `[user@]host mirrorpair serve --stdio`. The path travels in the hello.
- What the command writes to stderr goes to ours as it comes; the last of it is kept, so that an error can say why.
- No way there (unknown host, closed port, a command that ends before the far end has spoken) is UnreachableError; a
  far end that was there and then died, or spoke something else, is PeerProtocolError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import shlex
import signal
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from mirrorpair._core import Channel
from mirrorpair.endpoint import RemoteEndpoint, SshEndpoint, TcpEndpoint
from mirrorpair.errors import MirrorpairError, PeerProtocolError, UnreachableError, UsageError
from mirrorpair.text import last_words, printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

PIPE_BYTES = 1 << 20  # /proc/sys/fs/pipe-max-size as it is shipped: the most that needs no privilege
EXIT_GRACE_S = 3.0  # the far end syncs before its last word, so little is left to do when we hang up
TERM_GRACE_S = 2.0
KEPT_STDERR_BYTES = 4096

log = logging.getLogger(__name__)


class Connection(ABC):
    """One open way to a far end. `name` is how it is called in messages."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self.channel = channel

    def ending(self) -> str:
        """Why the other side is gone, as far as this side can know; empty when it cannot."""
        return ""

    @abstractmethod
    def lost_before_welcome(self) -> MirrorpairError:
        """The error for a way that closed before the far end had answered."""

    @abstractmethod
    def close(self) -> None:
        """Ends it, and what it needed. Again: no effect."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TcpConnection(Connection):
    def __init__(self, name: str, sock: socket.socket, session: int) -> None:
        self._socket = sock
        super().__init__(name, Channel(sock.fileno(), sock.fileno(), session))

    def lost_before_welcome(self) -> MirrorpairError:
        return PeerProtocolError(
            f"{self.name}: the server closed the connection before it answered; "
            "is it a mirrorpair server, and of this version? Its log says more"
        )

    def close(self) -> None:
        # A helper process may still hold a copy of the descriptor: shutdown ends the connection itself.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class CommandConnection(Connection):
    def __init__(self, name: str, argv: Sequence[str], session: int) -> None:
        self._command = argv[0]
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise UnreachableError(f"{name}: cannot start {printable(self._command)}: {error.strerror}") from error
        self._process = process
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            self._to_far, self._from_far, stderr = process.stdin, process.stdout, process.stderr
            enlarge_pipe(self._to_far.fileno())
            enlarge_pipe(self._from_far.fileno())
            super().__init__(name, Channel(self._from_far.fileno(), self._to_far.fileno(), session))
            self._stderr = _StderrPump(stderr.fileno())  # last: from here on close() ends everything
        except BaseException:
            process.kill()
            with process:
                pass
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ending(self) -> str:
        # It has closed its standard output, so it is about to end: give it the moment that takes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_GRACE_S)
        said = last_words(self._stderr.said(drain=self._process.returncode is not None))
        return f"{_describe_exit(self._command, self._process.returncode)}{f': {said}' if said else ''}"

    def lost_before_welcome(self) -> MirrorpairError:
        hint = ""
        ending = self.ending()
        if self._process.returncode == 127:
            hint = "; is mirrorpair installed there? --remote-command names it when it is not on the PATH"
        return UnreachableError(f"{self.name}: no far end: {ending}{hint}")

    def close(self) -> None:
        # The pipes first: a far end that is still there reads the end of its input and goes.
        for pipe in (self._to_far, self._from_far):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._end()
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._stderr.stop()
            if self._process.stderr is not None:
                self._process.stderr.close()

    def _end(self) -> None:
        for grace_s, ask in ((EXIT_GRACE_S, None), (TERM_GRACE_S, signal.SIGTERM)):
            if ask is not None:
                self._process.send_signal(ask)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                continue
            return


class _StderrPump:
    """Copies a command's stderr to ours, keeps its tail. A thread, for the engine's caller may be busy or not in
    Python."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._tail = b""
        self._drained = threading.Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._run, name="mirrorpair-stderr", daemon=True)
        self._thread.start()

    def said(self, *, drain: bool) -> bytes:
        """What was written last. `drain`: the command has ended, so the end of the stream is near; wait for it a
        little.

        It may not come: a background process of the command's, such as ssh's ControlPersist master, can hold it open.
        """
        if drain:
            self._drained.wait(0.5)
        return self._tail

    def stop(self) -> None:
        """Copies what is there by now and ends, whoever else still holds the stream."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b".")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        stopping = False
        while not stopping:
            stopping = any(fd == self._wake_read for fd, _ in poll.poll())
            if not self._copy():
                self._drained.set()
                return

    def _copy(self) -> bool:
        """Everything that can be read without waiting; False at the end of the stream."""
        while True:
            try:
                said = os.read(self._fd, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not said:
                return False
            self._tail = (self._tail + said)[-KEPT_STDERR_BYTES:]
            with contextlib.suppress(OSError):
                os.write(2, said)


def connect(
    endpoint: RemoteEndpoint,
    *,
    session: int,
    timeout: float,
    rsh: str | None = None,
    remote_command: str | None = None,
) -> Connection:
    """Opens the way to `endpoint`; `timeout` in seconds bounds a TCP connect (ssh has limits and prompts of its
    own)."""
    if isinstance(endpoint, TcpEndpoint):
        return TcpConnection(str(endpoint), _connect_tcp(endpoint, timeout), session)
    return CommandConnection(str(endpoint), remote_argv(endpoint, rsh=rsh, remote_command=remote_command), session)


def remote_argv(endpoint: SshEndpoint, *, rsh: str | None = None, remote_command: str | None = None) -> list[str]:
    """The command that starts the far end."""
    if remote_command is not None and (not remote_command.strip() or "\0" in remote_command):
        raise UsageError("--remote-command is empty; give the name or path of mirrorpair on the far host")
    tail = [endpoint.destination, remote_command or "mirrorpair", "serve", "--stdio"]
    if rsh is None:
        port = [] if endpoint.port is None else ["-p", str(endpoint.port)]
        return ["ssh", *port, "--", *tail]
    try:
        words = shlex.split(rsh)
    except ValueError as error:
        raise UsageError(f"--rsh {printable(rsh)!r}: {error}; quote it as for a shell") from None
    if not words or "\0" in rsh:
        raise UsageError("--rsh is empty; give a command such as 'ssh -p 2222 -i key'")
    if endpoint.port is not None:
        log.warning("--rsh: the port %d of the URL is not passed on; say it in the command itself", endpoint.port)
    return [*words, *tail]


def tune_socket(sock: socket.socket) -> None:
    """The engine sends whole batches: waiting to fill a segment would only delay the last one."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def enlarge_pipe(fd: int) -> None:
    """64 KiB, one block, is too little to keep both ends busy. Refused (quota, not a pipe): it stays as it is."""
    for size in (PIPE_BYTES, PIPE_BYTES // 4):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
            return


def _connect_tcp(endpoint: TcpEndpoint, timeout: float) -> socket.socket:
    try:
        # gaierror and TimeoutError are OSErrors too, so the order of the clauses counts.
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout)
    except socket.gaierror as error:
        raise UnreachableError(f"{endpoint}: unknown host {endpoint.host}: {error.strerror}") from error
    except TimeoutError as error:
        raise UnreachableError(
            f"{endpoint}: no connection within {timeout:g} s; is the host up, the port open?"
        ) from error
    except UnicodeError as error:  # a label that IDNA cannot encode
        raise UnreachableError(f"{endpoint}: unknown host {endpoint.host}: not a valid name") from error
    except OSError as error:
        hint = "; is `mirrorpair serve --listen` running there?" if error.errno == errno.ECONNREFUSED else ""
        raise UnreachableError(f"{endpoint}: cannot connect: {error.strerror or error}{hint}") from error
    try:
        sock.settimeout(None)
        tune_socket(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _describe_exit(command: str, status: int | None) -> str:
    name = printable(os.path.basename(command), 60)
    if status is None:
        return f"{name} closed the connection"
    if status < 0:
        try:
            return f"{name} was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"{name} was ended by signal {-status}"
    return f"{name} ended with status {status}"
