"""A line that damages what it carries, and peers that lie: detected, and nothing wrong is ever written as right.

The session under test is short, so that damage is done at every byte of both directions; it holds every kind of frame.
The two engines run as they do behind the commands, joined by a wire that goes wrong at one byte (relay.py), and every
run is judged (copied.py).
"""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import frames
import pytest
from copied import (
    END_S,
    KIB,
    PIECE,
    SEED,
    SESSION,
    WINDOW,
    Mode,
    Pair,
    Run,
    all_well,
    clean,
    closing,
    ended,
    every_frame,
    every_want,
    kinds_of,
    offsets,
    only_old_or_new,
    pages,
    settings,
    unasked,
)
from farside import run_cli, serving
from frames import Peer
from relay import Damage, line

from mirrorpair import _core, resync
from mirrorpair.allow import Allowed
from mirrorpair.errors import MirrorpairError
from mirrorpair.listener import Listener

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from relay import Kind

# A line that lost bytes is only told from a slow one by waiting. Many runs wait at once.
SHORT_S = 0.3


# --- damage on the line

MANY_FORKS = pytest.mark.not_sanitized(
    "each of its many cases forks beside threads that end, and now and then the copy finds ASan's allocator locked"
)


def test_the_short_session_holds_every_kind_of_frame() -> None:
    run = clean(every_frame())
    assert kinds_of(run.forth) == {frames.ZEROS, frames.DIGESTS, frames.DATA, frames.SYNC}
    assert kinds_of(run.back) == {frames.WANT, frames.SETTLED, frames.SYNCED}
    dry = clean(every_frame(), Mode(write=False))
    assert kinds_of(dry.forth) == {frames.ZEROS, frames.DIGESTS, frames.MARKS, frames.SYNC}
    wishes = [f for f in frames.parse(clean(every_want()).back) if f.kind == frames.WANT]
    assert frames.want_kinds(wishes[0].meta, every_want().size, every_want().block) == {
        frames.WANT_REFINE,
        frames.WANT_EMPTY,
        frames.WANT_ZERO,
    }
    assert frames.BULK in kinds_of(clean(unasked()).forth)


def nobody_is_content(runs: list[Run]) -> None:
    """Nothing of what was meant to be read may be lost unnoticed; of damaged answers only the source can know."""
    assert [run.damage for run in runs if run.source.status == _core.OUTCOME_OK] == []
    assert [run.damage for run in runs if run.target.status == _core.OUTCOME_OK and not run.damage.back] == []


def damage_of(kind: Kind, offset: int, back: bool, rng: random.Random) -> Damage:
    return Damage(
        kind=kind,
        offset=offset,
        back=back,
        bit=rng.randrange(8),
        length=rng.choice((1, rng.randint(2, 80), rng.randint(81, 400))),
        garbage=rng.randbytes(rng.choice((1, 80))),
    )


def places_of(run: Run, rng: random.Random, step: int = 1) -> list[tuple[int, bool]]:
    """One in `step` of all."""
    return offsets(run)[rng.randrange(step) :: step]


@MANY_FORKS
@pytest.mark.parametrize("kind", ["flip", "cut", "duplicate"])
def test_damage_at_every_byte_of_a_session_is_detected(kind: Kind, rng: random.Random) -> None:
    pair = every_frame()
    run = clean(pair)
    cases = [damage_of(kind, at, back, rng) for at, back in places_of(run, rng)]
    # A source whose last answer was damaged gives the target two seconds to read why: all of these wait at once.
    last = [frame.start for frame in frames.parse(run.back)][-1]
    slow = [case for case in cases if case.back and case.offset >= last]
    quick = [case for case in cases if case not in slow]
    runs = all_well(pair, quick, Mode(timeout=2.0)) + all_well(pair, slow, Mode(timeout=4.0), at_once=24)
    if kind != "duplicate":  # behind the last frame that is no damage
        nobody_is_content(runs)


@pytest.mark.parametrize("kind", ["drop", "insert"])
def test_bytes_too_few_or_too_many_at_any_place_are_noticed(kind: Kind, rng: random.Random) -> None:
    pair = every_frame()
    places = places_of(clean(pair), rng, 4)
    all_well(pair, [damage_of(kind, at, back, rng) for at, back in places], Mode(timeout=SHORT_S), at_once=6)


