"""Two engines against a model of a disk, through real NBD connections, with whatever can happen to a pair.

Rules:
- hypothesis chooses the steps (its state machine, which also shrinks them), modelpair.py does them, modeldisk.py
  judges.
- Whether a step can be done depends on when the link is lost, which no seed repeats: one that cannot is passed over.
- Every run ends with both nodes in sync, the images equal, and everything acknowledged in them.
- The usual run is the same every time. MIRRORPAIR_TEST_MODEL=n takes n times as many, other ones each time: for the
  night.
- It can fail: the usual run found each of these, put into csrc one at a time and taken out again. The dirty bit of the
  last 4 KiB of a write alone; of trims that were not confirmed (W7); 513-byte writes that skip the peer; FUA not done
  here, or not sent there; a trim off its 4 KiB that is one byte short at the peer; a resync that reads a block with a
  write in flight on it (R3); the target's first bits not taken over (R2); a FLUSH that waits for no peer, or does no
  fdatasync; trims not sent again after a flap (A17); reads, or writes at the last byte, not serialised with writes
  that they overlap (W2).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from engineside import FLUSH, FUA, KIB, MIB, NO_HOLE, READ, TRIM, WRITE, ZEROES
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from modeldisk import ModelDisk
from modelpair import Pair, counts_unwritten
from relay import Damage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modeldisk import Write

TIMES = int(os.environ.get("MIRRORPAIR_TEST_MODEL", "0"))
EXAMPLES = 90
FIRST = ["", "", "", "", "", "", "full", "scribble", "all dirty"]
TROUBLES = [
    "primary crashes",
    "primary crashes, other takes over",
    "secondary crashes",
    "both crash",
    "primary stops gracefully",
    "primary stops",
    "secondary stops",
    "roles change",
]
Request = tuple[int, int, int, int, int, int]
STEPS = 40

# Block size and sizes of the volumes: no multiple of 4 KiB, several extents of 64 blocks.
SHAPES = [
    (4 * KIB, (900 * KIB + 777,)),
    (64 * KIB, (5 * MIB + 4097,)),
    (4 * KIB, (600 * KIB + 1, 70 * KIB - 1)),
]

# Where requests meet: the edges of blocks and extents, and the end.
EDGES = st.sampled_from([0, 4 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 4 * MIB, -1]) | st.integers(0, 255).map(
    lambda n: n * 20 * KIB + n
)
SHIFTS = st.sampled_from([0, 0, -1, 1, -511, 512, 4095, -4096]) | st.integers(-70000, 70000)
LENGTHS = st.sampled_from(
    [1, 511, 512, 513, 4095, 4096, 4097, 8192, 65535, 65536, 65537, 128 * KIB + 1, 256 * KIB, 256 * KIB + 1]
) | st.integers(1, 300 * KIB)
KINDS = st.sampled_from([WRITE, WRITE, WRITE, WRITE, READ, READ, TRIM, ZEROES, ZEROES | NO_HOLE << 8, FLUSH])
SLOTS = st.sampled_from([0, 0, 1, 2, 3])
REQUESTS = st.tuples(SLOTS, KINDS, EDGES, SHIFTS, LENGTHS, st.sampled_from([0, 0, 0, FUA]))
BURSTS = st.lists(REQUESTS, min_size=1, max_size=8)
LINES = st.none() | st.builds(
    Damage,
    kind=st.sampled_from(["cut", "hold"]),
    offset=st.sampled_from([0, 79, 80, 300]) | st.integers(0, 400_000),
    back=st.sampled_from([False, False, True]),
)


class Machine(RuleBasedStateMachine):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.pair: Pair | None = None

    @initialize(shape=st.sampled_from(SHAPES), damage=LINES)
    def begin(self, shape: tuple[int, tuple[int, ...]], damage: Damage | None) -> None:
        self.pair = Pair(self.folder / "pair", shape[1], shape[0])
        self.pair.rejoin(damage=damage)

    def teardown(self) -> None:
        if self.pair is None:
            return
        try:
            if sys.exc_info()[0] is None:  # else a step has failed, and that is what shall be told
                self.pair.finish()
        finally:
            self.pair.close()

    # --- clients

    def _place(self, volume: int, edge: int, shift: int, length: int) -> tuple[int, int]:
        size = self.pair.sizes[volume]
        length = min(length, size)
        at = size - length if edge == -1 else (edge + shift) % size
        return at, min(length, size - at)

    def _start(self, slot: int, kind: int, edge: int, shift: int, length: int, flags: int) -> None:
        kind, extra = kind & 0xFF, kind >> 8
        if kind == FLUSH:
            self.pair.request(slot, FLUSH, 0, 0)
            return
        at, length = self._place(self.pair.connect(slot).volume, edge, shift, length)
        self.pair.request(slot, kind, at, length, 0 if kind == READ else flags | extra)

    @rule(burst=BURSTS)
    def requests(self, burst: list[Request]) -> None:
        for one in burst:
            self._start(*one)
        self.pair.pump()

    @rule(slots=st.lists(SLOTS, min_size=2, max_size=6), edge=EDGES, kind=KINDS, lengths=st.lists(LENGTHS, min_size=6))
    def one_place(self, slots: list[int], edge: int, kind: int, lengths: list[int]) -> None:
        """Of several clients at once."""
        for slot, length in zip(slots, lengths, strict=False):
            self._start(slot, WRITE if length % 2 else kind, edge, -(length // 2), length, 0)
        self.pair.pump()

    @rule()
    def answers(self) -> None:
        if self.pair.serving:
            self.pair.answered()

    @rule(slot=SLOTS)
    def hang_up(self, slot: int) -> None:
        if slot in self.pair.connections:
            self.pair.hang_up(slot)

    @rule(request=REQUESTS, fua=st.booleans())
    def durable(self, request: Request, fua: bool) -> None:
        slot, kind, edge, shift, length, _ = request
        kind, extra = kind & 0xFF, kind >> 8
        if kind == READ or not fua:
            kind, extra = FLUSH, 0
        at, length = self._place(self.pair.connect(slot).volume, edge, shift, length)
        if kind == FLUSH:
            self.pair.durable(slot, FLUSH, 0, 0, 0)
        else:
            self.pair.durable(slot, kind, at, length, FUA | extra)

    # --- the link

    @rule(burst=BURSTS)
    def settle(self, burst: list[Request]) -> None:
        """With a link again if there is none: every round of troubles comes to an end."""
        self.requests(burst)
        if not self.pair.joined:
            self.pair.rejoin()
        self.pair.settle()

    @rule(first=st.integers(0, 1), burst=BURSTS)
    def cut(self, first: int, burst: list[Request]) -> None:
        self.requests(burst)
        if self.pair.joined:
            self.pair.cut(first)

    @rule(first=st.sampled_from(FIRST), damage=LINES, burst=BURSTS, request=REQUESTS)
    def rejoin(self, first: str, damage: Damage | None, burst: list[Request], request: Request) -> None:
        if self.pair.joined and first:
            self.pair.cut()
        if first == "scribble":
            _, _, edge, shift, length, _ = request
            self.pair.scribble(0, *self._place(0, edge, shift, length))
        elif first == "all dirty":
            self.pair.primary.engine.set_all_dirty(0)
        self.pair.rejoin(full=first == "full", damage=damage)
        self.requests(burst)

    @rule(ask=st.booleans(), cut=st.booleans(), before=BURSTS, after=BURSTS)
    def alone(self, ask: bool, cut: bool, before: list[Request], after: list[Request]) -> None:
        """G1, W7: with writes held that the other one may have got or not."""
        self.requests(before)
        if self.pair.joined and cut:
            self.pair.cut()
        if not self.pair.serving:
            self.pair.go_alone(ask=ask)
        self.requests(after)

    # --- nodes

    @rule(what=st.sampled_from(TROUBLES), burst=BURSTS, alone=st.booleans(), again=st.integers(0, 2))
    def node(self, what: str, burst: list[Request], alone: bool, again: int) -> None:
        """One or both end, or change their roles, while requests are in flight; mostly there is a link again then."""
        if what in ("roles change", "primary crashes, other takes over"):
            self.pair.in_sync()  # it is allowed only after that
        self.requests(burst)
        may = 1 - self.pair.at in self.pair.current
        if what == "roles change":
            if not may:
                return
            self.pair.fence()
            self.pair.take_over(alone=alone)
        elif what == "secondary crashes":
            self.pair.crash(primary=False, secondary=True)
        elif what == "secondary stops":
            self.pair.stop_secondary()
        else:
            if "stops" in what:
                self.pair.stop(graceful="gracefully" in what)
            else:
                self.pair.crash(primary=True, secondary=what == "both crash")
            if may and "takes over" in what:
                self.pair.take_over(alone=alone)
            else:
                self.pair.comes_back(alone=alone)
        if again:
            self.pair.rejoin()


@pytest.fixture
def counted(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder on a file system that says what of a file is not on the disk."""
    if counts_unwritten(tmp_path):
        return tmp_path
    image = tmp_path / "fs"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    need: Callable[[str], str] = request.getfixturevalue("need_tool")
    os.spawnv(os.P_WAIT, need("mkfs.ext4"), ["mkfs.ext4", "-q", str(image)])
    folder: Path = request.getfixturevalue("mount")(kind="ext4", device=request.getfixturevalue("loop_device")(image))
    if not counts_unwritten(folder):
        pytest.skip("this kernel has no cachestat")
    return folder


