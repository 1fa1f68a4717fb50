"""Sentinels at the peer's port: who is heard, what counts, and that nothing that is said there does harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_peerlink import PATIENT, Node, make, run

from mirrorpair.arbiter import Incarnation
from mirrorpair.errors import PeerProtocolError
from mirrorpair.peermessages import (
    MAX_SENTINEL_LINE,
    MAX_SESSIONS,
    PREAMBLE_CONTROL,
    PREAMBLE_SENTINEL,
    Beat,
    Died,
    Ready,
    Refused,
    RelinkAsk,
    Reply,
    Request,
    Session,
    Watch,
    decode_line,
    decode_sentinel_line,
    encode_line,
)
from mirrorpair.peersentinel import MAX_REPORTS, MAX_SENTINELS

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from mirrorpair.peerlink import PeerLink
    from mirrorpair.peermessages import Ask

LIFE = Session(session="51", incarnation=Incarnation(id="1", n=0))
WATCH = Watch(pair="shop", node="alpha", process="aa", sessions=[LIFE])
DIED = Died(sessions=[LIFE], status=-9)


def line(word: Any) -> bytes:
    return msgspec.json.encode(word) + b"\n"


INTRODUCED = PREAMBLE_SENTINEL + line(WATCH)


class Wire:
    """A connection to beta's port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def word(self) -> Any:
        """None: it was hung up on."""
        with contextlib.suppress(ConnectionError):
            if said := await self.reader.readline():
                return decode_line(said)
        return None

    async def ask(self, data: bytes) -> Any:
        self.say(data)
        return await self.word()


class Beta:
    """beta's link, and what is said to it by alpha's daemon and by sentinels, all played here."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.node = Node("beta", "alpha")
        self.link: PeerLink = make(self.node, folder, PATIENT, **options)
        self._wires: list[Wire] = []

    async def wire(self) -> Wire:
        wire = Wire(*await asyncio.open_unix_connection(self.folder / "beta"))
        self._wires.append(wire)
        return wire

    async def sentinel(self, said: bytes = INTRODUCED) -> Wire:
        wire = await self.wire()
        assert isinstance(await wire.ask(said), Ready)
        return wire

    async def daemon(self, process: str = "aa", session: str = "51", *, beat: bool = True, n: int = 0) -> Wire:
        """alpha's control connection, up; with a beat that was promised to."""
        wire = await self.wire()
        node = Node("alpha", "beta", process=process, incarnation=Incarnation(id="1", n=n))
        ups = len(self.node.ups)
        wire.say(PREAMBLE_CONTROL + encode_line(node.hello(session)) + encode_line(Ready()))
        await self.node.until(lambda: len(self.node.ups) > ups)
        if beat:
            before = len(self.node.beats)
            wire.say(encode_line(node.beat(1)))
            await self.node.until(lambda: len(self.node.beats) > before)
        return wire

    async def __aenter__(self) -> Self:
        await self.link.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for wire in self._wires:
            wire.writer.transport.abort()
        await self.link.stop()


def test_a11_a_report_names_whom_the_promise_was_given_and_is_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            sentinel = await beta.sentinel()
            assert await sentinel.ask(line(DIED)) == Reply(id=0, result="noted")
            ((process, proof, status),) = beta.node.deaths
            assert (process, proof.releases, proof.gone, status) == ("aa", True, True, -9)

    run(scenario())


def test_a_report_that_is_repeated_is_answered_and_told_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            for sentinel in (await beta.sentinel(), await beta.sentinel()):
                for _ in range(2):
                    assert await sentinel.ask(line(DIED)) == Reply(id=0, result="noted")
            assert len(beta.node.deaths) == 1

    run(scenario())


