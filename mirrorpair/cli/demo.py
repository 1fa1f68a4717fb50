"""`mirrorpair demo [--out DIR] [--keep]`: shows what mirrorpair/demo/ does, as it happens, and its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mirrorpair.cli.common import Settings, common_options, note, raise_interrupt_on_termination, write_line

if TYPE_CHECKING:
    from mirrorpair.demo.report import ResultLine, Teller

WIDTH = 110
INDENT = 19


@click.command(
    name="demo",
    options_metavar="[OPTIONS]",
    epilog="""\b
What happens:
  init, start, promote     alpha and beta with a volume of 256 MiB, and a witness: three processes
  write                    clients write and read through NBD, many requests in flight
  kill, failover           kill -9 of alpha while it writes; beta takes over by itself
  return, resync           alpha is started again and gets what differs, while clients write
  failback                 the role goes back to alpha, under writes
  verify                   every block against the journal, both images against each other
  cut, freeze, thaw        the negative control: alpha loses beta and the witness. It must not
                           acknowledge a single write until the witness is back.

\b
A block is right when it holds what its last acknowledged write wrote, or a later write that
was sent and never answered; what nobody wrote must still be zeros. Times are printed and not
judged. It needs half a minute, and up to 600 MiB below $TMPDIR or in --out.

\b
What stays in DIR:
  journal      every write: `sent NUMBER OFFSET LENGTH`, `done NUMBER` once acknowledged
  logs/        what alpha, beta and the witness said
  with --keep  also pair.toml, both images and the daemons' own files

\b
Examples:
  mirrorpair demo
  mirrorpair demo --json | tail -n 1          the verdict and all figures
  mirrorpair demo --out /var/tmp/demo --keep

\b
Exit codes:
  0    PASS
  1    FAIL, or it could not be set up here
  2    usage
  12   refused: DIR is not empty
  130  interrupted; the processes have ended, and what was made is removed""",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Work in this folder, which must be empty or not exist; the journal and the logs stay in it. Default: a "
    "temporary one of which nothing stays.",
)
@click.option("--keep", is_flag=True, help="Remove nothing at the end, and say where it is.")
@common_options
@click.pass_obj
def command(settings: Settings, out: str | None, keep: bool) -> int:
    """Run a whole pair on this machine and see whether it keeps its promises.

    Real processes and a real kill -9; no root, no network, no configuration. Clients write through NBD and keep a
    journal of every acknowledged write outside the volume. At the end each of those writes is looked for, and the
    images of both nodes are compared. What happens is shown on stderr as it happens, the verdict on stdout.
    """
    raise_interrupt_on_termination()

    from pathlib import Path

    from mirrorpair.demo import scenario
    from mirrorpair.demo.processes import Stage
    from mirrorpair.interrupts import Hold

    demo = scenario.Demo
    # An interrupt gets through while the demo runs, and only then: what was started and made is always put away.
    with Hold() as hold:
        stage = Stage(demo.size, out=None if out is None else Path(out), keep=keep, profile=demo.profile)
        try:
            with stage, hold.released():
                result = demo(stage, _teller(settings)).run()
        finally:
            if stage.kept and stage.journal.exists() and not settings.json:
                note(settings, f"{'everything' if keep else 'the journal and the logs'}: {stage.folder}")
    result.folder = str(stage.folder) if stage.kept else None
    _show(settings, result)
    return 0 if result.passed else 1


def verdict(result: ResultLine) -> list[str]:
    """
    PASS  0 of 48,211 acknowledged writes lost   images identical
          failover 0.19 s   longest client stall 0.2 s   resync 312 MiB in 0.6 s (61 % skipped)   failback 0.05 s
          cut off from peer and witness for 4.0 s: 0 of 64 writes acknowledged
    """
    from mirrorpair.units import format_percent, format_seconds, format_size

    word = "PASS" if result.passed else "FAIL"
    lost = "?" if result.lost_writes is None else f"{result.lost_writes:,}"
    images = {True: "images identical", False: "images differ", None: "images not compared"}[result.images_identical]
    lines = [f"{word}  {lost} of {result.acknowledged_writes:,} acknowledged writes lost   {images}"]
    times = []
    if result.failover_s is not None:
        times.append(f"failover {format_seconds(result.failover_s)}")
    if result.longest_stall_s is not None:
        times.append(f"longest client stall {format_seconds(result.longest_stall_s)}")
    if result.resync_bytes is not None and result.resync_s is not None:
        resync = f"resync {format_size(result.resync_bytes)} in {format_seconds(result.resync_s)}"
        if result.resync_skipped_bytes is not None and result.resync_sent_bytes is not None:
            looked_at = result.resync_skipped_bytes + result.resync_sent_bytes
            resync += f" ({format_percent(result.resync_skipped_bytes, looked_at)} skipped)"
        times.append(resync)
    if result.failback_s is not None:
        times.append(f"failback {format_seconds(result.failback_s)}")
    if times:
        lines.append("      " + "   ".join(times))
    if result.frozen_s is not None:
        lines.append(
            f"      cut off from peer and witness for {format_seconds(result.frozen_s)}: "
            f"{result.frozen_acknowledged} of {result.frozen_writes} writes acknowledged"
        )
    return [*lines, *(f"      problem: {problem}" for problem in result.problems)]


def _show(settings: Settings, result: ResultLine) -> None:
    import sys

    if settings.json:
        import msgspec

        write_line(msgspec.json.encode(result).decode())
    elif not (settings.quiet and result.passed):
        first, *rest = verdict(result)
        if settings.color and sys.stdout.isatty():
            first = click.style(first[:4], fg="green" if result.passed else "red", bold=True) + first[4:]
        for line in (first, *rest):
            write_line(line)


def _teller(settings: Settings) -> Teller:
    """How these settings and this stderr are told what happens."""
    import sys
    from contextlib import ExitStack
    from shutil import get_terminal_size
    from textwrap import fill

    import msgspec

    from mirrorpair.cli.online import Shown, Totals
    from mirrorpair.cli.progress import reporter
    from mirrorpair.demo.report import Teller

    if TYPE_CHECKING:
        from mirrorpair.control import Working
        from mirrorpair.demo.report import StepLine

    encode = msgspec.json.Encoder().encode
    width = min(get_terminal_size((WIDTH, 24)).columns, WIDTH) if sys.stderr.isatty() else WIDTH
    bold = settings.color and sys.stderr.isatty()

    class Told(Teller):
        def __init__(self) -> None:
            self._stack = ExitStack()
            self._shown: Shown | None = None

        def step(self, line: StepLine) -> None:
            if settings.json:
                if not settings.quiet:
                    write_line(encode(line).decode())
                    sys.stdout.flush()
            elif not settings.quiet:
                text = fill(
                    line.message,
                    max(width, 2 * INDENT),
                    initial_indent=" " * INDENT,
                    subsequent_indent=" " * INDENT,
                    break_on_hyphens=False,
                    break_long_words=False,
                )[INDENT:]
                name = f"{line.step:<9}"
                click.echo(f"{line.seconds:5.1f} s  {click.style(name, bold=True) if bold else name} {text}", err=True)

        def resync(self, working: Working) -> None:
            if self._shown is None:
                if all(volume.resync is None for volume in working.volumes):
                    return
                report = self._stack.enter_context(reporter(settings, "resync", listing=False))
                self._shown = Shown(settings, report, Totals())
            self._shown(working)

        def resynced(self) -> None:
            self._stack.close()
            self._shown = None

    return Told()
