"""Defects of the data plane that a review found: each test failed before its repair. Rules by id in the names.

The image's descriptor is what fails on demand: `os.dup2` puts another file behind the number that the engine holds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import engineside
import frames
import pytest
from engineside import BLOCK, FLUSH, FUA, KIB, MIB, READ, WRITE, ZEROES, Client, Node, in_sync, join, new_metadata

from mirrorpair import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engineside import MakeNode


SHORT_S = 20.0


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never comes is not waited for half a minute."""
    monkeypatch.setattr(engineside, "LIMIT_S", SHORT_S)
    monkeypatch.setattr(frames, "LIMIT_S", SHORT_S)


def attach_by_hand(
    node: Node, *, source: bool, timeout: float = 20.0, session: int = 9, plan: int = _core.PLAN_NONE, epoch: int = 1
) -> frames.Peer:
    """A link whose other end is `frames.Peer`; nothing has been said yet."""
    near, far = socket.socketpair()
    with near:
        channel = _core.Channel(near.fileno(), near.fileno(), session)
        node.engine.attach_link(channel, epoch=epoch, source=source, plans=[plan] * len(node.sizes), timeout=timeout)
    node.sockets.append(far)
    return frames.Peer(far, session, epoch=epoch)


def in_sync_by_hand(node: Node, timeout: float = 20.0, session: int = 9) -> frames.Peer:
    """As the source of a hand-made target, with nothing to resync."""
    peer = attach_by_hand(node, source=True, timeout=timeout, session=session)
    peer.send(frames.BITS_END)
    peer.expect(frames.MERGED)
    peer.expect(frames.RESYNC_DONE)
    node.wait("resync-done")
    return peer


@contextlib.contextmanager
def broken(node: Node, flags: int = os.O_RDONLY) -> Iterator[None]:
    """The image takes no write for that long: its descriptor is a read-only one or, with O_PATH, one of no use."""
    good, bad = os.dup(node.fds[0]), os.open(node.paths[0], flags)
    os.dup2(bad, node.fds[0])
    os.close(bad)
    try:
        yield
    finally:
        os.dup2(good, node.fds[0])
        os.close(good)


@contextlib.contextmanager
def living(peer: frames.Peer) -> Iterator[None]:
    """Meanwhile the peer says that it lives, and nothing else."""
    stop = threading.Event()

    def live() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                peer.send(frames.PING)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- 1: the node ends itself

LONG_WRITE = """
import sys
from pathlib import Path
import engineside
from mirrorpair import _core
a, b = (engineside.Node(Path(sys.argv[1]), name) for name in "ab")
a.grant(_core.GRANT_PEER)
engineside.join(a, b)
engineside.in_sync(a, b)
data = bytes(range(256)) * (int(sys.argv[2]) // 256) + b"end"
client = engineside.Client(a)
client.write(5, data)
assert client.read(5, len(data)) == data
assert a.content() == b.content()
assert a.content()[5 : 5 + len(data)] == data
"""


