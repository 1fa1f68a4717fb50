"""What systemd is told of a daemon's state (sd_notify), if it asked for it."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """`READY=1` and the like, to the socket that $NOTIFY_SOCKET names. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(state.encode())
