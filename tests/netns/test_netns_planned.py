"""What a person does to the hosts: cold starts in every order, a failback, a rolling restart, under a load that is
judged."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from world import PLANNED

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

ORDERS = list(itertools.permutations(("alpha", "beta", "witness")))


@pytest.mark.parametrize("first", ["alpha", "beta", "witness"])
def test_a_cold_start_in_any_order_ends_with_who_stopped_last(make_world: Callable[..., World], first: str) -> None:
    """beta is stopped, then alpha, then the witness. alpha alone has everything: beta alone refuses, once the promise
    that it may have given is over."""
    world = make_world(promise="5s").up()
    with world.load() as load:
        for order in (order for order in ORDERS if order[0] == first):
            load.acknowledges(30)
            assert world.beta.stop() == 0
            load.acknowledges(30, world.alpha)
            assert world.alpha.stop() == 0
            assert world.witness.terminate() == 0
            refusals = beta_refused(world)
            for name in order:
                {"alpha": world.alpha, "beta": world.beta, "witness": world.witness}[name].start()
                if order.index("alpha") == 2 and name == order[1]:
                    world.until(lambda seen=refusals: beta_refused(world) > seen, "beta refuses")
                    assert world.beta.status().role == "secondary"
            load.acknowledges(30, world.alpha)
            world.in_sync("alpha", "beta")
        world.finish(load, terms=("alpha",), role_changes=0, epoch=3)


def beta_refused(world: World) -> int:
    return world.beta.log().count("beta is not in sync: the register says that only alpha has everything")


def test_a_failback_under_load(make_world: Callable[..., World]) -> None:
    world = make_world(**PLANNED, options='prefer = "alpha"').up()
    with world.load(clients=6) as load:
        load.acknowledges()
        world.alpha.kill()
        load.acknowledges(node=world.beta)
        world.alpha.start()
        world.in_sync("alpha", "beta")
        load.acknowledges(node=world.beta)
        assert world.alpha.command("failback").stdout.startswith("alpha is primary, of epoch 4")
        load.acknowledges(node=world.alpha)
        world.finish(load, terms=("alpha", "beta", "alpha"), role_changes=2, epoch=4)


def test_a_rolling_restart_under_load(make_world: Callable[..., World]) -> None:
    """The witness, beta, a switchover, alpha, and back."""
    world = make_world(**PLANNED).up()
    with world.load(clients=6) as load:
        load.acknowledges()
        assert world.witness.terminate() == 0
        load.acknowledges()
        world.witness.start()
        for node, other in ((world.beta, world.alpha), (world.alpha, world.beta)):
            assert node.stop() == 0
            load.acknowledges(node=other)
            node.start()
            world.in_sync("alpha", "beta")
            load.acknowledges(node=other)
            node.command("switchover", "--to", node.name)
            load.acknowledges(node=node)
            world.pair.synced()
        world.finish(load, terms=("alpha", "beta", "alpha"), role_changes=2, epoch=5)