@pytest.mark.parametrize(
    "mode", [Mode(write=False, timeout=2.0), Mode(recheck=True, timeout=2.0)], ids=["dry", "verify"]
)
def test_a_flipped_bit_in_a_dry_run_and_in_a_verified_one(mode: Mode, rng: random.Random) -> None:
    pair = every_frame()
    places = places_of(clean(pair, replace(mode, timeout=END_S)), rng, 4)
    cases = [damage_of("flip", at, back, rng) for at, back in places]
    runs = all_well(pair, cases, mode, at_once=6)
    assert all(run.source.status != _core.OUTCOME_OK for run in runs)


@pytest.mark.parametrize("make", [every_want, unasked])
def test_damage_at_sampled_bytes_of_larger_sessions(make: Callable[[], Pair], rng: random.Random) -> None:
    pair = make()
    run = clean(pair)
    places = offsets(run)
    borders = [
        (frame.start + at, back)
        for back, stream in ((False, run.forth), (True, run.back))
        for frame in frames.parse(stream)
        for at in (rng.randrange(frames.HEADER.size), frames.HEADER.size, frame.end - frame.start - 1)
    ]
    chosen = rng.sample(places, 40) + rng.sample(borders, min(len(borders), 60))
    kinds: tuple[Kind, ...] = ("flip", "cut", "duplicate", "drop", "insert")
    all_well(pair, [damage_of(rng.choice(kinds), at, back, rng) for at, back in chosen], Mode(timeout=1.0))


def test_a_line_that_stalls_is_given_up_by_both_ends(rng: random.Random) -> None:
    pair = every_frame()
    places = rng.sample(offsets(clean(pair)), 24)
    runs = all_well(pair, [damage_of("stall", at, back, rng) for at, back in places], Mode(timeout=SHORT_S), at_once=6)
    assert all(run.source.status != _core.OUTCOME_OK for run in runs)
    silent = {_core.OUTCOME_PEER_SILENT, _core.OUTCOME_PEER_ERROR, _core.OUTCOME_PEER_GARBAGE}
    assert all(run.source.status in silent for run in runs)


# --- the handshake, by way of the API


@contextmanager
def listening(folder: Path) -> Iterator[int]:
    """A listener in a thread of this process; its sessions have ended when this is left."""
    with Allowed([str(folder)], read_only=False) as access:
        listener = Listener("127.0.0.1", 0, access, log=lambda _: None, negotiate_s=2.0)
        with listener:
            thread = threading.Thread(target=listener.serve)
            thread.start()
            try:
                yield int(listener.address.rpartition(":")[2])
            finally:
                listener.stop()
                thread.join(END_S)
                assert not thread.is_alive()


@MANY_FORKS
@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damage_at_every_byte_of_the_handshake_is_detected_and_leaves_no_file(
    kind: Kind, tmp_path: Path, rng: random.Random
) -> None:
    source, folder = tmp_path / "source.img", tmp_path / "far"
    folder.mkdir()
    source.write_bytes(rng.randbytes(PIECE + 100))

    def attempt(port: int, case: tuple[int, Damage]) -> str:
        number, damage = case
        target = folder / f"{number:06}.img"
        with line(port, damage) as way:
            try:
                resync(source, f"tcp://127.0.0.1:{way.port}{target}", timeout=2.0)
            except MirrorpairError as error:
                return "" if error.exit_code in (1, 11, 13) else f"{damage}: {error.exit_code} {error}"
            done = target.read_bytes() == source.read_bytes()
        return f"{damage}: {'went well, although damaged' if done else 'said to be equal, and differs'}"

    with listening(folder) as port:
        with line(port) as way:
            resync(source, f"tcp://127.0.0.1:{way.port}{folder / 'clean0.img'}")
            forth, back = way.streams
        handshake = [
            (at, is_back)
            for is_back, stream in ((False, forth), (True, back))
            for frame in frames.parse(bytes(stream.given))
            if frame.kind < frames.PING
            for at in range(frame.start, frame.end)
        ]
        assert len(handshake) > 300
        cases = [damage_of(kind, at, is_back, rng) for at, is_back in handshake[:: 1 if kind == "flip" else 3]]
        with ThreadPoolExecutor(4) as pool:
            problems = [text for text in pool.map(lambda case: attempt(port, case), enumerate(cases)) if text]
    assert problems == []
    assert [path.name for path in folder.iterdir()] == ["clean0.img"]


# --- the commands


