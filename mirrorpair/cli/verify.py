"""`mirrorpair verify A B`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

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
    from mirrorpair.report import CompareResult

FAILED = 3  # 1 says "they differ" here


@click.command(
    name="verify",
    options_metavar="[OPTIONS]",
    epilog="""\b
Images:
  PATH                            a file or a block device on this host
  ssh://[user@]host[:port]/path   on a host reached by ssh, with mirrorpair installed
  tcp://host:port/path            on a host that runs `mirrorpair serve --listen`
  At most one of the two is on a far host. Paths in URLs are absolute; %20 is a space.

\b
Examples:
  mirrorpair verify a.img b.img
  mirrorpair verify /dev/vg0/data ssh://backup/srv/data.img && echo equal
  mirrorpair verify --json a.img b.img | grep '"difference"'

\b
Exit codes:
  0    equal
  1    they differ, in content or in size
  2    usage: wrong arguments, missing image, not a file or block device, the same image twice
  3    failed: unreadable image, I/O error, the far end died or spoke another protocol
  11   unknown host, closed port, ssh failed
  12   refused: another mirrorpair writes to one of them
  13   the far end was silent for longer than --timeout
  14   the far end's `serve` does not allow that path
  130  interrupted""",
)
@click.argument("images", nargs=-1, metavar="A B", type=IMAGE)
@transfer_options
@common_options
@click.pass_obj
def command(
    settings: Settings,
    images: tuple[str, ...],
    rsh: str | None,
    remote_command: str | None,
    rate: int,
    block_size: int,
    threads: int,
    timeout: float,
) -> int:
    """Compare the images A and B, byte for byte here, by 128-bit digests with a far host. Nothing is written.

    Images of unequal size differ; only the tail of a larger block device is ignored, and reported. Where they differ is
    listed in pieces of 4 KiB, merged: the first ones, all of them with -v or --json.
    """
    settings.failed = FAILED
    a, b = two_images("verify", images)
    raise_interrupt_on_termination()
    show_warnings(settings)

    from mirrorpair.cli.progress import reporter
    from mirrorpair.errors import Interrupted
    from mirrorpair.offline import compare

    with reporter(settings, "verify", listing=True) as report:
        try:
            result = compare(
                a,
                b,
                block_size=block_size,
                ranges=False,
                on_difference=report.difference,
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
    return 0 if result.equal else 1


def _summary(result: CompareResult, block_size: int) -> list[str]:
    from mirrorpair.units import format_exact, format_seconds, format_size

    took = format_seconds(result.seconds)
    lines: list[str] = []
    if result.equal:
        lines.append(f"equal: {result.a} and {result.b}, {format_size(result.size)}; {took}")
    else:
        lines.append(
            f"differ: {result.a} and {result.b}, {format_exact(result.differing_bytes)} "
            f"in {result.differing_blocks} blocks of "
            f"{format_size(block_size)}; {took}"
        )
    if result.ignored_tail_bytes:
        larger = result.a if result.a_size > result.b_size else result.b
        lines.append(f"{larger} is a larger device: its last {format_exact(result.ignored_tail_bytes)} were ignored")
    elif result.a_size != result.b_size:
        lines.append(f"{result.a} has {format_exact(result.a_size)}, {result.b} {format_exact(result.b_size)}")
    return lines
