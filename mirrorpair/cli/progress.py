"""How a long command is shown while it runs and when it ends.

    Bar     stderr is a terminal     a bar, redrawn in place; differences and the result on stdout Plain   it is not
    a line every PLAIN_S on stderr Lines   --json                   JSON lines on stdout: progress about once a
    second, differences as they are found, the result Quiet   -q                       nothing (with --json:
    differences and the result)

Rules:
- Only --json and the result write to stdout. The bar leaves no trace there, whatever way the command ends.
- A JSON line is the image of a struct below, whose fields are only ever added to.
- No thread: it is redrawn when the engine's caller looks at the engine, so nothing else can run during a fork.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from mirrorpair.cli.common import Settings, note, write_line
from mirrorpair.report import CompareResult, Progress, ResyncResult
from mirrorpair.units import format_clock, format_percent, format_progress, format_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as RichProgress

JSON_S = 1.0
PLAIN_S = 5.0
SHOWN_RANGES = 20

Result = CompareResult | ResyncResult


class ProgressLine(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="type"):
    """A run under way. `rate` is bytes compared per second; the recheck is that of `resync --verify`."""

    schema: str = "mirrorpair.progress/1"
    op: str
    done_bytes: int
    total_bytes: int
    skipped_bytes: int
    sent_bytes: int
    rate: float
    eta_s: float | None
    finished: bool = False
    differing_bytes: int
    written_bytes: int
    recheck_total_bytes: int = 0
    recheck_done_bytes: int = 0


class ResyncLine(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="type"):
    """The last line of a resync; `finished` is false when it was interrupted."""

    schema: str = "mirrorpair.progress/1"
    op: str = "resync"
    done_bytes: int
    total_bytes: int
    skipped_bytes: int
    sent_bytes: int
    rate: float
    eta_s: float | None
    finished: bool
    differing_blocks: int
    seconds: float
    differing_bytes: int
    written_bytes: int
    punched_bytes: int
    wire_bytes: int
    dry_run: bool
    verified: bool
    created: bool
    resized: bool
    source: str
    target: str
    target_size: int
    ignored_tail_bytes: int


class VerifyLine(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="type"):
    """The last line of a verify; `finished` is false when it was interrupted."""

    schema: str = "mirrorpair.progress/1"
    op: str = "verify"
    done_bytes: int
    total_bytes: int
    skipped_bytes: int
    sent_bytes: int
    rate: float
    eta_s: float | None
    finished: bool
    differing_blocks: int
    seconds: float
    differing_bytes: int
    wire_bytes: int
    equal: bool
    a: str
    b: str
    a_size: int
    b_size: int
    ignored_tail_bytes: int


class Reporter:
    """What the commands call; on its own it is the quiet one."""

    def progress(self, progress: Progress) -> None:
        pass

    def difference(self, offset: int, length: int) -> None:
        pass

    def interrupted(self, result: object) -> None:
        """What had been done. The error's own sentence says it to people."""

    def finish(self, result: Result, summary: list[str]) -> None:
        pass

    def close(self) -> None:
        pass


class Plain(Reporter):
    """For people. Lists the first differing ranges, all of them with -v."""

    def __init__(self, settings: Settings, op: str, *, listing: bool) -> None:
        self._settings = settings
        self._op = op
        self._listing = listing
        self._shown: list[tuple[int, int]] = []
        self._more = 0
        self._last = time.monotonic()

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_S:
            self._last = now
            note(self._settings, f"{self._op} {sentence(progress)}")

    def difference(self, offset: int, length: int) -> None:
        if not self._listing:
            return
        if self._settings.verbose or len(self._shown) < SHOWN_RANGES:
            self._shown.append((offset, length))
        else:
            self._more += 1

    def finish(self, result: Result, summary: list[str]) -> None:
        del result
        self.close()
        if self._settings.quiet:
            return
        for line in summary:
            write_line(line)
        for offset, length in self._shown:
            write_line(f"  at {offset}: {length} bytes")
        if self._more:
            write_line(f"  and {self._more} more ranges; -v or --json lists them all")


