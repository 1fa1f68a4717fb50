"""File systems on a mirrored pair: by nbdfuse and a loop device (chain A), and by qemu, which outlives the server."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from durable_writer import content_after
from mirror import SIZE
from realclients import HANG_S, loop, mounted, nbdfuse, needs, storage_daemon, tool

if TYPE_CHECKING:
    import random

    from mirror import Mirror
    from pair import Daemon

MOUNTS = ("losetup", "mkfs.ext4", "fsck.ext4", "mount", "umount", "fusermount3", "fstrim", "sync")


class Files:
    """Files with known content, in the file system that is mounted now."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.contents: dict[str, bytes] = {}

    def write(self, folder: Path, count: int) -> None:
        for _ in range(count):
            name = f"d{len(self.contents) % 5}/f{len(self.contents)}"
            self.contents[name] = self.rng.randbytes(self.rng.randrange(200000))
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(self.contents[name])
        # Some go again, so that there is something to trim.
        for name in self.rng.sample(sorted(self.contents), count // 4):
            del self.contents[name]
            (folder / name).unlink()

    def check(self, folder: Path) -> None:
        found = {str(path.relative_to(folder)) for path in folder.glob("d*/*")}
        assert found == set(self.contents)
        for name, content in self.contents.items():
            assert (folder / name).read_bytes() == content, name


def check_both_images(mirror: Mirror) -> None:
    """Each is a clean file system by itself: what its host would have, were the other one lost."""
    for node in mirror.nodes:
        tool("fsck.ext4", "-fn", node.image())


@needs("nbdfuse", *MOUNTS, mounts=True)
def test_a_file_system_moves_between_the_nodes(mirror: Mirror, tmp_path: Path, rng: random.Random) -> None:
    files = Files(rng)
    point = tmp_path / "mnt"

    def visit(node: Daemon, uri: str, *, make: bool = False) -> None:
        with nbdfuse(uri, tmp_path) as file, loop(file, direct=True) as device:
            if make:
                tool("mkfs.ext4", "-q", device)
            tool("fsck.ext4", "-fn", device)
            with mounted(device, point):
                files.check(point)
                files.write(point, 30)
                tool("fstrim", point)
            tool("fsck.ext4", "-fn", device)

    visit(mirror.alpha, mirror.unix(mirror.alpha), make=True)
    mirror.switch(mirror.alpha, mirror.beta)
    visit(mirror.beta, mirror.tcp(mirror.beta))
    mirror.switch(mirror.beta, mirror.alpha)
    visit(mirror.alpha, mirror.unix(mirror.alpha))
    mirror.finish()
    check_both_images(mirror)


class Writer:
    """durable_writer.py, and how many pieces it said are durable."""

    def __init__(self, file: Path, seed: int) -> None:
        self.seed = seed
        self.count = 0
        self._rest = b""
        script = Path(__file__).with_name("durable_writer.py")
        self.process = subprocess.Popen(
            [sys.executable, "-I", script, file, str(SIZE), str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()

    def writes_on(self, count: int = 50) -> None:
        """Returns when it wrote so many pieces after those that it had told before."""
        while self._take(0):
            pass
        until = self.count + count
        while self.count < until:
            assert self._take(HANG_S), "nothing is written any more"

    def ends_well(self) -> bytes:
        """The content of the whole volume."""
        assert self.process.stdin
        self.process.stdin.close()
        while self._take(HANG_S):
            pass
        assert (self.process.wait(HANG_S), self._rest) == (0, b"good")
        return content_after(SIZE, self.seed, self.count)

    def _take(self, patience_s: float) -> bool:
        """Some of what it said; False: nothing came, or it has ended."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], patience_s)[0]:
            return False
        said = os.read(self.process.stdout.fileno(), 65536)
        *lines, self._rest = (self._rest + said).split(b"\n")
        if lines and lines[-1] == b"good":
            self._rest = lines.pop()
        self.count += len(lines)
        return bool(said)


@needs("qemu-storage-daemon", "fusermount3", mounts=True)
def test_qemu_outlives_a_primary_that_is_killed_and_loses_nothing(
    mirror: Mirror, tmp_path: Path, rng: random.Random
) -> None:
    with storage_daemon(mirror.alpha.path("nbd"), tmp_path) as file:
        assert file.stat().st_size == SIZE
        with Writer(file, rng.getrandbits(32)) as writer:
            for _ in range(2):
                writer.writes_on()
                mirror.alpha.kill()
                mirror.alpha.start()
                mirror.alpha.wait("primary")
            writer.writes_on()
            content = writer.ends_well()
    mirror.finish(data=content)


@needs("qemu-storage-daemon", *MOUNTS, mounts=True)
def test_a_file_system_on_qemu_outlives_a_primary_that_is_killed_and_replaced(
    mirror: Mirror, tmp_path: Path, rng: random.Random
) -> None:
    """First alpha comes back by itself; then a person makes beta primary, and qemu's socket becomes beta's."""
    files = Files(rng)
    active = tmp_path / "active.sock"
    active.symlink_to(mirror.alpha.path("nbd"))
    with storage_daemon(active, tmp_path) as file, loop(file, direct=False) as device:
        tool("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt") as point:
            with ThreadPoolExecutor(1) as beside:
                writing = beside.submit(files.write, point, 20)
                mirror.alpha.kill()
                mirror.alpha.start()
                writing.result(HANG_S)
                tool("sync", "-f", point)
                writing = beside.submit(files.write, point, 20)
                mirror.alpha.kill()
                mirror.beta.promote(accept_data_loss=True)
                fresh = tmp_path / "fresh.sock"
                fresh.symlink_to(mirror.beta.path("nbd"))
                fresh.replace(active)
                writing.result(HANG_S)
                tool("sync", "-f", point)
            mirror.alpha.start()
            files.check(point)
        tool("fsck.ext4", "-fn", device)
    mirror.finish(mirror.beta)
    check_both_images(mirror)
