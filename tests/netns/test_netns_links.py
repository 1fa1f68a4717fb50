"""Links between hosts that go wrong, as real packets that do not arrive (F4-F7, F11), under a load that is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        assert world.network.heal() > 0
        world.in_sync("alpha", "beta")
        load.acknowledges()
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)
