"""`mirrorpair history [--json] [--since SEQ]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, load_pair, note, write_line


@click.command(
    name="history",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair history
  mirrorpair history --json | jq -r 'select(.kind == "role") | .reason'

\b
Exit codes:
  0 told, 1 it cannot be read, 2 usage, 10 configuration""",
)
@click.option(
    "--since",
    type=click.IntRange(0, 2**63 - 1),
    metavar="SEQ",
    default=0,
    help="Only what came after this number. Numbers go on when the daemon is started anew.",
)
@common_options
@click.pass_obj
def command(settings: Settings, since: int) -> int:
    """Show how this node's role and its disks have changed, oldest first, as it is kept in the node's state-dir.

    Each line has its number, the time (UTC), the epoch, what changed from what to what, and the reason. It survives
    restarts and crashes, needs no daemon, and is bounded: the oldest lines go when it grows beyond a megabyte, some
    thousand changes. What else happens (links, resyncs) is told by `mirrorpair events`; what became of the other node,
    by this command there.
    """
    import msgspec

    from mirrorpair.chronicle import load
    from mirrorpair.cli.statusview import history_lines

    found = load(load_pair(settings)[1].history_file)
    if found.damaged:
        note(settings, f"{found.damaged} damaged lines are passed over")
    entries = [entry for entry in found.entries if entry.seq > since]
    for line in [msgspec.json.encode(one).decode() for one in entries] if settings.json else history_lines(entries):
        write_line(line)
    return 0
