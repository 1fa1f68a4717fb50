"""An arbitrated pair: real daemons and a real witness, real kills, freezes and stops. Nobody is asked anything."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

import pytest
from model import BLOCK, Model, finish, serve
from pair import HANG_S
from witnessside import with_client

from mirrorpair.control import AdminClient
from mirrorpair.errors import MirrorpairError, PeerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pair import Daemon, Pair

    from mirrorpair.arbiter import Register
    from mirrorpair.witness.client import WitnessRegister


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(arbiter="witness")


def record(pair: Pair) -> Register:
    async def read(client: WitnessRegister) -> Register:
        return (await client.read()).register

    found: Register = with_client(pair.witness, read)
    return found


def until(node: Daemon, holds: Callable[[], bool]) -> None:
    """Looks again and again; a short wait for what does not come keeps it from being busy."""
    for _ in range(int(HANG_S / 0.05)):
        if holds():
            return
        try:
            with AdminClient(str(node.path("ctl"))) as client:
                client.wait_for("primary" if node.status().role == "secondary" else "secondary", timeout=0.05)
        except MirrorpairError:
            continue
    raise AssertionError(f"{node.name} never comes to that\n{node.pair.logs()}")


def test_a_killed_primary_is_replaced_and_comes_back_as_target(pair: Pair, model: Model) -> None:
    """A3, A11: nothing acknowledged is lost, and nobody was asked."""
    pair.up()
    serve(pair.alpha, model)
    pair.alpha.kill()
    pair.beta.wait("primary")
    serve(pair.beta, model)
    assert (record(pair).primary, record(pair).in_sync) == ("beta", ("beta",))
    pair.alpha.start()
    pair.synced()
    assert pair.alpha.status().role == "secondary"
    assert record(pair).in_sync == ("alpha", "beta")
    finish(pair, model)


def test_it_goes_to_and_fro(pair: Pair, model: Model) -> None:
    pair.up()
    primary, other = pair.alpha, pair.beta
    for _ in range(3):
        serve(primary, model, 5)
        primary.kill()
        other.wait("primary")
        serve(other, model, 5)
        primary.start()
        pair.synced()
        primary, other = other, primary
    finish(pair, model)


def test_f1_a_frozen_primary_is_replaced_acknowledges_nothing_and_comes_back_as_target(
    pair: Pair, model: Model
) -> None:
    """A10: what its clients ask for while it is frozen is neither answered nor done."""
    pair.up()
    serve(pair.alpha, model)
    outcome: list[object] = []
    with pair.alpha.client() as client:
        client.read(0, 4096)
        pair.alpha.freeze()

        def write() -> None:
            try:
                client.write(0, b"x" * 4096)
                outcome.append("acknowledged")
            except MirrorpairError as error:
                outcome.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        pair.beta.wait("primary")
        serve(pair.beta, model)
        pair.alpha.signal(signal.SIGCONT)
        writer.join(HANG_S)
    assert len(outcome) == 1
    assert isinstance(outcome[0], MirrorpairError)
    pair.synced()
    assert pair.alpha.status().role == "secondary"
    finish(pair, model)


def test_a_killed_secondary_leaves_the_set_and_enters_it_again(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    pair.beta.kill()
    serve(pair.alpha, model)
    assert record(pair).in_sync == ("alpha",)
    pair.beta.start()
    pair.synced()
    assert (record(pair).primary, record(pair).in_sync) == ("alpha", ("alpha", "beta"))
    finish(pair, model)


def test_f13_who_died_while_alone_is_never_replaced_by_the_stale_one(pair: Pair, model: Model) -> None:
    pair.up()
    pair.beta.kill()
    serve(pair.alpha, model)
    pair.alpha.kill()
    pair.beta.start()
    until(pair.beta, lambda: "beta is not in sync: the register says that only alpha has everything" in pair.beta.log())
    with pytest.raises(PeerError, match="alpha has acknowledged writes that would be lost") as caught:
        pair.beta.promote()
    assert caught.value.exit_code == 12
    assert pair.beta.status().role == "secondary"
    pair.alpha.start()
    pair.alpha.wait("primary")
    finish(pair, model)


def test_f12_both_killed_the_primary_of_record_takes_its_role_back(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    for node in pair.nodes:
        node.freeze()  # neither hears of the other's death
    for node in pair.nodes:
        node.kill()
    for node in pair.nodes:
        node.start(wait=False)
    for node in pair.nodes:
        node.until_up()
    pair.synced()
    primary = next(node for node in pair.nodes if node.status().role == "primary")
    serve(primary, model)
    finish(pair, model)


def test_f12_and_if_it_stays_away_the_other_one_takes_over(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    for node in pair.nodes:
        node.freeze()  # neither hears of the other's death
    for node in pair.nodes:
        node.kill()
    pair.beta.start()
    pair.beta.wait("primary")
    serve(pair.beta, model)
    pair.alpha.start()
    finish(pair, model)


def test_a18_a_primary_that_is_stopped_is_replaced_at_once(pair: Pair, model: Model) -> None:
    """It serves no more, and says so: its promise is not waited for. Started again, it follows."""
    pair.up()
    serve(pair.alpha, model)
    assert pair.alpha.stop() == 0
    pair.beta.wait("primary")
    serve(pair.beta, model)
    pair.alpha.start()
    pair.synced()
    assert pair.alpha.status().role == "secondary"
    finish(pair, model)


def test_f7_without_the_witness_a_healthy_pair_goes_on_and_a_lone_node_waits_for_it(pair: Pair, model: Model) -> None:
    pair.up()
    pair.witness.kill()
    serve(pair.alpha, model)
    pair.beta.kill()
    done = threading.Event()
    with pair.alpha.client() as client:
        pending = threading.Thread(target=lambda: (client.write(0, b"w" * BLOCK), done.set()))
        pending.start()
        until(pair.alpha, lambda: "beta could not be taken out of the set" in pair.alpha.log())
        assert not done.is_set()
        assert pair.alpha.status().arbiter.reachable is False
        pair.witness.start()
        pending.join(HANG_S)
        assert done.is_set()
        model.data[:BLOCK] = b"w" * BLOCK
    assert record(pair).in_sync == ("alpha",)
    pair.beta.start()
    finish(pair, model)


def test_f7_the_peer_that_is_back_is_enough(pair: Pair, model: Model) -> None:
    pair.up()
    pair.witness.kill()
    pair.beta.kill()
    done = threading.Event()
    with pair.alpha.client() as client:
        pending = threading.Thread(target=lambda: (client.write(0, b"w" * BLOCK), done.set()))
        pending.start()
        until(pair.alpha, lambda: "beta could not be taken out of the set" in pair.alpha.log())
        assert not done.is_set()
        pair.beta.start()
        pending.join(HANG_S)
        assert done.is_set()
        model.data[:BLOCK] = b"w" * BLOCK
    pair.witness.start()
    finish(pair, model)


def test_f17_a_witness_that_lost_the_record_is_not_believed_and_the_roles_stay(pair: Pair, model: Model) -> None:
    pair.up()
    pair.witness.kill()
    for path in pair.witness.records.glob("*.record"):
        path.unlink()
    pair.witness.start()
    until(pair.beta, lambda: all("restored from an older copy" in node.log() for node in pair.nodes))
    for node in pair.nodes:
        status = node.status()
        assert (status.summary, status.arbiter.disbelieved) == ("arbiter not believed", True)
        assert "promote --accept-data-loss" in status.action
    serve(pair.alpha, model)
    pair.alpha.kill()
    until(pair.beta, lambda: pair.beta.log().count("beta did not become primary") > 0)
    assert pair.beta.status().role == "secondary"


def test_f17_a_person_has_a_lost_record_made_anew_by_the_primary(pair: Pair, model: Model) -> None:
    pair.up()
    pair.witness.kill()
    for path in pair.witness.records.glob("*.record"):
        path.unlink()
    pair.witness.start()
    assert "alpha is primary of epoch 2 now" in pair.alpha.promote(accept_data_loss=True)
    assert (record(pair).primary, record(pair).epoch, record(pair).in_sync) == ("alpha", 2, ("alpha", "beta"))
    serve(pair.alpha, model)
    pair.synced()
    pair.alpha.kill()
    pair.beta.wait("primary")
    pair.alpha.start()
    finish(pair, model)


def test_a8_a_node_that_was_made_anew_is_no_member_by_its_name(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    for node in pair.nodes:
        node.freeze()  # neither hears of the other's death
    for node in pair.nodes:
        node.kill()
    for path in (pair.folder / "beta").rglob("*"):
        if path.is_file():
            path.unlink()
    pair.beta.init("--force")
    pair.beta.start()
    until(pair.beta, lambda: "it was made anew" in pair.beta.log())
    with pytest.raises(PeerError):
        pair.beta.promote()
    pair.alpha.start()
    pair.alpha.wait("primary")
    finish(pair, model)


def test_a_pair_whose_halves_have_another_arbiter_does_not_meet(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(arbiter="witness")
    pair.witness.start()
    for node in pair.nodes:
        node.init()
    pair.alpha.start()
    text = pair.config.read_text()
    pair.config.write_text(text.replace('arbiter = "witness"', 'arbiter = "none"'))
    pair.beta.start()
    until(pair.beta, lambda: "its arbiter is witness, ours none" in pair.beta.log())
    until(pair.alpha, lambda: "its arbiter is none, ours witness" in pair.alpha.log())


def test_nobody_is_primary_before_a_person_says_so(pair: Pair, model: Model) -> None:
    pair.witness.start()
    for node in pair.nodes:
        node.init()
        node.start()
    pair.alpha.wait("connected")
    for node in pair.nodes:
        with AdminClient(str(node.path("ctl"))) as client, pytest.raises(PeerError, match="nobody serves"):
            client.wait_for("primary", timeout=1.5)
    pair.alpha.promote()
    serve(pair.alpha, model)
    finish(pair, model)
