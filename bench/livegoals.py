"""What we want of the live mirror, as figures: judged and printed with those of `goals.py`, never enforced.

Rules:
- Throughput and latency are judged by medians over the rounds; both sides of a ratio come from one group, that is from
  servers that took turns.
- A figure against another project that is not measured here (DRBD, in a guest of its own) is a constant, and says so.
- A goal for `async` is not here: that mode is not built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import fio, live, livecost, livefailover, liveresync, livestall
from bench.goals import Goal, NotMeasuredError
from bench.servers import BARE, NBDKIT, QUORUM, SYNC
from bench.settings import MIB, TIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.campaign import Group, Series

    Groups = Mapping[str, Group]

DRBD_SHARE_DEPTH_32 = 0.65
DRBD_SHARE_BIG = 0.38
DRBD_BITMAP_BYTES_PER_S = 226e6
DRBD_VERIFY_BYTES_PER_S = 166e6
_WAKEUPS_OF_A_BEAT = 3
"""the timer of our own, the answer to it, and the peer's"""
_OTHER_WAKEUPS_PER_S = 2


def _series(groups: Groups, group: str, name: str) -> Series:
    found = groups[group].of(name)
    if found is None:
        raise NotMeasuredError(f"{name} was not asked for")
    if not found.samples or found.state != "ok":
        raise NotMeasuredError(found.reason or f"{name} has no result")
    return found


def _fact(groups: Groups, group: str, name: str, fact: str) -> float:
    value = live.told(_series(groups, group, name), fact)
    if value is None:
        raise NotMeasuredError(f"{fact} of {name} is not told")
    return value


def _seconds(groups: Groups, group: str, name: str, *, engine: bool = False) -> float:
    series = _series(groups, group, name)
    value = series.engine_s if engine else series.seconds
    if value is None:
        raise NotMeasuredError(f"{name} does not say its engine's time")
    return value


def _ratio(group: str, one: str, other: str, workload: fio.Workload, fact: str) -> Callable[[Groups], float]:
    """`one`'s fact over `other`'s."""
    return lambda groups: (
        _fact(groups, group, live.subject(one, workload), fact)
        / _fact(groups, group, live.subject(other, workload), fact)
    )


def _in_round_trips(groups: Groups) -> float:
    """What the mirror adds to a write of one's own, in TCP round trips."""
    mirrored, alone = (
        _fact(groups, live.LIVE_SYNC, live.subject(server, fio.WRITE_1_PINNED), "p50_us") for server in (SYNC, BARE)
    )
    return (mirrored - alone) / _fact(groups, live.LIVE_SYNC, live.ROUND_TRIP_PINNED, "p50_us")


def _bare_goals() -> list[Goal]:
    group = live.LIVE_BARE
    found = []
    for workload in (fio.WRITE_1, fio.WRITE_1_PINNED):
        find = _ratio(group, BARE, NBDKIT, workload, "p50_us")
        found.append(Goal(f"bare {workload.title}: p50 over nbdkit's", group, "<=", 0.65, " x", find))
    for workload, fact, bound in (
        (fio.WRITE_32, "iops", 1.0),
        (fio.WRITE_BIG, "bytes_per_s", 1.1),
        (fio.READ_1, "iops", 1.0),
        (fio.READ_32, "iops", 1.0),
    ):
        text = f"bare {workload.title}: over nbdkit"
        found.append(Goal(text, group, ">=", bound, " x", _ratio(group, BARE, NBDKIT, workload, fact)))
    return found


