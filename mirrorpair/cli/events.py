"""`mirrorpair events [--json] [--since SEQ]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, write_line


@click.command(
    name="events",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair events
  mirrorpair events --json --since 41 | jq -r .reason

\b
Exit codes:
  0 told, 2 usage, 10 configuration, 11 no daemon of this node answers, 13 it is silent""",
)
@click.option(
    "--since",
    type=click.IntRange(0, 2**63 - 1),
    metavar="SEQ",
    default=0,
    help="Only what came after this number. Numbers begin at 1 with each start of the daemon; one that this run has "
    "not given out shows everything.",
)
@common_options
@click.pass_obj
def command(settings: Settings, since: int) -> int:
    """Show what has changed since the daemon of this node started, oldest first: roles, disks, the link, resyncs.

    Each line has its number, the time (UTC), the kind, the volume, what changed to what, and the reason. The last
    thousand are kept.
    """
    import msgspec

    from mirrorpair.cli.live import connect
    from mirrorpair.cli.statusview import event_lines

    with connect(settings) as daemon:
        events = daemon.events(since)
    for line in [msgspec.json.encode(event).decode() for event in events] if settings.json else event_lines(events):
        write_line(line)
    return 0
