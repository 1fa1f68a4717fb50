"""A15: the first start of a pair. Who is preferred becomes primary without anybody's command, and only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from model import Model, finish, serve

from mirrorpair.control import AdminClient
from mirrorpair.errors import PeerError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pair import Daemon, Pair


@pytest.fixture(params=["alpha", "beta"])
def pair(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Pair:
    """Either end of the data link, which alpha makes."""
    return make_pair(arbiter="witness", options=f'prefer = "{request.param}"')


def preferred(pair: Pair) -> Daemon:
    return pair.beta if 'prefer = "beta"' in pair.config.read_text() else pair.alpha


def begin(pair: Pair, keeps: Daemon | None = None) -> None:
    pair.witness.start()
    for node in pair.nodes:
        node.init(*(["--keep-data"] if node is keeps else []))
        node.start()


def test_the_preferred_of_two_new_nodes_serves_at_their_first_start(pair: Pair, model: Model) -> None:
    begin(pair)
    first = preferred(pair)
    first.wait("primary")
    assert first.status().epoch == 1
    serve(first, model)
    finish(pair, model)


@pytest.mark.parametrize("kept_by", ["alpha", "beta"])
def test_what_one_of_them_brought_with_it_is_what_the_first_primary_serves(
    pair: Pair, rng: random.Random, kept_by: str
) -> None:
    """Who is preferred has it itself, or waits until it was sent everything."""
    model = Model(pair.size, rng)
    model.data[:] = rng.randbytes(pair.size)
    keeps = pair.alpha if kept_by == "alpha" else pair.beta
    keeps.image().write_bytes(model.data)
    begin(pair, keeps)
    first = preferred(pair)
    first.wait("primary")
    assert first.status().epoch == 1
    serve(first, model)
    finish(pair, model)


def test_f17_a_blank_preferred_node_is_not_the_first_primary_of_a_pair_that_had_one(
    make_pair: Callable[..., Pair], rng: random.Random
) -> None:
    """The record is lost and the primary's disks with it: what is left is beta's, which a person has the record made
    anew from. Neither alone believes the empty record."""
    pair = make_pair(arbiter="witness", options='prefer = "alpha"')
    model = Model(pair.size, rng)
    begin(pair)
    pair.alpha.wait("primary")
    serve(pair.alpha, model)
    pair.synced()
    for node in pair.nodes:
        node.freeze()  # neither hears of the other's death
    for node in pair.nodes:
        node.kill()
    pair.witness.kill()
    for path in pair.witness.records.glob("*.record"):
        path.unlink()
    for path in (pair.folder / "alpha").rglob("*"):
        if path.is_file():
            path.unlink()
    pair.witness.start()
    pair.alpha.init("--force")
    for node in pair.nodes:
        node.start()
    for node in pair.nodes:
        with AdminClient(str(node.path("ctl"))) as client, pytest.raises(PeerError, match="nobody serves"):
            client.wait_for("primary", timeout=1.5)
    with pytest.raises(PeerError, match="beta has recorded epoch 1, alpha only 0") as caught:
        pair.alpha.promote()
    assert caught.value.exit_code == 12
    with pytest.raises(PeerError, match="lost or restored from an older copy"):
        pair.beta.promote()
    assert "beta is primary of epoch 2" in pair.beta.promote(accept_data_loss=True)
    serve(pair.beta, model)
    finish(pair, model)