@pytest.mark.parametrize("length", [MIB, 2 * MIB, 8 * MIB])
def test_a_write_longer_than_a_frame_goes_to_the_peer(tmp_path: Path, length: int) -> None:
    """It met an assertion in mp_frame_encode: the daemon aborted. In a process of its own for that reason."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(_core.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", LONG_WRITE, str(tmp_path), str(length)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- 2, 3: a write of an earlier role lands on newer data


def test_c1_closing_the_clients_ends_requests_that_never_began(make_node: MakeNode) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_NONE)
    client = Client(node)
    client.start(WRITE, 0, 3, b"old")
    client.start(FLUSH)
    client.start(READ, 0, 3)
    while not node.engine.volume_status(0).clients:
        node.flush()
    node.flush()
    node.engine.close_clients(graceful=False)
    node.wait("clients-closed")
    os.pwrite(node.fds[0], b"new", 0)  # what a later primary wrote
    node.grant(_core.GRANT_ALONE)
    assert Client(node).read(0, 3) == b"new"
    node.flush()
    assert node.content()[:3] == b"new"


def test_w9_a_write_of_an_earlier_role_is_not_sent_again(make_node: MakeNode) -> None:
    """A held write of a demoted primary: its peer became primary, wrote the same block, and gave the role back."""
    a, b = make_node("a"), make_node("b")
    a.grant(_core.GRANT_PEER, epoch=1)
    join(a, b, session=1)
    in_sync(a, b)
    b.engine.detach_link()
    a.wait("link-lost")
    Client(a).start(WRITE, 0, 3, b"old")
    peer = in_sync_by_hand(a, session=2)  # takes the write, and is gone before it confirms it
    old = Client(a)
    held = old.start(WRITE, BLOCK, 3, b"old")
    while (frame := peer.receive()) is not None and (frame.kind, frame.offset) != (frames.WRITE, BLOCK):
        pass
    peer.sock.close()
    a.wait("link-lost")
    assert old.pending(held)
    a.grant(_core.GRANT_NONE, epoch=1)  # demoted
    a.engine.close_clients(graceful=False)
    b.grant(_core.GRANT_ALONE, epoch=2)
    client = Client(b)
    client.write(BLOCK, b"new")
    client.write(0, b"new")
    b.grant(_core.GRANT_PEER, epoch=2)
    join(b, a, [_core.PLAN_BITMAP], epoch=2, session=3)
    in_sync(b, a)
    b.engine.close_clients(graceful=False)
    b.wait("clients-closed")
    b.grant(_core.GRANT_NONE, epoch=3)
    b.engine.detach_link()
    a.wait("link-lost")
    a.grant(_core.GRANT_PEER, epoch=3)
    join(a, b, [_core.PLAN_BITMAP], epoch=3, session=4)
    in_sync(a, b)
    for node in (a, b):
        assert (node.content()[:3], node.content()[BLOCK : BLOCK + 3]) == (b"new", b"new")


def test_a_clean_stop_does_not_wait_for_a_write_that_nobody_can_confirm(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    peer = in_sync_by_hand(a)
    Client(a).start(WRITE, 0, 3, b"abc")
    peer.expect(frames.WRITE)
    a.grant(_core.GRANT_NONE)
    a.engine.close_clients(graceful=False)
    a.engine.detach_link()
    a.wait("clients-closed")
    a.engine.save(1)
    assert a.wait("saved").b == 0
    assert a.dirty() == 1  # M3: here it is, there perhaps not


# --- 4, 5: durability that is not there


def test_w5_a_flush_after_a_failed_fdatasync_is_no_success(make_node: MakeNode) -> None:
    """The kernel reports a lost page once; what was acknowledged before is gone, whatever the next fdatasync says."""
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    client.write(0, b"abc")
    with broken(node, os.O_PATH):
        assert client.call(FLUSH)[0] != 0
    assert client.call(FLUSH)[0] != 0
    assert node.flush().b != 0


def test_a8_a_target_whose_fdatasync_failed_confirms_no_barrier_again(make_node: MakeNode) -> None:
    node = make_node("b")
    peer = attach_by_hand(node, source=False)
    peer.expect(frames.BITS_END)
    peer.send(frames.WRITE, data=b"abc", count=1)
    peer.expect(frames.ACK)
    with broken(node, os.O_PATH):
        peer.send(frames.BARRIER, frames.u64(1), count=1)
        assert peer.expect(frames.ERROR)
    node.wait("link-lost")
    again = attach_by_hand(node, source=False, session=10)
    again.expect(frames.BITS_END)
    again.send(frames.BARRIER, frames.u64(0), count=2)
    frame = again.receive()
    assert frame is None or frame.kind == frames.ERROR


def test_a_failed_flush_names_the_volume_that_failed(make_node: MakeNode) -> None:
    node = make_node("b", MIB, MIB)
    peer = attach_by_hand(node, source=False)
    for _ in node.sizes:
        peer.expect(frames.BITS_END)
    good, bad = os.dup(node.fds[1]), os.open(node.paths[1], os.O_PATH)
    os.dup2(bad, node.fds[1])
    peer.send(frames.BARRIER, frames.u64(0), count=1)
    assert node.wait("disk-error").a == 1
    os.dup2(good, node.fds[1])
    os.close(good)
    os.close(bad)


def test_w5_g3_a_flush_is_not_answered_alone_because_of_another_barrier(make_node: MakeNode) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_PEER)  # and no link
    client = Client(node)
    flush = client.start(FLUSH)
    assert client.read(0, 1) == b"\0"  # so it was read
    node.flush()  # as Python does when it drains
    client.read(0, 1)
    assert flush not in client.answers
    assert client.pending(flush)


@pytest.mark.parametrize("mode", [_core.GRANT_NONE, _core.GRANT_ALONE])
def test_a10_a_flush_needs_the_grant_too(make_node: MakeNode, mode: int) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    client.write(0, b"x")
    node.grant(mode, until=1)  # over, or ran out long ago
    node.flush()
    flush = client.start(FLUSH)
    node.flush()
    node.flush()
    assert client.pending(flush)
    node.grant(_core.GRANT_ALONE)
    assert client.wait(flush) == (0, b"")


# --- 6: a bit that goes too early


def test_r3_m3_a_local_write_that_fails_keeps_its_bit(make_node: MakeNode) -> None:
    """The block was settled and its barrier was under way; then a write reached only the peer."""
    a = make_node("a")
    a.grant(_core.GRANT_ALONE)
    client = Client(a)
    client.write(0, b"first")
    a.grant(_core.GRANT_PEER)
    peer = attach_by_hand(a, source=True)
    peer.send(frames.BITS_END)
    peer.expect(frames.MERGED)
    bulk = peer.expect(frames.BULK)
    peer.send(frames.SETTLED, struct.pack("<QQQ", 0, BLOCK, 0), count=bulk.unit)
    barrier = peer.expect(frames.BARRIER)
    with broken(a):
        write = client.start(WRITE, 0, 6, b"second")
        frame = peer.expect(frames.WRITE)
        peer.send(frames.ACK, struct.pack("<I", frame.unit))
        assert client.wait(write)[0] != 0
    assert a.dirty() == 1
    peer.send(frames.FLUSHED, count=barrier.unit)
    peer.receive()
    assert a.dirty() == 1  # the peer has "second", the image here "first"


# --- 7: nothing moves any more


def test_w2_a_write_into_a_later_step_of_a_long_trim_stays(make_node: MakeNode) -> None:
    node = make_node("a", 256 * MIB)
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    client.write(200 * MIB, b"warm")  # its extent is hot
    client.call(FLUSH)
    trim = client.start(ZEROES, 0, 256 * MIB)
    write = client.start(WRITE, 200 * MIB, 5, b"later")
    assert client.wait(write) == client.wait(trim) == (0, b"")
    assert client.read(200 * MIB, 5) == b"later"


def test_payloads_that_never_come_do_not_stop_the_others(make_node: MakeNode) -> None:
    """28 bytes each take 32 MiB of the 64 MiB of buffers, for as long as their clients like."""
    node = make_node("a", 64 * MIB)
    node.grant(_core.GRANT_ALONE)
    good = Client(node)
    good.write(0, b"before")
    for _ in range(2):
        bad = Client(node)
        bad.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 32 * MIB))
    while node.engine.volume_status(0).clients < 3:
        node.flush()
    node.flush()
    good.write(0, b"after")
    assert good.read(0, 5) == b"after"


def test_a_client_that_reads_no_answers_does_not_take_all_requests(make_node: MakeNode) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    good, bad = Client(node), Client(node)
    bad.sock.setblocking(False)
    wrong = struct.pack(">IHHQQI", 0x25609513, 0, 99, 1, 0, 1) * 1000
    deadline = time.monotonic() + SHORT_S
    with contextlib.suppress(BlockingIOError):
        while time.monotonic() < deadline:
            bad.sock.send(wrong)
            node.flush()
    good.write(0, b"fine")


def test_a_source_without_buffers_still_hears_that_a_unit_is_settled(make_node: MakeNode) -> None:
    """SETTLED had to wait for a buffer, the buffers for ACKs behind it: nothing moved before the time-out."""
    a = make_node("a", 128 * MIB)
    a.grant(_core.GRANT_PEER)
    a.engine.set_all_dirty(0)
    peer = attach_by_hand(a, source=True)
    peer.send(frames.BITS_END)
    peer.expect(frames.MERGED)
    units = [peer.expect(frames.DIGESTS) for _ in range(16)]  # 16 x 1.25 MiB; and 160 x 128 KiB are all that there is
    clients = [Client(a) for _ in range(12)]
    cookies, tags = [], []
    for i in range(160):
        client = clients[i // 31]
        cookies.append((client, client.start(WRITE, 64 * MIB + i * 128 * KIB, 128 * KIB, bytes(128 * KIB))))
        frame = peer.receive()
        while frame is not None and frame.kind == frames.BARRIER:  # one of the engine's own, which stays unanswered
            frame = peer.receive()
        assert frame is not None
        assert frame.kind == frames.WRITE
        tags.append(frame.unit)
    peer.send(frames.SETTLED, struct.pack("<QQQ", MIB, 0, 0), count=units[0].unit)
    for tag in tags:
        peer.send(frames.ACK, struct.pack("<I", tag))
    for client, cookie in cookies:
        assert client.wait(cookie) == (0, b"")


def test_f8_a_peer_that_answers_no_barrier_is_given_up(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    peer = in_sync_by_hand(a, timeout=1.0)
    with living(peer):
        Client(a).start(FLUSH)
        peer.expect(frames.BARRIER)
        assert a.wait("link-lost").b == 13


def test_f8_a_peer_that_settles_no_unit_is_given_up(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_ALONE)
    a.engine.set_all_dirty(0)
    a.grant(_core.GRANT_PEER)
    peer = attach_by_hand(a, source=True, timeout=1.0)
    peer.send(frames.BITS_END)
    with living(peer):
        peer.expect(frames.MERGED)
        peer.expect(frames.DIGESTS)
        assert a.wait("link-lost").b == 13


def test_what_the_pool_has_done_is_acked_in_the_middle_of_a_stream(make_node: MakeNode) -> None:
    """The target read its socket until it was empty, and did nothing else meanwhile. All of it is there at once."""
    node = make_node("b", 64 * MIB)
    near, far = socket.socketpair()
    node.sockets.append(far)
    peer = frames.Peer(far, 9, epoch=1)
    count = 1500
    peer.send(frames.ZERO, frames.u64(1), count=1, hold=True)  # done by the pool
    for i in range(count):  # each page is a new one, which takes the file system some time
        peer.send(frames.WRITE, data=b"x", count=2 + i, offset=(1 + i * 7) * 4096, hold=i < count - 1)
    with near:
        channel = _core.Channel(near.fileno(), near.fileno(), 9)
        node.engine.attach_link(channel, epoch=1, source=False, plans=[_core.PLAN_NONE], timeout=20)
    order: list[int] = []
    while len(order) < count + 1:
        frame = peer.receive()
        assert frame is not None
        if frame.kind == frames.ACK:
            order += struct.unpack(f"<{len(frame.meta) // 4}I", frame.meta)
    assert order.index(1) < count


# --- 8: smaller ones


@pytest.mark.parametrize("kind", ["bulk", "digests", "barrier", "merged", "done"])
def test_w9_every_frame_of_another_epoch_ends_the_session(make_node: MakeNode, kind: str) -> None:
    node = make_node("b")
    peer = attach_by_hand(node, source=False, epoch=5)
    peer.expect(frames.BITS_END)
    if kind == "bulk":
        peer.send(frames.BULK, frames.bulk(BLOCK, 1), b"x" * BLOCK, epoch=4)
    elif kind == "digests":
        peer.send(frames.DIGESTS, frames.digests(BLOCK, [None]), epoch=4)
    elif kind == "barrier":
        peer.send(frames.BARRIER, frames.u64(0), count=1, epoch=4)
    elif kind == "merged":
        peer.send(frames.MERGED, frames.u64(0), epoch=4)
    else:
        peer.send(frames.RESYNC_DONE, epoch=4)
    assert node.wait("link-lost").b == 1
    assert node.content() == bytes(16 * MIB)


def test_an_engine_that_was_never_started_gives_its_descriptors_back(tmp_path: Path) -> None:
    image = os.open(tmp_path / "i", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(image, MIB)
    meta = new_metadata(tmp_path / "m", MIB)
    engine = _core.Engine([(image, MIB, meta, BLOCK)])
    near, far = socket.socketpair()
    with near, far:
        engine.add_client(near.fileno(), 0)
        near.close()
        engine.stop()
        far.settimeout(SHORT_S)
        assert far.recv(1) == b""
    os.close(image)
    os.close(meta)


def test_fua_is_durable_on_both_and_resent_with_it(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    peer = in_sync_by_hand(a)
    client = Client(a)
    write = client.start(WRITE, 0, 1, b"x", FUA)
    peer.expect(frames.WRITE)
    peer.sock.close()
    a.wait("link-lost")
    again = attach_by_hand(a, source=True, session=11)
    frame = again.expect(frames.WRITE)
    again.send(frames.ACK, struct.pack("<I", frame.unit))
    assert client.wait(write) == (0, b"")


# --- second round


def test_c1_a_flush_on_its_way_does_not_keep_a_closed_client(make_node: MakeNode) -> None:
    """Its barrier became void, and the FLUSH went back to wait for a grant that does not come."""
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    peer = in_sync_by_hand(a)
    Client(a).start(FLUSH)
    peer.expect(frames.BARRIER)
    a.grant(_core.GRANT_NONE)
    a.engine.close_clients(graceful=False)
    a.engine.detach_link()
    a.wait("clients-closed")


def test_w9_a_local_write_of_an_earlier_role_does_not_land_on_the_next_session(make_node: MakeNode) -> None:
    """It still stood in the pool's queue when this node became the target."""
    a = make_node("a", 64 * MIB)
    a.grant(_core.GRANT_PEER)
    peer = in_sync_by_hand(a)
    client = Client(a)
    count = 200
    for i in range(count):
        client.start(WRITE, i * 64 * KIB, 3, b"old", FUA)
    for _ in range(count):
        frame = peer.receive()
        assert frame is not None
    a.grant(_core.GRANT_NONE)
    a.engine.close_clients(graceful=False)
    a.engine.detach_link()
    source = attach_by_hand(a, source=False, session=10, epoch=2)
    for i in range(count):
        source.send(frames.WRITE, data=b"new", count=i + 1, offset=i * 64 * KIB)
    acked = 0
    while acked < count:
        frame = source.receive()
        assert frame is not None
        acked += len(frame.meta) // 4 if frame.kind == frames.ACK else 0
    a.wait("clients-closed")  # so nothing of theirs is on its way any more
    content = a.content()
    assert [i for i in range(count) if content[i * 64 * KIB : i * 64 * KIB + 3] != b"new"] == []


