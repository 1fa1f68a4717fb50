"""Who serves a volume in the live groups: mirrorpair with and without a peer, and the servers people use today.

Rules:
- Every server has images of its own, all of the same size, all written in the same way before it starts.
- Peers get their best documented options: page cache, threads for the disk; the quorum needs both writes and reads
  from one image only.
- After the last run a server is stopped and, if it mirrors, its two images must hold the same bytes.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from bench.daemons import (
    SEED,
    SERVED,
    VOLUME,
    LivePair,
    end_process,
    flush_file,
    free_port,
    need_client,
    wait_for_socket,
)
from bench.workshop import CannotRun, Failed, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable

NBDKIT = "nbdkit file"
QEMU_NBD = "qemu-nbd"
QUORUM = "qsd quorum"
BARE = "mirrorpair bare"
SYNC = "mirrorpair sync"
PEER_SOCKET = "peer.nbd"


class Server(Protocol):
    uri: str

    def start(self) -> None: ...

    def pids(self) -> list[int]: ...

    def flush(self) -> None:
        """Its images are on the disk."""

    def finish(self) -> None:
        """Stops it, checks what it left. Raises `Failed`."""

    def close(self) -> None:
        """Whatever happened before: no process and no file is left."""


class Mirrorpair:
    def __init__(self, shop: Workshop, size: int, *, alone: bool) -> None:
        self._pair = LivePair(shop, size)
        self._alone = alone
        self.uri = self._pair.alpha.uri

    def start(self) -> None:
        if self._alone:
            self._pair.up_alone(SERVED)
        else:
            self._pair.up(SERVED)

    def pids(self) -> list[int]:
        return [node.pid for node in self._pair.nodes if node.runs]

    def flush(self) -> None:
        for node in self._pair.nodes:
            if node.runs:
                flush_file(node.image)

    def finish(self) -> None:
        if self._alone:
            self._pair.alpha.stop()
        else:
            self._pair.finish()

    def close(self) -> None:
        self._pair.__exit__()


class _Peer:
    """Processes of another project. `_launch` starts them."""

    images: tuple[str, ...] = ("peer.img",)

    def __init__(self, shop: Workshop, size: int) -> None:
        self._shop = shop
        self._size = size
        self._folder = Path(tempfile.mkdtemp(prefix="peer-", dir=shop.images))
        self._sockets = Path(tempfile.mkdtemp(prefix="mpb-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.socket = self._sockets / PEER_SOCKET
        self.uri = f"nbd+unix:///{VOLUME}?socket={self.socket}"

    def start(self) -> None:
        for name in self.images:
            self._shop.image_tool("build", self._folder / name, self._size, f"--seed={SEED}", f"--chunk={SERVED}")
        self._launch()

    def _launch(self) -> None:
        raise NotImplementedError

    def _run(self, argv: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=self._shop.environment(flush=True),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _wait(self, path: Path, process: subprocess.Popen[bytes], what: str) -> None:
        try:
            wait_for_socket(path, process, what)
        except Failed as error:
            said = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip()
            raise Failed(f"{error}: {said[-300:]}") from None

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def flush(self) -> None:
        for name in self.images:
            flush_file(self._folder / name)

    def finish(self) -> None:
        for process in reversed(self._processes):
            end_process(process)

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._sockets, ignore_errors=True)


class Nbdkit(_Peer):
    def _launch(self) -> None:
        process = self._run(["nbdkit", "--foreground", "-U", str(self.socket), "file", str(self._folder / "peer.img")])
        self._wait(self.socket, process, NBDKIT)


class QemuNbd(_Peer):
    def _launch(self) -> None:
        argv = ["qemu-nbd", "--format=raw", "--persistent", "--shared=8", "--cache=writeback", "--aio=threads"]
        argv += [f"--export-name={VOLUME}", f"--socket={self.socket}", str(self._folder / "peer.img")]
        self._wait(self.socket, self._run(argv), QEMU_NBD)


class Quorum(_Peer):
    """A mirror in user space: one qemu-storage-daemon that writes to a file and, over TCP, to a second one."""

    images = ("peer.img", "other.img")

    def _launch(self) -> None:
        port = free_port()
        far = self._sockets / "far.nbd"
        # The far one also listens at a unix socket, by which it is known to be up; its clients come by TCP.
        argv = ["qemu-storage-daemon", "--blockdev"]
        argv += [f"driver=file,node-name=far,filename={self._folder / 'other.img'},aio=threads"]
        argv += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"]
        argv += ["--export", f"type=nbd,id=far,node-name=far,name={VOLUME},writable=on"]
        argv += ["--chardev", f"socket,id=ready,path={far},server=on,wait=off", "--monitor", "chardev=ready"]
        self._wait(far, self._run(argv), f"{QUORUM}, the far one")
        argv = ["qemu-storage-daemon"]
        argv += ["--blockdev", f"driver=file,node-name=near,filename={self._folder / 'peer.img'},aio=threads"]
        server = f"server.type=inet,server.host=127.0.0.1,server.port={port}"
        argv += ["--blockdev", f"driver=nbd,node-name=far,{server},export={VOLUME}"]
        mirror = "vote-threshold=2,read-pattern=fifo,children.0=near,children.1=far"
        argv += ["--blockdev", f"driver=quorum,node-name=mirror,{mirror}"]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={self.socket}"]
        argv += ["--export", f"type=nbd,id=mirror,node-name=mirror,name={VOLUME},writable=on"]
        self._wait(self.socket, self._run(argv), QUORUM)

    def finish(self) -> None:
        super().finish()
        one, other = (self._folder / name for name in self.images)
        different = int(self._shop.image_tool("equal", one, other)[0]["different"])
        if different:
            raise Failed(f"{different} bytes differ between the two images of {QUORUM}")


class Kind:
    """A server that a group asks for, before it is known whether it can run here."""

    def __init__(
        self,
        name: str,
        kind: Literal["mirrorpair", "peer"],
        make: Callable[[Workshop, int], Server],
        needs: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.kind: Literal["mirrorpair", "peer"] = kind
        self.make = make
        self._needs = needs

    def __repr__(self) -> str:
        return self.name

    def missing(self, shop: Workshop) -> str | None:
        for program in ("fio", *self._needs):
            if shutil.which(program) is None:
                return f"{program} is not on PATH"
        if self.kind == "mirrorpair":
            try:
                shop.mirrorpair()
                need_client()
            except CannotRun as reason:
                return str(reason)
        return None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(BARE, "mirrorpair", lambda shop, size: Mirrorpair(shop, size, alone=True)),
        Kind(SYNC, "mirrorpair", lambda shop, size: Mirrorpair(shop, size, alone=False)),
        Kind(NBDKIT, "peer", Nbdkit, ("nbdkit",)),
        Kind(QEMU_NBD, "peer", QemuNbd, ("qemu-nbd",)),
        Kind(QUORUM, "peer", Quorum, ("qemu-storage-daemon",)),
    )
}
