"""The NBD listeners: unix and TCP sockets, each client negotiated with, then handed on as a bare socket.

    server = NbdServer(config.node("alpha").nbd, exports, accept, refusal=..., clients=..., log=...)
    await server.start()     bound, or an error that names the address; then it serves by itself
    await server.close()     no listener, no negotiation, no socket file of ours is left; clients handed on stay

Rules:
- A client can only spoil its own connection. Nothing it sends, or leaves unsent, stops or delays a listener, another
  client, or the end; what goes wrong with it is at most a line in the log, and a few of those in a second.
- A negotiation ends within its deadline, whatever the client does. At most `negotiating` of them at a time: when there
  are more, the one that has taken longest has to go, so idle connections cannot keep a real client out (CVE-2024-7409).
- At most `clients` in all: the next is refused with a text, so that it knows why.
- Nothing of a volume is opened or allocated for a client before its negotiation is over (CVE-2019-14850).
- Whether the node serves is asked anew for every piece a client sends, and once more right before it is handed on: a
  node that lost its role in between hangs up.
- A unix socket appears under its name only when it is listening already, with mode 0600 from the first moment. The file
  of a daemon that died is replaced, that of one that lives is refused. Two that start at once cannot both win. At the
  end it is removed only if it is still ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mirrorpair.address import MAX_UNIX_PATH_BYTES, Address, TcpAddress, UnixAddress
from mirrorpair.endpoint import join_address
from mirrorpair.errors import LocalError, RefusedError, UsageError
from mirrorpair.handshake import GREETING, Abort, Go, ServerHandshake
from mirrorpair.listener import LineLimit
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mirrorpair.handshake import Event, Export

    Accept = Callable[[str, socket.socket, bytes], None]

DEADLINE_S = 10.0
NEGOTIATING_CAP = 100
CLIENT_CAP = 1024
BACKLOG = 1024  # all clients at once, when they come back after a failover
READ_BYTES = 4096  # so little at a time that even the answers to it are small
LOCK_S = 5.0
LOCK_RETRY_S = 0.005
RETRY_S = 0.2  # after an accept that found no descriptor or no memory
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}  # s, s, probes

_NO_RESOURCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class NbdServer:
    """Serves `exports` (looked up when a client asks, so it may change).

    `accept(volume, socket, leftover)` is called in the loop's thread with a client whose transmission phase begins: the
    socket is non-blocking, known to no loop, and the callee's to close; when it raises, the socket is closed here.
    `refusal()` is None to serve, else the sentence for clients. `clients()` is how many that were handed on are still
    there. `log` takes one line. None of these may block.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        exports: Mapping[str, Export],
        accept: Accept,
        *,
        refusal: Callable[[], str | None] = lambda: None,
        clients: Callable[[], int] = lambda: 0,
        log: Callable[[str], object],
        deadline_s: float = DEADLINE_S,
        negotiating_cap: int = NEGOTIATING_CAP,
        client_cap: int = CLIENT_CAP,
    ) -> None:
        self._wanted = list(addresses)
        self._exports = exports
        self._accept = accept
        self._refusal = refusal
        self._clients = clients
        self._log = LineLimit(log)
        self._deadline_s = deadline_s
        self._negotiating_cap = negotiating_cap
        self._client_cap = client_cap
        self._listeners: list[_Listener] = []
        self._retries: dict[_Listener, asyncio.TimerHandle] = {}
        self._negotiating: dict[asyncio.Task[bool], socket.socket] = {}  # in order of arrival

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, in the order that was asked for: of a name the address that was taken, of port 0 the real
        one."""
        return [listener.address for listener in self._listeners]

    @property
    def negotiating(self) -> int:
        """How many clients have not chosen a volume yet."""
        return len(self._negotiating)

    async def start(self) -> None:
        """All addresses or none. RefusedError: one is in use; UsageError: an unknown host; LocalError: it cannot be had
        for another reason."""
        try:
            for address in self._wanted:
                self._listeners.append(_listen(address))
        except BaseException:
            self._close_listeners()
            raise
        for listener in self._listeners:
            self._watch(listener)

    async def close(self) -> None:
        """May be called twice, and after a start that failed."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.socket)
        for retry in self._retries.values():
            retry.cancel()
        self._retries.clear()
        self._close_listeners()
        tasks = list(self._negotiating)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._log.flush()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _watch(self, listener: _Listener) -> None:
        self._retries.pop(listener, None)
        asyncio.get_running_loop().add_reader(listener.socket, self._welcome, listener)

    def _welcome(self, listener: _Listener) -> None:
        """Takes one client; the loop comes back for the next, after everybody else had a turn."""
        try:
            sock, _ = listener.socket.accept()
        except OSError as error:
            if error.errno in _NO_RESOURCE:
                self._log.line(f"nbd {listener.address}: cannot accept: {error.strerror}")
                # The client stays in the queue, and the loop would come back at once for it.
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener.socket)
                self._retries[listener] = loop.call_later(RETRY_S, self._watch, listener)
                self._dismiss_oldest(1)
            return  # anything else is about that one client, which is gone
        sock.setblocking(False)
        self._dismiss_oldest(self._negotiating_cap)
        task = asyncio.get_running_loop().create_task(self._negotiate(sock))
        self._negotiating[task] = sock
        task.add_done_callback(self._finished)

    def _dismiss_oldest(self, cap: int) -> None:
        """Makes room for one more."""
        busy = [task for task in self._negotiating if not task.cancelling()]
        for task in busy[: max(0, len(busy) - cap + 1)]:
            self._log.line(f"nbd client {_describe(self._negotiating[task])} turned away: room was needed for others")
            task.cancel()

    def _finished(self, task: asyncio.Task[bool]) -> None:
        """The one place where a socket that was not handed on is closed: a task cancelled early never ran."""
        sock = self._negotiating.pop(task)
        if task.cancelled():
            sock.close()
        elif (error := task.exception()) is not None:
            sock.close()
            self._log.line(f"nbd: a client could not be served: {printable(str(error) or repr(error), 300)}")
        elif not task.result():
            sock.close()

    async def _negotiate(self, sock: socket.socket) -> bool:
        """Whether the client was handed on."""
        name = _describe(sock)
        try:
            async with asyncio.timeout(self._deadline_s):
                event = await self._talk(sock)
        except TimeoutError:
            self._log.line(f"nbd client {name} turned away: it chose no volume within {self._deadline_s:g} s")
        except OSError as error:
            self._log.line(f"nbd client {name} was lost: {error.strerror}")
        else:
            if isinstance(event, Go):
                return self._hand_on(sock, name, event)
            if event.fault:
                self._log.line(f"nbd client {name} turned away: {event.reason}")
        return False

    async def _talk(self, sock: socket.socket) -> Event:
        loop = asyncio.get_running_loop()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose host died is noticed some day, and its place is free again.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        handshake = ServerHandshake(self._exports)
        await loop.sock_sendall(sock, GREETING)
        while True:
            data = await loop.sock_recv(sock, READ_BYTES)
            if not data:
                return Abort("it hung up", fault=False)
            handshake.refusal = self._why_not()
            said = handshake.feed(data)
            await loop.sock_sendall(sock, b"".join(item for item in said if isinstance(item, bytes)))
            if said and not isinstance(said[-1], bytes):
                return said[-1]

    def _hand_on(self, sock: socket.socket, name: str, go: Go) -> bool:
        reason = self._why_not()
        if reason is not None or go.export not in self._exports:
            self._log.line(f"nbd client {name} turned away: {reason or 'its volume is gone'}")
            return False
        self._log.line(f"nbd client {name} opens {printable(go.export)}")
        self._accept(go.export, sock, go.leftover)
        return True

    def _why_not(self) -> str | None:
        refusal = self._refusal()
        if refusal is None and self._clients() >= self._client_cap:
            return f"this node has {self._client_cap} clients already, which is all that it takes"
        return refusal


