"""What the data plane does when a client is slow or a read fails. Rules by id in the names.

The file behind an image is made shorter where a read shall fail: it meets the image's end.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from engineside import EIO, FLUSH, FUA, KIB, MIB, READ, WRITE, Client, in_sync, join

from mirrorpair import _core

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from engineside import MakeNode, Node


# --- long reads


def test_readers_that_take_nothing_hold_a_bounded_amount_each(make_node: MakeNode) -> None:
    """20 of them, each with 8 MiB of answers, took all buffers, and stopped long reads."""
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    slow = [Client(node) for _ in range(20)]
    for client in slow:
        for i in range(8):
            client.start(READ, i * MIB, MIB)
    node.flush()
    other = Client(node)
    for i in range(20):
        assert other.read(i * 512 * KIB, MIB) == bytes(MIB)
        other.write(i * 512 * KIB, bytes(MIB))
    # 20 for the other one, 16 that reads may hold (MP_SLAB_READS), and what 20 sockets took, below 512 KiB each
    assert node.engine.volume_status(0).read_bytes < 46 * MIB
    assert node.engine.volume_status(0).clients == 21
    for client in slow[:3]:  # and they get all of it when they want it
        assert all(client.wait(cookie) == (0, bytes(MIB)) for cookie in range(1, 9))


@pytest.mark.parametrize("length", [128 * KIB + 1, MIB, 5 * MIB + 77, 32 * MIB])
def test_a_long_read_between_other_answers(make_node: MakeNode, rng: random.Random, length: int) -> None:
    node = make_node("a", 40 * MIB)
    data = rng.randbytes(40 * MIB)
    os.pwrite(node.fds[0], data, 0)
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    offset = rng.randrange(40 * MIB - length + 1)
    first, write = client.start(READ, offset, length), client.start(WRITE, offset, 3, b"new")
    small, second = client.start(READ, 3, 5000), client.start(READ, offset, length)
    flush = client.start(FLUSH)
    assert client.wait(first) == (0, data[offset : offset + length])  # W2: before the write that came behind it
    assert client.wait(write) == client.wait(flush) == (0, b"")
    after = data[:offset] + b"new" + data[offset + 3 :]
    assert client.wait(small) == (0, after[3:5003])
    assert client.wait(second) == (0, after[offset : offset + length])


def test_another_clients_write_does_not_wait_for_a_reader_that_takes_nothing(make_node: MakeNode) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    slow, other = Client(node), Client(node)
    slow.start(READ, 0, 16 * MIB)
    node.flush()
    for i in range(16):
        other.write(i * MIB, b"x" * MIB)
    assert other.call(FLUSH) == (0, b"")


def test_a_read_that_fails_is_answered_and_one_that_fails_behind_its_header_ends_the_connection(
    make_node: MakeNode,
) -> None:
    node = make_node("a", 64 * MIB)
    node.grant(_core.GRANT_ALONE)
    os.ftruncate(node.fds[0], 60 * MIB)
    client = Client(node)
    assert client.call(READ, 59 * MIB + 512 * KIB, MIB) == (EIO, b"")  # all of it is read in front of the header
    client.write(0, b"goes on")
    assert client.read(0, 7) == b"goes on"
    client.start(READ, 50 * MIB, 14 * MIB)
    got = 0
    while piece := client.sock.recv(MIB):
        got += len(piece)
    assert MIB <= got - 16 <= 10 * MIB
    assert "the image ends there" in node.wait("disk-error").text
    assert Client(node).read(0, 7) == b"goes on"


# --- a disk that fails


def test_what_the_source_cannot_read_holds_up_nothing_else(make_node: MakeNode, rng: random.Random) -> None:
    """The link failed, came back, failed: and each side said that the other one's disk was bad."""
    a, b = make_node("a"), make_node("b")
    a.grant(_core.GRANT_ALONE)
    client = Client(a)
    client.write(0, rng.randbytes(16 * MIB))
    client.call(FLUSH)
    os.ftruncate(a.fds[0], 15 * MIB)
    a.grant(_core.GRANT_PEER)
    join(a, b, [_core.PLAN_BITMAP])
    event = a.wait("disk-error")
    assert event.text.startswith(f"resync at offset {15 * MIB}: ")
    while a.engine.volume_status(0).dirty_blocks > 16:
        a.flush()
    client.write(MIB, b"mirrored meanwhile")
    assert a.engine.link_status().up
    assert not any(event.kind == "link-lost" for event in a.events + b.events)
    os.ftruncate(a.fds[0], 16 * MIB)  # the sector is good again: zeros
    b.engine.detach_link()
    a.wait("link-lost")
    join(a, b, [_core.PLAN_BITMAP], session=78)
    in_sync(a, b)
    assert a.content() == b.content()


@pytest.fixture
def broken_second(make_node: MakeNode) -> Iterator[Node]:
    """Of its two volumes the second one's descriptor became a pipe: nothing works on it, not even fdatasync."""
    node = make_node("a", 4 * MIB, 4 * MIB)
    node.grant(_core.GRANT_ALONE)
    reader, writer = os.pipe()
    try:
        os.dup2(reader, node.fds[1])
        yield node
    finally:
        os.close(reader)
        os.close(writer)


def test_a_volume_that_cannot_be_flushed_is_not_another_volumes_error(broken_second: Node) -> None:
    good, bad = Client(broken_second, 0), Client(broken_second, 1)
    good.write(0, b"kept")
    assert bad.call(FLUSH)[0] != 0
    assert good.call(FLUSH) == (0, b"")
    good.write(5, b"kept too", FUA)
    assert good.call(FLUSH) == (0, b"")
    assert bad.call(FLUSH)[0] != 0  # not forgotten with the first answer
    assert broken_second.flush().b != 0
    event = broken_second.wait("disk-error")
    assert (event.a, event.text[:7]) == (1, "flush: ")


def test_errors_of_a_disk_that_nobody_reads_are_counted_not_kept(broken_second: Node) -> None:
    good, bad = Client(broken_second, 0), Client(broken_second, 1)
    count = 700
    for _ in range(count):
        assert bad.call(READ, 0, 512) == (EIO, b"")
    os.ftruncate(broken_second.fds[0], 0)
    assert good.call(READ, 0, 512) == (EIO, b"")  # another volume's first one is told all the same
    broken_second.flush()
    told = [event for event in broken_second.events if event.kind == "disk-error" and event.text.startswith("read")]
    assert [event.a for event in told] == [1] * 64 + [0]
    assert sum("(and 636 more)" in event.text for event in told) == 1


def test_a_second_save_meanwhile_is_refused(make_node: MakeNode) -> None:
    node = make_node("a")
    client = Client(node)
    write = client.start(WRITE, 0, 1, b"x")  # nothing lets it begin, so the first save waits
    while not node.engine.volume_status(0).clients:
        node.flush()
    node.flush()
    node.engine.save(1)
    node.engine.save(2)
    refused = node.wait("saved")
    assert (refused.a, refused.b) == (2, errno.EBUSY)
    node.grant(_core.GRANT_ALONE)
    assert client.wait(write) == (0, b"")
    saved = node.wait("saved")
    assert (saved.a, saved.b) == (1, 0)