def _sync_goals() -> list[Goal]:
    group = live.LIVE_SYNC
    found = []
    for workload, fact, bound in (
        (fio.WRITE_1, "iops", 0.6),
        (fio.WRITE_32, "iops", 0.5),
        (fio.WRITE_BIG, "bytes_per_s", 0.5),
        (fio.READ_1, "iops", 1.0),
        (fio.READ_32, "iops", 1.0),
    ):
        text = f"sync {workload.title}: over bare nbdkit"
        found.append(Goal(text, group, ">=", bound, " x", _ratio(group, SYNC, NBDKIT, workload, fact)))
    for workload, fact, sense, bound in (
        (fio.WRITE_1, "p50_us", "<=", 0.4),
        (fio.WRITE_32, "iops", ">=", 7.0),
        (fio.WRITE_BIG, "bytes_per_s", ">=", 1.4),
    ):
        text = f"sync {workload.title}: {'p50 ' if fact == 'p50_us' else ''}over the quorum's"
        found.append(Goal(text, group, sense, bound, " x", _ratio(group, SYNC, QUORUM, workload, fact)))
    for workload, fact, bound in (
        (fio.WRITE_32, "iops", DRBD_SHARE_DEPTH_32),
        (fio.WRITE_BIG, "bytes_per_s", DRBD_SHARE_BIG),
    ):
        text = f"sync {workload.title}: share of own bare, above DRBD's in its guest"
        found.append(Goal(text, group, ">=", bound, "", _ratio(group, SYNC, BARE, workload, fact)))
    pinned = fio.WRITE_1_PINNED
    text = f"sync {pinned.title}: p50 beyond own bare"
    found.append(Goal(text, group, "<=", 1.7, " TCP round trips", _in_round_trips))
    text = f"sync {pinned.title}: p99 over bare nbdkit's"
    found.append(Goal(text, group, "<=", 2.0, " x", _ratio(group, SYNC, NBDKIT, pinned, "p99_us")))
    # The time per request holds the write and its flush.
    text = f"sync {fio.WRITE_FLUSH.title}: time over own bare"
    find = _ratio(group, BARE, SYNC, fio.WRITE_FLUSH, "iops")
    found.append(Goal(text, group, "<=", 1.5, " x", find))
    return found


def _resync_goals() -> list[Goal]:
    found = []
    group = liveresync.RESYNC_BITMAP
    for dirt in liveresync.PATTERNS:
        name, floor = liveresync.bitmap(dirt), liveresync.floor_blocks(dirt)

        def over_floor(groups: Groups, name: str = name, floor: str = floor) -> float:
            return _seconds(groups, liveresync.RESYNC_BITMAP, name, engine=True) / _seconds(
                groups, liveresync.RESYNC_BITMAP, floor, engine=True
            )

        def faster(groups: Groups, name: str = name) -> float:
            return _seconds(groups, liveresync.RESYNC_BITMAP, liveresync.FULL, engine=True) / _seconds(
                groups, liveresync.RESYNC_BITMAP, name, engine=True
            )

        def rate(groups: Groups, name: str = name) -> float:
            return _fact(groups, liveresync.RESYNC_BITMAP, name, "bytes_per_s") / DRBD_BITMAP_BYTES_PER_S

        found += [
            Goal(f"bitmap resync over read+send+write, 1 % in {dirt}", group, "<=", 1.3, " x", over_floor),
            Goal(f"bitmap resync faster than own full compare, 1 % in {dirt}", group, ">=", 5, " x", faster),
            Goal(f"bitmap resync, bytes/s over DRBD's 226 MB/s, 1 % in {dirt}", group, ">=", 3, " x", rate),
        ]
    group = liveresync.RESYNC_FULL

    def share(groups: Groups) -> float:
        return _seconds(groups, liveresync.RESYNC_FULL, liveresync.FULL_FLOOR, engine=True) / _seconds(
            groups, liveresync.RESYNC_FULL, liveresync.FULL, engine=True
        )

    def over_drbd(groups: Groups) -> float:
        return _fact(groups, liveresync.RESYNC_FULL, liveresync.FULL, "bytes_per_s") / DRBD_VERIFY_BYTES_PER_S

    found += [
        Goal("full resync of equal data as share of the XXH3 floor", group, ">=", 0.85, "", share),
        Goal("full resync of equal data, bytes/s over DRBD's verify, 166 MB/s", group, ">=", 20, " x", over_drbd),
    ]
    group = liveresync.DURING

    def slower(groups: Groups) -> float:
        return _fact(groups, liveresync.DURING, liveresync.CLIENT_DURING, "p50_us") / _fact(
            groups, liveresync.DURING, liveresync.CLIENT_AFTER, "p50_us"
        )

    def kept(groups: Groups) -> float:
        return _fact(groups, liveresync.DURING, liveresync.BUSY_RESYNC, "bytes_per_s") / _fact(
            groups, liveresync.DURING, liveresync.IDLE_RESYNC, "bytes_per_s"
        )

    found += [
        Goal("client's p50 during a resync over that without", group, "<=", 1.5, " x", slower),
        Goal("resync beside a client as share of its idle speed", group, ">=", 0.6, "", kept),
    ]
    for name in (liveresync.HUNG, liveresync.KILLED):

        def returned(groups: Groups, name: str = name) -> float:
            return _seconds(groups, liveresync.ABSENCE, name)

        text = f"in sync after an absence of 1 s: {name.removeprefix('mirrorpair ')}"
        found.append(Goal(text, liveresync.ABSENCE, "<=", 0.3, " s", returned))
    return found


