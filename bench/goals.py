"""What we want, as figures; one row a goal. Judged from what was measured, printed as met or missed, never enforced.

Rules:
- A goal against a floor is judged by the engine's own time, since the start of a process is a goal of its own; one
  against a tool by the whole command of both.
- A goal whose subject or rival was not measured is "not measured", with the reason; it is never met by default.
- When a rival was cut off at its limit, the ratio is at least what is shown.
- Judged by medians. Beside them stands what the best run of each subject would give: on a machine that others use, the
  two differ, and neither can be trusted alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from bench import machine
from bench import subjects as s
from bench.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bench.campaign import Group, Series
    from bench.subjects import Subject


class NotMeasuredError(Exception):
    """With the reason."""


@dataclass(frozen=True)
class Goal:
    text: str
    group: str
    sense: Literal["<=", ">="]
    bound: float
    unit: str
    find: Callable[[Mapping[str, Group]], float]


@dataclass(frozen=True)
class Verdict:
    text: str
    group: str
    wanted: str
    got: str
    verdict: str
    value: float | None
    best: str = ""
    """The same from the fastest run of each subject; nothing when it is the same."""


def judge(groups: Mapping[str, Group], goals: Iterable[Goal]) -> list[Verdict]:
    found = []
    fastest = {name: _fastest(group) for name, group in groups.items()}
    for goal in goals:
        if goal.group not in groups:
            continue
        wanted = f"{goal.sense} {goal.bound:g}{goal.unit}"
        try:
            value = goal.find(groups)
        except NotMeasuredError as reason:
            found.append(Verdict(goal.text, goal.group, wanted, "-", f"not measured: {reason}", None))
            continue
        met = value <= goal.bound if goal.sense == "<=" else value >= goal.bound
        shown, best = (f"{x:.4g}{goal.unit}" for x in (value, goal.find(fastest)))
        verdict = "met" if met else "missed"
        found.append(Verdict(goal.text, goal.group, wanted, shown, verdict, value, best if best != shown else ""))
    return found


def _fastest(group: Group) -> Group:
    series = {
        name: replace(x, samples=[min(x.samples, key=lambda sample: sample.seconds)] if x.samples else [])
        for name, x in group.series.items()
    }
    return replace(group, series=series)


def _series(groups: Mapping[str, Group], group: str, name: Subject | str) -> Series:
    series = groups[group].of(name) if group in groups else None
    if series is None:
        raise NotMeasuredError(f"{name if isinstance(name, str) else name.name} was not asked for")
    if not series.samples:
        raise NotMeasuredError(series.reason or f"{series.name} has no result")
    return series


def _whole(groups: Mapping[str, Group], group: str, name: Subject | str) -> float:
    seconds = _series(groups, group, name).seconds
    assert seconds is not None
    return seconds


def _engine(groups: Mapping[str, Group], group: str, name: Subject | str) -> float:
    seconds = _series(groups, group, name).engine_s
    if seconds is None:
        raise NotMeasuredError("it does not say its engine's time")
    return seconds


def _best(groups: Mapping[str, Group], group: str, floors: tuple[Subject, ...]) -> float:
    found, reasons = [], []
    for floor in floors:
        try:
            found.append(_engine(groups, group, floor))
        except NotMeasuredError as reason:
            reasons.append(str(reason))
    if not found:
        raise NotMeasuredError("; ".join(reasons))
    return min(found)


def _over_floor(group: str, subject: Subject, *floors: Subject) -> Callable[[Mapping[str, Group]], float]:
    return lambda groups: _engine(groups, group, subject) / _best(groups, group, floors)


def _share_of_floor(group: str, subject: Subject, *floors: Subject) -> Callable[[Mapping[str, Group]], float]:
    return lambda groups: _best(groups, group, floors) / _engine(groups, group, subject)


def _faster(group: str, subject: Subject, rival: Subject) -> Callable[[Mapping[str, Group]], float]:
    return lambda groups: _whole(groups, group, rival) / _whole(groups, group, subject)


def _fact(groups: Mapping[str, Group], group: str, subject: Subject, *names: str) -> float:
    facts = _series(groups, group, subject).facts
    missing = [name for name in names if name not in facts]
    if missing:
        raise NotMeasuredError(f"{missing[0]} is not told")
    return sum(float(facts[name]) for name in names)


def _wire(groups: Mapping[str, Group], group: str) -> float:
    return _fact(groups, group, s.WIRE, "relay_sent", "relay_received")


def _wire_of_size(groups: Mapping[str, Group]) -> float:
    return _wire(groups, "warm-equal") / groups["warm-equal"].size * 100


def _wire_of_dirt(groups: Mapping[str, Group]) -> float:
    return _wire(groups, "warm-1pct-4KiB") / groups["warm-1pct-4KiB"].dirty_bytes


def _memory(group: str, subject: Subject, end: str) -> Callable[[Mapping[str, Group]], float]:
    return lambda groups: _fact(groups, group, subject, f"memory_{end}") / MIB


def python_share(series: Series) -> float:
    """Python's part of the CPU time of one call of the API, in percent."""
    facts = series.facts
    own, engine = float(facts["python_cpu_s"]), float(facts["engine_cpu_s"])
    return own / max(own + engine, 1e-9) * 100


