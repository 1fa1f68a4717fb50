"""The C core's pieces, each by itself: digests, zero test, bitmap, channel and frame header."""

from __future__ import annotations

import os
import pickle
import random
import socket
import threading
from typing import TYPE_CHECKING

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = [*range(270), 511, 512, 1023, 1024, 1025, 4095, 4096, 4097, 65535, 65536, 65537, 262144]


@pytest.mark.parametrize("kernel", _core.kernels())
def test_every_kernel_that_runs_here_equals_the_reference(kernel: str) -> None:
    rng = random.Random(kernel)
    for size in SIZES:
        data, seed = rng.randbytes(size), rng.getrandbits(64)
        reference = xxhash.xxh3_128(data, seed=seed).intdigest()
        expected = (reference & (2**64 - 1)).to_bytes(8, "little") + (reference >> 64).to_bytes(8, "little")
        assert _core.digest128(data, seed, kernel) == expected, size
        assert _core.digest128(data, seed) == expected, size


@pytest.mark.parametrize("kernel", _core.kernels())
def test_a_digest_does_not_depend_on_the_data_s_alignment(kernel: str) -> None:
    data = random.Random(3).randbytes(70000)
    shifted = bytearray(64) + data
    for shift in range(64):
        copy = memoryview(shifted)[shift : shift + 65536]
        assert _core.digest128(copy, 5, kernel) == _core.digest128(bytes(copy), 5, kernel)


def test_what_the_core_returns_can_be_pickled() -> None:
    outcome = _core.Outcome(1, 2, 3, "source", "text")
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_a_forced_kernel_that_cannot_run_raises() -> None:
    with pytest.raises(ValueError, match="no digest kernel 'mmx'"):
        _core.digest128(b"", 0, "mmx")
    assert _core.kernels()[0] == "scalar"


def test_the_zero_test_sees_every_single_byte() -> None:
    for size in (1, 7, 15, 16, 17, 31, 33, 4096):
        assert _core.is_zero(bytes(size))
        for position in range(size):
            data = bytearray(size)
            data[position] = 1
            assert not _core.is_zero(data), (size, position)
    assert _core.is_zero(b"")


@given(
    st.integers(1, 400),
    st.lists(st.tuples(st.sampled_from(["set", "clear", "range", "merge"]), st.integers(0, 399), st.integers(0, 399))),
)
def test_the_bitmap_equals_a_plain_set(bits: int, steps: list[tuple[str, int, int]]) -> None:
    bitmap, model = _core.Bitmap(bits), set[int]()
    for step, first, second in steps:
        bit = first % bits
        low, high = sorted((bit, second % bits))
        if step == "set":
            assert bitmap.set(bit) == (bit in model)
            model.add(bit)
        elif step == "clear":
            assert bitmap.clear(bit) == (bit in model)
            model.discard(bit)
        elif step == "range":
            bitmap.set_range(low, high)
            model.update(range(low, high))
        else:
            other = _core.Bitmap(bits)
            other.set_range(low, high)
            bitmap.merge(other)
            model.update(range(low, high))
    assert bitmap.count() == len(model)
    assert [bitmap[bit] for bit in range(bits)] == [bit in model for bit in range(bits)]
    assert {bit for first, last in bitmap.runs() for bit in range(first, last)} == model
    assert all(last not in model and first < last for first, last in bitmap.runs())


def test_a_bit_outside_the_bitmap_is_an_error_and_changes_nothing() -> None:
    bitmap = _core.Bitmap(65)
    for call in (bitmap.set, bitmap.clear, bitmap.__getitem__):
        for bit in (-1, 65, 2**64):
            with pytest.raises((IndexError, OverflowError)):
                call(bit)
    with pytest.raises(IndexError):
        bitmap.set_range(0, 66)
    with pytest.raises(ValueError, match="different lengths"):
        bitmap.merge(_core.Bitmap(64))
    assert (bitmap.count(), len(bitmap)) == (0, 65)


