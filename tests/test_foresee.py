"""What a dry run of a role change says, against what the table then does.

The states are drawn at random with a printed seed, so the rule holds beyond the cases that somebody thought of: a dry
run ends with the code, and where it refuses with the sentence, that the real one is given.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from mirrorpair import roles
from mirrorpair.foresee import foresee
from mirrorpair.rolewords import Answer, Demote, Event, Phase, Promote, State, Swap, Swapped

S = 10**9
BOTH = ("alpha", "beta")
EMPTY = State(me="alpha", peer="beta", survivor="primary", suspect_ns=S, retry_ns=S // 4)


def state(**changes: Any) -> State:
    return msgspec.structs.replace(EMPTY, **changes)


def promote(**changes: Any) -> Promote:
    plain: dict[str, Any] = {"accept_data_loss": False, "force": False, "obstacle": None, "bound_until_ns": 0}
    return Promote(**{**plain, **changes})


def drawn(rng: random.Random) -> State:
    up = rng.random() < 0.5
    return state(
        phase=rng.choice(list(Phase)),
        survivor=rng.choice(["primary", "secondary"]),
        epoch=rng.randrange(9),
        primary=rng.choice([None, "alpha", "beta"]),
        in_sync=rng.choice([(), ("alpha",), ("beta",), BOTH]),
        peer_up=up,
        peer_role=rng.choice(["primary", "secondary"]) if up else None,
        peer_epoch=rng.randrange(9),
        peer_left=not up and rng.random() < 0.3,
        crashed=rng.random() < 0.3,
        boot_lost=rng.random() < 0.3,
        draining=rng.random() < 0.1,
        answering=rng.random() < 0.1,
        stopping=rng.random() < 0.1,
    )


def drawn_event(rng: random.Random) -> Promote | Demote:
    if rng.random() < 0.3:
        return Demote()
    accepts = rng.random() < 0.5
    return promote(
        accept_data_loss=accepts,
        force=accepts and rng.random() < 0.5,
        obstacle=rng.choice([None, None, None, "volume data is inconsistent"]),
        bound_until_ns=rng.choice([0, 5 * S]),
        divided=rng.choice([None, None, "both wrote"]),
    )


def real(before: State, event: Event, now: int) -> Answer | None:
    """The table's own answer; None: it asks for something first."""
    step = roles.step(before, event, now)
    found = next((action for action in step.actions if isinstance(action, Answer)), None)
    if found is not None and found.retry_at_ns is not None:  # the node waits, and asks again
        return real(before, event, found.retry_at_ns)
    return found


def test_a_dry_run_ends_as_the_real_one_would() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    codes = set()
    for _ in range(4000):
        before, event = drawn(rng), drawn_event(rng)
        said, answer = foresee(before, event, S), real(before, event, S)
        codes.add(said.code)
        assert said.retry_at_ns is None
        if answer is None or answer.code == 0:
            assert said.code == 0, (before, event, said)
            assert "would" in said.message
        else:
            assert (said.code, said.message) == (answer.code, answer.message), (before, event)
    assert codes == {0, 1, 12, 15, 20}


def test_a_dry_run_names_the_epoch_that_is_taken() -> None:
    before = state(epoch=7, peer_epoch=9, in_sync=BOTH, peer_up=True, peer_role="secondary")
    (swap,) = roles.step(before, promote(), 0).actions
    assert isinstance(swap, Swap)
    assert foresee(before, promote(), 0).message.startswith(f"alpha would become primary of epoch {swap.epoch}")


@pytest.mark.parametrize(
    ("before", "parts", "absent"),
    [
        # both in sync: nothing is lost, nothing is copied
        ({"in_sync": BOTH, "peer_up": True, "peer_role": "secondary"}, ["beta has too"], ["given up", "in sync: it"]),
        # a peer that was never in the set
        ({"in_sync": ("alpha",), "peer_up": True, "peer_role": "secondary"}, ["gets what differs"], ["given up"]),
        # the sole member, alone
        ({"in_sync": ("alpha",)}, ["answer writes alone", "gets what differs"], ["given up"]),
        # the others: a person gives something up
        ({"in_sync": BOTH}, ["answer writes alone", "what only beta has is given up"], []),
        ({"in_sync": ("beta",), "peer_up": True, "peer_role": "secondary"}, ["what only beta has is given up"], []),
        (
            {"in_sync": BOTH, "peer_up": True, "peer_role": "secondary", "boot_lost": True},
            ["gets what differs", "what only beta has is given up"],
            [],
        ),
    ],
)
def test_a_dry_run_says_who_answers_writes_and_what_is_lost(
    before: dict[str, Any], parts: list[str], absent: list[str]
) -> None:
    began = state(**before)
    event = promote(accept_data_loss=True, force=True)
    said = foresee(began, event, 0).message
    assert all(part in said for part in parts), said
    assert not any(part in said for part in absent), said
    step = roles.step(began, event, 0)
    won = roles.step(step.state, Swapped(step.actions[0], True), 0).state  # type: ignore[arg-type]
    assert ("answer writes alone" in said) == (roles.mode_of(won) is not roles.Mode.PEER)


def test_a_promise_is_told_and_waited_for() -> None:
    said = foresee(state(in_sync=BOTH), promote(accept_data_loss=True, bound_until_ns=3 * S), S)
    assert said.code == 0
    assert said.message.startswith("after its promise to beta is over, in 2.0 s, alpha would become primary")


def test_a_demotion_says_where_everything_is_durable() -> None:
    mirrored = state(phase=Phase.PAIRED, in_sync=BOTH, linked=True, epoch=7)
    assert "durable on both nodes, the role of epoch 7" in foresee(mirrored, Demote(), 0).message
    alone = state(phase=Phase.ALONE, in_sync=("alpha",))
    assert "durable on alpha" in foresee(alone, Demote(), 0).message
    frozen = state(phase=Phase.FROZEN, in_sync=BOTH, survivor="secondary")
    assert "what waits for beta is not answered" in foresee(frozen, Demote(), 0).message
    assert "would not take back" in foresee(state(phase=Phase.RETURNING), Demote(), 0).message
