"""The sentinel as a process: it watches one that the test made, and reports to a peer that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest
from farside import LIMIT_S
from test_peerlink import Node

from mirrorpair import nodesentinel, sentinel
from mirrorpair.address import Address, TcpAddress, UnixAddress
from mirrorpair.liveness import Timing
from mirrorpair.nodesentinel import Keeper
from mirrorpair.peermessages import PREAMBLE_SENTINEL, Died, Session, Watch, decode_sentinel_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

FIRST = {"session": "51", "incarnation": {"id": "1", "n": 0}}
SECOND = {"session": "52", "incarnation": {"id": "1", "n": 3}}


def watch(*sessions: dict[str, Any]) -> dict[str, Any]:
    return {
        "t": "watch",
        "magic": "mirrorpair-peer",
        "pair": "shop",
        "node": "alpha",
        "process": "aa",
        "sessions": list(sessions),
    }


def readable(what: Any) -> None:
    happened, _, _ = select.select([what], [], [], LIMIT_S)
    assert happened, "nothing happens"


class Peer:
    """Who is told, on a unix socket or a TCP port of this host."""

    def __init__(self, folder: Path, *, tcp: bool = False, listen: bool = True) -> None:
        self.socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self.socket.bind(("127.0.0.1", 0) if tcp else str(folder / "peer"))
        name = self.socket.getsockname()
        self.address = list(name) if tcp else [name]
        self.links: list[Link] = []
        if listen:
            self.socket.listen()

    def accept(self, *, answer: bytes = b'{"t":"ready"}\n') -> Link:
        """The next connection, introduced and answered."""
        readable(self.socket)
        link = Link(self.socket.accept()[0])
        self.links.append(link)
        assert link.read(len(PREAMBLE_SENTINEL)) == PREAMBLE_SENTINEL
        assert decode_sentinel_line(link.line()) == msgspec.convert(watch(FIRST), Watch)
        link.say(answer)
        return link

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        for link in self.links:
            link.close()


class Link:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(LIMIT_S)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := self.sock.recv(count - len(data))):
            data += piece
        return data

    def line(self) -> bytes:
        """Empty: it hung up."""
        line = b""
        while not line.endswith(b"\n") and (piece := self.sock.recv(1)):
            line += piece
        return line

    def died(self) -> Died:
        word = decode_sentinel_line(self.line())
        assert isinstance(word, Died)
        return word

    def say(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def close(self) -> None:
        self.sock.close()


class Rig:
    """A daemon that waits to be killed, and its sentinel."""

    def __init__(self, address: list[Any], **facts: Any) -> None:
        self.daemon = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(LIMIT_S)
        self._end = os.pidfd_open(self.daemon.pid)
        words = [str(theirs.fileno()), str(self._end), str(self.daemon.pid), "sentinel of alpha"]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", sentinel.__file__, *words], pass_fds=(theirs.fileno(), self._end)
        )
        theirs.close()
        self.facts: dict[str, Any] = {"address": address, "watch": watch(FIRST), "keep_s": LIMIT_S, **facts}
        self.tell()

    def tell(self, **changes: Any) -> None:
        self.facts |= changes
        self.channel.send(json.dumps(self.facts).encode())

    def until(self, word: bytes) -> None:
        """It has told its daemon so."""
        while self.channel.recv(4096) != word:
            pass

    def kill(self) -> None:
        """Not reaped: whoever wants can see how it ended."""
        self.daemon.kill()
        readable(self._end)

    def ended(self) -> int:
        return self.process.wait(LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.process, self.daemon):
            process.kill()
            process.wait()
        assert self.daemon.stdin is not None
        self.daemon.stdin.close()
        self.channel.close()
        os.close(self._end)


@pytest.fixture(params=["unix", "tcp"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peer]:
    with Peer(tmp_path, tcp=request.param == "tcp") as made:
        yield made


def answered(link: Link) -> None:
    link.say(b'{"t":"reply","id":0,"result":"noted"}\n')


# --- what it says


def test_a_killed_daemon_is_reported_over_the_connection_that_stood_before(peer: Peer) -> None:
    with Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        rig.kill()
        life = msgspec.convert(FIRST, Session)
        assert link.died() == Died(sessions=[life], status=-signal.SIGKILL)
        answered(link)
        assert rig.ended() == 0
        assert link.line() == b""


def test_how_the_daemon_ended_is_said_if_it_can_be_known(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        rig.daemon.terminate()
        assert link.died().status == -signal.SIGTERM
    with Peer(tmp_path, tcp=True) as peer, Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        os.kill(rig.process.pid, signal.SIGSTOP)
        rig.kill()
        rig.daemon.wait()  # its parent was quicker
        os.kill(rig.process.pid, signal.SIGCONT)
        assert link.died().status is None


def test_a_daemon_that_is_stopped_or_closes_its_channel_is_not_dead(peer: Peer) -> None:
    """What makes it speak again, a lost connection, shows that it has looked since."""
    with Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        rig.daemon.send_signal(signal.SIGSTOP)
        rig.channel.shutdown(socket.SHUT_RDWR)
        link.close()
        link = peer.accept()
        link.close()
        link = peer.accept()
        assert rig.process.poll() is None
        rig.kill()
        assert link.died().status == -signal.SIGKILL
        answered(link)
        assert rig.ended() == 0


def test_good_bye_is_no_death(peer: Peer) -> None:
    with Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        rig.channel.send(sentinel.BYE)
        assert rig.ended() == 0
        assert link.line() == b""


def test_what_the_daemon_said_last_counts_also_a_good_bye(peer: Peer) -> None:
    with Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        os.kill(rig.process.pid, signal.SIGSTOP)
        rig.tell(watch=watch(SECOND, FIRST))
        rig.kill()
        os.kill(rig.process.pid, signal.SIGCONT)
        assert [life.session for life in link.died().sessions] == ["52", "51"]
    with Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        os.kill(rig.process.pid, signal.SIGSTOP)
        rig.channel.send(sentinel.BYE)
        rig.kill()
        os.kill(rig.process.pid, signal.SIGCONT)
        assert rig.ended() == 0
        assert link.line() == b""


# --- when it does not go smoothly


def test_a_connection_that_breaks_is_made_again_and_so_is_one_that_is_refused(peer: Peer) -> None:
    with Rig(peer.address) as rig:
        peer.accept(answer=b'{"t":"refused","code":12,"message":"never here"}\n')
        link = peer.accept()
        rig.until(sentinel.LINKED)
        link.close()
        rig.until(sentinel.UNLINKED)
        link = peer.accept()
        rig.until(sentinel.LINKED)
        rig.kill()
        link.died()


@pytest.mark.parametrize("said", [b"\xff\n", b"[" * 5000 + b"\n", b"1\n", b"x" * (1 << 16), b'{"t":"hello"}\n'])
def test_a_peer_that_speaks_something_else_is_left_and_tried_again(tmp_path: Path, said: bytes) -> None:
    with Peer(tmp_path) as peer, Rig(peer.address) as rig:
        link = peer.accept(answer=said)
        with contextlib.suppress(ConnectionResetError):
            assert link.line() == b""
        link = peer.accept()
        rig.kill()
        link.died()


def test_a_report_without_an_answer_is_sent_again(peer: Peer) -> None:
    with Rig(peer.address) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        rig.kill()
        first = link.died()
        link.close()
        link = peer.accept()
        assert link.died() == first
        # One that is there and silent as well.
        again = peer.accept()
        assert again.died() == first
        answered(again)
        assert rig.ended() == 0


def test_a_peer_that_comes_only_now_is_told_all_the_same(tmp_path: Path) -> None:
    with Peer(tmp_path, tcp=True, listen=False) as peer, Rig(peer.address) as rig:
        rig.kill()
        peer.socket.listen()
        link = peer.accept()
        link.died()


def test_who_was_met_never_is_told_nothing(peer: Peer) -> None:
    with Rig(peer.address, watch=None) as rig:
        rig.kill()
        assert rig.ended() == 0
        peer.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.socket.accept()


def test_it_does_not_outlive_its_purpose(tmp_path: Path) -> None:
    with Peer(tmp_path, listen=False) as peer, Rig(peer.address, keep_s=0.05) as rig:
        rig.kill()
        assert rig.ended() == 0
    with Peer(tmp_path, tcp=True) as peer, Rig(peer.address, keep_s=0.05) as rig:  # there, and silent
        rig.kill()
        assert rig.ended() == 0


def test_the_signals_of_a_terminal_or_of_systemd_are_the_daemons_until_it_is_gone(peer: Peer) -> None:
    with Rig(peer.address, keep_s=3600.0) as rig:
        link = peer.accept()
        rig.until(sentinel.LINKED)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            rig.process.send_signal(number)
        link.close()
        link = peer.accept()
        peer.socket.close()
        rig.kill()
        link.died()
        rig.process.send_signal(signal.SIGTERM)
        assert rig.ended() == 0


# --- the daemon's side


def keeper(address: Address) -> Keeper:
    timing = Timing(interval_ns=10**8, promise_ns=10**9, suspect_after=4)
    return Keeper(pair="shop", node="alpha", process="aa", peer=address, timing=timing)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work

    asyncio.run(bounded())


async def until(holds: Callable[[], Any]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def test_it_is_started_with_nothing_of_the_daemons_and_ends_with_it(
    tmp_path: Path, open_descriptors: Callable[[], set[int]]
) -> None:
    async def scenario() -> None:
        one = keeper(UnixAddress(str(tmp_path / "peer")))
        with (tmp_path / "image").open("wb") as image:
            os.set_inheritable(image.fileno(), True)
            one.start()
            pid = one.pid
            assert pid is not None
            one.met(Node("alpha", "beta", process="aa").hello("51"))
            peer = await asyncio.to_thread(Peer, tmp_path)
            with peer:
                await asyncio.to_thread(peer.accept)
                await until(lambda: one.linked)
                assert os.getsid(pid) == os.getpgid(pid) == pid
                opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                kinds = sorted("pidfd" if "pidfd" in name else name.partition(":")[0] for name in opened)
                # To the daemon and to the peer; its end; nothing of a terminal or a pipe.
                assert kinds == [*["/dev/null"] * 3, "pidfd", "socket", "socket"]
                assert os.readlink(f"/proc/{pid}/cwd") == "/"
                await one.leave()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    before = open_descriptors()
    run(scenario())
    assert open_descriptors() == before


def test_one_that_dies_is_replaced_and_the_new_one_knows_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        one = keeper(UnixAddress(str(tmp_path / "peer")))
        one.start()
        first = one.pid
        assert first is not None
        one.met(Node("alpha", "beta", process="aa").hello("51"))
        with await asyncio.to_thread(Peer, tmp_path) as peer:
            (await asyncio.to_thread(peer.accept)).close()
            os.kill(first, signal.SIGKILL)
            link = await asyncio.to_thread(peer.accept)
            await until(lambda: one.linked and one.pid not in (None, first))
            link.close()
        await one.leave()

    with caplog.at_level(logging.WARNING, "mirrorpair.node"):
        run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "the sentinel of this node ended (signal 9): another one is started"
    ]


def test_one_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_descriptors: Callable[[], set[int]]
) -> None:
    monkeypatch.setattr(nodesentinel, "LEAVE_S", 0.05)

    async def scenario() -> None:
        one = keeper(UnixAddress(str(tmp_path / "peer")))
        hello = Node("alpha", "beta", process="aa").hello("51")
        one.start()
        first = one.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        while one.pid == first:  # until its socket is full
            one.met(hello)
            await asyncio.sleep(0)
        await until(lambda: one.pid is not None)
        last = one.pid
        assert last is not None
        os.kill(last, signal.SIGSTOP)
        await one.leave()
        for pid in (first, last):
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    before = open_descriptors()
    run(scenario())
    assert open_descriptors() == before


def test_without_one_the_daemon_works_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        one = keeper(TcpAddress("127.0.0.1", 1))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", str(tmp_path / "nothing"))
            one.start()
            one.met(Node("alpha", "beta", process="aa").hello("51"))
            assert one.pid is None
        await until(lambda: one.pid is not None)
        await one.leave()

    with caplog.at_level(logging.WARNING, "mirrorpair.node"):
        run(scenario())
    assert "no sentinel can be started: " in caplog.records[0].getMessage()
