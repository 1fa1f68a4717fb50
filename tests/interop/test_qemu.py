"""qemu's tools at a mirrored pair: qemu-io, qemu-img."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mirror import SIZE
from pair import MIB
from realclients import needs, qemu_io, tool

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from mirror import Mirror

KIB = 1024


@needs("qemu-io")
def test_qemu_io_reads_back_what_it_wrote(mirror: Mirror) -> None:
    content = bytearray(SIZE)

    def fill(at: int, length: int, pattern: int) -> None:
        content[at : at + length] = bytes([pattern]) * length

    fill(0, MIB, 0xAB)
    fill(4 * KIB, 64 * KIB, 0xCD)
    fill(SIZE - 512, 512, 0xEF)
    qemu_io(
        mirror.unix(mirror.alpha),
        "write -P 0xab 0 1M",
        "write -P 0xcd -f 4k 64k",  # FUA
        f"write -P 0xef {SIZE - 512} 512",
        "flush",
        "read -P 0xab 0 4k",
        "read -P 0xcd 4k 64k",
        f"read -P 0xab 68k {MIB - 68 * KIB}",
        f"read -P 0xef {SIZE - 512} 512",
        "read -P 0 1M 1M",
    )
    # Nothing of these lies on a sector; what is around them must stay.
    fill(2 * MIB + 1, 3, 0x11)
    fill(3 * MIB - 7, 70001, 0x22)
    fill(65535, 2, 0x33)
    qemu_io(
        mirror.tcp(mirror.alpha),
        f"write -P 0x11 {2 * MIB + 1} 3",
        f"write -P 0x22 {3 * MIB - 7} 70001",
        "write -P 0x33 65535 2",
        f"read -P 0 {2 * MIB} 1",
        f"read -P 0x11 {2 * MIB + 1} 3",
        f"read -P 0 {2 * MIB + 4} 508",
        f"read -P 0x22 {3 * MIB - 7} 70001",
        "read -P 0xcd 65534 1",
        "read -P 0x33 65535 2",
    )
    mirror.finish(data=bytes(content))


@needs("qemu-io")
def test_qemu_io_zeroes_and_discards(mirror: Mirror) -> None:
    content = bytearray(b"\x5a" * 8 * MIB) + bytearray(SIZE - 8 * MIB)

    def zero(at: int, length: int) -> None:
        content[at : at + length] = bytes(length)

    for uri in mirror.uris(mirror.alpha):
        qemu_io(uri, "write -P 0x5a 0 8M")
        qemu_io(
            uri,
            "write -z 64k 64k",  # stays allocated
            "write -z -u 1M 1M",  # may become a hole
            "write -z -f 2097153 7",
            "write -z -u -f 3000001 100003",
            "discard 4M 2M",
            "discard 6291457 65537",
            "flush",
            "read -P 0x5a 0 64k",
            "read -P 0 64k 64k",
            "read -P 0x5a 128k 896k",
            "read -P 0 1M 1M",
            "read -P 0 2097153 7",
            "read -P 0x5a 2097160 512",
            "read -P 0 3000001 100003",
            "read -P 0 4M 2M",
        )
    zero(64 * KIB, 64 * KIB)
    zero(MIB, MIB)
    zero(2097153, 7)
    zero(3000001, 100003)
    zero(4 * MIB, 2 * MIB)
    zero(6291457, 65537)
    mirror.finish(data=bytes(content))
    for node in mirror.nodes:
        assert node.image().stat().st_blocks * 512 <= 6 * MIB, f"{node.name}: what was discarded is still allocated"


@needs("qemu-io")
def test_qemu_io_with_many_requests_in_flight(mirror: Mirror) -> None:
    content = bytearray(SIZE)
    commands = []
    for index in range(64):
        at, length = index * 300 * KIB + index, 200 * KIB + index
        content[at : at + length] = bytes([index + 1]) * length
        commands.append(f"aio_write -q -P {index + 1} {at} {length}")
    qemu_io(mirror.unix(mirror.alpha), *commands, "aio_flush", "flush")
    checks = [f"read -q -P {i + 1} {i * 300 * KIB + i} {200 * KIB + i}" for i in range(64)]
    qemu_io(mirror.tcp(mirror.alpha), *checks)
    mirror.finish(data=bytes(content))


@needs("qemu-img")
def test_qemu_img_converts_compares_and_measures(mirror: Mirror, tmp_path: Path, rng: random.Random) -> None:
    content = bytearray(SIZE)
    for at in range(0, SIZE, 2 * MIB):
        length = rng.randrange(1, MIB)
        content[at : at + length] = rng.randbytes(length)
    raw, qcow, down = tmp_path / "a.raw", tmp_path / "a.qcow2", tmp_path / "b.raw"
    raw.write_bytes(content)
    data, logs = mirror.unix(mirror.alpha, "data"), mirror.tcp(mirror.alpha, "logs")
    info = json.loads(tool("qemu-img", "info", "--output=json", "-f", "raw", data))
    assert info["virtual-size"] == SIZE
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, data)
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, data)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", data, qcow)
    tool("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "qcow2", "-O", "raw", qcow, logs)
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", data, logs)
    tool("qemu-img", "convert", "-f", "raw", "-O", "raw", logs, down)
    assert down.read_bytes() == content
    # A million bytes from 1 MiB on are overwritten with a pattern, 16 at a time, with FLUSHes among them.
    bench = ("qemu-img", "bench", "-f", "raw", "-t", "none")
    tool(*bench, "-w", "--pattern=119", "-c", "500", "-d", "16", "-s", "2000", "-o", "1M", "--flush-interval=50", data)
    tool(*bench, "-c", "500", "-d", "16", "-s", "4096", logs)
    assert "mismatch at offset 1048576" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", data, logs, code=1)
    expected = content.copy()
    expected[MIB : MIB + 1000000] = bytes([119]) * 1000000
    mirror.finish(data=bytes(expected), logs=bytes(content))
