"""Two peer links in one process, over real sockets: who dials, who is let in, and what happens when one goes away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from farside import held_port

from mirrorpair._core import FRAME_HELLO, FRAME_WELCOME
from mirrorpair.address import TcpAddress, UnixAddress
from mirrorpair.arbiter import Incarnation
from mirrorpair.errors import PeerError, PeerProtocolError, PeerTimeoutError, RefusedError, UnreachableError
from mirrorpair.liveness import Timing
from mirrorpair.peerdata import Stopped
from mirrorpair.peerlink import STRANGERS, PeerLink
from mirrorpair.peermessages import (
    MAX_LINE,
    PREAMBLE_BYTES,
    PREAMBLE_CONTROL,
    PREAMBLE_DATA,
    PROTOCOL,
    Beat,
    Hello,
    LeaveAsk,
    Ready,
    Refused,
    RelinkAsk,
    Shape,
    Stop,
    decode_line,
    encode_line,
)
from mirrorpair.peersocket import Backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from mirrorpair.peerdata import DataConnection
    from mirrorpair.peermessages import Ask, Watch
    from mirrorpair.peerpath import Path as HeartPath
    from mirrorpair.proofs import Proof

MS = 10**6
# The promise is long and suspicion comes late: a busy machine must not decide how a test ends.
PATIENT = Timing(interval_ns=20 * MS, promise_ns=600 * 10**9, suspect_after=3000)
HASTY = Timing(interval_ns=20 * MS, promise_ns=600 * 10**9, suspect_after=10)


class Node:
    """The handler of a test: remembers what happened and answers what it is told to."""

    def __init__(self, name: str, peer: str, **hello: Any) -> None:
        self.name, self.peer_name = name, peer
        self.changes: dict[str, Any] = hello
        self.objection: str | None = None
        self.ups: list[Hello] = []
        self.downs: list[str] = []
        self.link_downs: list[str] = []
        self.paths: list[str] = []
        self.refusals: list[str] = []
        self.beats: list[Beat] = []
        self.promises = 0
        self.promising = True
        self.deaths: list[tuple[str, Proof, int | None]] = []
        self.asked: list[Ask] = []
        self.answer: Callable[[Ask], Awaitable[str]] | None = None
        self.data: Callable[[DataConnection, bool], Awaitable[None]] | None = None
        self.happened = asyncio.Condition()

    def hello(self, session: str) -> Hello:
        plain = Hello(
            version="0.1.0",
            pair="shop",
            pair_uuid="",
            node=self.name,
            mode="sync",
            arbiter="none",
            survivor="primary",
            boot_id="b",
            incarnation=Incarnation(id="1", n=0),
            process="1",
            session=session,
            role="secondary",
            epoch=0,
            shapes=[Shape(name="data", size=1 << 20, block_size=65536)],
        )
        return msgspec.structs.replace(plain, **self.changes)

    def check(self, hello: Hello) -> str | None:
        return None if hello.pair == "nobody's" else self.objection

    def peer_up(self, hello: Hello) -> None:
        self.ups.append(hello)
        self._tell()

    def peer_down(self, reason: str, last_heard_ns: int | None) -> None:
        assert last_heard_ns is not None
        self.downs.append(reason)
        self._tell()

    def link_down(self, reason: str, last_heard_ns: int | None) -> None:
        assert last_heard_ns is not None
        self.link_downs.append(reason)
        self._tell()

    def path_up(self, path: HeartPath) -> None:
        self.paths.append(f"up {path.address}")
        self._tell()

    def path_down(self, path: HeartPath, reason: str) -> None:
        self.paths.append(f"down {path.address}: {reason}")
        self._tell()

    def peer_refused(self, reason: str) -> None:
        self.refusals.append(reason)
        self._tell()

    def beat(self, seq: int) -> Beat:
        return Beat(seq=seq, epoch=1, version=1, floor=1, role="secondary", linked=False, disks={}, dirty={})

    def on_beat(self, beat: Beat) -> bool:
        self.beats.append(beat)
        self._tell()
        return self.promising

    def on_promise(self) -> None:
        self.promises += 1
        self._tell()

    def check_sentinel(self, watch: Watch) -> str | None:
        return None if watch.pair == "shop" else "its pair is another one"

    def peer_died(self, process: str, proof: Proof, status: int | None) -> None:
        self.deaths.append((process, proof, status))
        self._tell()

    async def on_request(self, ask: Ask) -> str:
        self.asked.append(ask)
        return await self.answer(ask) if self.answer else "ok"

    async def on_data(self, data: DataConnection, *, dialed: bool) -> None:
        assert self.data is not None
        await self.data(data, dialed)
        self._tell()

    def _tell(self) -> None:
        async def notify() -> None:
            async with self.happened:
                self.happened.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)

    async def until(self, reached: Callable[[], object]) -> None:
        async with asyncio.timeout(30), self.happened:
            await self.happened.wait_for(lambda: bool(reached()))


_TASKS: set[asyncio.Task[None]] = set()


def unix(folder: Path, name: str) -> UnixAddress:
    return UnixAddress(str(folder / name))


def make(node: Node, folder: Path, timing: Timing = PATIENT, **more: Any) -> PeerLink:
    more.setdefault("dial", unix(folder, node.peer_name))
    return PeerLink(
        node,
        node=node.name,
        peer=node.peer_name,
        listen=unix(folder, node.name),
        timing=timing,
        rng=random.Random(1),
        **more,
    )


@contextlib.asynccontextmanager
async def pair(folder: Path, alpha: Node | None = None, beta: Node | None = None, timing: Timing = PATIENT) -> Any:
    alpha, beta = alpha or Node("alpha", "beta"), beta or Node("beta", "alpha")
    links = make(alpha, folder, timing), make(beta, folder, timing)
    try:
        for link in links:
            await link.start()
        yield alpha, beta, *links
    finally:
        for link in links:
            await link.stop()


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


# --- meeting


def test_two_nodes_meet_and_promise_to_each_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, beta, la, lb):
            for node in (alpha, beta):
                await node.until(lambda node=node: len(node.beats) > 3 and node.promises > 3)
            assert la.dials
            assert not lb.dials
            assert la.control.sessions == lb.control.sessions
            for link in (la, lb):
                assert link.heart.beats.valid_until_ns > 0
                assert link.heart.beats.rtt_ns is not None
            # A10, A11: what one counts on ends before the other is free. One host, hence one clock.
            assert la.heart.beats.valid_until_ns < lb.heart.promises.bound_until_ns
            assert lb.heart.beats.valid_until_ns < la.heart.promises.bound_until_ns
            assert [hello.node for hello in (alpha.ups[0], beta.ups[0])] == ["beta", "alpha"]
            assert len(alpha.ups) == len(beta.ups) == 1

    run(scenario())


def test_a_node_that_may_not_promise_answers_all_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        beta = Node("beta", "alpha")
        beta.promising = False
        async with pair(tmp_path, beta=beta) as (alpha, _, la, _lb):
            await alpha.until(lambda: alpha.promises > 2)
            assert la.heart.beats.valid_until_ns == 0
            assert la.heart.beats.rtt_ns is not None

    run(scenario())


def test_over_tcp_as_well(tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes = Node("alpha", "beta"), Node("beta", "alpha")
        where = TcpAddress("127.0.0.1", one), TcpAddress("127.0.0.1", other)
        links = [
            PeerLink(node, node=node.name, peer=node.peer_name, listen=where[i], dial=where[1 - i], timing=PATIENT)
            for i, node in enumerate(nodes)
        ]
        try:
            for link in links:
                await link.start()
            for node in nodes:
                await node.until(lambda node=node: node.beats)
        finally:
            for link in links:
                await link.stop()

    with held_port() as one, held_port() as other:
        run(scenario())


def test_requests_are_answered_with_a_word_or_a_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, beta, la, lb):
            for node in (alpha, beta):
                await node.until(lambda node=node: node.ups)

            async def refuse(ask: Ask) -> str:
                if isinstance(ask, LeaveAsk):
                    raise RefusedError("not now")
                return "done"

            beta.answer = refuse
            assert await la.ask(RelinkAsk(why="a test")) == "done"
            assert await lb.ask(RelinkAsk(why="a test")) == "ok"
            with pytest.raises(PeerError, match="beta: not now") as caught:
                await la.ask(LeaveAsk(role="secondary"))
            assert caught.value.exit_code == 12
            assert beta.asked[0] == RelinkAsk(why="a test")

    run(scenario())


def test_a_request_without_reply_times_out_or_breaks_with_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, beta, la, lb):
            await alpha.until(lambda: alpha.ups)
            held = asyncio.Event()

            async def hold(ask: Ask) -> str:
                await held.wait()
                return ""

            beta.answer = hold
            with pytest.raises(PeerTimeoutError, match="beta did not answer"):
                await la.ask(RelinkAsk(why=""), timeout=0.01)
            asking = asyncio.create_task(la.ask(RelinkAsk(why=""), timeout=60))
            async with asyncio.timeout(30):
                while len(beta.asked) < 2:
                    await asyncio.sleep(0)
            await lb.stop()
            with pytest.raises(UnreachableError, match="broke"):
                await asking
            await alpha.until(lambda: alpha.downs)
            with pytest.raises(UnreachableError, match="not connected"):
                await la.ask(RelinkAsk(why=""))

    run(scenario())


def test_a_node_that_comes_back_is_found_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, _beta, _la, lb):
            await alpha.until(lambda: alpha.ups)
            await lb.stop()
            await alpha.until(lambda: alpha.downs)
            again = Node("beta", "alpha", process="2")
            link = make(again, tmp_path)
            try:
                await link.start()
                await alpha.until(lambda: len(alpha.ups) == 2)
                assert alpha.ups[1].process == "2"
            finally:
                await link.stop()

    run(scenario())


def test_silence_ends_the_connection_and_says_for_how_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deaf_peer(tmp_path) as (alpha, _):
            await alpha.until(lambda: alpha.ups)
            await alpha.until(lambda: alpha.downs)
            assert alpha.downs[0].startswith("beta was silent for ")

    run(scenario())


@contextlib.asynccontextmanager
async def deaf_peer(folder: Path) -> Any:
    """alpha's link, and a beta that introduces itself properly and then says nothing and reads nothing."""
    alpha = Node("alpha", "beta")
    link = make(alpha, folder, HASTY)
    stop = asyncio.Event()

    async def beta(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(PREAMBLE_BYTES)
            writer.write(encode_line(Node("beta", "alpha").hello("5e")) + encode_line(Ready()))
            await stop.wait()
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(beta, folder / "beta")
    try:
        await link.start()
        yield alpha, link
    finally:
        stop.set()
        await link.stop()
        server.close()


# --- refusing


def test_a_refusal_is_told_to_both_with_its_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        alpha = Node("alpha", "beta")
        alpha.objection = "it is of pair bank, not shop"
        async with pair(tmp_path, alpha) as (_, beta, la, lb):
            await alpha.until(lambda: alpha.refusals)
            await beta.until(lambda: beta.refusals)
            assert alpha.refusals[0] == "beta is refused: it is of pair bank, not shop"
            assert beta.refusals[0] == "alpha refuses this node: it is of pair bank, not shop"
            assert not la.connected
            assert not lb.connected
            # Once the reason is gone nobody has to wait for the back-off's end.
            alpha.objection = None
            async with asyncio.timeout(30):
                while not alpha.ups:
                    la.hurry()
                    await asyncio.sleep(0)
            await beta.until(lambda: beta.ups)

    run(scenario())


def test_both_may_refuse_at_the_same_moment(tmp_path: Path) -> None:
    async def scenario() -> None:
        alpha, beta = Node("alpha", "beta"), Node("beta", "alpha")
        alpha.objection = beta.objection = "sizes differ"
        async with pair(tmp_path, alpha, beta):
            await alpha.until(lambda: alpha.refusals)
            await beta.until(lambda: beta.refusals)
            assert "sizes differ" in alpha.refusals[0]
            assert "sizes differ" in beta.refusals[0]

    run(scenario())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"node": "gamma"}, "it calls itself gamma, not beta"),
        ({"protocol": (PROTOCOL[1] + 1, PROTOCOL[1] + 3)}, "speaks protocol"),
    ],
)
def test_another_node_or_version_is_refused_by_the_link_itself(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    async def scenario() -> None:
        async with pair(tmp_path, beta=Node("beta", "alpha", **change)) as (alpha, beta, _la, _lb):
            await alpha.until(lambda: alpha.refusals)
            await beta.until(lambda: beta.refusals)
            assert reason in alpha.refusals[0]
            assert reason in beta.refusals[0]

    run(scenario())


def test_h3_refusals_back_off_exponentially_to_a_bound() -> None:
    backoff = Backoff((1.0, 60.0), random.Random(7))
    delays = [backoff.delay() for _ in range(10)]
    for at, delay in enumerate(delays):
        grown = min(60.0, 2.0**at)
        assert grown * 0.75 <= delay <= grown
    backoff.reset()
    assert backoff.delay() <= 1.0


# --- strangers


async def say(folder: Path, said: bytes, *, close: bool = False) -> bytes:
    """What beta's port answers until it hangs up, to somebody who says this."""
    reader, writer = await asyncio.open_unix_connection(folder / "beta")
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(said)
            await writer.drain()
            if close:
                writer.write_eof()
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                answer += piece
        return answer
    finally:
        writer.transport.abort()


def a_hello(**changes: Any) -> bytes:
    return encode_line(Node("alpha", "beta", **changes).hello("aa"))


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        PREAMBLE_CONTROL[:-1],
        PREAMBLE_CONTROL,
        PREAMBLE_CONTROL + b"\n",
        PREAMBLE_CONTROL + b"[" * 100000 + b"\n",
        PREAMBLE_CONTROL + b"{}" * MAX_LINE,  # no end of line
        PREAMBLE_CONTROL + b'{"t":"hello"}\n',
        PREAMBLE_CONTROL + b'{"t":"nonsense"}\n',
        PREAMBLE_CONTROL + b"\xff\xfe\n",
        PREAMBLE_CONTROL + encode_line(Ready()),
        PREAMBLE_CONTROL + encode_line(Refused(message="go away")),
        PREAMBLE_CONTROL + a_hello() + b"garbage\n",
        PREAMBLE_CONTROL + a_hello() + encode_line(Ready()) + b"garbage\n",
        PREAMBLE_CONTROL + a_hello() + encode_line(Ready()) + a_hello(),
        PREAMBLE_DATA,
        PREAMBLE_DATA + b"x" * 1000,
    ],
    ids=range(17),
)
def test_a_stranger_is_hung_up_on_and_the_pair_still_meets(tmp_path: Path, said: bytes) -> None:
    async def scenario() -> None:
        beta, alpha = Node("beta", "alpha"), Node("alpha", "beta")
        lb, la = make(beta, tmp_path), make(alpha, tmp_path)
        try:
            await lb.start()
            async with asyncio.timeout(30):
                await say(tmp_path, said, close=True)
            beta.refusals.clear()
            await la.start()
            await alpha.until(lambda: alpha.ups)
            await alpha.until(lambda: alpha.promises)
        finally:
            await la.stop()
            await lb.stop()

    run(scenario())


