"""Two real daemons: what clients were told is on both images, through stops, crashes, silence and role changes."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

import pytest

from mirrorpair.errors import PeerError
from mirrorpair.nbdclient import ExportRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pair import Daemon, Pair

    from mirrorpair.nbdclient import NbdClient

KIB = 1024
BLOCK = 64 * KIB


class Model:
    """What the volume must hold: every acknowledged write."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.data = bytearray(size)
        self.rng = rng

    def write(self, client: NbdClient, count: int = 20) -> None:
        size = len(self.data)
        for _ in range(count):
            length = self.rng.choice([1, 512, 4096, 5000, BLOCK, 3 * BLOCK + 7])
            at = self.rng.randrange(size - length)
            if self.rng.random() < 0.1:
                client.write_zeroes(at, length)
                self.data[at : at + length] = bytes(length)
                continue
            data = self.rng.randbytes(length)
            client.write(at, data, fua=self.rng.random() < 0.2)
            self.data[at : at + length] = data

    def check(self, client: NbdClient) -> None:
        for at in range(0, len(self.data), 1 << 20):
            piece = bytes(self.data[at : at + (1 << 20)])
            assert client.read(at, len(piece)) == piece, f"another content at {at}"


@pytest.fixture
def model(pair: Pair, rng: random.Random) -> Model:
    return Model(pair.size, rng)


def serve(node: Daemon, model: Model, count: int = 20) -> None:
    with node.client() as client:
        model.write(client, count)
        model.check(client)


def finish(pair: Pair, model: Model) -> None:
    """Both in sync; then nothing is in flight, and both images hold the model."""
    pair.synced()
    with next(node for node in pair.nodes if node.status().role == "primary").client() as client:
        model.check(client)
        client.flush()
    for node in pair.nodes:
        assert node.stop() == 0, pair.logs()
    pair.same_images()
    assert pair.alpha.image().read_bytes() == bytes(model.data)


def test_writes_are_on_both_images(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model, 100)
    status = pair.alpha.status()
    assert (status.health, status.serving, sorted(status.in_sync)) == ("healthy", "mirrored", ["alpha", "beta"]), pair.logs()
    finish(pair, model)


def test_several_volumes_change_together(make_pair: Callable[..., Pair], rng: random.Random) -> None:
    pair = make_pair(volumes=("data", "logs"), size=2 << 20)
    pair.up()
    for volume in pair.volumes:
        with pair.alpha.client(volume) as client:
            client.write(rng.randrange(1 << 20), rng.randbytes(100000))
    pair.alpha.demote()
    pair.beta.promote()
    pair.synced()
    for volume in pair.volumes:
        with pair.beta.client(volume) as client:
            client.write(rng.randrange(1 << 20), rng.randbytes(100000))
    for node in pair.nodes:
        assert node.stop() == 0
    pair.same_images()


def test_a_secondary_refuses_clients_and_names_the_primary(pair: Pair) -> None:
    pair.up()
    with pytest.raises(ExportRefusedError, match="beta is secondary: alpha is primary"), pair.beta.client():
        pass