def test_a_pair_is_one_disk(counted: Path) -> None:
    """W1, W2, W4, W5, W7, W9, M3, M5, M6, M8, G3, R1-R6, A4, A17."""
    run_state_machine_as_test(
        lambda: Machine(counted),
        settings=settings(
            max_examples=EXAMPLES * max(1, TIMES),
            stateful_step_count=STEPS,
            derandomize=not TIMES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )


# --- the model itself


def put(disk: ModelDisk, connection: int, offset: int, data: bytes) -> Write:
    return disk.begin_write(connection, offset, len(data), data)


def sees(disk: ModelDisk, offset: int, data: bytes, connection: int = 9) -> bool:
    try:
        disk.end_read(disk.begin_read(connection, offset, len(data)), data)
    except AssertionError:
        return False
    return True


def test_an_acknowledged_write_is_read_and_nothing_before_it() -> None:
    disk = ModelDisk(8)
    disk.end_write(put(disk, 1, 2, b"abcd"), acknowledged=True)
    disk.end_write(disk.begin_write(2, 3, 1, None), acknowledged=True)
    assert sees(disk, 0, b"\0\0a\0cd\0\0")
    assert not sees(disk, 2, b"abcd")
    assert not sees(disk, 2, bytes(4))


def test_of_unordered_writes_any_may_be_the_last_one_but_no_mixture() -> None:
    disk = ModelDisk(4)
    one, other = put(disk, 1, 0, b"aaaa"), put(disk, 2, 1, b"bb")
    disk.end_write(other, acknowledged=True)
    disk.end_write(one, acknowledged=True)
    assert not sees(disk, 0, b"aaba")
    assert not sees(disk, 0, bytes(4))
    assert sees(disk, 0, b"abba")
    assert not sees(disk, 0, b"aaaa")  # somebody has seen the other one


def test_a_connection_keeps_its_order() -> None:
    disk = ModelDisk(2)
    old, new = put(disk, 1, 0, b"aa"), put(disk, 1, 0, b"bb")
    read = disk.begin_read(1, 0, 2)
    late = put(disk, 1, 0, b"cc")
    for write in (new, old, late):
        disk.end_write(write, acknowledged=True)
    with pytest.raises(AssertionError, match="none of"):
        disk.end_read(read, b"cc")
    assert not sees(disk, 0, b"bb")
    assert sees(disk, 0, b"cc")


def test_a_write_of_unknown_fate_is_there_or_not_and_then_stays_so() -> None:
    for seen, lost in ((b"aa", b"\0\0"), (b"\0\0", b"aa")):
        disk = ModelDisk(2)
        disk.end_write(put(disk, 1, 0, b"aa"), acknowledged=False)
        assert sees(disk, 0, seen)
        assert not sees(disk, 0, lost)
        disk.settle(seen)
        with pytest.raises(AssertionError, match="the image holds"):
            disk.judge(lost)


def test_a_read_may_see_what_was_written_while_it_was_under_way() -> None:
    disk = ModelDisk(2)
    first, second = disk.begin_read(1, 0, 2), disk.begin_read(2, 0, 2)
    write = put(disk, 3, 0, b"aa")
    disk.end_read(first, b"\0\0")
    disk.end_write(write, acknowledged=True)
    disk.end_read(second, b"\0\0")
    assert sees(disk, 0, b"aa")
    assert not sees(disk, 0, b"\0\0")
