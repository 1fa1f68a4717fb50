"""A daemon that is told to end: once is enough, and twice does no harm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from mirrorpair.service import notify

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_S = 30.0

# Waits for a wish to end, then for a line, and is told again before and after the loop is closed.
DAEMON = """
import asyncio, sys
from mirrorpair.service import Termination
async def main():
    with Termination() as termination:
        print("ready", flush=True)
        await termination.asked.wait()
        print("asked", flush=True)
        sys.stdin.readline()
    print("left", flush=True)
    sys.stdin.readline()
    return 7
code = asyncio.run(main())
print("closed", flush=True)
sys.stdin.readline()
sys.exit(code)
"""


def test_a_second_wish_to_end_does_not_turn_a_clean_end_into_a_kill() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            [sys.executable, "-c", DAEMON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as daemon:
            assert daemon.stdin is not None
            assert daemon.stdout is not None
            for word in ("ready", "asked", "left", "closed"):
                assert daemon.stdout.readline() == f"{word}\n"
                daemon.send_signal(number)
                if word != "ready":
                    daemon.stdin.write("\n")
                    daemon.stdin.flush()
            assert daemon.wait(LIMIT_S) == 7


def test_systemd_is_told_and_a_socket_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        for place in (str(tmp_path / "notify"), str(tmp_path / "nobody"), "nonsense", ""):
            os.environ["NOTIFY_SOCKET"] = place
            try:
                notify("READY=1")
            finally:
                del os.environ["NOTIFY_SOCKET"]
        assert sock.recv(100) == b"READY=1"
        sock.setblocking(False)
        assert not _more(sock)


def _more(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(100))
    except BlockingIOError:
        return False
