"""`mirrorpair resync [VOLUME]`: the live mirror's resync, asked of the daemon.

Rules:
- Direction, reason and amount are shown before anything is overwritten, and on a terminal a person says yes to them.
- What would be refused is not asked for: split brain and unrelated data end with 20, other refusals with 12.
- The resync is the daemon's: whoever ends this command ends the looking on, and is told so.
- Progress is of all volumes asked for together. A volume that is done stays counted, so that the bar does not jump.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click
import msgspec

from mirrorpair.cli.common import Settings, note, write_line
from mirrorpair.cli.live import connect, show_result
from mirrorpair.cli.progress import JSON_S, Reporter, reporter
from mirrorpair.errors import Interrupted, RefusedError, SplitBrainError
from mirrorpair.report import Progress, clamp
from mirrorpair.status import CHOOSE
from mirrorpair.text import printable
from mirrorpair.units import format_percent, format_seconds, format_size

if TYPE_CHECKING:
    from mirrorpair.control import AdminClient, ResyncPlan, Working
    from mirrorpair.status import Resync

OVERWRITES = ("bitmap", "full")
_REFUSED = {"refuse": "refused", "split-brain": "split brain", "unrelated": "unrelated data"}


class PlanLine(msgspec.Struct, frozen=True, kw_only=True, tag="plan", tag_field="type"):
    """What will, or with --dry-run would, be done to one volume: the daemon's ResyncPlan."""

    schema: str = "mirrorpair.plan/1"
    op: str = "resync"
    volume: str
    amount: str
    source: str | None
    target: str | None
    bytes: int
    rule: str
    reason: str


class OnlineLine(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="type"):
    """A resync under way, all volumes together; `stalled` why nothing moves, or null."""

    schema: str = "mirrorpair.progress/1"
    op: str = "resync"
    done_bytes: int
    total_bytes: int
    skipped_bytes: int
    sent_bytes: int
    rate: float
    eta_s: float | None
    stalled: str | None
    finished: bool = False


def resync_volume(settings: Settings, volume: str | None, *, full: bool, wait: bool, dry_run: bool, yes: bool) -> int:
    """The command; its exit code."""
    if volume is not None and ("/" in volume or not volume):
        raise click.UsageError(f"{volume!r} is no volume; a resync of images takes two: SOURCE TARGET")
    asks = sys.stdin.isatty() and sys.stderr.isatty() and not settings.json
    if not (dry_run or yes or asks):
        raise click.UsageError("without a terminal to ask at, a resync needs -y (or --dry-run to see what it would do)")
    with connect(settings) as daemon:
        plans = daemon.plan_resync(volume, full=full)
        _show(settings, plans, always=dry_run)
        _refuse(plans)
        if dry_run:
            return _end_of_dry_run(settings, daemon, plans)
        if asks and not yes and not _confirmed(plans):
            note(settings, "nothing was done")
            return 1
        if not wait:
            done = daemon.resync(volume, full=full)
            show_result(settings, "resync", done.message, done.status)
            return 0
        _watch(settings, daemon, volume, full=full)
    return 0


def plan_sentence(plan: ResyncPlan) -> str:
    """ "data: beta -> alpha, what is marked as differing (1.21 GiB): alpha was away (H1)" """
    volume, reason = printable(plan.volume), f"{printable(plan.reason)} ({printable(plan.rule)})"
    if plan.amount == "none":
        return f"{volume}: nothing to do: {reason}"
    if plan.amount not in OVERWRITES:
        return f"{volume}: {_REFUSED[plan.amount]}: {reason}"
    amount = (
        "what is marked as differing" if plan.amount == "bitmap" else "everything is compared, what differs is sent"
    )
    return (
        f"{volume}: {printable(plan.source or '?')} -> {printable(plan.target or '?')}, {amount} "
        f"({format_size(max(0, plan.bytes))}): {reason}"
    )


def _show(settings: Settings, plans: list[ResyncPlan], *, always: bool) -> None:
    for plan in plans:
        if settings.json:
            line = PlanLine(**{name: getattr(plan, name) for name in plan.__struct_fields__})
            write_line(msgspec.json.encode(line).decode())
        elif always and not settings.quiet:
            write_line(plan_sentence(plan))
        else:
            note(settings, plan_sentence(plan))
    sys.stdout.flush()


