"""The sentinel: a small process of its own that tells the peer when its daemon has ended, however that happened (A11).

`mirrorpair run` starts it (nodesentinel.py) as `python -I -S sentinel.py`, so it is made of a fresh address space and
the standard library alone: no image, no lock, no socket of the daemon is open here, and a few MiB are all it needs.

    daemon  --facts (whom to tell, as whom), "bye"-->  sentinel  --watch ... died-->  the peer's daemon
            --its end, by a pidfd that it gave------>

Rules:
- Death is what the pidfd says, and nothing else: it is readable only when no thread of the daemon is left, so nothing
  of it can follow. A daemon that is stopped, hangs or closes its end of the channel is alive.
- The connection to the peer stands before it is needed, and is made again when it breaks. What the daemon said last is
  read before the report is written: it says each session before the peer can promise anything in it.
- "bye" means a graceful end: there is nothing to report.
- It ends when the peer has answered, or when nobody can be told any more: after `keep_s`, by when the promise is over
  anyway. Signals that a terminal or systemd sends to all are the daemon's; once that is gone they hurry it.
- It says nothing anywhere but to those two, and holds nobody's terminal or pipe open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PREAMBLE = b"mirrorpair sen\r\n"
BYE = b"bye"
LINKED = b"linked"
UNLINKED = b"unlinked"
MAX_FACTS = 1 << 16
MAX_LINE = 1 << 14
CONNECT_S = 3.0  # to a connection that the peer has accepted
REPLY_S = 1.0
RETRY_S = (0.05, 10.0)  # from the least again with each new session of the daemon
HASTE_S = (0.01, 0.2)  # the same after the death
HURRY_S = 1.0  # told to end while it reports
TURN_S = 0.5

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


class Sentinel:
    """`channel`: the daemon's words, one a packet. `pidfd`: the daemon; `pid` the same, for its exit status."""

    def __init__(self, channel: socket.socket, pidfd: int, pid: int) -> None:
        self._channel: socket.socket | None = channel
        self._pidfd = pidfd
        self._pid = pid
        self._begun = _begun(pid)
        self._facts: dict[str, object] = {}
        self._dead = False
        self._over = False
        self._until = 0.0
        self._sock: socket.socket | None = None
        self._connecting = False
        self._ready = False
        self._input = b""
        self._limit = 0.0
        """when the connection, or the answer that it owes, is given up"""
        self._retry = RETRY_S[0]
        self._next = 0.0
        self._attempts = 0
        channel.setblocking(False)

    def run(self) -> None:
        """Until there is nothing more to do."""
        while not self._over:
            self._turn()
        self._close()

    def hurry(self, *_: object) -> None:
        self._until = min(self._until, time.monotonic() + HURRY_S)

    def _turn(self) -> None:
        poll = select.poll()
        if self._channel is not None:
            poll.register(self._channel, select.POLLIN)
        if not self._dead:
            poll.register(self._pidfd, select.POLLIN)
        if self._sock is not None:
            poll.register(self._sock, select.POLLOUT if self._connecting else select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._patience())}
        if self._channel is not None and self._channel.fileno() in ready:
            self._listen()
        if not self._dead and self._pidfd in ready:
            self._died()
        if self._sock is not None and self._sock.fileno() in ready:
            self._peer()
        now = time.monotonic()
        if self._dead and now >= self._until:
            self._over = True
        elif self._sock is not None and self._limit and now >= self._limit:
            self._lost()
        elif self._sock is None and self._wanted() and now >= self._next:
            self._connect()

    def _patience(self) -> float | None:
        """Milliseconds; None: nothing is due."""
        due = [self._limit] if self._sock is not None and self._limit else []
        if self._sock is None and self._wanted():
            due.append(self._next)
        if self._dead:
            due += [self._until, time.monotonic() + TURN_S]  # a signal may have changed it
        return max(0.0, min(due) - time.monotonic()) * 1000 + 1 if due else None

    # --- the daemon

    def _listen(self) -> None:
        """Everything that it has said. Its end of the channel may be closed before it is dead."""
        while self._channel is not None and not self._over:
            try:
                word = self._channel.recv(MAX_FACTS)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                word = b""
            if word == BYE:
                self._over = True
            elif word:
                self._facts = json.loads(word)
                self._retry, self._next = RETRY_S[0], 0.0
            else:
                self._channel.close()
                self._channel = None

    def _died(self) -> None:
        self._listen()
        self._dead = True
        if self._over or not self._wanted():
            self._over = True
            return
        keep = self._facts["keep_s"]
        assert isinstance(keep, float)
        self._until = time.monotonic() + keep
        for number in _SIGNALS:
            signal.signal(number, self.hurry)
        self._retry, self._next = HASTE_S[0], 0.0
        self._facts["status"] = _status(self._pid, self._begun)
        if self._ready:
            self._report()

    def _tell(self, word: bytes) -> None:
        if self._channel is not None and not self._dead:
            with contextlib.suppress(OSError):
                self._channel.send(word)

    # --- the peer

    def _wanted(self) -> bool:
        """Nobody is to be told who was never met."""
        return bool(self._facts.get("watch"))

    def _connect(self) -> None:
        self._limit = time.monotonic() + CONNECT_S
        self._input = b""
        try:
            family, where = self._where()
            self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            if family != socket.AF_UNIX:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _KEEPALIVE:
                    self._sock.setsockopt(socket.IPPROTO_TCP, option, value)
            code = self._sock.connect_ex(where)
        except OSError:
            self._lost()
            return
        if code not in (0, errno.EINPROGRESS):
            self._lost()
            return
        self._connecting = True

    def _where(self) -> tuple[int, Any]:
        """Of a host's several addresses the next one each time."""
        address = self._facts["address"]
        assert isinstance(address, list)
        if len(address) == 1:
            return socket.AF_UNIX, address[0]
        # As bytes: for text Python would load the tables of international names.
        found = socket.getaddrinfo(address[0].encode(), address[1], type=socket.SOCK_STREAM)
        family, _, _, _, where = found[self._attempts % len(found)]
        return family, where

    def _peer(self) -> None:
        assert self._sock is not None
        if self._connecting:
            self._connecting = False
            if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._lost()
            else:
                self._send(PREAMBLE + _line(self._facts["watch"]))
            return
        try:
            piece = self._sock.recv(MAX_LINE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            piece = b""
        *lines, self._input = (self._input + piece).split(b"\n")
        if not piece or len(self._input) > MAX_LINE:
            self._lost()
            return
        for line in lines:
            if self._sock is not None:
                self._word(_kind(line))

    def _word(self, kind: object) -> None:
        if kind == "ready" and not self._ready:
            self._ready = True
            self._limit = 0.0
            self._retry = RETRY_S[0]
            self._tell(LINKED)
            if self._dead:
                self._report()
        elif kind == "reply" and self._ready and self._dead:
            self._over = True
        else:  # refused, or nothing that this end knows
            self._lost()

    def _report(self) -> None:
        self._limit = time.monotonic() + REPLY_S
        watch = self._facts["watch"]
        assert isinstance(watch, dict)
        self._send(_line({"t": "died", "sessions": watch["sessions"], "status": self._facts["status"]}))

    def _send(self, data: bytes) -> None:
        """A few hundred bytes always fit a connection's buffer; one that does not take them is broken."""
        assert self._sock is not None
        try:
            if self._sock.send(data) == len(data):
                return
        except OSError:
            pass
        self._lost()

    def _lost(self) -> None:
        if self._ready:
            self._tell(UNLINKED)
        self._close()
        self._attempts += 1
        self._next = time.monotonic() + self._retry
        self._retry = min(self._retry * 2, (HASTE_S if self._dead else RETRY_S)[1])

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        self._connecting = self._ready = False
        self._limit = 0.0


def _line(word: object) -> bytes:
    return json.dumps(word, ensure_ascii=False).encode() + b"\n"


def _kind(line: bytes) -> object:
    """What kind of word the peer sent; None if it is none."""
    try:
        word = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return word.get("t") if isinstance(word, dict) else None


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat behind the name, or nothing: its state, ..., at 19 when it began, at the end its exit status."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _begun(pid: int) -> str | None:
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else None


def _status(pid: int, begun: str | None) -> int | None:
    """As subprocess has it: an exit code, or a signal's number negated. None: its parent was quicker."""
    fields = _stat(pid)
    if len(fields) < 50 or fields[0] != "Z" or begun is None or fields[19] != begun:
        return None
    status = int(fields[49])
    return (-(status & 0x7F) if status & 0x7F else status >> 8) or None


def main(argv: list[str]) -> int:
    """`sentinel.py CHANNEL PIDFD PID NAME`: two open descriptors, the daemon's number, and a name for `ps`."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=int(argv[1]))
    sentinel = Sentinel(channel, int(argv[2]), int(argv[3]))
    try:
        sentinel.run()
    except Exception as error:  # noqa: BLE001 - the daemon has a log, this has none
        with contextlib.suppress(OSError):
            channel.send(f"{type(error).__name__}: {error}".encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
