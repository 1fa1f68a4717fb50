"""The data plane: NBD requests, replication, the grant, lost links, resync, restarts. Rules by id in the names.

After every test that replicates, the images are compared byte by byte.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

import frames
import pytest
from engineside import (
    BLOCK,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    FLUSH,
    FUA,
    KIB,
    MIB,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    ZEROES,
    Client,
    Node,
    in_sync,
    join,
)

from mirrorpair import _core

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from engineside import MakeNode


@pytest.fixture
def alone(make_node: MakeNode) -> Node:
    node = make_node("a")
    node.grant(_core.GRANT_ALONE)
    return node


@pytest.fixture
def pair(make_node: MakeNode) -> tuple[Node, Node]:
    a, b = make_node("a"), make_node("b")
    a.grant(_core.GRANT_PEER)
    join(a, b)
    in_sync(a, b)
    return a, b


def play(client: Client, model: bytearray, rng: random.Random, count: int, depth: int = 8) -> None:
    """Random requests, several at once; every answer is checked against the model. Overlaps are frequent."""
    size, hot = len(model), len(model) // 8
    flying: list[tuple[int, bytes | None]] = []
    for _ in range(count):
        length = rng.choice([1, 511, 512, 4096, 65536, rng.randrange(1, 300 * KIB)])
        offset = rng.randrange(min(size - length, rng.choice([hot, size])))
        kind = rng.choice([WRITE, WRITE, WRITE, READ, READ, TRIM, ZEROES, FLUSH])
        flags = rng.choice([0, 0, 0, FUA]) if kind in (WRITE, TRIM, ZEROES) else 0
        expected = None
        if kind == READ:
            expected = bytes(model[offset : offset + length])
            cookie = client.start(READ, offset, length)
        elif kind == FLUSH:
            cookie = client.start(FLUSH)
        elif kind == WRITE:
            data = rng.randbytes(length)
            cookie = client.start(WRITE, offset, length, data, flags)
            model[offset : offset + length] = data
        else:
            flags |= rng.choice([0, NO_HOLE]) if kind == ZEROES else 0
            cookie = client.start(kind, offset, length, flags=flags)
            model[offset : offset + length] = bytes(length)
        # One connection's requests may overlap while they fly: the engine serialises them in the order they came (W2).
        flying.append((cookie, expected))
        if len(flying) >= depth:
            check(client, *flying.pop(0))
    for cookie, expected in flying:
        check(client, cookie, expected)


def check(client: Client, cookie: int, expected: bytes | None) -> None:
    error, data = client.wait(cookie)
    assert error == 0
    assert expected is None or data == expected


# --- one node alone


def test_requests_of_any_offset_and_length_read_back(alone: Node, rng: random.Random) -> None:
    model = bytearray(16 * MIB)
    client = Client(alone)
    play(client, model, rng, 1500)
    assert alone.content() == model


def test_many_connections_see_each_others_writes(alone: Node) -> None:
    clients = [Client(alone) for _ in range(20)]
    for i, client in enumerate(clients):
        client.write(i * 100, bytes([i + 1]) * 100)
    whole = b"".join(bytes([i + 1]) * 100 for i in range(20))
    assert all(client.read(0, 2000) == whole for client in clients)


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "error"),
    [
        (READ, 16 * MIB, 1, 0, EINVAL),
        (READ, 16 * MIB - 1, 2, 0, EINVAL),
        (READ, 2**64 - 1, 2, 0, EINVAL),
        (READ, 0, 0, 0, EINVAL),
        (READ, 0, 32 * MIB + 1, 0, EOVERFLOW),
        (READ, 0, 1, FUA, EINVAL),
        (TRIM, 16 * MIB - 1, 2, 0, ENOSPC),
        (ZEROES, 0, 1, 1 << 4, EINVAL),
        (FLUSH, 0, 0, FUA, EINVAL),
        (5, 0, 1, 0, EINVAL),
        (77, 0, 1, 0, EINVAL),
    ],
)
def test_a_wrong_request_gets_its_error_and_the_connection_goes_on(
    alone: Node, kind: int, offset: int, length: int, flags: int, error: int
) -> None:
    client = Client(alone)
    assert client.call(kind, offset, length, flags=flags) == (error, b"")
    client.write(0, b"still here")


@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [(16 * MIB - 1, 2, ENOSPC), (16 * MIB, 100 * KIB, ENOSPC), (0, 32 * MIB + 1, EOVERFLOW)],
)
def test_the_payload_of_a_refused_write_is_dropped(alone: Node, offset: int, length: int, error: int) -> None:
    client = Client(alone)
    assert client.call(WRITE, offset, length, bytes(length)) == (error, b"")
    client.write(0, b"in step")
    assert client.read(0, 7) == b"in step"


def test_a_read_only_client_writes_nothing(alone: Node) -> None:
    client = Client(alone, read_only=True)
    assert client.call(WRITE, 0, 3, b"abc")[0] == EPERM
    assert client.call(TRIM, 0, 3)[0] == EPERM
    assert client.read(0, 3) == bytes(3)


def test_rubbish_ends_that_connection_only(alone: Node, rng: random.Random) -> None:
    good = Client(alone)
    for _ in range(50):
        bad = Client(alone)
        bad.sock.sendall(rng.randbytes(rng.randrange(28, 3000)))
        assert bad.sock.recv(1000) == b""
        bad.close()
    good.write(0, b"fine")


def test_requests_and_rubbish_in_one_piece(alone: Node) -> None:
    read = struct.pack(">IHHQQI", 0x25609513, 0, READ, 1, 0, 10)
    for end in (b"rubbish" * 10, struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0)):
        for count in (1, 5):
            client = Client(alone)
            client.sock.sendall(read * count + end)
            while client.sock.recv(1000):
                pass
    assert Client(alone).read(0, 1) == b"\0"


def test_half_a_request_or_half_a_payload_then_a_hang_up_writes_nothing(alone: Node) -> None:
    header = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 64 * KIB)
    for piece in (header[:10], header, header + b"x" * 1000, header + b"x" * (64 * KIB - 1)):
        client = Client(alone)
        client.sock.sendall(piece)
        client.close()
        while alone.wait("client").b:
            pass
    assert Client(alone).read(0, 64 * KIB) == bytes(64 * KIB)


def test_a_client_that_queues_reads_and_hangs_up_is_harmless(alone: Node) -> None:
    for _ in range(20):
        client = Client(alone)
        for _ in range(30):
            client.start(READ, 0, 64 * KIB)
        client.close()
    assert Client(alone).read(0, 1) == b"\0"


def test_idle_and_slow_clients_do_not_stop_the_others(alone: Node) -> None:
    idle = [Client(alone) for _ in range(200)]
    slow = [Client(alone) for _ in range(10)]
    for client in slow:  # ask for more than the socket holds, and read nothing
        for _ in range(8):
            client.start(READ, 0, MIB)
    other = Client(alone)
    for i in range(50):
        other.write(i * 4096, b"x" * 4096)
    assert other.call(FLUSH) == (0, b"")
    for client in slow:
        assert client.wait(1) == (0, other.read(0, MIB)) or client.wait(2)
    assert all(client.read(0, 1) == b"x" for client in idle)


def test_a_write_of_32_mib_and_a_trim_of_more_than_the_log_holds(make_node: MakeNode) -> None:
    node = make_node("a", 600 * MIB, block=4 * KIB)  # 256 KiB an extent: 600 MiB are 2400 of them
    node.grant(_core.GRANT_ALONE)
    client = Client(node)
    data = os.urandom(4096) * (8 * KIB)
    client.write(5, data)
    assert client.read(5 + 32 * MIB - 4096, 4096) == data[-4096:]
    assert client.call(ZEROES, 1, 600 * MIB - 1) == (0, b"")
    assert client.read(16 * MIB, 100) == bytes(100)
    assert node.engine.volume_status(0).active_extents <= 1024


def test_close_clients_gracefully_answers_what_was_read(alone: Node) -> None:
    client, idle = Client(alone), Client(alone)
    client.write(0, b"1")
    alone.engine.close_clients(graceful=True)
    alone.wait("clients-closed")
    for each in (client, idle):
        assert each.sock.recv(100) == b""
    assert Client(alone).read(0, 1) == b"1"


# --- a pause (planned change of roles)


def quiet(node: Node) -> bool:
    """Whether "clients-quiet" has been told; what was sent before has been looked at."""
    node.flush()
    return any(event.kind == "clients-quiet" for event in node.events)


def test_a_pause_reads_nothing_more_and_its_end_goes_on_where_it_stopped(alone: Node) -> None:
    clients = [Client(alone) for _ in range(3)]
    clients[0].write(0, b"1" * 4096)
    alone.engine.pause_clients(7)
    assert alone.wait("clients-quiet").a == 7
    late = [client.start(WRITE, 0, 4096, b"2" * 4096) for client in clients]
    new = Client(alone)
    asked = new.start(READ, 0, 4096)
    alone.flush()
    assert all(client.pending(cookie) for client, cookie in zip([*clients, new], [*late, asked], strict=True))
    assert alone.content()[:4096] == b"1" * 4096
    alone.engine.resume_clients()
    assert [client.wait(cookie) for client, cookie in zip(clients, late, strict=True)] == [(0, b"")] * 3
    assert new.wait(asked)[0] == 0
    assert new.read(0, 4096) == b"2" * 4096
    assert not quiet(alone)  # told once


@pytest.mark.parametrize("kind", [WRITE, FLUSH, ZEROES, TRIM])
def test_a_pause_is_quiet_when_the_changes_in_hand_are_answered(alone: Node, kind: int) -> None:
    client = Client(alone)
    client.write(0, b"1" * 8192)
    alone.grant(_core.GRANT_NONE)
    alone.flush()
    read = client.start(READ, 0, 4096)  # waits for a grant, and for it nobody
    held = client.start(WRITE, 0, 4096, b"2" * 4096)
    asked = client.start(
        kind, 4096 if kind != FLUSH else 0, 4096 if kind != FLUSH else 0, b"3" * 4096 * (kind == WRITE)
    )
    alone.flush()
    alone.engine.pause_clients(7)
    assert not quiet(alone)
    alone.grant(_core.GRANT_ALONE)
    alone.wait("clients-quiet")
    assert client.wait(read)[0] == client.wait(held)[0] == client.wait(asked)[0] == 0
    alone.engine.resume_clients()
    assert client.read(0, 4096) == b"2" * 4096


def test_a_payload_that_has_begun_is_not_waited_for_and_goes_on_after_the_pause(alone: Node) -> None:
    client, other = Client(alone), Client(alone)
    data = os.urandom(256 * KIB)
    cookie = client.start(WRITE, 0, len(data), data[: 100 * KIB])
    alone.flush()
    alone.engine.pause_clients(7)
    alone.wait("clients-quiet")
    client.sock.sendall(data[100 * KIB :])
    alone.flush()
    assert client.pending(cookie)
    assert not any(alone.content())
    alone.engine.resume_clients()
    assert client.wait(cookie) == (0, b"")
    assert other.read(0, len(data)) == data


def test_who_is_hung_up_on_in_a_pause_has_done_nothing_since_and_the_next_client_is_served(alone: Node) -> None:
    client = Client(alone)
    client.write(0, b"1" * 4096)
    alone.engine.pause_clients(7)
    alone.wait("clients-quiet")
    client.start(WRITE, 0, 4096, b"2" * 4096)
    alone.engine.close_clients(graceful=False)
    alone.wait("clients-closed")
    with pytest.raises((EOFError, ConnectionError)):
        client.wait(client.cookie)
    assert Client(alone).read(0, 4096) == b"1" * 4096


def test_a_client_that_leaves_in_a_pause_is_not_missed(alone: Node) -> None:
    client = Client(alone)
    client.write(0, b"1" * 4096)
    alone.engine.pause_clients(7)
    alone.wait("clients-quiet")
    client.close()
    alone.flush()
    alone.engine.resume_clients()
    while alone.wait("client").text != "left":
        pass
    assert alone.engine.volume_status(0).clients == 0


# --- the grant


def test_a10_nothing_is_served_without_a_grant_or_after_it_ran_out(make_node: MakeNode) -> None:
    node = make_node("a")
    client = Client(node)
    read = client.start(READ, 0, 1)
    node.flush()
    assert client.pending(read)
    node.grant(_core.GRANT_ALONE, until=1)  # long ago
    node.flush()
    assert client.pending(read)
    node.grant(_core.GRANT_ALONE)
    assert client.wait(read) == (0, b"\0")
    node.grant(_core.GRANT_NONE)
    node.flush()
    held = client.start(WRITE, 0, 1, b"x")
    node.flush()
    assert client.pending(held)


def test_g1_g3_the_first_write_alone_waits_for_the_new_generation(make_node: MakeNode) -> None:
    node = make_node("a")
    client = Client(node)
    node.grant(_core.GRANT_PEER)
    write = client.start(WRITE, 0, 3, b"abc")
    assert client.read(4096, 1) == b"\0"  # reads go on
    assert client.pending(write)
    node.grant(_core.GRANT_ALONE_FIRST)
    node.wait("need-generation")
    assert client.pending(write)
    node.flush()
    assert node.content()[:3] == bytes(3)  # G2: not even submitted
    node.grant(_core.GRANT_ALONE)
    assert client.wait(write) == (0, b"")
    assert node.dirty() == 1


# --- two nodes


def test_w1_w4_w5_every_write_is_on_both(pair: tuple[Node, Node], rng: random.Random) -> None:
    a, b = pair
    model = bytearray(16 * MIB)
    play(Client(a), model, rng, 1500)
    # no flush: `sync` means that the peer has written what was answered
    assert a.content() == model
    assert b.content() == model


def test_several_clients_and_volumes_at_once(make_node: MakeNode, rng: random.Random) -> None:
    sizes = (3 * MIB + 1, 64 * KIB, 5 * MIB + 4097)
    a, b = make_node("a", *sizes), make_node("b", *sizes)
    a.grant(_core.GRANT_PEER)
    join(a, b)
    in_sync(a, b)
    models = [bytearray(size) for size in sizes]
    for volume, model in enumerate(models):
        client = Client(a, volume)
        for _ in range(200):
            length = rng.randrange(1, min(len(model), 70000))
            offset = rng.randrange(len(model) - length + 1)
            model[offset : offset + length] = data = rng.randbytes(length)
            client.write(offset, data)
    for volume, model in enumerate(models):
        assert a.content(volume) == b.content(volume) == model


def test_a17_a_held_write_is_sent_again_on_the_next_link(pair: tuple[Node, Node]) -> None:
    a, b = pair
    client = Client(a)
    b.engine.detach_link()
    a.wait("link-lost")
    held = [client.start(WRITE, i * BLOCK, 5, b"again") for i in range(10)]
    a.flush()
    assert client.pending(held[0])
    join(a, b, session=78)
    assert all(client.wait(cookie) == (0, b"") for cookie in held)
    in_sync(a, b)
    assert a.content() == b.content()
    assert a.dirty() == 0


def attach_source(node: Node, timeout: float = 20.0) -> frames.Peer:
    """The node as source, the target by hand; in sync."""
    near, far = socket.socketpair()
    with near:
        channel = _core.Channel(near.fileno(), near.fileno(), 9)
        node.engine.attach_link(channel, epoch=1, source=True, plans=[_core.PLAN_NONE], timeout=timeout)
    node.sockets.append(far)
    peer = frames.Peer(far, 9, epoch=1)
    peer.send(frames.BITS_END)
    peer.expect(frames.MERGED)
    peer.expect(frames.RESYNC_DONE)
    return peer


def test_w7_what_the_peer_did_not_confirm_as_flushed_is_dirty_when_the_link_goes(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    peer, client = attach_source(a), Client(a)

    def write(offset: int, data: bytes) -> None:
        cookie = client.start(WRITE, offset, len(data), data)
        while (frame := peer.receive()) is not None and frame.kind != frames.WRITE:
            assert frame.kind == frames.BARRIER  # one of the engine's own, which stays unanswered
        assert frame is not None
        peer.send(frames.ACK, struct.pack("<I", frame.unit))
        assert client.wait(cookie) == (0, b"")

    write(0, b"flushed")
    flush = client.start(FLUSH)
    peer.send(frames.FLUSHED, count=peer.expect(frames.BARRIER).unit)
    assert client.wait(flush) == (0, b"")
    write(5 * BLOCK - 1, b"not flushed")
    peer.sock.shutdown(socket.SHUT_RDWR)
    a.wait("link-lost")
    assert a.dirty() == 2


def test_w5_a_flush_waits_for_the_peer(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    peer, client = attach_source(a), Client(a)
    write = client.start(WRITE, 100, 3, b"abc")
    frame = peer.expect(frames.WRITE)
    assert (frame.offset, frame.data) == (100, b"abc")
    assert client.pending(write)
    peer.send(frames.ACK, struct.pack("<I", frame.unit))
    assert client.wait(write) == (0, b"")
    flush = client.start(FLUSH)
    barrier = peer.expect(frames.BARRIER)
    assert barrier.meta == frames.u64(1)
    assert client.pending(flush)
    peer.send(frames.FLUSHED, count=barrier.unit)
    assert client.wait(flush) == (0, b"")


def test_g3_a_write_that_the_peer_never_confirmed_is_answered_only_alone(make_node: MakeNode) -> None:
    a = make_node("a")
    a.grant(_core.GRANT_PEER)
    attach_source(a, timeout=0.3)
    client = Client(a)
    write = client.start(WRITE, 100, 3, b"abc")
    lost = a.wait("link-lost")
    assert lost.b == 13
    assert "0." in lost.text  # says for how long
    a.flush()
    assert client.pending(write)
    assert a.dirty() == 1
    a.grant(_core.GRANT_ALONE_FIRST)
    a.wait("need-generation")
    assert client.pending(write)
    a.grant(_core.GRANT_ALONE)
    assert client.wait(write) == (0, b"")


def test_a_clean_stop_leaves_no_bits_and_a_kill_leaves_the_active_extents(pair: tuple[Node, Node]) -> None:
    a, b = pair
    client = Client(a)
    client.write(3 * MIB, b"x" * 100)
    a.reopen()
    assert a.dirty() == 64  # one extent of 4 MiB
    b.reopen()
    assert b.dirty() == 0
    a.grant(_core.GRANT_PEER)
    join(a, b, [_core.PLAN_BITMAP], epoch=2, session=78)
    in_sync(a, b)
    assert a.content() == b.content()
    assert a.dirty() == 0
    Client(a).write(0, b"y")
    assert a.flush().b == 0
    a.engine.close_clients(graceful=True)
    a.wait("clients-closed")
    a.engine.detach_link()
    a.engine.save(5)
    assert a.wait("saved").b == 0
    a.reopen()
    assert a.dirty() == 0


def test_m3_after_a_kill_at_any_moment_the_dirty_blocks_hold_the_difference(
    pair: tuple[Node, Node], rng: random.Random
) -> None:
    a, b = pair
    for round_ in range(8):
        client = Client(a)
        for _ in range(rng.randrange(60)):
            length = rng.randrange(1, 100 * KIB)
            offset = rng.randrange(16 * MIB - length)
            client.start(WRITE, offset, length, rng.randbytes(length))
        if rng.random() < 0.5:
            a.wait("client")
        b.engine.detach_link()
        a.reopen()
        b.reopen()
        ours, theirs = a.content(), b.content()
        differing = {
            i
            for i in range(16 * MIB // BLOCK)
            if ours[i * BLOCK : (i + 1) * BLOCK] != theirs[i * BLOCK : (i + 1) * BLOCK]
        }
        assert len(differing) <= a.dirty()
        a.grant(_core.GRANT_PEER)
        join(a, b, [_core.PLAN_BITMAP], epoch=round_ + 2, session=100 + round_)
        in_sync(a, b)
        assert a.content() == b.content()
        client.close()


# --- resync


@pytest.mark.parametrize("plan", [_core.PLAN_BITMAP, _core.PLAN_FULL])
@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB, 256 * KIB])
def test_resync_while_clients_write(make_node: MakeNode, rng: random.Random, plan: int, block: int) -> None:
    size = 12 * MIB + 777
    a, b = make_node("a", size, block=block), make_node("b", size, block=block)
    model = bytearray(size)
    a.grant(_core.GRANT_ALONE)
    client = Client(a)
    play(client, model, rng, 200)
    if plan == _core.PLAN_FULL:  # nobody knows what differs
        for _ in range(30):
            os.pwrite(b.fds[0], rng.randbytes(3000), rng.randrange(size - 3000))
    a.grant(_core.GRANT_PEER)
    join(a, b, [plan])
    play(client, model, rng, 400)
    in_sync(a, b)
    play(client, model, rng, 50)
    assert a.content() == model
    assert b.content() == model
    assert a.dirty() == b.dirty() == 0


def test_r2_the_targets_bits_are_taken_over(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a"), make_node("b")
    b.grant(_core.GRANT_ALONE)
    client = Client(b)
    for i in (3, 17, 18, 255):
        client.write(i * BLOCK + 10, rng.randbytes(1000))
    b.engine.close_clients(graceful=True)
    b.wait("clients-closed")
    assert b.dirty() == 4
    join(a, b, [_core.PLAN_BITMAP])
    in_sync(a, b)
    assert b.content() == bytes(16 * MIB)
    assert a.dirty() == b.dirty() == 0
    assert b.engine.volume_status(0).resync_done == 4 * BLOCK


def test_r6_r8_an_interrupted_resync_goes_on_and_thin_stays_thin(make_node: MakeNode, rng: random.Random) -> None:
    size = 64 * MIB
    a, b = make_node("a", size), make_node("b", size)
    a.grant(_core.GRANT_ALONE)
    client = Client(a)
    for _ in range(40):
        client.write(rng.randrange(size - 200 * KIB), rng.randbytes(rng.randrange(1, 200 * KIB)))
    client.write(0, bytes(1 * MIB))  # data that is zero
    a.engine.set_all_dirty(0)
    for session in range(1, 30):
        join(a, b, [_core.PLAN_BITMAP], session=session)
        a.wait("bits-merged")
        if session == 29:
            break
        if rng.random() < 0.5:
            client.start(READ, 0, 1)
            client.wait(client.cookie)
        (a if rng.random() < 0.5 else b).engine.detach_link()
        for node in (a, b):
            if node.engine.link_status().up:
                node.engine.detach_link()
    in_sync(a, b)
    assert a.content() == b.content()
    allocated = [os.fstat(node.fds[0]).st_blocks * 512 for node in (a, b)]
    assert allocated[1] <= allocated[0]


def test_r3_zipf_writes_onto_blocks_under_resync(make_node: MakeNode, rng: random.Random) -> None:
    size = 8 * MIB
    a, b = make_node("a", size), make_node("b", size)
    model = bytearray(size)
    a.grant(_core.GRANT_ALONE)
    clients = [Client(a) for _ in range(3)]
    clients[0].write(0, filled := rng.randbytes(size))
    model[:] = filled
    a.grant(_core.GRANT_PEER)
    join(a, b, [_core.PLAN_FULL])
    for _ in range(600):
        block = min(int(rng.paretovariate(0.7)) - 1, size // BLOCK - 1)
        offset = block * BLOCK + rng.randrange(BLOCK - 4096)
        data = rng.randbytes(rng.randrange(1, 4096))
        rng.choice(clients).write(offset, data)
        model[offset : offset + len(data)] = data
    in_sync(a, b)
    assert a.content() == b.content() == model


def test_a_resync_that_finds_everything_equal_sends_only_digests(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a"), make_node("b")
    data = rng.randbytes(16 * MIB)
    for node in (a, b):
        os.pwrite(node.fds[0], data, 0)
    join(a, b, [_core.PLAN_FULL])
    in_sync(a, b)
    status = a.engine.volume_status(0)
    assert (status.resync_total, status.resync_done, status.resync_skipped, status.resync_sent) == (
        16 * MIB,
        16 * MIB,
        16 * MIB,
        0,
    )
    assert a.engine.link_status().bytes_out < 16 * MIB // 1000


def test_r7_bits_of_a_crash_cost_only_their_digests(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a"), make_node("b")
    a.grant(_core.GRANT_PEER)
    join(a, b)
    in_sync(a, b)
    Client(a).write(0, rng.randbytes(16 * MIB))
    a.reopen()  # its four extents of 4 MiB are hot
    b.wait("link-lost")
    a.grant(_core.GRANT_PEER)
    join(a, b, [_core.PLAN_BITMAP], session=78)
    in_sync(a, b)
    status = a.engine.volume_status(0)
    assert (status.resync_done, status.resync_skipped, status.resync_sent) == (16 * MIB, 16 * MIB, 0)
    assert a.engine.link_status().bytes_out < 64 * KIB
    assert a.content() == b.content()


def test_r7_what_a_lost_link_leaves_unflushed_costs_only_its_digests(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a"), make_node("b")
    a.grant(_core.GRANT_PEER)
    join(a, b)
    in_sync(a, b)
    Client(a).write(MIB, rng.randbytes(3 * MIB))
    b.engine.detach_link()
    a.wait("link-lost")
    join(a, b, [_core.PLAN_BITMAP], session=78)
    in_sync(a, b)
    status = a.engine.volume_status(0)
    assert (status.resync_done, status.resync_skipped, status.resync_sent) == (3 * MIB, 3 * MIB, 0)
    assert a.content() == b.content()


def test_r7_what_was_written_alone_is_sent_without_a_question(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a"), make_node("b")
    a.grant(_core.GRANT_ALONE)
    Client(a).write(2 * MIB, rng.randbytes(MIB))
    a.grant(_core.GRANT_PEER)
    join(a, b, [_core.PLAN_BITMAP])
    in_sync(a, b)
    assert a.engine.volume_status(0).resync_sent == MIB
    assert b.engine.link_status().bytes_out < 4 * KIB  # no WANT
    assert a.content() == b.content()


def test_r6_r7_all_bits_set_by_hand_are_compared(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a"), make_node("b")
    data = rng.randbytes(16 * MIB)
    for node in (a, b):
        os.pwrite(node.fds[0], data, 0)
    os.pwrite(b.fds[0], b"rot", 7 * MIB)
    a.engine.set_all_dirty(0)
    join(a, b, [_core.PLAN_BITMAP])
    in_sync(a, b)
    status = a.engine.volume_status(0)
    assert (status.resync_done, status.resync_sent) == (16 * MIB, 4 * KIB)
    assert a.content() == b.content() == data


# --- a hostile or broken peer


def attach_target(node: Node, timeout: float = 20.0, epoch: int = 5) -> frames.Peer:
    near, far = socket.socketpair()
    with near:
        channel = _core.Channel(near.fileno(), near.fileno(), 9)
        node.engine.attach_link(channel, epoch=epoch, source=False, plans=[_core.PLAN_NONE], timeout=timeout)
    node.sockets.append(far)
    peer = frames.Peer(far, 9, epoch=epoch)
    peer.expect(frames.BITS_END)
    return peer


LIES: dict[str, Callable[[frames.Peer], None]] = {
    "of an older epoch (W9)": lambda p: p.send(frames.WRITE, data=b"abc", count=1, epoch=4),
    "of another session (W9)": lambda p: p.send(frames.WRITE, data=b"abc", count=1, session=8),
    "that was repeated": lambda p: (
        p.send(frames.PING, hold=True),  # type: ignore[func-returns-value]
        p.send(frames.WRITE, data=b"abc", count=1, skip=-1),
    )[1],
    "that was lost": lambda p: p.send(frames.WRITE, data=b"abc", count=1, skip=1),
    "with a wrong digest": lambda p: p.send(frames.WRITE, data=b"abc", count=1, payload_digest=bytes(16)),
    "past the end": lambda p: p.send(frames.WRITE, data=b"abc", count=1, offset=16 * MIB - 2),
    "far past the end": lambda p: p.send(frames.WRITE, data=b"abc", count=1, offset=2**64 - 2),
    "of an unknown volume": lambda p: p.send(frames.WRITE, data=b"abc", count=1, flags=1),
    "without data": lambda p: p.send(frames.WRITE, count=1),
    "with meta": lambda p: p.send(frames.WRITE, b"meta", b"abc", count=1),
    "that trims past the end": lambda p: p.send(frames.ZERO, frames.u64(3), count=1, offset=16 * MIB - 2),
    "that trims nothing": lambda p: p.send(frames.ZERO, frames.u64(0), count=1),
    "that trims too much": lambda p: p.send(frames.ZERO, frames.u64(2**64 - 1), count=1, offset=1),
    "that trims without a length": lambda p: p.send(frames.ZERO, count=1),
    "a wrong count of writes (W6)": lambda p: p.send(frames.BARRIER, frames.u64(7), count=1),
    "a barrier without a count": lambda p: p.send(frames.BARRIER, count=1),
    "an ack from a source": lambda p: p.send(frames.ACK, struct.pack("<I", 1)),
    "flushed, from a source": lambda p: p.send(frames.FLUSHED, count=1),
    "bits from a source": lambda p: p.send(frames.BITS, bytes(8)),
    "the end of bits from a source": lambda p: p.send(frames.BITS_END),
    "merged without a number": lambda p: p.send(frames.MERGED),
    "settled, from a source": lambda p: p.send(frames.SETTLED, bytes(24)),
    "want, from a source": lambda p: p.send(frames.WANT, frames.want(0, frames.WANT_WHOLE)),
    "data that was not asked for": lambda p: p.send(frames.DATA, frames.entry(0, 1), bytes(4096)),
    "an unknown kind": lambda p: p.send(99, b"x"),
    "an oversized unknown kind": lambda p: p.send(99, bytes(100000)),
    "bulk past the end": lambda p: p.send(frames.BULK, frames.bulk(BLOCK, 1), bytes(BLOCK), offset=16 * MIB),
    "bulk at half a block": lambda p: p.send(frames.BULK, frames.bulk(BLOCK, 1), bytes(BLOCK), offset=100),
    "bulk of no unit": lambda p: p.send(frames.BULK, frames.bulk(BLOCK, 1), bytes(BLOCK), count=16),
    "bulk that is too short": lambda p: p.send(frames.BULK, frames.bulk(BLOCK, 1), bytes(BLOCK - 1)),
    "digests longer than a unit": lambda p: p.send(frames.DIGESTS, frames.digests(2 * MIB, [None] * 32)),
    "digests past the end": lambda p: p.send(frames.DIGESTS, frames.digests(BLOCK, [None]), offset=2**63),
    "done in the middle": lambda p: (
        p.send(frames.DIGESTS, frames.digests(BLOCK, [bytes(16)]), hold=True),  # type: ignore[func-returns-value]
        p.send(frames.RESYNC_DONE),
    )[1],
    "not a frame": lambda p: p.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 10),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_of_the_source_ends_the_session_and_writes_nothing(make_node: MakeNode, lie: str) -> None:
    node = make_node("b")
    peer = attach_target(node)
    LIES[lie](peer)
    assert node.wait("link-lost").b in (1, 13)
    assert node.content() == bytes(16 * MIB)
    peer.sock.close()
    attach_target(node).sock.close()  # and the node is as good as before


@pytest.mark.parametrize("kind", [*range(16, 26), *range(32, 41), 4, 0, 1])
def test_random_frames_never_break_an_engine(make_node: MakeNode, rng: random.Random, kind: int) -> None:
    for source in (False, True):
        node = make_node(f"n{source}")
        for session in range(12):
            near, far = socket.socketpair()
            with near:
                channel = _core.Channel(near.fileno(), near.fileno(), session + 1)
                node.engine.attach_link(channel, epoch=0, source=source, plans=[_core.PLAN_FULL], timeout=20)
            with far:
                peer = frames.Peer(far, session + 1)
                if source:
                    peer.send(frames.BITS_END)
                for _ in range(rng.randrange(1, 5)):
                    meta = rng.randbytes(rng.choice([0, 4, 8, 16, 24, 40, rng.randrange(300)]))
                    data = rng.randbytes(rng.choice([0, 0, 512, 65536]))
                    peer.send(
                        kind,
                        meta,
                        data,
                        count=rng.randrange(20),
                        offset=rng.choice([0, 65536, rng.randrange(2**64)]),
                        flags=rng.choice([0, 1, FUA]),
                        hold=True,
                    )
                peer._held, held = b"", peer._held
                with contextlib.suppress(OSError):  # it may have hung up in the middle
                    far.sendall(held)
            node.wait("link-lost")


def test_a_silent_source_is_given_up(make_node: MakeNode) -> None:
    node = make_node("b")
    peer = attach_target(node, timeout=0.3)
    lost = node.wait("link-lost")
    assert lost.b == 13
    assert "silent" in lost.text
    peer.sock.close()


def test_two_engines_that_only_live_stay_joined(make_node: MakeNode) -> None:
    a, b = make_node("a"), make_node("b")
    join(a, b, timeout=0.5)
    in_sync(a, b)
    before = a.engine.link_status().bytes_in
    while a.engine.link_status().bytes_in < before + 5 * 80:  # five PINGs are more than two time-outs
        assert not a.engine.take_events()
    assert a.engine.link_status().up


def test_wrong_arguments_are_refused(make_node: MakeNode) -> None:
    node = make_node("a")
    with pytest.raises(ValueError, match="volumes"):
        _core.Engine([])
    with pytest.raises(ValueError, match="block_size"):
        _core.Engine([(node.fds[0], MIB, node.metas[0], 5000)])
    with pytest.raises(OSError, match="metadata"):
        _core.Engine([(node.fds[0], 2**40, node.metas[0], BLOCK)])
    with pytest.raises(IndexError):
        node.engine.volume_status(1)
    with pytest.raises(ValueError, match="grant"):
        node.engine.set_grant(1, 0, 9)
    node.engine.stop()
    with pytest.raises(ValueError, match="stopped"):
        node.engine.start()
