"""The command `mirrorpair`. A subcommand's module is imported when it is called; its line in the overview stands here.

Rule: `mirrorpair --help` loads click and nothing heavier (a test looks at sys.modules), so that it starts at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

import click

from mirrorpair import __version__
from mirrorpair.cli.common import PROGRAM, Settings, common_options, exit_with, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "demo": "A pair on this machine loses a host and gets it back: PASS or FAIL.",
    "init": "Make this node: its images and their metadata.",
    "run": "The daemon of this node, in the foreground.",
    "witness": "The witness of one or many pairs, on a third host.",
    "status": "This node, its peer and the volumes at one glance.",
    "wait": "Wait until this node is primary, secondary, connected or synced.",
    "promote": "Make this node primary.",
    "demote": "Make this node secondary.",
    "switchover": "Give the primary role to the other node, planned.",
    "failback": "Give the primary role back to the preferred node.",
    "pause": "No failover and no failback by itself.",
    "resume": "The end of a pause.",
    "explain": "Which rule lets this node become primary now, or does not.",
    "events": "What has changed since the daemon was started, and why.",
    "history": "Role and disk changes of this node, over its whole life.",
    "resync": "Make one image equal to another by writing only what differs.",
    "meta": "Show or check this node's metadata.",
    "verify": "Compare two images: 0 equal, 1 they differ.",
    "serve": "The far end of a resync or verify.",
    "completion": "Print the completion script of a shell.",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"mirrorpair.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            if near and "mean" not in error.message:
                text = f"{error.message.rstrip('.')}; did you mean {near[0]}?"
                raise click.UsageError(text, ctx=error.ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    name=PROGRAM,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit codes:
  0 ok, 1 failed, 2 usage, 10 configuration, 11 unreachable, 12 refused (would lose data),
  13 time-out, 14 not allowed, 15 wrong role, 20 split brain, 130 interrupted

\b
The common options above may stand before or after the command.
`mirrorpair COMMAND --help` shows what a command does, with examples.""",
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@common_options
def group() -> None:
    """Keep a data volume alive on two hosts, and make two disk images equal, fast.

    Only what differs travels; an equal block is never rewritten; holes stay holes.
    """


def run(args: Sequence[str]) -> int:
    """The exit code of `mirrorpair ARGS`."""
    return run_command(group, list(args), Settings())


def main() -> NoReturn:
    exit_with(run(sys.argv[1:]))
