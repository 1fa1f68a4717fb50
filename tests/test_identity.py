"""Which image is it: the same over renames, writes and reboots, another one when it was replaced or restored (A8)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from mirrorpair import identity
from mirrorpair.identity import Identity, boot_id, difference, identify

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import LoopDevice, MakeImage

MIB = 1 << 20


def of(path: Path | str) -> Identity:
    fd = os.open(path, os.O_RDONLY)
    try:
        return identify(fd)
    finally:
        os.close(fd)


def test_a_file_stays_itself_when_it_is_written_grown_and_renamed(make_image: MakeImage) -> None:
    path = make_image("a.img", MIB)
    before = of(path)
    with path.open("r+b") as file:
        file.write(b"data")
        file.truncate(2 * MIB)
    path.chmod(0o600)
    os.utime(path, (1, 1))
    after = of(path.rename(path.with_name("b.img")))
    assert after == before
    assert difference(before, after) is None
    assert (before.kind, before.inode) == ("file", after.inode)


def test_a8_a_copy_is_another_image(make_image: MakeImage) -> None:
    path = make_image("a.img", MIB, {0: b"data"})
    copy = path.with_name("copy.img")
    shutil.copy2(path, copy)
    assert "inode" in (difference(of(path), of(copy)) or "")


def test_a8_a_file_in_the_old_ones_inode_is_another_image(make_image: MakeImage) -> None:
    recorded = of(make_image("a.img", 1))
    if recorded.born_ns is None:
        pytest.skip("this file system keeps no birth time")
    assert recorded.born_ns > 10**18
    later = msgspec.structs.replace(recorded, born_ns=recorded.born_ns + 1)
    assert "another time" in (difference(recorded, later) or "")
    unknown = msgspec.structs.replace(recorded, born_ns=None)
    assert difference(recorded, unknown) is not None


def test_the_birth_time_is_the_one_that_stat_shows(make_image: MakeImage, need_tool: Callable[[str], str]) -> None:
    path = make_image("a.img", 1)
    shown = subprocess.run([need_tool("stat"), "-c", "%W", path], capture_output=True, text=True, check=True).stdout
    born = of(path).born_ns
    assert int(shown) == (0 if born is None else born // 10**9)


def test_where_statx_does_not_exist_the_inode_must_do(make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity.ctypes, "CDLL", lambda _: object())
    assert of(make_image("a.img", 1)).born_ns is None


def test_a_device_is_not_the_file_that_was_there() -> None:
    assert "was a file" in (difference(Identity(kind="file", inode=3), Identity(kind="device")) or "")
    assert "dm-uuid:a" in (difference(Identity(kind="device", id="dm-uuid:a"), Identity(kind="device")) or "")


def test_a_loop_device_is_what_it_stands_on(make_image: MakeImage, loop_device: LoopDevice) -> None:
    path = make_image("a.img", 2 * MIB)
    one, again, part = loop_device(path), loop_device(path), loop_device(path, offset=MIB)
    other = loop_device(make_image("b.img", 2 * MIB))
    assert of(one) == of(again)
    assert of(one).id == f"loop:{path.stat().st_ino}+0"
    assert len({of(device).id for device in (one, part, other)}) == 3


@pytest.fixture
def sys_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys/dev/block of our own: the kernel here has no disks with uuids and serial numbers."""
    monkeypatch.setattr(identity, "SYS_DEVICES", tmp_path / "sys")
    monkeypatch.setattr(identity, "BY_PARTUUID", tmp_path / "by-partuuid")
    return tmp_path / "sys"


NUMBER = os.makedev(8, 1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"dm/uuid": "LVM-abc\n", "wwid": "x"}, "dm-uuid:LVM-abc"),
        ({"wwid": "eui.0025\n"}, "wwn:eui.0025"),
        ({"device/wwid": "t10.ATA  disk \n"}, "wwn:t10.ATA disk"),
        ({"serial": "S1\n"}, "serial:S1"),
        ({"device/serial": "S2\n", "wwid": "\n"}, "serial:S2"),
        ({}, ""),
    ],
)
def test_a8_a_device_is_named_by_what_lasts(sys_devices: Path, files: dict[str, str], expected: str) -> None:
    for name, content in files.items():
        file = sys_devices / "8:1" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert identity._device_id(fd, NUMBER) == expected
    finally:
        os.close(fd)


def test_a_partition_without_a_uuid_is_its_disk_and_its_place(sys_devices: Path, tmp_path: Path) -> None:
    disk = tmp_path / "devices/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "wwid").write_text("eui.7\n")
    (disk / "sda1/partition").write_text("1\n")
    (disk / "sda1/start").write_text("2048\n")
    sys_devices.mkdir()
    (sys_devices / "8:1").symlink_to(disk / "sda1")
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert identity._device_id(fd, NUMBER) == "wwn:eui.7+2048"
    finally:
        os.close(fd)


def test_a_partition_is_named_by_its_uuid(
    sys_devices: Path, tmp_path: Path, make_image: MakeImage, loop_device: LoopDevice
) -> None:
    device = Path(loop_device(make_image("a.img", MIB)))
    number = device.stat().st_rdev
    folder = sys_devices / f"{os.major(number)}:{os.minor(number)}"
    folder.mkdir(parents=True)
    (folder / "partition").write_text("1\n")
    (tmp_path / "by-partuuid").mkdir()
    (tmp_path / "by-partuuid/dangling").symlink_to("nowhere")
    (tmp_path / "by-partuuid/1234-01").symlink_to(device)
    assert of(device).id == "partuuid:1234-01"


def test_an_identity_that_was_made_up_is_refused() -> None:
    for wrong in ({"kind": "file", "inode": -1}, {"kind": "device", "id": "x" * 600}, {"kind": "tape"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(msgspec.json.encode(wrong), type=Identity)


def test_the_boot_has_a_name() -> None:
    assert re.fullmatch(r"[0-9a-f-]{36}", boot_id())
    assert boot_id() == boot_id()
