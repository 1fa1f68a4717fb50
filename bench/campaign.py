"""A group: subjects that take turns on the same two images.

Rules:
- Rounds, not blocks: floor, mirrorpair and every peer run once before any of them runs a second time, each round
  starting with another one, so that a drift of the machine falls on all of them.
- Before a run the target is reset; after it the result is checked. Both are outside the timing.
- A subject that fails is dropped from its group with the reason. The others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bench import subjects as s
from bench.images import ALL, EQUAL, PATTERNS, SCATTERED_4K, Pair, Pattern
from bench.measure import MemoryWatch, Run, idle_share, run
from bench.server import Relay, Server
from bench.settings import GIB, KIB, MIB, TIB, show_size
from bench.workshop import CannotRun, Failed, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.subjects import Subject

Cache = Literal["warm", "cold"]
_REBUILDS = 2


@dataclass
class Sample:
    seconds: float
    """Whole command, from spawn to exit."""
    engine_s: float | None = None
    """What it says of itself: for mirrorpair the engine's time, for a floor the time inside main."""
    cpu_s: float = 0.0
    idle_before: float = 1.0
    """Share of the cores that nobody used just before."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Series:
    name: str
    kind: str
    watch: str
    samples: list[Sample] = field(default_factory=list)
    state: Literal["ok", "absent", "failed", "cut"] = "ok"
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        return statistics.median(x.seconds for x in self.samples) if self.samples else None

    @property
    def engine_s(self) -> float | None:
        told = [x.engine_s for x in self.samples if x.engine_s is not None]
        return statistics.median(told) if told else None

    @property
    def facts(self) -> dict[str, Any]:
        return self.samples[-1].facts if self.samples else {}


@dataclass
class Group:
    """The results of one campaign."""

    name: str
    title: str
    size: int
    dirty_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)

    def of(self, subject: Subject | str) -> Series | None:
        return self.series.get(subject if isinstance(subject, str) else subject.name)


@dataclass(frozen=True)
class Plan:
    """What a group measures. `images` makes its pair; a pair is removed when the group is done."""

    name: str
    title: str
    subjects: tuple[Subject, ...]
    pattern: Pattern
    images: Callable[[Workshop, Plan], Pair]
    cache: Cache = "warm"
    flush: bool = False
    rounds: int | None = None


def _full(shop: Workshop, plan: Plan) -> Pair:
    return Pair.build(shop, plan.pattern, shop.settings.size)


def _small_folios(shop: Workshop, plan: Plan) -> Pair:
    return Pair.build(shop, plan.pattern, shop.settings.size, chunk=4 * KIB)


def _sparse(shop: Workshop, plan: Plan) -> Pair:
    data = max(MIB, shop.settings.size // 100 // MIB * MIB)
    return Pair.build(shop, plan.pattern, shop.settings.size, data=data)


def _huge(shop: Workshop, plan: Plan) -> Pair:
    """15 TiB, or the largest the file system takes, holding 1 GiB or a quarter of the size."""
    data = min(GIB, shop.settings.size // 4)
    for size in (15 * TIB, 8 * TIB, 4 * TIB, TIB, 256 * GIB):
        try:
            return Pair.build(shop, plan.pattern, size, data=data)
        except Failed as error:
            if "File too large" not in str(error):
                raise
    raise CannotRun("the file system takes no file of 256 GiB")


def plans() -> list[Plan]:
    found = [Plan(f"warm-{p.name}", f"warm: {p.title}", s.warm_subjects(p), p, _full) for p in PATTERNS]
    found.append(
        Plan(
            "folios-1pct-4KiB",
            "warm, filled by 4 KiB writes: 1 % in 4 KiB",
            (s.COMPARE_MAP, s.COMPARE_PWRITE, s.DIGEST_MAP, s.DIGEST_PWRITE, s.LOCAL, s.TCP, s.DD),
            SCATTERED_4K,
            _small_folios,
        )
    )
    durable = (s.LOCAL, s.PIPE, s.TCP, s.DD, s.QEMU_CONVERT, s.NBDCOPY)
    for pattern, floors in (
        (SCATTERED_4K, (s.COMPARE_MAP, s.COMPARE_PWRITE, s.DIGEST_MAP, s.DIGEST_PWRITE)),
        (ALL, (s.COMPARE_PWRITE, s.STREAM)),
    ):
        title = f"warm, flushed to the disk: {pattern.title}"
        found.append(Plan(f"durable-{pattern.name}", title, (*floors, *durable), pattern, _full, flush=True, rounds=3))
    cold = (s.DIRECT, s.COMPARE, s.VERIFY, s.LOCAL, s.TCP, s.CMP, s.QEMU_COMPARE, s.RSYNC)
    found.append(Plan("cold-equal", "cold: equal", cold, EQUAL, _full, cache="cold", rounds=3))
    found.append(
        Plan(
            "sparse-1pct",
            "cold, sparse: 1 % allocated, equal",
            (s.COMPARE, s.VERIFY, s.LOCAL, s.TCP, s.CREATE, s.QEMU_COMPARE, s.CP_SPARSE),
            EQUAL,
            _sparse,
            cache="cold",
        )
    )
    found.append(
        Plan(
            "sparse-15TiB",
            "warm, sparse: 15 TiB, equal",
            (s.VERIFY, s.LOCAL, s.TCP, s.CREATE, s.QEMU_COMPARE, s.CP_SPARSE, s.MEMORY_LOCAL, s.MEMORY_TCP),
            EQUAL,
            _huge,
        )
    )
    return found


class Campaign:
    """Runs one plan. `wanted` names the subjects asked for; floors always run, for a figure alone says nothing."""

    def __init__(self, shop: Workshop, plan: Plan, wanted: Iterable[str] | None = None) -> None:
        self._shop = shop
        self._plan = plan
        asked = None if wanted is None else set(wanted)
        self._subjects = [x for x in plan.subjects if asked is None or x.name in asked or x.kind == "floor"]
        self.group = Group(plan.name, plan.title, shop.settings.size)
        self._env = shop.environment(flush=plan.flush)
        self._patience = shop.settings.patience_s

    def run(self) -> Group:
        group = self.group
        for subject in self._subjects:
            series = Series(subject.name, subject.kind, subject.watch)
            group.series[subject.name] = series
            reason = subject.missing(self._shop)
            if reason is not None:
                series.state, series.reason = "absent", reason
        pair = self._images()
        try:
            group.size, group.dirty_bytes, group.facts = pair.size, pair.dirty_bytes, pair.facts
            group.facts["flush"] = self._plan.flush
            group.facts["cache"] = self._plan.cache
            group.facts["chunk"] = pair.chunk
            with self._server() as server:
                self._rounds(Stage(self._shop, pair, self._plan.flush, server))
            if self._plan.cache == "warm":
                pair.note_state()
        finally:
            pair.remove()
        return group

    def _images(self) -> Pair:
        """Warm ones are built again when other work pushed them out of memory: read back they have other folios."""
        pair = self._plan.images(self._shop, self._plan)
        if self._plan.cache == "cold":
            return pair
        for _ in range(_REBUILDS):
            if pair.resident():
                break
            pair = self._plan.images(self._shop, self._plan)
        pair.warm()
        return pair

    def _server(self) -> contextlib.AbstractContextManager[Server | None]:
        needed = [x for x in self._subjects if x.server and self.group.series[x.name].state == "ok"]
        if not needed:
            return contextlib.nullcontext()
        try:
            return Server(self._shop.mirrorpair(), self._shop.images, self._env)
        except Failed as error:
            for subject in needed:
                series = self.group.series[subject.name]
                series.state, series.reason = "failed", str(error)
            return contextlib.nullcontext()

    def _rounds(self, stage: Stage) -> None:
        timed = [x for x in self._subjects if not x.watch]
        rounds = min(self._shop.settings.rounds, self._plan.rounds or self._shop.settings.rounds)
        for number in range(rounds):
            shift = number % max(1, len(timed))
            for subject in timed[shift:] + timed[:shift]:
                series = self.group.series[subject.name]
                if series.state != "ok" or self._enough(series):
                    continue
                self._once(stage, subject, series)
        for subject in self._subjects:
            series = self.group.series[subject.name]
            if subject.watch and series.state == "ok":
                self._once(stage, subject, series)

    def _enough(self, series: Series) -> bool:
        """Only a slow peer is repeated less often than the others."""
        if series.kind != "peer" or not series.samples:
            return False
        return len(series.samples) >= self._shop.settings.rounds_for(series.samples[0].seconds)

    def _once(self, stage: Stage, subject: Subject, series: Series) -> None:
        try:
            series.samples.append(self._sample(stage, subject, series))
        except Failed as error:
            series.state, series.reason = "failed", str(error)
            stage.pair.rebuild_target()
            if self._plan.cache == "warm":
                stage.pair.warm()

    def _sample(self, stage: Stage, subject: Subject, series: Series) -> Sample:
        pair = stage.pair
        pair.scratch.unlink(missing_ok=True)
        pair.reset()
        if self._plan.cache == "cold":
            pair.chill()
        idle = idle_share()
        limit = self._shop.settings.limit_s if subject.kind == "peer" else self._patience
        facts: dict[str, Any] = {}
        if subject.watch == "wire":
            result = self._relayed(stage, subject, facts)
        elif subject.watch == "memory":
            result = self._watched(stage, subject, facts)
        else:
            result = run(subject.argv(stage), env=self._env, limit_s=limit, cwd=self._shop.folder)
        if result.cut:
            if subject.kind != "peer":
                raise Failed(f"{subject.name} did not end within {limit:.0f} s")
            series.state, series.reason = "cut", f"cut off after {limit:.0f} s"
        else:
            self._check(stage, subject, result)
        answer = subject.answer(result.stdout)
        facts |= {key: value for key, value in answer.items() if not isinstance(value, list | dict)}
        return Sample(
            seconds=result.seconds,
            engine_s=answer.get("seconds"),
            cpu_s=result.user_s + result.system_s,
            idle_before=idle,
            facts=facts,
        )

    def _relayed(self, stage: Stage, subject: Subject, facts: dict[str, Any]) -> Run:
        if stage.server is None:
            raise Failed("no server")
        with Relay(stage.server.host, stage.server.port) as relay:
            stage.relay = relay
            try:
                result = run(subject.argv(stage), env=self._env, limit_s=self._patience, cwd=self._shop.folder)
            finally:
                stage.relay = None
        facts |= {"relay_sent": relay.sent, "relay_received": relay.received}
        return result

    def _watched(self, stage: Stage, subject: Subject, facts: dict[str, Any]) -> Run:
        with MemoryWatch() as watch:
            if subject.server and stage.server is not None:
                watch.add(stage.server.pid)
            result = run(
                subject.argv(stage), env=self._env, limit_s=self._patience, cwd=self._shop.folder, started=watch.add
            )
        facts |= {"memory_near": watch.peaks["near"], "memory_far": watch.peaks["far"], "samples": watch.samples}
        return result

    def _check(self, stage: Stage, subject: Subject, result: Run) -> None:
        pair = stage.pair
        expected = 0 if subject.writes or not pair.dirty_bytes else subject.differs_status
        if result.status != expected:
            raise Failed(f"{subject.name} ended with {result.status} instead of {expected}: {result.tail()}")
        if subject.writes:
            left = pair.different_bytes(pair.scratch if subject.scratch else None)
            if left:
                raise Failed(f"{subject.name} said it was done, but {show_size(left)} differ from the source")
        if subject.scratch:
            self._same_size(pair)
            pair.scratch.unlink(missing_ok=True)
        if subject.kind == "mirrorpair" and not subject.watch:
            self._same_count(pair, subject, result)

    @staticmethod
    def _same_size(pair: Pair) -> None:
        if os.stat(pair.scratch).st_size != pair.size:
            raise Failed(f"{pair.scratch.name} has another size than the source")

    @staticmethod
    def _same_count(pair: Pair, subject: Subject, result: Run) -> None:
        """It must have found exactly what was made to differ."""
        answer = subject.answer(result.stdout)
        found = answer.get("differing_bytes")
        expected = None if subject.scratch else pair.dirty_bytes
        if found is not None and expected is not None and found != expected:
            raise Failed(f"{subject.name} reports {found} differing bytes, {expected} were made: {json.dumps(answer)}")


Stage = s.Stage
