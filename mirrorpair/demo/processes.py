"""Alpha, beta and the witness as real processes of this machine, and the folder they work in.

Rules:
- A daemon is `mirrorpair run` or `mirrorpair witness` by the very interpreter that runs us, in a session of its own, so
  that a Ctrl-C at the terminal reaches us alone. It is ended by its own process object.
- It has started when it says so (sd_notify); if it ends before that, its log says why. Only a hang has a limit: HANG_S.
- No interrupt falls between the start of a process and its being known here.
- Unix sockets only. A path of one has at most 107 bytes, so below a long folder the sockets get a short one of their
  own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import mirrorpair
from mirrorpair.control import MAX_SOCKET_PATH, AdminClient
from mirrorpair.errors import LocalError, MirrorpairError, RefusedError
from mirrorpair.interrupts import Hold
from mirrorpair.nbdclient import NbdClient, connect
from mirrorpair.text import last_words, printable
from mirrorpair.units import format_size

if TYPE_CHECKING:
    from mirrorpair.status import Condition, Status

HANG_S = 60.0
VOLUME = "data"
NODES = ("alpha", "beta")

_ROOM = 64 << 20  # metadata, journal, logs
_LONGEST_NAME = len("/witness.ready")
_CONFIG = """\
[pair]
name = "demo"
arbiter = "witness"
prefer = "alpha"

[heartbeat]
profile = "{profile}"

[witness]
address = "unix:{sockets}witness.sock"
state-dir = "witness"

