"""`mirrorpair demote [--dry-run]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="demote",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair demote
  mirrorpair demote && ssh beta mirrorpair promote      # by hand, what a switchover does

\b
Exit codes:
  0    this node is secondary (with --dry-run: it would be)
  1    it stays primary: another change of roles is under way
  2    usage
  10   configuration
  11   no daemon of this node answers, or it ended meanwhile
  13   the daemon is silent
  15   the roles have changed meanwhile: the other node is primary
  130  interrupted; it goes on in the daemon""",
)
@click.option("-n", "--dry-run", is_flag=True, help="Change nothing; say what would happen, or why it is refused.")
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: demote never asks.")
@common_options
@click.pass_obj
def command(settings: Settings, dry_run: bool) -> int:
    """Make this node secondary: clients get the answers to what they asked, then their connections end.

    Everything is durable on both nodes before it is done. Nobody serves the volumes until a node is promoted. On a
    node that is secondary it changes nothing.
    """
    raise_interrupt_on_termination()

    from mirrorpair.cli.live import connect, show_result

    with connect(settings) as daemon:
        done = daemon.demote(dry_run=dry_run)
    show_result(settings, "demote", done.message, done.status, dry_run=dry_run)
    return 0
