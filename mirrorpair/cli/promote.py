"""`mirrorpair promote [--accept-data-loss] [--force]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="promote",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair promote                        # both nodes connected, neither primary
  mirrorpair promote --accept-data-loss     # the peer is gone, and will not be asked

\b
Exit codes:
  0    this node is primary and serves its clients
  2    usage
  10   configuration
  11   no daemon of this node answers, or it ended meanwhile
  12   refused: writes that only the peer has would be lost, or the peer is primary
  13   the daemon, or the peer, is silent
  15   wrong role
  20   split brain or unrelated data
  130  interrupted; the promotion goes on in the daemon""",
)
@click.option(
    "--accept-data-loss",
    is_flag=True,
    help="Go on without what the peer may have: for a peer that is gone, when nobody can tell whether this node has "
    "everything. What may be lost is told. Should the peer come back with more, neither overwrites the other.",
)
@click.option(
    "--force",
    is_flag=True,
    help="With --accept-data-loss: also when the peer may be alive and serve. Two primaries make a split brain; stop "
    "the other one first.",
)
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: promote never asks.")
@common_options
@click.pass_obj
def command(settings: Settings, accept_data_loss: bool, force: bool) -> int:
    """Make this node primary: it serves the volumes, and its data is the data.

    Without an option nothing can be lost: it is refused unless this node is known to have every acknowledged write.
    On a node that is primary it changes nothing.
    """
    if force and not accept_data_loss:
        raise click.UsageError("--force goes with --accept-data-loss")
    raise_interrupt_on_termination()

    from mirrorpair.cli.live import connect, show_result

    with connect(settings) as daemon:
        done = daemon.promote(accept_data_loss=accept_data_loss, force=force)
    show_result(settings, "promote", done.message, done.status)
    return 0
