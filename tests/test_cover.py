"""A source whose disk fails, with a peer that has everything (csrc/cover.c): the engine's part of F9 and A14.

A disk is made to fail by putting a pipe in the place of its descriptor: nothing works on it any more.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import frames
import pytest
from engineside import BLOCK, EIO, FLUSH, FUA, KIB, MIB, READ, TRIM, WRITE, Client, join

from mirrorpair import _core

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from engineside import MakeNode, Node

BOTH = _core.COVER_READS | _core.COVER_HOLD
ESHUTDOWN = 108


class Pair:
    """Linked engines with the same content; the source's disk can be broken and mended."""

    def __init__(self, a: Node, b: Node, data: bytes) -> None:
        self.a, self.b, self.data = a, b, data
        for node in (a, b):
            os.pwrite(node.fds[0], data, 0)
        self._whole = os.dup(a.fds[0])
        self._pipe = os.pipe()
        a.grant(_core.GRANT_PEER, cover=BOTH)
        join(a, b)
        self.client = Client(a)

    def break_disk(self, node: Node | None = None) -> None:
        os.dup2(self._pipe[0], (node or self.a).fds[0])

    def mend_disk(self) -> None:
        os.dup2(self._whole, self.a.fds[0])

    def close(self) -> None:
        for fd in (*self._pipe, self._whole):
            os.close(fd)


@pytest.fixture
def pair(make_node: MakeNode, rng: random.Random) -> Iterator[Pair]:
    made = Pair(make_node("a"), make_node("b"), rng.randbytes(16 * MIB))
    yield made
    made.close()


def settled(node: Node) -> None:
    """What was asked of the engine before has been done: a barrier's end came after it, whatever it says."""
    node.flush()


@pytest.mark.parametrize("length", [1, 4096, 100_000, 128 * KIB + 1, 5 * MIB])
def test_f9_what_this_disk_cannot_read_is_read_from_the_peer(pair: Pair, rng: random.Random, length: int) -> None:
    pair.break_disk()
    for _ in range(10):
        offset = rng.randrange(16 * MIB - length + 1)
        assert pair.client.read(offset, length) == pair.data[offset : offset + length]
    assert pair.a.wait("disk-error").text.startswith("read of ")
    assert pair.a.engine.link_status().up


def test_f9_many_reads_at_once(pair: Pair, rng: random.Random) -> None:
    """More than the peer has buffers for: the link is paused for those, and everything else goes on."""
    pair.break_disk()
    clients = [Client(pair.a) for _ in range(8)]
    asked = []
    for _ in range(60):
        for client in clients:
            offset = rng.randrange(15 * MIB)
            asked.append((client, client.start(READ, offset, 128 * KIB), offset))
    for client, cookie, offset in asked:
        assert client.wait(cookie) == (0, pair.data[offset : offset + 128 * KIB])


def test_f9_a_read_is_not_covered_without_the_word_for_it(pair: Pair) -> None:
    pair.break_disk()
    pair.a.grant(_core.GRANT_PEER)
    assert pair.client.call(READ, 0, 4096)[0] == EIO
    pair.a.grant(_core.GRANT_PEER, cover=_core.COVER_READS)
    assert pair.client.read(0, 4096) == pair.data[:4096]


def test_f9_what_nobody_can_read_is_an_error(pair: Pair) -> None:
    pair.break_disk()
    pair.break_disk(pair.b)
    assert pair.client.call(READ, 0, 4096)[0] == EIO
    assert pair.b.wait("disk-error").text.startswith("read of 4096 bytes at offset 0")


def test_f9_a_read_sees_the_writes_in_front_of_it_and_holds_up_those_behind_it(pair: Pair, rng: random.Random) -> None:
    """The reads of this test go to the peer; its writes still work here: some sectors of the disk are bad, not all."""
    pair.break_disk()
    for _ in range(200):
        offset, new = rng.randrange(15 * MIB), rng.randbytes(rng.choice([512, 70_000, 300_000]))
        pair.mend_disk()
        write = pair.client.start(WRITE, offset, len(new), new)
        assert pair.client.wait(write) == (0, b"")
        pair.break_disk()
        assert pair.client.read(offset, len(new)) == new