@pytest.mark.parametrize("direction", ["push", "pull"])
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (Damage("flip", 1200, bit=3), 1),
        (Damage("flip", 330, back=True, bit=3), 1),
        (Damage("cut", 1200), 1),
        (Damage("insert", 1200, garbage=b"HTTP/1.1 400 Bad Request\r\n\r\n"), 1),
        (Damage("stall", 1200), 13),
        (Damage("stall", 330, back=True), 13),
    ],
    ids=lambda value: f"{value.kind}-{'back' if value.back else 'forth'}" if isinstance(value, Damage) else str(value),
)
def test_the_command_says_what_happened_to_the_line(
    direction: str, damage: Damage, code: int, tmp_path: Path, rng: random.Random
) -> None:
    new, old = rng.randbytes(300 * KIB), rng.randbytes(300 * KIB)
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    source.write_bytes(new)
    target.write_bytes(old)
    if direction == "pull":  # the data then travels the other way
        damage = replace(damage, back=not damage.back, offset=560 if damage.back else 1200)
    with serving("--allow", tmp_path) as server:
        with line(server.port, damage) as way:

            def url(path: Path) -> str:
                return f"tcp://127.0.0.1:{way.port}{path}"

            sides = (source, url(target)) if direction == "push" else (url(source), target)
            ran = run_cli("resync", "--timeout", "1s", *sides, timeout=END_S)
        assert ran.returncode == code, ran.stderr
        assert ran.stderr.startswith("mirrorpair: ")
        assert "Traceback" not in ran.stderr
        assert " equals " not in ran.stdout
        server.err.wait_for(str(tmp_path))  # the far end has let go of its image
        now = target.read_bytes()
        assert only_old_or_new(
            *({at: data[at : at + PIECE] for at in range(0, len(new), PIECE)} for data in (now, old, new))
        )
        sides = (source, server.url(target)) if direction == "push" else (server.url(source), target)
        again = run_cli("resync", *sides)
        assert again.returncode == 0, again.stderr
        assert source.read_bytes() == target.read_bytes() == new


# --- peers that lie: every frame well-formed, and out of place

BLOCKS = 8
SIZE = BLOCKS * PIECE
OLD = {(i + 1) * PIECE: bytes([i + 1]) * PIECE for i in range(BLOCKS - 1)}  # the first block is zero
LIES = Pair(size=SIZE, block=PIECE, source={}, target=OLD)
WIDE = Pair(size=4 * 16 * KIB, block=16 * KIB, source={}, target={0: b"\1" * 64 * KIB})
HUGE = Pair(size=3 << 30, block=PIECE, source={}, target={0: b"\1" * PIECE})


@contextmanager
def against(begin: Callable[..., _core.Helper], pair: Pair, fd: int, mode: Mode) -> Iterator[tuple[Peer, _core.Helper]]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            channel = _core.Channel(theirs.fileno(), theirs.fileno(), SESSION)
            helper = begin(fd, channel, **settings(pair, mode))
        try:
            yield Peer(ours, SESSION), helper
        finally:
            helper.close()


def lie_to_target(script: Callable[[Peer], object], pair: Pair = LIES, mode: Mode | None = None) -> _core.Outcome:
    """Plays the source. What is not written is checked here: a lie leaves the target as it was."""
    target_fd = pair.open_target()
    with closing(target_fd):
        before = pages(target_fd)
        with against(_core.Helper.target, pair, target_fd, mode or Mode()) as (peer, helper):
            script(peer)
            told = peer.told()
            assert ended(helper)
            outcome = helper.outcome()
        assert pages(target_fd) == before
    if outcome.status == _core.OUTCOME_PEER_GARBAGE:
        assert told is not None
        assert told[0] == 1
        assert outcome.text in told[1]
    return outcome


def block_digest(fill: int, length: int = PIECE) -> bytes:
    return _core.digest128(bytes([fill]) * length, SEED)


def equal_digests(count: int = BLOCKS) -> list[bytes | None]:
    return [None, *(block_digest(i) for i in range(1, count))]


def all_equal(peer: Peer, *, count: int = 0, offset: int = 0, blocks: int = BLOCKS) -> None:
    """Every block as the target has it: the unit settles without a question."""
    peer.send(frames.DIGESTS, frames.digests(blocks * PIECE, equal_digests(blocks)), count=count, offset=offset)


def one_differs(peer: Peer, digest: bytes | None = None) -> None:
    """Block 3 has another digest; returns when the target asked for it."""
    blocks = equal_digests()
    blocks[3] = digest or block_digest(99)
    peer.send(frames.DIGESTS, frames.digests(SIZE, blocks))
    asked = peer.expect(frames.WANT)
    assert asked.meta == frames.want(3, frames.WANT_WHOLE)


