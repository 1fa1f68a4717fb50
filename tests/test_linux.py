"""The kernel's cold calls, against real files, file systems and loop devices."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from mirrorpair import linux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import LoopDevice, MakeImage

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def opened() -> Iterator[Callable[..., int]]:
    """`opened(path, flags)` is a descriptor that is closed after the test."""
    descriptors: list[int] = []

    def open_it(path: Path | str, flags: int = os.O_RDWR) -> int:
        descriptors.append(os.open(path, flags | os.O_CLOEXEC))
        return descriptors[-1]

    yield open_it
    for fd in descriptors:
        os.close(fd)


def test_a_block_device_tells_its_size_and_sector(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]
) -> None:
    device = opened(loop_device(make_image("a.img", 3 * MIB + 512)), os.O_RDONLY)
    assert linux.block_device_size(device) == 3 * MIB + 512
    assert linux.logical_block_size(device) == 512


def test_a_read_only_device_says_so(make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]) -> None:
    image = make_image("a.img", MIB)
    assert linux.block_device_read_only(opened(loop_device(image, read_only=True), os.O_RDONLY))
    assert not linux.block_device_read_only(opened(loop_device(image), os.O_RDONLY))


@pytest.mark.parametrize("ask", ["block_device_size", "logical_block_size", "block_device_read_only"])
def test_a_file_knows_no_questions_for_devices(make_image: MakeImage, opened: Callable[..., int], ask: str) -> None:
    with pytest.raises(OSError, match="Inappropriate ioctl") as caught:
        getattr(linux, ask)(opened(make_image("a.img", MIB)))
    assert caught.value.errno == errno.ENOTTY
    assert caught.value.filename is None


def test_punching_frees_storage_and_keeps_the_size(make_image: MakeImage, opened: Callable[..., int]) -> None:
    fd = opened(make_image("a.img", MIB, {0: b"x" * MIB}))
    os.fsync(fd)
    before = os.fstat(fd).st_blocks
    linux.punch(fd, 64 * KIB, 128 * KIB)
    assert os.pread(fd, 128 * KIB, 64 * KIB) == bytes(128 * KIB)
    assert os.pread(fd, 1, 64 * KIB - 1) == os.pread(fd, 1, 192 * KIB) == b"x"
    assert os.fstat(fd).st_size == MIB
    assert os.fstat(fd).st_blocks <= before - 128 * KIB // 512


def test_a_hole_punched_over_the_end_does_not_make_the_file_longer(
    make_image: MakeImage, opened: Callable[..., int]
) -> None:
    fd = opened(make_image("a.img", 4097, {0: b"x" * 4097}))
    linux.punch(fd, 4096, 4096)
    assert os.fstat(fd).st_size == 4097
    assert os.pread(fd, 4097, 0) == b"x" * 4096 + b"\0"


def test_zeroing_a_range_keeps_it_allocated(make_image: MakeImage, opened: Callable[..., int]) -> None:
    fd = opened(make_image("a.img", MIB, {0: b"x" * MIB}))
    try:
        linux.zero_range(fd, 4 * KIB, 64 * KIB)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system has no FALLOC_FL_ZERO_RANGE")
    assert os.pread(fd, 72 * KIB, 0) == b"x" * 4 * KIB + bytes(64 * KIB) + b"x" * 4 * KIB
    assert os.fstat(fd).st_blocks >= MIB // 512


@pytest.mark.parametrize("call", ["punch", "zero_range"])
def test_a_range_of_no_bytes_or_a_wrong_sign_is_an_error(
    make_image: MakeImage, opened: Callable[..., int], call: str
) -> None:
    fd = opened(make_image("a.img", MIB))
    for offset, length in ((0, 0), (-4096, 4096), (0, -1)):
        with pytest.raises(OSError, match="Invalid argument"):
            getattr(linux, call)(fd, offset, length)
    with pytest.raises(OverflowError):
        getattr(linux, call)(fd, 2**63, 4096)


def test_a_descriptor_that_may_not_write_punches_nothing(make_image: MakeImage, opened: Callable[..., int]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.punch(opened(make_image("a.img", MIB), os.O_RDONLY), 0, 4096)


def test_zeroing_a_device_reads_back_as_zeros(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]
) -> None:
    device = opened(loop_device(make_image("a.img", MIB, {0: b"x" * MIB})))
    linux.blk_zeroout(device, 64 * KIB, 64 * KIB)
    assert os.pread(device, 192 * KIB, 0) == b"x" * 64 * KIB + bytes(64 * KIB) + b"x" * 64 * KIB


def test_a_device_refuses_zeros_beside_its_sectors(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]
) -> None:
    device = opened(loop_device(make_image("a.img", MIB)))
    with pytest.raises(OSError, match="Invalid argument"):
        linux.blk_zeroout(device, 100, 512)


def test_discarding_on_a_loop_device_frees_its_files_storage(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]
) -> None:
    image = make_image("a.img", MIB, {0: b"x" * MIB})
    os.sync()
    before = image.stat().st_blocks
    device = opened(loop_device(image))
    linux.blk_discard(device, 0, 512 * KIB)
    assert image.stat().st_blocks < before
    assert os.pread(device, 4, 512 * KIB) == b"xxxx"


@pytest.mark.parametrize("call", ["blk_zeroout", "blk_discard"])
def test_a_file_knows_no_device_requests(make_image: MakeImage, opened: Callable[..., int], call: str) -> None:
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        getattr(linux, call)(opened(make_image("a.img", MIB)), 0, 4096)


def test_data_and_holes_are_found_in_turn(make_image: MakeImage, opened: Callable[..., int]) -> None:
    fd = opened(make_image("a.img", 4 * MIB, {MIB: b"x" * 64 * KIB}))
    assert linux.seek_data(fd, 0) == MIB
    assert linux.seek_hole(fd, MIB) == MIB + 64 * KIB
    assert linux.seek_hole(fd, 0) == 0


def test_no_more_data_is_none_and_no_error(make_image: MakeImage, opened: Callable[..., int]) -> None:
    fd = opened(make_image("a.img", MIB))
    assert linux.seek_data(fd, 0) is None
    assert linux.seek_data(fd, MIB) is None
    with pytest.raises(OSError, match="No such device or address") as caught:
        linux.seek_hole(fd, MIB)
    assert caught.value.errno == errno.ENXIO


def test_a_pipe_has_no_position_to_seek() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            linux.seek_data(read, 0)
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("ours", "clock"),
    [("clock_boottime_ns", time.CLOCK_BOOTTIME), ("clock_monotonic_ns", time.CLOCK_MONOTONIC)],
)
def test_the_clocks_are_the_kernels_own(ours: str, clock: int) -> None:
    before = time.clock_gettime_ns(clock)
    now = getattr(linux, ours)()
    assert before <= now <= time.clock_gettime_ns(clock)


def test_a_loop_device_names_its_file(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]
) -> None:
    image = make_image("a.img", MIB)
    status = image.stat()
    found = linux.loop_backing(opened(loop_device(image, offset=4096), os.O_RDONLY))
    assert found == linux.LoopBacking(status.st_dev, status.st_ino, 0, 4096)


def test_a_loop_device_on_a_device_names_that_device(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int]
) -> None:
    lower = loop_device(make_image("a.img", MIB))
    found = linux.loop_backing(opened(loop_device(lower), os.O_RDONLY))
    assert found is not None
    assert found.raw_device == os.stat(lower).st_rdev


def test_what_is_no_loop_device_stands_on_nothing(
    make_image: MakeImage, root: None, opened: Callable[..., int]
) -> None:
    assert linux.loop_backing(opened(make_image("a.img", MIB))) is None
    assert linux.loop_backing(opened("/dev/null")) is None


def test_a_loop_device_without_a_file_stands_on_nothing(
    make_image: MakeImage, loop_device: LoopDevice, opened: Callable[..., int], need_tool: Callable[[str], str]
) -> None:
    device = loop_device(make_image("a.img", MIB))
    fd = opened(device, os.O_RDONLY)
    assert linux.loop_backing(fd) is not None
    # It is open, so the kernel lets go of the file only when the descriptor is closed: one asks through a new one.
    subprocess.run([need_tool("losetup"), "--detach", device], check=True)
    os.close(fd)
    free = os.open(device, os.O_RDONLY)
    os.dup2(free, fd)
    if free != fd:
        os.close(free)
    assert linux.loop_backing(fd) is None


def test_an_open_beneath_a_folder_reads_and_makes_files(tmp_path: Path, opened: Callable[..., int]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"hello")
    folder = opened(tmp_path, os.O_PATH | os.O_DIRECTORY)
    fd = linux.openat2_beneath(folder, "in/a", os.O_RDONLY | os.O_CLOEXEC)
    assert os.read(fd, 10) == b"hello"
    os.close(fd)
    fd = linux.openat2_beneath(folder, "in/b", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    os.close(fd)
    assert (tmp_path / "in" / "b").exists()


def test_no_way_leads_out_of_the_folder(tmp_path: Path, opened: Callable[..., int]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in" / "up").symlink_to("../secret")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "secret")
    folder = opened(tmp_path / "in", os.O_PATH | os.O_DIRECTORY)
    for path in ("../secret", "up", "far", str(tmp_path / "secret"), "../in/../secret"):
        with pytest.raises(OSError, match="cross-device") as caught:
            linux.openat2_beneath(folder, path, os.O_RDONLY)
        assert caught.value.errno == errno.EXDEV


def test_a_magic_link_is_not_followed(opened: Callable[..., int]) -> None:
    proc = opened("/proc/self", os.O_PATH | os.O_DIRECTORY)
    with pytest.raises(OSError, match="symbolic links") as caught:
        linux.openat2_beneath(proc, "exe", os.O_RDONLY)
    assert caught.value.errno in (errno.ELOOP, errno.EXDEV)


def test_a_name_with_a_nul_is_never_cut_short(tmp_path: Path, opened: Callable[..., int]) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="null byte"):
        linux.openat2_beneath(opened(tmp_path, os.O_PATH | os.O_DIRECTORY), "a\0b", os.O_RDONLY)


def test_an_exclusive_lock_keeps_everybody_else_out(make_image: MakeImage, opened: Callable[..., int]) -> None:
    image = make_image("a.img", 0)
    linux.ofd_lock(opened(image), exclusive=True)
    other = opened(image)
    with pytest.raises(BlockingIOError):
        linux.ofd_lock(other, exclusive=True)
    with pytest.raises(BlockingIOError):
        linux.ofd_lock(other, exclusive=False)


def test_shared_locks_get_along_but_for_a_writer(make_image: MakeImage, opened: Callable[..., int]) -> None:
    image = make_image("a.img", MIB)
    linux.ofd_lock(opened(image, os.O_RDONLY), exclusive=False)
    linux.ofd_lock(opened(image, os.O_RDONLY), exclusive=False)
    with pytest.raises(BlockingIOError):
        linux.ofd_lock(opened(image), exclusive=True)


def test_a_lock_ends_with_its_last_descriptor(make_image: MakeImage, opened: Callable[..., int]) -> None:
    image = make_image("a.img", MIB)
    fd = os.open(image, os.O_RDWR)
    linux.ofd_lock(fd, exclusive=True)
    copy = os.dup(fd)
    os.close(fd)
    other = opened(image)
    try:
        with pytest.raises(BlockingIOError):
            linux.ofd_lock(other, exclusive=True)
    finally:
        os.close(copy)
    linux.ofd_lock(other, exclusive=True)


def test_a_lock_of_the_wrong_kind_of_descriptor_is_an_error(make_image: MakeImage, opened: Callable[..., int]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.ofd_lock(opened(make_image("a.img", MIB), os.O_RDONLY), exclusive=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda fd: linux.block_device_size(fd),
        lambda fd: linux.seek_data(fd, 0),
        lambda fd: linux.punch(fd, 0, 1),
        lambda fd: linux.ofd_lock(fd, exclusive=False),
        lambda fd: linux.loop_backing(fd),
    ],
)
def test_a_closed_descriptor_is_an_error_and_nothing_else(call: Callable[[int], object]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        call(-1)
    assert caught.value.errno == errno.EBADF
