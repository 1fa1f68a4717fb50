"""What a peer that comes back costs: `resync-bitmap`, `resync-full-equal`, `during-resync`, `absence-1s`.

Rules:
- `seconds` runs from the peer's return (its start, its SIGCONT, the request for a resync) until both nodes say
  "synced"; `engine_s` from the data link to the target's durable "everything is here", by the source's own events:
  without the start of a process and without the back-off of who dials.
- Since a resync ends with a flush on the target, so do the floors it is judged by.
- What is made to differ is written through NBD while the peer is away, other bytes each time; the bits that the source
  then counts must cover it. In the end both images hold the same bytes.
- An absence of one second is one second by the clock: here, and only here, the time is what is measured.
"""

from __future__ import annotations

import random
import signal
import statistics
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from bench.campaign import Group, Sample, Series
from bench.daemons import SCANNED, SEED, SERVED, LivePair, Node, flush_file, need_client
from bench.fio import WRITE_1, Running, fill
from bench.images import SCATTERED_4K, SCATTERED_64K, Pattern
from bench.live import LivePlan, Scale, answer, guarded, need_room, start
from bench.measure import idle_share, run
from bench.settings import BLOCK, GIB, KIB, MIB
from bench.workshop import Failed, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

RESYNC_BITMAP = "resync-bitmap"
RESYNC_FULL = "resync-full-equal"
DURING = "during-resync"
ABSENCE = "absence-1s"

PATTERNS = {"64 KiB": SCATTERED_64K, "4 KiB": SCATTERED_4K}
FULL = "mirrorpair full, equal"
FULL_FLOOR = "floor digest pass of both images"
IDLE_RESYNC = "mirrorpair resync, no client"
BUSY_RESYNC = "mirrorpair resync, client writing"
CLIENT_DURING = "4k write, depth 1, during the resync"
CLIENT_AFTER = "4k write, depth 1, after it"
HUNG = "mirrorpair peer hangs (SIGSTOP)"
KILLED = "mirrorpair peer killed and started again"

_IN_FLIGHT = 32
_FAST = 'profile = "fast"'
_ABSENCE_S = 1.0
_FEW = 20


def bitmap(dirt: str) -> str:
    return f"mirrorpair bitmap, 1 % in {dirt}"


def floor_blocks(dirt: str) -> str:
    return f"floor read+send+write of the blocks, flushed, 1 % in {dirt}"


def floor_blocks_unflushed(dirt: str) -> str:
    return f"floor read+send+write of the blocks, 1 % in {dirt}"


def floor_pieces(dirt: str) -> str:
    return f"floor read+send+write of the pieces, flushed, 1 % in {dirt}"


# --- steps -----------------------------------------------------------------------------------------------------------


