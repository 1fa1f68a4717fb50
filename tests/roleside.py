"""Decisions about the roles, taken one by one: what tests of them start from."""

from __future__ import annotations

from typing import Any

from mirrorpair import roles
from mirrorpair.rolewords import Answer, Event, Phase, State

BOTH = ("alpha", "beta")
S = 10**9


def primary(**changes: Any) -> State:
    """alpha, linked, both in sync, epoch 7."""
    plain: dict[str, Any] = {
        "me": "alpha",
        "peer": "beta",
        "survivor": "primary",
        "arbitrated": True,
        "suspect_ns": S,
        "retry_ns": S // 4,
        "phase": Phase.PAIRED,
        "epoch": 7,
        "primary": "alpha",
        "in_sync": BOTH,
        "peer_up": True,
        "peer_role": "secondary",
        "peer_epoch": 7,
        "linked": True,
        "equal": True,
        "steady_since_ns": 0,
    }
    return State(**{**plain, **changes})


def run(at: State, *events: Event, now: int = 0) -> tuple[State, list[Any]]:
    """The state after the events, and all actions."""
    actions: list[Any] = []
    for event in events:
        step = roles.step(at, event, now)
        assert step.sentence
        at = step.state
        actions += step.actions
    return at, actions


def codes(actions: list[Any]) -> list[int]:
    return [action.code for action in actions if isinstance(action, Answer)]


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions]
