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
from mirrorpair.interrupts import Hold
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
    nothing = f"interrupted: nothing of {places[0]} and {places[1]} was compared"
    with _interruptible(nothing) as course, ExitStack() as stack:
        left, right = open_both(stack, places, options)
        size = min(left.size, right.size)
        larger = left if left.size > right.size else right
        tail = larger.size - size
        scene = _scene(left, right, options, writes=False)
        differing_tail = 0 if larger.device else tail
        hold = stack.enter_context(Hold())
        helper = start_engine(left, right, options, size=size, write=False, recheck=False, hold=hold)
        run = drive(helper, progress=progress, on_difference=listen, tail=(size, differing_tail), hold=hold)
        counters = run.counters
        counted = differing_tail if run.finished else 0
        result = CompareResult(
            a=left.name,
            b=right.name,
            equal=run.finished and counters.differing_bytes == 0 and differing_tail == 0,
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
        course.reached(
            f"interrupted: {format_size(counters.done_bytes)} of {format_size(size)} compared, "
            f"{format_size(counters.differing_bytes)} of them differ",
            result,
        )
        _conclude(run, hold, scene, (left, right))
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
    with _interruptible(f"interrupted: nothing was written to {places[1]}") as course, ExitStack() as stack:
        src = open_the_source(stack, places[0], options, write=not dry_run)
        dst = open_the_target(stack, places[1], options, src, resize=resize, dry_run=dry_run)
        if dry_run:
            check_fit(dst, src.size, resize)
        size = min(src.size, dst.size)  # less than the source only in a dry run of a target that would grow
        growth = src.size - size
        scene = _scene(src, dst, options, writes=not dry_run)
        written = 0
        try:
            hold = stack.enter_context(Hold())
            recheck = verify and not dry_run
            helper = start_engine(src, dst, options, size=size, write=not dry_run, recheck=recheck, hold=hold)
            written = 1  # whatever ends drive() early has not been able to tell
            run = drive(helper, progress=progress, on_difference=listen, tail=(size, growth), hold=hold)
            counters = run.counters
            written = counters.written_bytes + counters.punched_bytes
            counted = growth if run.finished else 0
            result = ResyncResult(
                source=src.name,
                target=dst.name,
                dry_run=dry_run,
                size=src.size,
                target_size=dst.found_size,
                created=dst.created,
                resized=not dst.device and not dst.created and dst.found_size != src.size,
                verified=recheck and run.finished,
                ignored_tail_bytes=dst.size - src.size if dst.device else 0,
                done_bytes=counters.done_bytes,
                skipped_bytes=counters.skipped_bytes,
                sent_bytes=counters.sent_bytes,
                differing_bytes=counters.differing_bytes + counted,
                differing_blocks=counters.differing_blocks + blocks_between(size, size + counted, block_size),
                written_bytes=counters.written_bytes,
                punched_bytes=counters.punched_bytes,
                wire_bytes=counters.wire_out_bytes + counters.wire_in_bytes,
                ranges=found,
                rate=run.average_rate,
                seconds=time.monotonic() - started,
            )
            course.reached(
                f"interrupted: {format_size(counters.done_bytes)} of {format_size(size)} compared, "
                + ("nothing written (dry run)" if dry_run else f"{format_size(written)} written; {AGAIN}"),
                result,
            )
            _conclude(run, hold, scene, (src, dst))
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


def _scene(source: Side, target: Side, options: Options, *, writes: bool) -> Scene:
    far = source.far or target.far
    return Scene(
        source=source.name,
        target=target.name,
        peer="" if far is None else far.name,
        timeout=options.timeout,
        again=AGAIN if writes else "run the same command again",
    )


def _conclude(run: Run, hold: Hold, scene: Scene, sides: tuple[Side, Side]) -> None:
    """Raises unless the run ended well. One that finished although somebody wanted it stopped did finish."""
    status = run.outcome.status
    if run.finished:
        return
    if run.interrupted or hold.pending is not None or status == _core.OUTCOME_CANCELLED:
        raise KeyboardInterrupt
    ending = ""
    if status == _core.OUTCOME_PEER_GONE:
        for side in sides:
            ending = ending or ("" if side.far is None else side.far.connection.ending())
    error = error_of(run.outcome, scene, ending)
    assert error is not None
    raise error


class _Course:
    """What can be said truly of a run that is interrupted at this moment."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self.result: object = None

    def reached(self, sentence: str, result: object) -> None:
        self.sentence, self.result = sentence, result


@contextmanager
def _interruptible(sentence: str) -> Iterator[_Course]:
    """Turns a KeyboardInterrupt, whenever it comes (while images are opened, a far end is reached, the engine runs, all
    is closed), into an Interrupted that carries how far it got."""
    course = _Course(sentence)
    try:
        yield course
    except KeyboardInterrupt:
        raise Interrupted(course.sentence, course.result) from None
