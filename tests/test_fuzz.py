"""libFuzzer on the parsers in C: NBD requests, frames, units of a copy, the journal; and on a whole engine: its NBD
service and its replication link.

Rules:
- The targets of tests/fuzz are compiled with clang under the address and undefined-behaviour sanitizers. What a target
  must find is written in it: an oracle made from the protocol, not from the code.
- The first inputs are made here, so nothing binary is kept. Seed and number of runs are fixed; MIRRORPAIR_FUZZ_RUNS=n
  runs each target n times, with a seed that is not, and the report names the input that broke it.
- The superblock and the node file are parsed in Python: test_twofold.py, test_metadata.py and test_meta.py fuzz those.
- A target that finds nothing proves nothing unless it can: each is also run on a core in which one check is missing.
"""

from __future__ import annotations

import os
import random
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest
from native import FUZZER, HERE, NOT_SANITIZED, ONETHREAD_WRAPS, SOURCES, Native, Program

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [NOT_SANITIZED, pytest.mark.xdist_group("fuzz")]

FUZZ = HERE / "fuzz"
REQUEST = b"\x25\x60\x95\x13"


def nbd_seeds(rng: random.Random) -> list[bytes]:
    lengths = (0, 1, 4096, 32 << 20, (32 << 20) + 1, 2**32 - 1)
    return [
        struct.pack("<BQ", rng.randrange(2), 1 << 20)
        + REQUEST
        + struct.pack(">HHQQI", rng.randrange(4), kind, 7, rng.choice([0, 4096, 1 << 20, 2**64 - 1]), length)
        for kind in range(8)
        for length in lengths
    ]


def frame_seeds(rng: random.Random) -> list[bytes]:
    headers = [
        struct.pack("<B4sHHIIQQQQ16sQII", 2, b"MPR1", kind, 0, length, meta, 0, 77, 1, 0, bytes(16), 0, 1, 0)
        for kind in (1, 17, 32)
        for length, meta in ((0, 0), (100, 8), ((1 << 20) + (1 << 18), 1 << 18), (32 << 20, 0), (8, 9))
    ]
    streams = [
        bytes([1, rng.randrange(256)])
        + b"".join(
            struct.pack("<BBBH", kind | rng.randrange(32) << 3, 99, high, rng.randrange(65536)) for kind in kinds
        )
        for kinds in ([0, 0, 0], *([0, k, 0] for k in range(1, 7)))
        for high in (0, 150, 255)
    ]
    return headers + streams


def wire_seeds(rng: random.Random) -> list[bytes]:
    def unit(kind: int, meta: bytes, more: int = 0) -> bytes:
        return struct.pack("<BBQII", kind, 0, 65536, more, 65535) + meta

    words = struct.pack("<QQ", 0xFFFF, 0x0F0F)
    return [
        unit(0, struct.pack("<II", 65536, 0) + words + rng.randbytes(16 * 8)),
        unit(1, struct.pack("<IIQ", 65536, 0, 0x00FF), 8 * 4096),
        unit(2, struct.pack("<IIIIIIIIQ", 0, 0, 1, 1, 1, 2, 2, 3, 1)),
        unit(3, struct.pack("<IIQQ", 1, 1, 1, 0) + struct.pack("<IIQQ", 2, 0, 0, 1)),
    ]


def journal_seeds(rng: random.Random) -> list[bytes]:
    def record(kind: int, sequence: int, extents: bytes) -> bytes:
        return bytes([kind, sequence, len(extents)]) + extents

    head = struct.pack("<BHBB", 0, 5000, 3, 0)
    return [
        head + bytes(4) + rng.randbytes(64),
        head + record(2, 0, b"\1\2") + record(2, 0, b"\3") + record(2, 0, b"") + record(2, 0, b"\5\6\7"),
        head + record(2, 9, b"\1") + record(10, 9, b"\2\2") + b"\x10\0" + record(34, 8, b"\3") + b"\1" + bytes(1),
        struct.pack("<BHBB", 4, 63, 0, 255) + bytes(4),
    ]


def client_seeds(rng: random.Random) -> list[bytes]:
    def request(client: int, what: int, length: int, offset: int) -> bytes:
        return bytes([client << 7 | what | 32, length]) + struct.pack("<I", offset)[:3]

    go, job, step = b"\x42", b"\x45\0", b"\x4d\x05"
    mixed = b"".join(
        request(rng.randrange(2), rng.randrange(12), rng.randrange(8), rng.randrange(1 << 16))
        + rng.choice([go, b"\xc2", job, step, b"\x40\x11"])
        for _ in range(60)
    )
    return [
        b"\0" + request(0, 1, 3, 0) + go + request(0, 0, 3, 0) + go + request(0, 6, 0, 0) + go + job,
        b"\0" + request(0, 1, 7, 100) + b"\x44" + b"\x4b",
        b"\1" + request(1, 1, 6, 0) + b"\xc2" + request(1, 12, 0, 0) + b"\xc2",
        b"\0" + request(0, 1, 1, 0) + b"\x4c" + bytes(28) + go,
        b"\0" + mixed,
    ]