def wide_refined(peer: Peer) -> None:
    """Blocks of four pieces; the target asks for block 1 with the tags of its pieces."""
    blocks: list[bytes | None] = [block_digest(1, 16 * KIB)] * 4
    blocks[1] = block_digest(99)
    peer.send(frames.DIGESTS, frames.digests(WIDE.size, blocks))
    asked = peer.expect(frames.WANT)
    assert asked.meta[:8] == frames.want(1, frames.WANT_REFINE)


def data(peer: Peer, *entries: bytes, payload: bytes = b"", count: int = 0, kind: int = frames.DATA) -> None:
    peer.send(kind, b"".join(entries), payload, count=count)


PAGE = b"\x63" * PIECE


def twice(peer: Peer) -> None:
    all_equal(peer)
    all_equal(peer)


def overlap(peer: Peer) -> None:
    all_equal(peer, blocks=4)
    peer.send(frames.ZEROS, frames.u64(PIECE), count=1, offset=3 * PIECE)


def gap(peer: Peer) -> None:
    all_equal(peer, blocks=2)
    peer.send(frames.ZEROS, frames.u64(PIECE), count=1, offset=3 * PIECE)


def data_for_an_equal_block(peer: Peer) -> None:
    one_differs(peer)
    data(peer, frames.entry(4, 1, flags=frames.WHOLE), payload=PAGE)


def data_for_a_settled_unit(peer: Peer) -> None:
    all_equal(peer)
    peer.expect(frames.SETTLED)
    data(peer, frames.entry(3, 1, flags=frames.WHOLE), payload=PAGE)


def data_for_zeros(peer: Peer) -> None:
    peer.send(frames.ZEROS, frames.u64(PIECE))
    data(peer, frames.entry(0, 1, flags=frames.WHOLE), payload=PAGE)


def data_of(*entries: bytes, payload: bytes = b"") -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        one_differs(peer)
        data(peer, *entries, payload=payload)

    return script


def refined_wrongly_twice(peer: Peer) -> None:
    wide_refined(peer)
    data(peer, frames.entry(1, 0b0010), payload=PAGE)
    assert peer.expect(frames.WANT).meta == frames.want(1, frames.WANT_WHOLE)
    data(peer, frames.entry(1, 0b0010), payload=PAGE)


def sync_before_the_answer(peer: Peer) -> None:
    one_differs(peer)
    peer.send(frames.SYNC, frames.u64(0))


def synced_twice(peer: Peer) -> None:
    all_equal(peer)
    peer.expect(frames.SETTLED)
    peer.send(frames.SYNC, frames.u64(1))


def just(kind: int, meta: bytes = b"", data: bytes = b"", **more: int) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.send(kind, meta, data, **more)  # type: ignore[arg-type]

    return script


DIGEST_CASES: dict[str, Callable[[Peer], object]] = {
    "wrong unit number": lambda peer: all_equal(peer, count=1),
    "unit number of the future": lambda peer: all_equal(peer, count=64),
    "unit number at the wrap": lambda peer: all_equal(peer, count=0xFFFFFFFF),
    "same unit twice": twice,
    "begins behind the beginning": lambda peer: all_equal(peer, offset=PIECE, blocks=4),
    "overlaps the last": overlap,
    "leaves a gap": gap,
    "zeros past the end": just(frames.ZEROS, frames.u64(SIZE + PIECE)),
    "zeros one byte past the end": just(frames.ZEROS, frames.u64(SIZE + 1)),
    "zeros of length 0": just(frames.ZEROS, frames.u64(0)),
    "zeros without end": just(frames.ZEROS, frames.u64(2**64 - 1)),
    "zeros that wrap": just(frames.ZEROS, frames.u64(2**64 - PIECE), offset=PIECE),
    "zeros at the end": just(frames.ZEROS, frames.u64(PIECE), offset=SIZE),
    "zeros at the top": just(frames.ZEROS, frames.u64(PIECE), offset=2**64 - PIECE),
    "zeros within a piece": just(frames.ZEROS, frames.u64(PIECE), offset=100),
    "zeros with data": just(frames.ZEROS, frames.u64(PIECE), PAGE),
    "digests of no block": just(frames.DIGESTS, frames.digests(0, [])),
    "digests past the end": just(frames.DIGESTS, frames.digests(SIZE + 1, [*equal_digests(), block_digest(1)])),
    "digests of 4 GiB": just(frames.DIGESTS, b"\xff" * 8 + frames.digests(SIZE, equal_digests())[8:]),
    "more digests than blocks": just(frames.DIGESTS, frames.digests(SIZE, equal_digests()) + bytes(16)),
    "fewer digests than blocks": just(frames.DIGESTS, frames.digests(SIZE, equal_digests())[:-16]),
    "half a digest": just(frames.DIGESTS, frames.digests(SIZE, equal_digests())[:-5]),
    "digests cut in the bits": just(frames.DIGESTS, frames.digests(SIZE, equal_digests())[:20]),
    "digests of nothing": just(frames.DIGESTS),
    "digests with data": just(frames.DIGESTS, frames.digests(SIZE, equal_digests()), PAGE),
    "a block left out": just(frames.DIGESTS, frames.digests(SIZE, equal_digests(), absent=[5])),
    "all blocks left out": just(frames.DIGESTS, frames.digests(SIZE, equal_digests(), absent=range(BLOCKS))),
    "bits behind the last block": just(frames.DIGESTS, frames.digests(SIZE, [*equal_digests(), block_digest(1)])),
    "zero but absent": just(
        frames.DIGESTS,
        frames.digests(SIZE, equal_digests(), absent=[0])[:16] + b"\1" + frames.digests(SIZE, equal_digests())[17:],
    ),
    "a re-check before the copy": just(frames.DIGESTS, frames.digests(SIZE, equal_digests(), flags=frames.RECHECK)),
}

