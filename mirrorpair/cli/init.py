"""`mirrorpair init`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mirrorpair.cli.common import (
    Settings,
    common_options,
    load_pair,
    note,
    raise_interrupt_on_termination,
    write_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mirrorpair.newnode import MadeNode, MadeVolume

CALM_S = 5.0


@click.command(
    name="init",
    options_metavar="[OPTIONS]",
    epilog="""\b
What is made:
  image.VOLUME of this node         sparse, `size` of [volume.VOLUME]; a device must exist
  STATE-DIR/PAIR.NODE/VOLUME.meta   2 MiB for each TiB at block-size 64KiB, reserved at once
  STATE-DIR/PAIR.NODE/node          what the node knows of epochs and roles

\b
A new pair, empty:
  alpha# mirrorpair init
  beta#  mirrorpair init
A new pair around data that alpha has:
  alpha# mirrorpair init --keep-data
  beta#  mirrorpair init
Then, on both, `mirrorpair run`; and `mirrorpair promote` on the one that is to serve.

\b
Examples:
  mirrorpair init -c pair.toml --node alpha
  mirrorpair init --force             start empty, to take all from the peer
  mirrorpair init --keep-data --force this image is the only copy, its metadata are lost

\b
Exit codes:
  0    made
  1    failed: no space, I/O error; what was made before is removed again
  2    usage: an image or a folder is missing, or is no file or block device
  10   the configuration is wrong, or has no such node
  12   refused, nothing changed: something exists already, is in use, or has another size
  130  interrupted; what was made before is removed again""",
)
@click.option(
    "--keep-data",
    is_flag=True,
    help="The images are there, and their content is the volumes' data: nothing is written to them. A file must have "
    "the configured size, a device at least that. Say it on one of the two nodes only.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the metadata and, without --keep-data, the content of images that exist: they are made zeros. What "
    "a running daemon has open is refused all the same.",
)
@common_options
@click.pass_obj
def command(settings: Settings, keep_data: bool, force: bool) -> int:
    """Make this node of the pair: its images, and the metadata that say how they compare with the peer's.

    It is run once on each host, before the first `mirrorpair run`. All or nothing: when one volume fails, those made
    before it are removed again. Whatever exists is left as it is, and the command refuses, unless --keep-data or
    --force says what to do with it.

    Two nodes that are both new are equal without a copy: their images are zeros. One new node takes everything from
    its peer. Two nodes with --keep-data hold unrelated data, and will refuse each other.
    """
    raise_interrupt_on_termination()
    config, node = load_pair(settings)

    from mirrorpair.newnode import make_node

    made = make_node(config, node, keep_data=keep_data, force=force, progress=_progress(settings))
    if settings.json:
        import msgspec

        write_line(msgspec.json.encode(made).decode())
    elif not settings.quiet:
        for line in _summary(made, keep_data=keep_data):
            write_line(line)
    return 0


def _progress(settings: Settings) -> Callable[[str, int, int], None]:
    """A line now and then while a device is being zeroed, which may take long."""
    import time

    from mirrorpair.units import format_percent, format_progress

    last = time.monotonic()

    def tell(volume: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= CALM_S and not settings.json:
            last = time.monotonic()
            note(settings, f"zeroing {volume}: {format_percent(done, total)}  {format_progress(done, total)}")

    return tell


def _summary(made: MadeNode, *, keep_data: bool) -> list[str]:
    from mirrorpair.text import printable

    lines = [f"{made.node} of pair {made.pair} is made: {printable(made.folder)}"]
    lines += [f"  {_sentence(volume)}" for volume in made.volumes]
    if keep_data:
        lines.append("next: `mirrorpair init` on the peer, without --keep-data; then `mirrorpair run` on both")
    else:
        lines.append("next: `mirrorpair init` on the peer if that was not done; then `mirrorpair run` on both")
    return lines


def _sentence(volume: MadeVolume) -> str:
    from mirrorpair.text import printable
    from mirrorpair.units import format_size

    what = {
        "made": "made, sparse",
        "zeroed": "existed, made zeros",
        "kept": "its content is the data",
    }[volume.content]
    return f"{volume.name}  {format_size(volume.size)}  {printable(volume.image)} ({volume.kind}): {what}"