def test_a10_what_came_between_two_grants_is_served_by_the_second(make_node: MakeNode) -> None:
    """The first one ran out, the second came before a tick had noticed it."""
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    client.read(0, 1)
    for _ in range(15):
        until = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 5_000_000
        node.grant(_core.GRANT_ALONE, until=until)
        while time.clock_gettime_ns(time.CLOCK_BOOTTIME) <= until:
            pass
        read = client.start(READ, 0, 1)
        node.flush()  # asked for later than the read came, so that was looked at before
        node.grant(_core.GRANT_ALONE)
        assert client.wait(read) == (0, b"\0")


def test_a_read_that_had_no_buffer_is_done_when_one_comes_back(make_node: MakeNode) -> None:
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    others: list[Client] = []
    good = Client(node)
    pending = False
    while not pending:  # one more that reads no answers: each is kept at least 128 KiB, until nothing is left
        others.append(Client(node))
        assert len(others) < 300
        for i in range(4):
            others[-1].start(READ, i * MIB, MIB)
        read = good.start(READ, 0, MIB)
        node.flush()  # asked for later than the read came, so that was looked at before
        node.flush()
        pending = good.pending(read)
        if not pending:
            assert good.wait(read) == (0, bytes(MIB))
    readers = [threading.Thread(target=lambda o=other: [o.wait(cookie) for cookie in range(1, 5)]) for other in others]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert good.wait(read) == (0, bytes(MIB))


