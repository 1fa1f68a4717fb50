"""A pair of real daemons for the benchmarks: `mirrorpair init`, `run`, `promote`, joined over TCP loopback.

Rules:
- NBD over unix sockets in a short folder of their own (the path of a unix socket is limited), images in the shop's.
- Images are made by `init` and then filled from outside while no daemon runs, the same bytes on both nodes and by
  writes of one size: so a new pair has nothing to resync, and every page has the folio it was meant to have.
- Nothing waits by the clock; only a hang reaches a limit. Every process is ended by its id.
- The control socket is spoken to by the project's own client: a command's start would hide what is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.measure import end_group
from bench.settings import KIB, MIB
from bench.workshop import CannotRun, Failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.workshop import Workshop

HANG_S = 120.0
VOLUME = "data"
SEED = 20263
SERVED = 4 * KIB
"""Chunk of images that clients write to: small folios, what a file has that was written by small requests. A 4 KiB
write into a large folio costs ten times more in the kernel and would hide the servers."""
SCANNED = MIB
"""Chunk of images that are resynced: large folios, what reading ahead leaves."""

_CONFIG = """
[pair]
name = "bench"
{arbiter}
[heartbeat]
{heartbeat}
[volume.data]
size = "{size}"
"""
_NODE = """
[node.{name}]
address = "127.0.0.1:{port}"
state-dir = "{folder}"
control = "{sockets}/{name}.ctl"
nbd = ["unix:{sockets}/{name}.nbd"]
image.data = "{image}"
"""


_HELD: list[socket.socket] = []


def free_port() -> int:
    """Nobody else is given it before this process ends: a socket holds it, which does not listen and lets others."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)
    return int(held.getsockname()[1])


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], what: str) -> None:
    """Until somebody listens there. `Failed` when the process ends first."""
    deadline = time.monotonic() + HANG_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise Failed(f"{what} ended with {process.wait(0.01)}")
        if time.monotonic() > deadline:
            raise Failed(f"{what} did not listen within {HANG_S:.0f} s")


def flush_file(path: Path) -> None:
    """No writeback of one subject may run while the next is measured."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def end_process(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
    """The exit code; a process that does not end in time is killed."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    end_group(process.pid)
    return int(process.returncode)


