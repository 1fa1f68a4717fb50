"""Further paths of heartbeats: to which session they belong, what counts that comes over them, and what their loss and
that of the control connection mean."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from relay import Wire
from test_peerlink import HASTY, PATIENT, Node, make, run, unix

from mirrorpair.errors import RefusedError, UnreachableError
from mirrorpair.liveness import Beats, Newest
from mirrorpair.peermessages import (
    PREAMBLE_BEATS,
    PREAMBLE_CONTROL,
    Beat,
    Join,
    Promise,
    Ready,
    Refused,
    RelinkAsk,
    Reply,
    Word,
    decode_line,
    encode_line,
)
from mirrorpair.proofs import Life

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mirrorpair.liveness import Timing
    from mirrorpair.peerlink import PeerLink

S = 10**9


def both(folder: Path, alpha: Node, beta: Node, timing: Timing = PATIENT, *, wired: bool = False) -> list[PeerLink]:
    """Each listens on a further address of its own. `wired`: alpha goes through wires, which the test holds."""
    ends = ".wire" if wired else ""
    la = make(
        alpha,
        folder,
        timing,
        dial=unix(folder, "beta" + ends),
        listen_more=[unix(folder, "alpha.more")],
        dial_more=[unix(folder, "beta.more" + ends)],
    )
    lb = make(
        beta,
        folder,
        timing,
        listen_more=[unix(folder, "beta.more")],
        dial_more=[unix(folder, "alpha.more" + ends)],
    )
    return [la, lb]


@contextlib.asynccontextmanager
async def met(folder: Path, timing: Timing = PATIENT, *, wired: bool = False) -> AsyncIterator[Any]:
    """Both, once all paths are up."""
    alpha, beta = Node("alpha", "beta"), Node("beta", "alpha")
    links = both(folder, alpha, beta, timing, wired=wired)
    try:
        for link in links:
            await link.start()
        for node, link in zip((alpha, beta), links, strict=True):
            await node.until(lambda link=link: all(path.alive for path in link.paths))
        yield alpha, beta, *links
    finally:
        for link in links:
            await link.stop()


@contextlib.contextmanager
def wires(folder: Path) -> Any:
    """The main way to beta, and the further ones."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Wire(str(folder / f"{name}.wire"), str(folder / name)))
            for name in ("beta", "beta.more", "alpha.more")
        ]


# --- meeting


def test_heartbeats_go_over_every_address_of_either_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(tmp_path) as (alpha, beta, la, lb):
            for node, link in ((alpha, la), (beta, lb)):
                await node.until(
                    lambda link=link: all(path.pulse.received > 2 and path.pulse.rtt_ns for path in link.paths)
                )
                assert len(link.paths) == 2
                assert [path.ours for path in link.paths] == [True, False]
                seqs = [beat.seq for beat in node.beats]
                assert len(seqs) == len(set(seqs))  # each has a number of its own
            assert la.heart.lives.promised == Life("beta", "1", la.control.hello.session, ("1", 0))
            assert len(alpha.ups) == len(beta.ups) == 1

    run(scenario())


def test_a_path_comes_back_by_itself_and_its_loss_says_nothing_of_the_peer(tmp_path: Path) -> None:
    async def scenario() -> None:
        with wires(tmp_path) as (_, to_beta, to_alpha):
            async with met(tmp_path, HASTY, wired=True) as (alpha, beta, la, lb):
                to_beta.cut()
                to_alpha.cut()
                for node in (alpha, beta):
                    await node.until(lambda node=node: sum(one.startswith("down") for one in node.paths) == 2)
                    assert any("was silent for" in one or "closed the connection" in one for one in node.paths)
                assert la.connected
                assert lb.connected
                to_beta.mend()
                to_alpha.mend()
                for node, link in ((alpha, la), (beta, lb)):
                    await node.until(lambda link=link: all(path.alive for path in link.paths))
                assert alpha.downs == beta.downs == alpha.link_downs == beta.link_downs == []

    run(scenario())