def test_a_stranger_that_stalls_is_hung_up_on_and_many_of_them_keep_nobody_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        beta = Node("beta", "alpha")
        lb = make(beta, tmp_path, negotiate_s=0.2)
        try:
            await lb.start()
            async with asyncio.timeout(30):
                answers = await asyncio.gather(*(say(tmp_path, b"") for _ in range(3 * STRANGERS)))
            assert set(answers) == {b""}
            async with asyncio.timeout(30):
                answer = await say(tmp_path, PREAMBLE_CONTROL)
            assert isinstance(decode_line(answer.splitlines(keepends=True)[0]), Hello)
        finally:
            await lb.stop()

    run(scenario())


def test_random_bytes_never_stop_the_listener(tmp_path: Path, rng: random.Random) -> None:
    async def scenario() -> None:
        beta, alpha = Node("beta", "alpha"), Node("alpha", "beta")
        lb, la = make(beta, tmp_path), make(alpha, tmp_path)
        good = PREAMBLE_CONTROL + a_hello() + encode_line(Ready()) + encode_line(beta.beat(1))
        try:
            await lb.start()
            for _ in range(60):
                said = bytearray(good)
                for _ in range(rng.randrange(1, 6)):
                    said[rng.randrange(len(said))] = rng.randrange(256)
                del said[rng.randrange(len(said)) :]
                await say(tmp_path, bytes(said), close=True)
            await la.start()
            await alpha.until(lambda: alpha.promises)
        finally:
            await la.stop()
            await lb.stop()

    run(scenario())


