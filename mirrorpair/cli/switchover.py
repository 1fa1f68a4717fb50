"""`mirrorpair switchover [--to NODE] [--dry-run]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="switchover",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair switchover                     # to the node that is not primary
  mirrorpair switchover --to alpha          # from either node; no change if alpha is primary
  mirrorpair switchover -n                  # what would happen, or why it is refused

\b
Exit codes:
  0    that node is primary and serves (with --dry-run: it would be)
  1    the primary stays primary: a flush took too long, or another change of roles is under way
  2    usage: no such node
  10   configuration
  11   no daemon of this node answers, or the other node, or the witness, is not there
  12   refused: the other node is not in sync, or the pair has no witness
  13   the daemon, the other node or the witness is silent
  15   wrong role: no node is primary
  130  interrupted; it goes on in the daemon""",
)
@click.option("--to", "to", metavar="NODE", help="The node that shall be primary; without it the one that is not.")
@click.option("-n", "--dry-run", is_flag=True, help="Change nothing; say what would happen, or why it is refused.")
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: switchover never asks.")
@common_options
@click.pass_obj
def command(settings: Settings, to: str | None, dry_run: bool) -> int:
    """Give the primary role to the other node, planned: nothing is lost, nothing is resynced.

    Both nodes must be in sync. Clients are paused, not failed; once no write is in hand and all is durable on both
    nodes the witness records the new primary, it serves, and the clients' connections to the old one end. If that
    takes longer than ten seconds the clients go on where they were. It works while the pair is paused.
    """
    raise_interrupt_on_termination()

    from mirrorpair.cli.live import connect, show_result

    with connect(settings) as daemon:
        done = daemon.switchover(to, dry_run=dry_run)
    show_result(settings, "switchover", done.message, done.status, dry_run=dry_run)
    return 0
