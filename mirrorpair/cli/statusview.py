"""`mirrorpair status` as people see it.

Rules:
- Columns are aligned by what is seen; colour is added afterwards and never carries meaning of its own: without it the
  bar still has an end and the health still a word.
- What the daemon says is shown through `printable`.
- Pure: from a Status to lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mirrorpair.status import DISKS, resync_totals, worst
from mirrorpair.text import printable
from mirrorpair.units import format_clock, format_percent, format_progress, format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mirrorpair.chronicle import Entry
    from mirrorpair.status import Event, Health, Resync, Status, Volume

BAR_WIDTH = 14
COLOURS: dict[Health, str] = {"healthy": "green", "degraded": "yellow", "critical": "red", "unknown": "yellow"}
REFUSALS = {"refused": "refused", "split-brain": "split brain", "unrelated": "unrelated"}


def render(status: Status, *, color: bool = False, ascii_only: bool = False) -> list[str]:
    """The lines, without line ends."""

    def paint(text: str, colour: str) -> str:
        return click.style(text, fg=colour) if color else text

    health = paint(status.health.upper(), COLOURS[status.health])
    lines = [f"{printable(status.pair)}  {health} - {printable(status.summary)}      epoch {status.epoch}"]
    lines += _nodes(status)
    if len(status.paths) > 1:
        lines += _paths(status)
    if len(status.volumes) > 1:
        lines += _volumes(status)
    lines += _resyncs(status, paint, ascii_only=ascii_only)
    if status.insecure:
        lines.append(f"{paint('insecure:', 'red')} what the nodes say to each other is neither encrypted nor signed")
    lines.append(f"reason: {printable(status.reason)}")
    lines.append(f"action: {printable(status.action)}")
    return lines


def check_line(status: Status) -> str:
    """One line, as monitoring systems want it."""
    return (
        f"{status.health.upper()} - {printable(status.pair)}, {printable(status.node)}: "
        f"{printable(status.summary)}; {printable(status.reason)}"
    )


def event_lines(events: Sequence[Event]) -> list[str]:
    """One line an event: number, time (UTC), kind, what changed, why."""
    from datetime import UTC, datetime

    rows = []
    for event in events:
        change = " -> ".join(printable(value) for value in (event.old, event.new) if value)
        rows.append(
            [
                str(event.seq),
                datetime.fromtimestamp(event.time_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
                event.kind,
                printable(event.volume or "-"),
                change or "-",
                printable(event.reason),
            ]
        )
    return _aligned(rows, right={0})


def history_lines(entries: Sequence[Entry]) -> list[str]:
    """One line a change: number, time (UTC), epoch, role or the volume's disk, what changed to what, why."""
    from datetime import UTC, datetime

    rows = [
        [
            str(entry.seq),
            datetime.fromtimestamp(entry.time_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
            f"epoch {entry.epoch}",
            "role" if entry.volume is None else f"disk {printable(entry.volume)}",
            " -> ".join(printable(value) for value in (entry.old, entry.new) if value),
            printable(entry.reason),
        ]
        for entry in entries
    ]
    return _aligned(rows, right={0})


def _nodes(status: Status) -> list[str]:
    peer = status.peer
    link = peer.link if status.refusal is None or peer.connected else REFUSALS[status.refusal.kind]
    behind = sum(max(0, volume.out_of_sync_bytes) for volume in status.volumes)
    mine, theirs = ("-", _size(behind)) if _peer_is_behind(status) else (_size(behind), "-")
    targets = {volume.resync.direction for volume in status.volumes if volume.resync is not None}
    rows = [
        ["node", "role", "disk", "link", "out-of-sync", "heartbeat", "address"],
        [
            f"* {printable(status.node)}",
            status.role,
            "resyncing" if "target" in targets else worst(volume.disk for volume in status.volumes),
            link,
            mine,
            _age(status.heartbeat_age_s),
            printable(status.address),
        ],
        [
            f"  {printable(peer.node)}",
            peer.role,
            "resyncing" if "source" in targets else worst(volume.peer_disk for volume in status.volumes),
            link,
            theirs,
            _age(peer.heartbeat_age_s),
            printable(peer.address),
        ],
    ]
    return _aligned(rows, right={4, 5})


def _paths(status: Status) -> list[str]:
    rows = [["path", "of", "for", "state", "round trip", "heartbeat"]]
    rows += [
        [
            printable(path.address),
            printable(path.node),
            "control, data" if path.kind == "control" else "heartbeats",
            "alive" if path.alive else "lost",
            _trip(path.rtt_s),
            _age(path.heartbeat_age_s),
        ]
        for path in status.paths
    ]
    return _aligned(rows, right={4, 5})


def _peer_is_behind(status: Status) -> bool:
    """Whose row the bytes out of sync stand in: the target's, else the worse disk's, else that of who does not
    serve."""
    for volume in status.volumes:
        if volume.resync is not None:
            return volume.resync.direction == "source"
    mine, theirs = worst(volume.disk for volume in status.volumes), worst(volume.peer_disk for volume in status.volumes)
    if mine != theirs and "unknown" not in (mine, theirs):
        return DISKS.index(theirs) < DISKS.index(mine)
    return status.role == "primary" or status.peer.role != "primary"


def _volumes(status: Status) -> list[str]:
    rows = [["volume", "size", f"{status.node}", f"{status.peer.node}", "out-of-sync", "clients"]]
    rows += [
        [
            printable(volume.name),
            format_size(volume.size),
            volume.disk,
            volume.peer_disk,
            _size(volume.out_of_sync_bytes),
            str(volume.clients),
        ]
        for volume in status.volumes
    ]
    return _aligned(rows, right={1, 4, 5})


def _resyncs(status: Status, paint: Callable[[str, str], str], *, ascii_only: bool) -> list[str]:
    running: list[tuple[Volume, Resync]] = [
        (volume, volume.resync) for volume in status.volumes if volume.resync is not None
    ]
    width = max((len(printable(volume.name)) for volume, _ in running), default=0)
    nodes = (printable(status.node), printable(status.peer.node))
    lines = []
    for volume, resync in running:
        source, target = nodes if resync.direction == "source" else nodes[::-1]
        done, total = resync_totals([volume])
        lines.append(
            f"resync {printable(volume.name):<{width}} {source} -> {target} "
            f"{bar(done, total, paint, ascii_only=ascii_only)}  {format_percent(done, total)}  "
            f"{format_progress(done, total)}  {format_rate(resync.rate)}  eta {format_clock(resync.eta_s)}   "
            f"{format_percent(resync.skipped_bytes, done)} skipped (equal)"
            + (f"   stalled: {printable(resync.stalled)}" if resync.stalled else "")
        )
    return lines


def bar(done: int, total: int, paint: Callable[[str, str], str], *, ascii_only: bool = False) -> str:
    """BAR_WIDTH cells: those that are done, then the mark that begins the rest, so that it reads without colour."""
    full, mark = ("=", ">") if ascii_only else ("━", "╺")
    rest = "-" if ascii_only else "━"
    cells = BAR_WIDTH if total <= 0 else max(0, min(BAR_WIDTH, done * BAR_WIDTH // total))
    if cells == BAR_WIDTH:
        return paint(full * BAR_WIDTH, "green")
    return paint(full * cells, "green") + paint(mark + rest * (BAR_WIDTH - cells - 1), "bright_black")


def _aligned(rows: list[list[str]], *, right: set[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _size(size: int) -> str:
    return format_size(size) if size > 0 else "-"


def _trip(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else format_seconds(seconds)
