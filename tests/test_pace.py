"""R9: how fast the online resync may go, in an engine. The rules of csrc/pace.h alone are tests/c/pace_rules.c's, see
test_threads.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engineside import BLOCK, MIB, Client, join

from mirrorpair import _core

if TYPE_CHECKING:
    import random

    from engineside import MakeNode


def test_r9_a_named_rate_holds_the_resync_back_and_nobody_else(make_node: MakeNode, rng: random.Random) -> None:
    a, b = make_node("a", resync_rate=1000), make_node("b")  # a quarter of an hour for each MiB
    a.grant(_core.GRANT_ALONE)
    client = Client(a)
    client.write(0, rng.randbytes(8 * MIB))
    a.grant(_core.GRANT_PEER)
    join(a, b, [_core.PLAN_BITMAP])
    a.wait("bits-merged")
    while a.engine.volume_status(0).resync_done < MIB:
        a.flush()
    for i in range(200):
        client.write(8 * MIB + i * 4096, rng.randbytes(4096))
    a.flush()
    status = a.engine.volume_status(0)
    assert (status.resync_active, status.resync_done) == (True, MIB)
    assert a.dirty() in (7 * MIB // BLOCK, 8 * MIB // BLOCK)  # the first unit's bits go with a barrier
    b.flush()  # its numbers are told with an event
    assert b.engine.volume_status(0).written_bytes == 200 * 4096
