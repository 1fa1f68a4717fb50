"""The daemon's side of its sentinel (sentinel.py): starts it, tells it whom to tell what, and keeps one running.

Rules:
- It is started before anything of the node is opened, and by an exec: of what is opened later, before it is started
  anew, it inherits nothing. So no lock outlives the daemon.
- A session is told to it before the first heartbeat goes out in it, so before the peer can promise anything in it.
- One that ends is a line in the log, and another one is started, soon, then less and less soon.
- Only a graceful end says good-bye, and reaps it. Whatever else ends the daemon is what it is there for.
- The daemon never waits for it: one that does not take what it is told is ended, by its own process object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec

from mirrorpair import sentinel
from mirrorpair.address import UnixAddress
from mirrorpair.peermessages import MAX_SESSIONS, Session, Watch
from mirrorpair.peersocket import Backoff
from mirrorpair.text import printable

if TYPE_CHECKING:
    from mirrorpair.address import Address
    from mirrorpair.liveness import Timing
    from mirrorpair.peermessages import Hello

AGAIN_S = (0.1, 60.0)
STEADY_S = 60.0  # of one that ran so long the next is started at once
LEAVE_S = 2.0
KEEP_S = (5.0, 60.0)
"""How long a dead daemon's sentinel tries to be heard: as long as the peer's promise may last, within these bounds."""

log = logging.getLogger("mirrorpair.node")


class Keeper:
    """`start`, `met` for every session, and `leave` at a graceful end."""

    def __init__(self, *, pair: str, node: str, process: str, peer: Address, timing: Timing) -> None:
        self._pair, self._node, self._number = pair, node, process
        self._address = [peer.path] if isinstance(peer, UnixAddress) else [peer.host, peer.port]
        self._keep_s = max(KEEP_S[0], min(KEEP_S[1], timing.obligation_ns(timing.promise_ns) / 1e9))
        self._sessions: list[Session] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._ended = asyncio.Event()
        self._backoff = Backoff(AGAIN_S, random.Random())
        self._keeping: asyncio.Task[None] | None = None
        self.linked = False
        """its connection to the peer stands"""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Of the running event loop. Never raises: without one the daemon works as well, and is looked after later."""
        self._spawn()
        self._keeping = asyncio.get_running_loop().create_task(self._keep())

    def met(self, mine: Hello) -> None:
        """The peer has accepted this hello of ours."""
        self._sessions.insert(0, Session(session=mine.session, incarnation=mine.incarnation))
        del self._sessions[MAX_SESSIONS:]
        self._tell()

    async def leave(self) -> None:
        """A graceful end: nothing is to be reported. When this returns it is gone."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._process is None:
            return
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(sentinel.BYE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._ended.wait()
        if not self._ended.is_set():
            log.warning("the sentinel does not end: it is killed")
            self._process.kill()
            await self._ended.wait()
        self._reap()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            if self._process is not None:
                await self._ended.wait()
                code = self._reap()
                log.warning("the sentinel of this node ended (%s): another one is started", _shown(code))
            if loop.time() - began > STEADY_S:
                self._backoff.reset()
            await asyncio.sleep(self._backoff.delay())
            self._spawn()

    def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended.clear()
        try:
            process, end, channel = self._start()
        except OSError as error:
            log.warning("no sentinel can be started: %s", error)
            return
        self._process, self._channel = process, channel
        loop.add_reader(end, self._gone, end)
        loop.add_reader(channel, self._hear, channel)
        log.info("the sentinel of this node runs, process %d", process.pid)
        self._tell()

    def _start(self) -> tuple[subprocess.Popen[bytes], int, socket.socket]:
        """The process, what tells its end, and the channel to it. OSError: nothing is left behind."""
        with contextlib.ExitStack() as stack:
            channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(channel.close)
            channel.setblocking(False)
            with theirs:
                me = os.pidfd_open(os.getpid())
                try:
                    process = self._popen(theirs.fileno(), me)
                finally:
                    os.close(me)
            stack.callback(process.wait)
            stack.callback(process.kill)
            end = os.pidfd_open(process.pid)
            stack.pop_all()
        return process, end, channel

    def _popen(self, channel: int, me: int) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        words = [str(channel), str(me), str(os.getpid()), f"sentinel of {self._node}"]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(sentinel.__file__), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(channel, me),
            start_new_session=True,
            cwd="/",
            env=environment,
        )

    def _gone(self, end: int) -> None:
        asyncio.get_running_loop().remove_reader(end)
        os.close(end)
        self._ended.set()

    def _reap(self) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        self._hang_up()
        return process.wait()

    def _hang_up(self) -> None:
        self.linked = False
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
            self._channel = None

    def _tell(self) -> None:
        if self._channel is None or not self._sessions:
            return
        watch = Watch(pair=self._pair, node=self._node, process=self._number, sessions=self._sessions)
        facts = {"address": self._address, "watch": msgspec.to_builtins(watch), "keep_s": self._keep_s}
        try:
            self._channel.send(json.dumps(facts).encode())
        except BlockingIOError:
            log.warning("the sentinel of this node does not listen: it is killed")
            assert self._process is not None
            self._process.kill()
        except OSError:
            self._hang_up()  # it has just ended

    def _hear(self, channel: socket.socket) -> None:
        try:
            word = channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if not word:
            self._hang_up()
        elif word in (sentinel.LINKED, sentinel.UNLINKED):
            self.linked = word == sentinel.LINKED
            log.info("the sentinel of this node is %sconnected", "" if self.linked else "not ")
        else:
            log.error("the sentinel of this node: %s", printable(word.decode("utf-8", "replace"), 500))


def _shown(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