[volume.{volume}]
size = "{size}"
"""
_NODE = """
[node.{name}]
address = "unix:{sockets}{name}.peer"
state-dir = "{name}"
control = "{sockets}{name}.ctl"
nbd = ["unix:{sockets}{name}.nbd"]
image.{volume} = "{name}.img"
"""


class DemoError(Exception):
    """The demo cannot go on: a process ended, or something did not happen."""


class Process:
    """One daemon; `log` collects what it says over all its starts."""

    def __init__(self, stage: Stage, name: str, *words: str) -> None:
        self.name = name
        self.log = stage.logs / f"{name}.log"
        self._stage = stage
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Returns once it is ready."""
        self.launch()
        self.until_ready()

    def launch(self) -> None:
        assert self._process is None
        path = self._stage.sockets / f"{self.name}.ready"
        path.unlink(missing_ok=True)
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.bind(str(path))
        with self.log.open("ab") as out, Hold() as hold:
            self._process = subprocess.Popen(
                self._stage.command(*self._words),
                cwd=self._stage.folder,
                env={**self._stage.environment(), "NOTIFY_SOCKET": str(path)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        if hold.pending is not None:
            raise KeyboardInterrupt

    def until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + HANG_S
        with self._ready as sock:
            sock.settimeout(0.1)
            while True:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in sock.recv(4096):
                        return
                self.check()
                if time.monotonic() > deadline:
                    raise DemoError(f"{self.name} is not ready after {HANG_S:.0f} s; its log ends: {self.last_words()}")

    def check(self) -> None:
        """DemoError when it ended although nobody ended it."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise DemoError(f"{self.name} ended by itself with {code}; its log ends: {self.last_words()}")

    def kill(self) -> None:
        """SIGKILL, and nothing else: as a crash. It is gone when this returns."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(HANG_S)
        self._process = None

    def stop(self) -> None:
        """SIGTERM: a graceful end."""
        assert self._process is not None
        self._process.terminate()
        try:
            code = self._process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{self.name} has not ended {HANG_S:.0f} s after SIGTERM: {self.last_words()}") from None
        self._process = None
        if code != 0:
            raise DemoError(f"{self.name} ended with {code} after SIGTERM; its log ends: {self.last_words()}")

    def end(self) -> None:
        """Whatever state it is in, and whatever it started in its session."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            return last_words(self.log.read_bytes()) or "(nothing)"
        return "(nothing)"


class Node(Process):
    """alpha or beta."""

    def __init__(self, stage: Stage, name: str) -> None:
        super().__init__(stage, name, "--node", name, "run")
        self.image = stage.folder / f"{name}.img"
        self.nbd = stage.sockets / f"{name}.nbd"
        self.control = stage.sockets / f"{name}.ctl"

    def init(self) -> None:
        done = subprocess.run(
            self._stage.command("--node", self.name, "init"),
            cwd=self._stage.folder,
            env=self._stage.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            start_new_session=True,
        )
        if done.returncode != 0:
            raise LocalError(
                f"`mirrorpair init` of {self.name} ended with {done.returncode}: {last_words(done.stderr)}"
            )

    def admin(self) -> AdminClient:
        return AdminClient(str(self.control), patience_s=HANG_S)

    def status(self) -> Status:
        with self.admin() as daemon:
            return daemon.status()

    def wait(self, condition: Condition) -> Status:
        """DemoError when it does not come to that."""
        try:
            with self.admin() as daemon:
                return daemon.wait_for(condition, timeout=HANG_S).status
        except MirrorpairError as error:
            self.check()
            raise DemoError(f"{self.name} does not become {condition}: {error}") from error

    def connect(self) -> NbdClient:
        return connect(str(self.nbd), VOLUME, timeout=HANG_S)


class Stage:
    """The folder, the configuration in it, and the three processes. A context manager: at its end the processes have
    ended, and what is not to be kept is removed."""

    def __init__(self, size: int, *, out: Path | None = None, keep: bool = False, profile: str = "default") -> None:
        """`out`: the folder; the journal and the logs stay in it. It must be empty or not exist. `keep`: everything
        stays. RefusedError, LocalError."""
        self.size = size
        self.keep = keep
        self._profile = profile
        self._named = out is not None
        self.folder = _make_folder(out)
        self.sockets = self.folder
        self.logs = self.folder / "logs"
        self.config = self.folder / "pair.toml"
        self.journal = self.folder / "journal"
        self.alpha = Node(self, "alpha")
        self.beta = Node(self, "beta")
        self.witness = Process(self, "witness", "witness")

    def __enter__(self) -> Self:
        """What is made here is removed again when it fails."""
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self.sockets != self.folder:
            shutil.rmtree(self.sockets, ignore_errors=True)
        if self.keep:
            return
        if not self._named:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path not in (self.journal, self.logs):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.alpha, self.beta

    @property
    def processes(self) -> tuple[Process, ...]:
        return self.witness, self.alpha, self.beta

    @property
    def kept(self) -> bool:
        """Whether anything stays in the folder."""
        return self.keep or self._named

    def end(self) -> None:
        """No process of ours is left when this returns."""
        for process in self.processes:
            process.end()

    def pids(self) -> dict[str, int]:
        return {process.name: process.pid for process in self.processes if process.pid is not None}

    def check(self) -> None:
        """DemoError when one of the processes ended by itself."""
        for process in self.processes:
            process.check()

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "mirrorpair", "-c", str(self.config), *words]

    def environment(self) -> dict[str, str]:
        """Ours, with which a new process finds this very package, also where it is a source tree."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MIRRORPAIR_")}
        root = str(Path(mirrorpair.__file__).resolve().parent.parent)
        if root not in (os.path.realpath(path) for path in [*site.getsitepackages(), site.getusersitepackages()]):
            kept["PYTHONPATH"] = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"))))
        return kept

    def _make(self) -> None:
        free, needed = shutil.disk_usage(self.folder).free, 2 * self.size + _ROOM
        if free < needed:
            raise LocalError(
                f"{printable(str(self.folder))} has {format_size(free)} free, {format_size(needed)} may be needed: "
                "--out names another place"
            )
        self.logs.mkdir()
        if len(os.fsencode(self.folder)) + _LONGEST_NAME > MAX_SOCKET_PATH:
            self.sockets = Path(tempfile.mkdtemp(prefix="mirrorpair-demo-", dir="/tmp"))
            for node in self.nodes:
                node.nbd, node.control = (self.sockets / f"{node.name}.{kind}" for kind in ("nbd", "ctl"))
        prefix = "" if self.sockets == self.folder else f"{self.sockets}/"
        text = _CONFIG.format(profile=self._profile, sockets=prefix, volume=VOLUME, size=self.size)
        text += "".join(_NODE.format(name=name, sockets=prefix, volume=VOLUME) for name in NODES)
        self.config.write_text(text, encoding="utf-8")


def _make_folder(out: Path | None) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix="mirrorpair-demo-")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise RefusedError(f"{printable(str(out))} is not empty: name a folder that is, or that does not exist")
    except OSError as error:
        raise LocalError(f"{printable(str(out))} cannot be used: {error.strerror}") from error
    return out.resolve()
