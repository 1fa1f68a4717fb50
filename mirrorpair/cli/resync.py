"""`mirrorpair resync SOURCE TARGET`, offline, and `mirrorpair resync [VOLUME]`, the live mirror's (online.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mirrorpair.cli.common import (
    IMAGE,
    Settings,
    common_options,
    raise_interrupt_on_termination,
    show_warnings,
    transfer_options,
    two_images,
)

if TYPE_CHECKING:
    from mirrorpair.report import ResyncResult

# What belongs to one of the two forms alone.
OFFLINE = ("verify", "resize", "rsh", "remote_command", "rate", "block_size", "threads", "timeout")
ONLINE = ("full", "wait")


@click.command(
    name="resync",
    options_metavar="[OPTIONS]",
    epilog="""\b
Images:
  PATH                            a file or a block device on this host
  ssh://[user@]host[:port]/path   on a host reached by ssh, with mirrorpair installed
  tcp://host:port/path            on a host that runs `mirrorpair serve --listen`
  At most one of the two is on a far host. Paths in URLs are absolute; %20 is a space.

\b
Examples:
  mirrorpair resync vm.img ssh://backup/srv/vm.img      to another host
  mirrorpair resync ssh://root@db1/dev/vg0/data /dev/vg0/data
  mirrorpair resync -n --json a.img b.img               what differs, as JSON lines
  mirrorpair resync --rate 50MiB/s a.img tcp://10.0.0.2:7792/srv/a.img
  mirrorpair resync --rsh 'ssh -i key -p 2222' a.img ssh://host/srv/a.img
  mirrorpair resync -n                                  the live mirror: what would it do?
  mirrorpair resync data --wait -y

\b
Exit codes:
  0    the target equals the source (with --dry-run: it is known how much differs)
  1    failed: unreadable image, I/O error, no space, the far end died or spoke another protocol
  2    usage: wrong arguments, missing source, not a file or block device, the same image twice
  11   unknown host, closed port, ssh failed
  12   refused, nothing written: other size, mounted, busy, locked or read-only target
  13   the far end was silent for longer than --timeout
  14   the far end's `serve` does not allow that path, or no writing
  130  interrupted; the next run completes what this one began

\b
Exit codes of the live mirror:
  0    the resync is under way, or nothing differs; with --wait: the nodes are in sync
  1    not confirmed, nothing was done
  2    usage, or no such volume
  10   configuration
  11   no daemon of this node answers, it ended meanwhile, or the peer is not connected
  12   refused: it would lose data
  13   the daemon is silent
  20   split brain or unrelated data (also with --dry-run, which shows it)
  130  interrupted; a resync that has begun goes on in the daemon""",
)
@click.argument("images", nargs=-1, metavar="SOURCE TARGET | [VOLUME]", type=IMAGE)
@click.option("-n", "--dry-run", is_flag=True, help="Write nothing; say how much differs and where.")
@click.option("--verify", is_flag=True, help="Read back what was written and compare it with what was sent.")
@click.option(
    "--resize", is_flag=True, help="Make a target file of another size as large as the source. What is cut off is lost."
)
@transfer_options
@click.option(
    "--full", is_flag=True, help="Live mirror: compare everything, also what is not known to differ. Equal blocks stay."
)
@click.option("--wait", is_flag=True, help="Live mirror: show the progress, and end when the nodes are in sync.")
@click.option(
    "-y",
    "--yes",
    is_flag=True,
    help="Live mirror: do not ask; without a terminal it is needed. A resync of images never asks.",
)
@common_options
@click.pass_context
def command(
    context: click.Context,
    images: tuple[str, ...],
    dry_run: bool,
    verify: bool,
    resize: bool,
    rsh: str | None,
    remote_command: str | None,
    rate: int,
    block_size: int,
    threads: int,
    timeout: float,
    full: bool,
    wait: bool,
    yes: bool,
) -> int:
    """Make TARGET equal to SOURCE by writing only what differs.

    Both images are compared at once, each where it lies; only differing pieces of 4 KiB travel and are written. Zeros
    and holes land as holes, so a sparse image stays sparse. A missing target file is made. A block device may be
    larger than the source: its tail is left alone. The target is synced to disk before the command says it is done.

    SOURCE must not change meanwhile: stop what writes to it, or take a snapshot.

    With a VOLUME of the pair, or nothing for all of them, it is the live mirror's resync, while clients read and
    write: the daemon connects to its peer at once and brings over what differs. It says first what goes where and
    why, and asks. The nodes also do it by themselves whenever they meet again.
    """
    settings = context.find_object(Settings)
    assert settings is not None
    online = len(images) < 2
    for name in OFFLINE if online else ONLINE:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            form = "two images, SOURCE and TARGET" if online else "the live mirror's resync, [VOLUME]"
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to {form}")
    if online:
        from mirrorpair.cli.online import resync_volume

        raise_interrupt_on_termination()
        return resync_volume(settings, images[0] if images else None, full=full, wait=wait, dry_run=dry_run, yes=yes)
    source, target = two_images("resync", images)
    raise_interrupt_on_termination()
    show_warnings(settings)

    from mirrorpair.cli.progress import reporter
    from mirrorpair.errors import Interrupted
    from mirrorpair.offline import resync

    with reporter(settings, "resync", listing=dry_run) as report:
        try:
            result = resync(
                source,
                target,
                dry_run=dry_run,
                verify=verify,
                resize=resize,
                block_size=block_size,
                on_difference=report.difference if dry_run else None,
                keep_ranges=False,
                progress=report.progress,
                rate=rate,
                threads=threads,
                timeout=timeout,
                rsh=rsh,
                remote_command=remote_command,
            )
        except Interrupted as interrupted:
            if interrupted.result is not None:
                report.interrupted(interrupted.result)
            raise
        report.finish(result, _summary(result, block_size))
    return 0


def _summary(result: ResyncResult, block_size: int) -> list[str]:
    from mirrorpair.units import format_exact, format_percent, format_seconds, format_size

    skipped = format_percent(result.skipped_bytes, result.done_bytes)
    took = format_seconds(result.seconds)
    lines: list[str] = []
    if result.dry_run:
        what = "nothing differs" if result.differing_bytes == 0 else f"{format_exact(result.differing_bytes)} differ"
        lines.append(
            f"dry run: {what}, in {result.differing_blocks} blocks of {format_size(block_size)}; "
            f"{skipped} of {format_size(result.done_bytes)} are equal; {took}"
        )
        if result.created:
            lines.append(f"{result.target} does not exist and would be made")
    else:
        wire = f", {format_size(result.wire_bytes)} on the wire" if result.wire_bytes else ""
        checked = ", read back and right" if result.verified else ""
        lines.append(
            f"{result.target} equals {result.source}: {format_size(result.size)}, {skipped} skipped (equal), "
            f"{format_size(result.written_bytes)} written, "
            f"{format_size(result.punched_bytes)} made holes{checked}{wire}; "
            f"{took}"
        )
    if result.resized:
        done = "would be" if result.dry_run else "was"
        lines.append(
            f"{result.target} {done} resized from {format_exact(result.target_size)} to {format_exact(result.size)}"
        )
    if result.ignored_tail_bytes:
        lines.append(
            f"{result.target} is larger: its last {format_exact(result.ignored_tail_bytes)} "
            f"{'would be' if result.dry_run else 'were'} left alone"
        )
    return lines