@pytest.mark.parametrize(
    "sessions",
    [
        [msgspec.structs.replace(LIFE, session="52")],
        [msgspec.structs.replace(LIFE, incarnation=Incarnation(id="1", n=1))],
        [msgspec.structs.replace(LIFE, incarnation=Incarnation(id="2", n=0))],
    ],
    ids=["session", "n", "id"],
)
def test_another_session_or_incarnation_ends_nothing(tmp_path: Path, sessions: list[Session]) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            sentinel = await beta.sentinel()
            assert await sentinel.ask(line(Died(sessions=sessions))) == Reply(id=0, result="void")
            assert not beta.node.deaths
            assert await sentinel.ask(line(Died(sessions=[*sessions, LIFE]))) == Reply(id=0, result="noted")

    run(scenario())


def test_a_promise_to_the_new_process_is_not_released_by_the_end_of_the_old_one(tmp_path: Path) -> None:
    """The sentinel of the old one was connected before, or comes now."""

    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            sentinel = await beta.sentinel()
            await beta.daemon("bb", "53")
            assert await sentinel.ask(line(DIED)) == Reply(id=0, result="void")
            late = await beta.wire()
            refused = await late.ask(INTRODUCED + line(DIED))
            assert isinstance(refused, Refused)
            assert refused.message == "it watches a process of alpha that was not here"
            assert not beta.node.deaths
            assert beta.link.connected

    run(scenario())


def test_before_the_new_process_is_promised_anything_the_old_ones_promise_ends_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            await beta.daemon("bb", "53", beat=False)
            sentinel = await beta.sentinel()
            assert await sentinel.ask(line(DIED)) == Reply(id=0, result="noted")
            ((_, proof, _),) = beta.node.deaths
            assert (proof.releases, proof.gone) == (True, False)
            beta.link.bury("aa", "it is dead")
            assert beta.link.connected

    run(scenario())


def test_who_is_dead_is_hung_up_on_and_promised_nothing_any_more(tmp_path: Path) -> None:
    """Whether the end of its connection has come already or not, and whatever it sent before."""

    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            daemon = await beta.daemon()
            sentinel = await beta.sentinel()
            assert await sentinel.ask(line(DIED)) == Reply(id=0, result="noted")
            bound, beats = beta.link.heart.promises.bound_until_ns, len(beta.node.beats)
            # What it sent lies in the buffer of its connection when the report is acted upon.
            daemon.say(encode_line(beta.node.beat(2)) * 3)
            await daemon.writer.drain()
            beta.link.bury("aa", "alpha is dead")
            assert beta.node.downs == ["alpha is dead"]
            assert not beta.link.connected
            beta.link.bury("aa", "alpha is dead")
            while await daemon.word() is not None:
                pass
            # A connection that it had begun comes to nothing; the next process is welcome.
            wire = await beta.wire()
            node = Node("alpha", "beta", process="aa")
            wire.say(PREAMBLE_CONTROL + encode_line(node.hello("54")) + encode_line(Ready()))
            await wire.word()
            refused = await wire.word()
            assert isinstance(refused, Refused)
            assert refused.message == "this process of it has ended: its sentinel said so"
            assert (beta.link.heart.promises.bound_until_ns, len(beta.node.beats)) == (bound, beats)
            assert beta.node.downs == ["alpha is dead"]
            await beta.daemon("bb", "55")
            assert beta.link.heart.promises.bound_until_ns > bound

    run(scenario())


def test_what_the_dead_one_had_sent_and_was_received_is_not_looked_at_any_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            daemon = await beta.daemon()
            seen: list[int] = []

            def on_beat(beat: Beat) -> bool:
                seen.append(beat.seq)
                beta.link.bury("aa", "alpha is dead")
                return False

            beta.node.on_beat = on_beat  # type: ignore[method-assign]
            daemon.say(b"".join(encode_line(beta.node.beat(seq)) for seq in (2, 3, 4)))  # they come in one piece
            while await daemon.word() is not None:
                pass
            assert seen == [2]

    run(scenario())


