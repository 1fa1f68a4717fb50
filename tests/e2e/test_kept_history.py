"""`mirrorpair history`: role and disk changes of real daemons, over kills and restarts, and without a daemon."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
from model import Model, finish, serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from pair import Daemon, Pair


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(arbiter="witness")


def told(node: Daemon, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in node.command("history", "--json", *words).stdout.splitlines()]


def roles(node: Daemon) -> list[tuple[str | None, str, int]]:
    return [(one["from"], one["to"], one["epoch"]) for one in told(node) if one["kind"] == "role"]


def test_it_survives_kills_restarts_and_the_daemon_itself(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    assert roles(pair.alpha) == [("secondary", "primary", 1)]
    pair.alpha.kill()
    pair.beta.wait("primary")
    serve(pair.beta, model)
    assert roles(pair.alpha) == [("secondary", "primary", 1)]  # nobody runs there
    pair.alpha.start()
    pair.synced()
    assert [(old, new) for old, new, _ in roles(pair.alpha)] == [("secondary", "primary"), ("primary", "secondary")]
    assert roles(pair.beta) == [("secondary", "primary", 2)]
    finish(pair, model)

    found = told(pair.alpha)
    assert [one["seq"] for one in found] == list(range(1, len(found) + 1))
    assert all(one["reason"] and one["node"] == "alpha" and one["time_s"] > 0 for one in found)
    assert "without a clean stop" in next(one["reason"] for one in found if one["to"] == "secondary")
    disks = [one["to"] for one in found if one["kind"] == "disk" and one["volume"] == "data"]
    assert all(one != other for one, other in itertools.pairwise(disks))
    assert "inconsistent" in disks  # it was beta's target
    assert disks.index("inconsistent") < len(disks) - 1
    assert told(pair.alpha, "--since", str(found[-2]["seq"])) == found[-1:]

    lines = pair.alpha.command("history").stdout.splitlines()
    assert len(lines) == len(found)
    shown = next(line for line in lines if " role " in line)
    assert "epoch 1" in shown
    assert "secondary -> primary" in shown


def test_a_stop_in_order_is_told_from_a_crash(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    assert pair.alpha.stop() == 0
    pair.beta.wait("primary")
    pair.alpha.start()
    pair.synced()
    (back,) = [one["reason"] for one in told(pair.alpha) if one["kind"] == "role" and one["to"] == "secondary"]
    assert back == "the daemon of alpha was started; the one before it ended as primary"
    finish(pair, model)
