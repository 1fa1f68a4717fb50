"""`mirrorpair init`: makes one node, whole or not at all, and never overwrites what it was not told to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
import tracing
from farside import MIRRORPAIR, environment, run_cli
from pairfile import read_pair, write_pair

from mirrorpair import newnode
from mirrorpair.errors import ImageError, MirrorpairError, RefusedError, UsageError
from mirrorpair.identity import identify
from mirrorpair.image import allocated_bytes
from mirrorpair.linux import ofd_lock
from mirrorpair.metadata import NodeFile, Superblock, check, open_node, open_volume
from mirrorpair.newnode import MadeNode, make_node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import LoopDevice

MIB = 1024 * 1024
TWO = {"data": "1MiB", "logs": "2MiB"}


def init(folder: Path, *, node: str = "alpha", keep_data: bool = False, force: bool = False) -> MadeNode:
    config = read_pair(folder)
    return make_node(config, config.node(node), keep_data=keep_data, force=force)


def names(folder: Path) -> set[str]:
    """Every file and folder below, without the configuration."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"pair.toml"}


def superblock(folder: Path, volume: str = "data", node: str = "alpha") -> Superblock:
    found = check(str(folder / f"state/shop.{node}/{volume}.meta"))
    assert found.good, found.problems
    assert isinstance(found.value, Superblock)
    return found.value


def node_file(folder: Path, node: str = "alpha") -> NodeFile:
    found = check(str(folder / f"state/shop.{node}/node"))
    assert found.good
    assert isinstance(found.value, NodeFile)
    return found.value


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """As a daemon holds its files."""
    fd = os.open(path, os.O_RDWR)
    try:
        ofd_lock(fd, exclusive=True)
        yield
    finally:
        os.close(fd)


def fill(path: Path, size: int) -> bytes:
    content = bytes(range(1, 256)) * (size // 255 + 1)
    path.write_bytes(content[:size])
    return content[:size]


# --- a new node


def test_a_new_node_has_sparse_images_metadata_and_a_node_file(tmp_path: Path) -> None:
    write_pair(tmp_path, TWO)
    made = init(tmp_path)
    meta = {f"state/shop.alpha/{name}" for name in ("node", "data.meta", "logs.meta")}
    assert names(tmp_path) == {"state", "state/shop.alpha", *meta, "alpha-data.img", "alpha-logs.img"}
    assert [(one.name, one.size, one.kind, one.content) for one in made.volumes] == [
        ("data", MIB, "file", "made"),
        ("logs", 2 * MIB, "file", "made"),
    ]
    for volume, size in (("data", MIB), ("logs", 2 * MIB)):
        with (tmp_path / f"alpha-{volume}.img").open("rb") as image:
            assert image.read() == bytes(size)
            assert allocated_bytes(image.fileno()) == 0


def test_m10_both_uuids_are_empty_and_the_volume_is_new(tmp_path: Path) -> None:
    write_pair(tmp_path)
    init(tmp_path)
    held = superblock(tmp_path)
    assert (held.pair, held.node, held.volume) == ("shop", "alpha", "data")
    assert (held.size, held.block_size) == (MIB, 65536)
    assert (held.pair_uuid, held.volume_uuid, held.new, held.ids.current, held.clean) == ("", "", True, 0, True)
    with (tmp_path / "alpha-data.img").open("rb") as image:
        assert held.identity == identify(image.fileno())
    own = node_file(tmp_path)
    assert (own.pair, own.node, own.pair_uuid, own.epoch, own.role, own.clean) == (
        "shop",
        "alpha",
        "",
        0,
        "secondary",
        True,
    )


def test_each_node_has_an_incarnation_of_its_own(tmp_path: Path) -> None:
    write_pair(tmp_path)
    init(tmp_path)
    init(tmp_path, node="beta")
    ids = {node_file(tmp_path, node).incarnation_id for node in ("alpha", "beta")}
    assert len(ids) == 2
    assert all(len(one) == 32 for one in ids)


def test_the_files_are_the_owners_alone_and_can_be_opened_as_the_daemon_does(tmp_path: Path) -> None:
    write_pair(tmp_path)
    init(tmp_path)
    folder = tmp_path / "state/shop.alpha"
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "alpha-data.img", *folder.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600
    with open_node(str(folder / "node")), open_volume(str(folder / "data.meta")):
        pass


def test_nothing_stays_open_or_locked(tmp_path: Path, open_descriptors: Callable[[], set[int]]) -> None:
    write_pair(tmp_path, TWO)
    before = open_descriptors()
    init(tmp_path)
    with pytest.raises(RefusedError):
        init(tmp_path)
    init(tmp_path, force=True)
    assert open_descriptors() == before


# --- keep-data


def test_kept_data_are_not_touched_and_are_a_generation_of_their_own(tmp_path: Path) -> None:
    write_pair(tmp_path)
    path = tmp_path / "alpha-data.img"
    content = fill(path, MIB)
    before = path.stat()
    made = init(tmp_path, keep_data=True)
    assert [one.content for one in made.volumes] == ["kept"]
    assert path.read_bytes() == content
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    first = superblock(tmp_path)
    assert not first.new
    assert (first.ids.bitmap, first.ids.history) == (0, ())
    init(tmp_path, keep_data=True, force=True)
    assert superblock(tmp_path).ids.current != first.ids.current
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 512, MIB - 512, MIB + 512])
@pytest.mark.parametrize("force", [False, True])
def test_kept_data_have_the_size_of_the_volume(tmp_path: Path, size: int, force: bool) -> None:
    write_pair(tmp_path)
    content = fill(tmp_path / "alpha-data.img", size)
    with pytest.raises(RefusedError, match="must be the same"):
        init(tmp_path, keep_data=True, force=force)
    assert names(tmp_path) == {"alpha-data.img"}
    assert (tmp_path / "alpha-data.img").read_bytes() == content


