"""`mirrorpair meta dump` and `mirrorpair meta check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mirrorpair.cli.common import Settings, common_options, load_pair, write_line

if TYPE_CHECKING:
    from mirrorpair.config import Config
    from mirrorpair.nodecheck import Look


@click.group(
    name="meta",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair meta check
  mirrorpair meta dump --json | jq '.files[].content.epoch'

\b
Exit codes:
  0    nothing is wrong
  1    something is wrong
  2    usage, or nothing was made yet (`mirrorpair init`)
  10   the configuration is wrong, or has no such node""",
)
@common_options
def command() -> None:
    """Look at this node's metadata, read-only: also while the daemon runs.

    The metadata of a volume are the generation ids, which say whose data are newer, the activity log and the bits of
    the blocks that may differ from the peer's. The node file is what the node knows of epochs and roles.
    """


@command.command(
    name="dump",
    short_help="Print all of it as one JSON object.",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair meta dump
  mirrorpair meta dump --json | jq '.files[] | select(.volume == "data") | .content.ids'

\b
Exit codes:
  0    shown, nothing is wrong
  1    shown, and something is wrong: see `problems` and `recoverable`
  2    usage, or nothing was made yet (`mirrorpair init`)
  10   the configuration is wrong, or has no such node""",
)
@common_options
@click.pass_obj
def dump(settings: Settings) -> int:
    """Print this node's metadata as one JSON object, on one line with --json.

    `files` has the node file and each volume's metadata: whether they are good, both copies of the superblock, their
    content, the records of the activity log, and how many bits are set. Generation ids are 16 hexadecimal digits. A
    daemon that runs may hold more bits in memory than the file shows.
    """
    import msgspec

    from mirrorpair.nodecheck import dumped, look_at

    config, node = load_pair(settings)
    result = dumped(config, node, look_at(config, node))
    text = msgspec.json.encode(result)
    write_line((text if settings.json else msgspec.json.format(text, indent=2)).decode())
    return 0 if result.good else 1


@command.command(
    name="check",
    short_help="Say what is wrong, what is lost and what to do.",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair meta check
  mirrorpair meta check -q || mail -s "mirrorpair: metadata" root

\b
Exit codes:
  0    nothing is wrong
  1    something is wrong: which, what is lost, what is not, and what to do
  2    usage, or nothing was made yet (`mirrorpair init`)
  10   the configuration is wrong, or has no such node""",
)
@common_options
@click.pass_obj
def check(settings: Settings) -> int:
    """Check this node's metadata: digests, both copies, the log, the bits, and whether they fit the configuration and
    the images.

    One damaged copy loses nothing: the other one counts, and the daemon writes the damaged one anew. With both damaged
    the daemon refuses to start, and this command says what can be recovered.
    """
    import msgspec

    from mirrorpair.nodecheck import checked, look_at

    config, node = load_pair(settings)
    looks = look_at(config, node)
    result = checked(config, node, looks)
    if settings.json:
        write_line(msgspec.json.encode(result).decode())
    else:
        for look in looks:
            _show(settings, config, look)
    return 0 if result.good else 1


def _show(settings: Settings, config: Config, look: Look) -> None:
    from mirrorpair.text import printable

    file = look.check
    if settings.quiet and file.good:
        return
    names = {"node": f"node file of {config.name}", "record": f"record of the roles of {config.name}"}
    name = names.get(file.what, f"volume {file.volume}")
    state = "good" if file.good else "WRONG, but usable" if file.usable else "UNUSABLE"
    write_line(f"{name}: {state}{_held(look)}")
    if settings.verbose or not file.good:
        write_line(f"  file: {printable(file.path)}")
    if not file.good:
        for problem in file.problems:
            write_line(f"  problem: {problem}")
        write_line(f"  recoverable: {file.recoverable}")


def _held(look: Look) -> str:
    """What the file holds, in a few words."""
    from mirrorpair.metadata import Superblock
    from mirrorpair.units import format_size

    found = look.found
    if found is None or found.value is None:
        return ""
    value = found.value
    ended = "stopped cleanly" if value.clean else "running, or ended without a clean stop"
    if not isinstance(value, Superblock):
        return f"; {value.role}, epoch {value.epoch}, {ended}"
    data = "new, no data yet" if value.new else value.disk
    bits = ""
    if found.dirty_blocks is not None:
        bits = f", {format_size(found.dirty_blocks * value.block_size)} marked as different"
    return f"; {format_size(value.size)}, {data}, {ended}{bits}"
