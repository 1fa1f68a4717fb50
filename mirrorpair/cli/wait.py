"""`mirrorpair wait --for CONDITION [--timeout TIME]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from mirrorpair.cli.common import TIME, Settings, common_options, raise_interrupt_on_termination

if TYPE_CHECKING:
    from mirrorpair.status import Condition

PATIENCE_S = 10.0  # for a daemon that is being started by the same script
CONDITIONS = ("primary", "secondary", "synced", "connected")  # of status.py, which `--help` does not load


@click.command(
    name="wait",
    options_metavar="--for CONDITION [OPTIONS]",
    epilog="""\b
Conditions, of this node:
  primary    it is primary and answers its clients
  secondary  it is secondary
  connected  it is connected to its peer and they agree to mirror
  synced     connected, and no block of any volume may differ

\b
Examples:
  mirrorpair wait --for primary --timeout 30s && mount /dev/nbd0 /srv
  mirrorpair wait --for synced                      # after a recovery, before the next step

\b
Exit codes:
  0    it is so
  2    usage
  10   configuration
  11   no daemon of this node answers (after 10 s, or --timeout), or it ended meanwhile
  13   it was not so within --timeout
  20   it will not be so: split brain or unrelated data, which a person has to resolve
  130  interrupted""",
)
@click.option("--for", "condition", type=click.Choice(CONDITIONS), required=True, help="What to wait for.")
@click.option("--timeout", type=TIME, metavar="TIME", help="The longest wait: 30, 500ms, 5min. Default: for ever.")
@common_options
@click.pass_obj
def command(settings: Settings, condition: str, timeout: float | None) -> int:
    """Wait until this node is primary, secondary, connected to its peer, or in sync with it. For scripts.

    Nothing is changed. It returns at once when it is so already; with `--timeout 0` it only looks.
    """
    raise_interrupt_on_termination()

    from time import monotonic

    from mirrorpair.cli.live import connect_within, show_result

    began = monotonic()
    with connect_within(settings, PATIENCE_S if timeout is None else timeout) as daemon:
        left = None if timeout is None else max(0.0, timeout - (monotonic() - began))
        done = daemon.wait_for(cast("Condition", condition), timeout=left)
    show_result(settings, "wait", done.message, done.status)
    return 0
