"""`mirrorpair resume`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="resume",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair resume

\b
Exit codes: those of `mirrorpair pause`.""",
)
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: resume never asks.")
@common_options
@click.pass_obj
def command(settings: Settings) -> int:
    """End a pause: failover and failback happen by themselves again.

    It also releases the latch that too many role changes within an hour have set (max-role-changes-per-hour), and
    begins their count anew.
    """
    raise_interrupt_on_termination()

    from mirrorpair.cli.live import connect, show_result

    with connect(settings) as daemon:
        done = daemon.pause(paused=False)
    show_result(settings, "resume", done.message, done.status)
    return 0