class Bar(Plain):
    """A line that is redrawn in place."""

    def __init__(self, settings: Settings, op: str, *, listing: bool) -> None:
        super().__init__(settings, op, listing=listing)
        self._bar: RichProgress | None = None

    def progress(self, progress: Progress) -> None:
        if self._bar is None:
            # Not before the engine runs: until then ssh may be asking for a password.
            self._bar = _rich_bar(color=self._settings.color)
            self._bar.start()
            self._bar.add_task(self._op, total=1, text="")
        rechecking = progress.recheck_total_bytes > 0 and progress.done_bytes == progress.total_bytes
        done, total = (
            (progress.recheck_done_bytes, progress.recheck_total_bytes)
            if rechecking
            else (progress.done_bytes, progress.total_bytes)
        )
        self._bar.update(
            self._bar.task_ids[0],
            description="reading back" if rechecking else self._op,
            total=max(total, 1),
            completed=done if total else 1,
            text=sentence(progress),
            refresh=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Lines(Reporter):
    """For scripts."""

    def __init__(self, settings: Settings, op: str) -> None:
        self._settings = settings
        self._op = op
        self._last = time.monotonic()
        self._encode = msgspec.json.Encoder().encode

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < JSON_S:
            return
        self._last = now
        if self._settings.quiet:
            sys.stdout.flush()
            return
        self._write(
            ProgressLine(
                op=self._op,
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
                skipped_bytes=progress.skipped_bytes,
                sent_bytes=progress.sent_bytes,
                rate=progress.rate,
                eta_s=progress.eta_s,
                differing_bytes=progress.differing_bytes,
                written_bytes=progress.written_bytes,
                recheck_total_bytes=progress.recheck_total_bytes,
                recheck_done_bytes=progress.recheck_done_bytes,
            )
        )
        sys.stdout.flush()

    def difference(self, offset: int, length: int) -> None:
        # By hand: there may be millions of them.
        write_line(f'{{"type":"difference","offset":{offset},"length":{length}}}')

    def interrupted(self, result: object) -> None:
        if isinstance(result, CompareResult | ResyncResult):
            self._write(last_line(result, finished=False))

    def finish(self, result: Result, summary: list[str]) -> None:
        del summary
        self._write(last_line(result, finished=True))
        sys.stdout.flush()

    def _write(self, line: ProgressLine | ResyncLine | VerifyLine) -> None:
        write_line(self._encode(line).decode())


@contextmanager
def reporter(settings: Settings, op: str, *, listing: bool) -> Iterator[Reporter]:
    """The right one for these settings and this stderr. `listing`: differences are wanted."""
    chosen: Reporter
    if settings.json:
        chosen = Lines(settings, op)
    elif settings.quiet:
        chosen = Reporter()
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        chosen = Bar(settings, op, listing=listing)
    else:
        chosen = Plain(settings, op, listing=listing)
    try:
        yield chosen
    finally:
        chosen.close()


def sentence(progress: Progress) -> str:
    """ "69.2 %  2.70/3.90 GiB  212 MiB/s  eta 0:06  61.4 % skipped (equal)" """
    done = progress.done_bytes + progress.recheck_done_bytes
    total = progress.total_bytes + progress.recheck_total_bytes
    return (
        f"{format_percent(done, total)}  {format_progress(done, total)}  {format_rate(progress.rate)}  "
        f"eta {format_clock(progress.eta_s)}  "
        f"{format_percent(progress.skipped_bytes, progress.done_bytes)} skipped (equal)"
    )


def last_line(result: Result, *, finished: bool) -> ResyncLine | VerifyLine:
    eta_s = 0.0 if finished else None
    if isinstance(result, CompareResult):
        return VerifyLine(
            done_bytes=result.done_bytes,
            total_bytes=result.size,
            skipped_bytes=result.skipped_bytes,
            sent_bytes=result.sent_bytes,
            rate=result.rate,
            eta_s=eta_s,
            finished=finished,
            differing_blocks=result.differing_blocks,
            seconds=result.seconds,
            differing_bytes=result.differing_bytes,
            wire_bytes=result.wire_bytes,
            equal=result.equal,
            a=result.a,
            b=result.b,
            a_size=result.a_size,
            b_size=result.b_size,
            ignored_tail_bytes=result.ignored_tail_bytes,
        )
    return ResyncLine(
        done_bytes=result.done_bytes,
        total_bytes=result.size,
        skipped_bytes=result.skipped_bytes,
        sent_bytes=result.sent_bytes,
        rate=result.rate,
        eta_s=eta_s,
        finished=finished,
        differing_blocks=result.differing_blocks,
        seconds=result.seconds,
        differing_bytes=result.differing_bytes,
        written_bytes=result.written_bytes,
        punched_bytes=result.punched_bytes,
        wire_bytes=result.wire_bytes,
        dry_run=result.dry_run,
        verified=result.verified,
        created=result.created,
        resized=result.resized,
        source=result.source,
        target=result.target,
        target_size=result.target_size,
        ignored_tail_bytes=result.ignored_tail_bytes,
    )


def _rich_bar(*, color: bool) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True, no_color=not color)
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        console=console,
        auto_refresh=False,
        transient=True,
    )