def _refuse(plans: list[ResyncPlan]) -> None:
    for plan in plans:
        if plan.amount in ("split-brain", "unrelated"):
            raise SplitBrainError(f"volume {plan.volume}: {plan.reason}; {CHOOSE}")
    for plan in plans:
        if plan.amount == "refuse":
            raise RefusedError(f"volume {plan.volume}: {plan.reason}")


def _end_of_dry_run(settings: Settings, daemon: AdminClient, plans: list[ResyncPlan]) -> int:
    if settings.json:
        todo = sum(1 for plan in plans if plan.amount in OVERWRITES)
        message = f"dry run: {todo} of {len(plans)} volumes would be resynced"
        show_result(settings, "resync", message, daemon.status(), dry_run=True)
    return 0


def _confirmed(plans: list[ResyncPlan]) -> bool:
    targets = sorted({plan.target for plan in plans if plan.amount in OVERWRITES and plan.target is not None})
    if not targets:
        return True
    return click.confirm(f"Overwrite what differs on {printable(', '.join(targets))}?", err=True)


def _watch(settings: Settings, daemon: AdminClient, volume: str | None, *, full: bool) -> None:
    started = time.monotonic()
    totals = Totals()
    try:
        with reporter(settings, "resync", listing=False) as report:
            shown = Shown(settings, report, totals)
            done = daemon.resync(volume, full=full, wait=True, on_progress=shown)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; a resync that has begun goes on, `mirrorpair status` shows it") from None
    show_result(settings, "resync", done.message + totals.summary(time.monotonic() - started), done.status)


class Totals:
    """All volumes' resyncs as one."""

    def __init__(self) -> None:
        self._seen: dict[str, Resync] = {}
        self.stalled: str | None = None

    def update(self, working: Working) -> Progress | None:
        """None while no resync has been seen."""
        now = {volume.name: volume.resync for volume in working.volumes if volume.resync is not None}
        for name, last in self._seen.items():
            if name not in now:
                self._seen[name] = msgspec.structs.replace(last, done_bytes=last.total_bytes, rate=0.0)
        self._seen.update(now)
        if not self._seen:
            return None
        self.stalled = next((f"{name}: {resync.stalled}" for name, resync in now.items() if resync.stalled), None)
        total = sum(max(0, resync.total_bytes) for resync in self._seen.values())
        done = clamp(sum(resync.done_bytes for resync in self._seen.values()), total)
        rate = max(0.0, sum(resync.rate for resync in now.values()))
        return Progress(
            total_bytes=total,
            done_bytes=done,
            skipped_bytes=clamp(sum(resync.skipped_bytes for resync in self._seen.values()), done),
            sent_bytes=max(0, sum(resync.sent_bytes for resync in self._seen.values())),
            differing_bytes=0,
            written_bytes=0,
            recheck_total_bytes=0,
            recheck_done_bytes=0,
            rate=rate,
            eta_s=0.0 if done == total else (total - done) / rate if rate > 0 else None,
            seconds=working.seconds,
        )

    def summary(self, seconds: float) -> str:
        """ ": 1.21 GiB in 6.1 s, 61.4 % skipped (equal)", as far as it was seen; nothing when nothing was."""
        total = sum(max(0, resync.total_bytes) for resync in self._seen.values())
        if total == 0:
            return ""
        skipped = clamp(sum(resync.skipped_bytes for resync in self._seen.values()), total)
        return f": {format_size(total)} in {format_seconds(seconds)}, {format_percent(skipped, total)} skipped (equal)"


class Shown:
    """What the daemon tells while it works, on to the terminal or the script."""

    def __init__(self, settings: Settings, report: Reporter, totals: Totals) -> None:
        self._settings = settings
        self._report = report
        self._totals = totals
        self._reason = ""
        self._last = time.monotonic()

    def __call__(self, working: Working) -> None:
        progress = self._totals.update(working)
        if self._settings.json:
            self._write(progress)
        elif progress is not None:
            self._report.progress(progress)
        elif working.reason != self._reason:
            self._reason = working.reason
            note(self._settings, f"waiting: {printable(working.reason)}")

    def _write(self, progress: Progress | None) -> None:
        now = time.monotonic()
        if progress is None or self._settings.quiet or now - self._last < JSON_S:
            return
        self._last = now
        line = OnlineLine(
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            skipped_bytes=progress.skipped_bytes,
            sent_bytes=progress.sent_bytes,
            rate=progress.rate,
            eta_s=progress.eta_s,
            stalled=self._totals.stalled,
        )
        write_line(msgspec.json.encode(line).decode())
        sys.stdout.flush()
