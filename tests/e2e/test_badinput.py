"""What real commands and daemons say when something is wrong with what they are given: files, places, peers, clients.

Rules:
- Every refusal is one sentence on stderr with the exit code of the contract, says what is wrong and where, and has
  written nothing. No traceback ever reaches a user.
- What a client or a stranger does costs only its own connection: the daemon that it did it to serves the next one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mirrorpair.handshake import MAX_REQUEST
from mirrorpair.linux import ofd_lock
from mirrorpair.nbdclient import CMD_READ, CMD_WRITE, NbdError
from mirrorpair.peermessages import PREAMBLE_CONTROL, PROTOCOL

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pair import Daemon, Pair

    from mirrorpair.nbdclient import NbdClient

COMMANDS = (
    ("run",),
    ("init",),
    ("status",),
    ("wait", "--for", "synced"),
    ("resync", "data", "-y"),
    ("promote",),
    ("demote",),
    ("meta", "check"),
    ("meta", "dump"),
)
HANG_S = 60.0


def refuses(node: Daemon, *words: str, code: int, text: str) -> str:
    """One sentence, this exit code, this in it; and none of our files has changed."""
    before = files(node)
    done = node.command(*words, check=False)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mirrorpair: ")
    assert re.search(text, lines[0]), lines[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files(node) == before
    return lines[0]


def files(node: Daemon) -> dict[str, tuple[int, bytes]]:
    """Everything of this node, by name; sockets and locks of daemons aside."""
    found = {}
    for path in sorted(node.pair.folder.rglob("*")):
        if path.is_file() and path.name.startswith(node.name) | (node.name in path.parts) and path.suffix != ".log":
            found[str(path)] = (path.stat().st_size, path.read_bytes())
    return found


def folder_of(node: Daemon) -> Path:
    return node.pair.folder / node.name / f"shop.{node.name}"


def meta_of(node: Daemon) -> Path:
    return folder_of(node) / "data.meta"


# --- the configuration


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_wrong_configuration_is_10_with_its_key_for_every_command(pair: Pair, words: tuple[str, ...]) -> None:
    pair.config.write_text(pair.config.read_text().replace('size = "', 'sise = "'))
    refuses(pair.alpha, *words, code=10, text=r"pair\.toml: volume\.data\.sise: unknown key; did you mean size\?")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('name = "shop"', "name = 3", r"pair\.name: found the number 3, expected"),
        ('size = "8388608"', 'size = "8 apples"', r'volume\.data\.size: found "8 apples", expected a size'),
        ('size = "8388608"', "", r"volume\.data\.size: missing"),
        (
            'image.data = "beta-data.img"',
            'image.data = "alpha-data.img"',
            r"node\.(alpha|beta)\.image\.data: .*expected another than that of node\.alpha",
        ),
        ("[pair]", "[pair", r"not valid TOML: .*line"),
        ('control = "alpha.ctl"', 'control = "alpha.peer"', r"node\.alpha\.(control|address): "),
        ('arbiter = "none"', 'arbiter = "oracle"', r'pair\.arbiter: found "oracle", expected'),
        ('address = "unix:beta.peer"', 'address = "10.0.0.9:7790"', r"node\.beta\.address: .*insecure"),
    ],
)
def test_a_daemon_does_not_start_with_a_wrong_configuration(pair: Pair, old: str, new: str, text: str) -> None:
    whole = pair.config.read_text()
    assert whole.count(old) == 1
    pair.config.write_text(whole.replace(old, new))
    refuses(pair.alpha, "run", code=10, text=text)


# --- images and metadata


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """As a virtual machine has it."""
    fd = os.open(path, os.O_RDWR)
    try:
        ofd_lock(fd, exclusive=True)
        yield
    finally:
        os.close(fd)


def test_images_that_cannot_be_used(pair: Pair) -> None:
    alpha = pair.alpha
    refuses(alpha, "run", code=2, text="`mirrorpair init`")
    refuses(alpha, "meta", "check", code=2, text="`mirrorpair init` makes them")
    alpha.init()
    refuses(alpha, "init", code=12, text="exists")
    image = alpha.image()
    kept = image.with_name("kept")
    image.rename(kept)
    refuses(alpha, "run", code=2, text=r"alpha-data\.img of volume data does not exist: .*mount it; if it is lost")
    image.mkdir()
    refuses(alpha, "run", code=2, text="is a folder")
    image.rmdir()
    kept.rename(image)
    for size in (pair.size // 2, pair.size * 2):
        os.truncate(image, size)
        said = refuses(alpha, "run", code=12, text=rf"has {size} bytes .*, volume data {pair.size} bytes")
        assert "--resize" not in said  # what the offline command would say
        check = alpha.command("meta", "check", check=False)
        assert check.returncode == 1
        assert f"has {size} bytes" in check.stdout
        os.truncate(image, pair.size)
    with locked(image):
        refuses(alpha, "run", code=12, text="is in use by another mirrorpair or a virtual machine")
        refuses(alpha, "init", "--force", code=12, text="in use")
    assert image.stat().st_size == pair.size
    alpha.start()  # nothing of all that is left
    refuses_live(alpha, "run", code=12, text="another daemon|in use")
    refuses_live(alpha, "init", "--force", code=12, text="another daemon|in use|runs")
    assert alpha.status().role == "secondary"
    assert alpha.stop() == 0


def damaged(data: bytes, *places: int) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 1
    return bytes(changed)


def test_metadata_that_are_cut_or_damaged(pair: Pair) -> None:
    alpha = pair.alpha
    alpha.init()
    meta, node = meta_of(alpha), folder_of(alpha) / "node"
    whole, own = meta.read_bytes(), node.read_bytes()

    def check(problem: str, recoverable: str) -> None:
        done = alpha.command("meta", "check", check=False)
        assert (done.returncode, done.stderr) == (1, "")
        assert "UNUSABLE" in done.stdout
        assert re.search(problem, done.stdout), done.stdout
        assert re.search(f"recoverable: .*{recoverable}", done.stdout), done.stdout
        one = json.loads(alpha.command("meta", "check", "--json", check=False).stdout)
        assert one["good"] is False
        assert any(not file["usable"] and file["recoverable"] for file in one["files"])

    for length in (0, 4096, len(whole) - 1):
        meta.write_bytes(whole[:length])
        refuses(
            alpha, "run", code=12, text="(truncated|ends before it).*`mirrorpair meta check` says what can be saved"
        )
    check("truncated", "the bits are lost.*`mirrorpair init --force`")
    meta.write_bytes(damaged(whole, 100, 4096 + 100))
    refuses(alpha, "run", code=12, text="both copies .* are damaged .*`mirrorpair meta check`")
    check("both copies", "its image is not.*`mirrorpair init --force`.*--keep-data")
    meta.write_bytes(whole)
    node.write_bytes(damaged(own, 100, 4096 + 100))
    refuses(alpha, "run", code=12, text="both copies of the node file .*`mirrorpair meta check`")
    check("both copies of the node file", "the images and the volumes' metadata are not")
    for path, data in ((node, own), (meta, whole)):
        path.unlink()
        refuses(alpha, "run", code=12, text="is missing, while other files .*`mirrorpair meta check`")
        check("there is no|does not exist|missing", "the image is not")
        node.write_bytes(own)
        path.write_bytes(data)
    record = folder_of(alpha) / "register"
    record.write_bytes(b"rubbish\n")
    refuses(alpha, "run", code=12, text="the record of the pair's roles, is damaged: remove it")
    check("the record of the pair's roles, is damaged", "remove this file while the peer is there")
    record.unlink()
    for place in (100, 4096 + 100):  # M2: one copy is enough, and is made two again
        meta.write_bytes(damaged(whole, place))
        alpha.start()
        assert alpha.stop() == 0
        assert "is damaged" in alpha.log()
        assert alpha.command("meta", "check").returncode == 0


def test_metadata_older_than_the_node_file_are_not_trusted(pair: Pair) -> None:
    """F15: beta's superblock comes from a backup. It says so, is promoted by nobody, and takes everything anew."""
    pair.up()
    assert pair.beta.stop() == 0
    backup = meta_of(pair.beta).read_bytes()
    pair.beta.start()
    pair.synced()
    pair.alpha.demote()
    pair.alpha.promote()  # an epoch that the backup has not heard of
    pair.synced()
    with pair.alpha.client() as client:
        client.write(0, b"new" * 1000)
    assert pair.beta.stop() == 0
    meta_of(pair.beta).write_bytes(backup)
    check = pair.beta.command("meta", "check", check=False)
    assert check.returncode == 1
    assert "older" in check.stdout
    pair.alpha.kill()
    pair.beta.start()
    refuses_live(pair.beta, "promote", "--accept-data-loss", "--force", code=12, text="older")
    pair.alpha.start()
    pair.alpha.wait("primary")
    pair.synced()
    assert "volume data: full from alpha" in pair.beta.log()
    for node in pair.nodes:
        assert node.stop() == 0
    pair.same_images()


