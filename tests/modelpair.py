"""Two engines in one process and the model of what their clients may read: every step of test_modeldisk.py.

Rules:
- One node is primary and has the clients. `current` are those that have all that was acknowledged: only they may become
  primary. It is the policy of 2-replication.md's handshake table, whose Python is not part of this.
- A session may have a line between its ends (relay.py) that ends before a chosen byte, or holds what comes behind it
  until somebody has to wait.
- Every loss of the link is found in one place, `pump`, however it came. Then both ends are without a session, and M3
  and W7 are checked: what differs is dirty or of an active extent, on one of the two.
- `settle` is the only place where the images are compared: both in sync, nothing in flight, both durable. Then both
  are equal, without a bit, and hold what the model allows.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import shutil
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import engineside
from engineside import (
    BITMAP_AT,
    FLUSH,
    LOG_AT,
    READ,
    RECORD,
    WRITE,
    Client,
    Event,
    Node,
    join,
)
from modeldisk import ModelDisk, Read, Write
from relay import Relay

from mirrorpair import _core
from mirrorpair.metadata import LOG_RECORDS, newest_record, parse_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from relay import Damage

EXTENT_BLOCKS = 64
IN_HAND = 24  # requests of one connection
IN_HAND_BYTES = 2 << 20  # more, and a client's socket may be full
SYS_CACHESTAT = 451


def unwritten(fd: int, offset: int = 0, length: int = 0) -> int:
    """Pages of the page cache that are not on the disk yet, by cachestat(2); 0 on a file system that keeps no count."""
    libc = ctypes.CDLL(None, use_errno=True)
    where, found = (ctypes.c_uint64 * 2)(offset, length), (ctypes.c_uint64 * 5)()
    if libc.syscall(SYS_CACHESTAT, fd, ctypes.byref(where), ctypes.byref(found), 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    return found[1] + found[2]  # dirty, and under write-back


def counts_unwritten(folder: Path) -> bool:
    """Whether `unwritten` tells anything in this folder."""
    path = folder / "probe"
    try:
        with path.open("wb", buffering=0) as file:
            file.write(b"x")
            before = unwritten(file.fileno())
            os.fdatasync(file.fileno())
            return before > 0 and unwritten(file.fileno()) == 0
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


@dataclass
class Connection(Client):
    """A client whose answers are taken as they come; nothing here waits."""

    number: int = 0
    asked: dict[int, Write | Read | None] = field(default_factory=dict)
    in_hand: int = 0
    over: bool = False
    _input: bytearray = field(default_factory=bytearray)

    def take(self) -> list[tuple[int, int, bytes]]:
        """What came: (cookie, error, data)."""
        while not self.over:
            try:
                piece = os.read(self.sock.fileno(), 1 << 18)  # it has a time-out, so it does not block
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.over = not piece
            self._input += piece
        return list(iter(self._answer, None))

    def _answer(self) -> tuple[int, int, bytes] | None:
        if len(self._input) < 16:
            return None
        magic, error, cookie = struct.unpack_from(">IIQ", self._input)
        assert magic == 0x67446698
        assert cookie in self.asked, f"an answer to request {cookie}, which is not in flight"
        length = self.reads[cookie] if cookie in self.reads and not error else 0
        if len(self._input) < 16 + length:
            return None
        data = bytes(self._input[16 : 16 + length])
        del self._input[: 16 + length]
        self.reads.pop(cookie, None)
        return cookie, error, data


class Pair:
    def __init__(self, folder: Path, sizes: tuple[int, ...], block: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.sizes, self.block = sizes, block
        self.nodes = [Node(folder, name, sizes, block) for name in "ab"]
        self.models = [ModelDisk(size) for size in sizes]
        self.at = 0
        """the primary"""
        self.epoch = 1
        self.session = 0
        self.joined = self.synced = self.alone = False
        self.current = {0, 1}
        self.unknown = False
        """the images differ in places of which no bit tells: a full compare has to come"""
        self.connections: dict[int, Connection] = {}
        self.hung_up: list[Connection] = []
        self.numbers = 0
        self.token = 0
        self.seen: Counter[str] = Counter()
        """events of clients, in this life of the primary"""
        self.relay: Relay | None = None
        self.payloads = random.Random(0)
        self._grant(_core.GRANT_PEER)

    @property
    def primary(self) -> Node:
        return self.nodes[self.at]

    @property
    def secondary(self) -> Node:
        return self.nodes[1 - self.at]

    @property
    def serving(self) -> bool:
        return self.joined or self.alone

    def close(self) -> None:
        if self.relay is not None:
            self.relay.close()
        for node in self.nodes:
            node.close()
        shutil.rmtree(self.folder)

    # --- waiting

    def pump(self, wait_s: float | None = None) -> None:
        """Takes what has come: answers, and the loss of the link. With `wait_s`: waits until something comes."""
        fds = [node.engine.event_fd for node in self.nodes]
        socks = [c.sock for c in self.connections.values() if not c.over]
        if wait_s is not None:
            self.release()
            select.select([*fds, *socks], [], [], wait_s)
        for connection in self.connections.values():
            self._take(connection)
        for node in self.nodes:
            new = [Event(*event) for event in node.engine.take_events()]
            if node is self.primary:
                self.seen.update(event.text for event in new if event.kind == "client")
            wrong = [event for event in new if event.kind in ("disk-error", "journal-error")]
            assert not wrong, wrong
            node.events += [event for event in new if event.kind != "client"]
        if self.joined and any(event.kind == "link-lost" for node in self.nodes for event in node.events):
            self.cut()

    def until(self, condition: Callable[[], bool], told: str) -> bool:
        """False: the link was lost first, and without it nothing goes on."""
        serving, end = self.joined, time.monotonic() + engineside.LIMIT_S
        while not condition():
            self.pump(0.2)
            if serving and not self.joined:
                return False
            assert time.monotonic() < end, f"{told}; {self}"
        return True

    def __str__(self) -> str:
        flying = {c.number: list(c.asked) for c in self.connections.values() if c.asked}
        links = [node.engine.link_status() for node in self.nodes]
        volumes = [node.engine.volume_status(i) for node in self.nodes for i in range(len(self.sizes))]
        events = [node.events for node in self.nodes]
        return f"in flight {flying}, links {links}, volumes {volumes}, events {events}"

    def release(self) -> None:
        if self.relay is not None:
            self.relay.forth.release.set()
            self.relay.back.release.set()

    # --- clients

    def connect(self, slot: int) -> Connection:
        """The connection of this slot; the last one is to the last volume."""
        if slot not in self.connections:
            self.numbers += 1
            volume = len(self.sizes) - 1 if slot == 3 else 0
            self.connections[slot] = Connection(self.primary, volume, number=self.numbers)
            self.seen["opened"] += 1
        return self.connections[slot]

    def request(self, slot: int, kind: int, offset: int, length: int, flags: int = 0) -> int | None:
        """Starts one; None: the connection has too much in flight."""
        connection = self.connect(slot)
        model = self.models[connection.volume]
        if len(connection.asked) >= IN_HAND or connection.in_hand + length > IN_HAND_BYTES:
            return None
        entry: Write | Read | None = None
        data = b""
        if kind == READ:
            entry = model.begin_read(connection.number, offset, length)
        elif kind == WRITE:
            data = self.payloads.randbytes(length)
            entry = model.begin_write(connection.number, offset, length, data)
        elif kind != FLUSH:
            entry = model.begin_write(connection.number, offset, length, None)
        connection.in_hand += length
        connection.asked[connection.cookie + 1] = entry
        return connection.start(kind, offset, length, data, flags)

    def _take(self, connection: Connection) -> None:
        for cookie, error, data in connection.take():
            assert error == 0, f"request {cookie} of connection {connection.number}: error {error}"
            self._end(connection, cookie, data)

    def _end(self, connection: Connection, cookie: int, data: bytes | None) -> None:
        """Its answer came, or (None) nobody knows."""
        entry = connection.asked.pop(cookie)
        model = self.models[connection.volume]
        if entry is None:
            return
        connection.in_hand -= entry.length
        if isinstance(entry, Read):
            model.end_read(entry, data)
        else:
            model.end_write(entry, acknowledged=data is not None)

    def hang_up(self, slot: int) -> None:
        """With requests in flight: what has begun goes on without it."""
        connection = self.connections.pop(slot)
        self._take(connection)
        connection.close()
        for cookie, entry in list(connection.asked.items()):
            if not isinstance(entry, Write):
                self._end(connection, cookie, None)
        self.hung_up.append(connection)
        self.seen["closed"] += 1

    def forget_clients(self) -> None:
        """The primary has ended, or its clients: what was not answered may have happened or not."""
        for slot in list(self.connections):
            connection = self.connections[slot]
            self._take_rest(connection)
            self.hang_up(slot)
        self._bury()
        self.seen.clear()

    def _take_rest(self, connection: Connection) -> None:
        """Answers that were sent before the end; only errors say that there will be none."""
        for cookie, error, data in connection.take():
            self._end(connection, cookie, data if error == 0 else None)

    def _bury(self) -> None:
        for connection in self.hung_up:
            for cookie in list(connection.asked):
                self._end(connection, cookie, None)
        self.hung_up.clear()

    def answered(self) -> bool:
        """Waits until everything in flight has ended, also what nobody waits for any more."""
        done = self.until(lambda: not any(c.asked for c in self.connections.values()), "no answer")
        if not (done and self.until(self._only_ours, "a client that hung up stays")):
            return False
        self._bury()
        return True

    def _only_ours(self) -> bool:
        came, gone = self.seen["came"], self.seen["left"] + self.seen["lost"]
        return came == self.seen["opened"] and gone == self.seen["closed"]

    # --- the link

    def _grant(self, mode: int) -> None:
        self.primary.grant(mode, self.epoch)
        self.alone = mode == _core.GRANT_ALONE

    def rejoin(self, *, full: bool = False, damage: Damage | None = None) -> None:
        """A new session, in place of the present one if there is one (A17)."""
        if self.joined:
            self.cut()
        if self.alone:
            self._grant(_core.GRANT_PEER)
        self.session += 1
        plan = _core.PLAN_FULL if full or self.unknown else _core.PLAN_BITMAP
        ends = None
        if damage is not None:
            (near, one), (far, other) = socket.socketpair(), socket.socketpair()
            self.relay, ends = Relay(one, other, damage), (near, far)
        self.current.discard(1 - self.at)  # R1
        join(
            self.primary,
            self.secondary,
            [plan] * len(self.sizes),
            epoch=self.epoch,
            session=self.session,
            ends=ends,
        )
        self.joined = True

    def _ended(self, kind: str) -> bool:
        return all(sum(e.kind == kind for e in node.events) >= len(self.sizes) for node in self.nodes)

    def in_sync(self) -> bool:
        if not self.joined:
            return False
        if not self.synced:
            if not self.until(lambda: self._ended("resync-done"), "no end of the resync"):
                return False
            self.synced, self.unknown = True, False
            self.current = {0, 1}
        return True

    def cut(self, first: int = 0) -> None:
        """Ends the session, at node `first` first, and looks what the loss leaves (W7, M3)."""
        merged = self._ended("bits-merged")
        for node in (self.nodes[first], self.nodes[1 - first]):
            node.engine.detach_link()
        self.joined = self.synced = False
        for node in self.nodes:
            self._quiet(node)
        if self.relay is not None:
            self.relay.close()
            self.relay = None
        if merged:  # R2, R6: the source has all bits durably
            self.unknown = False
        self.check_bits()
        self.pump()

    def _quiet(self, node: Node) -> None:
        """Without a link: its writes have ended, and its events of the session are forgotten."""
        self.token += 1
        assert node.flush(self.token).b == 0
        if node is self.primary:
            self.seen.update(event.text for event in node.events if event.kind == "client")
        wrong = [event for event in node.events if event.kind in ("disk-error", "journal-error")]
        assert not wrong, wrong
        node.events.clear()

    def go_alone(self, *, ask: bool) -> None:
        """G1-G3: through the first write alone, or with its generation already there."""
        self.current = {self.at}
        if ask:
            self._grant(_core.GRANT_ALONE_FIRST)
        self._grant(_core.GRANT_ALONE)

    # --- what must hold

    def differing(self, volume: int) -> set[int]:
        one, other = (node.content(volume) for node in self.nodes)
        return set(self._differing(one, other, 0, self.sizes[volume])) if one != other else set()

    def _differing(self, one: bytes, other: bytes, low: int, high: int) -> Iterator[int]:
        """Numbers of blocks, by halves: most of the images is equal."""
        blocks = -(-(high - low) // self.block)
        if one[low:high] == other[low:high]:
            return
        if blocks == 1:
            yield low // self.block
            return
        middle = low + blocks // 2 * self.block
        yield from self._differing(one, other, low, middle)
        yield from self._differing(one, other, middle, high)

    def recorded(self, node: Node, volume: int) -> tuple[set[int], set[int]]:
        """What its metadata says now: dirty blocks, blocks of active extents."""
        path = node.paths[volume].with_suffix(".meta")
        data = path.read_bytes()
        log = data[LOG_AT : LOG_AT + RECORD * LOG_RECORDS]
        record = newest_record([parse_record(i, log[i * RECORD : (i + 1) * RECORD]) for i in range(LOG_RECORDS)])
        extents = record.extents if record else range(1 << 10)
        blocks = -(-self.sizes[volume] // self.block)
        bits = f"{int.from_bytes(data[BITMAP_AT:], 'little'):b}"[::-1]
        active = {b for e in extents for b in range(e * EXTENT_BLOCKS, min((e + 1) * EXTENT_BLOCKS, blocks))}
        return {i for i, bit in enumerate(bits) if bit == "1"}, active

    def check_bits(self, *, running: bool = True) -> None:
        """M3: durable, on one node. W7 in memory, as a number, for that is all that a running engine tells."""
        if self.unknown:
            return
        for volume in range(len(self.sizes)):
            if not (differing := self.differing(volume)):
                continue
            said = set().union(*(part for node in self.nodes for part in self.recorded(node, volume)))
            assert differing <= said, f"M3: blocks {sorted(differing - said)} of volume {volume} differ, nobody says so"
            if running:
                count = sum(node.dirty(volume) for node in self.nodes)
                assert len(differing) <= count, f"W7: {len(differing)} blocks differ, {count} are dirty"

    def settle(self) -> bool:
        """Both in sync, and nothing in flight: the images are equal, and what they may be. False: the link was lost."""
        if not (self.in_sync() and self.answered()):
            return False
        self.release()
        self.token += 1
        assert self.primary.flush(self.token).b == 0
        self.pump()
        if not self.joined:
            return False
        for volume, model in enumerate(self.models):
            one, other = (node.content(volume) for node in (self.primary, self.secondary))
            if one != other:
                at = next(i for i in range(len(one)) if one[i] != other[i])
                raise AssertionError(f"in sync, and the images of volume {volume} differ at byte {at}")
            model.settle(one)
            assert [node.dirty(volume) for node in self.nodes] == [0, 0]
        return True

    def durable(self, slot: int, kind: int, offset: int, length: int, flags: int) -> None:
        """W5: after a FLUSH, or a request with FUA, nothing of it waits to be written, on both or the only one."""
        if not self.serving or not self.answered() or not (self.alone or self.in_sync()):
            return
        volume = self.connect(slot).volume
        self.request(slot, kind, offset, length, flags)
        if not self.answered():
            return
        if kind == FLUSH:
            offset, length = 0, 0
        for node in [self.primary] if self.alone else self.nodes:
            left = unwritten(node.fds[volume], offset, length)
            assert not left, f"W5: {left} pages of {node.paths[volume].name} are not on the disk"

    # --- ends and beginnings

    def crash(self, *, primary: bool, secondary: bool) -> None:
        """Nothing is saved; the page cache stays. A crashed primary's clients are gone, it has no grant."""
        dead = [self.primary] * primary + [self.secondary] * secondary
        for node in dead:
            node.engine.stop()
        if primary:
            self.forget_clients()
            self.alone = False
        for node in self.nodes:
            if node not in dead:
                node.engine.detach_link()
                self._quiet(node)
        self._line_is_gone()
        self.check_bits(running=False)
        for node in dead:
            node.reopen()
        if not primary:
            self.pump()
        elif secondary:
            self.current = {self.at}

    def _line_is_gone(self) -> None:
        self.joined = self.synced = False
        if self.relay is not None:
            self.relay.close()
            self.relay = None

    def comes_back(self, *, alone: bool) -> None:
        """A primary that crashed or was stopped, in its role; only it can say what it did before."""
        self._grant(_core.GRANT_PEER)
        self.current = {self.at}
        if alone:
            self.go_alone(ask=False)

    def fence(self) -> None:
        """L0: the primary loses its role where it stands; what it holds is never answered well (W9)."""
        node = self.primary
        self._grant(_core.GRANT_NONE)
        node.engine.close_clients(graceful=False)
        node.engine.detach_link()
        node.wait("clients-closed")
        self.secondary.engine.detach_link()
        for each in self.nodes:
            self._quiet(each)
        self._line_is_gone()
        self.forget_clients()
        self.check_bits()

    def take_over(self, *, alone: bool) -> None:
        """The other one becomes primary, in a new epoch; the last one has no grant."""
        assert not self.joined
        assert not self.connections
        assert 1 - self.at in self.current
        self._grant(_core.GRANT_NONE)
        self.at = 1 - self.at
        self.epoch += 1
        self._grant(_core.GRANT_PEER)
        self.current = {self.at}
        if alone:
            self.go_alone(ask=True)

    def stop(self, *, graceful: bool) -> None:
        """The primary saves and ends, and is opened again (M6): its bits are what differs, its log is empty."""
        node, clean = self.primary, False
        if graceful and self.serving:
            node.engine.close_clients(graceful=True)
            closed = self.until(lambda: any(e.kind == "clients-closed" for e in node.events), "clients stay")
            if closed and self.in_sync():
                self.token += 1
                assert node.flush(self.token).b == 0
                self.pump()
                clean = self.joined
        if not clean:
            self._grant(_core.GRANT_NONE)
            node.engine.close_clients(graceful=False)
        node.engine.detach_link()
        if not clean:
            node.wait("clients-closed")
        self._save(node)
        self.secondary.engine.detach_link()
        self._quiet(self.secondary)
        self._line_is_gone()
        self.forget_clients()
        self._saved(node, clean)
        self.alone = False

    def stop_secondary(self) -> None:
        node = self.secondary
        node.engine.detach_link()
        self._save(node)
        self.primary.engine.detach_link()
        self._quiet(self.primary)
        self._line_is_gone()
        self._saved(node, False)
        self.pump()

    def _save(self, node: Node) -> None:
        self.token += 1
        node.engine.save(self.token)
        assert node.wait("saved").b == 0
        node.engine.stop()

    def _saved(self, node: Node, clean: bool) -> None:
        for volume in range(len(self.sizes)):
            bits, active = self.recorded(node, volume)
            assert not active, "M6: a clean stop leaves an empty log"
            assert not (clean and bits), f"it was in sync, and its blocks {sorted(bits)} are dirty"
        self.check_bits(running=False)
        node.reopen()
        for volume in range(len(self.sizes)):
            assert node.dirty(volume) == len(self.recorded(node, volume)[0])

    def scribble(self, volume: int, offset: int, length: int) -> None:
        """The image of the secondary changes behind everybody's back, as after a restore from a backup."""
        assert not self.joined
        self.unknown = True
        self.current = {self.at}
        os.pwrite(self.secondary.fds[volume], self.payloads.randbytes(length), offset)

    def finish(self) -> None:
        """Whatever happened: it comes together again."""
        for _ in range(3):
            if not self.joined:
                self.rejoin()
            if self.settle():
                return
        raise AssertionError(f"they do not come together: {self}")