DATA_CASES: dict[str, Callable[[Peer], object]] = {
    "data before anything": just(frames.DATA, frames.entry(3, 1, flags=frames.WHOLE), PAGE),
    "data for an equal block": data_for_an_equal_block,
    "data for a settled unit": data_for_a_settled_unit,
    "data for zeros": data_for_zeros,
    "data of a block that is not there": data_of(frames.entry(BLOCKS, 1, flags=frames.WHOLE), payload=PAGE),
    "data of a block far away": data_of(frames.entry(0xFFFFFFFF, 1, flags=frames.WHOLE), payload=PAGE),
    "data of a piece that is not there": data_of(frames.entry(3, 2), payload=PAGE),
    "data of all pieces": data_of(frames.entry(3, 2**64 - 1, flags=frames.WHOLE), payload=PAGE),
    "a piece that is zero and is not": data_of(frames.entry(3, 1, 1, flags=frames.WHOLE), payload=PAGE),
    "whole, and yet not": data_of(frames.entry(3, 0, 0, flags=frames.WHOLE)),
    "data shorter than it says": data_of(frames.entry(3, 1, flags=frames.WHOLE), payload=PAGE[:-1]),
    "no data": data_of(frames.entry(3, 1, flags=frames.WHOLE)),
    "data without entries": data_of(payload=PAGE),
    "an entry and a half": data_of(frames.entry(3, 1, flags=frames.WHOLE), b"half an entry", payload=PAGE),
    "an empty data frame": data_of(),
    "marks while writing": just(frames.MARKS, frames.entry(3, 1)),
    "bulk with data missing": just(frames.BULK, frames.bulk(SIZE, BLOCKS), PAGE),
    "bulk with data too much": just(frames.BULK, frames.bulk(SIZE, BLOCKS, 0xFF), PAGE),
    "bulk past the end": just(frames.BULK, frames.bulk(2 * SIZE, 2 * BLOCKS), PAGE * 2 * BLOCKS),
    "bulk of 4 GiB": just(frames.BULK, b"\xff" * 16, PAGE),
    "bulk of nothing": just(frames.BULK),
    "bulk of the wrong unit": just(frames.BULK, frames.bulk(SIZE, BLOCKS), PAGE * BLOCKS, count=1),
    "bulk elsewhere": just(frames.BULK, frames.bulk(PIECE, 1), PAGE, offset=PIECE),
    "bulk with bits behind the last block": just(frames.BULK, frames.bulk(SIZE, BLOCKS, 1 << 8), PAGE * BLOCKS),
    "sync before anything": just(frames.SYNC, frames.u64(0)),
    "sync before the answer": sync_before_the_answer,
    "sync of a pass that was not asked for": synced_twice,
    "sync of nothing": just(frames.SYNC),
    "sync that says too much": just(frames.SYNC, frames.u64(0) * 2),
}

