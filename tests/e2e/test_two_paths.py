"""`heartbeat-address`: a pair with two ways between its nodes, of which one is cut. Nobody is suspected, no role
changes.

Rule: for how long something has not happened is counted in heartbeats that came over the way that is left, never by a
clock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from model import BLOCK, Model, finish, serve
from relay import Wire
from test_failover import record, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pair import Daemon, Pair

    from mirrorpair.status import Path

PROMISES = 3
BEATS_IN_A_PROMISE = 10


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """beta has a further address. Alpha's configuration leads to both of beta's through wires (`ways`); beta dials no
    address of alpha's but its sentinel's."""
    pair = make_pair(arbiter="witness")
    text = pair.config.read_text()
    own = '[node.beta]\naddress = "unix:beta.peer"\n'
    assert text.count(own) == 1
    pair.config.write_text(text.replace(own, own + 'heartbeat-address = ["unix:beta.beats"]\n'))
    wired = '[node.beta]\naddress = "unix:beta.wire"\nheartbeat-address = ["unix:beta.beats.wire"]\n'
    pair.alpha.config = pair.folder / "alpha.toml"
    pair.alpha.config.write_text(text.replace(own, wired))
    return pair


@pytest.fixture
def ways(pair: Pair) -> Iterator[tuple[Wire, Wire]]:
    """That of control and data, and that of heartbeats alone."""
    folder = pair.folder
    with (
        Wire(str(folder / "beta.wire"), str(folder / "beta.peer")) as main,
        Wire(str(folder / "beta.beats.wire"), str(folder / "beta.beats")) as beats,
    ):
        yield main, beats
        pair.end()  # daemons first: what is closed under them is no loss


def path_of(node: Daemon, kind: str) -> Path:
    return next(path for path in node.status().paths if path.kind == kind)


def both_ways_up(pair: Pair) -> None:
    for node in pair.nodes:
        until(node, lambda node=node: all(path.alive and path.rtt_s for path in node.status().paths))


def for_several_promises(node: Daemon) -> None:
    """As many beats over the further path as come while a promise runs out several times."""
    before = path_of(node, "heartbeat").received
    until(node, lambda: path_of(node, "heartbeat").received > before + PROMISES * BEATS_IN_A_PROMISE)


def unchanged(pair: Pair) -> None:
    assert [node.status().role for node in pair.nodes] == ["primary", "secondary"]
    assert (record(pair).primary, record(pair).epoch) == ("alpha", 1)
    assert "promise" not in pair.beta.command("history").stdout
    assert "is silent" not in pair.beta.log()
    assert "takes epoch" not in pair.beta.log()


def test_the_way_of_control_and_data_is_cut(pair: Pair, model: Model, ways: tuple[Wire, Wire]) -> None:
    """A lost data link: alpha goes on alone, which needs the witness. Beta hears it, and takes nothing over."""
    main, _ = ways
    pair.up()
    both_ways_up(pair)
    serve(pair.alpha, model)
    main.cut()
    serve(pair.alpha, model)  # once beta is out of the set
    assert record(pair).in_sync == ("alpha",)
    for node in pair.nodes:
        for_several_promises(node)
        status = node.status()
        assert [path.alive for path in status.paths] == [False, True]
        assert status.peer.link == "connecting"
    assert pair.beta.status().peer.role == "primary"
    unchanged(pair)
    main.mend()
    pair.synced()
    unchanged(pair)
    finish(pair, model)


def test_without_the_witness_the_promises_that_come_the_other_way_let_reads_go_on(
    pair: Pair, model: Model, ways: tuple[Wire, Wire]
) -> None:
    """A10: alpha may neither take beta out nor go on without it. Its reads would end with beta's promise, were that not
    given again and again; writes wait, and are answered when the way is back."""
    main, _ = ways
    pair.up()
    both_ways_up(pair)
    serve(pair.alpha, model)
    pair.witness.kill()
    with pair.alpha.client() as client, pair.alpha.client() as reader:
        main.cut()
        done = threading.Event()
        writer = threading.Thread(target=lambda: (client.write(0, b"w" * BLOCK), done.set()))
        writer.start()
        until(pair.alpha, lambda: "beta could not be taken out of the set" in pair.alpha.log())
        for_several_promises(pair.alpha)
        assert reader.read(BLOCK, BLOCK) == bytes(model.data[BLOCK : 2 * BLOCK])
        assert not done.is_set()
        assert [node.status().role for node in pair.nodes] == ["primary", "secondary"]
        main.mend()
        writer.join(60)
        assert done.is_set()
    model.data[:BLOCK] = b"w" * BLOCK
    pair.witness.start()
    unchanged(pair)
    finish(pair, model)


def test_the_further_way_is_cut_and_nothing_changes_but_what_is_said(
    pair: Pair, model: Model, ways: tuple[Wire, Wire]
) -> None:
    _, beats = ways
    pair.up()
    both_ways_up(pair)
    version = record(pair)
    beats.cut()
    for node in pair.nodes:
        until(node, lambda node=node: node.status().summary == "a heartbeat path is lost")
        until(node, lambda node=node: "no heartbeats over" in node.log())
        assert "beta.beats" in node.status().reason
        shown = node.command("status").stdout
        assert "lost" in next(line for line in shown.splitlines() if "heartbeats" in line and "beta.beats" in line)
        assert node.command("status", "--check", check=False).returncode == 1
    serve(pair.alpha, model)
    unchanged(pair)
    assert record(pair) == version
    beats.mend()
    both_ways_up(pair)
    assert pair.alpha.status().health == "healthy"
    finish(pair, model)


def test_who_is_silent_on_both_ways_is_replaced(pair: Pair, model: Model, ways: tuple[Wire, Wire]) -> None:
    del ways
    pair.up()
    both_ways_up(pair)
    serve(pair.alpha, model)
    pair.alpha.freeze()
    pair.beta.wait("primary")
    serve(pair.beta, model)
    pair.alpha.kill()
    pair.alpha.start()
    finish(pair, model)
