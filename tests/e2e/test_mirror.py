"""Two real daemons: what clients were told is on both images, through stops, crashes, silence and role changes."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import TYPE_CHECKING

import pytest
from model import Model, finish, serve

from mirrorpair.control import AdminClient
from mirrorpair.errors import PeerError
from mirrorpair.metadata import Superblock, dump
from mirrorpair.nbdclient import ExportRefusedError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pair import Daemon, Pair

    from mirrorpair.history import Ids
    from mirrorpair.status import Event


def test_writes_are_on_both_images(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model, 100)
    status = pair.alpha.status()
    assert (status.health, status.serving, sorted(status.in_sync)) == ("healthy", "mirrored", ["alpha", "beta"]), (
        pair.logs()
    )
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
    assert caught.value.exit_code == 15
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


def test_both_told_to_stop_at_the_same_moment_stop_cleanly(pair: Pair, model: Model) -> None:
    """Each would wait for the other one's word that it is not needed any more."""
    pair.up()
    serve(pair.alpha, model)
    for node in pair.nodes:
        node.signal(signal.SIGTERM)
    for node in pair.nodes:
        assert node.stop() == 0
    assert "could not take" not in pair.logs()
    assert "was not told" not in pair.logs()
    pair.same_images()
    for node in pair.nodes:
        node.start()
    pair.alpha.wait("connected")
    with contextlib.suppress(PeerError):  # if beta came late; else it takes the role back by itself (A4, A18)
        pair.alpha.promote()
    pair.alpha.wait("primary")
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
        with pytest.raises(AssertionError, match=r"split brain|ancestor|wrote|written"):
            node.wait("connected")
        assert node.status().refusal.kind == "split-brain"
        assert node.command("wait", "--for", "synced", check=False).returncode == 20
        assert node.command("resync", "-y", check=False).returncode == 20
        shown = node.command("resync", "--dry-run", check=False)
        assert "split" in (shown.stdout + shown.stderr).lower()
        images[node.name] = node.image().read_bytes()[:4096]
    assert images == {"alpha": b"a" * 4096, "beta": b"b" * 4096}


def test_one_node_may_begin_before_the_other_is_there(pair: Pair, model: Model) -> None:
    pair.alpha.init()
    pair.alpha.start()
    with pytest.raises(PeerError, match="silent"):
        pair.alpha.promote()
    pair.alpha.promote(accept_data_loss=True, force=True)
    serve(pair.alpha, model)
    pair.beta.init()
    pair.beta.start()
    pair.synced()
    serve(pair.alpha, model)
    finish(pair, model)


def test_data_that_are_kept_are_copied_to_a_new_node(pair: Pair, model: Model) -> None:
    model.data[:] = model.rng.randbytes(len(model.data))
    pair.alpha.image().write_bytes(model.data)
    pair.alpha.init("--keep-data")
    pair.beta.init()
    for node in pair.nodes:
        node.start()
    pair.synced()
    pair.beta.promote()
    serve(pair.beta, model)
    finish(pair, model)


def test_an_image_that_was_replaced_is_copied_anew_and_not_promoted(pair: Pair, model: Model) -> None:
    """M1, A8: the same size, other bytes, and metadata that know nothing of it."""
    pair.up()
    serve(pair.alpha, model)
    assert pair.beta.stop() == 0
    image = pair.beta.image()
    image.rename(image.with_suffix(".old"))
    image.write_bytes(bytes(pair.size))
    assert pair.alpha.stop() == 0
    pair.beta.start()
    with pytest.raises(PeerError, match=r"inode|made at another time"):
        pair.beta.promote(accept_data_loss=True, force=True)
    pair.alpha.start()
    pair.alpha.wait("primary")
    finish(pair, model)


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


def test_a17_a_flap_is_sent_again_and_changes_nothing(make_pair: Callable[..., Pair], rng: random.Random) -> None:
    """The secondary's process is killed and is back before the deadline: same boot, so nothing that it had is gone."""
    pair = make_pair(interval="300ms", promise="40s", suspect_after=100)
    pair.up()
    model = Model(pair.size, rng)
    serve(pair.alpha, model)
    before = generation(pair.alpha)
    pair.beta.kill()
    with pair.alpha.client() as client:
        pending = client.start_write(8192, b"f" * 4096)
        pair.beta.start()
        pending.wait()
    model.data[8192:12288] = b"f" * 4096
    status = pair.alpha.wait("synced")
    assert sorted(status.in_sync) == ["alpha", "beta"]
    assert generation(pair.alpha) == before  # G1: no new one at a mere flap
    assert "alone" not in {event.new for event in events(pair.alpha)}
    finish(pair, model)