def test_the_peers_new_connection_replaces_the_one_it_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        beta = Node("beta", "alpha")
        lb = make(beta, tmp_path)
        try:
            await lb.start()
            writers = []
            for number in (1, 2):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "beta")
                writers.append(writer)
                writer.write(PREAMBLE_CONTROL + a_hello(process=str(number)) + encode_line(Ready()))
                await beta.until(lambda number=number: len(beta.ups) == number)
            assert beta.downs == ["alpha connected anew"]
            assert [hello.process for hello in beta.ups] == ["1", "2"]
            assert lb.connected
            assert isinstance(decode_line(await reader.readline()), Hello)
        finally:
            for writer in writers:
                writer.transport.abort()
            await lb.stop()

    run(scenario())


# --- listening


def test_a_dead_daemons_socket_is_replaced_and_a_living_ones_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(tmp_path / "beta"))
        dead.close()
        lb = make(Node("beta", "alpha"), tmp_path)
        await lb.start()
        other = make(Node("beta", "alpha"), tmp_path)
        with pytest.raises(RefusedError, match="another daemon of this node"):
            await other.start()
        await other.stop()
        assert (tmp_path / "beta").is_socket()
        assert (tmp_path / "beta").stat().st_mode & 0o777 == 0o600
        await lb.stop()
        assert not (tmp_path / "beta").exists()

    run(scenario())


