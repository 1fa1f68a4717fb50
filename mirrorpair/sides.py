"""The two images of a run: opened here or by a far end, checked against each other, and the engine started on them.

    source, target      opened by                                  engine
    here, here          image                                      one helper, no digests
    here, far           image; remote (hello, welcome, start)      helper "source" here, "target" there
    far, here           remote; image                              helper "target" here, "source" there
    far, far            refused

Rules:
- Everything that can be refused is refused before anything is written; the source is open before a target is made.
- What a real run would refuse for its size, a dry run refuses too.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import msgspec

from mirrorpair import _core
from mirrorpair.endpoint import LocalEndpoint, RemoteEndpoint, parse_endpoint
from mirrorpair.errors import RefusedError, UsageError
from mirrorpair.image import Image, open_source, open_target, same_image
from mirrorpair.messages import MAX_THREADS, MAX_TIMEOUT_S, MIN_TIMEOUT_S, Role, Start, is_block_size
from mirrorpair.units import format_exact
from mirrorpair.unwritten import open_or_zeros, size_of

if TYPE_CHECKING:
    from contextlib import ExitStack

    from mirrorpair.interrupts import Hold
    from mirrorpair.remote import FarImage

Location = str | os.PathLike[str]
Place = LocalEndpoint | RemoteEndpoint


class Options(msgspec.Struct, frozen=True, kw_only=True):
    block_size: int
    rate: int
    threads: int
    timeout: float
    rsh: str | None
    remote_command: str | None


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two images, here or there. `found_size`: what it had before it was made or resized."""

    name: str
    size: int
    found_size: int
    device: bool
    created: bool
    image: Image | None = None
    far: FarImage | None = None


def make_options(
    block_size: int, rate: int, threads: int, timeout: float, rsh: str | None, remote_command: str | None
) -> Options:
    if not is_block_size(block_size):
        raise UsageError(f"a block size of {block_size} bytes is not possible: a power of two from 4KiB to 256KiB")
    if not 0 <= rate < 2**63:
        raise UsageError(f"a rate of {rate} bytes per second is not possible; 0 means no limit")
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads are not possible; 0 (automatic) to {MAX_THREADS}")
    if not math.isfinite(timeout) or not MIN_TIMEOUT_S <= timeout <= MAX_TIMEOUT_S:
        raise UsageError(f"a time-out of {timeout:g} s is not possible; 100ms to 1h")
    return Options(
        block_size=block_size,
        rate=rate,
        threads=threads,
        timeout=float(timeout),
        rsh=rsh,
        remote_command=remote_command,
    )


def places_of(a: Location, b: Location) -> tuple[Place, Place]:
    first, second = parse_endpoint(_text(a)), parse_endpoint(_text(b))
    if first.remote and second.remote:
        raise UsageError(f"{first} and {second} are both on far hosts; run the command on one of the two")
    return first, second


def _text(place: Location) -> str:
    text = os.fspath(place)
    if not isinstance(text, str):
        raise UsageError(f"{place!r} is not a path of text; os.fsdecode() makes one")
    return text


def open_both(stack: ExitStack, places: tuple[Place, Place], options: Options) -> tuple[Side, Side]:
    """Both for reading; the one that is here first, since opening it costs nothing."""
    first, second = places
    if isinstance(first, LocalEndpoint):
        left = _here(stack, open_source(first.path))
        if isinstance(second, LocalEndpoint):
            right = _here(stack, open_source(second.path))
            _refuse_same(left, right)
        else:
            right = _there(stack, second, options, "target", write=False, size=left.size)
        return left, right
    assert isinstance(second, LocalEndpoint)
    right = _here(stack, open_source(second.path))
    return _there(stack, first, options, "source", write=False), right


def open_the_source(stack: ExitStack, place: Place, options: Options, *, write: bool) -> Side:
    if isinstance(place, LocalEndpoint):
        return _here(stack, open_source(place.path))
    return _there(stack, place, options, "source", write=write)