def _cost_goals() -> list[Goal]:
    group = livecost.COST
    found = []
    for size in livecost.SIZES:
        name, bound = livecost.opening(size), 100 + 2.5 * size / TIB
        for fact, what in (("memory_bytes", "memory of its own"), ("rss_bytes", "RSS")):

            def memory(groups: Groups, name: str = name, fact: str = fact) -> float:
                return _fact(groups, livecost.COST, name, fact) / MIB

            text = f"{what}, {name.removeprefix('mirrorpair opens ')}"
            found.append(Goal(text, group, "<=", round(bound, 1), " MiB", memory))
    largest = livecost.opening(livecost.SIZES[-1])
    found.append(Goal(largest, group, "<=", 1.0, " s", lambda groups: _seconds(groups, livecost.COST, largest)))
    allowed = _WAKEUPS_OF_A_BEAT / livecost.INTERVAL_S + _OTHER_WAKEUPS_PER_S
    for name in (livecost.PRIMARY, livecost.SECONDARY):

        def wakeups(groups: Groups, name: str = name) -> float:
            return _fact(groups, livecost.COST, name, "wakeups_per_s")

        text = f"wake-ups, {name}: no more than its heartbeats'"
        found.append(Goal(text, group, "<=", allowed, " /s", wakeups))
    return found


def _failover_goals() -> list[Goal]:
    group, name = livefailover.FAILOVER, livefailover.PROVEN
    worst = "kill -9 to the first write at the standby, the worst run"
    memory = "memory of a sentinel's own"
    return [
        Goal(
            "kill -9 to the first write at the standby",
            group,
            "<=",
            0.2,
            " s",
            lambda groups: _seconds(groups, group, name),
        ),
        Goal(
            worst, group, "<=", 0.4, " s", lambda groups: max(x.seconds for x in _series(groups, group, name).samples)
        ),
        Goal(memory, group, "<=", 8.0, " MiB", lambda groups: _fact(groups, group, name, "memory_bytes") / MIB),
    ]


def _stall_goals() -> list[Goal]:
    group, loss = livestall.STALL, livestall.LOSS
    allowed = livestall.INTERVAL_S * livestall.SUSPECT_AFTER + 0.1
    return [
        Goal(
            "switchover with thousands of writes in flight: a client's longest wait",
            group,
            "<=",
            0.1,
            " s",
            lambda groups: _seconds(groups, group, livestall.SWITCHOVER),
        ),
        Goal(
            "standby silent: a write's longest wait, k x h + 100 ms",
            group,
            "<=",
            allowed,
            " s",
            lambda groups: max(x.seconds for x in _series(groups, group, loss).samples),
        ),
        Goal(
            "standby silent: reads' longest gap",
            group,
            "<=",
            0.1,
            " s",
            lambda groups: max(x.facts["read_gap_s"] for x in _series(groups, group, loss).samples),
        ),
    ]


GOALS = [*_bare_goals(), *_sync_goals(), *_resync_goals(), *_cost_goals(), *_failover_goals(), *_stall_goals()]