class Node:
    def __init__(self, pair: LivePair, name: str, image: Path) -> None:
        self.name = name
        self.image = image
        self.control = pair.sockets / f"{name}.ctl"
        self.nbd = pair.sockets / f"{name}.nbd"
        self.log = pair.folder / f"{name}.log"
        self._pair = pair
        self._process: subprocess.Popen[bytes] | None = None
        self._left: list[int] = []
        """pidfds of the sentinels of daemons that were killed"""

    @property
    def pid(self) -> int:
        if self._process is None:
            raise Failed(f"{self.name} does not run")
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{VOLUME}?socket={self.nbd}"

    def _argv(self, *words: str) -> list[str]:
        return [self._pair.shop.mirrorpair(), "-c", str(self._pair.config), "--node", self.name, *words]

    def init(self) -> None:
        done = subprocess.run(
            self._argv("init"),
            env=self._pair.env,
            cwd=self._pair.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_S,
        )
        if done.returncode != 0:
            raise Failed(f"mirrorpair init of {self.name} ended with {done.returncode}: {done.stderr.strip()}")

    def start(self) -> None:
        """Returns when the process is made; `until_up` when it answers."""
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._argv("run"),
                env=self._pair.env,
                cwd=self._pair.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def until_up(self) -> None:
        """Until it has opened everything and answers at its control socket."""
        assert self._process is not None
        wait_for_socket(self.control, self._process, f"mirrorpair run of {self.name}")
        deadline = time.monotonic() + HANG_S
        while self.ask(lambda client: client.status()).starting:
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} did not finish starting within {HANG_S:.0f} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise Failed(f"{self.name} ended with {self._process.wait(0.01)} while starting: {self.tail()}")

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """`question` gets an open AdminClient. Whatever goes wrong is `Failed`, with the end of the log."""
        from mirrorpair.control import AdminClient
        from mirrorpair.errors import MirrorpairError

        try:
            with AdminClient(str(self.control), patience_s=HANG_S) as client:
                return question(client)
        except MirrorpairError as error:
            raise Failed(f"{self.name}: {error}; its log ends: {self.tail()}") from error

    def promote(self, *, alone: bool = False) -> None:
        """`alone`: no peer was ever there."""
        self.ask(lambda client: client.promote(accept_data_loss=alone, force=alone))
        self.wait("primary")

    def wait(self, condition: str) -> None:
        self.ask(lambda client: client.wait_for(condition, timeout=HANG_S))

    def last_seq(self) -> int:
        return max((event.seq for event in self.events()), default=0)

    def events(self, since: int = 0) -> list[Any]:
        return list(self.ask(lambda client: client.events(since)))

    def client(self) -> Any:
        """A connection for writes of the harness itself; a context manager."""
        from mirrorpair.nbdclient import connect

        return connect(str(self.nbd), VOLUME)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Graceful; everything is durable."""
        assert self._process is not None
        process, self._process = self._process, None
        status = end_process(process)
        if status != 0:
            raise Failed(f"{self.name} ended with {status} after SIGTERM: {self.tail()}")

    def kill(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        self._left += [os.pidfd_open(pid) for pid in sentinels(process.pid)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end_group(process.pid)

    def end_sentinels(self) -> None:
        """Of daemons that were killed, as far as they have not ended by themselves."""
        while self._left:
            end = self._left.pop()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
            os.close(end)

    def tail(self) -> str:
        try:
            return " | ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:])[-600:]
        except OSError:
            return "(nothing)"


class LivePair:
    """alpha and beta. A context manager: what it started and made is gone afterwards."""

    def __init__(
        self, shop: Workshop, size: int, *, heartbeat: str = 'profile = "default"', witness: bool = False
    ) -> None:
        """`witness`: arbitrated, by a witness of its own."""
        need_client()
        self.shop = shop
        self.size = size
        self.env = shop.environment(flush=True)
        self.folder = Path(tempfile.mkdtemp(prefix="pair-", dir=shop.images))
        self.sockets = Path(tempfile.mkdtemp(prefix="mpb-"))
        self.config = self.folder / "pair.toml"
        self.alpha = Node(self, "alpha", self.folder / "alpha.img")
        self.beta = Node(self, "beta", self.folder / "beta.img")
        self._witness: subprocess.Popen[bytes] | None = None
        self._arbitrated = witness
        arbiter = 'arbiter = "none"'
        if witness:
            where = f'[witness]\naddress = "127.0.0.1:{free_port()}"\nstate-dir = "{self.folder / "records"}"'
            arbiter = f'arbiter = "witness"\n{where}'
        text = _CONFIG.format(heartbeat=heartbeat, size=size, arbiter=arbiter)
        for node in self.nodes:
            text += _NODE.format(
                name=node.name, port=free_port(), folder=self.folder / node.name, sockets=self.sockets, image=node.image
            )
        self.config.write_text(text, encoding="utf-8")

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.alpha, self.beta

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
            node.end_sentinels()
        if self._witness is not None:
            end_process(self._witness)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)

    def up(self, chunk: int) -> None:
        """Both made and mirroring, alpha primary, nothing left to resync; images written by `chunk`."""
        for node in self.nodes:
            node.init()
        self.shop.image_tool("build", self.alpha.image, self.size, f"--seed={SEED}", f"--chunk={chunk}")
        self.shop.image_tool("clone", self.alpha.image, self.beta.image, f"--chunk={chunk}")
        self.run_both()

    def run_both(self) -> None:
        if self._arbitrated:
            self._start_witness()
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.until_up()
        self.alpha.wait("connected")
        self.alpha.promote()
        self.synced()

    def _start_witness(self) -> None:
        with (self.folder / "witness.log").open("ab") as out:
            self._witness = subprocess.Popen(
                [self.shop.mirrorpair(), "-c", str(self.config), "witness"],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def up_alone(self, chunk: int) -> None:
        """alpha without a peer."""
        self.alpha.init()
        self.shop.image_tool("build", self.alpha.image, self.size, f"--seed={SEED}", f"--chunk={chunk}")
        self.alpha.start()
        self.alpha.until_up()
        self.alpha.promote(alone=True)

    def synced(self) -> None:
        for node in self.nodes:
            node.wait("synced")

    def finish(self) -> None:
        """Stops both; then both images must hold the same bytes."""
        self.synced()
        for node in (self.beta, self.alpha):
            node.stop()
        self.same_images()

    def same_images(self) -> None:
        different = int(self.shop.image_tool("equal", self.alpha.image, self.beta.image)[0]["different"])
        if different:
            raise Failed(f"{different} bytes differ between the two images of a pair that said it was in sync")


def sentinels(daemon: int) -> list[int]:
    """Children of the daemon that watch it for its peer; one in an arbitrated pair, once it has begun."""
    found = []
    for children in Path(f"/proc/{daemon}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids = map(int, children.read_text(encoding="ascii").split())
            found += [pid for pid in pids if b"sentinel of" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def need_client() -> None:
    """`CannotRun` when the project's own clients cannot be imported here."""
    try:
        import mirrorpair.control
        import mirrorpair.nbdclient  # noqa: F401
    except ImportError as error:
        raise CannotRun(f"mirrorpair's control and NBD clients cannot be imported: {error}") from None
