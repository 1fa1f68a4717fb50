"""Power cuts: whatever the caches had not written, dropped, torn or reordered, on one host or on both.

Rules:
- One life of a pair is recorded (powercut.py), then cut at many times: at those of recorded calls, chosen by the seed.
  MIRRORPAIR_TEST_EVERY=1 takes every one: for the night, about an hour. MIRRORPAIR_TEST_SEED=n repeats a run.
- M3: at each cut the sectors in which the images differ are of dirty blocks or active extents, durable on one host.
- While both are in sync, what was acknowledged is on both hosts (kernel alive), what was flushed is on both (cut).
- The volume has more extents than the activity log has room for, so that extents leave it all the time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from oracle import SECTOR
from powercut import MODES, Host, joined, put
from rig import BLOCK, EVERY, EXTENT, lost, need_boots

from mirrorpair.metadata import (
    BITMAP_OFFSET,
    LOG_EXTENTS,
    LOG_OFFSET,
    LOG_RECORD_BYTES,
    LOG_RECORDS,
    NODE,
    SUPERBLOCK,
    metadata_bytes,
    newest_record,
    parse_record,
)
from mirrorpair.twofold import COPY_BYTES, newest, parse

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from powercut import Event, Sectors
    from rig import Rig

    from mirrorpair.nbdclient import NbdClient

EXTENTS = LOG_EXTENTS + 128
SMALL = (1, 1, 3, 8, 8, 9, 16, 40)
CUTS = 200


def names_of(node: str) -> list[str]:
    return [f"{node}-data.img", f"{node}/shop.{node}/data.meta", f"{node}/shop.{node}/node"]


def extents_of(meta: bytes) -> set[int]:
    """Those that a start would take to differ as a whole."""
    at = range(LOG_OFFSET, LOG_OFFSET + LOG_RECORDS * LOG_RECORD_BYTES, LOG_RECORD_BYTES)
    record = newest_record([parse_record(i, meta[one : one + LOG_RECORD_BYTES]) for i, one in enumerate(at)])
    return set(range(EXTENTS)) if record is None else set(record.extents)


def is_dirty(meta: bytes, block: int) -> bool:
    return bool(meta[BITMAP_OFFSET + block // 8] >> block % 8 & 1)


class Life:
    """What was recorded of a pair, and who had to have what, when."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.init()
        self.hosts = {}
        for node in rig.pair.nodes:
            rig.logs[node.name] = rig.pair.folder / f"{node.name}.calls"
            self.hosts[node.name] = Host(rig.pair.folder, names_of(node.name), rig.logs[node.name])
        self.in_sync: list[tuple[int, int]] = []
        self.resync_ns = 0
        rig.start_both()
        rig.pair.alpha.wait("connected")
        rig.pair.alpha.promote()
        rig.pair.synced()

    def fill_log(self, client: NbdClient) -> None:
        """A sector in as many extents as the activity log has room for."""
        oracle = self.rig.oracle
        for first in range(0, LOG_EXTENTS, 128):
            oracle.landed([oracle.put(client, e * EXTENT // SECTOR, 1) for e in range(first, first + 128)])

    def live(self) -> None:
        rig, pair = self.rig, self.rig.pair
        begin = time.monotonic_ns()
        with lost(), rig.clients() as (client, other):
            self.fill_log(client)
            assert rig.oracle.write(client, 250, other=other, lengths=SMALL)
            self.in_sync.append((begin, time.monotonic_ns()))
            rig.kill(pair.beta)
            assert rig.oracle.write(client, 40, other=other, lengths=SMALL)
        # After a restart the log is empty, so in the resync that follows nothing but the bits says what differs.
        rig.kill(pair.alpha)
        rig.start(pair.alpha)
        pair.alpha.wait("primary")
        self.resync_ns = time.monotonic_ns()
        rig.start(pair.beta)
        pair.synced()
        with rig.clients() as (client, other):
            assert rig.oracle.write(client, 40, other=other, lengths=SMALL)
        rig.recover()  # it compares the images
        for node in pair.nodes:
            rig.kill(node)

    def events(self) -> list[tuple[str, Event]]:
        found = [(name, event) for name, host in self.hosts.items() for event in host.record()]
        return sorted(found, key=lambda one: one[1].clock_ns)

    def check(self, at_ns: int, rng: random.Random) -> None:
        modes = {name: rng.choice(MODES) for name in self.hosts}
        told = f"cut at {at_ns}: {modes}"
        image, meta = {}, {}
        for name, host in self.hosts.items():
            files = names_of(name)
            image[name] = host.cut(files[0], modes[name], rng)
            size = metadata_bytes(self.rig.pair.size, BLOCK)
            meta[name] = joined(host.cut(files[1], modes[name], rng), size)
            node = joined(host.cut(files[2], modes[name], rng), 2 * COPY_BYTES)
            for kind, data in ((SUPERBLOCK, meta[name]), (NODE, node)):
                copies = [parse(kind, i, data[i * COPY_BYTES : (i + 1) * COPY_BYTES]) for i in (0, 1)]
                assert newest((copies[0], copies[1])) is not None, f"{told}: {name} has no {kind.noun} (M2)"
        self._covered(image, meta, told)
        if any(begin <= at_ns <= end for begin, end in self.in_sync):
            for name in self.hosts:
                flushed = modes[name] != "keep"
                found = {at: one for at, one in image[name].items() if any(one)}
                wrong = self.rig.oracle.problems(found, at_ns=at_ns, flushed=flushed)
                assert not wrong, "\n".join(
                    [f"{told}: {name} lacks what was {'flushed' if flushed else 'acked'}", *wrong]
                )

    def _covered(self, image: dict[str, Sectors], meta: dict[str, bytes], told: str) -> None:
        extents = set().union(*map(extents_of, meta.values()))
        one, other = image.values()
        zeros = bytes(SECTOR)
        for at in one.keys() | other.keys():
            if one.get(at, zeros) != other.get(at, zeros):
                block, extent = at * SECTOR // BLOCK, at * SECTOR // EXTENT
                said = extent in extents or any(is_dirty(data, block) for data in meta.values())
                assert said, f"{told}: sector {at} differs, and nobody says so (M3)"


def test_at_any_cut_what_differs_is_dirty_and_what_was_promised_is_there(
    make_rig: Callable[..., Rig], rng: random.Random
) -> None:
    """M3, M4, M5, M7, W5, W7, R3, A7."""

    def place(sectors: int) -> int:
        return rng.randrange(EXTENTS) * (EXTENT // SECTOR) + rng.randrange(64)

    rig = make_rig(size=EXTENTS * EXTENT, place=place)
    life = Life(rig)
    life.live()
    events = life.events()
    late = [i for i, (_, event) in enumerate(events) if event.clock_ns > life.resync_ns]
    chosen = {*rng.sample(range(len(events)), CUTS), *rng.sample(late, min(CUTS, len(late)))}
    if EVERY:
        chosen = set(range(len(events)))
    calls: dict[str, dict] = {name: {} for name in life.hosts}
    for number, (name, event) in enumerate(events):
        life.hosts[name].play(event, calls[name])
        if number in chosen:
            life.check(event.clock_ns, rng)


def test_a_pair_recovers_from_a_power_cut_of_one_host_or_both(make_rig: Callable[..., Rig], rng: random.Random) -> None:
    """A4, A7, F18, H: another boot; nothing acknowledged is lost with one host, nothing flushed with both."""
    need_boots()
    rig = make_rig()
    life = Life(rig)
    pair = rig.pair
    for victims in [("alpha",), ("beta",), ("alpha", "beta")] * (20 if EVERY else 2):
        died = [getattr(pair, name) for name in victims]
        with lost(), rig.clients() as (client, other):
            rig.oracle.write(client, 80, other=other)
            for node in died:
                rig.kill(node)
        print(f"power cut of {victims}")
        for node in died:
            life.hosts[node.name] = _cut(life, node.name, rng)
            rig.new_boot(node)
        rig.start_both()
        primary = rig.recover(pair.beta if victims == ("alpha",) else pair.alpha, check=False)
        rig.check(primary, flushed=len(victims) == 2)
        if primary is pair.beta:
            pair.beta.demote()
            rig.recover(pair.alpha, check=False)


def _cut(life: Life, name: str, rng: random.Random) -> Host:
    """The host's files lose what was pending, and what is left is where the next record begins."""
    folder, host = life.rig.pair.folder, life.hosts[name]
    calls: dict = {}
    for event in host.record():
        host.play(event, calls)
    mode = rng.choice(("drop", "some", "torn"))
    for file in names_of(name):
        put(folder / file, host.cut(file, mode, rng))
    life.rig.logs[name].write_bytes(b"")
    return Host(folder, names_of(name), life.rig.logs[name])