def test_a_connection_that_is_ending_is_told_of_before_anything_follows_from_the_death(tmp_path: Path) -> None:
    """Its end was seen, but what runs for it still takes a moment."""

    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            daemon = await beta.daemon()
            ending, ended = asyncio.Event(), asyncio.Event()

            async def slow(_: Ask) -> str:
                try:
                    await asyncio.Event().wait()
                finally:
                    ending.set()
                    await ended.wait()
                return ""

            beta.node.answer = slow
            daemon.say(encode_line(Request(id=1, ask=RelinkAsk(why="a test"))))
            daemon.writer.write_eof()
            await ending.wait()
            assert not beta.link.connected
            assert beta.node.downs == []
            beta.link.bury("aa", "alpha is dead")
            assert beta.node.downs == ["alpha is dead"]
            ended.set()
            while await daemon.word() is not None:
                pass
            await beta.daemon("bb", "53")
            assert beta.node.downs == ["alpha is dead"]

    run(scenario())


def test_a_late_session_of_the_same_process_counts_as_well(tmp_path: Path) -> None:
    """The promise was given in the one before; its sentinel names both."""

    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            await beta.daemon(session="52", beat=False, n=3)
            sentinel = await beta.sentinel()
            later = Session(session="52", incarnation=Incarnation(id="1", n=3))
            assert await sentinel.ask(line(Died(sessions=[later, LIFE]))) == Reply(id=0, result="noted")
            ((_, proof, _),) = beta.node.deaths
            assert (proof.releases, proof.gone) == (True, True)

    run(scenario())


# --- strangers


@pytest.mark.parametrize(
    ("watch", "reason"),
    [
        (msgspec.structs.replace(WATCH, pair="bank"), "its pair is another one"),
        (msgspec.structs.replace(WATCH, node="beta"), "it watches beta, not alpha"),
        (
            msgspec.structs.replace(WATCH, sessions=[msgspec.structs.replace(LIFE, session="52")]),
            "it watches a process of alpha that was not here",
        ),
        (msgspec.structs.replace(WATCH, process="ab"), "it watches a process of alpha that was not here"),
    ],
)
def test_who_watches_somebody_else_is_refused_with_the_reason(tmp_path: Path, watch: Watch, reason: str) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            wire = await beta.wire()
            wire.say(PREAMBLE_SENTINEL + line(watch) + line(DIED))
            refused = await wire.word()
            assert isinstance(refused, Refused)
            assert refused.message == reason
            assert await wire.word() is None
            assert not beta.node.deaths

    run(scenario())


def test_nobody_has_to_be_believed_before_the_peer_itself_was_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            wire = await beta.wire()
            assert isinstance(await wire.ask(INTRODUCED), Refused)
            await beta.daemon()
            await beta.sentinel()

    run(scenario())


STRANGE = [
    b"",
    b"\n",
    b"{}\n",
    b"[" * 5000 + b"\n",
    b"\xff\xfe\n",
    b"x" * (3 * MAX_SENTINEL_LINE),
    line(Ready()),
    line(DIED),
    line(Died(sessions=[])),
    line({**msgspec.to_builtins(WATCH), "magic": "other"}),
    line({**msgspec.to_builtins(WATCH), "process": ""}),
    line({**msgspec.to_builtins(WATCH), "process": 7}),
    line({**msgspec.to_builtins(WATCH), "node": "n" * 300}),
]
STRANGE_LATER = [
    line(WATCH),
    line({**msgspec.to_builtins(DIED), "sessions": []}),
    line({**msgspec.to_builtins(DIED), "sessions": [msgspec.to_builtins(LIFE)] * (MAX_SESSIONS + 1)}),
    line({**msgspec.to_builtins(DIED), "status": 1 << 70}),
    line({**msgspec.to_builtins(DIED), "status": "9"}),
    line({"t": "died"}),
    b"[" * 5000 + b"\n",
    b"x" * (3 * MAX_SENTINEL_LINE),
    b"\0" * 100 + b"\n",
]


