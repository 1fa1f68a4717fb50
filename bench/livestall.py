"""How long clients with thousands of writes in flight wait: for a planned change of the primary, and for a standby that
falls silent; and whether reads go on meanwhile.

Rules:
- A run's figure is the longest time for which one of the connections had no answer while writes of it were under way,
  or while it looked for a server: as a client meets it, who knows both nodes and no roles.
- Switchovers go to and fro. The silent standby's daemon is stopped (SIGSTOP), so nothing is proven; afterwards it goes
  on, and is brought in sync again. None of that is timed.
- Reads are of a part that nobody writes; their longest gap stands beside.
- In the end every block holds its last acknowledged write, or a later one that was sent, and both images are equal.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from typing import TYPE_CHECKING, Self

from bench.campaign import Group, Sample
from bench.daemons import SERVED, VOLUME, LivePair, Node, need_client
from bench.live import LivePlan, Scale, guarded, start
from bench.measure import idle_share
from bench.settings import MIB
from bench.workshop import Failed, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from bench.campaign import Series

STALL = "stall"
SWITCHOVER, LOSS = "mirrorpair, switchover", "mirrorpair, silent standby"
SIZE = 64 * MIB
INTERVAL_S, SUSPECT_AFTER = 0.25, 4
LANES, DEPTH = 4, 512
_READ_PART = MIB
_BLOCK = 4096
_RUNS = 20
_ENOUGH = 200
"""writes of a connection that are answered before a run, and after it"""
_RETRY_S = 0.001
_LIMIT_S = 60.0


class _Gap:
    """The longest time between two answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.perf_counter()
        self._longest = 0.0
        self.answers = 0

    def answered(self) -> None:
        with self._lock:
            now = time.perf_counter()
            self._longest = max(self._longest, now - self._last)
            self._last = now
            self.answers += 1

    def begin(self) -> None:
        """Forgets what was before, but not how long the present wait lasts."""
        with self._lock:
            self._longest = 0.0

    @property
    def longest(self) -> float:
        with self._lock:
            return max(self._longest, time.perf_counter() - self._last)


class _Client(threading.Thread):
    """One connection to whoever serves."""

    def __init__(self, nodes: tuple[Node, Node]) -> None:
        super().__init__(daemon=True)
        self.gap = _Gap()
        self.failure = ""
        self.leaves = threading.Event()
        self._paths = [str(node.nbd) for node in nodes]

    def run(self) -> None:
        from mirrorpair.errors import RemoteError
        from mirrorpair.nbdclient import connect

        try:
            while not self.leaves.is_set():
                for path in self._paths:
                    try:
                        client = connect(path, VOLUME, timeout=_LIMIT_S)
                    except RemoteError:
                        continue
                    try:
                        self._use(client)
                    except RemoteError:
                        continue  # a connection of who serves no more
                    finally:
                        client.hang_up()
                self.leaves.wait(_RETRY_S)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to
            self.failure = f"{type(error).__name__}: {error}"

    def _use(self, client: Any) -> None:
        raise NotImplementedError


