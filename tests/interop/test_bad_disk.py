"""Disks that fail or hang under a running node: real FUSE files that do so on demand (baddisk.py). F8, F9, F10, A14.

alpha's image is on such a disk, or beta's. What a client was told is what is judged: as long as the other node has
everything, no error of a disk reaches it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from baddisk import bad_disk, needs_bad_disks
from model import BLOCK, Model, serve
from pair import MIB, Pair
from test_failover import record, until

from mirrorpair.errors import RemoteError
from mirrorpair.nbdclient import NbdError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from baddisk import BadDisk
    from pair import Daemon

    from mirrorpair.nbdclient import NbdClient

pytestmark = needs_bad_disks
SIZE = 8 * MIB


class Scene:
    """A running pair, alpha primary; the image of `node` is on `disk`."""

    def __init__(self, pair: Pair, node: Daemon, disk: BadDisk, rng: random.Random) -> None:
        self.pair, self.node, self.disk = pair, node, disk
        self.other = pair.beta if node is pair.alpha else pair.alpha
        self.model = Model(SIZE, rng)

    def finish(self) -> None:
        """The disk is good again, and its node is started anew if it has to be: both get equal."""
        self.pair.synced()
        with the_primary(self.pair).client() as client:
            self.model.check(client)
            client.flush()
        for node in self.pair.nodes:
            assert node.stop() == 0, self.pair.logs()
        contents = [self.disk.path.read_bytes(), self.other.image().read_bytes()]
        assert contents == [bytes(self.model.data)] * 2


def the_primary(pair: Pair) -> Daemon:
    (primary,) = [node for node in pair.nodes if node.status().role == "primary"]
    return primary


@pytest.fixture
def make_scene(tmp_path: Path, rng: random.Random) -> Iterator[Callable[..., Scene]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "alpha", error: str = "EIO", arbiter: str = "witness") -> Scene:
            disk = stack.enter_context(bad_disk(tmp_path / "disk", SIZE, error))
            folder = tmp_path / "pair"
            folder.mkdir()
            # Whatever happens here, no promise runs out by itself: who changes the roles is who abdicates.
            pair = Pair(folder, size=SIZE, arbiter=arbiter, promise="600s", interval="100ms", suspect_after=50)
            stack.callback(pair.end)
            stack.callback(disk.go_on)  # first of all: what hangs cannot end
            text = pair.config.read_text()
            assert text.count(f'"{name}-data.img"') == 1
            pair.config.write_text(text.replace(f'"{name}-data.img"', f'"{disk.path}"'))
            if arbiter == "witness":
                pair.witness.start()
            for node in pair.nodes:
                node.init(*(["--keep-data"] if node.name == name else []))  # this file cannot be truncated
                node.start()
            pair.alpha.wait("connected")
            scene = Scene(pair, getattr(pair, name), disk, rng)
            scene.node.promote()
            pair.synced()
            if scene.node is pair.beta:
                scene.node.command("switchover")
                pair.alpha.wait("primary")
                pair.synced()
            return scene

        yield make


def disk_state(node: Daemon) -> str:
    return node.status().volumes[0].disk


def abdicated(scene: Scene) -> None:
    """alpha, whose disk failed, has given its role to beta, and says so."""
    scene.pair.beta.wait("primary")
    register = record(scene.pair)
    assert (register.primary, register.in_sync, register.failed) == ("beta", ("beta",), ("alpha",))
    assert "has everything and gets epoch" in scene.pair.alpha.log()
    assert disk_state(scene.pair.alpha) == "failed"
    assert scene.pair.alpha.status().role == "secondary"


def comes_back(scene: Scene) -> None:
    """With another disk, or the same one mended: a new daemon; then it has everything again, and has not failed."""
    scene.disk.well()
    scene.pair.alpha.stop()
    scene.pair.alpha.start()
    scene.pair.synced()
    until(scene.pair.beta, lambda: record(scene.pair).failed == ())


class Load:
    """Writes and reads back, until the connection ends; an error that it is told is what must not be."""

    def __init__(self, scene: Scene) -> None:
        self.model = scene.model
        self.last: tuple[int, bytes] | None = None
        """what was in hand as the connection ended"""

    def run(self, client: NbdClient) -> None:
        rng = self.model.rng
        while True:
            at, length = rng.randrange(SIZE - BLOCK), rng.choice([512, 4096, BLOCK])
            data = rng.randbytes(length)
            try:
                self.model.data[at : at + length] = data
                client.write(at, data, fua=rng.random() < 0.3)
                assert client.read(at, length) == data
                if rng.random() < 0.2:
                    client.flush()
            except NbdError:
                raise
            except RemoteError:
                self.last = (at, data)
                return


def until_it_moves(scene: Scene, break_it: Callable[[], None]) -> None:
    """Load at alpha, whose disk breaks meanwhile."""
    load = Load(scene)
    with scene.pair.alpha.client() as client:
        serve(scene.pair.alpha, scene.model)
        break_it()
        load.run(client)
    abdicated(scene)
    with scene.pair.beta.client() as client:
        if load.last is not None:  # nobody knows what became of it: written again, it is known
            client.write(*load.last)
        scene.model.check(client)


@pytest.mark.parametrize(
    ("kinds", "error"),
    [(("pwrite",), "EIO"), (("pread", "pwrite", "trim", "zero"), "EIO"), (("pwrite", "zero"), "ENOSPC")],
    ids=["f9-writes", "f9-all", "f10-full"],
)
def test_f9_a_failing_disk_of_the_primary_is_no_clients_error(
    make_scene: Callable[..., Scene], kinds: tuple[str, ...], error: str
) -> None:
    scene = make_scene(error=error)
    until_it_moves(scene, lambda: scene.disk.fail(*kinds))
    serve(scene.pair.beta, scene.model)
    comes_back(scene)
    scene.finish()


def forget_cached(disk: BadDisk) -> None:
    """Nothing of the image is in the page cache of its mount any more."""
    fd = os.open(disk.path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def test_f9_a_read_that_fails_here_is_answered_from_the_peer(make_scene: Callable[..., Scene]) -> None:
    """The pair is paused, so that the role stays, and every read goes that way."""
    scene = make_scene()
    serve(scene.pair.alpha, scene.model)
    scene.pair.alpha.command("pause")
    forget_cached(scene.disk)
    scene.disk.fail("pread")
    with scene.pair.alpha.client() as client:
        scene.model.check(client)
    until(scene.pair.alpha, lambda: disk_state(scene.pair.alpha) == "failed")
    assert scene.pair.alpha.status().role == "primary"
    scene.pair.alpha.command("resume")
    abdicated(scene)
    comes_back(scene)
    scene.finish()


@pytest.mark.slow
def test_f8_a_hanging_disk_of_the_primary_moves_the_role_and_its_clients(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    until_it_moves(scene, scene.disk.hang)
    serve(scene.pair.beta, scene.model)
    assert disk_state(scene.pair.alpha) == "failed"
    scene.disk.go_on()
    scene.pair.alpha.wait("synced")  # what hung has ended: nothing of it is lost, and nobody has to start anything
    assert disk_state(scene.pair.alpha) == "up-to-date"
    scene.finish()


@pytest.mark.slow
def test_f8_a_hanging_disk_of_the_secondary_leaves_the_set_and_comes_back(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("beta")
    serve(scene.pair.alpha, scene.model)
    scene.disk.hang()
    with scene.pair.alpha.client() as client:
        scene.model.write(client)  # the first one waits until beta has left the set; none fails
    assert (record(scene.pair).primary, record(scene.pair).in_sync) == ("alpha", ("alpha",))
    serve(scene.pair.alpha, scene.model)
    scene.disk.go_on()
    scene.pair.synced()
    scene.finish()


def test_f9_a_failing_disk_of_the_secondary_leaves_the_set(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("beta")
    serve(scene.pair.alpha, scene.model)
    scene.disk.fail("pwrite", "zero", "trim")
    serve(scene.pair.alpha, scene.model)
    assert (record(scene.pair).primary, record(scene.pair).in_sync) == ("alpha", ("alpha",))
    assert disk_state(scene.pair.beta) == "failed"
    answer = scene.pair.beta.command("promote", check=False)
    assert answer.returncode != 0
    scene.disk.well()
    scene.pair.beta.stop()
    scene.pair.beta.start()
    scene.finish()


def test_without_a_peer_that_has_everything_a_client_is_told_of_the_disk(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.pair.beta.stop()
    until(scene.pair.alpha, lambda: record(scene.pair).in_sync == ("alpha",))
    serve(scene.pair.alpha, scene.model)
    scene.disk.fail("pwrite")
    with scene.pair.alpha.client() as client:
        with pytest.raises(NbdError, match=r"(?i)input/output error|EIO"):
            client.write(0, b"x" * 4096)
        scene.disk.well()
        client.write(0, b"y" * 4096)
        scene.model.data[:4096] = b"y" * 4096
    assert scene.pair.alpha.status().role == "primary"
    scene.pair.beta.start()
    # Who has a disk that failed is linked with nobody until somebody has looked after it, and says so.
    until(
        scene.pair.beta,
        lambda: (refusal := scene.pair.beta.status().refusal) is not None and "failed" in refusal.reason,
    )
    scene.pair.alpha.kill()
    scene.pair.alpha.start()
    scene.pair.alpha.wait("primary")
    scene.finish()


def test_a19_a_paused_pair_keeps_its_primary_and_tells_of_the_disk(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.pair.alpha.command("pause")
    scene.disk.fail("pwrite")
    with scene.pair.alpha.client() as client, pytest.raises(NbdError):
        client.write(0, b"x" * 4096)
    assert scene.pair.alpha.status().role == "primary"
    scene.disk.well()
    with scene.pair.alpha.client() as client:
        client.write(0, b"y" * 4096)
    scene.model.data[:4096] = b"y" * 4096
    scene.pair.alpha.command("resume")
    abdicated(scene)
    comes_back(scene)
    scene.finish()


def test_a_lone_pair_reads_from_the_peer_and_tells_of_what_it_cannot_write(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(arbiter="none")
    serve(scene.pair.alpha, scene.model)
    forget_cached(scene.disk)
    scene.disk.fail("pread", "pwrite")
    with scene.pair.alpha.client() as client:
        scene.model.check(client)
        with pytest.raises(NbdError):
            client.write(0, b"x" * 4096)
        scene.disk.well()
        client.write(0, b"y" * 4096)
    scene.model.data[:4096] = b"y" * 4096
    assert scene.pair.alpha.status().role == "primary"
    assert disk_state(scene.pair.alpha) == "failed"
    scene.pair.alpha.stop()
    scene.pair.alpha.start()
    scene.pair.alpha.wait("primary")
    scene.finish()
