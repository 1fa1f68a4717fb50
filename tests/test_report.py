"""R11: progress is always true, whatever the core counted."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.report import Meter, Ranges, blocks_between


class Counted(NamedTuple):
    total_bytes: int = 0
    done_bytes: int = 0
    skipped_bytes: int = 0
    sent_bytes: int = 0
    differing_bytes: int = 0
    differing_blocks: int = 0
    written_bytes: int = 0
    punched_bytes: int = 0
    wire_out_bytes: int = 0
    wire_in_bytes: int = 0
    recheck_total_bytes: int = 0
    recheck_done_bytes: int = 0


NUMBERS = st.integers(-(2**63), 2**63)


@given(st.lists(st.tuples(st.floats(0, 5), st.tuples(*[NUMBERS] * 12)), max_size=20))
def test_r11_progress_is_clamped_and_never_negative(looks: list[tuple[float, tuple[int, ...]]]) -> None:
    now = 100.0
    meter = Meter(now)
    for step, numbers in looks:
        now += step
        shown = meter.update(Counted(*numbers), now)
        assert 0 <= shown.skipped_bytes <= shown.done_bytes <= shown.total_bytes
        assert 0 <= shown.recheck_done_bytes <= shown.recheck_total_bytes
        assert shown.rate >= 0
        assert shown.eta_s is None or shown.eta_s >= 0
        assert shown.seconds >= 0


def test_a_steady_run_has_its_rate_and_eta() -> None:
    meter = Meter(0.0)
    shown = meter.update(Counted(total_bytes=1000), 0.0)
    assert (shown.rate, shown.eta_s) == (0.0, None)
    for tenth in range(1, 51):
        shown = meter.update(Counted(total_bytes=1000, done_bytes=10 * tenth), tenth / 10)
    assert abs(shown.rate - 100) < 1
    assert shown.eta_s is not None
    assert abs(shown.eta_s - 5) < 0.1


def test_a_stall_shows_within_the_window() -> None:
    meter = Meter(0.0)
    shown = meter.update(Counted(total_bytes=1000), 0.0)
    for tenth in range(200):
        shown = meter.update(Counted(total_bytes=1000, done_bytes=min(500, 10 * tenth)), tenth / 10)
    assert shown.rate == 0
    assert shown.eta_s is None


def test_nothing_to_do_is_done() -> None:
    assert Meter(0.0).update(Counted(), 1.0).eta_s == 0.0


def test_the_recheck_counts_as_work() -> None:
    meter = Meter(0.0)
    meter.update(Counted(total_bytes=100, done_bytes=100, recheck_total_bytes=100), 1.0)
    shown = meter.update(Counted(total_bytes=100, done_bytes=100, recheck_total_bytes=100, recheck_done_bytes=50), 1.5)
    assert shown.eta_s is not None
    assert abs(shown.eta_s - 0.5) < 0.1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=30), st.data())
def test_ranges_come_out_merged_however_they_were_cut(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    pieces, at = [], 0
    for gap, length in steps:
        pieces.append((at + gap, length))
        at += gap + length
    ranges, out = Ranges(), []
    rest = list(pieces)
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        out += ranges.add(rest[:cut])
        rest = rest[cut:]
    out += ranges.finish()
    covered = {byte for offset, length in pieces for byte in range(offset, offset + length)}
    assert {byte for offset, length in out for byte in range(offset, offset + length)} == covered
    assert all(before[0] + before[1] < after[0] for before, after in pairwise(out))
    assert ranges.finish() == []


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([4096, 65536]))
def test_blocks_of_two_neighbouring_ranges_add_up(start: int, length: int, block_size: int) -> None:
    middle = start + length // 2
    whole = blocks_between(start, start + length, block_size)
    assert whole == blocks_between(start, middle, block_size) + blocks_between(middle, start + length, block_size)
    assert blocks_between(0, length, block_size) == -(-length // block_size)