def test_bits_set_by_many_threads_are_all_there() -> None:
    bitmap = _core.Bitmap(8192)

    def work(start: int) -> None:
        for bit in range(start, 8192, 8):
            bitmap.set(bit)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bitmap.runs() == [(0, 8192)]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one connection."""
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def frames_of(*frames: tuple[int, bytes], session: int = 77) -> bytes:
    """The bytes that a channel sends for these frames."""
    left, right = socket.socketpair()
    with left, right:
        channel = _core.Channel(left.fileno(), left.fileno(), session)
        for kind, payload in frames:
            channel.send(kind, payload, 5)
        left.shutdown(socket.SHUT_WR)
        found = b""
        while part := right.recv(65536):
            found += part
        return found


def receive(channel: _core.Channel, count: int) -> list[tuple[int, bytes]]:
    return [channel.recv(5) for _ in range(count)]


def test_frames_arrive_whole_also_when_fed_byte_by_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    sent = [(1, b"{}"), (2, b""), (4, os.urandom(16384)), (3, b"x")]
    receiver = _core.Channel(pair[1].fileno(), pair[1].fileno())

    def feed() -> None:
        for byte in frames_of(*sent):
            pair[0].send(bytes([byte]))

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert [receiver.recv(30) for _ in sent] == sent
    feeder.join()
    assert receiver.session == 77


def test_a_flipped_bit_anywhere_in_a_frame_is_found(pair: tuple[socket.socket, socket.socket]) -> None:
    whole = frames_of((1, b'{"magic":"mirrorpair"}'), (2, b"second"))
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        left, right = socket.socketpair()
        with left, right:
            left.sendall(damaged)
            left.shutdown(socket.SHUT_WR)
            receiver = _core.Channel(right.fileno(), right.fileno(), 77)
            with pytest.raises((_core.ProtocolError, EOFError)):
                receive(receiver, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f[0] + f[0], "lost, repeated or reordered"),
        (lambda f: f[1] + f[0], "lost, repeated or reordered"),
        (lambda f: f[0] + f[2], "lost, repeated or reordered"),
        (lambda f: f[0] + frames_of((1, b""), (2, b"b"), session=78)[80:], "another session"),
        (lambda _: b"SSH-2.0-OpenSSH_9\r\n", 'not a mirrorpair frame: "SSH-2.0-OpenSSH_9'),
        (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(200), "not a mirrorpair frame"),
    ],
)
def test_a_stream_that_is_not_what_was_sent_is_told_apart(
    pair: tuple[socket.socket, socket.socket], make: object, message: str
) -> None:
    whole = frames_of((1, b"a"), (2, b"b"), (3, b"c"))
    frames = [whole[at : at + 81] for at in range(0, len(whole), 81)]
    pair[0].sendall(make(frames))  # type: ignore[operator]
    receiver = _core.Channel(pair[1].fileno(), pair[1].fileno())
    with pytest.raises(_core.ProtocolError, match=message):
        receive(receiver, 3)


def test_a_silent_peer_a_closed_one_and_a_too_large_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    receiver = _core.Channel(pair[1].fileno(), pair[1].fileno())
    with pytest.raises(TimeoutError):
        receiver.recv(0.01)
    pair[0].sendall(frames_of((1, bytes(200))))
    with pytest.raises(_core.ProtocolError, match="too large"):
        receiver.recv(5, 100)
    other = _core.Channel(pair[0].fileno(), pair[0].fileno(), 1)
    pair[1].close()
    with pytest.raises((ConnectionError, EOFError)):
        other.recv(5)
    with pytest.raises(ConnectionError):
        other.send(1, b"", 5)
    with pytest.raises(ValueError, match="16384"):
        other.send(1, bytes(16385), 5)


def test_a_channel_needs_open_descriptors() -> None:
    with pytest.raises(OSError, match="descriptor"):
        _core.Channel(-1, -1)