def refuses_live(node: Daemon, *words: str, code: int, text: str) -> None:
    """By a daemon that goes on: its files may change meanwhile."""
    done = node.command(*words, check=False)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr, node.pair.logs())
    assert done.stderr.startswith("mirrorpair: ")
    assert re.search(text, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


# --- places


def test_ports_and_sockets_that_are_taken(pair: Pair) -> None:
    alpha, whole = pair.alpha, pair.config.read_text()
    alpha.init()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        pair.config.write_text(whole.replace("unix:alpha.nbd", f"tcp:{place}"))
        refuses(alpha, "run", code=12, text=f"{place}: port .* is in use")
        pair.config.write_text(whole.replace("unix:alpha.peer", place))
        refuses(
            alpha, "run", code=12, text=f"cannot listen on {place}: another program, or another daemon of this node"
        )
    pair.config.write_text(whole)
    for suffix in ("ctl", "nbd", "peer"):
        alpha.path(suffix).write_text("kept")
        refuses(alpha, "run", code=12, text=rf"alpha\.{suffix}\b.*(no|not a) socket")
        assert alpha.path(suffix).read_text() == "kept"
        alpha.path(suffix).unlink()
    alpha.start()
    assert alpha.stop() == 0
    assert not any(alpha.path(suffix).exists() for suffix in ("ctl", "nbd", "peer"))


def test_no_space_for_the_metadata_is_told_at_init_and_leaves_nothing(pair: Pair, tmpfs: Callable[..., Path]) -> None:
    small = tmpfs("32k")
    pair.config.write_text(pair.config.read_text().replace('state-dir = "alpha"', f'state-dir = "{small}"'))
    refuses(pair.alpha, "init", code=1, text="no space for .*No space left on device")
    assert list(small.iterdir()) == []
    assert not pair.alpha.image().exists()


# --- peers


def mirrors_not(node: Daemon, text: str) -> None:
    """Refused at its first word: the commands that are about the peer say why."""
    for _ in range(10000):
        if node.status().refusal is not None:
            break
    else:
        raise AssertionError(f"{node.name} does not refuse its peer\n{node.pair.logs()}")
    refuses_live(node, "resync", "data", "-y", code=12, text=text)
    shown = node.command("status").stdout
    assert re.search(text, shown), shown
    assert "--accept-data-loss" not in shown  # not the advice, as long as there is a cause that can be removed


def test_peers_of_another_shape_or_pair(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    alpha, beta, whole = pair.alpha, pair.beta, pair.config.read_text()
    alpha.init()
    alpha.start()
    for old, new, text in (
        (f'size = "{pair.size}"', f'size = "{2 * pair.size}"', "its volumes are data .*, ours data"),
        ('name = "shop"', 'name = "shup"', "its pair is shu?o?p, ours shu?o?p"),
        ('survivor = "primary"', 'survivor = "secondary"', "its survivor is .*, ours"),
    ):
        changed = whole.replace(old, new)
        assert changed != whole
        pair.config.write_text(changed)
        beta.init("--force")
        beta.start()
        mirrors_not(beta, text)
        pair.config.write_text(whole)
        mirrors_not(alpha, text)
        assert beta.stop() == 0
    beta.init("--force")
    beta.start()
    pair.synced()  # the same alpha, as soon as there is a fitting one
    # M10: a pair of the same name, made anew on one side
    assert alpha.stop() == 0
    assert beta.stop() == 0
    other = make_pair()
    for node in other.nodes:
        node.init()
        node.start()
    other.synced()
    for node in other.nodes:
        assert node.stop() == 0
    for path in ("beta", "beta-data.img"):
        (pair.folder / path).rename(pair.folder / f"{path}.old")
        (other.folder / path).rename(pair.folder / path)
    before = alpha.image().read_bytes(), beta.image().read_bytes()
    alpha.start()
    beta.start()
    for node in pair.nodes:
        mirrors_not(node, "belongs to another pair of this name .*one of the two was made anew")
    assert (alpha.image().read_bytes(), beta.image().read_bytes()) == before


def test_a_peer_of_another_version_is_refused_with_both_named(pair: Pair) -> None:
    """A stand-in for beta takes alpha's hello and sends it back as a beta of the future, as often as alpha comes."""
    newer = PROTOCOL[1] + 1

    def answer(place: socket.socket) -> None:
        while True:
            try:
                sock, _ = place.accept()
            except OSError:  # shut down
                return
            with sock, sock.makefile("rb") as lines, contextlib.suppress(OSError):
                sock.settimeout(HANG_S)
                if lines.read(len(PREAMBLE_CONTROL)) == PREAMBLE_CONTROL and (line := lines.readline()):
                    hello: dict[str, Any] = msgspec.json.decode(line)
                    hello |= {"node": "beta", "version": "9.9", "protocol": [newer, newer], "session": "1" * 16}
                    sock.sendall(msgspec.json.encode(hello) + b"\n")
                    lines.readline()

    pair.alpha.init()
    with socket.socket(socket.AF_UNIX) as place, ThreadPoolExecutor(1) as pool:
        place.bind(str(pair.beta.path("peer")))
        place.listen()
        pool.submit(answer, place)
        try:
            pair.alpha.start()
            text = f"version 9.9 and speaks protocol {newer} to {newer}"
            mirrors_not(pair.alpha, text)
            refuses_live(pair.alpha, "resync", "data", "--dry-run", code=12, text=text)
            refuses_live(pair.alpha, "wait", "--for", "connected", "--timeout", "0", code=13, text=text)
            assert pair.alpha.stop() == 0
        finally:
            place.shutdown(socket.SHUT_RDWR)


def test_strangers_at_the_peers_and_the_control_place(pair: Pair, rng: random.Random) -> None:
    pair.up()
    with contextlib.ExitStack() as held:
        for suffix in ("peer", "ctl", "nbd"):
            for said in (b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(5000), PREAMBLE_CONTROL + b"{", b"{}\n" * 100):
                for stays in (False, True):
                    sock = held.enter_context(socket.socket(socket.AF_UNIX))
                    sock.settimeout(HANG_S)
                    sock.connect(str(pair.alpha.path(suffix)))
                    with contextlib.suppress(OSError):
                        sock.sendall(said)
                    if not stays:
                        sock.close()
        with pair.alpha.client() as client:
            client.write(0, b"served")
        pair.beta.kill()
        pair.beta.start()  # finds the place in spite of those who stand there
        pair.synced()
        for node in pair.nodes:
            assert node.stop() == 0
    assert "Traceback" not in pair.logs()
    pair.same_images()


# --- clients


def send(client: NbdClient, kind: int, offset: int, length: int, payload: bytes = b"", cookie: int = 7) -> None:
    client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, length) + payload)