FRAME_CASES: dict[str, Callable[[Peer], object]] = {
    **{
        f"kind {kind}": just(kind, bytes(8))
        for kind in (0, 1, 2, 3, 5, 15, frames.WANT, frames.SETTLED, frames.SYNCED, 26, 255, 65535)
    },
    "a length of 4 GiB": just(frames.ZEROS, frames.u64(PIECE), length=2**32 - 1),
    "a length just too large": just(frames.DATA, b"x", length=(256 + 1024) * KIB + 1),
    "a meta longer than the frame": just(frames.ZEROS, frames.u64(PIECE), meta_length=9),
    "a meta too long": just(frames.DATA, bytes(256 * KIB + 1)),
    "a frame left out": just(frames.ZEROS, frames.u64(PIECE), skip=1),
    "a frame repeated": just(frames.ZEROS, frames.u64(PIECE), skip=-1 % 2**64),
    "another session's frame": just(frames.ZEROS, frames.u64(PIECE), session=SESSION + 1),
    "session 0": just(frames.ZEROS, frames.u64(PIECE), session=0),
    "a wrong digest": lambda peer: peer.send(frames.ZEROS, frames.u64(PIECE), payload_digest=bytes(16)),
    "another magic": lambda peer: peer.send(frames.ZEROS, frames.u64(PIECE), magic=b"MPR2"),
    "an error without end": just(frames.ERROR, b"x" * 16384),
    "a ping with a parcel": just(frames.PING, b"x" * 4096),
}


def wrong_digest_of_data(peer: Peer) -> None:
    one_differs(peer)
    peer.send(frames.DATA, frames.entry(3, 1, flags=frames.WHOLE), PAGE, payload_digest=bytes(16))


@pytest.mark.parametrize("case", [*DIGEST_CASES, *DATA_CASES, *FRAME_CASES])
def test_a_source_that_lies_is_caught_before_anything_is_written(case: str) -> None:
    outcome = lie_to_target({**DIGEST_CASES, **DATA_CASES, **FRAME_CASES}[case])
    assert outcome.status == _core.OUTCOME_PEER_GARBAGE, outcome
    assert outcome.text


def test_data_is_checked_before_it_is_used() -> None:
    assert lie_to_target(wrong_digest_of_data).status == _core.OUTCOME_PEER_GARBAGE


def test_a_refined_block_that_never_fits_is_not_written() -> None:
    assert lie_to_target(refined_wrongly_twice, WIDE).status == _core.OUTCOME_PEER_GARBAGE


@pytest.mark.parametrize("kind", [frames.DATA, frames.BULK])
def test_nothing_makes_a_dry_run_write(kind: int) -> None:
    meta = frames.entry(3, 1, flags=frames.WHOLE) if kind == frames.DATA else frames.bulk(SIZE, BLOCKS)

    def script(peer: Peer) -> None:
        blocks = equal_digests()
        blocks[3] = block_digest(99)
        if kind == frames.DATA:
            peer.send(frames.DIGESTS, frames.digests(SIZE, blocks))
            peer.expect(frames.WANT)
        peer.send(kind, meta, PAGE if kind == frames.DATA else PAGE * BLOCKS)

    assert lie_to_target(script, mode=Mode(write=False)).status == _core.OUTCOME_PEER_GARBAGE


def test_marks_with_data_or_given_twice_are_garbage() -> None:
    def with_data(peer: Peer) -> None:
        blocks = equal_digests()
        blocks[3] = block_digest(99)
        peer.send(frames.DIGESTS, frames.digests(SIZE, blocks))
        peer.expect(frames.WANT)
        data(peer, frames.entry(3, 1), payload=PAGE, kind=frames.MARKS)

    def repeated(peer: Peer) -> None:
        blocks = equal_digests()
        blocks[3] = block_digest(99)
        peer.send(frames.DIGESTS, frames.digests(SIZE, blocks))
        peer.expect(frames.WANT)
        data(peer, frames.entry(3, 1), frames.entry(3, 1), kind=frames.MARKS)

    for script in (with_data, repeated):
        assert lie_to_target(script, mode=Mode(write=False)).status == _core.OUTCOME_PEER_GARBAGE


def test_zeros_longer_than_a_unit_may_be_are_garbage() -> None:
    script = just(frames.ZEROS, frames.u64((1 << 30) + PIECE))
    assert lie_to_target(script, HUGE).status == _core.OUTCOME_PEER_GARBAGE