def generation(node: Daemon) -> Ids:
    found = dump(str(node.pair.folder / node.name / f"shop.{node.name}" / "data.meta")).value
    assert isinstance(found, Superblock)
    return found.ids


def events(node: Daemon) -> list[Event]:
    with AdminClient(str(node.path("ctl"))) as client:
        return client.events()


def test_writers_that_go_on_through_a_crash_of_the_secondary(pair: Pair, rng: random.Random) -> None:
    pair.up()
    model = Model(pair.size, rng)
    with pair.alpha.client() as client:
        for number in range(4):
            pending = []
            for _ in range(200):
                at = rng.randrange(pair.size // 4096) * 4096
                data = rng.randbytes(4096)
                pending.append(client.start_write(at, data))
                model.data[at : at + 4096] = data  # the server keeps the order of overlapping ones (W2)
            if number == 1:
                pair.beta.kill()
            if number == 3:
                pair.beta.start(wait=False)
            for one in pending:
                one.wait()
        pair.beta.until_up()
        model.write(client)
    finish(pair, model)


def test_a_write_that_was_answered_survives_the_kill_of_the_primary_that_answered_it(
    pair: Pair, rng: random.Random
) -> None:
    """Whatever was acknowledged is on the peer, which a person promotes; what was not may be either."""
    pair.up()
    acked: dict[int, bytes] = {}
    asked: dict[int, set[bytes]] = {}
    with pair.alpha.client() as client:
        pending = []
        for number in range(300):
            at = rng.randrange(pair.size // 4096) * 4096
            if at in asked:
                continue
            data = rng.randbytes(4096)
            asked[at] = {data, bytes(4096)}
            pending.append((at, data, client.start_write(at, data)))
            if number == 150:
                for one_at, one_data, one in pending[:100]:
                    one.wait()
                    acked[one_at] = one_data
        pair.alpha.kill()
    pair.beta.promote(accept_data_loss=True, force=True)
    with pair.beta.client() as client:
        for at, data in acked.items():
            assert client.read(at, 4096) == data
        for at, either in asked.items():
            assert client.read(at, 4096) in either
    pair.alpha.start()
    pair.synced()
    for node in pair.nodes:
        assert node.stop() == 0
    pair.same_images()


def test_the_commands_say_what_they_do(pair: Pair, model: Model) -> None:
    for node in pair.nodes:
        node.init()
        node.start()
    assert pair.alpha.command("wait", "--for", "connected", "--timeout", "60s").returncode == 0
    assert pair.beta.command("status", "--check", check=False).returncode == 2  # nobody is primary
    assert pair.beta.command("promote").returncode == 0
    assert pair.alpha.command("promote", check=False).returncode == 15
    pair.beta.command("wait", "--for", "synced", "--timeout", "60s")
    assert pair.beta.command("status", "--check").returncode == 0
    serve(pair.beta, model)
    plan = json.loads(pair.beta.command("resync", "data", "--dry-run", "--json").stdout.splitlines()[-1])
    assert plan["finished"] is True, plan
    pair.beta.command("resync", "data", "--full", "--wait", "-y")
    assert "beta" in pair.alpha.command("status").stdout
    pair.beta.command("demote")
    pair.alpha.command("promote")
    finish(pair, model)


def test_two_daemons_of_one_node_and_other_pairs_are_refused(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    pair.up()
    second = pair.alpha.command("run", check=False)
    assert second.returncode == 12, second.stderr
    pair.alpha.status()  # the first one goes on
    assert pair.beta.stop() == 0
    for name in ("node", "data.meta"):
        (pair.folder / "beta" / "shop.beta" / name).unlink()
    pair.beta.image().unlink()
    pair.beta.init()
    text = pair.config.read_text()
    pair.config.write_text(text.replace(f'size = "{pair.size}"', f'size = "{2 * pair.size}"'))
    wrong = pair.beta.command("run", check=False)
    assert wrong.returncode == 12
    assert "size" in wrong.stderr
    pair.config.write_text(text)
    pair.beta.start()
    pair.synced()