def test_f9_a_read_on_its_way_when_the_link_is_lost_is_asked_again(pair: Pair) -> None:
    a = pair.a
    pair.break_disk()
    a.engine.detach_link()
    peer = hostile(a, source=True)
    read = pair.client.start(READ, 4096, 4096)
    asked = peer.expect(frames.READ)
    assert (asked.offset, asked.meta) == (4096, frames.u64(4096))
    peer.sock.close()
    a.wait("link-lost")
    settled(a)
    assert pair.client.pending(read)
    pair.b.engine.detach_link()
    join(a, pair.b, session=79)
    assert pair.client.wait(read) == (0, pair.data[4096:8192])


def test_f9_a_read_that_waits_for_a_link_ends_when_there_is_nobody_to_wait_for(pair: Pair) -> None:
    pair.break_disk()
    pair.a.engine.detach_link()
    read = pair.client.start(READ, 4096, 4096)
    pair.a.wait("disk-error")
    settled(pair.a)
    assert pair.client.pending(read)
    pair.a.grant(_core.GRANT_ALONE)
    assert pair.client.wait(read)[0] == EIO


def test_f9_a_read_of_a_client_that_left_ends_with_the_link(pair: Pair) -> None:
    pair.break_disk()
    peer = hostile(pair.a, source=True)
    pair.client.start(READ, 4096, 4096)
    pair.client.start(READ, 0, MIB)
    peer.expect(frames.READ)
    pair.a.grant(_core.GRANT_NONE)
    pair.a.engine.close_clients(graceful=False)
    settled(pair.a)
    pair.a.engine.detach_link()
    pair.a.wait("clients-closed")
    assert pair.a.engine.volume_status(0).clients == 0


# --- writes that this disk lacks


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("length", [512, 300_000])
def test_a14_a_write_that_only_the_peer_has_is_held_until_the_abdication(pair: Pair, flags: int, length: int) -> None:
    data = b"x" * length
    pair.break_disk()
    write = pair.client.start(WRITE, 7, length, data, flags)
    pair.a.wait("disk-error")
    over = pair.client.start(READ, 0, 4096)
    settled(pair.a)
    settled(pair.a)
    assert pair.client.pending(write)
    assert pair.client.pending(over)  # A6
    assert pair.b.content()[7 : 7 + length] == data
    pair.a.grant(_core.GRANT_NONE)
    settled(pair.a)
    assert pair.client.pending(write)
    pair.a.engine.forgive()
    assert pair.client.wait(write) == (0, b"")
    pair.a.engine.close_clients(graceful=False)
    with pytest.raises(EOFError):
        pair.client.wait(over)
    assert pair.a.dirty() > 0


def test_a14_forgiven_answers_are_sent_before_the_connection_ends(pair: Pair) -> None:
    pair.break_disk()
    writes = [pair.client.start(WRITE, i * BLOCK, 4096, b"x" * 4096) for i in range(50)]
    for _ in range(50):
        pair.a.wait("disk-error")
    while pair.a.engine.link_status().unacked:
        settled(pair.a)
    pair.a.grant(_core.GRANT_NONE)
    pair.a.engine.forgive()
    pair.a.engine.close_clients(graceful=False)
    assert all(pair.client.wait(write) == (0, b"") for write in writes)
    with pytest.raises(EOFError):
        pair.client.wait(999)


def test_a14_without_an_abdication_to_come_it_is_this_disks_error(pair: Pair) -> None:
    pair.break_disk()
    write = pair.client.start(WRITE, 0, 4096, b"x" * 4096)
    pair.a.wait("disk-error")
    settled(pair.a)
    assert pair.client.pending(write)
    pair.a.grant(_core.GRANT_PEER, cover=_core.COVER_READS)
    assert pair.client.wait(write)[0] == EIO
    assert pair.client.call(WRITE, BLOCK, 4096, b"x" * 4096)[0] == EIO


def test_a14_what_the_peer_has_not_confirmed_is_never_answered_well(pair: Pair) -> None:
    pair.break_disk()
    peer = hostile(pair.a, source=True)
    write = pair.client.start(WRITE, 0, 4096, b"x" * 4096)
    peer.expect(frames.WRITE)
    pair.a.wait("disk-error")
    peer.sock.close()
    pair.a.wait("link-lost")
    pair.a.grant(_core.GRANT_NONE)
    pair.a.engine.forgive()
    assert pair.client.wait(write)[0] == ESHUTDOWN