def test_a_block_answered_twice_is_garbage_and_was_written_once() -> None:
    target_fd = LIES.open_target()
    with closing(target_fd):
        with against(_core.Helper.target, LIES, target_fd, Mode()) as (peer, helper):
            one_differs(peer)
            data(peer, frames.entry(3, 1, flags=frames.WHOLE), payload=PAGE)
            peer.expect(frames.SETTLED)
            data(peer, frames.entry(3, 1, flags=frames.WHOLE), payload=b"\x64" * PIECE)
            told = peer.told()
            assert ended(helper)
            assert helper.outcome().status == _core.OUTCOME_PEER_GARBAGE
        assert told is not None
        assert pages(target_fd) == {**OLD, 3 * PIECE: PAGE}


def test_more_open_units_than_may_be_are_garbage() -> None:
    pair = Pair(size=65 * PIECE, block=PIECE, source={}, target={i * PIECE: b"\1" * PIECE for i in range(65)})

    def script(peer: Peer) -> None:
        for i in range(65):  # each is asked for, none is answered
            peer.send(frames.DIGESTS, frames.digests(PIECE, [block_digest(2)]), count=i, offset=i * PIECE)

    assert lie_to_target(script, pair).status == _core.OUTCOME_PEER_GARBAGE


def test_thousands_of_pings_do_no_harm() -> None:
    def script(peer: Peer) -> None:
        for i in range(3000):
            peer.send(frames.PING, b"x" * (i % 50))
        all_equal(peer)
        peer.expect(frames.SETTLED)
        for _ in range(3000):
            peer.send(frames.PING)
        peer.send(frames.SYNC, frames.u64(0))
        peer.expect(frames.SYNCED)
        peer.sock.shutdown(socket.SHUT_WR)

    assert lie_to_target(script).status == _core.OUTCOME_OK


@pytest.mark.parametrize("said", [b"", b"\xff\xfe{", b'{"code":130,"message":"x"}', b"[" * 1000])
def test_an_error_that_makes_no_sense_is_an_error_all_the_same(said: bytes) -> None:
    assert lie_to_target(just(frames.ERROR, said)).status == _core.OUTCOME_PEER_ERROR


# --- the same against the source

TOLD = Pair(
    size=WINDOW + 4 * 16 * KIB,
    block=16 * KIB,
    source={WINDOW + i * 16 * KIB: bytes([i + 1]) * 16 * KIB for i in range(4)},
    target={},
)  # unit 0 is a hole, unit 1 four blocks
TAGS = bytes(16)


def lie_to_source(script: Callable[[Peer], object], pair: Pair = TOLD, mode: Mode | None = None) -> _core.Outcome:
    """Plays the target, once both units have come."""
    source_fd = pair.open_source()
    with closing(source_fd), against(_core.Helper.source, pair, source_fd, mode or Mode()) as (peer, helper):
        peer.expect(frames.ZEROS)
        peer.expect(frames.DIGESTS)
        script(peer)
        told = peer.told()
        assert ended(helper)
        outcome = helper.outcome()
    if outcome.status == _core.OUTCOME_PEER_GARBAGE:
        assert told is not None
        assert told[0] == 1
        assert outcome.text in told[1]
    return outcome


def asks(*wants: bytes, count: int = 1) -> Callable[[Peer], None]:
    return just(frames.WANT, b"".join(wants), count=count)


def settles(equal: int, *, count: int = 1, meta: bytes | None = None) -> Callable[[Peer], None]:
    return just(frames.SETTLED, frames.settled(equal) if meta is None else meta, count=count)


def settled_twice(peer: Peer) -> None:
    peer.send(frames.SETTLED, frames.settled(0), count=1)
    peer.send(frames.SETTLED, frames.settled(0), count=1)


def settled_with_a_wish_open(peer: Peer) -> None:
    peer.send(frames.WANT, frames.want(0, frames.WANT_WHOLE), count=1, hold=True)  # both are read before it is answered
    peer.send(frames.SETTLED, frames.settled(0), count=1)


def asked_three_times(peer: Peer) -> None:
    for _ in range(3):
        peer.send(frames.WANT, b"".join(frames.want(i, frames.WANT_WHOLE) for i in range(4)), count=1)


def settle_all_and_sync(peer: Peer) -> None:
    peer.send(frames.SETTLED, frames.settled(WINDOW), count=0)
    peer.send(frames.SETTLED, frames.settled(4 * 16 * KIB), count=1)
    peer.expect(frames.SYNC)


def synced(value: int, *, length: int = 1) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        settle_all_and_sync(peer)
        peer.send(frames.SYNCED, frames.u64(value) * length)

    return script


