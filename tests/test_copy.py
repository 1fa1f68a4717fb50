"""The copy engine against the plain reference: every arrangement, random images, both ends' reports."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
import reference

from mirrorpair import _core

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Mount

DEADLINE_S = 60.0  # never met; a run that hangs must fail and not block the suite
FIRST_SEED = int(os.environ.get("MIRRORPAIR_TEST_SEED", "1"))
SEEDS = int(os.environ.get("MIRRORPAIR_COPY_SEEDS", "40"))
PING = 16  # frame.h
BLOCKS = [4096, 16384, 65536, 65536, 262144]


def finish(*helpers: _core.Helper, hang_up: ExitStack | None = None) -> None:
    """Waits for all. The first is the source: when it has ended its end of the connection goes, as in the product."""
    left = list(helpers)
    for _ in range(int(DEADLINE_S / 0.01)):
        for helper in list(left):
            if helper.poll(0.01 / len(left)):
                left.remove(helper)
                if helper is helpers[0] and hang_up is not None:
                    hang_up.close()
        if not left:
            return
    for helper in left:
        helper.close()
    pytest.fail(f"hangs: {[helper.progress() for helper in helpers]}")


def connect(kind: str, near: ExitStack, far: ExitStack) -> tuple[_core.Channel, _core.Channel]:
    """Two channels that have exchanged their first frames."""
    if kind == "pipe":
        (r1, w1), (r2, w2) = os.pipe(), os.pipe()
        for fd, stack in ((r1, near), (w2, near), (r2, far), (w1, far)):
            stack.callback(os.close, fd)
        a, b = (r1, w2), (r2, w1)
    elif kind == "unix":
        left, right = socket.socketpair()
        near.enter_context(left)
        far.enter_context(right)
        a, b = (left.fileno(), left.fileno()), (right.fileno(), right.fileno())
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = near.enter_context(socket.create_connection(server.getsockname()))
            right = far.enter_context(server.accept()[0])
        a, b = (left.fileno(), left.fileno()), (right.fileno(), right.fileno())
    one, other = _core.Channel(*a, 5), _core.Channel(*b)
    one.send(_core.FRAME_HELLO, b"{}", 5)
    other.recv(5)
    other.send(_core.FRAME_WELCOME, b"{}", 5)
    one.recv(5)
    return one, other


def run(
    how: str,
    source: Path,
    target: Path,
    *,
    block: int,
    write: bool,
    recheck: bool = False,
    threads: int = 0,
    rate: int = 0,
) -> list[_core.Helper]:
    """Runs the engine in one arrangement; every end must end well."""
    size = source.stat().st_size
    ranges = not write
    with ExitStack() as near, ExitStack() as far:
        a, b = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR if write else os.O_RDONLY)
        far.callback(os.close, a)
        far.callback(os.close, b)
        if how == "local":
            helpers = [
                _core.Helper.local(
                    a,
                    b,
                    size=size,
                    block_size=block,
                    write=write,
                    recheck=recheck,
                    rate=rate,
                    threads=threads,
                    ranges=ranges,
                )
            ]
            finish(*helpers)
        else:
            here, there = connect(how, near, far)
            common = {"size": size, "block_size": block, "seed": size * 7 + 1, "write": write, "recheck": recheck}
            common |= {"threads": threads, "ranges": ranges, "rate": rate}
            helpers = [_core.Helper.source(a, here, **common), _core.Helper.target(b, there, **common)]
            finish(*helpers, hang_up=near)
    assert [helper.outcome().status for helper in helpers] == [0] * len(helpers), [h.outcome() for h in helpers]
    return helpers


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + SEEDS))
def test_any_pair_of_images_is_compared_and_made_equal_like_by_the_reference(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    source, target = tmp_path / "source", tmp_path / "target"
    reference.random_pair(source, target, rng)
    how, block, threads, recheck = (
        rng.choice(["local", "unix", "pipe", "tcp"]),
        rng.choice(BLOCKS),
        rng.choice([0, 1, 3]),
        rng.random() < 0.3,
    )
    before, old = source.read_bytes(), target.read_bytes()
    expected = reference.differing(before, old)
    size, bytes_ = len(before), sum(length for _, length in expected)
    for helper in run(how, source, target, block=block, write=False, threads=threads):
        counted = helper.progress()
        assert helper.take_ranges() == expected
        assert (counted.done_bytes, counted.total_bytes, counted.skipped_bytes) == (size, size, size - bytes_)
        assert (counted.differing_bytes, counted.differing_blocks) == (bytes_, reference.blocks_of(expected, block))
        assert (counted.written_bytes, counted.punched_bytes) == (0, 0)
    assert target.read_bytes() == old, "a comparison wrote"
    for helper in run(how, source, target, block=block, write=True, recheck=recheck, threads=threads):
        counted = helper.progress()
        assert (counted.done_bytes, counted.skipped_bytes, counted.changed_blocks) == (size, size - bytes_, 0)
        assert (counted.differing_bytes, counted.differing_blocks) == (bytes_, reference.blocks_of(expected, block))
        assert counted.written_bytes + counted.punched_bytes == bytes_
        if recheck:
            assert counted.recheck_done_bytes >= counted.recheck_total_bytes - 65536
    assert source.read_bytes() == before, "the source was written to"
    assert target.read_bytes() == before


@pytest.mark.parametrize("how", ["local", "unix", "pipe", "tcp"])
def test_images_of_which_all_differs_are_made_equal(how: str, tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    size = (48 << 20) + 5
    source.write_bytes(rng.randbytes(20 << 20) + bytes(3 << 20) + rng.randbytes(size - (23 << 20)))
    target.write_bytes(rng.randbytes(size))
    helpers = run(how, source, target, block=65536, write=True, recheck=True)
    assert target.read_bytes() == source.read_bytes()
    assert helpers[0].progress().punched_bytes == 3 << 20


@pytest.mark.parametrize("how", ["local", "unix"])
def test_thin_stays_thin_on_both_sides(how: str, tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    size = 3 << 30
    for path in (source, target):
        path.write_bytes(b"")
        os.truncate(path, size)
    with source.open("r+b") as file:
        for offset in (0, 100 << 20, (2 << 30) + 4096):
            file.seek(offset)
            file.write(rng.randbytes(1 << 20))
    with target.open("r+b") as file:  # data where the source has a hole, inside and across windows
        file.seek((1 << 30) - 8192)
        file.write(rng.randbytes(1 << 20))
    run(how, source, target, block=65536, write=True)
    again = run(how, source, target, block=65536, write=False)
    assert again[0].take_ranges() == []
    assert target.stat().st_blocks * 512 <= source.stat().st_blocks * 512 + (256 << 10)


@pytest.mark.parametrize("how", ["local", "unix"])
def test_cold_images_of_many_small_extents_are_read_right(how: str, tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source, target):
        path.write_bytes(b"")
        os.truncate(path, 24 << 20)
    with source.open("r+b") as file:
        for offset in range(0, 24 << 20, 128 << 10):  # half data, half hole; every extent begins at its own place
            file.seek(offset + rng.randrange(16) * 4096)
            file.write(rng.randbytes(64 << 10))
    reference.forget(source)
    for warm in (False, True):
        run(how, source, target, block=65536, write=True)
        assert target.read_bytes() == source.read_bytes(), f"warm={warm}"
        with target.open("r+b") as file:
            file.write(rng.randbytes(24 << 20))


@pytest.mark.parametrize("how", ["local", "unix"])
def test_an_equal_block_is_never_rewritten_so_a_preallocated_target_stays_as_it_is(how: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"")
    os.truncate(source, 4 << 20)
    target.write_bytes(bytes(4 << 20))
    blocks = target.stat().st_blocks
    helper = run(how, source, target, block=65536, write=True)[0]
    assert (helper.progress().written_bytes, helper.progress().punched_bytes) == (0, 0)
    assert target.stat().st_blocks == blocks


@pytest.mark.parametrize("how", ["local", "tcp"])
def test_a_file_system_without_direct_io_is_read_the_plain_way(how: str, mount: Mount, rng: random.Random) -> None:
    folder = mount("size=64m")
    source, target = folder / "source", folder / "target"
    source.write_bytes(rng.randbytes(9 << 20))
    target.write_bytes(rng.randbytes(9 << 20))
    run(how, source, target, block=65536, write=True, recheck=True)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("how", ["local", "unix"])
def test_a_rate_holds_back_the_data_and_not_the_comparison(how: str, tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(rng.randbytes(4 << 20))
    target.write_bytes(source.read_bytes())
    run(how, source, target, block=65536, write=True, rate=1)  # nothing to send: a byte a second is no hindrance
    target.write_bytes(rng.randbytes(4 << 20))
    run(how, source, target, block=65536, write=True, rate=64 << 20)
    assert target.read_bytes() == source.read_bytes()


def test_a_run_that_is_cancelled_ends_so_and_keeps_what_it_did(tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(rng.randbytes(16 << 20))
    target.write_bytes(bytes(16 << 20))
    with source.open("rb") as a, target.open("r+b") as b:
        helper = _core.Helper.local(a.fileno(), b.fileno(), size=16 << 20, block_size=65536, write=True, rate=1 << 20)
        helper.cancel()
        finish(helper)
    assert helper.outcome().status == _core.OUTCOME_CANCELLED
    run("local", source, target, block=65536, write=True)
    assert target.read_bytes() == source.read_bytes()


def test_a_helper_that_is_killed_is_reported_as_such(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source, target):
        path.write_bytes(b"x" * (16 << 20))
    target.write_bytes(b"y" * (16 << 20))
    with source.open("rb") as a, target.open("r+b") as b:
        helper = _core.Helper.local(a.fileno(), b.fileno(), size=16 << 20, block_size=65536, write=True, rate=1 << 20)
        os.kill(helper.pid, 9)
        finish(helper)
    assert (helper.outcome().status, helper.outcome().errno) == (_core.OUTCOME_KILLED, 9)
    assert helper.pid == -1


def test_arguments_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for block in (0, 4095, 5000, 524288):
        with pytest.raises(ValueError, match="power of two"):
            _core.Helper.local(0, 0, size=1, block_size=block, write=False)
    with pytest.raises((ValueError, OverflowError)):
        _core.Helper.local(0, 0, size=1 << 63, block_size=4096, write=False)
    helper = _core.Helper.local(0, 0, size=0, block_size=4096, write=False)
    try:
        with pytest.raises(ValueError, match="not ended"):
            helper.outcome()
    finally:
        helper.close()


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("how", ["local", "unix"])
def test_an_image_that_is_shorter_than_it_was_is_an_error_also_where_it_is_a_hole(
    how: str, side: str, tmp_path: Path, rng: random.Random
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    size = 40 << 20
    for path in (source, target):
        path.write_bytes(rng.randbytes(1 << 20))
        os.truncate(path, size)
    os.truncate(tmp_path / side, 2 << 20)  # between the look at its size and the scan
    old = target.read_bytes()
    with ExitStack() as near, ExitStack() as far, source.open("rb") as a, target.open("r+b") as b:
        if how == "local":
            helpers = [_core.Helper.local(a.fileno(), b.fileno(), size=size, block_size=65536, write=True)]
            finish(*helpers)
        else:
            here, there = connect(how, near, far)
            helpers = [
                _core.Helper.source(a.fileno(), here, size=size, block_size=65536, seed=1, write=True),
                _core.Helper.target(b.fileno(), there, size=size, block_size=65536, seed=1, write=True),
            ]
            finish(*helpers, hang_up=near)
    blamed = helpers[0 if side == "source" else -1].outcome()
    assert (blamed.status, blamed.side) == (_core.OUTCOME_SHRANK, side)
    assert all(helper.outcome().status in (_core.OUTCOME_SHRANK, _core.OUTCOME_PEER_ERROR) for helper in helpers)
    assert target.read_bytes() == old


def test_an_interrupted_run_counts_what_it_wrote(tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(rng.randbytes(8 << 20))
    target.write_bytes(b"")
    os.truncate(target, 8 << 20)
    with source.open("rb") as a, target.open("r+b") as b:
        helper = _core.Helper.local(
            a.fileno(), b.fileno(), size=8 << 20, block_size=65536, write=True, rate=1 << 20, threads=1
        )
        while not helper.progress().written_bytes:
            helper.poll(0.01)
        helper.cancel()
        finish(helper)
    assert helper.outcome().status == _core.OUTCOME_CANCELLED
    data = target.read_bytes()
    written = (
        sum(data[at : at + 4096] == source.read_bytes()[at : at + 4096] for at in range(0, 8 << 20, 65536)) * 65536
    )
    assert helper.progress().written_bytes == written > 0


@pytest.mark.parametrize("how", ["local", "unix"])
def test_zero_pieces_inside_differing_blocks_become_holes_in_every_mode(
    how: str, tmp_path: Path, rng: random.Random
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    block = b"".join(rng.randbytes(4096) if i % 4 else bytes(4096) for i in range(16))
    source.write_bytes(block * 1280)  # 80 MiB: long enough that the source sends unasked
    target.write_bytes(b"")
    os.truncate(target, len(block) * 1280)
    expected = run(how, source, target, block=65536, write=False)[0].progress().differing_bytes
    counted = run(how, source, target, block=65536, write=True)[0].progress()
    assert expected == counted.differing_bytes == counted.written_bytes == len(block) * 1280 * 3 // 4
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= expected + (1 << 20)


def test_a_source_that_changes_all_the_time_is_no_damage_on_the_way(tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    size = 64 << 20
    source.write_bytes(rng.randbytes(size))
    target.write_bytes(rng.randbytes(size))
    stop = threading.Event()

    def scribble() -> None:
        with source.open("r+b") as file:
            while not stop.is_set():
                os.pwrite(file.fileno(), os.urandom(4096), random.randrange(size >> 12) << 12)

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        with ExitStack() as near, ExitStack() as far, source.open("rb") as a, target.open("r+b") as b:
            here, there = connect("unix", near, far)
            helpers = [
                _core.Helper.source(a.fileno(), here, size=size, block_size=65536, seed=1, write=True),
                _core.Helper.target(b.fileno(), there, size=size, block_size=65536, seed=1, write=True),
            ]
            finish(*helpers, hang_up=near)
    finally:
        stop.set()
        writer.join()
    assert {helper.outcome().status for helper in helpers} <= {_core.OUTCOME_OK, _core.OUTCOME_SOURCE_CHANGED}
    run("unix", source, target, block=65536, write=True)
    assert target.read_bytes() == source.read_bytes()


def test_a_stop_signal_to_the_helper_alone_does_not_end_it(tmp_path: Path, rng: random.Random) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(rng.randbytes(1 << 20))
    target.write_bytes(bytes(1 << 20))
    with source.open("rb") as a, target.open("r+b") as b:
        helper = _core.Helper.local(a.fileno(), b.fileno(), size=1 << 20, block_size=65536, write=True, rate=4 << 20)
        while not helper.progress().written_bytes:
            helper.poll(0.01)
        os.kill(helper.pid, signal.SIGTERM)
        finish(helper)
    assert helper.outcome().status == _core.OUTCOME_OK
    assert target.read_bytes() == source.read_bytes()


def test_a_peer_that_takes_no_data_any_more_but_keeps_talking_does_not_hold_the_source(
    tmp_path: Path, rng: random.Random
) -> None:
    source = tmp_path / "source"
    source.write_bytes(rng.randbytes(64 << 20))
    with ExitStack() as near, ExitStack() as far, source.open("rb") as a:
        mine, peer = (stack.enter_context(end) for stack, end in zip((near, far), socket.socketpair(), strict=True))
        here, there = (_core.Channel(end.fileno(), end.fileno(), 5) for end in (mine, peer))
        helper = _core.Helper.source(a.fileno(), here, size=64 << 20, block_size=4096, seed=1, write=True, timeout=2)
        with peer:
            peer.shutdown(socket.SHUT_RD)
            left = int(DEADLINE_S / 0.05)
            while not helper.poll(0.05) and left:
                left -= 1
                with suppress(OSError):
                    there.send(PING, b"", 1)
        helper.close()
    assert left, "it hangs"
    assert helper.outcome().status == _core.OUTCOME_PEER_GONE


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_peer_that_gives_nothing_but_signs_of_life_is_given_up(role: str, tmp_path: Path, rng: random.Random) -> None:
    image = tmp_path / "image"
    image.write_bytes(rng.randbytes(4 << 20))
    with ExitStack() as near, ExitStack() as far, image.open("r+b") as file:
        here, there = connect("unix", near, far)
        start = _core.Helper.source if role == "source" else _core.Helper.target
        helper = start(file.fileno(), here, size=4 << 20, block_size=4096, seed=1, write=True, timeout=0.2)
        left = int(DEADLINE_S / 0.02)
        while not helper.poll(0.02) and left:
            left -= 1
            with suppress(OSError, TimeoutError):
                there.send(PING, b"", 0.1)
        helper.close()
    assert left, "it hangs"
    assert helper.outcome().status == _core.OUTCOME_PEER_SILENT
    assert "lives but" in helper.outcome().text
