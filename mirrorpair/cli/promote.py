"""`mirrorpair promote [--accept-data-loss] [--force] [--dry-run]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="promote",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair promote                        # both nodes connected, neither primary
  mirrorpair promote -n                     # what would happen, or why it is refused
  mirrorpair promote --accept-data-loss     # the peer is gone, and will not be asked

\b
Exit codes:
  0    this node is primary and serves its clients (with --dry-run: it would be)
  1    another change of roles is under way, or this node stops
  2    usage
  10   configuration
  11   no daemon of this node answers, or it ended meanwhile
  12   refused: writes that only the peer has would be lost
  13   the daemon, or the peer, is silent
  15   wrong role: the other node is primary
  20   split brain or unrelated data (--accept-data-loss serves this node's all the same)
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
@click.option("-n", "--dry-run", is_flag=True, help="Change nothing; say what would happen, or why it is refused.")
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: promote never asks.")
@common_options
@click.pass_obj
def command(settings: Settings, accept_data_loss: bool, force: bool, dry_run: bool) -> int:
    """Make this node primary: it serves the volumes, and its data is the data.

    Without an option nothing can be lost: it is refused unless this node is known to have every acknowledged write.
    On a node that is primary it changes nothing.
    """
    if force and not accept_data_loss:
        raise click.UsageError("--force goes with --accept-data-loss")
    raise_interrupt_on_termination()

    from mirrorpair.cli.live import connect, show_result

    with connect(settings) as daemon:
        done = daemon.promote(accept_data_loss=accept_data_loss, force=force, dry_run=dry_run)
    show_result(settings, "promote", done.message, done.status, dry_run=dry_run)
    return 0
