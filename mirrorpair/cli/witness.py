"""`mirrorpair witness`: the daemon on the third host."""

from __future__ import annotations

import click

from mirrorpair.cli.common import Settings, common_options


@click.command(
    name="witness",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair witness
  mirrorpair witness -c /etc/mirrorpair/shop.toml
  In a systemd unit:  Type=notify   ExecStart=/usr/bin/mirrorpair witness   KillSignal=SIGTERM

\b
What it keeps, below its state-dir:
  PAIR.record   who is primary of that pair, and who has every acknowledged write
One that is damaged is not believed and not replaced; its pair keeps its roles meanwhile.

\b
Exit codes:
  0    stopped by SIGTERM or SIGINT
  1    failed: the folder cannot be used
  2    usage: the address cannot be bound
  10   configuration
  12   refused: another witness has the folder or the address""",
)
@common_options
@click.pass_obj
def command(settings: Settings) -> int:
    """Run the witness, in the foreground: the one vote that two nodes of a pair cannot give themselves.

    It keeps each pair's record of roles, durably, and changes it by compare-and-swap. It holds no data and no clock,
    and is asked only when roles change: while it is away a healthy pair goes on as it is. One witness serves every
    pair whose configuration names its address; of the file given here only [witness] counts.
    """
    from mirrorpair.cli.common import load_config
    from mirrorpair.cli.logs import log_to_stderr
    from mirrorpair.errors import ConfigError
    from mirrorpair.text import printable

    config = load_config(settings)
    if config.witness is None:
        raise ConfigError(f"{printable(config.path)}: witness: found no such table, expected address and state-dir")
    log_to_stderr(settings)

    from mirrorpair.witness.server import run

    return run(config.witness)