def test_roles_change_by_hand_without_a_resync(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    with pytest.raises(PeerError, match="alpha is primary") as caught:
        pair.beta.promote()
    assert caught.value.exit_code == 12
    for old, new in ((pair.alpha, pair.beta), (pair.beta, pair.alpha)):
        epoch = old.status().epoch
        old.demote()
        assert "epoch" in new.promote()
        assert new.status().epoch > epoch  # A4
        pair.synced()
        serve(new, model)
    finish(pair, model)


def test_a_secondary_that_is_killed_gets_what_it_missed(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    pair.beta.kill()
    serve(pair.alpha, model)  # answers come once alpha has taken beta out of the set (A1)
    status = pair.alpha.status()
    assert (status.in_sync, status.serving) == (["alpha"], "alone")
    assert 0 < status.volumes[0].out_of_sync_bytes < pair.size
    pair.beta.start()
    pair.synced()
    serve(pair.alpha, model)
    finish(pair, model)


def test_a_secondary_that_stops_gracefully_stalls_nobody(pair: Pair, model: Model) -> None:
    pair.up()
    assert pair.beta.stop() == 0
    assert pair.alpha.status().in_sync == ["alpha"]  # A18: before it was gone
    serve(pair.alpha, model)
    pair.beta.start()
    finish(pair, model)


def test_a_secondary_that_hangs_is_dropped_and_comes_back(pair: Pair, model: Model) -> None:
    pair.up()
    pair.beta.signal(signal.SIGSTOP)
    serve(pair.alpha, model)
    assert pair.alpha.status().serving == "alone"
    pair.beta.signal(signal.SIGCONT)
    finish(pair, model)


def test_a_primary_that_is_killed_takes_its_role_back(pair: Pair, model: Model) -> None:
    """A4: a new epoch, without the peer in the set until the active extents were sent again."""
    pair.up()
    serve(pair.alpha, model)
    epoch = pair.alpha.status().epoch
    pair.alpha.kill()
    assert pair.beta.status().role == "secondary"
    pair.alpha.start()
    pair.alpha.wait("primary")
    assert pair.alpha.status().epoch > epoch
    serve(pair.alpha, model)
    finish(pair, model)


def test_a_primary_that_is_killed_is_replaced_by_a_person_and_comes_back_as_target(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    pair.alpha.kill()
    with pytest.raises(PeerError, match="alpha is silent") as caught:
        pair.beta.promote()
    assert caught.value.exit_code == 12
    pair.beta.promote(accept_data_loss=True)  # waits until its own promise is over (A11)
    serve(pair.beta, model)
    pair.alpha.start()
    pair.synced()
    assert pair.alpha.status().role == "secondary"
    serve(pair.beta, model)
    finish(pair, model)


def test_both_killed_come_back_with_everything_acknowledged(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    for node in pair.nodes:
        node.kill()
    for node in pair.nodes:
        node.start()
    pair.alpha.wait("primary")
    serve(pair.alpha, model)
    finish(pair, model)


def test_the_sole_member_comes_back_alone(pair: Pair, model: Model) -> None:
    pair.up()
    pair.beta.kill()
    serve(pair.alpha, model)
    pair.alpha.kill()
    pair.alpha.start()
    pair.alpha.wait("primary")
    serve(pair.alpha, model)
    pair.beta.start()
    finish(pair, model)


def test_a_clean_stop_of_both_and_a_start_of_both(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    assert pair.beta.stop() == 0
    assert pair.alpha.stop() == 0
    pair.same_images()
    for node in pair.nodes:
        node.start()
    pair.alpha.wait("primary")
    serve(pair.alpha, model)
    finish(pair, model)


def test_who_stopped_first_does_not_take_the_role_back_alone(pair: Pair, model: Model) -> None:
    """A18: beta may have been promoted since. And a person may promote beta, which has everything, without loss."""
    pair.up()
    serve(pair.alpha, model)
    assert pair.alpha.stop() == 0
    pair.beta.promote()
    serve(pair.beta, model)
    assert pair.beta.stop() == 0
    pair.alpha.start()
    with pytest.raises(PeerError) as caught:
        pair.alpha.promote()
    assert caught.value.exit_code == 12
    assert pair.alpha.status().role == "secondary"
    pair.beta.start()
    pair.beta.wait("primary")
    finish(pair, model)


def test_both_wrote_alone_is_a_split_brain_that_neither_overwrites(pair: Pair, rng: random.Random) -> None:
    pair.up()
    images = {}
    pair.alpha.kill()
    pair.beta.promote(accept_data_loss=True, force=True)
    with pair.beta.client() as client:
        client.write(0, b"b" * 4096, fua=True)
    pair.beta.kill()
    pair.alpha.start()
    pair.alpha.wait("primary")  # nobody has told it
    with pair.alpha.client() as client:
        client.write(0, b"a" * 4096, fua=True)
    pair.beta.start()
    for node in pair.nodes:
        with pytest.raises(AssertionError, match="split brain|ancestor|wrote|written"):
            node.wait("connected")
        assert node.status().refusal.kind == "split-brain"
        done = node.command("wait", "--for", "synced", check=False)
        assert done.returncode == 20
        images[node.name] = node.image().read_bytes()[:4096]
    assert images == {"alpha": b"a" * 4096, "beta": b"b" * 4096}


def test_a_blank_replacement_gets_everything(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    assert pair.beta.stop() == 0
    pair.beta.init("--force")
    pair.beta.start()
    pair.synced()
    serve(pair.alpha, model)
    finish(pair, model)


def test_a_primary_with_the_secondary_as_survivor_freezes(make_pair: Callable[..., Pair], rng: random.Random) -> None:
    pair = make_pair(survivor="secondary")
    pair.up()
    model = Model(pair.size, rng)
    serve(pair.alpha, model)
    pair.beta.signal(signal.SIGSTOP)
    with pair.alpha.client() as client:
        pending = client.start_write(0, b"x" * 4096)
        while pair.alpha.status().serving != "held" or "survivor" not in (pair.alpha.status().held or ""):
            pass
        assert "beta" in pair.alpha.status().in_sync
        pair.beta.signal(signal.SIGCONT)
        pending.wait()
        model.data[:4096] = b"x" * 4096
    finish(pair, model)