class _Writer(_Client):
    """Writes its part from end to end, again and again, DEPTH requests in flight. A block holds the number of the write
    that wrote it."""

    def __init__(self, nodes: tuple[Node, Node], first: int, blocks: int) -> None:
        super().__init__(nodes)
        self._first, self._blocks = first, blocks
        self._number = 0
        self.acknowledged = [0] * blocks
        self.sent = [0] * blocks

    def _use(self, client: Any) -> None:
        flying: list[tuple[Any, int, int]] = []
        try:
            while flying or not self.leaves.is_set():
                while len(flying) < DEPTH and not self.leaves.is_set():
                    at = self._number % self._blocks
                    self._number += 1
                    self.sent[at] = self._number
                    data = self._number.to_bytes(8, "big") * (_BLOCK // 8)
                    flying.append((client.start_write((self._first + at) * _BLOCK, data), at, self._number))
                if flying:
                    flying[0][0].wait(_LIMIT_S)
                    flying = self._collect(flying)
        finally:
            self._collect(flying)

    def _collect(self, flying: list[tuple[Any, int, int]]) -> list[tuple[Any, int, int]]:
        left = []
        for pending, at, number in flying:
            if not pending.done:
                left.append((pending, at, number))
            elif pending.error is None:
                self.acknowledged[at] = number
                self.gap.answered()
        return left

    def check(self, client: Any) -> None:
        for at in range(self._blocks):
            data = bytes(client.read((self._first + at) * _BLOCK, _BLOCK))
            if not self.acknowledged[at]:
                continue
            number = int.from_bytes(data[:8], "big")
            if data != data[:8] * (_BLOCK // 8) or not self.acknowledged[at] <= number <= self.sent[at]:
                raise Failed(f"block {self._first + at} holds write {number}, not {self.acknowledged[at]} or later")


class _Reader(_Client):
    def _use(self, client: Any) -> None:
        while not self.leaves.is_set():
            client.read(SIZE - _READ_PART, _BLOCK)
            self.gap.answered()
            self.leaves.wait(_RETRY_S)


class _Load:
    """All of them; a context manager that waits for what is in flight."""

    def __init__(self, pair: LivePair) -> None:
        blocks = (SIZE - _READ_PART) // _BLOCK // LANES
        self.writers = [_Writer(pair.nodes, lane * blocks, blocks) for lane in range(LANES)]
        self.reader = _Reader(pair.nodes)

    def __enter__(self) -> Self:
        for client in (*self.writers, self.reader):
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        for client in (*self.writers, self.reader):
            client.leaves.set()
        for client in (*self.writers, self.reader):
            client.join(_LIMIT_S)

    def go_on(self) -> None:
        """Until each writer has got some answers more."""
        before = [one.gap.answers for one in self.writers]
        deadline = time.monotonic() + _LIMIT_S
        while any(one.gap.answers < was + _ENOUGH for one, was in zip(self.writers, before, strict=True)):
            failure = next((one.failure for one in (*self.writers, self.reader) if one.failure), "")
            if failure or time.monotonic() > deadline:
                raise Failed(failure or "writes are not answered any more")
            time.sleep(0.005)

    def during(self, change: Callable[[], None]) -> Sample:
        self.go_on()
        idle = idle_share(0.02)
        clients = (*self.writers, self.reader)
        for one in clients:
            one.gap.begin()
        change()
        self.go_on()
        writes = max(one.gap.longest for one in self.writers)
        return Sample(writes, idle_before=idle, facts={"read_gap_s": self.reader.gap.longest})


def _measure(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    shop.mirrorpair()
    need_client()
    group = Group(plan.name, plan.title, SIZE)
    for name in plan.subjects:
        start(group, name, "mirrorpair")
    runs = 2 if Scale.of(shop.settings).rounds == 1 else _RUNS
    beat = f'interval = "{INTERVAL_S:g}s"\nsuspect-after = {SUSPECT_AFTER}'
    group.facts = {
        "rounds": runs,
        "axis": "seconds, median",
        "heartbeat": f"{LANES} clients with {DEPTH} writes of 4 KiB in flight each; heartbeats every {INTERVAL_S:g} s, "
        f"suspicion after {SUSPECT_AFTER}",
    }
    with LivePair(shop, SIZE, heartbeat=beat, witness=True) as pair:
        pair.up(SERVED)
        with _Load(pair) as load:
            for name, once in ((SWITCHOVER, _hand_over), (LOSS, _lose)):
                for _number in range(runs):
                    guarded(group.series[name], lambda once=once: once(pair, load))
                    if group.series[name].state != "ok":
                        return group
        with _primary(pair)[0].client() as client:
            for writer in load.writers:
                writer.check(client)
        pair.finish()
    return group


def _primary(pair: LivePair) -> tuple[Node, Node]:
    """The primary, and the other one."""
    one, other = pair.nodes
    return (one, other) if one.ask(lambda client: client.status()).role == "primary" else (other, one)


def _hand_over(pair: LivePair, load: _Load) -> Sample:
    pair.synced()
    _, other = _primary(pair)
    return load.during(lambda: other.ask(lambda client: client.switchover(to=other.name)) and None)


def _lose(pair: LivePair, load: _Load) -> Sample:
    pair.synced()
    primary, standby = _primary(pair)

    def lose() -> None:
        """Until the primary goes on alone: answers that were on their way still come before."""
        standby.signal(signal.SIGSTOP)
        deadline = time.monotonic() + _LIMIT_S
        while primary.ask(lambda client: client.status()).serving != "alone":
            if time.monotonic() > deadline:
                raise Failed(f"{primary.name} does not go on without {standby.name}: {primary.tail()}")
            time.sleep(0.02)

    try:
        return load.during(lose)
    finally:
        standby.signal(signal.SIGCONT)


def rows(group: Group) -> tuple[list[str], list[list[str]]]:
    """The distribution, as a table's head and rows; milliseconds."""
    head = ["longest wait of a client for a write's answer", "min", "p50", "p90", "max", "n", "reads' longest gap"]
    return head, [_row(series) for series in group.series.values()]


def _row(series: Series) -> list[str]:
    found = sorted(sample.seconds * 1000 for sample in series.samples)
    if not found:
        return [series.name, series.state, "", "", "", "", ""]
    spread = found[0], statistics.median(found), found[min(len(found) - 1, round(0.9 * len(found)))], found[-1]
    gap = max(sample.facts["read_gap_s"] for sample in series.samples) * 1000
    return [series.name, *(f"{value:,.0f} ms" for value in spread), str(len(found)), f"{gap:,.0f} ms"]


PLAN = LivePlan(STALL, "clients wait: switchover, and a standby that falls silent", (SWITCHOVER, LOSS), _measure)
