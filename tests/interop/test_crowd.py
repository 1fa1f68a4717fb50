"""Many clients at once, idle ones beside busy ones, and clients that are killed in the middle."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from mirror import SIZE
from realclients import HANG_S, background, needs, qemu_io, tool

from mirrorpair.handshake import MAX_REQUEST
from mirrorpair.nbdclient import CMD_WRITE, connect

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from mirror import Mirror

    from mirrorpair.nbdclient import NbdClient

IDLE = 200
CLIENTS = 24


@needs("nbdcopy", "nbdinfo")
def test_200_idle_clients_disturb_nobody(mirror: Mirror, tmp_path: Path, rng: random.Random) -> None:
    content = rng.randbytes(SIZE)
    image = tmp_path / "image"
    image.write_bytes(content)
    with contextlib.ExitStack() as idle:
        opened = [
            idle.enter_context(connect(uri, volume))
            for uri in mirror.uris(mirror.alpha)
            for volume in mirror.volumes
            for _ in range(IDLE // 4)
        ]
        for _ in range(50):  # who never say a word
            idle.enter_context(socket.create_connection(("127.0.0.1", mirror.port(mirror.alpha))))
        assert [volume.clients for volume in mirror.alpha.status().volumes] == [IDLE // 2] * 2
        tool("nbdcopy", "--flush", image, mirror.unix(mirror.alpha))
        tool("nbdinfo", "--size", mirror.tcp(mirror.alpha))
        # They are still there, and served as soon as they ask.
        for client in opened[: IDLE // 4] + opened[IDLE // 2 : 3 * IDLE // 4]:
            assert client.read(4095, 2) == content[4095:4097]
        # A stop waits for none of them.
        mirror.finish(data=content)


@needs("qemu-io")
def test_many_programs_write_at_once(mirror: Mirror) -> None:
    content = {volume: bytearray(SIZE) for volume in mirror.volumes}

    def client(index: int) -> None:
        """Each has every 24th piece of 60,000 bytes: neighbours share blocks."""
        volume = mirror.volumes[index % 2]
        uri = mirror.uris(mirror.alpha, volume)[index // 2 % 2]
        places = [(index + CLIENTS * turn) * 60000 for turn in range(20)]
        qemu_io(uri, *(f"aio_write -q -P {index + 1} {at} 60000" for at in places), "aio_flush", "flush")
        qemu_io(uri, *(f"read -q -P {index + 1} {at} 60000" for at in places))
        for at in places:
            content[volume][at : at + 60000] = bytes([index + 1]) * 60000

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    mirror.finish(**{volume: bytes(data) for volume, data in content.items()})


@needs("nbdcopy", "qemu-io")
def test_clients_killed_in_the_middle_leave_equal_images(mirror: Mirror, tmp_path: Path) -> None:
    """Each copies a pattern, and is killed as soon as the first of it has arrived."""
    with mirror.alpha.client() as watcher:
        for turn, uri in enumerate(mirror.uris(mirror.alpha) * 2):
            source = tmp_path / f"source{turn}"
            source.write_bytes(bytes([turn + 1]) * SIZE)
            with background("nbdcopy", "--requests=64", source, uri, log=tmp_path / "nbdcopy.log") as process:
                while watcher.read(0, 1) != bytes([turn + 1]):
                    assert process.poll() in (None, 0)
                process.kill()
    qemu_io(mirror.tcp(mirror.alpha), "write -P 9 0 8M", "flush", "read -P 9 0 8M")
    mirror.finish()


def begin_refused_write(client: NbdClient) -> None:
    """All but the last byte of a WRITE that is one byte too long."""
    client.socket.settimeout(HANG_S)
    client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 77, 0, MAX_REQUEST + 1))
    for _ in range(MAX_REQUEST >> 20):
        client.socket.sendall(bytes(1 << 20))


def test_a_refused_write_is_answered_behind_its_payload(mirror: Mirror) -> None:
    """libnbd knows nothing of a request whose payload it is still sending, and calls an answer to it a server's bug."""
    with mirror.alpha.client() as client, mirror.alpha.client() as other:
        begin_refused_write(client)
        other.write(0, b"good")  # the server's loop has been round since
        assert not select.select([client.socket], [], [], 0)[0]
        client.socket.sendall(b"\0")
        answer = client.socket.recv(16, socket.MSG_WAITALL)
        client.socket.setblocking(False)
        assert struct.unpack(">IIQ", answer) == (0x67446698, errno.EOVERFLOW, 77)
        assert client.read(0, 4) == b"good"
    mirror.finish()


def test_a_client_in_the_middle_of_a_refused_write_keeps_no_node_from_stopping(mirror: Mirror) -> None:
    with mirror.alpha.client() as client:
        begin_refused_write(client)
        mirror.finish(data=bytes(SIZE))