def in_blocks(pieces: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The same, widened to whole blocks of the bitmap and merged."""
    merged: list[tuple[int, int]] = []
    for offset, length in pieces:
        first, end = offset // BLOCK * BLOCK, min(size, -(-(offset + length) // BLOCK) * BLOCK)
        if merged and sum(merged[-1]) >= first:
            merged[-1] = (merged[-1][0], end - merged[-1][0])
        else:
            merged.append((first, end - first))
    return merged


def write_pieces(node: Node, pieces: Iterable[tuple[int, int]], rng: random.Random) -> None:
    """Random bytes through NBD, several requests in flight, flushed at the end."""
    from mirrorpair.errors import MirrorpairError

    try:
        with node.client() as client:
            pending: deque[Any] = deque()
            for offset, length in pieces:
                for at in range(offset, offset + length, MIB):
                    data = rng.randbytes(min(MIB, offset + length - at))
                    pending.append(client.start_write(at, data))
                    if len(pending) >= _IN_FLIGHT:
                        pending.popleft().wait()
            for one in pending:
                one.wait()
            client.flush()
    except MirrorpairError as error:
        raise Failed(f"{node.name}: {error}; its log ends: {node.tail()}") from error


def resync_times(source: Node, since: int) -> tuple[float, float]:
    """When the last resync of `source` began and ended, in seconds since 1970."""
    begun = ended = None
    for event in source.events(since):
        if event.kind == "link" and event.reason.startswith("mirroring with"):
            begun, ended = event.time_s, None
        elif event.kind == "resync" and begun is not None:
            ended = event.time_s
    if begun is None or ended is None:
        raise Failed(f"{source.name} has no event of a resync that began and ended")
    return begun, ended


def _flush(pair: LivePair) -> None:
    for node in pair.nodes:
        flush_file(node.image)


def _return_of_beta(pair: LivePair, back: Callable[[], None]) -> Sample:
    """From `back` on until both are in sync."""
    idle = idle_share(0.02)
    since = pair.alpha.last_seq()
    before = time.perf_counter()
    back()
    pair.alpha.wait("synced")
    if pair.beta.runs:
        pair.beta.until_up()
    pair.beta.wait("synced")
    seconds = time.perf_counter() - before
    begun, ended = resync_times(pair.alpha, since)
    return Sample(seconds, max(ended - begun, 1e-6), idle_before=idle, facts={"begun": begun, "ended": ended})


def _full(pair: LivePair) -> Sample:
    idle = idle_share(0.02)
    since = pair.alpha.last_seq()
    before = time.perf_counter()
    pair.alpha.ask(lambda client: client.resync(full=True, wait=True))
    pair.synced()
    seconds = time.perf_counter() - before
    begun, ended = resync_times(pair.alpha, since)
    return Sample(seconds, max(ended - begun, 1e-6), idle_before=idle, facts={"bytes": pair.size})


def _floor(shop: Workshop, *argv: object) -> Sample:
    idle = idle_share(0.02)
    result = run([str(word) for word in argv], cwd=shop.folder)
    if result.status != 0:
        raise Failed(f"{argv[0]} ended with {result.status}: {result.tail()}")
    facts = answer(result.stdout)
    return Sample(result.seconds, facts["seconds"], result.user_s + result.system_s, idle, facts)


def _state(shop: Workshop, group: Group, pair: LivePair) -> None:
    states = shop.image_tool("state", pair.alpha.image, pair.beta.image)
    group.facts["resident"] = tuple(x["resident"] for x in states)
    if all(x["folio_kib"] is not None for x in states):
        group.facts["folio_kib"] = tuple(x["folio_kib"] for x in states)


def _prepare(shop: Workshop, plan: LivePlan, size: int, chunk: int, images: int) -> tuple[Group, int]:
    """The group, and how many rounds."""
    shop.mirrorpair()
    need_client()
    need_room(shop, images * size)
    rounds = Scale.of(shop.settings).rounds
    group = Group(plan.name, plan.title, size)
    group.facts = {"chunk": chunk, "rounds": rounds, "axis": "seconds, median"}
    for name in plan.subjects:
        start(group, name, "floor" if name.startswith("floor") else "mirrorpair")
    return group, rounds


def _in_turn(group: Group, rounds: int, steps: dict[str, Callable[[], Sample]]) -> None:
    """Each round begins with another one."""
    names = list(steps)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            guarded(group.series[name], steps[name])


def _finish(group: Group, pair: LivePair) -> None:
    """A pair that ends with unequal images has failed in everything."""
    try:
        pair.finish()
    except Failed as error:
        for series in group.series.values():
            if series.kind == "mirrorpair":
                series.state, series.reason = "failed", str(error)


# --- resync-bitmap, resync-full-equal --------------------------------------------------------------------------------


def _measure_bitmap(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    size = min(shop.settings.size, 2 * GIB)
    group, rounds = _prepare(shop, plan, size, SCANNED, 3)
    rng = random.Random(SEED)
    with LivePair(shop, size) as pair:
        pair.up(SCANNED)
        scratch = pair.folder / "scratch.img"
        shop.image_tool("clone", pair.alpha.image, scratch, f"--chunk={SCANNED}")
        steps: dict[str, Callable[[], Sample]] = {}
        for dirt, pattern in PATTERNS.items():
            pieces = pattern.pieces(size)
            blocks = in_blocks(pieces, size)
            steps[bitmap(dirt)] = lambda pattern=pattern: _bitmap(pair, pattern, rng)
            for name, listed, options in (
                (floor_blocks(dirt), blocks, ("--sync",)),
                (floor_blocks_unflushed(dirt), blocks, ()),
                (floor_pieces(dirt), pieces, ("--sync",)),
            ):
                path = pair.folder / f"{len(steps)}.list"
                path.write_bytes(b"".join(struct.pack("=QQ", *piece) for piece in listed))
                argv = (shop.program("dirtylist"), pair.alpha.image, scratch, path, "--over=tcp", *options)

                def floor(argv: tuple[object, ...] = argv) -> Sample:
                    flush_file(scratch)
                    return _floor(shop, *argv)

                steps[name] = floor
        steps[FULL] = lambda: _full(pair)
        _in_turn(group, rounds, steps)
        _state(shop, group, pair)
        _finish(group, pair)
    return group


def _bitmap(pair: LivePair, pattern: Pattern, rng: random.Random) -> Sample:
    pieces = pattern.pieces(pair.size)
    pair.beta.stop()
    write_pieces(pair.alpha, pieces, rng)
    counted = pair.alpha.ask(lambda client: client.status()).volumes[0].out_of_sync_bytes
    wanted = sum(length for _, length in in_blocks(pieces, pair.size))
    if counted < wanted:
        raise Failed(f"alpha counts {counted} bytes out of sync, {wanted} were written (M3)")
    _flush(pair)
    sample = _return_of_beta(pair, pair.beta.start)
    sample.facts |= {"out_of_sync_bytes": counted, "written_bytes": sum(length for _, length in pieces)}
    assert sample.engine_s is not None
    sample.facts["bytes_per_s"] = counted / sample.engine_s
    return sample


def _measure_full(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    size = min(shop.settings.size, 4 * GIB)
    group, rounds = _prepare(shop, plan, size, SCANNED, 2)
    with LivePair(shop, size) as pair:
        pair.up(SCANNED)
        argv = (shop.program("digestpass"), pair.alpha.image, pair.beta.image)
        _in_turn(group, rounds, {FULL: lambda: _full(pair), FULL_FLOOR: lambda: _floor(shop, *argv)})
        for sample in group.series[FULL].samples:
            assert sample.engine_s is not None
            sample.facts["bytes_per_s"] = size / sample.engine_s
        _state(shop, group, pair)
        _finish(group, pair)
    return group


# --- during-resync ---------------------------------------------------------------------------------------------------


def _measure_during(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    size = min(shop.settings.size, 2 * GIB)
    group, rounds = _prepare(shop, plan, size, SERVED, 2)
    with LivePair(shop, size) as pair:
        pair.up(SERVED)
        _in_turn(
            group,
            rounds,
            {IDLE_RESYNC: lambda: _everything(pair), BUSY_RESYNC: lambda: _with_client(pair, group.series)},
        )
        for name in (CLIENT_DURING, CLIENT_AFTER):
            series, busy = group.series[name], group.series[BUSY_RESYNC]
            if not series.samples:
                series.state = "failed" if busy.state == "failed" else "absent"
                series.reason = busy.reason or series.reason
        _state(shop, group, pair)
        _finish(group, pair)
    return group


def _all_differs(pair: LivePair) -> None:
    """beta is away, and every block was written."""
    pair.beta.stop()
    fill(pair.shop, pair.alpha.uri, pair.size)
    counted = pair.alpha.ask(lambda client: client.status()).volumes[0].out_of_sync_bytes
    if counted != pair.size:
        raise Failed(f"every byte was written, and alpha counts {counted} of {pair.size} out of sync")
    different = int(pair.shop.image_tool("equal", pair.alpha.image, pair.beta.image)[0]["different"])
    if different < 0.99 * pair.size:
        raise Failed(f"only {different} of {pair.size} bytes differ")
    _flush(pair)


def _everything(pair: LivePair) -> Sample:
    _all_differs(pair)
    return _told_rate(pair, _return_of_beta(pair, pair.beta.start))


def _told_rate(pair: LivePair, sample: Sample) -> Sample:
    assert sample.engine_s is not None
    sample.facts |= {"bytes": pair.size, "bytes_per_s": pair.size / sample.engine_s}
    return sample


def _with_client(pair: LivePair, series: dict[str, Series]) -> Sample:
    _all_differs(pair)
    with Running(pair.shop, pair.alpha.uri, WRITE_1, pair.size) as client:
        _until_writing(pair.alpha, client)
        sample = _told_rate(pair, _return_of_beta(pair, pair.beta.start))
        begun, ended = sample.facts["begun"], sample.facts["ended"]
        time.sleep(max(0.5, Scale.of(pair.shop.settings).seconds))  # how long the client is watched without a resync
        rows = client.stop()
    during = [took for at, took in rows if begun <= at < ended]
    after = [took for at, took in rows if at > ended + 0.1]
    for name, found in ((CLIENT_DURING, during), (CLIENT_AFTER, after)):
        if len(found) >= _FEW:
            series[name].samples.append(_latencies(found, sample.idle_before))
        elif not series[name].samples:
            series[name].reason = f"only {len(found)} requests fell into a round's time: take a larger size"
    return sample


def _until_writing(node: Node, client: Running) -> None:
    deadline = time.monotonic() + 60.0
    while True:
        client.check()
        if node.ask(lambda admin: admin.status()).volumes[0].clients:
            return
        if time.monotonic() > deadline:
            raise Failed("fio did not connect within 60 s")


def _latencies(found: list[float], idle: float) -> Sample:
    ordered = sorted(found)
    p50 = statistics.median(ordered)
    facts = {"p50_us": p50 * 1e6, "p99_us": ordered[len(ordered) * 99 // 100] * 1e6, "requests": len(found)}
    return Sample(p50, idle_before=idle, facts=facts)


# --- absence-1s ------------------------------------------------------------------------------------------------------


def _measure_absence(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    size = Scale.of(shop.settings).size
    group, rounds = _prepare(shop, plan, size, SERVED, 2)
    group.facts["heartbeat"] = "profile fast: 100 ms, promise 1 s"
    rng = random.Random(SEED)
    with LivePair(shop, size, heartbeat=_FAST) as pair:
        pair.up(SERVED)

        def hung() -> Sample:
            return _absence(
                pair,
                rng,
                lambda: pair.beta.signal(signal.SIGSTOP),
                lambda: pair.beta.signal(signal.SIGCONT),
            )

        def killed() -> Sample:
            return _absence(pair, rng, pair.beta.kill, pair.beta.start)

        _in_turn(group, rounds, {HUNG: hung, KILLED: killed})
        _finish(group, pair)
    return group


def _absence(pair: LivePair, rng: random.Random, leave: Callable[[], None], back: Callable[[], None]) -> Sample:
    pieces = [(rng.randrange(pair.size // SERVED) * SERVED, 4 * KIB) for _ in range(64)]
    left = time.monotonic()
    leave()
    write_pieces(pair.alpha, pieces, rng)  # they wait until alpha has noticed
    noticed = time.monotonic() - left
    in_sync = pair.alpha.ask(lambda client: client.status()).in_sync
    if "beta" in in_sync:
        raise Failed(f"writes were answered without beta, and the in-sync set is {in_sync} (A1)")
    time.sleep(max(0.0, left + _ABSENCE_S - time.monotonic()))
    sample = _return_of_beta(pair, back)
    sample.facts["writes_held_s"] = noticed
    sample.facts["absent_s"] = max(noticed, _ABSENCE_S)
    return sample


BITMAP_PLAN = LivePlan(
    RESYNC_BITMAP,
    "bitmap resync of 1 % dirt, after the peer was away",
    (
        *(
            name
            for dirt in PATTERNS
            for name in (bitmap(dirt), floor_blocks(dirt), floor_blocks_unflushed(dirt), floor_pieces(dirt))
        ),
        FULL,
    ),
    _measure_bitmap,
)
FULL_PLAN = LivePlan(RESYNC_FULL, "full compare of equal images", (FULL, FULL_FLOOR), _measure_full)
DURING_PLAN = LivePlan(
    DURING,
    "a client beside a resync of everything",
    (IDLE_RESYNC, BUSY_RESYNC, CLIENT_DURING, CLIENT_AFTER),
    _measure_during,
)
ABSENCE_PLAN = LivePlan(ABSENCE, "from the peer's return after 1 s until in sync", (HUNG, KILLED), _measure_absence)
