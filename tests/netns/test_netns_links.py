"""Links between hosts that go wrong, as packets that do not arrive (F4-F7, F11), under a load that is judged."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from network import BOTH_WAYS
from world import HASTY

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World


def test_f4_the_link_is_cut_and_the_primary_goes_on_alone(world: World) -> None:
    """Both reach the witness: the primary is the first who has to ask it, and the other one never may."""
    world.up()
    with world.load() as load:
        load.acknowledges()
        world.network.cut("alpha", "beta")
        world.in_sync("alpha")
        load.acknowledges()
        assert world.beta.status().role == "secondary"
        assert world.network.mend() > 0
        world.in_sync("alpha", "beta")
        load.acknowledges()
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


def test_f5_a_primary_that_is_cut_from_everybody_falls_silent_and_is_replaced(make_world: Callable[..., World]) -> None:
    world = make_world(**HASTY).up()
    with world.load(patience_s=1.0, bound=(world.alpha,)) as load:
        load.acknowledges()
        world.network.isolate("alpha")
        since = world.expired(world.alpha)
        world.beta.wait("primary")
        load.acknowledges(node=world.beta)
        world.says_nothing(load, world.alpha, since)
        assert world.alpha.status().serving == "held"
        assert world.network.mend() > 0
        world.in_sync("alpha", "beta")
        assert world.alpha.status().role == "secondary"
        assert load.history.answers_to("alpha", since) == []
        load.acknowledges(node=world.beta)
        world.finish(load, terms=("alpha", "beta"), role_changes=1, epoch=2)


@pytest.mark.parametrize(("source", "sink"), BOTH_WAYS, ids=["beta-hears-nothing", "alpha-hears-nothing"])
def test_f6_one_way_loss_on_the_link_is_as_a_cut(world: World, source: str, sink: str) -> None:
    """A promise needs a question and an answer."""
    world.up()
    with world.load() as load:
        load.acknowledges()
        world.network.drop(source, sink)
        world.in_sync("alpha")
        load.acknowledges()
        assert world.beta.status().role == "secondary"
        assert world.network.mend() > 0
        world.in_sync("alpha", "beta")
        load.acknowledges()
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


@pytest.mark.parametrize("direction", ["is-not-heard", "hears-nothing"])
def test_f6_one_way_loss_between_the_primary_and_everybody_is_as_if_it_were_gone(
    make_world: Callable[..., World], direction: str
) -> None:
    world = make_world(**HASTY).up()
    with world.load(patience_s=1.0, bound=(world.alpha,)) as load:
        load.acknowledges()
        for other in ("beta", "witness"):
            ends = ("alpha", other) if direction == "is-not-heard" else (other, "alpha")
            world.network.drop(*ends)
        since = world.expired(world.alpha)
        world.beta.wait("primary")
        load.acknowledges(node=world.beta)
        world.says_nothing(load, world.alpha, since)
        assert world.network.mend() > 0
        world.in_sync("alpha", "beta")
        assert load.history.answers_to("alpha", since) == []
        world.finish(load, terms=("alpha", "beta"), role_changes=1, epoch=2)


def test_f7_without_the_witness_all_goes_on_and_without_the_peer_as_well_all_waits(
    make_world: Callable[..., World],
) -> None:
    """The peer is back first: that is enough."""
    world = make_world(**HASTY).up()
    with world.load(bound=(world.alpha,)) as load:
        load.acknowledges()
        world.network.isolate("witness")
        load.acknowledges()
        world.network.cut("alpha", "beta")
        since = world.expired(world.alpha)
        world.says_nothing(load, world.alpha, since)
        status = world.alpha.status()
        assert (status.role, status.serving, status.arbiter.reachable) == ("primary", "held", False)
        assert world.beta.status().role == "secondary"
        assert world.network.mend("alpha", "beta") > 0
        load.acknowledges()
        assert world.network.mend() > 0
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


def test_f7_a_primary_that_waits_goes_on_when_the_witness_is_back(make_world: Callable[..., World]) -> None:
    world = make_world(**HASTY).up()
    with world.load(bound=(world.alpha,)) as load:
        load.acknowledges()
        world.witness.kill()
        load.acknowledges()
        world.lose_host(world.beta)
        since = world.expired(world.alpha)
        world.says_nothing(load, world.alpha, since)
        world.witness.start()
        load.acknowledges()
        assert world.record().in_sync == ("alpha",)
        world.beta.start()
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


def test_f11_a_flapping_link_changes_no_role(world: World) -> None:
    """Cables out and in, packets lost and not: for shorter than it takes to be missed, and for longer."""
    world.up()
    with world.load() as load:
        for turn in range(3):
            load.acknowledges(30)
            if turn % 2:
                world.network.unplug("beta")
            else:
                world.network.cut("alpha", "beta")
            world.until(lambda: (world.alpha.status().heartbeat_age_s or 0.0) > 0.3, "alpha misses a beat")
            world.network.plug("beta")
            world.network.mend()
            load.acknowledges(30)
            world.network.cut("alpha", "beta")
            world.in_sync("alpha")
            world.network.mend()
            world.in_sync("alpha", "beta")
        assert [node.status().role for node in world.pair.nodes] == ["primary", "secondary"]
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


def test_two_percent_of_all_packets_are_lost_and_no_role_changes(world: World) -> None:
    """So many acknowledged writes; MIRRORPAIR_LOSS_WRITES says another number, for a campaign: 150,000 are about ten
    minutes."""
    world.up()
    with world.load(clients=6) as load:
        for source in world.network.hosts:
            for sink in world.network.hosts.keys() - {source}:
                world.network.drop(source, sink, percent=2)
        left = int(os.environ.get("MIRRORPAIR_LOSS_WRITES") or 1000)
        while left > 0:
            load.acknowledges(min(left, 1000))
            left -= 1000
        assert world.network.mend() > 0
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


def test_a_way_of_50_ms_changes_no_role_and_a_switchover_takes_it(world: World) -> None:
    world.network.delay(50)
    world.up()
    with world.load(clients=6) as load:
        load.acknowledges(100)
        assert (world.alpha.status().peer.rtt_s or 0.0) >= 0.1
        assert world.record().epoch == 1
        world.alpha.command("switchover", "--to", "beta")
        load.acknowledges(100, world.beta)
        world.finish(load, terms=("alpha", "beta"), role_changes=1)
