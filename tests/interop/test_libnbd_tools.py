"""libnbd's programs at a mirrored pair: nbdinfo, nbdcopy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mirror import SIZE
from pair import MIB
from realclients import needs, path_of, tool

from mirrorpair.handshake import MAX_REQUEST

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from mirror import Mirror
    from pair import Daemon

CAN = ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
CANNOT = ("can_cache", "can_df", "can_fast_zero", "is_read_only", "is_rotational")


@needs("nbdinfo")
def test_nbdinfo_sees_the_volume_as_it_is(mirror: Mirror) -> None:
    for uri in mirror.uris(mirror.alpha):
        assert tool("nbdinfo", "--size", uri).strip() == str(SIZE)
        shown = json.loads(tool("nbdinfo", "--json", uri))
        assert shown["protocol"] == "newstyle-fixed"
        assert shown["TLS"] is False
        (export,) = shown["exports"]
        assert (export["export-name"], export["export-size"]) == ("data", SIZE)
        assert {name: export[name] for name in CAN} == dict.fromkeys(CAN, True)
        assert {name: export[name] for name in CANNOT} == dict.fromkeys(CANNOT, False)
        sizes = [export[f"block_size_{name}"] for name in ("minimum", "preferred", "maximum")]
        assert sizes == [1, 4096, MAX_REQUEST]
        tool("nbdinfo", "--can", "multi-conn", uri)
        tool("nbdinfo", "--is", "read-only", uri, code=2)
    for whole in mirror.uris(mirror.alpha, ""):
        listed = json.loads(tool("nbdinfo", "--list", "--json", whole))["exports"]
        assert {one["export-name"]: one["export-size"] for one in listed} == {"data": SIZE, "logs": SIZE}
    mirror.finish()


@needs("nbdinfo")
def test_what_is_not_offered_is_refused_in_words(mirror: Mirror) -> None:
    for uri in mirror.uris(mirror.alpha):
        assert "base:allocation" in tool("nbdinfo", "--map", uri, code=None)  # not yet
    for uri in mirror.uris(mirror.alpha, "nothing"):
        assert "there is no volume 'nothing' here" in tool("nbdinfo", uri, code=None, debug=True)
    tool("nbdinfo", mirror.unix(mirror.alpha).replace("nbd+unix", "nbds+unix"), code=None)  # nor TLS
    tool("nbdinfo", "--size", mirror.unix(mirror.alpha))
    mirror.finish()


@needs("nbdinfo")
def test_every_client_is_told_by_a_secondary_who_is_primary(mirror: Mirror, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    copy.write_bytes(b"\x01" * SIZE)
    attempts: list[tuple[tuple[str | Path, ...], str]] = [
        (("nbdinfo", "--size"), "{me} is secondary: {other} is primary"),
        (("nbdcopy", copy), "server policy prevents NBD_OPT_GO"),  # which is all that it ever tells
        (("qemu-img", "info", "-f", "raw"), "{me} is secondary: {other} is primary"),
        (("qemu-io", "-f", "raw", "-c", "write 0 4k"), "{me} is secondary: {other} is primary"),
    ]

    def all_are_refused(me: Daemon, other: Daemon) -> None:
        for uri in mirror.uris(me):
            for words, sentence in attempts:
                if path_of(str(words[0])):
                    expected = sentence.format(me=me.name, other=other.name)
                    assert expected in tool(*words, uri, code=None, debug=True)

    all_are_refused(mirror.beta, mirror.alpha)
    mirror.switch(mirror.alpha, mirror.beta)
    all_are_refused(mirror.alpha, mirror.beta)
    mirror.finish(mirror.beta, data=bytes(SIZE))


@needs("nbdcopy")
def test_nbdcopy_takes_an_image_up_and_down(mirror: Mirror, tmp_path: Path, rng: random.Random) -> None:
    content = bytearray(SIZE)
    for at in range(0, SIZE, 4 * MIB):
        length = rng.randrange(1, 2 * MIB)
        content[at : at + length] = rng.randbytes(length)
    up, down = tmp_path / "up.img", tmp_path / "down.img"
    for uri, volume in ((mirror.unix(mirror.alpha, "data"), "data"), (mirror.tcp(mirror.alpha, "logs"), "logs")):
        up.write_bytes(content)
        tool("nbdcopy", "--flush", "--connections=4", "--requests=32", up, uri)
        tool("nbdcopy", "--connections=4", uri, down)
        assert down.read_bytes() == content
        content = content[12345:] + content[:12345]
        down.write_bytes(content)  # over content that is there already, in requests of another size
        tool("nbdcopy", "--flush", "--synchronous", "--request-size=65536", down, uri)
        assert mirror.alpha.image(volume).stat().st_size == SIZE
    mirror.finish(logs=bytes(content))


@needs("nbdcopy")
def test_nbdcopy_from_volume_to_volume_keeps_both_images_thin(
    mirror: Mirror, tmp_path: Path, rng: random.Random
) -> None:
    content = bytearray(SIZE)
    content[5 * MIB : 6 * MIB] = rng.randbytes(MIB)
    content[20 * MIB + 1 : 20 * MIB + 3] = b"ab"
    source = tmp_path / "source.img"
    with source.open("wb") as file:
        file.truncate(SIZE)
        file.seek(5 * MIB)
        file.write(content[5 * MIB : 6 * MIB])
        file.seek(20 * MIB + 1)
        file.write(b"ab")
    tool("nbdcopy", source, mirror.unix(mirror.alpha, "data"))
    tool("nbdcopy", mirror.tcp(mirror.alpha, "data"), mirror.unix(mirror.alpha, "logs"))
    mirror.finish(data=bytes(content), logs=bytes(content))
    for node in mirror.nodes:
        for volume in mirror.volumes:
            allocated = node.image(volume).stat().st_blocks * 512
            assert allocated <= 2 * MIB, f"{node.name}'s {volume} has {allocated} bytes allocated"
