"""`mirrorpair completion SHELL`: the script by which a shell completes this command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from mirrorpair.cli.common import COMPLETE, PROGRAM, common_options, write_line


@click.command(
    name="completion",
    epilog="""\b
Examples:
  mirrorpair completion bash > /etc/bash_completion.d/mirrorpair
  mirrorpair completion zsh  > "${fpath[1]}/_mirrorpair"
  mirrorpair completion fish > ~/.config/fish/completions/mirrorpair.fish
  eval "$(mirrorpair completion bash)"        # this shell only

\b
Exit codes:
  0 ok, 2 usage""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes commands, options and file names of mirrorpair."""
    complete = get_completion_class(shell)
    assert complete is not None
    root = context.find_root().command
    # Not .source(): for bash it would first run whatever bash is on the PATH, to see how old it is.
    script = complete(root, {}, PROGRAM, COMPLETE)
    write_line((script.source_template % script.source_vars()).strip())