def test_a_resync_after_a_failed_local_write_does_not_go_on_for_ever(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_ALONE)
    client = Client(a)
    client.write(0, b"first")
    a.grant(_core.GRANT_PEER)
    peer = attach_by_hand(a, source=True)
    peer.send(frames.BITS_END)
    peer.expect(frames.MERGED)
    unit = peer.expect(frames.BULK)
    with broken(a):
        write = client.start(WRITE, 5 * BLOCK, 6, b"second")
        peer.send(frames.ACK, struct.pack("<I", peer.expect(frames.WRITE).unit))
        assert client.wait(write)[0] != 0
    peer.send(frames.SETTLED, struct.pack("<QQQ", 0, BLOCK, 0), count=unit.unit)
    copied = 0
    peer.sock.settimeout(1.0)  # silence is an end too
    with contextlib.suppress(TimeoutError):
        while (frame := peer.receive()) is not None and frame.kind != frames.RESYNC_DONE:
            if frame.kind == frames.BARRIER:
                peer.send(frames.FLUSHED, count=frame.unit)
            else:
                assert frame.kind == frames.BULK
                copied += 1
                assert copied < 10
                length = struct.unpack_from("<I", frame.meta)[0]
                peer.send(frames.SETTLED, struct.pack("<QQQ", 0, length, 0), count=frame.unit)


def test_w5_a_fua_write_that_fails_may_have_reported_lost_pages(make_node: MakeNode) -> None:
    """pwritev2 with RWF_DSYNC takes the same once-only report from the kernel as fdatasync."""
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    client.write(0, b"abc")
    with broken(node, os.O_PATH):
        assert client.call(WRITE, 4096, 1, b"x", FUA)[0] != 0
    assert client.call(FLUSH)[0] != 0
