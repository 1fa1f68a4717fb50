"""`mirrorpair status [--json] [--watch [SECONDS]] [--check]`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from mirrorpair.cli.common import (
    INTERRUPTED,
    TIME,
    Settings,
    common_options,
    raise_interrupt_on_termination,
    write_line,
)
from mirrorpair.errors import MirrorpairError
from mirrorpair.text import printable

if TYPE_CHECKING:
    from mirrorpair.status import Status

WATCH_S = 2.0
MIN_WATCH_S = 0.1
UNKNOWN = 3
CHECKS = {"healthy": 0, "degraded": 1, "critical": 2, "unknown": UNKNOWN}
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


@click.command(
    name="status",
    options_metavar="[OPTIONS]",
    epilog="""\b
Columns:
  *            the node that was asked; the other line is what it knows of its peer
  disk         diskless, failed, inconsistent, outdated, consistent, up-to-date; resyncing
  link         connected, connecting, silent; refused, split brain, unrelated
  out-of-sync  in blocks that may differ, in the line of the node that lacks them
  heartbeat    since the last beat: ours that was answered, the peer's that arrived

\b
Examples:
  mirrorpair status
  mirrorpair status --watch 1
  mirrorpair status --json | jq -r .health
  mirrorpair status --check && echo healthy         for monitoring systems

\b
Exit codes:
  0    told
  2    usage
  10   configuration
  11   no daemon of this node answers, or it ended while --watch looked on
  13   the daemon is silent
  14   the control socket is another user's
  130  --watch was interrupted
  With --check: 0 healthy, 1 degraded, 2 critical, 3 unknown, and nothing else.""",
)
@click.option(
    "--watch",
    type=TIME,
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=WATCH_S,
    default=None,
    help="Again and again, every 2 s or as often as said, until it is interrupted.",
)
@click.option("--check", is_flag=True, help="One line, and an exit code that says how healthy the pair is.")
@common_options
@click.pass_obj
def command(settings: Settings, watch: float | None, check: bool) -> int:
    """Show this node, its peer and the volumes at one glance: who is primary, what is in sync, why, and what to do.

    It asks the daemon of this node. What stands there about the peer is what this node knows of it.
    """
    if watch is not None:
        if check:
            raise click.UsageError("give either --watch or --check")
        if watch < MIN_WATCH_S:
            raise click.UsageError(f"--watch looks at most every {MIN_WATCH_S:g} s")
        raise_interrupt_on_termination()
    if check:
        return _check(settings)

    from mirrorpair.cli.live import connect

    with connect(settings) as daemon:
        _show(settings, daemon.status(), redraw=watch is not None)
        if watch is None:
            return 0
        try:
            while True:
                time.sleep(watch)
                _show(settings, daemon.status(), redraw=True)
        except KeyboardInterrupt:
            return INTERRUPTED  # the way to end it, and no event to tell


def _check(settings: Settings) -> int:
    """Whatever goes wrong is "unknown": a monitoring system would take another exit code for a health."""
    from mirrorpair.cli.live import connect
    from mirrorpair.cli.statusview import check_line

    try:
        with connect(settings) as daemon:
            status = daemon.status()
    except (MirrorpairError, OSError) as error:
        settings.failed = UNKNOWN
        if settings.json:
            import json

            code = error.exit_code if isinstance(error, MirrorpairError) else 1
            write_line(json.dumps({"type": "error", "code": code, "message": printable(str(error))}))
        else:
            write_line(f"UNKNOWN - {printable(str(error))}")
        return UNKNOWN
    if settings.json:
        _show(settings, status, redraw=False)
    else:
        write_line(check_line(status))
    return CHECKS[status.health]


def _show(settings: Settings, status: Status, *, redraw: bool) -> None:
    import msgspec

    from mirrorpair.cli.statusview import render

    if settings.json:
        write_line(msgspec.json.encode(status).decode())
    else:
        terminal = sys.stdout.isatty()
        encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
        lines = render(status, color=settings.color and terminal, ascii_only=not encoding.startswith("utf"))
        if redraw and terminal:
            # Overwritten in place: clearing the screen first would flicker.
            sys.stdout.write(HOME + "".join(f"{line}{REST_OF_LINE}\n" for line in lines) + REST_OF_SCREEN)
        else:
            write_line("\n".join(lines) + ("\n" if redraw else ""))
    sys.stdout.flush()
