"""Failure detector and promise arithmetic (A10, A11, A12), driven by made-up clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mirrorpair.liveness import KEPT_BEATS, MAX_PROMISE_NS, Beats, Hearing, Promises, Timing

if TYPE_CHECKING:
    import random

MS = 10**6
S = 10**9
DEFAULT = Timing(interval_ns=250 * MS, promise_ns=3 * S, suspect_after=4)


def test_a10_a_promise_is_counted_from_the_moment_the_beat_was_sent() -> None:
    beats = Beats(DEFAULT)
    seq = beats.send(10 * S)
    assert beats.reply(seq, 3 * S, 11 * S)
    assert beats.valid_until_ns == 10 * S + 2970 * MS - 100 * MS
    assert beats.rtt_ns == 1 * S


def test_a10_each_reply_carries_its_own_promise_and_none_shortens_an_earlier_one() -> None:
    beats = Beats(DEFAULT)
    first, second, third = beats.send(0), beats.send(250 * MS), beats.send(500 * MS)
    assert beats.reply(second, 3 * S, 300 * MS)
    until = beats.valid_until_ns
    assert beats.reply(first, 3 * S, 301 * MS)  # overtaken on the way
    assert beats.valid_until_ns == until
    assert beats.reply(third, 0, 600 * MS)  # it is alive but promises nothing
    assert beats.valid_until_ns == until
    assert beats.rtt_ns == 100 * MS


def test_a10_a_reply_counts_once_and_only_to_a_beat_of_ours() -> None:
    beats = Beats(DEFAULT)
    seq = beats.send(0)
    assert not beats.reply(seq + 1, 3 * S, 1)
    assert not beats.reply(-7, 3 * S, 1)
    assert beats.valid_until_ns == 0
    assert beats.reply(seq, 3 * S, 1)
    before = beats.valid_until_ns
    assert not beats.reply(seq, MAX_PROMISE_NS, 2)
    assert beats.valid_until_ns == before


def test_a_promise_longer_than_an_hour_is_not_believed() -> None:
    beats = Beats(DEFAULT)
    assert beats.reply(beats.send(0), MAX_PROMISE_NS + 1, 1)
    assert beats.valid_until_ns == 0


def test_beats_without_reply_are_forgotten_after_a_while() -> None:
    beats = Beats(DEFAULT)
    first = beats.send(0)
    for number in range(KEPT_BEATS):
        beats.send(number)
    assert not beats.reply(first, 3 * S, 10)


def test_replies_of_an_earlier_session_count_no_more_but_what_was_promised_stays() -> None:
    beats = Beats(DEFAULT)
    seq = beats.send(0)
    beats.reply(beats.send(0), 3 * S, 1)
    until = beats.valid_until_ns
    beats.forget()
    assert not beats.reply(seq, 3 * S, 2)
    assert beats.valid_until_ns == until
    beats.released()
    assert beats.valid_until_ns == 0


def test_suspicion_begins_after_k_intervals_of_silence() -> None:
    hearing = Hearing(DEFAULT)
    assert hearing.suspected(0)
    assert hearing.age_ns(0) is None
    assert hearing.suspect_at_ns is None
    hearing.heard(5 * S)
    assert hearing.suspect_at_ns == 6 * S
    assert not hearing.suspected(6 * S - 1)
    assert hearing.suspected(6 * S)
    hearing.heard(4 * S)  # an older word, read later
    assert hearing.age_ns(6 * S) == 1 * S


def test_a11_a_node_that_started_is_bound_for_a_full_promise() -> None:
    promises = Promises(DEFAULT, 7 * S)
    assert promises.bound(7 * S + 3030 * MS - 1)
    assert not promises.bound(7 * S + 3030 * MS)


def test_a11_a_promise_binds_from_the_moment_the_beat_was_received_and_never_gets_shorter() -> None:
    promises = Promises(DEFAULT, 0)
    assert promises.give(10 * S) == 3 * S
    assert promises.remaining_ns(10 * S) == 3030 * MS
    promises.give(9 * S)
    assert promises.bound_until_ns == 13030 * MS
    promises.release(11 * S)
    assert not promises.bound(11 * S)
    promises.release(12 * S)
    assert promises.bound_until_ns == 11 * S


@pytest.mark.parametrize(
    "numbers",
    [
        {"interval_ns": 0, "promise_ns": S, "suspect_after": 4},
        {"interval_ns": S, "promise_ns": S, "suspect_after": 4},  # runs out before the next beat
        {"interval_ns": MS, "promise_ns": 100 * MS, "suspect_after": 4},  # nothing left of it after delta
        {"interval_ns": MS, "promise_ns": S, "suspect_after": 0},
        {"interval_ns": MS, "promise_ns": MAX_PROMISE_NS + 1, "suspect_after": 1},
        {"interval_ns": MS, "promise_ns": S, "suspect_after": 1, "rho_per_mille": 1000},
    ],
)
def test_numbers_by_which_nothing_is_protected_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"promise|interval|rho"):
        Timing(**numbers)


def drive(rng: random.Random, timing: Timing, *, skew_per_mille: float) -> int:
    """The least true time by which a holder's validity ended before the giver was free, over many exchanges with any
    delay. Two clocks that run wrong by up to `skew_per_mille` against each other, with any offset."""
    rate = [1 + rng.uniform(-skew_per_mille, skew_per_mille) / 2000 for _ in range(2)]
    offset = [rng.randrange(-(10**15), 10**15) for _ in range(2)]

    def clock(node: int, true: float) -> int:
        return int(true * rate[node]) + offset[node]

    def true_time(node: int, shown: int) -> float:
        return (shown - offset[node]) / rate[node]

    beats, promises = Beats(timing), Promises(timing, clock(1, 0) - 10**12)
    true = 0.0
    margin = 10**12
    for _ in range(50):
        true += rng.uniform(0, 2 * timing.interval_ns)
        seq = beats.send(clock(0, true))
        received = true + rng.expovariate(1 / (50 * MS))
        promise = promises.give(clock(1, received))
        answered = received + rng.expovariate(1 / (50 * MS))
        if rng.random() < 0.8:
            beats.reply(seq, promise, clock(0, answered))
        if beats.valid_until_ns:
            margin = min(margin, int(true_time(1, promises.bound_until_ns) - true_time(0, beats.valid_until_ns)))
    return margin


def test_a10_a11_the_holders_validity_ends_before_the_giver_is_free(rng: random.Random) -> None:
    for _ in range(300):
        timing = Timing(
            interval_ns=rng.choice([100, 250, 1000]) * MS, promise_ns=rng.choice([3, 10]) * S, suspect_after=4
        )
        assert drive(rng, timing, skew_per_mille=10) >= 0


def test_the_check_above_bites_when_clocks_run_further_apart_than_rho(rng: random.Random) -> None:
    timing = Timing(interval_ns=100 * MS, promise_ns=10 * S, suspect_after=4, rho_per_mille=0, delta_ns=0)
    assert min(drive(rng, timing, skew_per_mille=100) for _ in range(300)) < 0