def test_a14_a_long_trim_goes_on_at_the_peer(make_node: MakeNode) -> None:
    pair = Pair(make_node("a", 80 * MIB), make_node("b", 80 * MIB), b"\xff" * (80 * MIB))
    try:
        pair.break_disk()
        trim = pair.client.start(TRIM, 4096, 70 * MIB)
        pair.a.wait("disk-error")
        while pair.b.engine.volume_status(0).written_bytes < 70 * MIB:
            settled(pair.a)
        settled(pair.a)
        assert pair.client.pending(trim)
        pair.a.engine.forgive()
        assert pair.client.wait(trim) == (0, b"")
        assert pair.b.content() == b"\xff" * 4096 + bytes(70 * MIB) + b"\xff" * (10 * MIB - 4096)
    finally:
        pair.close()


def test_a14_a_flush_that_only_the_peer_has_done_is_held_until_the_abdication(pair: Pair) -> None:
    pair.client.write(0, b"before")
    pair.break_disk()
    flush = pair.client.start(FLUSH)
    assert pair.a.wait("disk-error").text.startswith("flush: ")
    settled(pair.a)
    assert pair.client.pending(flush)
    pair.a.engine.forgive()
    assert pair.client.wait(flush) == (0, b"")
    again = pair.client.start(FLUSH)
    settled(pair.a)
    settled(pair.a)
    assert pair.client.pending(again)
    pair.a.grant(_core.GRANT_PEER)
    assert pair.client.wait(again)[0] != 0


def test_a14_a_flush_is_not_forgiven_while_the_peer_has_not_done_it(pair: Pair) -> None:
    pair.client.write(0, b"before")
    pair.break_disk()
    pair.a.engine.detach_link()
    pair.b.engine.detach_link()
    flush = pair.client.start(FLUSH)
    settled(pair.a)
    pair.a.engine.forgive()
    settled(pair.a)
    assert pair.client.pending(flush)
    join(pair.a, pair.b, session=78)
    settled(pair.a)
    pair.a.engine.forgive()
    assert pair.client.wait(flush) == (0, b"")


def test_a14_a_client_that_left_holds_up_nothing(pair: Pair) -> None:
    pair.break_disk()
    pair.client.start(WRITE, 0, 4096, b"x" * 4096)
    pair.client.start(FLUSH)
    pair.a.wait("disk-error")
    settled(pair.a)
    pair.client.close()
    other = Client(pair.a)
    assert other.read(BLOCK, 4096) == pair.data[BLOCK : BLOCK + 4096]
    pair.a.engine.close_clients(graceful=False)
    pair.a.wait("clients-closed")
    assert pair.a.engine.volume_status(0).in_flight == 0


# --- a peer that makes no sense


def hostile(a: Node, *, source: bool) -> frames.Peer:
    near, far = socket.socketpair()
    with near:
        channel = _core.Channel(near.fileno(), near.fileno(), 9)
        a.engine.attach_link(channel, epoch=1, source=source, plans=[_core.PLAN_NONE], timeout=20.0)
    a.sockets.append(far)
    return frames.Peer(far, 9, epoch=1)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 128 * KIB + 1), (16 * MIB, 1), (16 * MIB - 1, 2), (2**64 - 1, 4096), (0, 2**64 - 1)],
)
def test_a_read_of_the_peer_outside_the_volume_ends_the_link(make_node: MakeNode, offset: int, length: int) -> None:
    node = make_node("a")
    hostile(node, source=False).send(frames.READ, frames.u64(length), offset=offset)
    assert node.wait("link-lost").text == "a read outside the volume"


def test_an_answer_that_nobody_asked_for_ends_the_link(make_node: MakeNode) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_PEER, cover=BOTH)
    for payload in (b"", b"x" * 4096):
        hostile(node, source=True).send(frames.READ_DATA, b"", payload, count=64)
        assert node.wait("link-lost").text == "an answer to a read that is not on its way"


def test_an_answer_of_another_length_than_was_asked_for_ends_the_link(pair: Pair) -> None:
    pair.break_disk()
    peer = hostile(pair.a, source=True)
    read = pair.client.start(READ, 0, 4096)
    asked = peer.expect(frames.READ)
    peer.send(frames.READ_DATA, b"", b"x" * 4095, count=asked.unit)
    assert pair.a.wait("link-lost").text == "an answer to a read that is not on its way"
    pair.b.engine.detach_link()
    join(pair.a, pair.b, session=78)
    assert pair.client.wait(read) == (0, pair.data[:4096])