def test_clients_that_do_not_keep_to_the_protocol(pair: Pair, rng: random.Random) -> None:
    pair.up()
    content = rng.randbytes(1 << 20)
    with pair.alpha.client() as good:
        good.write(0, content)

        def still_good() -> None:
            assert good.read(0, len(content)) == content
            with pair.alpha.client() as next_one:
                assert next_one.read(4095, 2) == content[4095:4097]

        with pair.alpha.client() as client:  # past the end: an error of that request alone
            for offset, length in ((pair.size - 1, 2), (pair.size, 1), (2**63, 4096), (2**64 - 1, 2)):
                with pytest.raises(NbdError) as caught:
                    client.read(offset, length)
                assert caught.value.errno in (errno.EINVAL, errno.EOVERFLOW), caught.value
                with pytest.raises(NbdError) as caught:
                    client.write(offset, bytes(length))
                assert caught.value.errno in (errno.ENOSPC, errno.EINVAL, errno.EOVERFLOW), caught.value
            with pytest.raises(NbdError) as caught:
                client.read(0, MAX_REQUEST + 1)
            assert caught.value.errno in (errno.EINVAL, errno.EOVERFLOW)
            assert client.read(0, 10) == content[:10]
        still_good()
        for said in (rng.randbytes(100), struct.pack(">I", 0x25609513) + bytes(23), bytes(4096)):
            with pair.alpha.client() as client:  # rubbish in the place of a request
                client.socket.settimeout(HANG_S)
                with contextlib.suppress(OSError):
                    client.socket.sendall(said)
                    client.socket.shutdown(socket.SHUT_WR)
                    while client.socket.recv(65536):
                        pass
        still_good()
        for part in (1, 14, 27):  # half a header; then half a payload
            with pair.alpha.client() as client:
                client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 7, 0, 4096)[:part])
                client.hang_up()
        for part in (1, 4095):
            with pair.alpha.client() as client:
                send(client, CMD_WRITE, 0, 4096, bytes(part))
                client.hang_up()
        still_good()
        for _ in range(4):  # replies pending, and nobody reads them
            with pair.alpha.client() as client:
                client.socket.settimeout(HANG_S)
                for number in range(32):
                    send(client, CMD_READ, 0, 1 << 20, cookie=number)
                client.hang_up()
        still_good()
    for node in pair.nodes:
        assert node.stop() == 0
    assert "Traceback" not in pair.logs()
    pair.same_images()
    assert pair.alpha.image().read_bytes()[: len(content)] == content