def test_data_that_are_not_there_cannot_be_kept(tmp_path: Path) -> None:
    write_pair(tmp_path, TWO)
    fill(tmp_path / "alpha-data.img", MIB)
    with pytest.raises(UsageError, match=r"alpha-logs\.img does not exist"):
        init(tmp_path, keep_data=True)
    assert names(tmp_path) == {"alpha-data.img"}


# --- what exists


def test_an_image_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    write_pair(tmp_path)
    content = fill(tmp_path / "alpha-data.img", MIB)
    with pytest.raises(RefusedError, match=r"--keep-data.*--force") as caught:
        init(tmp_path)
    assert caught.value.exit_code == 12
    assert names(tmp_path) == {"alpha-data.img"}
    assert (tmp_path / "alpha-data.img").read_bytes() == content


def test_a_node_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    write_pair(tmp_path, TWO)
    init(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for keep_data in (False, True):
        with pytest.raises(RefusedError, match="made already"):
            init(tmp_path, keep_data=keep_data)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("size", [0, MIB - 1, MIB, 3 * MIB])
def test_m10_force_makes_an_existing_image_zeros_of_the_right_size(tmp_path: Path, size: int) -> None:
    write_pair(tmp_path)
    path = tmp_path / "alpha-data.img"
    fill(path, size)
    inode = path.stat().st_ino
    made = init(tmp_path, force=True)
    assert [one.content for one in made.volumes] == ["zeroed"]
    assert path.read_bytes() == bytes(MIB)
    assert (path.stat().st_ino, path.stat().st_blocks) == (inode, 0)
    assert superblock(tmp_path).new


def test_force_makes_a_node_anew(tmp_path: Path) -> None:
    write_pair(tmp_path)
    init(tmp_path)
    old = node_file(tmp_path).incarnation_id
    with open_volume(str(tmp_path / "state/shop.alpha/data.meta")) as stored:
        stored.update(epoch=7, clean=False)
    (tmp_path / "state/shop.alpha/other").write_text("not ours")
    init(tmp_path, force=True)
    assert node_file(tmp_path).incarnation_id != old
    assert (superblock(tmp_path).epoch, superblock(tmp_path).clean) == (0, True)
    assert (tmp_path / "state/shop.alpha/other").read_text() == "not ours"


@pytest.mark.parametrize("name", ["state/shop.alpha/node", "state/shop.alpha/logs.meta", "alpha-logs.img"])
@pytest.mark.parametrize("keep_data", [False, True])
def test_not_even_force_takes_what_is_in_use(tmp_path: Path, name: str, keep_data: bool) -> None:
    write_pair(tmp_path, TWO)
    init(tmp_path)
    content = fill(tmp_path / "alpha-data.img", MIB)
    before = names(tmp_path)
    with locked(tmp_path / name), pytest.raises(RefusedError, match="in use"):
        init(tmp_path, keep_data=keep_data, force=True)
    assert names(tmp_path) == before
    assert (tmp_path / "alpha-data.img").read_bytes() == content


def test_two_inits_of_one_node_do_not_mix(tmp_path: Path) -> None:
    write_pair(tmp_path)
    folder = tmp_path / "state/shop.alpha"
    folder.mkdir(parents=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(RefusedError, match="another `mirrorpair init`"):
            init(tmp_path)
    finally:
        os.close(fd)
    assert names(tmp_path) == {"state", "state/shop.alpha"}
    init(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
@pytest.mark.parametrize("name", ["state/shop.alpha/node", "state/shop.alpha/data.meta"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, never_blocks: None, name: str, kind: str) -> None:
    write_pair(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    (tmp_path / "kept").write_text("kept")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "kept")
    for force in (False, True):
        with pytest.raises(RefusedError):
            init(tmp_path, force=force)
    assert names(tmp_path) == {"state", "state/shop.alpha", name, "kept"}
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling"])
@pytest.mark.parametrize("keep_data", [False, True])
def test_an_image_must_be_a_file_or_a_device(tmp_path: Path, never_blocks: None, kind: str, keep_data: bool) -> None:
    write_pair(tmp_path)
    path = tmp_path / "alpha-data.img"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        init(tmp_path, keep_data=keep_data, force=True)
    assert names(tmp_path) == {"alpha-data.img"}


@pytest.mark.parametrize("how", ["hard link", "symbolic link"])
def test_one_image_is_not_two_volumes(tmp_path: Path, how: str) -> None:
    write_pair(tmp_path, {"data": "1MiB", "logs": "1MiB"})
    content = fill(tmp_path / "alpha-data.img", MIB)
    if how == "hard link":
        (tmp_path / "alpha-logs.img").hardlink_to(tmp_path / "alpha-data.img")
    else:
        (tmp_path / "alpha-logs.img").symlink_to("alpha-data.img")
    with pytest.raises(RefusedError, match="are the same image"):
        init(tmp_path, force=True)
    assert (tmp_path / "alpha-data.img").read_bytes() == content


# --- devices


def test_a_device_is_taken_as_it_is_or_made_zeros_where_the_volume_lies(
    tmp_path: Path, loop_device: LoopDevice
) -> None:
    backing = tmp_path / "backing"
    content = fill(backing, 3 * MIB)
    device = loop_device(backing)
    write_pair(tmp_path, images={"alpha-data": device})
    with pytest.raises(RefusedError, match="exists"):
        init(tmp_path)
    assert [(one.kind, one.content) for one in init(tmp_path, keep_data=True).volumes] == [("device", "kept")]
    assert backing.read_bytes() == content
    seen: list[tuple[str, int, int]] = []
    config = read_pair(tmp_path)
    make_node(config, config.node("alpha"), force=True, progress=lambda *told: seen.append(told))
    subprocess.run(["blockdev", "--flushbufs", device], check=False)
    assert backing.read_bytes() == bytes(MIB) + content[MIB:]
    assert seen[-1] == ("data", MIB, MIB)
    assert superblock(tmp_path).identity.kind == "device"


def test_a_device_that_is_too_small_is_refused(tmp_path: Path, loop_device: LoopDevice) -> None:
    backing = tmp_path / "backing"
    content = fill(backing, MIB - 4096)
    write_pair(tmp_path, images={"alpha-data": loop_device(backing)})
    for keep_data in (False, True):
        with pytest.raises(RefusedError, match="too small"):
            init(tmp_path, keep_data=keep_data, force=True)
    assert backing.read_bytes() == content
    assert not (tmp_path / "state").exists()


# --- all or nothing


def test_when_the_second_volume_fails_the_first_one_is_removed_again(tmp_path: Path) -> None:
    write_pair(tmp_path, TWO, {"alpha-logs": "missing/logs.img"})
    with pytest.raises(UsageError, match="folder does not exist"):
        init(tmp_path)
    assert names(tmp_path) == set()


def test_without_space_for_the_metadata_nothing_is_left_and_nothing_was_zeroed(
    tmp_path: Path, tmpfs: Callable[..., Path]
) -> None:
    state = tmpfs("120k")
    write_pair(tmp_path, TWO, state_dir=state)
    content = fill(tmp_path / "alpha-data.img", MIB)
    with pytest.raises(ImageError, match="no space"):
        init(tmp_path, force=True)
    assert names(tmp_path) == {"alpha-data.img", state.name}
    assert (tmp_path / "alpha-data.img").read_bytes() == content


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    write_pair(tmp_path, state_dir="file")
    with pytest.raises(ImageError, match=r"cannot make the folder .*Not a directory"):
        init(tmp_path)
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "os.ftruncate", "os.posix_fallocate", "identify"])
def test_whatever_fails_what_was_made_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    """Each such call, one after the other, in this process."""
    write_pair(tmp_path, TWO)
    fill(tmp_path / "alpha-logs.img", 5)
    holder, name = (os, call.removeprefix("os.")) if call.startswith("os.") else (newnode, call)
    real = getattr(holder, name)
    for good in range(20):
        left = good

        def failing(*args: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(error, os.strerror(error))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(holder, name, failing)
            try:
                init(tmp_path, force=True)
            except MirrorpairError:
                assert names(tmp_path) == {"alpha-logs.img"}
                continue
        assert left >= 0
        break
    assert superblock(tmp_path).new


@pytest.mark.parametrize("call", ["renameat,rename", "fsync", "unlink,unlinkat", "ftruncate", "pwrite64"])
def test_m10_a_kill_at_any_call_leaves_no_node_or_a_whole_one(tmp_path: Path, call: str) -> None:
    """The node was made before and its image holds data: from the first call on either the old node stands, or none, or
    the new one with zeros; a new volume over old data never."""
    write_pair(tmp_path)
    for when in range(1, 40):
        init(tmp_path, force=True)
        content = fill(tmp_path / "alpha-data.img", MIB)
        with open_node(str(tmp_path / "state/shop.alpha/node")) as own:
            own.update(epoch=7)
        with open_volume(str(tmp_path / "state/shop.alpha/data.meta")) as stored:
            stored.update(epoch=7)
        log = tmp_path / "log"
        rules = [f"inject={call}:signal=KILL:when={when}"]
        done = subprocess.run(
            [
                *tracing.command(log, *rules),
                *MIRRORPAIR,
                "init",
                "-c",
                tmp_path / "pair.toml",
                "--node=alpha",
                "--force",
            ],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        image = (tmp_path / "alpha-data.img").read_bytes()
        state = tmp_path / "state/shop.alpha"
        volume_new = (state / "data.meta").exists() and superblock(tmp_path).epoch == 0
        if (state / "node").exists():
            assert (node_file(tmp_path).epoch == 0) == volume_new
            assert (image == bytes(MIB)) if volume_new else (image == content)
        if volume_new:
            assert image == bytes(MIB)
        elif (state / "data.meta").exists():
            assert image == content, "zeroed under metadata that say it holds data"
        if not tracing.happened(log):
            assert done.returncode == 0, done.stderr
            assert when > 1, "it was never killed"
            return
    pytest.fail("it never came to an end")


# --- the command


def test_the_command_makes_the_node_and_says_so(tmp_path: Path) -> None:
    path = write_pair(tmp_path, TWO)
    done = run_cli("init", "-c", path, "--node", "alpha")
    assert (done.returncode, done.stderr) == (0, "")
    assert "alpha of pair shop is made" in done.stdout
    assert "data  1.00 MiB" in done.stdout
    assert "mirrorpair run" in done.stdout
    again = run_cli("init", "-c", path, "--node", "alpha")
    assert (again.returncode, again.stdout) == (12, "")
    assert again.stderr.startswith("mirrorpair: ")
    assert len(again.stderr.splitlines()) == 1


def test_json_is_one_object(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    done = run_cli("init", "--json", MIRRORPAIR_CONFIG=str(path), MIRRORPAIR_NODE="beta")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "schema": "mirrorpair.init/1",
        "pair": "shop",
        "node": "beta",
        "folder": str(tmp_path / "state/shop.beta"),
        "volumes": [
            {
                "name": "data",
                "size": MIB,
                "block_size": 65536,
                "image": str(tmp_path / "beta-data.img"),
                "kind": "file",
                "content": "made",
                "metadata": str(tmp_path / "state/shop.beta/data.meta"),
            }
        ],
    }
    again = run_cli("init", "--json", MIRRORPAIR_CONFIG=str(path), MIRRORPAIR_NODE="beta")
    assert again.returncode == 12
    error = json.loads(again.stdout)
    assert (error["type"], error["code"]) == ("error", 12)


def test_quiet_says_nothing(tmp_path: Path) -> None:
    done = run_cli("init", "-q", "-c", write_pair(tmp_path), "--node", "alpha")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_node_is_the_one_with_the_hosts_name(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    done = run_cli("init", "-c", path)
    assert done.returncode == 10
    assert "alpha or beta" in done.stderr
    host = os.uname().nodename
    for name in {host, host.partition(".")[0]}:
        path.write_text(path.read_text().replace("node.alpha", f'node."{name}"'))
        assert run_cli("init", "-c", path, "--force").returncode == 0
        path.write_text(path.read_text().replace(f'node."{name}"', "node.alpha"))


@pytest.mark.parametrize("config", ["none.toml", "."])
def test_a_configuration_that_cannot_be_read_exits_10(tmp_path: Path, config: str) -> None:
    done = run_cli("init", "-c", tmp_path / config)
    assert done.returncode == 10
    assert str(tmp_path) in done.stderr


def test_an_empty_pair_can_be_made_as_the_help_says(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    fill(tmp_path / "alpha-data.img", MIB)
    assert run_cli("init", "--keep-data", "-c", path, "--node", "alpha").returncode == 0
    assert run_cli("init", "-c", path, "--node", "beta").returncode == 0
    assert not superblock(tmp_path, node="alpha").new
    assert superblock(tmp_path, node="beta").new
