"""The live groups as text: servers beside each other for each workload, resyncs beside their floors, what idles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import live, livecost, livefailover, livestall
from bench.fio import WORKLOADS
from bench.servers import BARE, NBDKIT, QEMU_NBD, QUORUM, SYNC
from bench.settings import show_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.campaign import Group, Series

    Table = Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]

_SERVERS = (SYNC, BARE, NBDKIT, QEMU_NBD, QUORUM)


def render(group: Group, table: Table) -> list[str]:
    return [_state(group), *_body(group, table)]


def _body(group: Group, table: Table) -> list[str]:
    if group.name in (live.LIVE_BARE, live.LIVE_SYNC):
        return _serving(group, table)
    if group.name == livecost.COST:
        return _cost(group, table)
    if group.name == livefailover.FAILOVER:
        return table(*livefailover.rows(group))
    if group.name == livestall.STALL:
        return table(*livestall.rows(group))
    return _resync(group, table)


def _state(group: Group) -> str:
    facts = group.facts
    parts = [f"volumes of {show_size(group.size)}", f"{facts['rounds']} rounds"]
    if "seconds" in facts:
        parts.append(f"{facts['seconds']:g} s a run")
    if "window_s" in facts:
        parts.append(f"watched for {facts['window_s']:g} s")
    if "chunk" in facts:
        parts.append(f"images built by writes of {show_size(facts['chunk'])}, in page cache")
    if "folio_kib" in facts:
        parts.append("mean folio afterwards: alpha {:.0f} KiB, beta {:.0f} KiB".format(*facts["folio_kib"]))
    if "heartbeat" in facts:
        parts.append(str(facts["heartbeat"]))
    idle = [x.idle_before for series in group.series.values() for x in series.samples]
    if idle and 1 - sum(idle) / len(idle) > 0.1:
        parts.append(f"NOISY: others used {1 - sum(idle) / len(idle):.0%} of the cores between the runs")
    return "; ".join(parts)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 3 if value < 1 else 2
    return f"{value:,.{digits}f}{unit}"


def _median(series: Series | None, fact: str, scale: float = 1.0) -> str:
    value = None if series is None else live.told(series, fact)
    return _number(None if value is None else value * scale)


def _range(series: Series, fact: str) -> str:
    found = [float(x.facts[fact]) for x in series.samples]
    return f"{_number(min(found))}..{_number(max(found))}" if len(found) > 1 else ""


def _serving(group: Group, table: Table) -> list[str]:
    head = ["", "IOPS", "MB/s", "p50 us", "min..max", "p99 us", "n", "IOPS / nbdkit", "IOPS / own bare"]
    lines: list[str] = []
    for workload in WORKLOADS:
        rows = []
        for server in _SERVERS:
            series = group.of(live.subject(server, workload))
            if series is None:
                continue
            if not series.samples:
                rows.append([server, series.state, *[""] * 7])
                continue
            rows.append(
                [
                    server,
                    _median(series, "iops"),
                    _median(series, "bytes_per_s", 1e-6),
                    _median(series, "p50_us"),
                    _range(series, "p50_us"),
                    _median(series, "p99_us"),
                    str(len(series.samples)),
                    _over(series, group.of(live.subject(NBDKIT, workload)), "iops"),
                    _over(series, group.of(live.subject(BARE, workload)), "iops"),
                ]
            )
        if rows:
            lines += ["", *table([workload.title, *head[1:]], rows)]
    for name in (live.ROUND_TRIP, live.ROUND_TRIP_PINNED):
        series = group.of(name)
        if series is not None and series.samples:
            lines.append(f"{name}: p50 {_median(series, 'p50_us')} us, p99 {_median(series, 'p99_us')} us")
    return lines


def _over(series: Series, other: Series | None, fact: str) -> str:
    one, two = live.told(series, fact), None if other is None else live.told(other, fact)
    if other is None or other.name == series.name or not one or not two:
        return ""
    return f"{one / two:.2f} x"


def _resync(group: Group, table: Table) -> list[str]:
    head = ["", "whole", "engine", "min..max", "n", "MB/s", "p50 us", "p99 us", "bytes"]
    rows = []
    for series in group.series.values():
        if not series.samples:
            rows.append([series.name, series.state, *[""] * 7])
            continue
        judged = [x.engine_s if x.engine_s is not None else x.seconds for x in series.samples]
        client = live.told(series, "p50_us") is not None
        size = live.told(series, "out_of_sync_bytes") or live.told(series, "bytes")
        rows.append(
            [
                series.name,
                "" if client else _milliseconds(series.seconds),
                _milliseconds(series.engine_s),
                f"{_milliseconds(min(judged))}..{_milliseconds(max(judged))}" if len(judged) > 1 else "",
                str(len(judged)),
                _median(series, "bytes_per_s", 1e-6),
                _median(series, "p50_us"),
                _median(series, "p99_us"),
                "" if size is None else show_size(size),
            ]
        )
    return table(head, rows)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else _number(value * 1e3, " ms")


def _cost(group: Group, table: Table) -> list[str]:
    rows = []
    for series in group.series.values():
        memory, rss = live.told(series, "memory_bytes"), live.told(series, "rss_bytes")
        if not series.samples:
            rows.append([series.name, series.state, *[""] * 5])
            continue
        rows.append(
            [
                series.name,
                "" if series.watch else _milliseconds(series.seconds),
                "" if memory is None else show_size(memory),
                "" if rss is None else show_size(rss),
                _median(series, "wakeups_per_s"),
                "" if live.told(series, "cpu_percent") is None else f"{live.told(series, 'cpu_percent'):.2f} %",
                str(len(series.samples)),
            ]
        )
    return table(["", "opened in", "memory of its own", "RSS", "wake-ups /s", "CPU", "n"], rows)
