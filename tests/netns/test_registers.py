"""The judge of what clients saw: histories made by hand, good and bad, and every small one against a search for an
order by brute force."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registers import INITIAL, Answer, Op, fewest_terms, flaw


def write(value: int, called: float, answered: float = math.inf) -> Op:
    return Op(True, value, called, answered)


def read(value: int | None, called: float, answered: float = math.inf) -> Op:
    return Op(False, value, called, answered)


GOOD = {
    "nothing": [],
    "never written": [read(INITIAL, 1, 2), read(INITIAL, 3, 4)],
    "one after the other": [write(1, 1, 2), read(1, 3, 4), write(2, 5, 6), read(2, 7, 8)],
    "old while it is written, then new": [write(1, 1, 9), read(INITIAL, 2, 3), read(1, 4, 5), read(1, 6, 7)],
    "two writes at once, the first one asked for wins": [write(1, 1, 5), write(2, 2, 6), read(1, 7, 8)],
    "an unanswered write is seen, much later": [write(1, 1), write(2, 2, 3), read(2, 4, 5), read(1, 6, 7)],
    "an unanswered write is never seen": [write(1, 1, 2), write(2, 3), read(1, 100, 101)],
    "an unanswered read": [write(1, 1, 2), read(INITIAL, 3)],
    "in the instant of an answer": [write(1, 1, 2), read(INITIAL, 2, 3)],
}
BAD = {
    "an acknowledged write is lost": [write(1, 1, 2), read(INITIAL, 3, 4)],
    "an acknowledged write is lost, and an earlier one there": [write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)],
    "the old one still answers": [write(1, 1, 2), write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)],
    "new, then old, while it is written": [write(1, 1, 9), read(1, 2, 3), read(INITIAL, 4, 5)],
    "an unanswered write is seen and gone again": [write(1, 1), read(1, 2, 3), read(INITIAL, 4, 5)],
    "an unanswered write comes twice": [write(1, 1), read(1, 2, 3), write(2, 4, 5), read(2, 6, 7), read(1, 8, 9)],
    "two readers see two writes in two orders": [
        write(1, 1, 2),
        write(2, 1, 2),
        read(1, 3, 4),
        read(2, 5, 6),
        read(1, 7, 8),
    ],
    "before it was written": [read(1, 1, 2), write(1, 3, 4)],
    "what nobody wrote": [write(1, 1, 2), read(7, 3, 4)],
    "what no write can have written": [write(1, 1, 2), read(None, 3, 4)],
    "a write between two reads of another": [write(1, 1, 2), read(1, 3, 4), write(2, 5, 6), read(1, 7, 8)],
}


@pytest.mark.parametrize("name", GOOD)
def test_histories_that_have_an_order(name: str) -> None:
    assert flaw(GOOD[name]) is None
    assert ordered(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_histories_that_have_none(name: str) -> None:
    assert flaw(BAD[name]) is not None
    assert not ordered(BAD[name])


def ordered(ops: list[Op]) -> bool:
    """By trying every order (Wing and Gong)."""
    asked = [op for op in ops if op.write or op.answered < math.inf]

    @cache
    def goes_on(left: frozenset[int], value: int) -> bool:
        if all(asked[i].answered == math.inf for i in left):
            return True
        soonest = min(asked[i].answered for i in left)
        for i in left:
            op = asked[i]
            if op.called > soonest:
                continue  # another one was answered before this was asked for
            if op.write:
                if goes_on(left - {i}, op.value or 0):
                    return True
            elif op.value == value and goes_on(left - {i}, value):
                return True
        return False

    return goes_on(frozenset(range(len(asked))), INITIAL)


@st.composite
def histories(draw: st.DrawFn) -> list[Op]:
    ops = []
    writes = draw(st.integers(0, 4))
    for number in range(draw(st.integers(0, 7))):
        called = draw(st.integers(0, 9))
        answered = draw(st.one_of(st.just(math.inf), st.integers(called, 10)))
        if number < writes:
            ops.append(write(number + 1, called, answered))
        else:
            ops.append(read(draw(st.integers(0, writes)), called, answered))
    return ops


@settings(max_examples=600)
@given(histories())
def test_it_says_what_a_search_of_all_orders_says(ops: list[Op]) -> None:
    assert (flaw(ops) is None) == ordered(ops)


def test_a_value_is_written_once() -> None:
    with pytest.raises(AssertionError, match="two writes of 1"):
        flaw([write(1, 1, 2), write(1, 3, 4)])


# --- who answered


def test_terms_of_answers_made_by_hand() -> None:
    a, b = "alpha", "beta"
    assert fewest_terms([]) == []
    assert fewest_terms([Answer(a, 1, 2), Answer(a, 3, 4)]) == [a]
    assert fewest_terms([Answer(a, 1, 2), Answer(b, 3, 4)]) == [a, b]
    assert fewest_terms([Answer(b, 1, 2), Answer(a, 3, 4)]) == [b, a]
    # Asked before the change, and heard of after it: may have been given before.
    assert fewest_terms([Answer(a, 1, 9), Answer(b, 3, 4), Answer(b, 5, 6)]) == [a, b]
    # Asked for after the other one had answered: certainly in turn.
    assert fewest_terms([Answer(a, 1, 2), Answer(b, 3, 4), Answer(a, 5, 6)]) == [a, b, a]
    assert fewest_terms([Answer(a, 1, 2), Answer(b, 3, 4), Answer(a, 5, 6), Answer(b, 7, 8)]) == [a, b, a, b]


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            lambda node, called, length: Answer(node, called, called + length),
            st.sampled_from(["alpha", "beta"]),
            st.integers(0, 5),
            st.integers(0, 4),
        ),
        max_size=5,
    )
)
def test_terms_are_as_few_as_a_search_finds(answers: list[Answer]) -> None:
    terms = fewest_terms(answers)
    assert len(terms) == fewest_by_search(answers)
    assert all(one != other for one, other in itertools.pairwise(terms))


def fewest_by_search(answers: list[Answer]) -> int:
    """Each answer was given at one of its times; changes of the node in the order of these times."""
    if not answers:
        return 0
    moments = sorted({answer.answered for answer in answers} | {answer.called for answer in answers})
    # A moment belongs to one term, but for the moment of a change, which belongs to both.
    states = {(node, frozenset[int]()): 1 for node in ("alpha", "beta")}
    for moment in moments:
        for _ in range(2):
            new: dict[tuple[str, frozenset[int]], int] = {}
            for (node, done), count in states.items():
                now = done | {i for i, a in enumerate(answers) if a.node == node and a.called <= moment <= a.answered}
                other = "beta" if node == "alpha" else "alpha"
                for key, cost in (((node, now), count), ((other, now), count + 1)):
                    if cost < new.get(key, math.inf):
                        new[key] = cost
            states = new
    everything = frozenset(range(len(answers)))
    return min(count for (_, done), count in states.items() if done == everything)