def _python(group: str) -> Callable[[Mapping[str, Group]], float]:
    def find(groups: Mapping[str, Group]) -> float:
        _fact(groups, group, s.API, "python_cpu_s", "engine_cpu_s")
        return python_share(_series(groups, group, s.API))

    return find


def _all_goals() -> list[Goal]:
    goals = [
        Goal(
            "local verify over the mmap + memcmp floor",
            "warm-equal",
            "<=",
            1.10,
            " x",
            _over_floor("warm-equal", s.VERIFY, s.COMPARE),
        ),
        Goal(
            "local resync over the mmap + memcmp floor",
            "warm-equal",
            "<=",
            1.10,
            " x",
            _over_floor("warm-equal", s.LOCAL, s.COMPARE),
        ),
        Goal(
            "local verify faster than blocksync-fast --mmap",
            "warm-equal",
            ">=",
            1.4,
            " x",
            _faster("warm-equal", s.VERIFY, s.BLOCKSYNC_MMAP),
        ),
        Goal(
            "local verify faster than qemu-img compare",
            "warm-equal",
            ">=",
            2,
            " x",
            _faster("warm-equal", s.VERIFY, s.QEMU_COMPARE),
        ),
    ]
    for dirt in ("1pct-64KiB", "1pct-4KiB"):
        group = f"warm-{dirt}"
        for subject in (s.PIPE, s.TCP):
            way = subject.name.removeprefix("mirrorpair ")
            goals += [
                Goal(
                    f"{way} over one digest pass + dirty writes",
                    group,
                    "<=",
                    1.25,
                    " x",
                    _over_floor(group, subject, s.DIGEST_MAP, s.DIGEST_PWRITE),
                ),
                Goal(f"{way} faster than bdsync", group, ">=", 20, " x", _faster(group, subject, s.BDSYNC)),
                Goal(f"{way} faster than nbdcopy", group, ">=", 8, " x", _faster(group, subject, s.NBDCOPY)),
                Goal(
                    f"{way} faster than rsync",
                    group,
                    ">=",
                    40 if dirt == "1pct-4KiB" else 10,
                    " x",
                    _faster(group, subject, s.RSYNC),
                ),
            ]
    group = "warm-all"
    goals += [
        # dd says no time of its own: both by the whole command.
        Goal("local over dd", group, "<=", 1.3, " x", lambda groups: 1 / _faster("warm-all", s.LOCAL, s.DD)(groups)),
        Goal(
            "TCP as share of pread+send -> receive+pwrite",
            group,
            ">=",
            0.85,
            "",
            _share_of_floor(group, s.TCP, s.STREAM),
        ),
        Goal("TCP faster than nbdcopy", group, ">=", 1.8, " x", _faster(group, s.TCP, s.NBDCOPY)),
        Goal("wire bytes of equal images", "warm-equal", "<=", 0.03, " % of the size", _wire_of_size),
        Goal("wire bytes over the dirty bytes", "warm-1pct-4KiB", "<=", 1.06, " x", _wire_of_dirt),
        Goal(
            "cold verify as share of O_DIRECT's rate",
            "cold-equal",
            ">=",
            0.90,
            "",
            _share_of_floor("cold-equal", s.VERIFY, s.DIRECT),
        ),
        Goal(
            "cold resync as share of O_DIRECT's rate",
            "cold-equal",
            ">=",
            0.90,
            "",
            _share_of_floor("cold-equal", s.LOCAL, s.DIRECT),
        ),
        Goal("cold resync faster than rsync", "cold-equal", ">=", 1.6, " x", _faster("cold-equal", s.LOCAL, s.RSYNC)),
        Goal(
            "verify of 1 % allocated faster than reading all of it",
            "sparse-1pct",
            ">=",
            50,
            " x",
            lambda groups: _engine(groups, "sparse-1pct", s.COMPARE) / _engine(groups, "sparse-1pct", s.VERIFY),
        ),
    ]
    for subject in (s.VERIFY, s.LOCAL, s.TCP):

        def huge(groups: Mapping[str, Group], subject: Subject = subject) -> float:
            return _whole(groups, "sparse-15TiB", subject)

        goals.append(Goal(f"{subject.name} of 15 TiB", "sparse-15TiB", "<=", 2, " s", huge))
    for group in ("warm-1pct-4KiB", "warm-all", "sparse-15TiB"):
        for subject in (s.MEMORY_LOCAL, s.MEMORY_PIPE, s.MEMORY_TCP):
            way = subject.name.removeprefix("mirrorpair ").removesuffix(", watched")
            if group == "sparse-15TiB" and subject is s.MEMORY_PIPE:
                continue
            ends = ("near",) if subject is s.MEMORY_LOCAL else ("near", "far")
            for end in ends:
                text = f"memory beyond page cache, {way}, {end} end"
                goals.append(Goal(text, group, "<=", 64, " MiB", _memory(group, subject, end)))
    for group in ("warm-equal", "warm-1pct-4KiB"):
        goals.append(Goal("Python's share of CPU time", group, "<=", 5, " %", _python(group)))
    for name in (machine.HELP, machine.VERSION):

        def started(groups: Mapping[str, Group], name: str = name) -> float:
            return _whole(groups, machine.START_UP, name) * 1000

        goals.append(Goal(name, machine.START_UP, "<=", 150, " ms", started))
    return goals