class _Listener:
    """A listening socket, and what has to be removed with it."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.socket = sock
        self.address = address
        self._identity = _identity(address)

    def close(self) -> None:
        # First the file: whoever comes now finds nothing, instead of somebody who hangs up.
        if isinstance(self.address, UnixAddress) and self._identity == _identity(self.address):
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)
        self.socket.close()


def _listen(address: Address) -> _Listener:
    return _listen_tcp(address) if isinstance(address, TcpAddress) else _listen_unix(address)


def _listen_tcp(address: TcpAddress) -> _Listener:
    host, port = address.host, address.port
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"nbd {address}: unknown host: {error}") from error
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(BACKLOG)
        return _Listener(sock, TcpAddress(*sock.getsockname()[:2]))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise RefusedError(
                f"nbd {address}: port {port} is in use, by another daemon of this node or by another server; "
                f"`ss -ltnp 'sport = :{port}'` shows by which"
            ) from error
        raise LocalError(f"nbd {address}: {error.strerror}") from error


def _listen_unix(address: UnixAddress) -> _Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        os.fchmod(sock.fileno(), 0o600)  # the file gets it at bind, so there is no moment of another mode
        _appear(sock, Path(address.path), f"nbd {address}")
        return _Listener(sock, address)
    except OSError as error:
        sock.close()
        raise LocalError(f"nbd {address}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise


def _appear(sock: socket.socket, path: Path, name: str) -> None:
    """Binds `sock` under another name, listens, and links it to `path`: a socket seen there answers, or its owner is
    dead. link() never replaces, so of two that start at once one gets the name."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LocalError(f"{name}: cannot use the folder {printable(str(path.parent))}: {error.strerror}") from error
    mine = f".{path.name}.{secrets.token_hex(4)}"
    try:
        # `ss -x` goes on showing the name of this bind, so it is one that a person recognises. Where it is too long, a
        # way round by /proc.
        shown = str(path.parent / mine)
        sock.bind(shown if len(os.fsencode(shown)) <= MAX_UNIX_PATH_BYTES else f"/proc/self/fd/{folder}/{mine}")
        try:
            sock.listen(BACKLOG)
            _link(folder, mine, path.name, name)
        finally:
            os.unlink(mine, dir_fd=folder)
    finally:
        os.close(folder)