def test_a_file_in_the_sockets_place_and_a_port_in_use_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "beta").write_text("precious")
        link = make(Node("beta", "alpha"), tmp_path)
        with pytest.raises(RefusedError, match="is no socket"):
            await link.start()
        assert (tmp_path / "beta").read_text() == "precious"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            where = TcpAddress("127.0.0.1", taken.getsockname()[1])
            busy = PeerLink(Node("beta", "alpha"), node="beta", peer="alpha", listen=where, dial=where, timing=PATIENT)
            with pytest.raises(RefusedError, match=str(where)):
                await busy.start()

    run(scenario())


# --- data connections


def test_a_data_connection_is_made_when_it_is_wanted_and_carries_the_handshake(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, beta, la, _lb):
            got: dict[str, Any] = {}

            async def dialer(data: DataConnection, dialed: bool) -> None:
                assert dialed
                await data.send(FRAME_HELLO, b"hello")
                got["alpha"] = (data.session, await data.recv(FRAME_WELCOME))

            async def acceptor(data: DataConnection, dialed: bool) -> None:
                assert not dialed
                hello = await data.recv(FRAME_HELLO)
                await data.send(FRAME_WELCOME, b"welcome")
                got["beta"] = (data.session, hello)

            alpha.data, beta.data = dialer, acceptor
            la.want_data()
            await alpha.until(lambda: "alpha" in got)
            await beta.until(lambda: "beta" in got)
            assert got["alpha"][0] == got["beta"][0] != 0
            assert (got["alpha"][1], got["beta"][1]) == (b"welcome", b"hello")

    run(scenario())


