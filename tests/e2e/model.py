"""What a volume must hold, for the tests of pairs: every write that was acknowledged."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

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