# --- the control connection is lost


def test_the_peer_is_not_gone_while_a_path_is_left(tmp_path: Path) -> None:
    """No suspicion, and promises go on; but a request has no way. Then the last path is cut as well."""

    async def scenario() -> None:
        with wires(tmp_path) as (main, to_beta, to_alpha):
            async with met(tmp_path, HASTY, wired=True) as (alpha, beta, la, lb):
                main.cut()
                to_alpha.cut()
                for node, link in ((alpha, la), (beta, lb)):
                    await node.until(lambda node=node: node.link_downs)
                    assert "it is heard over another path" in node.link_downs[0]
                    assert link.session is not None
                    assert not link.connected
                with pytest.raises(UnreachableError):
                    await la.ask(RelinkAsk(why=""))
                # For many times what silence takes, over this one way:
                for node, link in ((alpha, la), (beta, lb)):
                    bound, valid = link.heart.promises.bound_until_ns, link.heart.beats.valid_until_ns
                    seen, promised = len(node.beats), node.promises
                    await node.until(lambda n=node, s=seen, p=promised: len(n.beats) > s + 50 and n.promises > p + 50)
                    assert link.heart.promises.bound_until_ns > bound
                    assert link.heart.beats.valid_until_ns > valid
                    assert node.downs == []
                to_beta.cut()
                for node in (alpha, beta):
                    await node.until(lambda node=node: node.downs)
                    assert "not heard over any path any more" in node.downs[0]
                assert la.session is lb.session is None

    run(scenario())


def test_the_control_connection_that_is_back_is_a_new_session_of_a_peer_that_was_never_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        with wires(tmp_path) as (main, _, _):
            async with met(tmp_path, HASTY, wired=True) as (alpha, beta, la, lb):
                first = la.session
                main.cut()
                for node in (alpha, beta):
                    await node.until(lambda node=node: node.link_downs)
                main.mend()
                for node, link in ((alpha, la), (beta, lb)):
                    await node.until(lambda node=node: len(node.ups) > 1)
                    await node.until(lambda link=link: all(path.alive for path in link.paths))
                assert la.control is la.session is not first
                assert alpha.downs == beta.downs == []

    run(scenario())


def test_a_peer_that_was_started_anew_meanwhile_was_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        with wires(tmp_path) as (main, *_):
            async with met(tmp_path, HASTY, wired=True) as (alpha, beta, la, lb):
                main.cut()
                await alpha.until(lambda: alpha.link_downs)
                await lb.stop()
                await alpha.until(lambda: alpha.downs)
                again = both(tmp_path, alpha, Node("beta", "alpha", process="2"), HASTY, wired=True)[1]
                try:
                    await again.start()
                    main.mend()
                    await alpha.until(lambda: alpha.ups[-1].process == "2")
                    await alpha.until(lambda: all(path.alive for path in la.paths))
                finally:
                    await again.stop()
                del beta

    run(scenario())


@pytest.mark.parametrize("half", [False, True])
def test_a11_who_is_proven_to_be_dead_is_heard_on_no_path_any_more(tmp_path: Path, half: bool) -> None:
    async def scenario() -> None:
        with wires(tmp_path) as (main, *_):
            async with met(tmp_path, HASTY, wired=True) as (alpha, _, la, _lb):
                if half:
                    main.cut()
                    await alpha.until(lambda: alpha.link_downs)
                life = la.heart.lives.met
                assert la.heart.lives.prove([life]).gone
                la.bury(life.process, "it is dead")
                heard, bound = len(alpha.beats), la.heart.promises.bound_until_ns
                assert alpha.downs == ["it is dead"]
                assert la.session is None
                assert not any(path.pulse for path in la.paths)
                for _ in range(50):
                    await asyncio.sleep(0)
                assert (len(alpha.beats), la.heart.promises.bound_until_ns) == (heard, bound)
                # It comes in again nowhere.
                await alpha.until(lambda: half or any("this process of it has ended" in one for one in alpha.refusals))
                assert len(alpha.ups) == 1
                assert not any(path.pulse for path in la.paths)

    run(scenario())


