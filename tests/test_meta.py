"""`mirrorpair meta dump` and `check`: what a node's files hold, whether it can be believed, what is recoverable."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from farside import run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from pairfile import read_pair, write_pair

from mirrorpair.errors import UsageError
from mirrorpair.history import Ids
from mirrorpair.metadata import BITMAP_OFFSET, LOG_OFFSET, empty_record, open_node, open_volume
from mirrorpair.newnode import make_node
from mirrorpair.nodecheck import NodeCheck, NodeDump, checked, dumped, look_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mirrorpair.nodecheck import FileCheck, FileDump

MIB = 1024 * 1024


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """The folder of a pair whose node alpha was made, with two volumes."""
    write_pair(tmp_path, {"data": "1MiB", "logs": "2MiB"})
    config = read_pair(tmp_path)
    make_node(config, config.node("alpha"))
    return tmp_path


def meta(pair: Path, name: str = "data.meta") -> Path:
    return pair / "state/shop.alpha" / name


def damage(path: Path, *offsets: int) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0x40]))


def look(pair: Path, node: str = "alpha") -> NodeCheck:
    config = read_pair(pair)
    return checked(config, config.node(node), look_at(config, config.node(node)))


def dump(pair: Path) -> NodeDump:
    config = read_pair(pair)
    return dumped(config, config.node("alpha"), look_at(config, config.node("alpha")))


def one(result: NodeCheck, volume: str | None = "data") -> FileCheck:
    return next(file for file in result.files if file.volume == volume)


def one_dump(result: NodeDump, volume: str | None = "data") -> FileDump:
    return next(file for file in result.files if file.volume == volume)


def command(pair: Path, *words: str) -> tuple[int, str, str]:
    done = run_cli("meta", *words, "-c", pair / "pair.toml", "--node", "alpha")
    return done.returncode, done.stdout, done.stderr


# --- good


def test_a_new_node_is_good(pair: Path) -> None:
    result = look(pair)
    assert result.good
    assert [(file.what, file.volume) for file in result.files] == [
        ("node", None),
        ("volume", "data"),
        ("volume", "logs"),
    ]
    assert all(file.good and file.usable and not file.problems for file in result.files)


def test_it_can_be_asked_while_a_daemon_has_the_files_and_changes_nothing(pair: Path) -> None:
    volumes = (open_volume(str(meta(pair, name))) for name in ("data.meta", "logs.meta"))
    with open_node(str(meta(pair, "node"))) as own, next(volumes) as data, next(volumes) as logs:
        for stored in (data, logs):
            stored.update(epoch=3, clean=False)
        own.update(epoch=3, clean=False, role="primary")
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pair.rglob("*") if path.is_file()}
        assert look(pair).good
        content = one_dump(dump(pair), None).content
        assert content is not None
        assert (content["epoch"], content["role"], content["clean"]) == (3, "primary", False)
        after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pair.rglob("*") if path.is_file()}
        assert after == before


def test_the_dump_shows_what_the_files_hold(pair: Path) -> None:
    with open_volume(str(meta(pair))) as stored:
        stored.update(ids=Ids(current=2**64 - 1, bitmap=7, history=(5,)), disk="up-to-date", pair_uuid="u", epoch=4)
    with meta(pair).open("r+b") as file:
        file.seek(BITMAP_OFFSET)
        file.write(b"\x05")
    data = one_dump(dump(pair))
    assert (data.dirty_blocks, data.dirty_bytes) == (2, 2 * 65536)
    assert (data.sequence, [copy.state for copy in data.copies]) == (2, ["good", "good"])
    assert [record.state for record in data.log] == ["good", "empty", "empty", "empty"]
    assert (data.log_lost, data.active_extents) == (False, ())
    assert data.content is not None
    assert data.content["ids"] == {"current": "f" * 16, "bitmap": f"{7:016x}", "history": [f"{5:016x}"]}
    assert (data.content["new"], data.content["disk"], data.content["epoch"]) == (False, "up-to-date", 4)
    assert data.content["identity"]["kind"] == "file"
    assert data.bytes_found == data.bytes_expected == meta(pair).stat().st_size
    logs = one_dump(dump(pair), "logs")
    assert logs.content is not None
    assert logs.content["ids"] == {"current": None, "bitmap": None, "history": []}


# --- damaged


@pytest.mark.parametrize(("name", "volume"), [("node", None), ("data.meta", "data")])
@pytest.mark.parametrize("copy", [0, 1])
def test_m2_one_damaged_copy_is_told_and_loses_nothing(pair: Path, name: str, volume: str | None, copy: int) -> None:
    damage(meta(pair, name), copy * 4096 + 100)
    file = one(look(pair), volume)
    assert (file.good, file.usable) == (False, True)
    assert f"copy {'AB'[copy]}" in file.problems[0]
    assert "nothing is lost" in file.recoverable
    assert [other.good for other in look(pair).files].count(False) == 1


@pytest.mark.parametrize(("name", "volume"), [("node", None), ("data.meta", "data")])
def test_m2_with_both_copies_bad_it_says_what_is_recoverable(pair: Path, name: str, volume: str | None) -> None:
    damage(meta(pair, name), 100, 4196)
    file = one(look(pair), volume)
    assert (file.good, file.usable) == (False, False)
    assert "both copies" in file.problems[0]
    assert "init --force" in file.recoverable
    held = one_dump(dump(pair), volume)
    assert held.content is None
    assert [copy.state for copy in held.copies] == ["bad", "bad"]
    code, out, err = command(pair, "check")
    assert (code, err) == (1, "")
    assert "UNUSABLE" in out
    assert f"recoverable: {file.recoverable}" in out
    code, out, err = command(pair, "check", "--json")
    assert (code, err) == (1, ""), out
    assert json.loads(out)["good"] is False
    code, out, err = command(pair, "dump")
    assert (code, err) == (1, "")
    assert json.loads(out)["files"][0 if volume is None else 1]["recoverable"] == file.recoverable


def test_m7_a_lost_log_sets_all_bits(pair: Path) -> None:
    damage(meta(pair), LOG_OFFSET + 3)
    file = one(look(pair))
    assert (file.good, file.usable) == (False, True)
    assert "every block counts as different" in file.recoverable
    assert one_dump(dump(pair)).log_lost


@pytest.mark.parametrize(
    "length", [0, 1, 4095, 4096, 8191, 8192, LOG_OFFSET + 8191, BITMAP_OFFSET, BITMAP_OFFSET + 4095]
)
def test_a_truncated_file_is_told(pair: Path, length: int) -> None:
    os.truncate(meta(pair), length)
    file = one(look(pair))
    assert not file.good
    assert not file.usable
    assert file.problems
    assert file.recoverable


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_are_it_says_so(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    config = read_pair(folder)
    make_node(config, config.node("alpha"))
    for name in ("node", "data.meta"):
        path = meta(folder, name)
        size = path.stat().st_size
        for _ in range(data.draw(st.integers(0, 3))):
            with path.open("r+b") as file:
                file.seek(data.draw(st.one_of(st.integers(0, 8191), st.integers(0, size - 1))))
                file.write(data.draw(st.binary(min_size=1, max_size=64)))
        if data.draw(st.booleans()):
            os.truncate(path, data.draw(st.integers(0, size)))
    result = look(folder)
    assert result.good == all(not file.problems for file in result.files)
    for file in result.files:
        assert file.recoverable
        assert all(problem.isprintable() for problem in (*file.problems, file.recoverable))
    msgspec.json.encode(dump(folder))


# --- what does not fit


def test_a_missing_file_is_a_problem_and_none_at_all_an_error(pair: Path) -> None:
    meta(pair, "logs.meta").unlink()
    file = one(look(pair), "logs")
    assert (file.good, file.usable) == (False, False)
    assert "there is no superblock" in file.problems[0]
    assert look(pair).files[1].good
    for name in ("node", "data.meta"):
        meta(pair, name).unlink()
    with pytest.raises(UsageError, match="mirrorpair init"):
        look(pair)
    assert command(pair, "check")[0] == command(pair, "dump")[0] == 2


def test_what_is_no_file_is_a_problem(pair: Path, never_blocks: None) -> None:
    meta(pair, "node").unlink()
    os.mkfifo(meta(pair, "node"))
    assert not one(look(pair), None).usable


def test_metadata_of_another_node_or_volume_are_not_usable(pair: Path) -> None:
    os.replace(meta(pair, "data.meta"), pair / "saved")
    (meta(pair, "data.meta")).write_bytes(meta(pair, "logs.meta").read_bytes())
    file = one(look(pair))
    assert (file.good, file.usable) == (False, False)
    assert "those of volume logs" in file.problems[0]
    meta(pair).parent.rename(pair / "state/shop.beta")
    beta = look(pair, "beta")
    assert not any(file.usable for file in beta.files)
    assert "of node alpha" in one(beta, None).problems[0]


def test_m1_another_size_than_the_configurations_is_not_usable(pair: Path) -> None:
    write_pair(pair, {"data": "2MiB", "logs": "2MiB"})
    file = one(look(pair))
    assert not file.usable
    assert "was made with a size of 1048576 bytes" in file.problems[0]


def test_metadata_of_another_pair_of_this_name_are_not_usable(pair: Path) -> None:
    with open_node(str(meta(pair, "node"))) as own:
        own.update(pair_uuid="one")
    with open_volume(str(meta(pair))) as stored:
        stored.update(pair_uuid="other")
    assert not one(look(pair)).usable


def test_f15_a_superblock_from_an_older_copy_is_not_trusted(pair: Path) -> None:
    with open_node(str(meta(pair, "node"))) as own:
        own.update(epoch=5)
    file = one(look(pair))
    assert (file.good, file.usable) == (False, True)
    assert "older copy" in file.problems[0]
    assert "compared with" in file.recoverable


def test_m1_another_image_is_not_trusted(pair: Path) -> None:
    image = pair / "alpha-data.img"
    (pair / "other").write_bytes(image.read_bytes())
    os.replace(pair / "other", image)
    file = one(look(pair))
    assert (file.good, file.usable) == (False, True)
    assert "not the one that was recorded" in file.problems[0]


@pytest.mark.parametrize("size", [0, MIB - 1, MIB + 1])
def test_an_image_of_another_size_is_told(pair: Path, size: int) -> None:
    os.truncate(pair / "alpha-data.img", size)
    file = one(look(pair))
    assert not file.usable
    assert "the volume 1048576 bytes" in file.problems[0]


def test_a_missing_image_is_told(pair: Path) -> None:
    (pair / "alpha-data.img").unlink()
    assert "cannot be opened: No such file" in one(look(pair)).problems[0]


def test_looking_leaks_no_descriptor(pair: Path, open_descriptors: Callable[[], set[int]]) -> None:
    before = open_descriptors()
    dump(pair)
    damage(meta(pair), 100, 4196)
    (pair / "alpha-logs.img").unlink()
    dump(pair)
    assert open_descriptors() == before


# --- the commands


def test_check_says_it_in_a_line_for_each_file(pair: Path) -> None:
    code, out, err = command(pair, "check")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "node file of shop: good; secondary, epoch 0, stopped cleanly",
        "volume data: good; 1.00 MiB, new, no data yet, stopped cleanly, 0 B marked as different",
        "volume logs: good; 2.00 MiB, new, no data yet, stopped cleanly, 0 B marked as different",
    ]
    assert command(pair, "check", "-q") == (0, "", "")
    assert str(meta(pair)) in command(pair, "check", "-v")[1]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_has_the_fields_of_the_structs(pair: Path) -> None:
    code, out, _ = command(pair, "check", "--json")
    assert code == 0
    (result,) = lines(out)
    assert msgspec.convert(result, NodeCheck, strict=True) == look(pair)
    assert result["schema"] == "mirrorpair.meta-check/1"
    code, out, _ = command(pair, "dump", "--json")
    assert code == 0
    (result,) = lines(out)
    assert result["schema"] == "mirrorpair.meta-dump/1"
    assert msgspec.convert(result, NodeDump, strict=True) == dump(pair)
    code, out, _ = command(pair, "dump")
    assert code == 0
    assert len(out.splitlines()) > 20
    assert json.loads(out) == result


@pytest.mark.parametrize("words", [["meta"], ["meta", "chek"], ["meta", "check", "data"], ["meta", "dump", "--force"]])
def test_wrong_arguments_exit_2(words: list[str]) -> None:
    done = run_cli(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_node_that_the_file_does_not_have_exits_10(pair: Path) -> None:
    done = run_cli("meta", "check", "-c", pair / "pair.toml", "--node", "gamma")
    assert done.returncode == 10


def test_common_options_work_on_every_level(pair: Path) -> None:
    config = ["-c", str(pair / "pair.toml")]
    for words in (
        [*config, "--node", "alpha", "--json", "meta", "check"],
        ["meta", *config, "--node", "alpha", "--json", "check"],
        ["--node", "alpha", "meta", "--json", "check", *config],
    ):
        done = run_cli(*words)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["good"] is True


def test_a_daemon_that_writes_meanwhile_is_never_taken_for_damage(pair: Path) -> None:
    """One thread writes as the daemon does, superblocks first and the node file last; this one looks."""
    names = ("data.meta", "logs.meta", "node")
    ended = threading.Event()

    def write() -> None:
        epoch = 0
        with (
            open_volume(str(meta(pair, names[0]))) as data,
            open_volume(str(meta(pair, names[1]))) as logs,
            open_node(str(meta(pair, names[2]))) as own,
        ):
            while not ended.is_set():
                epoch += 1
                for stored in (data, logs, own):
                    stored.update(epoch=epoch)
                place = epoch % 4
                os.pwrite(data.fd, empty_record(epoch), LOG_OFFSET + 8192 * place)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            result = look(pair)
            assert result.good, [file.problems for file in result.files]
    finally:
        ended.set()
        writer.join()
