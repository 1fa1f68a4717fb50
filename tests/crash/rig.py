"""A pair whose daemons die at a chosen system call, run in another boot, or have their writes recorded.

Rules:
- Everything is armed through a page of memory that the test and the daemon share (shim.c): no tracer, no timing.
- After a crash `recover` does what a person would do, and no more: start what is not running, wait until both are
  connected, promote the one that was primary if nobody is. Never with --accept-data-loss.
- Whatever recovers is judged twice: by the oracle through NBD, and by comparing the images byte by byte.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import time
import uuid
from typing import TYPE_CHECKING

import pytest
from oracle import SECTOR, Oracle, content, take
from pair import HANG_S

from mirrorpair.config import load
from mirrorpair.control import AdminClient
from mirrorpair.errors import MirrorpairError, PeerError, PeerProtocolError, UnreachableError
from mirrorpair.newnode import make_node

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from oracle import Content
    from pair import Daemon, Pair

    from mirrorpair.nbdclient import NbdClient

CALLS = ("pwrite", "pwritev2", "write", "fdatasync", "fsync", "fallocate", "rename", "sendmsg", "recv")
EVERY = os.environ.get("MIRRORPAIR_TEST_EVERY") == "1"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
IN_BOOT = ("unshare", "--mount", "--propagation", "private", "sh", "-c", f'mount --bind "$0" {BOOT_ID} && exec "$@"')
WRITES = 250
SIZE = 4 << 20
BLOCK = 4096
EXTENT = 64 * BLOCK
_PAGE_BYTES = 4096
_U64 = struct.Struct("<Q")


class Page:
    """What one daemon has mapped: how often it made each call, and what is armed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_PAGE_BYTES))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _PAGE_BYTES)

    def _set(self, index: int, value: int) -> None:
        _U64.pack_into(self._map, 8 * index, value)

    def _get(self, index: int) -> int:
        found: int = _U64.unpack_from(self._map, 8 * index)[0]
        return found

    def count(self, call: str) -> int:
        return self._get(CALLS.index(call))

    def arm(self, call: str, when: int, *, after: bool = False) -> None:
        self._set(2 * len(CALLS), after)
        self._set(len(CALLS) + CALLS.index(call), when)

    def disarm(self) -> None:
        for index in range(len(CALLS), 2 * len(CALLS) + 2):
            self._set(index, 0)

    @property
    def fired(self) -> bool:
        return bool(self._get(2 * len(CALLS) + 1))