# --- who may say what


class Far:
    """A hand-written alpha that beta knows: its control connection, and further ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: list[asyncio.StreamWriter] = []
        self.peer_session = ""

    async def control(self) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_unix_connection(self.folder / "beta")
        self.writers.append(writer)
        writer.write(PREAMBLE_CONTROL + encode_line(Node("alpha", "beta").hello("a1")) + encode_line(Ready()))
        hello = decode_line(await reader.readline())
        self.peer_session = hello.session  # type: ignore[union-attr]
        assert isinstance(decode_line(await reader.readline()), Ready)
        return reader

    async def path(self, said: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.folder / "beta.more")
        self.writers.append(writer)
        writer.write(said)
        return reader, writer

    def join(self, **changes: Any) -> bytes:
        named = {"node": "alpha", "session": "a1", "peer_session": self.peer_session, **changes}
        return PREAMBLE_BEATS + encode_line(Join(**named))


@contextlib.asynccontextmanager
async def beside(folder: Path) -> AsyncIterator[Any]:
    beta, far = Node("beta", "alpha"), Far(folder)
    lb = both(folder, Node("alpha", "beta"), beta)[1]
    try:
        await lb.start()
        yield beta, lb, far
    finally:
        for writer in far.writers:
            writer.transport.abort()
        await lb.stop()


async def answers(reader: asyncio.StreamReader, kind: type[Word], count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        word = decode_line(await reader.readline())
        if isinstance(word, kind):
            found.append(word)
    return found


def test_only_who_knows_both_numbers_of_the_session_is_heard(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with beside(tmp_path) as (beta, lb, far):
            reader, _ = await far.path(far.join(peer_session="b1"))  # before there is any session
            assert isinstance(decode_line(await reader.readline()), Refused)
            await far.control()
            await beta.until(lambda: beta.ups)
            for changes in ({"session": "a2"}, {"peer_session": "b1"}, {"node": "gamma"}):
                reader, writer = await far.path(far.join(**changes))
                writer.write(encode_line(beta.beat(5)))
                assert isinstance(decode_line(await reader.readline()), Refused)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            reader, _ = await far.path(far.join())
            assert isinstance(decode_line(await reader.readline()), Ready)
            assert not beta.beats
            assert lb.connected

    run(scenario())


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        PREAMBLE_CONTROL + encode_line(Node("alpha", "beta").hello("a1")),
        PREAMBLE_BEATS,
        PREAMBLE_BEATS + b"rubbish\n",
        PREAMBLE_BEATS + b"{" * 300000,
        PREAMBLE_BEATS + encode_line(Ready()),
    ],
    ids=range(7),
)
def test_a_stranger_on_a_path_is_hung_up_on_and_no_session_begins_there(tmp_path: Path, said: bytes) -> None:
    async def scenario() -> None:
        async with beside(tmp_path) as (beta, lb, far):
            reader, writer = await far.path(said)
            with contextlib.suppress(ConnectionError):
                writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            assert not beta.ups
            await far.control()
            await beta.until(lambda: beta.ups)
            reader, _ = await far.path(far.join())
            assert isinstance(decode_line(await reader.readline()), Ready)
            del lb

    run(scenario())


@pytest.mark.parametrize("word", [Reply(id=1), Ready(), b"rubbish\n"], ids=["reply", "ready", "rubbish"])
def test_what_is_no_heartbeat_ends_the_path_alone(tmp_path: Path, word: Any) -> None:
    async def scenario() -> None:
        async with beside(tmp_path) as (beta, lb, far):
            await far.control()
            reader, writer = await far.path(far.join())
            await answers(reader, Ready, 1)
            writer.write(word if isinstance(word, bytes) else encode_line(word))
            await beta.until(lambda: any("sent" in one for one in beta.paths))
            assert lb.connected
            assert beta.downs == []

    run(scenario())


def test_a_new_connection_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with beside(tmp_path) as (beta, lb, far):
            await far.control()
            first, _ = await far.path(far.join())
            await answers(first, Ready, 1)
            second, writer = await far.path(far.join())
            await answers(second, Ready, 1)
            with contextlib.suppress(ConnectionError):
                await first.read()
            writer.write(encode_line(beta.beat(3)))
            await answers(second, Promise, 1)
            assert sum(path.alive for path in lb.paths) == 1
            assert not any(one.startswith("down") for one in beta.paths)

    run(scenario())


def test_what_comes_twice_or_late_is_answered_and_is_no_news(tmp_path: Path) -> None:
    """A11: each answer binds from when its beat came; who is heard is told by the newest number alone."""

    async def scenario() -> None:
        async with beside(tmp_path) as (beta, lb, far):
            reader = await far.control()
            await answers(reader, Beat, 1)
            path, writer = await far.path(far.join())
            await answers(path, Ready, 1)
            writer.write(encode_line(beta.beat(9)))
            (promise,) = await answers(path, Promise, 1)
            assert (promise.seq, promise.promise_ns) == (9, PATIENT.promise_ns)
            heard, bound = lb.heart.hearing.last_ns, lb.heart.promises.bound_until_ns
            for seq in (9, 4, 9, 1):
                writer.write(encode_line(beta.beat(seq)))
            assert [one.seq for one in await answers(path, Promise, 4)] == [9, 4, 9, 1]
            assert lb.heart.hearing.last_ns == heard
            assert lb.heart.promises.bound_until_ns >= bound
            far.writers[0].write(encode_line(beta.beat(10)))
            await answers(reader, Promise, 1)
            assert lb.heart.hearing.last_ns > heard

    run(scenario())


# --- numbers


def test_a10_a_beat_that_goes_over_several_paths_gives_what_its_first_answer_gives(rng: random.Random) -> None:
    """Answers lost, repeated and in any order, over paths of any delay: what is counted on is never later than what the
    peer is bound to, for clocks that are one and the same."""
    for _ in range(200):
        beats, bound = Beats(PATIENT), 0
        due = []
        for number in range(40):
            now = number * S
            for _path in range(3):
                seq = beats.send(now)
                arrives = now + rng.randrange(20 * S)
                bound = max(bound, arrives + PATIENT.obligation_ns(3 * S))
                due += [(arrives + rng.randrange(20 * S), seq) for _ in range(rng.choice([0, 1, 1, 2]))]
        seen: set[int] = set()
        for at, seq in sorted(due):
            assert beats.reply(seq, 3 * S, at) == (seq not in seen)
            seen.add(seq)
            assert beats.valid_until_ns <= at + PATIENT.validity_ns(3 * S)
        assert 0 < beats.valid_until_ns < bound


def test_the_newest_beat_is_the_one_of_the_highest_number() -> None:
    newest = Newest()
    assert [newest.is_news(seq) for seq in (3, 3, 2, 4, 1, 9)] == [True, False, False, True, False, True]
    newest.forget()
    assert newest.is_news(1)


def test_an_address_that_is_in_use_is_refused_and_nothing_stays_bound(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = make(Node("beta", "alpha"), tmp_path, listen_more=[unix(tmp_path, "more")])
        other = make(Node("gamma", "alpha"), tmp_path, listen_more=[unix(tmp_path, "another"), unix(tmp_path, "more")])
        try:
            await first.start()
            with pytest.raises(RefusedError, match="more"):
                await other.start()
            assert not (tmp_path / "gamma").exists()
            assert not (tmp_path / "another").exists()
        finally:
            await other.stop()
            await first.stop()

    run(scenario())
