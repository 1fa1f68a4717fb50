"""A pair and its witness on three hosts, and what a test asks of them.

Rules:
- The heartbeat is patient where nothing has to expire (PATIENT): a busy machine is no reason for a node to take over.
  Where something has to, the promise is short (HASTY), and the test must bear a takeover at any time.
- Everything waits for what it needs, with a limit that only a hang reaches.
- `finish` is the end of every test: the clients are gone, the volume is read back, both daemons stopped, the images
  equal and the history judged; and the register says what the table of events says.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from load import Load
from network import ADDRESSES
from pair import HANG_S, MIB, Daemon, Pair

from mirrorpair.arbiter.recordfile import load as load_record
from mirrorpair.control import AdminClient
from mirrorpair.errors import MirrorpairError
from mirrorpair.units import parse_seconds

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from network import Network

    from mirrorpair.arbiter import Register

PATIENT: dict[str, Any] = {"interval": "100ms", "promise": "15s", "suspect_after": 15}
PLANNED: dict[str, Any] = {**PATIENT, "suspect_after": 50}
"""for changes that a person asks for, which would rightly be refused while the nodes miss each other"""
HASTY: dict[str, Any] = {"interval": "100ms", "promise": "3s", "suspect_after": 15}
SIZE = 4 * MIB


class World:
    """Made with the options of a Pair."""

    def __init__(self, network: Network, folder: Path, rng: random.Random, **options: Any) -> None:
        self.network = network
        self._options = {"size": SIZE, **PATIENT, **options}
        self._rng = rng
        self._loads: list[Load] = []
        self.pair = Pair(folder, arbiter="witness", addresses=ADDRESSES, **self._options)
        self.witness = self.pair.witness
        self.alpha, self.beta = self.pair.alpha, self.pair.beta
        self.witness.prefix = network.hosts["witness"].prefix
        for node in self.pair.nodes:
            node.prefix = network.hosts[node.name].prefix

    def up(self) -> World:
        self.pair.up()
        return self

    def load(self, **options: Any) -> Load:
        self._loads.append(Load(self.pair, self._rng, **options))
        return self._loads[-1]

    def record(self) -> Register:
        """As the witness's disk has it."""
        return load_record(str(self.witness.records / "shop.record"), "shop").register

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Looks again and again. It waits for something that does not happen, which keeps it from being busy."""
        for _ in range(int(HANG_S / 0.05)):
            if holds():
                return
            wait_a_moment(self.pair)
        raise AssertionError(f"this never happens: {what}\n{self.pair.logs()}")

    def in_sync(self, *names: str) -> None:
        self.until(lambda: self.record().in_sync == names, f"{names} are in sync")

    def expired(self, node: Daemon) -> int:
        """Waits until the last beat of it that was answered is older than any promise: from then on (the time that it
        returns) it may answer nothing."""
        promise_s = parse_seconds(self._options["promise"])
        self.until(lambda: (node.status().heartbeat_age_s or 0.0) >= promise_s, f"the promise to {node.name} ends")
        return time.monotonic_ns()

    def says_nothing(self, load: Load, node: Daemon, since: int) -> None:
        """Asked again and again, it has answered nothing that it was asked since then."""
        for _ in range(4):
            load.ask(node)
            wait_a_moment(self.pair)
        asked = load.history.waiting(node.name, write=False) + load.history.waiting(node.name, write=True)
        assert asked, "nobody waits for anything"
        assert load.history.answers_to(node.name, since) == [], self.pair.logs()

    def lose_host(self, *nodes: Daemon) -> None:
        """All of them at once, as by a loss of power but for the caches: nobody is left who could prove a death."""
        sentinels = [node.sentinel() for node in nodes]
        for node in nodes:
            node.freeze()
        for sentinel in sentinels:
            os.kill(sentinel, signal.SIGKILL)
        for node in nodes:
            node.kill()

    def finish(self, load: Load, *, terms: tuple[str, ...], role_changes: int, epoch: int | None = None) -> None:
        """`terms`: who served one after the other."""
        self.pair.synced()
        load.leave()
        (primary,) = [node for node in self.pair.nodes if node.status().role == "primary"]
        assert primary.name == terms[-1], self.pair.logs()
        content = load.read_back(primary)
        record = self.record()
        assert (record.primary, sorted(record.in_sync)) == (terms[-1], ["alpha", "beta"]), self.pair.logs()
        assert len(record.role_changes) == role_changes, (record, self.pair.logs())
        assert epoch in (None, record.epoch), (record, self.pair.logs())
        for node in (self.pair.beta, self.pair.alpha) if primary.name == "alpha" else self.pair.nodes:
            assert node.stop() == 0, self.pair.logs()
        self.pair.same_images()
        assert self.alpha.image().read_bytes() == content
        load.judge(list(terms))

    def end(self) -> None:
        self.pair.end()
        for load in self._loads:
            load.end()


def wait_a_moment(pair: Pair) -> None:
    for node in pair.nodes:
        if node.process is None:
            continue
        try:
            with AdminClient(str(node.path("ctl")), patience_s=0.05) as client:
                client.wait_for("primary" if client.status().role == "secondary" else "secondary", timeout=0.05)
        except MirrorpairError:
            continue
        return