def peer_seeds(rng: random.Random) -> list[bytes]:
    """Honest sessions, to be made worse: a move is its kind, what, and what that needs (fuzz_peer.c)."""
    job = bytes([26, 0])

    def write(what: int) -> bytes:
        return bytes([0, what | 16]) + rng.randbytes(2)

    def ask(what: int) -> bytes:
        return bytes([18, what]) + rng.randbytes(2)

    def rest() -> bytes:
        return rng.choice([b"", b"\3\1", b"\3\1" + job * 3])

    def answer() -> bytes:
        return rng.choice([b"\x0a\7", b"\x0a\1", b"\x0c\0"]) + job * rng.randrange(3)

    target = b"".join(write(rng.choice([2, 5, 8, 34, 73])) + job * rng.randrange(2) + rest() for _ in range(30))
    units = [bytes([4, kind | 32, block, 5, block]) + job for kind in (4, 6) for block in (0, 3)]
    unit = bytes([7, 0, 7, 1]) + b"".join(units)
    ends = bytes([14, 0, 14, 1]) + job * 2
    reads = b"".join(bytes([27, what, at, 0]) + job for what, at in ((0, 1), (2, 3), (0, 0), (1, 9), (2, 200)))
    source = b"".join(ask(rng.randrange(256)) + answer() for _ in range(30))
    settle = (bytes([15, 2, 0, 15, 3, 0]) + job * 2) * 8 + b"\x0c\0"
    again = b"\x17\0" + bytes([22, 0]) + ends
    return [
        b"\0" + write(2) + job + b"\3\1" + job,  # short ones too: one byte in them is soon another
        b"\0" + write(2) + job + b"\3\0" + job,  # and a lie: it counts one write too many
        b"\1" + ends + ask(3) + b"\x0a\7" + ask(4) + job * 3 + b"\x0c\0" + job,
        b"\5" + ends + job * 3 + b"\x0f\2\0\x0f\3\0" + job + b"\x0c\0",
        b"\0" + target + b"\3\1" + job * 4,
        b"\0" + unit + target,
        b"\0" + write(2) + reads + write(5) + job + b"\3\1" + reads,
        b"\1" + ends + source,
        b"\1" + ends + source + again + source,
        b"\5" + ends + job * 8 + settle + source + settle,
        b"\7" + ends + job * 8 + settle + source,
    ]


class Target(NamedTuple):
    seeds: list[bytes]
    runs: int
    longest: int
    onethread: bool = False


RNG = random.Random(1)
TARGETS = {
    "fuzz_nbd": Target(nbd_seeds(RNG), 50000, 64),
    "fuzz_frame": Target(frame_seeds(RNG), 3000, 400),
    "fuzz_wire": Target(wire_seeds(RNG), 50000, 4000),
    "fuzz_journal": Target(journal_seeds(RNG), 1500, 600),
    "fuzz_client": Target(client_seeds(RNG), 1000, 800, onethread=True),
    "fuzz_peer": Target(peer_seeds(RNG), 600, 800, onethread=True),
}


@pytest.fixture(scope="module")
def native(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tmp_path_factory.mktemp("fuzz"))


def build(native: Native, name: str, changed: Path | None = None) -> Program:
    target = TARGETS[name]
    mine = (FUZZ / f"{name}.c", *([FUZZ / "onethread.c"] if target.onethread else []))
    return native.program(FUZZER, *mine, link=ONETHREAD_WRAPS if target.onethread else (), changed=changed)


def fuzz(program: Program, name: str, folder: Path, seed: int = 1) -> tuple[int, str]:
    target = TARGETS[name]
    longer = int(os.environ.get("MIRRORPAIR_FUZZ_RUNS", "0"))
    corpus = folder / f"corpus-{seed}"
    corpus.mkdir()
    for i, first in enumerate(target.seeds):
        (corpus / str(i)).write_bytes(first)
    done = program(
        f"-runs={longer or target.runs}",
        f"-seed={random.getrandbits(31) if longer else seed}",
        f"-max_len={target.longest}",
        "-len_control=0",
        "-timeout=60",
        f"-artifact_prefix={folder}/",
        corpus,
        cwd=folder,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_breaks_it(native: Native, tmp_path: Path, name: str) -> None:
    code, said = fuzz(build(native, name), name, tmp_path)
    assert code == 0, said
    assert "DONE" in said


# target: file, what stands there, what stands there instead
DEFECTS = {
    "fuzz_nbd": (
        "nbd.c",
        "request->offset > size || request->length > size - request->offset",
        "request->offset + request->length > size",
    ),
    "fuzz_frame": ("frame.c", "frame->meta > frame->length || ", ""),
    "fuzz_wire": ("wire.c", "if (length - *at < 8 + more)", "if (length - *at < 8)"),
    "fuzz_journal": ("actlog.c", "if (extent >= extents)", "if (extent > extents)"),
    "fuzz_client": ("serve.c", "c->drain = n.length;", "c->drain = n.length - 1;"),
    "fuzz_peer": ("link.c", "mp_load64(payload) != link->writes", "mp_load64(payload) < link->writes"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_missing_check_is_found(native: Native, tmp_path: Path, name: str) -> None:
    file, right, wrong = DEFECTS[name]
    text = (SOURCES / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    changed = tmp_path / file
    changed.write_text(text.replace(right, wrong), encoding="utf-8")
    program = build(native, name, changed)
    code, said = 0, ""
    for seed in range(1, 11):  # libFuzzer also tries what it compared, addresses among it: no seed repeats all of that
        code, said = fuzz(program, name, tmp_path, seed)
        if code:
            break
    assert code != 0, said
    assert (
        "does not hold" in said
        or "ERROR: AddressSanitizer" in said
        or "runtime error" in said
        or "assertion failed" in said
    ), said


def test_every_target_is_run() -> None:
    assert {path.stem for path in FUZZ.glob("fuzz_*.c")} == set(TARGETS) == set(DEFECTS)
