"""The groups of the live mirror, and the ones in which clients meet several servers: `live-bare` and `live-sync`.

Rules:
- All servers of a group are up from the first run to the last, and take turns: every server meets a workload before any
  meets the next one, and each round another one begins. A figure is a median over the rounds.
- Before the first round every byte of each volume is written once through its server; before each run what was written
  is on the disk. Neither is timed.
- A server that fails is dropped with the reason; the others go on.
- Who asks for one subject gets all servers of its workload: a figure alone says nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bench.campaign import Group, Sample, Series
from bench.daemons import SERVED
from bench.fio import WORKLOADS, Workload, fill, measured, pinned
from bench.measure import run
from bench.servers import BARE, KINDS, NBDKIT, QEMU_NBD, QUORUM, SYNC, Kind, Server
from bench.settings import GIB, MIB, SMALL, Settings, show_size
from bench.workshop import CannotRun, Failed, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LIVE_BARE = "live-bare"
LIVE_SYNC = "live-sync"
ROUND_TRIP = "floor TCP round trip"
ROUND_TRIP_PINNED = "floor TCP round trip, pinned"
_TINY = 64 * MIB


@dataclass(frozen=True)
class Scale:
    """How large a live group is: six images of `size` take no more room than three of the run's."""

    size: int
    rounds: int
    seconds: float
    """of each of fio's runs"""

    @staticmethod
    def of(settings: Settings) -> Scale:
        size = min(GIB, settings.size // 2 // MIB * MIB)
        if settings.size >= SMALL:
            return Scale(size, max(7, settings.rounds), 2.0)
        tiny = settings.size < _TINY
        return Scale(size, 1 if tiny else min(2, settings.rounds), 0.1 if tiny else 0.2)


@dataclass(frozen=True)
class LivePlan:
    """A group that measures itself. `subjects`: the names of its series, in order."""

    name: str
    title: str
    subjects: tuple[str, ...]
    measure: Callable[[Workshop, LivePlan, set[str] | None], Group]

    def cases(self) -> list[tuple[str, str]]:
        """(subject, slug)."""
        return [(subject, re.sub(r"[^\w.]+", "-", subject)) for subject in self.subjects]


def told(series: Series, name: str) -> float | None:
    """The median of a fact; None when no sample has it."""
    found = [float(x.facts[name]) for x in series.samples if x.facts.get(name) is not None]
    return statistics.median(found) if found else None


def subject(server: str, workload: Workload) -> str:
    return f"{server}: {workload.title}"


def start(group: Group, name: str, kind: Literal["mirrorpair", "floor", "peer"], absent: str | None = None) -> Series:
    """A new series of the group."""
    group.series[name] = series = Series(name, kind, "")
    if absent is not None:
        series.state, series.reason = "absent", absent
    return series


def guarded(series: Series, once: Callable[[], Sample]) -> None:
    """One more sample, unless the series has failed before or does now."""
    if series.state != "ok":
        return
    try:
        series.samples.append(once())
    except Failed as error:
        series.state, series.reason = "failed", str(error)


def need_room(shop: Workshop, bytes_needed: int) -> None:
    free = shutil.disk_usage(shop.images).free
    if free < bytes_needed + 64 * MIB:
        raise CannotRun(
            f"{show_size(free)} free, {show_size(bytes_needed)} needed: set TMPDIR or MIRRORPAIR_BENCH_SIZE"
        )


# --- clients and servers ---------------------------------------------------------------------------------------------


class _Serving:
    """Runs one group of servers."""

    def __init__(self, shop: Workshop, plan: LivePlan, kinds: Iterable[Kind], workloads: Iterable[Workload]) -> None:
        self._shop = shop
        self._scale = Scale.of(shop.settings)
        self._kinds = tuple(kinds)
        self._workloads = tuple(workloads)
        self._up: dict[str, Server] = {}
        self.group = Group(plan.name, plan.title, self._scale.size)
        self.group.facts = {
            "chunk": SERVED,
            "rounds": self._scale.rounds,
            "seconds": self._scale.seconds,
            "axis": "seconds a request, median",
        }

    def run(self) -> Group:
        need_room(self._shop, 2 * len(self._kinds) * self._scale.size)
        with contextlib.ExitStack() as stack:
            for kind in self._kinds:
                absent = kind.missing(self._shop)
                for workload in self._workloads:
                    start(self.group, subject(kind.name, workload), kind.kind, absent)
                if absent is None:
                    self._start(kind, stack)
            for name in (ROUND_TRIP, ROUND_TRIP_PINNED):
                start(self.group, name, "floor")
            for number in range(self._scale.rounds):
                self._round(number)
            for name, server in list(self._up.items()):
                self._guard(name, server.finish)
        return self.group

    def _start(self, kind: Kind, stack: contextlib.ExitStack) -> None:
        def up() -> None:
            server = kind.make(self._shop, self._scale.size)
            stack.callback(server.close)
            server.start()
            fill(self._shop, server.uri, self._scale.size)
            self._up[kind.name] = server

        self._guard(kind.name, up)

    def _round(self, number: int) -> None:
        names = [kind.name for kind in self._kinds]
        shift = number % len(names)
        for workload in self._workloads:
            for name in names[shift:] + names[:shift]:
                if name in self._up:
                    self._guard(name, lambda name=name, workload=workload: self._once(name, workload))
        for name in (ROUND_TRIP, ROUND_TRIP_PINNED):
            guarded(self.group.series[name], lambda name=name: self._round_trip(pin=name == ROUND_TRIP_PINNED))

    def _once(self, name: str, workload: Workload) -> None:
        server = self._up[name]
        server.flush()
        size, seconds = self._scale.size, self._scale.seconds
        sample = measured(self._shop, server.uri, workload, size, seconds, server.pids())
        self.group.series[subject(name, workload)].samples.append(sample)

    def _round_trip(self, *, pin: bool) -> Sample:
        with pinned(()) if pin else contextlib.nullcontext():
            result = run([self._shop.program("pingpong")], cwd=self._shop.folder)
        if result.status != 0:
            raise Failed(f"floors/pingpong ended with {result.status}: {result.tail()}")
        facts = answer(result.stdout)
        return Sample(facts["p50_us"] / 1e6, facts=facts)

    def _guard(self, name: str, step: Callable[[], None]) -> None:
        """A server that fails has failed in all its series: what it served before may be wrong too."""
        try:
            step()
        except Failed as error:
            self._up.pop(name, None)
            for workload in self._workloads:
                series = self.group.series[subject(name, workload)]
                series.state, series.reason = "failed", str(error)


def answer(stdout: str) -> dict[str, Any]:
    """The JSON line of a floor."""
    found = json.loads(stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def _serving_plan(name: str, title: str, servers: tuple[str, ...]) -> LivePlan:
    def measure(shop: Workshop, plan: LivePlan, wanted: set[str] | None) -> Group:
        workloads = [w for w in WORKLOADS if wanted is None or any(subject(s, w) in wanted for s in servers)]
        return _Serving(shop, plan, [KINDS[s] for s in servers], workloads).run()

    subjects = tuple(subject(s, w) for s in servers for w in WORKLOADS)
    return LivePlan(name, title, (*subjects, ROUND_TRIP, ROUND_TRIP_PINNED), measure)


BARE_PLAN = _serving_plan(
    LIVE_BARE, "one server, no peer: fio's nbd engine over a unix socket", (BARE, NBDKIT, QEMU_NBD)
)
SYNC_PLAN = _serving_plan(
    LIVE_SYNC, "mirrored, replication over TCP loopback, all on one machine", (SYNC, BARE, NBDKIT, QUORUM)
)
