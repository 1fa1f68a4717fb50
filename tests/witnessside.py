"""Real witnesses for the tests: a process of its own on a unix socket or a TCP port of this host."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
from typing import TYPE_CHECKING, Any

from farside import LIMIT_S, MIRRORPAIR, ROOT

from mirrorpair.address import Address, TcpAddress, UnixAddress
from mirrorpair.arbiter import Register, Swap
from mirrorpair.witness.client import WitnessRegister

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

CONFIG = """
[pair]
name = "shop"
arbiter = "witness"
insecure = {insecure}
[witness]
address = "{address}"
state-dir = "records"
[volume.data]
size = "1MiB"
"""
NODE = """
[node.{name}]
address = "unix:{name}.sock"
state-dir = "{name}"
control = "{name}.control"
nbd = ["unix:{name}.nbd"]
image.data = "{name}.img"
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Witness:
    """`mirrorpair witness` with its records below `folder`. `start`, and `close` at the end. `tcp`: at a free port of
    this host; `address`: there, which may be in another namespace, entered by the words of `prefix`."""

    def __init__(self, folder: Path, *, tcp: bool = False, address: Address | None = None) -> None:
        self.folder = folder
        self.records = folder / "records"
        self.config = folder / "witness.toml"
        self.log = folder / "witness.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._tcp = tcp
        self.prefix: tuple[str, ...] = ()
        self.address: Address = address or UnixAddress(str(folder / "witness.sock"))
        self._take_address()

    def _take_address(self) -> None:
        if self._tcp:
            self.address = TcpAddress("127.0.0.1", free_port())
        nodes = "".join(NODE.format(name=name) for name in ("alpha", "beta"))
        insecure = "false" if self.address.loopback else "true"
        self.config.write_text(CONFIG.format(address=self.address, insecure=insecure) + nodes, encoding="utf-8")

    def start(self, *before: str) -> None:
        """`before`: words in front of the command, such as a tracer. Of a port somebody else may be quicker."""
        for _ in range(10):
            if self.launch(*before):
                return
            if not (self._tcp and "cannot listen" in self.log.read_text()):
                break
            self._take_address()
        raise AssertionError(self.log.read_text())

    def launch(self, *before: str) -> bool:
        """Starts it; False when it ended before it was ready (sd_notify)."""
        assert self.process is None
        ready = self.folder / "ready.sock"
        ready.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, self.log.open("wb") as out:
            sock.bind(str(ready))
            self.process = subprocess.Popen(
                [*self.prefix, *before, *MIRRORPAIR, "-c", str(self.config), "witness"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": ROOT, "NOTIFY_SOCKET": str(ready)},
            )
            end = os.pidfd_open(self.process.pid)
            try:
                happened, _, _ = select.select([sock, end], [], [], LIMIT_S)
                assert happened, "the witness says neither READY nor good-bye"
                if sock in happened:
                    assert sock.recv(100) == b"READY=1"
                    return True
            finally:
                os.close(end)
        self.process.wait()
        self.process = None
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(LIMIT_S)
            self.process = None

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(LIMIT_S)
        self.process = None
        return code

    close = kill

    def client(self, pair: str = "shop", **options: Any) -> WitnessRegister:
        return WitnessRegister(self.address, pair, **{"reply_s": LIMIT_S, **options})


def with_client(witness: Witness, work: Callable[[WitnessRegister], Awaitable[Any]], **options: Any) -> Any:
    """What `work` returns, with a client that is closed afterwards."""

    async def run() -> Any:
        client = witness.client(**options)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def record(epoch: int, *in_sync: str, primary: str = "alpha") -> Register:
    return Register(epoch=epoch, primary=primary, in_sync=in_sync or (primary,))


def cas(witness: Witness, version: int, new: Register, **options: Any) -> Swap:
    async def swap(client: WitnessRegister) -> Swap:
        return await client.cas(version, new)

    result: Swap = with_client(witness, swap, **options)
    return result