@pytest.mark.parametrize(
    "said", [PREAMBLE_SENTINEL + one for one in STRANGE] + [INTRODUCED + one for one in STRANGE_LATER], ids=range(22)
)
def test_what_is_no_message_is_hung_up_on_and_the_right_one_is_heard_all_the_same(tmp_path: Path, said: bytes) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            wire = await beta.wire()
            wire.say(said)
            wire.writer.write_eof()
            while await wire.word() is not None:
                pass
            assert not beta.node.deaths
            assert beta.link.connected
            sentinel = await beta.sentinel()
            assert await sentinel.ask(line(DIED)) == Reply(id=0, result="noted")

    run(scenario())


def test_random_bytes_end_nothing_but_what_they_name(tmp_path: Path, rng: random.Random) -> None:
    """Whatever they are changed into: if it counts, it names the process, the session and the incarnation."""
    good = INTRODUCED + line(DIED)

    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            for _ in range(150):
                said = bytearray(good)
                for _ in range(rng.randrange(1, 4)):
                    said[rng.randrange(len(said))] = rng.randrange(256)
                if rng.random() < 0.3:
                    del said[rng.randrange(len(said)) :]
                wire = await beta.wire()
                with contextlib.suppress(ConnectionError):
                    wire.say(bytes(said))
                    wire.writer.write_eof()
                with contextlib.suppress(PeerProtocolError):
                    while await wire.word() is not None:
                        pass
                wire.writer.transport.abort()
                if beta.node.deaths:
                    reported = decode_sentinel_line(bytes(said).split(b"\n")[-2])
                    assert isinstance(reported, Died)
                    assert reported.sessions == [LIFE]
                    return
            assert beta.link.connected
            sentinel = await beta.sentinel()
            assert await sentinel.ask(line(DIED)) == Reply(id=0, result="noted")

    run(scenario())


def test_one_that_stalls_is_hung_up_on_and_many_keep_nobody_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path, negotiate_s=0.2) as beta:
            stalled = await beta.wire()
            stalled.say(PREAMBLE_SENTINEL + line(WATCH)[:-1])
            assert await stalled.word() is None

    run(scenario())


def test_of_too_many_the_oldest_is_let_go_and_of_too_many_words_the_one_that_says_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Beta(tmp_path) as beta:
            await beta.daemon()
            wires = [await beta.sentinel() for _ in range(MAX_SENTINELS + 1)]
            assert await wires[0].word() is None
            for wire in wires[1:]:
                assert await wire.ask(line(Died(sessions=[msgspec.structs.replace(LIFE, session="0")]))) == Reply(
                    id=0, result="void"
                )
            wordy = wires[-1]
            wordy.say(line(DIED) * MAX_REPORTS)
            said = 0
            while await wordy.word() is not None:
                said += 1
            assert said == MAX_REPORTS - 1

    run(scenario())


@given(st.one_of(st.binary(max_size=400), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_a_valid_word_or_an_error_of_the_peer(data: bytes) -> None:
    with contextlib.suppress(PeerProtocolError):
        assert isinstance(decode_sentinel_line(data), Watch | Died)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([msgspec.to_builtins(WATCH), msgspec.to_builtins(DIED)]), st.data())
def test_any_value_of_any_key_is_taken_as_it_is_meant_or_not_at_all(plain: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(plain)))
    changed = {**plain, key: data.draw(JSON)}
    try:
        word = decode_sentinel_line(json.dumps(changed).encode())
    except PeerProtocolError:
        return
    if isinstance(word, Died):
        assert 1 <= len(word.sessions) <= MAX_SESSIONS
        assert word.status is None or -64 <= word.status <= 255
    else:
        assert 1 <= len(word.sessions) <= MAX_SESSIONS
        assert 0 < len(word.process) <= 32
        assert set(word.process) <= set("0123456789abcdef")


def test_a_line_that_is_too_long_is_not_even_looked_at() -> None:
    with pytest.raises(PeerProtocolError, match="more than"):
        decode_sentinel_line(line(WATCH)[:-1] + b" " * MAX_SENTINEL_LINE)
