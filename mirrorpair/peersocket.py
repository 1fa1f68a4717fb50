"""The sockets between two nodes: listening, dialling with a preamble, and how long to wait before dialling again.

Rules:
- A unix socket that nobody listens on any more is replaced; one that somebody answers, or a file that is no socket, is
  refused. New ones are for their owner alone (0600).
- Errors of listening are RefusedError (in use) and UsageError (cannot be bound), those of dialling OSError.
- The log about strangers has a few lines a second at the most; what is left out is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections import deque
from typing import TYPE_CHECKING

from mirrorpair.address import Address, UnixAddress
from mirrorpair.errors import RefusedError, UsageError
from mirrorpair.transport import tune_socket

if TYPE_CHECKING:
    import random

CONNECT_S = 5.0
BACKLOG = 64
LINES_PER_S = 3

log = logging.getLogger("mirrorpair.peer")


class Backoff:
    """How long to wait before the next attempt, in seconds."""

    def __init__(self, bounds: tuple[float, float], rng: random.Random) -> None:
        self._least, self._most = bounds
        self._rng = rng
        self._next = self._least

    def reset(self) -> None:
        self._next = self._least

    def delay(self) -> float:
        """At least half of what it grows by, so that two nodes do not fall into step."""
        now = self._next
        self._next = min(self._most, now * 2)
        return now * self._rng.uniform(0.75, 1.0)


class LineLimit:
    """At most so many lines a second about strangers; the rest is counted."""

    def __init__(self) -> None:
        self._times: deque[int] = deque(maxlen=LINES_PER_S)
        self._left_out = 0

    def line(self, text: str, now: int) -> None:
        if len(self._times) == LINES_PER_S and now - self._times[0] < 10**9:
            self._left_out += 1
            return
        more, self._left_out = self._left_out, 0
        self._times.append(now)
        log.info("%s%s", text, f" ({more} more such lines left out)" if more else "")


async def connect(address: Address, preamble: bytes) -> socket.socket:
    """OSError, which TimeoutError is too."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        if isinstance(address, UnixAddress):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, address.path)
                await loop.sock_sendall(sock, preamble)
            except BaseException:
                sock.close()
                raise
            return sock
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        last: OSError | None = None
        for family, kind, protocol, _, where in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, where)
                tune_socket(sock)
                await loop.sock_sendall(sock, preamble)
                return sock
            except OSError as error:
                sock.close()
                last = error
            except BaseException:
                sock.close()
                raise
        raise last or OSError(errno.EADDRNOTAVAIL, f"{address.host} has no address")


async def bind(address: Address, daemon: str = "daemon of this node") -> socket.socket:
    """A socket that listens. `daemon`: what may have the address already. RefusedError, UsageError."""
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await _bind_unix(sock, address, daemon)
        except BaseException:
            sock.close()
            raise
    else:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise UsageError(f"cannot listen on {address}: {error.strerror}") from error
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise RefusedError(f"cannot listen on {address}: another program, or another {daemon}, does") from error
            raise UsageError(f"cannot listen on {address}: {error.strerror}; is it an address of this host?") from error
    sock.setblocking(False)
    sock.listen(BACKLOG)
    return sock


async def _bind_unix(sock: socket.socket, address: UnixAddress, daemon: str) -> None:
    """A socket that nobody listens on any more is a leftover of a dead daemon and is replaced."""
    path = address.path
    loop = asyncio.get_running_loop()
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise RefusedError(f"{address} is a file that is no socket; it is not replaced")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                async with asyncio.timeout(1.0):
                    await loop.sock_connect(probe, path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError as error:
                raise RefusedError(f"cannot tell whether somebody listens on {address}: {error}") from error
            else:
                raise RefusedError(f"somebody listens on {address} already: is another {daemon} running?")
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file gets it at bind, so there is no moment of another mode
        sock.bind(path)
    except OSError as error:
        raise UsageError(f"cannot listen on {address}: {error.strerror}") from error
