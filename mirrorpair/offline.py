"""`compare` and `resync` of two images: files, block devices, or images of a far end. What the commands do, for Python.

Rules:
- "Equal" and "done" are said only of a helper that ended with OK: every completion checked, the target synced.
- A target that this run made, and then wrote nothing to, is removed again when the run fails.
- An unequal size is never glossed over: the tail of a larger block device is ignored and reported, a larger file
  differs.
- However it ends, an interrupted run says what it did (`Interrupted.result`), and the next one completes it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mirrorpair import _core
from mirrorpair.drive import OnDifference, OnProgress, Run, drive
from mirrorpair.errors import Interrupted
from mirrorpair.outcome import AGAIN, Scene, error_of
from mirrorpair.report import CompareResult, ResyncResult, blocks_between
from mirrorpair.sides import (
    Location,
    Options,
    Side,
    check_fit,
    make_options,
    open_both,
    open_the_source,
    open_the_target,
    places_of,
    start_engine,
)
from mirrorpair.units import format_size
from mirrorpair.unwritten import remove_created

if TYPE_CHECKING:
    from collections.abc import Iterator


def compare(
    a: Location,
    b: Location,
    *,
    block_size: int = 65536,
    ranges: bool = True,
    on_difference: OnDifference | None = None,
    progress: OnProgress | None = None,
    rate: int = 0,
    threads: int = 0,
    timeout: float = 30.0,
    rsh: str | None = None,
    remote_command: str | None = None,
) -> CompareResult:
    """Compares two images, writes nothing. Each is a path or a URL, at most one of them a URL.

    `on_difference(offset, length)` hears of each differing range as it is found; with `ranges` they are in the result
    too. `progress(Progress)` is called about ten times a second. `rate`: bytes per second, 0 without limit; `threads`
    0: as many as pay; `timeout`: seconds without a word from the far end. Raises MirrorpairError; Interrupted carries
    what was found.
    """
    started = time.monotonic()
    options = make_options(block_size, rate, threads, timeout, rsh, remote_command)
    places = places_of(a, b)
    found: list[tuple[int, int]] = []
    listen = _listeners(found if ranges else None, on_difference)
    with _interruptible(f"nothing of {places[0]} and {places[1]} was compared"), ExitStack() as stack:
        left, right = open_both(stack, places, options)
        size = min(left.size, right.size)
        larger = left if left.size > right.size else right
        tail = larger.size - size
        scene = _scene(left, right, options, writes=False)
        helper = start_engine(left, right, options, size=size, write=False, recheck=False)
        run = drive(helper, progress=progress, on_difference=listen)
        tail_differs = tail > 0 and not larger.device
        finished = run.outcome.status == _core.OUTCOME_OK
        if tail_differs and finished:
            _tell_tail(found if ranges else None, on_difference, size, tail)
        counted = tail if tail_differs else 0
        counters = run.counters
        result = CompareResult(
            a=left.name,
            b=right.name,
            equal=finished and counters.differing_bytes == 0 and not tail_differs,
            size=size,
            a_size=left.size,
            b_size=right.size,
            ignored_tail_bytes=tail if larger.device else 0,
            differing_bytes=counters.differing_bytes + counted,
            differing_blocks=counters.differing_blocks + blocks_between(size, size + counted, block_size),
            ranges=found,
            done_bytes=counters.done_bytes,
            skipped_bytes=counters.skipped_bytes,
            sent_bytes=counters.sent_bytes,
            wire_bytes=counters.wire_out_bytes + counters.wire_in_bytes,
            rate=run.average_rate,
            seconds=time.monotonic() - started,
        )
        _conclude(
            run,
            scene,
            (left, right),
            result,
            f"interrupted: {format_size(counters.done_bytes)} of {format_size(size)} compared, "
            f"{format_size(counters.differing_bytes)} of them differ",
        )
    return result


verify = compare  # under the name of the command


def resync(
    source: Location,
    target: Location,
    *,
    dry_run: bool = False,
    verify: bool = False,
    resize: bool = False,
    block_size: int = 65536,
    on_difference: OnDifference | None = None,
    keep_ranges: bool = True,
    progress: OnProgress | None = None,
    rate: int = 0,
    threads: int = 0,
    timeout: float = 30.0,
    rsh: str | None = None,
    remote_command: str | None = None,
) -> ResyncResult:
    """Makes `target` equal to `source` by writing only what differs. Each is a path or a URL, at most one of them a
    URL.

    A missing target file is made, sparse; a file of another size is refused unless `resize`. `verify` reads back what
    was written. With `dry_run` nothing is written and the result tells how much differs, and where: in `ranges`,
    unless `keep_ranges` is False, and to `on_difference`. The rest is as in `compare`. Raises MirrorpairError;
    Interrupted carries what was done.
    """
    started = time.monotonic()
    options = make_options(block_size, rate, threads, timeout, rsh, remote_command)
    places = places_of(source, target)
    found: list[tuple[int, int]] = []
    listen = _listeners(found if keep_ranges else None, on_difference) if dry_run else None
    with _interruptible(f"nothing was written to {places[1]}"), ExitStack() as stack:
        src = open_the_source(stack, places[0], options, write=not dry_run)
        dst = open_the_target(stack, places[1], options, src, resize=resize, dry_run=dry_run)
        before = dst.size
        if dry_run:
            check_fit(dst, src.size, resize)
        size = min(src.size, dst.size)  # less than the source only in a dry run of a target that would grow
        growth = src.size - size
        scene = _scene(src, dst, options, writes=not dry_run)
        written = 0
        try:
            helper = start_engine(src, dst, options, size=size, write=not dry_run, recheck=verify and not dry_run)
            written = 1  # whatever ends drive() early has not been able to tell
            run = drive(helper, progress=progress, on_difference=listen)
            counters = run.counters
            written = counters.written_bytes + counters.punched_bytes
            finished = run.outcome.status == _core.OUTCOME_OK
            if growth and finished:
                _tell_tail(found if keep_ranges else None, on_difference, size, growth)
            result = ResyncResult(
                source=src.name,
                target=dst.name,
                dry_run=dry_run,
                size=src.size,
                target_size=before,
                created=dst.created,
                resized=resize and not dst.device and before != src.size,
                verified=verify and finished and not dry_run,
                ignored_tail_bytes=before - src.size if dst.device else 0,
                done_bytes=counters.done_bytes,
                skipped_bytes=counters.skipped_bytes,
                sent_bytes=counters.sent_bytes,
                differing_bytes=counters.differing_bytes + growth,
                differing_blocks=counters.differing_blocks + blocks_between(size, size + growth, block_size),
                written_bytes=counters.written_bytes,
                punched_bytes=counters.punched_bytes,
                wire_bytes=counters.wire_out_bytes + counters.wire_in_bytes,
                ranges=found,
                rate=run.average_rate,
                seconds=time.monotonic() - started,
            )
            _conclude(
                run,
                scene,
                (src, dst),
                result,
                f"interrupted: {format_size(counters.done_bytes)} of {format_size(size)} compared, "
                + (f"{format_size(written)} written; {AGAIN}" if not dry_run else "nothing written (dry run)"),
            )
        except BaseException:
            if written == 0 and dst.image is not None and dst.image.created and not dry_run:
                remove_created(dst.image)
            raise
    return result


def _listeners(found: list[tuple[int, int]] | None, on_difference: OnDifference | None) -> OnDifference | None:
    if found is None:
        return on_difference
    if on_difference is None:
        return lambda offset, length: found.append((offset, length))

    def both(offset: int, length: int) -> None:
        found.append((offset, length))
        on_difference(offset, length)

    return both


def _tell_tail(
    found: list[tuple[int, int]] | None, on_difference: OnDifference | None, offset: int, length: int
) -> None:
    """The part that only one of the two has. It may touch the last range; two ranges that touch are still true."""
    if on_difference is not None:
        on_difference(offset, length)
    if found is None:
        return
    if found and sum(found[-1]) == offset:
        offset, length = found[-1][0], found[-1][1] + length
        found.pop()
    found.append((offset, length))


def _scene(source: Side, target: Side, options: Options, *, writes: bool) -> Scene:
    far = source.far or target.far
    return Scene(
        source=source.name,
        target=target.name,
        peer="" if far is None else far.name,
        timeout=options.timeout,
        writes=writes,
    )


def _conclude(run: Run, scene: Scene, sides: tuple[Side, Side], result: object, interrupted: str) -> None:
    """Raises unless the run ended well. One that finished although somebody wanted it stopped did finish."""
    status = run.outcome.status
    if status == _core.OUTCOME_OK:
        return
    if run.interrupted or status == _core.OUTCOME_CANCELLED:
        raise Interrupted(interrupted, result)
    ending = ""
    if status == _core.OUTCOME_PEER_GONE:
        for side in sides:
            ending = ending or ("" if side.far is None else side.far.connection.ending())
    error = error_of(run.outcome, scene, ending)
    assert error is not None
    raise error


@contextmanager
def _interruptible(nothing_done: str) -> Iterator[None]:
    """A KeyboardInterrupt outside the engine's run: while images are opened, a far end is reached, or all is closed."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {nothing_done}") from None
