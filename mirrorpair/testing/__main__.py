"""`python -m mirrorpair.testing`: a campaign of the simulation, or one seed again with all that happened in it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING

import click
import msgspec

from mirrorpair.testing.campaign import Result, campaign, trace
from mirrorpair.testing.plays import PLAYS, STEPS

if TYPE_CHECKING:
    from collections.abc import Iterable

INTERRUPTED = 130
SHOWN = 10


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`failures`: how many runs broke an invariant, by its id."""

    runs: int
    failed: int
    failures: dict[str, int]
    acknowledged: int
    acquisitions: int


def _line(value: object) -> None:
    click.echo(msgspec.json.encode(value).decode())


def _replay(name: str, seed: int, steps: int | None, *, json: bool) -> int:
    result, happened = trace(name, seed, steps)
    if json:
        _line(result._asdict() | {"trace": happened})
    else:
        for line in happened:
            click.echo(line)
        click.echo(f"{name} {seed}: {result.invariant or 'all invariants hold'} {result.what}".rstrip())
    return 1 if result.invariant else 0


def _tell(results: Iterable[Result], *, json: bool) -> int:
    runs = acks = acquisitions = 0
    failures: Counter[str] = Counter()
    for result in results:
        runs += 1
        acks += result.acks
        acquisitions += result.acquisitions
        if result.invariant:
            failures[result.invariant] += 1
            if json:
                _line(result._asdict())
            elif failures[result.invariant] <= SHOWN:
                click.echo(f"{result.invariant:<5} {result.play} {result.seed}: {result.what}")
    failed = failures.total()
    if json:
        _line(Summary(runs=runs, failed=failed, failures=failures, acknowledged=acks, acquisitions=acquisitions))
    else:
        counts = ", ".join(f"{count} of {invariant}" for invariant, count in sorted(failures.items()))
        click.echo(f"{runs} runs, {acks} writes acknowledged, roles acquired {acquisitions} times")
        click.echo(f"failed: {failed} ({counts})" if failed else "failed: 0")
    return 1 if failed else 0


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"""\b
Plays:
  {", ".join(list(PLAYS)[:5])},
  {", ".join(list(PLAYS)[5:])}

\b
Examples:
  python -m mirrorpair.testing --seeds 5000
  python -m mirrorpair.testing --play storm --start 1000000 --seeds 2000 --steps 5000 --json
  python -m mirrorpair.testing --play storm --replay 1000017

\b
Exit codes:
  0    every invariant held in every run
  1    one did not
  2    usage
  130  interrupted""",
)
@click.option("--seeds", type=click.IntRange(1), default=100, show_default=True, help="How many.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="The first one.")
@click.option("--steps", type=click.IntRange(1), help=f"How long a storm is.  [default: {STEPS}]")
@click.option("--play", "plays", multiple=True, type=click.Choice(list(PLAYS)), help="Only this; may be repeated.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one for each CPU]")
@click.option("--replay", type=click.IntRange(0), metavar="SEED", help="One seed of one play, with its trace.")
@click.option("--json", is_flag=True, help="One object a line: every failure, then the summary.")
def command(
    *,
    seeds: int,
    start: int,
    steps: int | None,
    plays: tuple[str, ...],
    jobs: int | None,
    replay: int | None,
    json: bool,
) -> int:
    """Drive a simulated pair through storms of faults and through the worst moments, many seeds of each.

    A seed decides everything that happens. What decides in the pair is the code that runs in production. After each
    step the invariants are checked: no acknowledged write is lost, nobody acknowledges beside another, and so on.
    """
    if replay is not None:
        if len(plays) != 1:
            raise click.UsageError("--replay needs exactly one --play")
        return _replay(plays[0], replay, steps, json=json)
    return _tell(campaign(range(start, start + seeds), plays or tuple(PLAYS), steps, jobs or 0), json=json)


def main(args: list[str] | None = None) -> int:
    try:
        return int(command.main(args, prog_name="python -m mirrorpair.testing", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