class Rig:
    """A pair under crashes, with its oracle."""

    def __init__(self, pair: Pair, shim: Path, rng: random.Random, place: Callable[[int], int] | None = None) -> None:
        self.pair = pair
        self.rng = rng
        self.place = place
        self.oracle = Oracle(pair.size, rng, place)
        self.logs: dict[str, Path] = {}
        """node -> where its writes are recorded, from its next start on"""
        text = pair.config.read_text()
        # Small blocks: many extents in a small volume.
        pair.config.write_text(text.replace(f'size = "{pair.size}"', f'size = "{pair.size}"\nblock-size = "{BLOCK}"'))
        self._shim = shim
        self._boots: dict[str, Path] = {}
        self.pages = {node.name: Page(pair.folder / f"{node.name}.page") for node in pair.nodes}
        self.rounds = 0
        self.hit = False
        """what was armed has happened; the test sets it back"""

    # --- processes

    def init(self) -> None:
        config = load(str(self.pair.config))
        for node in self.pair.nodes:
            make_node(config, config.node(node.name), force=True)

    def fresh(self) -> None:
        """Forgets what was written: `init` comes next, and zeroes the images."""
        for node in self.pair.nodes:
            self._forget(node)
        self.oracle = Oracle(self.pair.size, self.rng, self.place)

    def blank(self, node: Daemon) -> None:
        """A blank disk takes the place of this node's; it does not run."""
        self._forget(node)
        config = load(str(self.pair.config))
        make_node(config, config.node(node.name), force=True)

    def _forget(self, node: Daemon) -> None:
        for name in ("register", "node"):
            self.state(node, name).unlink(missing_ok=True)

    def state(self, node: Daemon, name: str) -> Path:
        return self.pair.folder / node.name / f"shop.{node.name}" / name

    def new_boot(self, node: Daemon) -> None:
        """From its next start on: as if the host had lost power. Skips where mounts are not allowed."""
        path = self.pair.folder / f"{node.name}.boot"
        path.write_text(f"{uuid.uuid4()}\n")
        self._boots[node.name] = path

    def start(self, node: Daemon, *, wait: bool = True) -> None:
        words = [
            "env",
            f"LD_PRELOAD={self._shim}",
            f"CRASH_PAGE={self.pages[node.name].path}",
            f"CRASH_ROOT={self.pair.folder}",
        ]
        if node.name in self.logs:
            words += [f"CRASH_LOG={self.logs[node.name]}"]
        if node.name in self._boots:
            words = [*IN_BOOT, str(self._boots[node.name]), *words]
        node.start(*words, wait=wait)

    def up(self) -> None:
        self.init()
        self.start_both()
        self.pair.alpha.wait("connected")
        self.pair.alpha.promote()
        self.pair.synced()

    def start_both(self) -> None:
        for node in self.pair.nodes:
            if node.process is None:
                self.start(node, wait=False)
        for node in self.pair.nodes:
            node.until_up()

    def arm(self, name: str, call: str, when: int, after: object) -> None:
        """SIGKILL for the node `name` before, or right after, its Nth such call from now."""
        print(f"{self.pair.folder.name} round {self.rounds}: {name} dies {'after' if after else 'at'} {call} {when}")
        self.pages[name].arm(call, when, after=bool(after))

    def kill(self, node: Daemon) -> None:
        """Whether it is dead already or not."""
        self.hit |= self.pages[node.name].fired
        self.pages[node.name].disarm()
        if node.process is not None:
            node.kill()

    def died(self, node: Daemon) -> bool:
        return self.pages[node.name].fired or node.process is None or node.process.poll() is not None

    def reach(self, node: Daemon, condition: str, victim: Daemon) -> bool:
        """Waits for the condition; False: the victim died before."""
        end = time.monotonic() + HANG_S
        while not self.died(victim):
            if waited(node, condition):
                return True
            assert time.monotonic() < end, f"{node.name} is never {condition}\n{self.pair.logs()}"
        return False

    # --- crashes

    @contextlib.contextmanager
    def clients(self, primary: Daemon | None = None) -> Iterator[tuple[NbdClient, NbdClient]]:
        """Two connections."""
        node = primary or self.pair.alpha
        with node.client() as one, node.client() as other:
            yield one, other

    def write_until_death(self, victim: Daemon, *, primary: Daemon | None = None, most: int = WRITES) -> None:
        """Clients write, and the victim dies of what is armed, or else at the end with requests in flight."""
        with lost(), self.clients(primary) as (client, other):
            alive = self.oracle.write(client, most, other=other, until=lambda: self.died(victim))
            if not self.died(victim):
                # N was not reached: it dies in the middle of something else.
                self.oracle.write(client, 10, finish=victim.kill)
            elif alive and victim is not (primary or self.pair.alpha):
                self.oracle.write(client, 20, other=other)
        self.kill(victim)

    def recover(self, primary: Daemon | None = None, *, check: bool = True) -> Daemon:
        """Both in sync again; the primary. `primary`: who is promoted first if nobody is."""
        self.rounds += 1
        for node in self.pair.nodes:
            if node.process is not None and self.died(node):
                self.kill(node)
            self.pages[node.name].disarm()
        self.start_both()
        self.pair.alpha.wait("connected")
        found = self.primary(primary)
        self.pair.synced()
        if check:
            self.check(found)
        return found

    def primary(self, wanted: Daemon | None = None) -> Daemon:
        """Who is; or who takes the role without the loss of anything when asked for it: first `wanted`, or alpha."""
        wanted = wanted or self.pair.alpha
        end = time.monotonic() + HANG_S
        said = []
        while time.monotonic() < end:
            for node in self.pair.nodes:
                if node.status().role == "primary":
                    return node
            said = []
            for node in sorted(self.pair.nodes, key=lambda one: one is not wanted):
                try:
                    node.promote()
                    break
                except PeerError as error:
                    said.append(str(error))
            waited(wanted, "primary")
        raise AssertionError(f"nobody becomes primary: {said}\n{self.pair.logs()}")

    def check(self, primary: Daemon, *, flushed: bool = False, at_ns: int | None = None) -> None:
        """Both in sync: the oracle through NBD, then the images against each other."""
        with primary.client() as client:
            self.judge(self.read_all(client), "read through NBD", flushed=flushed, at_ns=at_ns)
            client.flush()
        one, other = (content(node.image()) for node in self.pair.nodes)
        different = sorted(at for at in one.keys() | other.keys() if one.get(at) != other.get(at))
        assert not different, f"{len(different)} sectors differ, first {different[0]}\n{self.pair.logs()}"
        self.judge(one, "in the images", flushed=flushed, at_ns=at_ns)
        self.oracle.settle(one)

    def read_all(self, client: NbdClient) -> Content:
        """The extents that were ever written to; the images are compared whole."""
        found: Content = {}
        for extent in sorted({sector * SECTOR // EXTENT for sector in self.oracle.history}):
            take(found, extent * EXTENT, client.read(extent * EXTENT, min(EXTENT, client.size - extent * EXTENT)))
        return found

    def judge(self, found: Content, where: str, *, flushed: bool = False, at_ns: int | None = None) -> None:
        wrong = self.oracle.problems(found, flushed=flushed, **({} if at_ns is None else {"at_ns": at_ns}))
        told = "\n".join([f"{where}: {len(wrong)} or more sectors are wrong", *wrong, self.pair.logs()])
        assert not wrong, told


def lost() -> contextlib.AbstractContextManager[None]:
    """That connections are lost with a daemon, or cannot be had, is no error."""
    return contextlib.suppress(UnreachableError, PeerProtocolError)


def waited(node: Daemon, condition: str) -> bool:
    """Whether it comes true within a moment."""
    try:
        with AdminClient(str(node.path("ctl"))) as client:
            client.wait_for(condition, timeout=0.1)  # type: ignore[arg-type]
        return True
    except MirrorpairError:
        return False


def need_boots() -> None:
    """Skips where a daemon cannot be shown another boot id."""
    done = subprocess.run([*IN_BOOT, BOOT_ID, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no mount namespace with another boot id can be had: {done.stderr.strip()}")