SOURCE_CASES: dict[str, Callable[[Peer], object]] = {
    "asks in a unit that never was": asks(frames.want(0, frames.WANT_WHOLE), count=2),
    "asks in a unit far away": asks(frames.want(0, frames.WANT_WHOLE), count=0xFFFFFFFF),
    "asks for a block that is not there": asks(frames.want(4, frames.WANT_WHOLE)),
    "asks for a block far away": asks(frames.want(0xFFFFFFFF, frames.WANT_WHOLE)),
    "asks for data of a hole": asks(frames.want(0, frames.WANT_WHOLE), count=0),
    "asks in an unknown way": asks(frames.want(0, 4)),
    "asks in an unknowable way": asks(frames.want(0, 0xFFFFFFFF)),
    "asks with half an entry": asks(frames.want(0, frames.WANT_WHOLE)[:5]),
    "asks with tags missing": asks(frames.want(0, frames.WANT_REFINE, TAGS[:12])),
    "asks with more behind": asks(frames.want(0, frames.WANT_REFINE, TAGS), b"tail"),
    "zeroes pieces that are not there": asks(frames.want(0, frames.WANT_ZERO, frames.u64(1 << 4))),
    "asks for nothing": asks(),
    "asks three times": asked_three_times,
    "asks with data": just(frames.WANT, frames.want(0, frames.WANT_WHOLE), b"data", count=1),
    "asks too much at once": just(frames.WANT, frames.want(0, frames.WANT_WHOLE) * 5000, count=1),
    "settles what never was": settles(0, count=2),
    "settles the unit before the first": settles(0, count=0xFFFFFFFF),
    "settles twice": settled_twice,
    "settles with a wish open": settled_with_a_wish_open,
    "finds more equal than there is": settles(4 * 16 * KIB + 1),
    "settles in few words": settles(0, meta=bytes(8)),
    "settles in many words": settles(0, meta=bytes(48)),
    "settles in no word": settles(0, meta=b""),
    "is done before it began": just(frames.SYNCED, frames.u64(0)),
    "is done with another pass": synced(1),
    "is done in many words": synced(0, length=2),
    **{
        f"kind {kind}": just(kind, bytes(8))
        for kind in (
            0,
            1,
            2,
            3,
            frames.DIGESTS,
            frames.ZEROS,
            frames.BULK,
            frames.DATA,
            frames.MARKS,
            frames.SYNC,
            26,
            65535,
        )
    },
    "a length of 4 GiB": just(frames.WANT, bytes(8), length=2**32 - 1),
    "a frame left out": just(frames.WANT, bytes(8), skip=1),
    "another session's frame": just(frames.WANT, bytes(8), session=SESSION + 1),
}


@pytest.mark.parametrize("case", SOURCE_CASES)
def test_a_target_that_lies_is_caught(case: str) -> None:
    outcome = lie_to_source(SOURCE_CASES[case])
    assert outcome.status == _core.OUTCOME_PEER_GARBAGE, outcome
    assert outcome.text


@pytest.mark.parametrize("case", ["asks three times", "asks for data of a hole"])
def test_a_target_that_lies_in_a_dry_run_is_caught(case: str) -> None:
    assert lie_to_source(SOURCE_CASES[case], mode=Mode(write=False)).status == _core.OUTCOME_PEER_GARBAGE


def test_a_unit_that_was_not_sent_yet_cannot_be_settled() -> None:
    """Its frame lies in the queue: its place must not be used again for another unit, or what is queued is lost."""
    pair = Pair(size=64 * WINDOW, block=PIECE, source={i * WINDOW: b"\1" * PIECE for i in range(64)}, target={})
    source_fd = pair.open_source()
    ours, theirs = socket.socketpair()
    with closing(source_fd), ours:
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is, a few frames
            channel = _core.Channel(theirs.fileno(), theirs.fileno(), SESSION)
            helper = _core.Helper.source(source_fd, channel, **settings(pair, Mode(timeout=1.0)))  # type: ignore[arg-type]
        try:
            peer = Peer(ours, SESSION)
            for count in range(20):
                peer.expect(frames.DIGESTS)
                peer.send(frames.SETTLED, frames.settled(WINDOW), count=count)
            assert not helper.poll(0.3)  # the 24 units that may be open are on their way into a full socket
            peer.send(frames.SETTLED, frames.settled(WINDOW), count=43)
            ended(helper)
            assert helper.outcome().status == _core.OUTCOME_PEER_GARBAGE, helper.outcome()
        finally:
            helper.close()
