"""A pair of real daemons for the tests: two processes on this host, joined by unix sockets in a folder of their own.

Rules:
- Nothing waits by the clock: commands wait for what they need (`wait --for`), with a limit that only a hang reaches.
- Whatever a test does, its processes are gone at the end, and only its own: also sentinels, which outlive a killed
  daemon for a while.
- `same_images` is the last word of every test that mirrored something.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from witnessside import Witness

from mirrorpair.control import AdminClient
from mirrorpair.nbdclient import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mirrorpair.address import TcpAddress
    from mirrorpair.nbdclient import NbdClient
    from mirrorpair.status import Status

HANG_S = 60.0
MIB = 1 << 20

CONFIG = """
[pair]
name = "shop"
{options}
{arbiter}

[heartbeat]
interval = "{interval}"
promise = "{promise}"
suspect-after = {suspect_after}

{volumes}
{nodes}
"""

NODE = """
[node.{name}]
address = "{address}"
state-dir = "{name}"
control = "{name}.ctl"
nbd = ["unix:{name}.nbd"]
{images}
"""


class Daemon:
    """One node. Its log is in `<folder>/<name>.log`. `prefix`: words in front of the command at each start, such as
    those that enter a namespace."""

    def __init__(self, pair: Pair, name: str) -> None:
        self.pair = pair
        self.name = name
        self.prefix: tuple[str, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None
        self.config = pair.config
        """the same file for both, unless a test gives one node its own"""
        self._left: list[int] = []
        """pidfds of the sentinels of daemons that were killed"""

    # --- the process

    def command(self, *words: str, check: bool = True, timeout: float = HANG_S) -> subprocess.CompletedProcess[str]:
        """`mirrorpair WORDS` for this node."""
        done = subprocess.run(
            [sys.executable, "-m", "mirrorpair", "-c", str(self.config), "--node", self.name, *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}"
        return done

    def start(self, *before: str, wait: bool = True) -> None:
        """`before`: words in front of the command, such as a tracer."""
        assert self.process is None
        with (self.pair.folder / f"{self.name}.log").open("ab") as out:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    *before,
                    sys.executable,
                    "-m",
                    "mirrorpair",
                    "-v",
                    "-c",
                    str(self.config),
                    "--node",
                    self.name,
                    "run",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        if wait:
            self.until_up()

    def until_up(self) -> None:
        assert self.process is not None
        while True:
            with contextlib.suppress(Exception), AdminClient(str(self.path("ctl"))) as client:
                client.status()
                return
            code = self.process.poll()
            assert code is None, f"{self.name} ended with {code}\n{self.log()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """As a crash of the process: the kernel keeps what was written. Its sentinel lives on, by itself."""
        assert self.process is not None
        self._watch_sentinels()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(HANG_S)
        self.process = None

    def until_it_ends(self, cause: Callable[[], object]) -> int:
        """Its exit code, when it ends by itself from that cause."""
        assert self.process is not None
        self._watch_sentinels()
        cause()
        code = self.process.wait(HANG_S)
        self.process = None
        return code

    def _watch_sentinels(self) -> None:
        self._left += [os.pidfd_open(pid) for pid in self.sentinels()]

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(HANG_S)
        self.process = None
        return code

    def sentinels(self) -> list[int]:
        """Children of the running daemon that are sentinels: at most one, unless something is wrong."""
        assert self.process is not None
        found = []
        for child in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(pid) for pid in child.read_text().split() if "sentinel of" in command_line(int(pid))]
        return found

    def sentinel(self) -> int:
        """Its process number, once there is one."""
        assert self.process is not None
        for _ in range(int(HANG_S / 0.02)):
            if found := self.sentinels():
                return found[0]
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"{self.name} ended with {self.process.wait(0.02)}\n{self.log()}")
        raise AssertionError(f"{self.name} has no sentinel\n{self.log()}")

    def sentinels_end(self) -> None:
        """Waits until those of killed daemons have ended by themselves."""
        while self._left:
            end = self._left[0]
            happened, _, _ = select.select([end], [], [], HANG_S)
            assert happened, f"a sentinel of {self.name} does not end\n{self.pair.logs()}"
            os.close(self._left.pop(0))

    def end(self) -> None:
        """Whatever of it is still there."""
        if self.process is not None:
            self.kill()
        while self._left:
            end = self._left.pop()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
            os.close(end)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        """SIGSTOP; when this returns, none of its threads runs any more."""
        self.signal(signal.SIGSTOP)
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
            os.sched_yield()

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return f"--- {self.name}\n" + (self.pair.folder / f"{self.name}.log").read_text()[-12000:]
        return ""

    # --- what is asked of it

    def path(self, suffix: str) -> Path:
        return self.pair.folder / f"{self.name}.{suffix}"

    def image(self, volume: str = "data") -> Path:
        return self.pair.folder / f"{self.name}-{volume}.img"

    def init(self, *words: str) -> None:
        self.command("init", *words)

    def promote(self, *, accept_data_loss: bool = False, force: bool = False) -> str:
        with AdminClient(str(self.path("ctl")), patience_s=HANG_S) as client:
            return client.promote(accept_data_loss=accept_data_loss, force=force).message

    def demote(self) -> str:
        with AdminClient(str(self.path("ctl")), patience_s=HANG_S) as client:
            return client.demote().message

    def status(self) -> Status:
        with AdminClient(str(self.path("ctl"))) as client:
            return client.status()

    def wait(self, condition: Any, timeout: float = HANG_S) -> Status:
        try:
            with AdminClient(str(self.path("ctl")), patience_s=HANG_S) as client:
                return client.wait_for(condition, timeout=timeout).status
        except Exception as error:
            with contextlib.suppress(Exception):
                print(json.dumps(json.loads(__import__("msgspec").json.encode(self.status())), indent=1))
            raise AssertionError(f"{self.name} is not {condition}: {error}\n{self.pair.logs()}") from error

    @contextlib.contextmanager
    def client(self, volume: str = "data") -> Iterator[NbdClient]:
        with connect(str(self.path("nbd")), volume) as client:
            yield client


class Pair:
    """alpha and beta; alpha's name sorts lower, so it dials."""

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 8 * MIB,
        volumes: tuple[str, ...] = ("data",),
        survivor: str = "primary",
        interval: str = "100ms",
        promise: str = "1s",
        suspect_after: int = 5,
        arbiter: str = "none",
        options: str = "",
        addresses: dict[str, TcpAddress] | None = None,
    ) -> None:
        """`arbiter` "witness": `self.witness` is one, which `up` starts. `options`: more lines of the [pair] table.
        `addresses`: of alpha, beta and the witness, which are joined by unix sockets else."""
        self.folder = folder
        self.size = size
        self.volumes = volumes
        self.config = folder / "pair.toml"
        self.witness = Witness(folder, address=addresses["witness"] if addresses else None)
        self._arbitrated = arbiter == "witness"
        self.alpha = Daemon(self, "alpha")
        self.beta = Daemon(self, "beta")
        nodes = "".join(
            NODE.format(
                name=name,
                address=addresses[name] if addresses else f"unix:{name}.peer",
                images="\n".join(f'image.{volume} = "{name}-{volume}.img"' for volume in volumes),
            )
            for name in ("alpha", "beta")
        )
        self.config.write_text(
            CONFIG.format(
                options=options + ("\ninsecure = true" if addresses else ""),
                arbiter=f'arbiter = "none"\nsurvivor = "{survivor}"'
                if arbiter == "none"
                else f'arbiter = "witness"\n[witness]\naddress = "{self.witness.address}"\nstate-dir = "records"',
                interval=interval,
                promise=promise,
                suspect_after=suspect_after,
                volumes="".join(f'[volume.{volume}]\nsize = "{size}"\n' for volume in volumes),
                nodes=nodes,
            )
        )

    @property
    def nodes(self) -> tuple[Daemon, Daemon]:
        return self.alpha, self.beta

    def up(self) -> None:
        """Both made, both running, mirroring, alpha primary."""
        if self._arbitrated:
            self.witness.start()
        for node in self.nodes:
            node.init()
            node.start()
        self.alpha.wait("connected")
        self.alpha.promote()
        self.synced()

    def synced(self) -> None:
        for node in self.nodes:
            node.wait("synced")

    def same_images(self) -> None:
        for volume in self.volumes:
            one, other = self.alpha.image(volume).read_bytes(), self.beta.image(volume).read_bytes()
            different = [at for at in range(0, len(one), 4096) if one[at : at + 4096] != other[at : at + 4096]]
            assert len(one) == len(other) == self.size
            assert not different, f"{volume}: {len(different)} pieces differ, first at {different[0]}\n{self.logs()}"

    def logs(self) -> str:
        witness = self.witness.log.read_text() if self.witness.log.exists() else ""
        return self.alpha.log() + self.beta.log() + witness

    def end(self) -> None:
        self.witness.close()
        for node in self.nodes:
            node.end()


def command_line(pid: int) -> str:
    """Its words; empty when it is gone or only a remnant."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