GOALS = _all_goals()

REFERENCES: dict[str, tuple[Subject, ...]] = {
    s.VERIFY.name: (s.COMPARE, s.COMPARE_MAP, s.COMPARE_PWRITE, s.DIRECT),
    s.LOCAL.name: (s.COMPARE, s.COMPARE_MAP, s.COMPARE_PWRITE, s.DIRECT),
    s.PIPE.name: (s.STREAM, s.DIGEST_MAP, s.DIGEST_PWRITE, s.COMPARE),
    s.TCP.name: (s.STREAM, s.DIGEST_MAP, s.DIGEST_PWRITE, s.COMPARE, s.DIRECT),
    s.TCP_PULL.name: (s.STREAM, s.DIGEST_MAP, s.DIGEST_PWRITE),
}
"""Which floors a subject is shown against: the fastest of those of its kind that its group has."""


def floor_of(group: Group, name: str) -> Series | None:
    """The fastest floor of the first kind that was measured here, in the order of `REFERENCES`."""
    candidates = [group.of(x) for x in REFERENCES.get(name, ())]
    measured = [x for x in candidates if x is not None and x.seconds is not None]
    if not measured:
        return None
    kind = _kind(measured[0].name)
    return min((x for x in measured if _kind(x.name) == kind), key=lambda x: x.engine_s or x.seconds or 0.0)


def _kind(name: str) -> str:
    return name.split(",")[0]
