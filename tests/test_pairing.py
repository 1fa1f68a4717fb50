"""What two nodes agree on when a data link begins: both ends compute the same, or both refuse (H4, M10, A17)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mirrorpair.errors import PeerProtocolError
from mirrorpair.history import Ids, Side
from mirrorpair.pairing import (
    Agreement,
    agree,
    check_plan,
    compare,
    facts_to_side,
    make_plan,
    side_to_facts,
)
from mirrorpair.peermessages import Facts, Plan, Stop, decode_frame, encode_frame

if TYPE_CHECKING:
    import random

SIZE = 1 << 20
BLOCK = 65536


def side(node: str, ids: Ids, **changes: Any) -> Side:
    plain = Side(
        node=node,
        size=SIZE,
        block_size=BLOCK,
        ids=ids,
        new=ids.current == 0,
        role="secondary",
        disk="consistent",
        epoch=3,
    )
    return msgspec.structs.replace(plain, **changes)


def both(
    alpha: dict[str, Side], beta: dict[str, Side], *, flap: bool = False
) -> tuple[Agreement | Stop, Agreement | Stop]:
    """What alpha and beta come to. `flap`: alpha says so."""
    results = []
    for mine, theirs, i_flap, they_flap in ((alpha, beta, flap, False), (beta, alpha, False, flap)):
        decisions = compare(mine, theirs)
        if isinstance(decisions, Stop):
            results.append(decisions)
        else:
            results.append(agree(decisions, mine, theirs, i_flap=i_flap, they_flap=they_flap))
    return results[0], results[1]


def facts(role: str = "secondary", pair_uuid: str = "", volumes: int = 1) -> Facts:
    return Facts(sessions=("1", "2"), epoch=3, role=role, flap=False, pair_uuid=pair_uuid, volumes=volumes)


def test_h4_both_ends_always_come_to_the_same(rng: random.Random) -> None:
    ids = [Ids(), Ids(1), Ids(2, 1), Ids(3, 1), Ids(4, 2, (1,)), Ids(9)]
    kinds: set[str] = set()
    for turn in range(3000):
        # Where every fact is drawn, two volumes rarely agree on a mere reconnect: every third turn is one.
        calm = turn % 3 == 0

        def some(node: str, role: str, calm: bool = calm) -> dict[str, Side]:
            return {
                name: side(node, Ids(1), role=role, dirty=rng.random() < 0.3)
                if calm
                else side(
                    node,
                    rng.choice(ids),
                    role=role,
                    disk=rng.choice(["inconsistent", "outdated", "consistent", "up-to-date"]),
                    dirty=rng.random() < 0.3,
                    crashed_primary=rng.random() < 0.2,
                    boot_lost=rng.random() < 0.2,
                    discard=rng.random() < 0.05,
                )
                for name in ("data", "logs")
            }

        roles = rng.choice([("secondary", "secondary"), ("primary", "secondary"), ("primary", "primary")])
        alpha, beta = both(some("alpha", roles[0]), some("beta", roles[1]), flap=rng.random() < 0.5)
        assert alpha == beta
        if isinstance(alpha, Agreement):
            kinds.add(f"agreed {alpha.flap}")
            # The primary is never overwritten.
            if "primary" in roles:
                assert alpha.source == "alpha"
            for decision in alpha.decisions:
                assert decision.source in (None, alpha.source)
        else:
            kinds.add(alpha.kind)
            assert alpha.code == (12 if alpha.kind == "refused" else 20)
    assert kinds == {"agreed True", "agreed False", "refused", "split-brain", "unrelated"}


def test_volumes_that_would_go_in_different_directions_are_refused_until_one_is_primary() -> None:
    alpha = {"data": side("alpha", Ids(2, 1)), "logs": side("alpha", Ids(1))}
    beta = {"data": side("beta", Ids(1)), "logs": side("beta", Ids(2, 1))}
    refused, same = both(alpha, beta)
    assert refused == same
    assert isinstance(refused, Stop)
    assert "different directions" in refused.message


def test_without_a_primary_and_without_a_difference_the_lower_name_is_the_source() -> None:
    agreed, _ = both({"data": side("alpha", Ids(1))}, {"data": side("beta", Ids(1))})
    assert isinstance(agreed, Agreement)
    assert (agreed.source, agreed.flap) == ("alpha", False)


@pytest.mark.parametrize("flap", [True, False])
def test_a17_only_left_over_bits_of_a_primary_are_a_flap(flap: bool) -> None:
    primary = {"data": side("alpha", Ids(1), role="primary", dirty=True)}
    agreed, same = both(primary, {"data": side("beta", Ids(1))}, flap=flap)
    assert isinstance(agreed, Agreement)
    assert agreed == same
    assert agreed.flap is flap
    for other in (side("beta", Ids(1), boot_lost=True), side("beta", Ids(1), disk="inconsistent"), side("beta", Ids())):
        agreed, _ = both(primary, {"data": other}, flap=True)
        assert isinstance(agreed, Agreement)
        assert not agreed.flap


def test_different_volumes_are_refused() -> None:
    refused, _ = both({"data": side("alpha", Ids(1))}, {"logs": side("beta", Ids(1))})
    assert isinstance(refused, Stop)


def planned(
    uuids: tuple[str, str] = ("", ""), volume: tuple[str, str] = ("", ""), ids: tuple[Ids, Ids] = (Ids(), Ids())
) -> Any:
    """(plan, agreement, alpha's party, beta's party)"""
    sides = {"data": side("alpha", ids[0])}, {"data": side("beta", ids[1])}
    agreement, _ = both(*sides)
    assert isinstance(agreement, Agreement)
    parties = [
        (facts(pair_uuid=uuid), [side_to_facts("data", one["data"], name)])
        for uuid, one, name in zip(uuids, sides, volume, strict=True)
    ]
    numbers = itertools.count(77)
    plan = make_plan(agreement, 3, *parties, new_id=lambda: next(numbers), new_uuid=lambda: f"{next(numbers):032x}")
    return plan, agreement, *parties


def test_m10_two_new_nodes_get_what_the_dialer_makes() -> None:
    plan, agreement, alpha, beta = planned()
    assert isinstance(plan, Plan)
    assert plan.pair_uuid
    assert plan.volumes[0].volume_uuid != plan.pair_uuid
    assert plan.volumes[0].first
    assert check_plan(plan, agreement, 3, beta, alpha) is None
    assert decode_frame(Plan, encode_frame(plan)) == plan


@pytest.mark.parametrize("uuids", [("a1", ""), ("", "a1"), ("a1", "a1")])
def test_m10_who_has_none_takes_its_peers(uuids: tuple[str, str]) -> None:
    plan, agreement, alpha, beta = planned(uuids, uuids, (Ids(1), Ids(1)))
    assert (plan.pair_uuid, plan.volumes[0].volume_uuid, plan.volumes[0].first) == ("a1", "a1", "")
    assert check_plan(plan, agreement, 3, beta, alpha) is None


@pytest.mark.parametrize("uuids", [(("a", "b"), ("", "")), (("", ""), ("a", "b"))])
def test_m10_two_different_ones_are_refused(uuids: Any) -> None:
    plan, *_ = planned(*uuids)
    assert isinstance(plan, Stop)
    assert plan.kind == "refused"


@pytest.mark.parametrize(
    "change",
    [
        {"source": "beta"},
        {"epoch": 4},
        {"flap": True},
        {"pair_uuid": "ff"},
        {"pair_uuid": ""},
        {"volumes": []},
        {"amount": "full"},
        {"volume_uuid": "ff"},
        {"first": "5"},
        {"full": "5"},
        {"name": "logs"},
    ],
    ids=str,
)
def test_h4_a_plan_that_differs_in_anything_is_not_followed(change: dict[str, Any]) -> None:
    plan, agreement, alpha, beta = planned(("a1", "a1"), ("b1", "b1"), (Ids(1), Ids(1)))
    if set(change) <= {"amount", "volume_uuid", "first", "full", "name"}:
        change = {"volumes": [msgspec.structs.replace(plan.volumes[0], **change)]}
    stop = check_plan(msgspec.structs.replace(plan, **change), agreement, 3, beta, alpha)
    assert stop is not None
    assert stop.kind == "retry"


def test_a_side_travels_whole(rng: random.Random) -> None:
    for _ in range(100):
        flags = {
            name: rng.random() < 0.5
            for name in (
                "crashed_primary",
                "boot_lost",
                "connected_survivor",
                "missed_end",
                "dirty",
                "alone",
                "discard",
            )
        }
        history = tuple(rng.sample(range(10, 2**62), rng.randrange(32)))
        one = side(
            "alpha",
            Ids(2**64 - 1, rng.choice([0, 5]), history),
            distrusted=rng.random() < 0.5,
            full_id=rng.choice([0, 2**64 - 1]),
            **flags,
        )
        assert facts_to_side(side_to_facts("data", one, "ab"), "alpha", facts()) == one


def test_ids_that_no_node_can_have_are_an_error_of_the_peer() -> None:
    good = side_to_facts("data", side("alpha", Ids(7)), "")
    for change in ({"bitmap": "7"}, {"history": ["7"]}, {"current": ""}, {"current": "f" * 32}, {"new": True}):
        with pytest.raises(PeerProtocolError, match="what cannot be"):
            facts_to_side(msgspec.structs.replace(good, **change), "beta", facts())