def _link(folder: int, mine: str, file: str, name: str) -> None:
    try:
        os.link(mine, file, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        # Who finds a dead socket removes it under the folder's lock: what was looked at is what is removed.
        _lock(folder, name)
        _refuse_if_alive(folder, file, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file, dir_fd=folder)
        try:
            os.link(mine, file, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            raise RefusedError(f"{name}: another program began to listen there at the same moment") from None


def _lock(folder: int, name: str) -> None:
    """Until the folder is closed. Others hold it for a moment; not for ever, lest a stranger could stop us."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise RefusedError(f"{name}: another program holds the lock of the folder") from None
            time.sleep(LOCK_RETRY_S)
        else:
            return


def _refuse_if_alive(folder: int, file: str, name: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(file, dir_fd=folder).st_mode):
            raise RefusedError(f"{name}: a file that is no socket has this name; it is not touched")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(f"/proc/self/fd/{folder}/{file}")
    except (FileNotFoundError, ConnectionRefusedError):
        return
    except BlockingIOError:
        pass  # its queue is full: it lives
    raise RefusedError(
        f"{name}: a living process listens there already: another daemon of this node, or another server; "
        "stop it, or choose another path"
    )


def _identity(address: Address) -> tuple[int, int] | None:
    """Which file it is; None when there is none, as for TCP."""
    if isinstance(address, TcpAddress):
        return None
    try:
        found = os.lstat(address.path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _describe(sock: socket.socket) -> str:
    """Who is there, for the log."""
    try:
        if sock.family == socket.AF_UNIX:
            pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            return f"pid {pid} (uid {uid})"
        host, port = sock.getpeername()[:2]
    except OSError:
        return "that is gone"
    return join_address(host, port)
