"""`mirrorpair run`: the node's daemon."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options, load_pair


@click.command(
    name="run",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair run
  mirrorpair run -c /etc/mirrorpair/shop.toml --node alpha
  In a systemd unit:  Type=notify   ExecStart=/usr/bin/mirrorpair run   KillSignal=SIGTERM

\b
Exit codes:
  0    stopped by SIGTERM or SIGINT: clients were answered, everything is durable and marked so
  1    failed: an image or the metadata cannot be used, an address cannot be bound
  2    usage
  10   configuration
  12   refused: another daemon of this node runs, or an image is not the one the metadata is of""",
)
@common_options
@click.pass_obj
def command(settings: Settings) -> int:
    """Run this node's daemon, in the foreground: it serves the volumes or stands by, and mirrors.

    `mirrorpair init` has to be done first. SIGTERM stops it gracefully; after SIGKILL or a loss of power it knows what
    may differ, and resyncs that. In a pair with a witness it starts a second, small process, its sentinel, which tells
    the peer at once when this one has died. The log is one line an event on stderr, with --json one JSON object a line.
    """
    from mirrorpair.cli.logs import log_to_stderr

    config, node = load_pair(settings)
    log_to_stderr(settings)

    from mirrorpair.node import run

    return run(config, node.name)