def open_the_target(
    stack: ExitStack,
    place: Place,
    options: Options,
    source: Side,
    *,
    resize: bool,
    dry_run: bool,
) -> Side:
    if not isinstance(place, LocalEndpoint):
        return _there(stack, place, options, "target", write=not dry_run, size=source.size, create=True, resize=resize)
    if dry_run:
        side = _here(stack, open_or_zeros(place.path, source.size))
        _refuse_same(source, side)
        return side
    found = size_of(place.path)
    return _here(stack, open_target(place.path, size=source.size, resize=resize, source=source.image), found)


def _here(stack: ExitStack, image: Image, found_size: int | None = None) -> Side:
    stack.enter_context(image)
    found = 0 if image.created else image.size
    return Side(
        name=str(LocalEndpoint(image.path)),
        size=image.size,
        found_size=found if found_size is None or image.kind == "device" else found_size,
        device=image.kind == "device",
        created=image.created,
        image=image,
    )


def _there(
    stack: ExitStack,
    place: RemoteEndpoint,
    options: Options,
    role: Role,
    *,
    write: bool,
    size: int | None = None,
    create: bool = False,
    resize: bool = False,
) -> Side:
    # Sockets and subprocesses cost a quarter of the start; two images on this host need neither.
    from mirrorpair.remote import open_far

    far = stack.enter_context(
        open_far(
            place,
            role,
            write=write,
            size=size,
            create=create,
            resize=resize,
            timeout=options.timeout,
            rsh=options.rsh,
            remote_command=options.remote_command,
        )
    )
    return Side(
        name=far.name,
        size=far.size,
        found_size=far.found_size,
        device=far.kind == "device",
        created=far.created,
        far=far,
    )


def _refuse_same(first: Side, second: Side) -> None:
    if first.image is not None and second.image is not None and same_image(first.image, second.image):
        raise UsageError(f"{first.name} and {second.name} are the same image; there is nothing to do")


def check_fit(target: Side, size: int, resize: bool) -> None:
    """What a real run would refuse, a dry run refuses too."""
    if target.device and target.size < size:
        raise RefusedError(
            f"{target.name} is too small: the device has {format_exact(target.size)}, the source {format_exact(size)}"
        )
    if not target.device and target.size != size and not resize:
        raise RefusedError(
            f"{target.name} has {format_exact(target.size)}, the source {format_exact(size)}; "
            "--resize makes it as large as the source"
        )


def start_engine(
    source: Side, target: Side, options: Options, *, size: int, write: bool, recheck: bool, hold: Hold
) -> _core.Helper:
    """The engine, running. Whoever calls this drives it, within the same hold, so that no interrupt comes between."""
    ranges = not write  # both ends must agree, and the far one knows only `write`
    if source.image is not None and target.image is not None:
        return _core.Helper.local(
            source.image.fd,
            target.image.fd,
            size=size,
            block_size=options.block_size,
            write=write,
            recheck=recheck,
            rate=options.rate,
            threads=options.threads,
            ranges=ranges,
        )
    seed = int.from_bytes(os.urandom(8))
    far = source.far or target.far
    image = source.image or target.image
    assert far is not None
    assert image is not None
    begin_far = Start(
        size=size,
        block_size=options.block_size,
        seed=seed,
        recheck=recheck,
        rate=options.rate,
        timeout=options.timeout,
        threads=options.threads,
    )
    with hold.released():  # its answer may take as long as the time limit
        far.start(begin_far)
    begin = _core.Helper.source if source.image is not None else _core.Helper.target
    return begin(
        image.fd,
        far.channel,
        size=size,
        block_size=options.block_size,
        seed=seed,
        write=write,
        recheck=recheck,
        rate=options.rate,
        threads=options.threads,
        timeout=options.timeout,
        ranges=ranges,
    )
