"""Why a node could become primary now, or not: each finding, and that the verdict is the table's own."""

from __future__ import annotations

from typing import Any

import pytest

from mirrorpair.explain import Explanation, explain
from mirrorpair.rolewords import Phase, Promote, State

BOTH = ("alpha", "beta")
S = 10**9


def standby(**changes: Any) -> State:
    """beta; alpha, the primary of epoch 7, is silent, and no promise binds."""
    plain: dict[str, Any] = {
        "me": "beta",
        "peer": "alpha",
        "survivor": "primary",
        "arbitrated": True,
        "suspect_ns": S,
        "retry_ns": S,
        "epoch": 7,
        "primary": "alpha",
        "in_sync": BOTH,
    }
    return State(**{**plain, **changes})


def told(
    state: State,
    *,
    obstacle: str | None = None,
    bound_until_ns: int = 0,
    witness: bool | None = True,
    known: bool = True,
) -> Explanation:
    promote = Promote(accept_data_loss=False, force=False, obstacle=obstacle, bound_until_ns=bound_until_ns)
    return explain(state, promote, 5 * S, witness=witness, known=known)


def no(explanation: Explanation) -> list[str]:
    return [one.rule for one in explanation.findings if not one.allows]


def test_a_standby_whose_primary_is_gone_takes_over() -> None:
    found = told(standby())
    assert (found.promotable, found.by_itself, no(found)) == (True, True, [])
    assert "beta would become primary of epoch 8" in found.verdict


@pytest.mark.parametrize(
    ("changes", "facts", "rule", "promotable", "by_itself"),
    [
        ({"peer_up": True, "peer_role": "primary", "peer_epoch": 7}, {}, "A4 one primary", False, True),
        ({}, {"bound_until_ns": 8 * S}, "A11", False, True),
        ({}, {"obstacle": "volume data is inconsistent"}, "A3 disks", False, False),
        ({"in_sync": ("alpha",)}, {}, "A3 in sync", False, False),
        ({"boot_lost": True}, {}, "A4 boot", False, False),
        ({}, {"known": False}, "A8", False, False),
        ({"in_sync": (), "primary": None, "epoch": 0, "peer_epoch": 7}, {}, "F17 register", False, False),
        ({}, {"witness": False}, "F7 witness", False, False),
        ({"paused": True}, {}, "A19 pause", True, False),
        ({"stopping": True}, {}, "A18 stop", False, False),
        ({"phase": Phase.ACQUIRING}, {}, "A18 stop", False, False),
    ],
)
def test_the_rule_that_forbids_it_is_named_and_no_other(
    changes: dict[str, Any], facts: dict[str, Any], rule: str, promotable: bool, by_itself: bool
) -> None:
    found = told(standby(**changes), **facts)
    assert no(found) == [rule]
    assert (found.promotable, found.by_itself) == (promotable, by_itself)


def test_a_primary_is_told_that_it_is_one() -> None:
    found = told(standby(phase=Phase.ALONE, primary="beta", in_sync=("beta",)))
    assert [one.text for one in found.findings] == ["beta is primary already, of epoch 7"]
    assert found.promotable


def test_a_lone_pair_has_no_witness_and_no_takeover() -> None:
    found = told(standby(arbitrated=False, peer_up=True, peer_role="secondary", peer_epoch=7), witness=None)
    assert not any("witness" in one.rule or "pause" in one.rule for one in found.findings)
    assert (found.promotable, found.by_itself) == (True, False)
