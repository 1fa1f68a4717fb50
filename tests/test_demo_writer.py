"""The demo's clients against a server that says what it is told to: what they enter into the journal, what they call a
problem, and that they find who serves."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from typing import TYPE_CHECKING, Self

import pytest

from mirrorpair.demo.journal import BLOCK, Journal, load, origin
from mirrorpair.demo.writer import Clients
from mirrorpair.handshake import (
    FIXED_NEWSTYLE,
    INFO_EXPORT,
    INIT_MAGIC,
    NO_ZEROES,
    OPT_GO,
    OPTION_MAGIC,
    REP_ACK,
    REP_ERR_POLICY,
    REP_INFO,
    REPLY_HEADER,
    REPLY_MAGIC,
)
from mirrorpair.nbdclient import CMD_READ, CMD_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1024 * BLOCK
LIMIT_S = 60.0
HOLD, DROP = -1, -2


class Server:
    """Answers the n-th write of all (from 1) with the error `judge(n)`; HOLD: not at all; DROP: it hangs up instead. As
    long as it does not serve, it refuses the export, as a secondary does."""

    def __init__(self, path: Path, judge: Callable[[int], int], data: bytearray, *, serves: bool = True) -> None:
        self.path = path
        self.serves = serves
        self.writes = 0
        self.refused = threading.Event()
        self.dropped = threading.Event()
        self._judge = judge
        self._data = data
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(LIMIT_S)
        self.hang_up()

    def hang_up(self) -> None:
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as stream:
            try:
                self._talk(sock, lambda count: _exactly(stream.read(count), count))
            except (OSError, EOFError):
                return

    def _talk(self, sock: socket.socket, take: Callable[[int], bytes]) -> None:
        sock.sendall(INIT_MAGIC + OPTION_MAGIC + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES))
        take(4)
        take(struct.unpack(">8sII", take(16))[2])
        if not self.serves:
            sock.sendall(REPLY_HEADER.pack(REPLY_MAGIC, OPT_GO, REP_ERR_POLICY, 0))
            self.refused.set()
            return
        export = struct.pack(">HQH", INFO_EXPORT, SIZE, 1)
        sock.sendall(REPLY_HEADER.pack(REPLY_MAGIC, OPT_GO, REP_INFO, len(export)) + export)
        sock.sendall(REPLY_HEADER.pack(REPLY_MAGIC, OPT_GO, REP_ACK, 0))
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", take(28))
            if command == CMD_READ:
                with self._lock:
                    data = bytes(self._data[offset : offset + length])
                sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + data)
            elif command == CMD_WRITE:
                payload = take(length)
                with self._lock:
                    self.writes += 1
                    error = self._judge(self.writes)
                    if error in (0, HOLD):
                        self._data[offset : offset + length] = payload
                if error == DROP:
                    self.dropped.set()
                    return
                if error != HOLD:
                    sock.sendall(struct.pack(">IIQ", 0x67446698, error, cookie))
            else:
                return


def _exactly(data: bytes, count: int) -> bytes:
    if len(data) < count:
        raise EOFError
    return data


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal", 3, SIZE) as made:
        yield made


def clients(journal: Journal, *paths: Path) -> Clients:
    return Clients(paths, journal, writers=2, depth=4, per_second=5000.0)


def until(holds: Callable[[], bool]) -> None:
    """Looks again and again, to a limit that only a hang reaches."""
    tick = threading.Event()
    for _ in range(int(LIMIT_S / 0.01)):
        if holds():
            return
        tick.wait(0.01)
    raise AssertionError("it never comes to that")


def test_what_is_acknowledged_is_there_and_what_is_in_flight_is_waited_for(journal: Journal, tmp_path: Path) -> None:
    data = bytearray(SIZE)
    with Server(tmp_path / "a", lambda _: 0, data), clients(journal, tmp_path / "a") as all_of_them:
        until(lambda: journal.acknowledged >= 300 and all_of_them.reader.reads >= 10)
        assert all_of_them.leave() == []
        assert (all_of_them.problems, all_of_them.reader.wrong) == ([], [])
    journal.flush()
    ledger = load(tmp_path / "journal")
    assert (ledger.unanswered, ledger.acknowledged) == (0, journal.sent)
    least = ledger.bounds(0, SIZE // BLOCK).least
    found = [origin(3, at, bytes(data[at * BLOCK : (at + 1) * BLOCK])) for at in range(SIZE // BLOCK)]
    assert found == least


def test_a_client_finds_the_other_node_and_repeats_nothing(journal: Journal, tmp_path: Path) -> None:
    data = bytearray(SIZE)
    with (
        Server(tmp_path / "a", lambda n: DROP if n > 100 else 0, data) as first,
        Server(tmp_path / "b", lambda _: 0, data, serves=False) as second,
        clients(journal, tmp_path / "a", tmp_path / "b") as all_of_them,
    ):
        first.dropped.wait(LIMIT_S)
        first.serves = False
        first.hang_up()
        assert second.refused.wait(LIMIT_S)
        journal.mark()
        second.serves = True
        until(lambda: journal.since_mark()[1] >= 100)
        assert all_of_them.leave() == []
        assert all_of_them.problems == []
    assert second.writes >= 100
    assert 1 <= journal.unanswered <= journal.sent - journal.acknowledged
    assert journal.sent == journal.acknowledged + journal.unanswered


def test_while_nobody_serves_a_client_waits(journal: Journal, tmp_path: Path) -> None:
    with (
        Server(tmp_path / "a", lambda n: DROP if n > 10 else 0, bytearray(SIZE)) as server,
        clients(journal, tmp_path / "a") as all_of_them,
    ):
        server.dropped.wait(LIMIT_S)
        server.serves = False
        server.hang_up()
        server.refused.clear()
        assert server.refused.wait(LIMIT_S)
        longest = all_of_them.longest_stall_s()
        until(lambda: all_of_them.longest_stall_s() >= longest + 0.2)
        assert all_of_them.leave() == []


def test_an_answer_that_is_an_error_is_a_problem(journal: Journal, tmp_path: Path) -> None:
    with (
        Server(tmp_path / "a", lambda n: errno.EIO if n == 50 else 0, bytearray(SIZE)),
        clients(journal, tmp_path / "a") as all_of_them,
    ):
        until(lambda: bool(all_of_them.problems))
        assert len(all_of_them.problems) == 1
        assert "answered with an error" in all_of_them.problems[0]


def test_one_that_shuts_down_says_so_without_being_blamed(journal: Journal, tmp_path: Path) -> None:
    with (
        Server(tmp_path / "a", lambda n: errno.ESHUTDOWN if n == 50 else 0, bytearray(SIZE)),
        clients(journal, tmp_path / "a") as all_of_them,
    ):
        until(lambda: journal.acknowledged >= 200)
        assert all_of_them.leave() == []
        assert all_of_them.problems == []
    assert journal.unanswered >= 1


class Forgetful(bytearray):
    """Takes everything and stays as it is."""

    def __setitem__(self, *_: object) -> None:
        pass


def test_a_read_of_what_is_older_than_acknowledged_is_found(journal: Journal, tmp_path: Path) -> None:
    with (
        Server(tmp_path / "a", lambda _: 0, Forgetful(SIZE)),
        clients(journal, tmp_path / "a") as all_of_them,
    ):
        until(lambda: bool(all_of_them.reader.wrong))
        wrong = all_of_them.reader.wrong[0]
    assert (wrong.found, wrong.least > 0) == (0, True)


def test_deeper_ones_send_more_while_nothing_is_answered(journal: Journal, tmp_path: Path) -> None:
    with (
        Server(tmp_path / "a", lambda _: HOLD, bytearray(SIZE)),
        clients(journal, tmp_path / "a") as all_of_them,
    ):
        until(lambda: journal.sent == 2 * 4)
        journal.mark()
        all_of_them.deepen(8)
        until(lambda: journal.since_mark() == (2 * 4, 0))
    assert (journal.acknowledged, journal.unanswered) == (0, 16)
