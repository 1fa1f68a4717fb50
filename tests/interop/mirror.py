"""A pair of real daemons for real NBD clients: unix and TCP sockets, two volumes, and the last word on the images.

Rules:
- Ports are never fixed: each is taken by binding port 0, and stays taken by a socket that does not listen until the
  pair has ended, so that no other program can get it before the daemon, or between two runs of it.
- `finish` is the end of every test: a FLUSH on each volume, both nodes in sync as `mirrorpair wait` sees it, both
  stopped with exit code 0, and the images equal byte by byte.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import quote

from pair import MIB, Daemon, Pair

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 32 * MIB
VOLUMES = ("data", "logs")


class Mirror(Pair):
    def __init__(self, folder: Path, *, size: int = SIZE) -> None:
        super().__init__(folder, size=size, volumes=VOLUMES)
        self.finished = False
        self._held = {node.name: _hold_port() for node in self.nodes}
        text = self.config.read_text()
        for node in self.nodes:
            before = f'nbd = ["unix:{node.name}.nbd"]'
            assert before in text
            text = text.replace(before, f'nbd = ["unix:{node.name}.nbd", "tcp:127.0.0.1:{self.port(node)}"]')
        self.config.write_text(text)

    def up(self) -> None:
        """As Pair's, both nodes at once."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Daemon.init, self.nodes))
        for node in self.nodes:
            node.start(wait=False)
        for node in self.nodes:
            node.until_up()
        self.alpha.wait("connected")
        self.alpha.promote()
        self.synced()

    def port(self, node: Daemon) -> int:
        return int(self._held[node.name].getsockname()[1])

    def unix(self, node: Daemon, volume: str = "data") -> str:
        return f"nbd+unix:///{volume}?socket={quote(str(node.path('nbd')))}"

    def tcp(self, node: Daemon, volume: str = "data") -> str:
        return f"nbd://127.0.0.1:{self.port(node)}/{volume}"

    def uris(self, node: Daemon, volume: str = "data") -> tuple[str, str]:
        return self.unix(node, volume), self.tcp(node, volume)

    def switch(self, old: Daemon, new: Daemon) -> None:
        """The role goes from `old` to `new`, both in sync."""
        old.demote()
        new.promote()
        self.synced()

    def finish(self, primary: Daemon | None = None, **expected: bytes) -> None:
        """Nothing may be left to do for the mirror; `expected` is the whole content of volumes, where a test knows."""
        for volume in self.volumes:
            with (primary or self.alpha).client(volume) as client:
                client.flush()
        for node in self.nodes:
            node.command("wait", "--for", "synced", "--timeout", "60s")
        for node in self.nodes:
            assert node.stop() == 0, self.logs()
        self.same_images()
        for volume, content in expected.items():
            different = differs_at(self.alpha.image(volume).read_bytes(), content)
            assert different is None, f"{volume} has another content than was written, from offset {different}"
        self.finished = True

    def end(self) -> None:
        try:
            super().end()
        finally:
            for held in self._held.values():
                held.close()


def differs_at(one: bytes, other: bytes) -> int | None:
    """The offset of the first byte that differs (a length counts as such), or None. Both as a report can show them."""
    if one == other:
        return None
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _hold_port() -> socket.socket:
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # With this at both, a socket that only holds a port does not keep another from listening there.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
