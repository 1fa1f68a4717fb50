"""`compare` and `resync` for Python: results, callbacks, interrupts, and what a failed run leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from farside import LIMIT_S, children, fake_ssh, peer, running, silent_after_start

import mirrorpair as mp
from mirrorpair import _core
from mirrorpair.drive import drive
from mirrorpair.messages import Failure, Welcome, encode
from mirrorpair.outcome import Scene, error_of

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import MakeImage

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left_behind(open_descriptors: Callable[[], set[int]]) -> Iterator[None]:
    """Each test of this file leaves no child, no zombie and no descriptor."""
    before, fds, threads = children(), open_descriptors(), threading.active_count()
    yield
    assert children() == before
    assert open_descriptors() == fds
    assert threading.active_count() == threads


@pytest.fixture
def random_pair(make_image: MakeImage) -> tuple[Path, Path]:
    return make_image("a.img", 8 * MIB, {0: os.urandom(8 * MIB)}), make_image("b.img", 8 * MIB)


def reference(one: bytes, other: bytes) -> list[tuple[int, int]]:
    """The plain definition of `ranges`: differing 4 KiB pieces, merged."""
    found: list[tuple[int, int]] = []
    for offset in range(0, len(one), 4096):
        if one[offset : offset + 4096] != other[offset : offset + 4096]:
            length = min(4096, len(one) - offset)
            if found and sum(found[-1]) == offset:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((offset, length))
    return found


@pytest.mark.parametrize("where", ["here", "source there", "target there"])
def test_ranges_are_those_of_the_plain_definition(
    tmp_path: Path, make_image: MakeImage, rng: random.Random, where: str
) -> None:
    size = rng.randrange(1, 3 * MIB)
    base = bytearray(rng.randbytes(size))
    base[size // 3 : size // 2] = bytes(size // 2 - size // 3)
    changed = bytearray(base)
    for _ in range(rng.randrange(0, 60)):
        at = rng.randrange(size)
        piece = rng.choice([rng.randbytes(rng.randrange(1, 9000)), bytes(rng.randrange(1, 70_000))])[: size - at]
        changed[at : at + len(piece)] = piece
    one, other = make_image("a.img", size, {0: bytes(base)}), make_image("b.img", size, {0: bytes(changed)})
    expected = reference(bytes(base), bytes(changed))
    options: dict[str, Any] = {"rsh": str(fake_ssh(tmp_path)), "block_size": rng.choice([4096, 65536, 262144])}
    a, b = {
        "here": (str(one), str(other)),
        "source there": (f"ssh://h{one}", str(other)),
        "target there": (str(one), f"ssh://h{other}"),
    }[where]
    result = mp.compare(a, b, **options)
    assert result.ranges == expected
    assert result.equal == (not expected)
    assert result.differing_bytes == sum(length for _, length in expected)
    assert result.done_bytes == size
    assert result.skipped_bytes == size - result.differing_bytes
    dry = mp.resync(a, b, dry_run=True, **options)
    assert dry.ranges == expected
    assert dry.written_bytes == 0
    assert other.read_bytes() == changed
    done = mp.resync(a, b, verify=True, **options)
    assert other.read_bytes() == base
    assert done.verified
    assert done.differing_bytes == result.differing_bytes
    assert done.written_bytes + done.punched_bytes >= result.differing_bytes


def test_paths_may_be_path_objects_but_not_bytes(random_pair: tuple[Path, Path]) -> None:
    assert mp.compare(random_pair[0], random_pair[1]).differing_bytes == 8 * MIB
    with pytest.raises(mp.UsageError, match="text"):
        mp.compare(os.fsencode(random_pair[0]), random_pair[1])  # type: ignore[arg-type]


def test_ranges_may_be_left_out_and_still_be_heard(random_pair: tuple[Path, Path]) -> None:
    heard: list[tuple[int, int]] = []
    result = mp.compare(*random_pair, ranges=False, on_difference=lambda offset, length: heard.append((offset, length)))
    assert (result.ranges, heard) == ([], [(0, 8 * MIB)])


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": 5000},
        {"block_size": 1 << 20},
        {"rate": -1},
        {"rate": 1 << 63},
        {"threads": -1},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
    ],
)
def test_impossible_options_are_usage_errors(random_pair: tuple[Path, Path], options: dict[str, Any]) -> None:
    with pytest.raises(mp.UsageError):
        mp.compare(*random_pair, **options)
    with pytest.raises(mp.UsageError):
        mp.resync(*random_pair, **options)


def test_verify_is_compare(random_pair: tuple[Path, Path]) -> None:
    assert mp.verify is mp.compare


def test_progress_is_heard_and_ends_at_the_whole(random_pair: tuple[Path, Path]) -> None:
    heard: list[mp.Progress] = []
    mp.resync(*random_pair, rate=20 * MIB, progress=heard.append)
    assert heard[-1].done_bytes == heard[-1].total_bytes == 8 * MIB
    assert [p.done_bytes for p in heard] == sorted(p.done_bytes for p in heard)


def test_a_callback_that_raises_ends_the_run_and_is_heard(random_pair: tuple[Path, Path]) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        mp.compare(*random_pair, on_difference=broken)
    with pytest.raises(RuntimeError, match="mine"):
        mp.resync(*random_pair, rate=MIB, progress=broken)


def test_an_interrupt_carries_what_was_done(make_image: MakeImage) -> None:
    size = 64 * MIB
    source, target = make_image("a.img", size, {0: os.urandom(size)}), make_image("b.img", size)

    def interrupt(progress: mp.Progress) -> None:
        if progress.sent_bytes:
            raise KeyboardInterrupt

    with pytest.raises(mp.Interrupted, match="written") as caught:
        mp.resync(source, target, rate=32 * MIB, progress=interrupt)
    result = caught.value.result
    assert isinstance(result, mp.ResyncResult)
    assert 0 < result.written_bytes < size
    assert mp.resync(source, target).differing_bytes == size - result.written_bytes
    assert mp.compare(source, target).equal


def test_an_interrupt_of_a_comparison_carries_what_was_found(make_image: MakeImage) -> None:
    image = make_image("a.img", MIB, {0: b"x"})

    def interrupt(_progress: mp.Progress) -> None:
        raise KeyboardInterrupt

    with peer(silent_after_start) as port, pytest.raises(mp.Interrupted, match="compared") as caught:
        mp.compare(image, f"tcp://127.0.0.1:{port}/x", progress=interrupt)
    assert isinstance(caught.value.result, mp.CompareResult)
    assert not caught.value.result.equal


def test_a_second_interrupt_ends_a_helper_that_does_not_stop() -> None:
    class Stuck:
        """A helper in a hung system call."""

        closed = 0

        def poll(self, _timeout: float) -> bool:
            raise KeyboardInterrupt

        def cancel(self) -> None: ...

        def take_ranges(self) -> list[tuple[int, int]]:
            return []

        def progress(self) -> _core.Progress:
            return _core.Progress(*[0] * 13)

        def outcome(self) -> _core.Outcome:
            return _core.Outcome(_core.OUTCOME_KILLED, 9, 0, "", "")

        def close(self) -> None:
            self.closed += 1

    stuck = Stuck()
    run = drive(stuck)  # type: ignore[arg-type]
    assert run.interrupted
    assert stuck.closed


def test_ctrl_c_on_a_terminal_reaches_every_process_and_is_still_one_interrupt(
    tmp_path: Path, make_image: MakeImage
) -> None:
    size = 40 * MIB
    source, target = make_image("a.img", size, {0: os.urandom(size)}), make_image("b.img", size)
    arguments = ("resync", "--json", "--rate", "10MiB/s", "--rsh", fake_ssh(tmp_path), source, f"ssh://h{target}")
    with running(*arguments, group=True) as program:
        program.out.wait_for(r'"sent_bytes":\s*[1-9]')
        os.killpg(program.process.pid, signal.SIGINT)
        assert program.process.wait(LIMIT_S) == 130
        assert json.loads(program.out.rest()[-1])["code"] == 130
        assert program.err.rest() == []
    assert mp.resync(source, target).differing_bytes < size


def test_a_new_target_is_taken_back_when_the_far_source_fails_at_once(tmp_path: Path) -> None:
    def talk(channel: _core.Channel, connection: socket.socket) -> None:
        channel.recv(LIMIT_S)
        welcome = Welcome(protocol=1, version="x", size=MIB, kind="file")
        channel.send(_core.FRAME_WELCOME, encode(welcome), LIMIT_S)
        channel.recv(LIMIT_S)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(LIMIT_S)
        with contextlib.suppress(ConnectionError):
            while connection.recv(65536):
                pass

    with peer(talk) as port, pytest.raises(mp.PeerProtocolError, match="ended before the work was done"):
        mp.resync(f"tcp://127.0.0.1:{port}/x", tmp_path / "new.img")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_existed_is_never_taken_back(tmp_path: Path) -> None:
    (tmp_path / "old.img").write_bytes(bytes(MIB))

    def talk(channel: _core.Channel, connection: socket.socket) -> None:
        channel.recv(LIMIT_S)
        channel.send(_core.FRAME_WELCOME, encode(Welcome(protocol=1, version="x", size=MIB, kind="file")), LIMIT_S)
        channel.recv(LIMIT_S)
        channel.send(_core.FRAME_ERROR, encode(Failure(code=14, message="changed my mind")), LIMIT_S)
        connection.settimeout(LIMIT_S)
        with contextlib.suppress(ConnectionError):
            while connection.recv(65536):
                pass

    with peer(talk) as port, pytest.raises(mp.NotAllowedError, match="changed my mind"):
        mp.resync(f"tcp://127.0.0.1:{port}/x", tmp_path / "old.img")
    assert (tmp_path / "old.img").read_bytes() == bytes(MIB)


def test_a_far_end_that_goes_silent_is_given_up(make_image: MakeImage) -> None:
    image = make_image("a.img", MIB, {0: b"x"})
    with peer(silent_after_start) as port, pytest.raises(mp.PeerTimeoutError, match="nothing was heard"):
        mp.compare(image, f"tcp://127.0.0.1:{port}/x", timeout=0.5)


# --- how an outcome is told

SCENE = Scene(source="/a", target="/b", peer="tcp://h:1/b", timeout=30.0)


@pytest.mark.parametrize(
    ("outcome", "kind", "code", "words"),
    [
        ((_core.OUTCOME_IO, errno.EIO, 4096, "source", ""), mp.ImageError, 1, "/a: Input/output error at offset 4096"),
        ((_core.OUTCOME_IO, errno.ENOSPC, 4096, "target", ""), mp.ImageError, 1, "/b: no room at offset 4096"),
        ((_core.OUTCOME_IO, errno.EPERM, 0, "target", ""), mp.RefusedError, 12, "/b cannot be written"),
        ((_core.OUTCOME_SHRANK, 0, 0, "source", ""), mp.ImageError, 1, "/a could not be read through"),
        ((_core.OUTCOME_PEER_GONE, 0, 0, "", ""), mp.PeerProtocolError, 1, "ended before the work was done"),
        ((_core.OUTCOME_PEER_GARBAGE, 0, 0, "", "a bad\x1b frame"), mp.PeerProtocolError, 1, r"a bad\x1b frame"),
        ((_core.OUTCOME_PEER_SILENT, 0, 0, "", ""), mp.PeerTimeoutError, 13, "nothing was heard for 30 s"),
        ((_core.OUTCOME_PEER_ERROR, 0, 0, "", '{"code":12,"message":"busy"}'), mp.PeerError, 12, "h:1/b: busy"),
        ((_core.OUTCOME_PEER_ERROR, 0, 0, "", '{"code":14,"message":"no"}'), mp.NotAllowedError, 14, "no"),
        ((_core.OUTCOME_PEER_ERROR, 0, 0, "", '{"code":130,"message":"stopped"}'), mp.PeerError, 1, "stopped"),
        ((_core.OUTCOME_PEER_ERROR, 0, 0, "", "not json"), mp.PeerError, 1, "not json"),
        ((_core.OUTCOME_SOURCE_CHANGED, 0, 0, "", ""), mp.ImageError, 1, "/a changed while it was read"),
        ((_core.OUTCOME_RECHECK, 0, 8192, "target", ""), mp.ImageError, 1, "/b: what was written at offset 8192"),
        ((_core.OUTCOME_KILLED, 9, 0, "", ""), mp.LocalError, 1, "SIGKILL"),
        ((_core.OUTCOME_KILLED, 200, 0, "", ""), mp.LocalError, 1, "signal 200"),
        ((_core.OUTCOME_INTERNAL, 0, 0, "", "no memory"), mp.LocalError, 1, "no memory"),
        ((99, 0, 0, "", ""), mp.LocalError, 1, "status 99"),
    ],
)
def test_every_outcome_has_its_sentence_and_code(
    outcome: tuple[int, int, int, str, str], kind: type[mp.MirrorpairError], code: int, words: str
) -> None:
    error = error_of(_core.Outcome(*outcome), SCENE)
    assert type(error) is kind
    assert error.exit_code == code
    assert words in str(error)
    assert str(error).isprintable()


def test_an_end_that_was_wanted_is_no_error() -> None:
    for status in (_core.OUTCOME_OK, _core.OUTCOME_CANCELLED):
        assert error_of(_core.Outcome(status, 0, 0, "", ""), SCENE) is None
