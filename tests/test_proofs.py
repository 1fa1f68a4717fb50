"""A11: which proof of death ends which promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.proofs import KEPT_DEAD, Life, Lives, Proof

P1 = Life("beta", "aa", "51", ("1", 0))
P1_LATER = P1._replace(session="52")
P2 = Life("beta", "bb", "53", ("1", 0))


def lives(*, met: Life | None, promised: Life | None) -> Lives:
    one = Lives()
    one.met, one.promised = met, promised
    return one


def test_the_life_that_was_met_and_promised_to_ends_both() -> None:
    assert lives(met=P1, promised=P1).prove([P1]) == Proof(True, True, True, True)


def test_a_sentinel_that_knows_several_sessions_need_not_guess_which_one_counts() -> None:
    assert lives(met=P1_LATER, promised=P1).prove([P1_LATER, P1]) == Proof(True, True, True, True)
    assert lives(met=P1_LATER, promised=P1).prove([P1_LATER]) == Proof(True, True, False, True)


def test_the_end_of_an_earlier_process_does_not_release_what_the_later_one_has() -> None:
    assert lives(met=P2, promised=P2).prove([P1]) == Proof()


def test_a_later_process_that_has_no_promise_yet_is_not_gone_when_the_earlier_one_is() -> None:
    assert lives(met=P2, promised=P1).prove([P1]) == Proof(True, True, True, False)
    assert lives(met=P2, promised=P1).prove([P2]) == Proof(True, True, False, True)


@pytest.mark.parametrize(
    "other",
    [
        P1._replace(node="alpha"),
        P1._replace(process="ab"),
        P1._replace(session="50"),
        P1._replace(incarnation=("1", 1)),
        P1._replace(incarnation=("2", 0)),
    ],
)
def test_every_part_of_the_name_counts(other: Life) -> None:
    assert lives(met=P1, promised=P1).prove([other]) == Proof()


def test_nobody_met_proves_nothing() -> None:
    assert Lives().prove([P1]) == Proof()
    assert not Lives().knows([P1])


def test_whom_this_node_met_last_and_to_whom_it_gave_its_word_are_known_by_their_sessions() -> None:
    one = lives(met=P2, promised=P1)
    assert one.knows([P1])
    assert one.knows([P1_LATER, P2])
    assert not one.knows([P1_LATER])
    assert not one.knows([])


def test_a_report_of_two_processes_is_none() -> None:
    assert lives(met=P1, promised=P1).prove([P1, P2]) == Proof()


def test_a_repeated_report_is_known_and_says_nothing_new() -> None:
    one = lives(met=P1, promised=P1)
    assert one.prove([P1]).fresh
    assert one.prove([P1]) == Proof(True, False, True, True)


def test_who_is_dead_stays_dead_for_as_long_as_it_may_still_be_heard_of() -> None:
    one = lives(met=P1, promised=P1)
    one.prove([P1])
    assert one.dead("aa")
    assert not one.dead("bb")
    for number in range(KEPT_DEAD):
        one.met = P2._replace(process=f"{number:x}f")
        one.prove([one.met])
    assert not one.dead("aa")


WORDS = st.sampled_from(["1", "2", "3"])
LIVES = st.builds(Life, st.just("beta"), WORDS, WORDS, st.tuples(WORDS, st.integers(0, 1)))


@given(st.lists(st.tuples(LIVES, st.sampled_from(["meet", "promise", "die"])), max_size=30))
def test_nothing_but_the_very_life_is_ever_released(story: list[tuple[Life, str]]) -> None:
    one = Lives()
    for life, what in story:
        if what == "die":
            promised, met = one.promised, one.met
            proof = one.prove([life])
            assert proof.releases == (promised == life)
            assert proof.gone == (met == life)
            assert not proof.fresh or proof.releases or proof.gone
        elif not one.dead(life.process):
            one.met = life
            if what == "promise":
                one.promised = life
