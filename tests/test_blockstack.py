"""Two names for the same bytes: links, loop devices, partitions."""

from __future__ import annotations

import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from mirrorpair import blockstack
from mirrorpair.blockstack import Extent, Storage, extents, loops_upon, overlap

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import LoopDevice, MakeImage

MIB = 1024 * 1024


def same(one: Path | str, other: Path | str) -> bool:
    ours, theirs = extents(os.stat(one)), extents(os.stat(other))
    assert overlap(ours, theirs) == overlap(theirs, ours)
    return overlap(ours, theirs)


def test_a_file_is_the_same_by_hard_link_and_symbolic_link(make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image("a.img", MIB)
    (tmp_path / "hard").hardlink_to(image)
    (tmp_path / "soft").symlink_to(image)
    assert same(image, tmp_path / "hard")
    assert same(image, tmp_path / "soft")


def test_an_empty_file_is_the_same_as_itself_only(make_image: MakeImage) -> None:
    assert same(make_image("a.img", 0), make_image("a.img", 0))
    assert not same(make_image("a.img", 0), make_image("b.img", 0))


def test_files_of_equal_content_are_two_images(make_image: MakeImage) -> None:
    assert not same(make_image("a.img", MIB), make_image("b.img", MIB))


def test_a_loop_device_is_the_same_as_its_file(make_image: MakeImage, loop_device: LoopDevice) -> None:
    image = make_image("a.img", MIB)
    device = loop_device(image)
    assert same(device, image)
    assert same(device, device)
    assert not same(device, make_image("b.img", MIB))


def test_a_loop_device_on_a_loop_device_is_the_same_as_the_file_below(
    make_image: MakeImage, loop_device: LoopDevice
) -> None:
    image = make_image("a.img", MIB)
    lower = loop_device(image)
    upper = loop_device(lower)
    assert same(upper, lower)
    assert same(upper, image)


def test_loop_devices_on_disjoint_parts_of_a_file_are_two_images(
    make_image: MakeImage, loop_device: LoopDevice
) -> None:
    image = make_image("a.img", 3 * MIB)
    first = loop_device(image, size=MIB)
    second = loop_device(image, offset=MIB, size=MIB)
    both = loop_device(image, offset=MIB // 2, size=MIB)
    assert not same(first, second)
    assert same(first, both)
    assert same(second, both)


def test_another_node_of_a_device_is_the_same_device(
    make_image: MakeImage, loop_device: LoopDevice, tmp_path: Path
) -> None:
    device = loop_device(make_image("a.img", MIB))
    try:
        os.mknod(tmp_path / "node", stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
    except PermissionError:
        pytest.skip("no device node may be made here")
    assert same(tmp_path / "node", device)


def test_a_partition_is_part_of_its_disk_and_not_of_its_neighbour(
    make_image: MakeImage, loop_device: LoopDevice, need_tool: Callable[[str], str]
) -> None:
    image = make_image("disk.img", 8 * MIB)
    disk = loop_device(image, partitions=True)
    # Told to the kernel as they are: reading a table from the disk needs a driver that some kernels lack.
    for number, first_sector in ((1, 2048), (2, 8192)):
        subprocess.run([need_tool("addpart"), disk, str(number), str(first_sector), "4096"], check=True)
    first, second = f"{disk}p1", f"{disk}p2"
    assert same(first, disk)
    assert same(second, image)
    assert not same(first, second)
    assert extents(os.stat(second))[-1].start == 8192 * 512
    assert loops_upon(os.stat(image)) == [disk]


def test_the_loop_devices_on_a_file_are_found(make_image: MakeImage, loop_device: LoopDevice) -> None:
    image, other = make_image("a.img", MIB), make_image("b.img", MIB)
    assert loops_upon(os.stat(image)) == []
    lower = loop_device(image)
    upper = loop_device(lower)
    loop_device(other)
    assert loops_upon(os.stat(image)) == sorted([lower, upper])
    assert loops_upon(os.stat(lower)) == [upper]
    assert loops_upon(os.stat(upper)) == []


def test_a_loop_device_whose_node_may_not_be_opened_is_known_by_its_files_name(
    make_image: MakeImage, loop_device: LoopDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image("a.img", 2 * MIB)
    device = loop_device(image, offset=MIB)
    upper = loop_device(device)
    by_ioctl = [extents(os.stat(path)) for path in (device, upper)]
    monkeypatch.setattr(blockstack, "DEV", tmp_path / "no-such-folder")
    assert [extents(os.stat(path)) for path in (device, upper)] == by_ioctl


def test_what_sysfs_does_not_tell_is_left_out(
    make_image: MakeImage, loop_device: LoopDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image("a.img", MIB)
    device = loop_device(image)
    monkeypatch.setattr(blockstack, "SYS_DEVICES", tmp_path)
    monkeypatch.setattr(blockstack, "SYS_BLOCK", tmp_path)
    assert [extent.storage.kind for extent in extents(os.stat(device))] == ["device"]
    assert same(device, device)
    assert loops_upon(os.stat(image)) == []


def test_only_common_bytes_of_one_storage_overlap() -> None:
    disk, other = Storage("device", 1, 0), Storage("device", 2, 0)
    assert overlap([Extent(disk, 0, 10)], [Extent(disk, 9, 20)])
    assert not overlap([Extent(disk, 0, 10)], [Extent(disk, 10, 20)])
    assert not overlap([Extent(disk, 0, 10)], [Extent(other, 0, 10)])
    assert overlap([Extent(other, 0, 1), Extent(disk, 0, 10)], [Extent(disk, 5, 6)])
