"""`mirrorpair explain [--json]`."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, write_line


@click.command(
    name="explain",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair explain
  mirrorpair explain --json | jq -e .promotable

\b
Exit codes:
  0 told, 2 usage, 10 configuration, 11 no daemon of this node answers, 13 it is silent""",
)
@common_options
@click.pass_obj
def command(settings: Settings) -> int:
    """Tell whether this node could become primary now, and which rule allows or forbids it.

    The first line is what `mirrorpair promote` would do, without options. Then each rule by its name: "ok" where it
    allows it, "no" where it forbids it. Nothing is changed.
    """
    import msgspec

    from mirrorpair.cli.live import connect
    from mirrorpair.text import printable

    with connect(settings) as daemon:
        told = daemon.explain()
    if settings.json:
        write_line(msgspec.json.encode(told).decode())
        return 0
    itself = "; it takes over by itself if the primary dies" if told.by_itself and told.role == "secondary" else ""
    write_line(printable(told.verdict + itself))
    for one in told.findings:
        write_line(f"  {'ok' if one.allows else 'no'}  {printable(one.rule):<15} {printable(one.text)}")
    return 0
