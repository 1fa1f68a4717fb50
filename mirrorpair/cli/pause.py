"""`mirrorpair pause`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="pause",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair pause          # before work on a switch, a disk, the witness
  mirrorpair resume

\b
Exit codes:
  0    the witness has it, durably
  1    the register is being changed by somebody else: try again
  2    usage
  10   configuration
  11   no daemon of this node answers, or the witness is not there
  12   refused: the pair has no witness, and nothing to pause
  13   the daemon or the witness is silent
  130  interrupted""",
)
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: pause never asks.")
@common_options
@click.pass_obj
def command(settings: Settings) -> int:
    """Let nothing change the primary by itself: no failover, no failback, on either node.

    It is for work on the pair, and stays until `mirrorpair resume`, also over restarts of everything. Mirroring goes
    on; a primary that loses its peer goes on alone; a primary that dies comes back by itself, but is not replaced.
    What a person asks for (switchover, promote) is done. Status says that the pair is paused.
    """
    raise_interrupt_on_termination()

    from mirrorpair.cli.live import connect, show_result

    with connect(settings) as daemon:
        done = daemon.pause(paused=True)
    show_result(settings, "pause", done.message, done.status)
    return 0
