"""`mirrorpair failback [--dry-run]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, raise_interrupt_on_termination


@click.command(
    name="failback",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair failback
  mirrorpair wait --for synced --timeout 600 && mirrorpair failback

\b
Exit codes: those of `mirrorpair switchover`; 12 also when the configuration has no pair.prefer.""",
)
@click.option("-n", "--dry-run", is_flag=True, help="Change nothing; say what would happen, or why it is refused.")
@click.option("-y", "--yes", is_flag=True, expose_value=False, help="Accepted, not needed: failback never asks.")
@common_options
@click.pass_obj
def command(settings: Settings, dry_run: bool) -> int:
    """Give the primary role back to the preferred node (pair.prefer): a switchover to it.

    On a pair whose preferred node is primary it changes nothing. With failback = "auto" in the configuration it happens
    by itself once the preferred node has been in sync for failback-delay.
    """
    raise_interrupt_on_termination()

    from mirrorpair.cli.common import load_pair
    from mirrorpair.cli.live import connect, show_result
    from mirrorpair.errors import RefusedError

    prefer = load_pair(settings)[0].prefer
    if prefer is None:
        raise RefusedError("pair.prefer is not set: no node is preferred; `mirrorpair switchover --to NODE` names one")
    with connect(settings) as daemon:
        done = daemon.switchover(prefer, dry_run=dry_run)
    show_result(settings, "failback", done.message, done.status, dry_run=dry_run)
    return 0