def test_a_refused_data_link_is_tried_again_and_says_what_the_peer_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, beta, la, _lb):
            ends: list[Exception] = []

            async def dialer(data: DataConnection, dialed: bool) -> None:
                try:
                    await data.send(FRAME_HELLO, b"")
                    await data.recv(FRAME_WELCOME)
                except (PeerError, PeerProtocolError) as error:
                    ends.append(error)
                    raise

            attempts = 0

            async def acceptor(data: DataConnection, dialed: bool) -> None:
                nonlocal attempts
                attempts += 1
                await data.recv(FRAME_HELLO)
                if attempts == 1:
                    stop = Stop(code=20, kind="split-brain", message="both wrote alone")
                    await data.stop(stop)
                    raise Stopped(stop)
                if attempts == 2:
                    await data.send(FRAME_HELLO, b"")  # not what was due
                    return
                await data.send(FRAME_WELCOME, b"")

            alpha.data, beta.data = dialer, acceptor
            la.want_data()
            async with asyncio.timeout(30):
                while attempts < 3:
                    la.hurry()
                    await asyncio.sleep(0.01)
            assert isinstance(ends[0], Stopped)
            assert (ends[0].exit_code, ends[0].stop.kind, str(ends[0])) == (20, "split-brain", "both wrote alone")
            assert isinstance(ends[1], PeerProtocolError)

    run(scenario())


def test_stopping_during_a_data_handshake_leaves_nothing_behind(
    tmp_path: Path, open_descriptors: Callable[[], set[int]]
) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (alpha, beta, la, _lb):
            waiting = asyncio.Event()

            async def dialer(data: DataConnection, dialed: bool) -> None:
                waiting.set()
                await data.recv(FRAME_WELCOME)

            async def acceptor(data: DataConnection, dialed: bool) -> None:
                await data.recv(FRAME_HELLO)

            alpha.data, beta.data = dialer, acceptor
            la.want_data()
            async with asyncio.timeout(30):
                await waiting.wait()

    before = open_descriptors()
    run(scenario())
    assert open_descriptors() == before
