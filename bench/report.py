"""The results as text for people and as JSON for machines.

Rules: every figure with its unit, its spread and how often it was taken; what was not measured says why; ratios stand
beside the figures they come from.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench import goals, livegoals, liveplans, livereport, machine
from bench import subjects as s
from bench.images import PATTERNS
from bench.settings import GIB, SMALL, show_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.campaign import Group, Series
    from bench.settings import Settings

SCHEMA = "mirrorpair.bench/1"
_GOALS = (*goals.GOALS, *livegoals.GOALS)
_OURS = (s.VERIFY, s.LOCAL, s.PIPE, s.TCP)


def seconds_text(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *others]).rstrip()

    return [line(head), "  ".join("-" * width for width in widths), *map(line, rows)]


def render(groups: Mapping[str, Group], about: Mapping[str, Any]) -> list[str]:
    lines = _header(about)
    for group in groups.values():
        lines += ["", f"== {group.name}: {group.title} =="]
        if group.name == machine.LIMITS:
            lines += [_state_line(group), *_limits_table(group)]
        elif group.name == machine.START_UP:
            lines += _start_up_table(group)
        elif group.name in liveplans.PLANS:
            lines += livereport.render(group, table)
        else:
            lines += [_state_line(group), *_group_table(group)]
    lines += _overview(groups)
    lines += _watched(groups)
    lines += _goal_table(groups, about)
    return lines


def _header(about: Mapping[str, Any]) -> list[str]:
    machine_line = (
        f"{about['processor']}, {about['cores']} cores, {about['memory']}; Linux {about['kernel']}, "
        f"{about['file system']} ({about['free']} free), dirty limits {about['dirty limits']}; "
        f"Python {about['python']}; load {about['load']}"
    )
    how = f"images of {about['size']}, medians of up to {about['rounds']} rounds, taking turns on the same files"
    lines = [machine_line, how]
    lines += [f"  {name}: {version}" for name, version in about["tools"].items()]
    return lines


def _state_line(group: Group) -> str:
    facts = group.facts
    parts = [show_size(group.size)]
    if group.dirty_bytes:
        parts.append(f"{show_size(group.dirty_bytes)} differ")
    if facts.get("cache") == "cold":
        parts.append("cold: evicted before each run (this machine's cache only)")
    if "resident" in facts:
        parts.append("in page cache: source {:.0%}, target {:.0%}".format(*facts["resident"]))
        if facts.get("cache") == "warm" and min(facts["resident"]) < 0.999:
            parts.append("NOT WARM: pages were pushed out during the runs")
    if "folio_kib" in facts:
        parts.append("mean folio: source {:.0f} KiB, target {:.0f} KiB".format(*facts["folio_kib"]))
    if "chunk" in facts:
        parts.append(f"built by writes of {show_size(facts['chunk'])}")
    if "read back" in facts:
        parts.append(f"read back {facts['read back']}")
    if facts.get("flush") is not None and facts.get("cache") == "warm":
        parts.append("every subject flushes" if facts["flush"] else "flushes left out for every subject")
    if _busy(group) > 0.1:
        parts.append(f"NOISY: others used {_busy(group):.0%} of the cores between the runs")
    if facts.get("hash"):
        parts.append(f"source hash {facts['hash']}, every result equal to it")
    return "; ".join(parts)


def _busy(group: Group) -> float:
    """Mean share of the cores that others used just before the runs."""
    idle = [x.idle_before for series in group.series.values() for x in series.samples]
    return 1 - sum(idle) / len(idle) if idle else 0.0


def _group_table(group: Group) -> list[str]:
    ours = [x for x in _OURS if (found := group.of(x)) is not None and found.samples]
    head = ["", "median", "min..max", "n", "engine", "/ floor", "engine / floor"]
    head += [f"{x.name.removeprefix('mirrorpair ')} is faster" for x in ours]
    rows = []
    for series in group.series.values():
        if series.watch:
            continue
        rows.append([*_figures(group, series), *_how_much_faster(group, series, ours)])
    return table(head, rows)


def _figures(group: Group, series: Series) -> list[str]:
    if not series.samples:
        return [series.name, series.state, *[""] * 5]
    low, high = min(x.seconds for x in series.samples), max(x.seconds for x in series.samples)
    more = "> " if series.state == "cut" else ""
    floor = goals.floor_of(group, series.name)
    whole = engine = ""
    if floor is not None and floor.seconds and series.seconds:
        whole = f"{series.seconds / floor.seconds:.2f} x"
        if series.engine_s and floor.engine_s:
            engine = f"{series.engine_s / floor.engine_s:.2f} x"
    return [
        series.name,
        more + seconds_text(series.seconds),
        f"{seconds_text(low)}..{seconds_text(high)}" if len(series.samples) > 1 else "",
        str(len(series.samples)),
        seconds_text(series.engine_s) if series.engine_s is not None else "",
        whole,
        engine,
    ]


def _how_much_faster(group: Group, series: Series, ours: Sequence[s.Subject]) -> list[str]:
    cells = []
    for subject in ours:
        mine = group.of(subject)
        if mine is None or mine.seconds is None or series.seconds is None or series.name == mine.name:
            cells.append("")
            continue
        more = ">" if series.state == "cut" else ""
        cells.append(f"{more}{series.seconds / mine.seconds:.2f} x")
    return cells


def _limits_table(group: Group) -> list[str]:
    rows = [
        [series.name, f"{series.facts['bytes'] / series.seconds / 1e9:.1f} GB/s"]
        for series in group.series.values()
        if series.seconds
    ]
    return table(["", "rate"], rows)


def _start_up_table(group: Group) -> list[str]:
    rows = []
    for series in group.series.values():
        if not series.samples:
            rows.append([series.name, series.state, "", ""])
            continue
        low, high = min(x.seconds for x in series.samples), max(x.seconds for x in series.samples)
        spread = f"{seconds_text(low)}..{seconds_text(high)}"
        rows.append([series.name, seconds_text(series.seconds), spread, str(len(series.samples))])
    return table(["", "median", "min..max", "n"], rows)


def _overview(groups: Mapping[str, Group]) -> list[str]:
    """Tools down, patterns across, as in the design."""
    shown = [(p, groups[f"warm-{p.name}"]) for p in PATTERNS if f"warm-{p.name}" in groups]
    if not shown:
        return []
    names: dict[str, None] = {}
    for _, group in shown:
        names |= {x.name: None for x in group.series.values() if not x.watch and x.samples}
    rows = []
    for name in sorted(names, key=lambda n: (not n.startswith("floor"), not n.startswith("mirrorpair"))):
        cells = [name]
        for _, group in shown:
            series = group.of(name)
            more = "> " if series is not None and series.state == "cut" else ""
            cells.append("-" if series is None or series.seconds is None else more + seconds_text(series.seconds))
        rows.append(cells)
    title = f"== offline: {show_size(shown[0][1].size)} pair in page cache, whole command =="
    return ["", title, *table(["", *(p.title for p, _ in shown)], rows)]


def _watched(groups: Mapping[str, Group]) -> list[str]:
    wire, memory, python = [], [], []
    for group in groups.values():
        for series in group.series.values():
            facts = series.facts
            if series.watch == "wire" and "relay_sent" in facts:
                total = facts["relay_sent"] + facts["relay_received"]
                told = facts.get("wire_bytes")
                wire.append(
                    [
                        group.name,
                        show_size(facts["relay_sent"]),
                        show_size(facts["relay_received"]),
                        f"{total / group.size * 100:.4f} %",
                        f"{total / group.dirty_bytes:.4f} x" if group.dirty_bytes else "-",
                        "not told" if told is None else f"{told / max(total, 1):.4f} x",
                    ]
                )
            if series.watch == "memory" and "memory_near" in facts:
                far = "" if facts["memory_far"] == 0 else show_size(facts["memory_far"])
                memory.append([group.name, series.name, show_size(facts["memory_near"]), far, str(facts["samples"])])
            if series.watch == "python" and "python_cpu_s" in facts:
                python.append(
                    [
                        group.name,
                        seconds_text(facts["python_cpu_s"]),
                        seconds_text(facts["engine_cpu_s"]),
                        f"{goals.python_share(series):.1f} %",
                        str(facts["progress_calls"]),
                        seconds_text(facts["loading_cpu_s"]),
                    ]
                )
    lines: list[str] = []
    if wire:
        lines += ["", "== bytes on the wire, counted by a relay =="]
        lines += table(["", "source to target", "back", "of the size", "over dirty bytes", "told / counted"], wire)
    if memory:
        lines += ["", "== memory beyond the page cache, peak, all processes of an end together =="]
        lines += table(["", "", "near end", "far end", "samples"], memory)
    if python:
        lines += ["", "== CPU time of one call of the API =="]
        lines += table(
            ["", "Python", "engine", "Python's share", "progress calls", "before: start, load, compare"], python
        )
    return lines


def _goal_table(groups: Mapping[str, Group], about: Mapping[str, Any]) -> list[str]:
    verdicts = goals.judge(groups, _GOALS)
    if not verdicts:
        return []
    lines = ["", "== goals =="]
    rows = [[v.text, v.group, v.wanted, v.got, v.best, v.verdict.partition(":")[0]] for v in verdicts]
    lines += table(["", "group", "wanted", "by medians", "by best runs", "verdict"], rows)
    met, missed = (sum(v.verdict == word for v in verdicts) for word in ("met", "missed"))
    lines.append(f"{met} met, {missed} missed, {len(verdicts) - met - missed} not measured")
    noisy = [name for name, group in groups.items() if _busy(group) > 0.1]
    if noisy:
        lines.append(f"Others kept the machine busy during {', '.join(noisy)}: repeat them on a quiet one.")
    if about["size_bytes"] < SMALL:
        lines.append(
            f"The goals are stated for images of {show_size(4 * GIB)}. At {about['size']} the start of a process is "
            "much of what is seen: take the ratios as a smoke test."
        )
    return [*lines, *_reasons(groups)]


def _reasons(groups: Mapping[str, Group]) -> list[str]:
    """Why something was not measured: a line a reason, with all that it befell."""
    found: dict[str, dict[str, None]] = {}
    for group in groups.values():
        for series in group.series.values():
            if series.state == "failed":
                found.setdefault(f"failed in {group.name}: {series.reason}", {})[series.name] = None
            elif series.state != "ok":
                found.setdefault(f"{series.state}: {series.reason}", {})[series.name] = None
    return [f"  {reason} ({', '.join(names)})" for reason, names in found.items()]


def document(groups: Mapping[str, Group], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "about": dict(about),
        "groups": [
            {
                "name": group.name,
                "title": group.title,
                "size": group.size,
                "dirty_bytes": group.dirty_bytes,
                "facts": group.facts,
                "series": [
                    asdict(series) | {"seconds": series.seconds, "engine_s": series.engine_s}
                    for series in group.series.values()
                ],
            }
            for group in groups.values()
        ],
        "goals": [asdict(verdict) for verdict in goals.judge(groups, _GOALS)],
    }


def save(groups: Mapping[str, Group], about: Mapping[str, Any], settings: Settings) -> Path | None:
    """One file a run, and `latest.json`."""
    if settings.results is None:
        return None
    settings.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document(groups, about), indent=1)
    path = settings.results / f"{time.strftime('%Y%m%d-%H%M%S')}-{about['size'].replace(' ', '')}.json"
    path.write_text(text, encoding="utf-8")
    (settings.results / "latest.json").write_text(text, encoding="utf-8")
    return path
