"""A daemon's manners: it ends when it is told to, and tells systemd how it is (sd_notify), if asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Termination:
    """From here on SIGTERM and SIGINT are a wish: `asked` is set. A context manager of the running event loop; once it
    is left they are ignored, since the end is near: a second one must not turn a clean end into a kill. (The loop's own
    handlers would be taken out at its close, with the default in their place.)"""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            signal.signal(number, self._told)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _told(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.asked.set)


def notify(state: str) -> None:
    """`READY=1` and the like, to the socket that $NOTIFY_SOCKET names. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(state.encode())
