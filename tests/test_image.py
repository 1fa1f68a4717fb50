"""Opening images: the right ones work, every wrong one is refused with the right error and left as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from mirrorpair import newfile
from mirrorpair.errors import ImageError, MirrorpairError, NotAllowedError, RefusedError, UsageError
from mirrorpair.image import Image, allocated_bytes, open_source, open_target, same_image
from mirrorpair.linux import ofd_lock, openat2_beneath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import LoopDevice, MakeImage, Mount

KIB = 1024
MIB = 1024 * KIB
SIZES = [0, 1, 4095, 4096, 4097]


@pytest.fixture(autouse=True)
def no_descriptor_leaks(open_descriptors: Callable[[], set[int]]) -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def content(path: Path) -> tuple[bytes, int, int]:
    """All that a refused target must keep."""
    status = path.stat()
    return path.read_bytes(), status.st_mtime_ns, status.st_mode


def open_as_source(path: Path | str) -> Image:
    return open_source(str(path))


def open_as_target(path: Path | str) -> Image:
    return open_target(str(path), size=MIB)


both_ways = pytest.mark.parametrize("open_it", [open_as_source, open_as_target])


# Sources


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_is_a_source(make_image: MakeImage, size: int) -> None:
    path = make_image("a.img", size)
    with open_source(str(path)) as image:
        assert (image.path, image.size, image.kind, image.created) == (str(path), size, "file", False)
        assert not os.get_inheritable(image.fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(image.fd, b"x", 0)
    assert image.fd == -1


def test_a_device_is_a_source_of_its_own_size(make_image: MakeImage, loop_device: LoopDevice) -> None:
    with open_source(loop_device(make_image("a.img", MIB + 512), read_only=True)) as image:
        assert (image.size, image.kind) == (MIB + 512, "device")


def test_closing_twice_closes_nothing_else(make_image: MakeImage) -> None:
    image = open_source(str(make_image("a.img", 1)))
    fd = image.fd
    image.close()
    other = os.open("/dev/null", os.O_RDONLY)
    try:
        if other != fd:
            os.dup2(other, fd)
        image.close()
        os.fstat(fd)
    finally:
        for number in {fd, other}:
            os.close(number)
    assert "closed" in repr(image)


def test_a_missing_source_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot open .*none\.img: it does not exist"):
        open_source(str(tmp_path / "none.img"))


def test_a_path_through_a_file_is_a_wrong_argument(make_image: MakeImage) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        open_source(str(make_image("a.img", 1) / "b.img"))


def test_a_ring_of_links_is_a_wrong_argument(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match="too many symbolic links"):
        open_source(str(tmp_path / "a"))


def test_a_source_without_read_permission_is_unreadable(
    public_folder: Path, as_nobody: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    path = public_folder / "a.img"
    path.write_bytes(b"private")
    path.chmod(0)
    with as_nobody(), pytest.raises(ImageError, match=r"cannot read .*a\.img: Permission denied"):
        open_source(str(path))


def test_a_device_without_a_medium_is_no_source(
    make_image: MakeImage, loop_device: LoopDevice, need_tool: Callable[[str], str]
) -> None:
    device = loop_device(make_image("a.img", MIB))
    subprocess.run([need_tool("losetup"), "--detach", device], check=True)
    with pytest.raises(ImageError, match="no medium"):
        open_source(device)


def test_several_may_read_one_source(make_image: MakeImage) -> None:
    path = str(make_image("a.img", MIB))
    with open_source(path), open_source(path):
        pass


# What is no image, both ways


@both_ways
def test_a_folder_is_no_image(tmp_path: Path, open_it: Callable[[Path], Image]) -> None:
    with pytest.raises(UsageError, match="is a folder: an image must be a file or a block device"):
        open_it(tmp_path)


@both_ways
def test_a_fifo_is_no_image_and_nobody_waits_at_it(
    tmp_path: Path, never_blocks: None, open_it: Callable[[Path], Image]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is a FIFO"):
        open_it(tmp_path / "fifo")


@both_ways
def test_a_socket_is_no_image(public_folder: Path, open_it: Callable[[Path], Image]) -> None:
    # In a folder with a short name: a socket's path has 107 bytes.
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(public_folder / "socket"))
        with pytest.raises(UsageError, match="is a socket"):
            open_it(public_folder / "socket")


@both_ways
@pytest.mark.parametrize("device", ["/dev/full", "/dev/null", "/dev/zero", "/dev/tty"])
def test_a_character_device_is_no_image(device: str, open_it: Callable[[str], Image], never_blocks: None) -> None:
    if not os.path.exists(device):
        pytest.skip(f"no {device} here")
    with pytest.raises(UsageError, match="is a character device"):
        open_it(device)


@both_ways
@pytest.mark.parametrize("path", ["a\0b", "\ud800", ""])
def test_what_cannot_be_a_path_is_a_wrong_argument(path: str, open_it: Callable[[str], Image]) -> None:
    with pytest.raises(UsageError):
        open_it(path)


@both_ways
def test_a_name_that_is_too_long_is_a_wrong_argument(tmp_path: Path, open_it: Callable[[Path], Image]) -> None:
    with pytest.raises(UsageError, match="too long"):
        open_it(tmp_path / ("x" * 300))


@both_ways
def test_a_name_cannot_write_to_the_terminal(tmp_path: Path, open_it: Callable[[Path], Image]) -> None:
    folder = tmp_path / "\x1b[31mred\n"
    folder.mkdir()
    with pytest.raises(UsageError) as caught:
        open_it(folder)
    assert str(caught.value).isprintable()


# Targets that are files


@pytest.mark.parametrize("size", SIZES)
def test_a_missing_target_is_made_sparse_and_private(tmp_path: Path, size: int) -> None:
    path = tmp_path / "b.img"
    with open_target(str(path), size=size) as image:
        assert (image.size, image.kind, image.created) == (size, "file", True)
        assert allocated_bytes(image.fd) == 0
        assert path.stat().st_ino == os.fstat(image.fd).st_ino
        assert path.stat().st_mode & 0o777 == 0o600
        os.pwrite(image.fd, b"x", 0)
        assert not os.get_inheritable(image.fd)
    assert path.stat().st_size == max(size, 1)
    assert os.listdir(tmp_path) == ["b.img"]


def test_a_huge_target_takes_no_space(tmp_path: Path) -> None:
    try:
        with open_target(str(tmp_path / "b.img"), size=15 << 40) as image:
            assert allocated_bytes(image.fd) == 0
    except ImageError as error:
        if "File too large" not in str(error):
            raise
        pytest.skip("this file system has no files of 15 TiB")


def test_a_target_in_the_working_folder_needs_no_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_target("b.img", size=1) as image:
        assert image.created
    assert (tmp_path / "b.img").stat().st_size == 1


@pytest.mark.parametrize("size", SIZES)
def test_a_target_of_the_right_size_is_opened_as_it_is(make_image: MakeImage, size: int) -> None:
    path = make_image("b.img", size, {0: b"old"[:size]})
    before = content(path)
    with open_target(str(path), size=size) as image:
        assert (image.size, image.created) == (size, False)
    assert content(path) == before


@pytest.mark.parametrize("found", [0, 1, 4095, 4097, MIB])
def test_a_target_of_another_size_is_refused_naming_both(make_image: MakeImage, found: int) -> None:
    path = make_image("b.img", found, {0: b"old"[:found]})
    before = content(path)
    with pytest.raises(RefusedError) as caught:
        open_target(str(path), size=4096)
    assert re.search(rf"\b{found} byte", str(caught.value))
    assert "4096 bytes" in str(caught.value)
    assert "--resize" in str(caught.value)
    assert content(path) == before


@pytest.mark.parametrize("found", SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_resize_gives_a_target_the_size_and_keeps_what_fits(make_image: MakeImage, found: int, size: int) -> None:
    path = make_image("b.img", found, {0: b"x" * found})
    with open_target(str(path), size=size, resize=True) as image:
        assert image.size == size
        assert not image.created
    assert path.read_bytes() == (b"x" * found)[:size].ljust(size, b"\0")


def test_a_missing_target_stays_missing_when_none_may_be_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_target(str(tmp_path / "b.img"), size=1, create=False)
    assert os.listdir(tmp_path) == []


def test_a_target_in_a_missing_folder_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot create .*b\.img: its folder does not exist"):
        open_target(str(tmp_path / "none" / "b.img"), size=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["b.img/", "folder/../b.img/"])
def test_a_target_that_ends_in_a_slash_is_a_wrong_argument(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError):
        open_target(f"{tmp_path}/{name}", size=1)
    assert os.listdir(tmp_path) == ["folder"]


def test_nothing_is_made_through_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "b.img").symlink_to(tmp_path / "elsewhere.img")
    with pytest.raises(UsageError, match="symbolic link that leads nowhere"):
        open_target(str(tmp_path / "b.img"), size=1)
    assert os.listdir(tmp_path) == ["b.img"]


@pytest.mark.parametrize("size", [-1, 2**63, 2**70])
def test_a_size_that_no_file_can_have_is_a_wrong_argument(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="sizes go from 0"):
        open_target(str(tmp_path / "b.img"), size=size)
    assert os.listdir(tmp_path) == []


def test_a_file_that_others_made_meanwhile_is_opened_and_not_replaced(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: str, size: int, opener: newfile.Opener) -> int:
        make_image("b.img", 4096, {0: b"theirs"})
        return newfile.create(path, size, opener)

    monkeypatch.setattr("mirrorpair.image.create_file", late)
    with open_target(str(tmp_path / "b.img"), size=4096) as image:
        assert not image.created
        assert os.pread(image.fd, 6, 0) == b"theirs"
    assert os.listdir(tmp_path) == ["b.img"]


# Targets that cannot be written, or are in use


def test_a_target_without_write_permission_is_refused(
    public_folder: Path, as_nobody: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    path = public_folder / "b.img"
    path.write_bytes(b"old")
    path.chmod(0o444)
    before = content(path)
    with as_nobody(), pytest.raises(RefusedError, match=r"b\.img cannot be written: Permission denied"):
        open_target(str(path), size=3)
    assert content(path) == before


def test_a_folder_without_write_permission_gets_no_new_file(
    public_folder: Path, as_nobody: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    public_folder.chmod(0o555)
    with as_nobody(), pytest.raises(RefusedError, match="Permission denied"):
        open_target(str(public_folder / "b.img"), size=3)
    assert os.listdir(public_folder) == []


def test_a_folder_that_may_be_written_but_not_read_gets_a_new_file(
    public_folder: Path, as_nobody: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    public_folder.chmod(0o333)
    try:
        with as_nobody(), open_target(str(public_folder / "b.img"), size=3) as image:
            assert image.created
        assert (public_folder / "b.img").stat().st_size == 3
    finally:
        public_folder.chmod(0o755)


def test_an_immutable_target_is_refused(make_image: MakeImage, root: None, need_tool: Callable[[str], str]) -> None:
    chattr = need_tool("chattr")
    path = make_image("b.img", 3, {0: b"old"})
    made = subprocess.run([chattr, "+i", str(path)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this file system has no immutable files: {made.stderr.strip()}")
    try:
        with pytest.raises(RefusedError, match="cannot be written: Operation not permitted"):
            open_target(str(path), size=3)
    finally:
        subprocess.run([chattr, "-i", str(path)], check=True)
    assert path.read_bytes() == b"old"


def test_a_target_on_a_read_only_file_system_is_refused(mount: Mount, need_tool: Callable[[str], str]) -> None:
    folder = mount("size=1m")
    (folder / "b.img").write_bytes(b"old")
    subprocess.run([need_tool("mount"), "-o", "remount,ro", str(folder)], check=True)
    for name in ("b.img", "new.img"):
        with pytest.raises(RefusedError, match="cannot be written: Read-only file system"):
            open_target(str(folder / name), size=3)
    assert os.listdir(folder) == ["b.img"]


def test_a_target_that_another_writes_is_refused_to_all(make_image: MakeImage) -> None:
    path = make_image("b.img", 4096, {0: b"old"})
    with open_target(str(path), size=4096):
        before = content(path)
        with pytest.raises(RefusedError, match="in use by another mirrorpair or a virtual machine"):
            open_target(str(path), size=8192, resize=True)
        with pytest.raises(RefusedError, match="being written by another mirrorpair"):
            open_source(str(path))
        assert content(path) == before
    with open_target(str(path), size=4096):
        pass


def test_a_new_target_is_locked_from_its_first_moment(tmp_path: Path) -> None:
    path = str(tmp_path / "b.img")
    with open_target(path, size=1), pytest.raises(RefusedError, match="in use"):
        open_target(path, size=1)


def test_a_source_that_another_reads_is_no_target(make_image: MakeImage) -> None:
    path = str(make_image("a.img", 1))
    with open_source(path), pytest.raises(RefusedError, match="in use"):
        open_target(path, size=1)


def test_a_target_that_qemu_holds_is_refused(make_image: MakeImage, need_tool: Callable[[str], str]) -> None:
    path = make_image("b.img", MIB)
    command = [need_tool("qemu-io"), "-f", "raw", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as machine:
        assert machine.stdin is not None
        assert machine.stdout is not None
        # Its answer to a command comes after it opened, and so locked, the image.
        machine.stdin.write("length\n")
        machine.stdin.flush()
        assert "MiB" in machine.stdout.readline()
        try:
            with pytest.raises(RefusedError, match="or a virtual machine"):
                open_target(str(path), size=MIB)
        finally:
            machine.stdin.write("quit\n")
            machine.stdin.flush()
            machine.communicate(timeout=30)
    with open_target(str(path), size=MIB):
        pass


def test_a_file_under_a_loop_device_is_no_target(make_image: MakeImage, loop_device: LoopDevice) -> None:
    path = make_image("b.img", MIB, {0: b"old"})
    device = loop_device(path)
    before = content(path)
    with pytest.raises(RefusedError, match=f"{device} stands on it"):
        open_target(str(path), size=2 * MIB, resize=True)
    assert content(path) == before
    with open_source(str(path)):
        pass


def test_a_target_that_was_removed_meanwhile_is_not_written(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image("b.img", 4096)

    def late(fd: int, exclusive: bool) -> None:
        path.unlink()
        ofd_lock(fd, exclusive)

    monkeypatch.setattr("mirrorpair.image.ofd_lock", late)
    with pytest.raises(ImageError, match="removed while it was being opened"):
        open_target(str(path), size=4096)


def test_a_path_that_changes_between_look_and_open_leads_nowhere_else(
    make_image: MakeImage, tmp_path: Path, never_blocks: None
) -> None:
    path, fifo = make_image("a.img", 4096, {0: b"first"}), tmp_path / "fifo"
    os.mkfifo(fifo)

    def swap(name: str, flags: int, mode: int) -> int:
        fd = os.open(name, flags, mode)
        if flags & os.O_PATH:
            fifo.replace(path)
        return fd

    with open_source(str(path), opener=swap) as image:
        assert os.pread(image.fd, 5, 0) == b"first"


def test_a_resize_without_space_is_an_error_that_changes_nothing(
    mount: Mount, make_image: MakeImage, loop_device: LoopDevice, need_tool: Callable[[str], str]
) -> None:
    disk = make_image("disk.img", 8 * MIB)
    subprocess.run([need_tool("mkfs.ext4"), "-q", "-b", "1024", str(disk)], check=True)
    path = mount(kind="ext4", device=loop_device(disk)) / "b.img"
    path.write_bytes(b"old")
    before = content(path)
    with pytest.raises(ImageError, match="File too large"):
        open_target(str(path), size=5 << 40, resize=True)
    assert content(path) == before


@pytest.mark.parametrize(("error", "works"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_source_needs_no_lock_where_there_are_none(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, error: int, works: bool
) -> None:
    def fail(fd: int, exclusive: bool) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("mirrorpair.image.ofd_lock", fail)
    path = str(make_image("a.img", 1))
    if works:
        open_source(path).close()
        with pytest.raises(RefusedError, match="cannot be locked"):
            open_target(path, size=1)
    else:
        with pytest.raises(ImageError, match="Input/output error"):
            open_source(path)


# Devices


def test_a_larger_device_keeps_its_size(make_image: MakeImage, loop_device: LoopDevice) -> None:
    with open_target(loop_device(make_image("b.img", 2 * MIB)), size=MIB) as image:
        assert (image.size, image.kind, image.created) == (2 * MIB, "device", False)
        assert allocated_bytes(image.fd) == 2 * MIB


@pytest.mark.parametrize("resize", [False, True])
def test_a_smaller_device_is_refused(make_image: MakeImage, loop_device: LoopDevice, resize: bool) -> None:
    with pytest.raises(RefusedError, match=r"too small: it has 1048576 bytes .*, 1048577 bytes .* are needed"):
        open_target(loop_device(make_image("b.img", MIB)), size=MIB + 1, resize=resize)


def test_a_mounted_device_is_refused(
    mount: Mount, make_image: MakeImage, loop_device: LoopDevice, need_tool: Callable[[str], str]
) -> None:
    disk = make_image("disk.img", 8 * MIB)
    subprocess.run([need_tool("mkfs.ext4"), "-q", str(disk)], check=True)
    device = loop_device(disk)
    folder = mount(kind="ext4", device=device)
    with pytest.raises(RefusedError, match="mounted or in use"):
        open_target(device, size=MIB)
    (folder / "still").write_bytes(b"works")


def test_a_device_that_another_claimed_is_refused(make_image: MakeImage, loop_device: LoopDevice) -> None:
    device = loop_device(make_image("b.img", MIB))
    with open_target(device, size=MIB), pytest.raises(RefusedError, match="in use"):
        open_target(device, size=MIB)


def test_a_device_under_a_loop_device_is_no_target(make_image: MakeImage, loop_device: LoopDevice) -> None:
    lower = loop_device(make_image("b.img", MIB))
    upper = loop_device(lower)
    with pytest.raises(RefusedError, match=f"{upper} stands on it|in use"):
        open_target(lower, size=MIB)


def test_a_read_only_device_is_refused(make_image: MakeImage, loop_device: LoopDevice) -> None:
    with pytest.raises(RefusedError, match="cannot be written"):
        open_target(loop_device(make_image("b.img", MIB), read_only=True), size=MIB)


# The same image twice


def test_the_source_is_never_the_target_by_any_name(make_image: MakeImage, tmp_path: Path) -> None:
    path = make_image("a.img", 4096, {0: b"data"})
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "soft").symlink_to(path)
    before = content(path)
    with open_source(str(path)) as source:
        for name in ("a.img", "hard", "soft", "../" + tmp_path.name + "/a.img"):
            with pytest.raises(UsageError, match="are the same image"):
                open_target(str(tmp_path / name), size=8192, resize=True, source=source)
    assert content(path) == before


def test_a_loop_device_and_its_file_are_one_image_either_way(make_image: MakeImage, loop_device: LoopDevice) -> None:
    path = str(make_image("a.img", MIB))
    device = loop_device(path)
    for first, second in ((path, device), (device, path)):
        with open_source(first) as source:
            with pytest.raises(UsageError, match="are the same image"):
                open_target(second, size=MIB, source=source)
            with open_source(second) as other:
                assert same_image(source, other)
                assert same_image(other, source)


def test_two_images_are_told_apart(make_image: MakeImage, loop_device: LoopDevice) -> None:
    one, other = make_image("a.img", MIB), make_image("b.img", MIB)
    with open_source(str(one)) as source, open_target(str(other), size=MIB, source=source) as target:
        assert not same_image(source, target)
        assert same_image(source, source)
    with open_source(loop_device(one)) as source, open_source(loop_device(other)) as second:
        assert not same_image(source, second)


# An opener that stays in a folder


@pytest.fixture
def beneath(tmp_path: Path) -> Iterator[Callable[[str, int, int], int]]:
    """What `serve` uses: paths count from the folder `inside`."""
    (tmp_path / "inside").mkdir()
    folder = os.open(tmp_path / "inside", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def opener(path: str, flags: int, mode: int) -> int:
        try:
            return openat2_beneath(folder, path.lstrip("/") or ".", flags, mode)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise NotAllowedError("outside") from None
            raise

    yield opener
    os.close(folder)


def test_an_opener_decides_what_is_opened_and_made(tmp_path: Path, beneath: newfile.Opener) -> None:
    with open_target("/b.img", size=4096, opener=beneath) as image:
        assert image.created
    with open_target("/b.img", size=4096, opener=beneath) as image:
        assert not image.created
    with open_source("/b.img", opener=beneath) as image:
        assert image.size == 4096
    assert os.listdir(tmp_path / "inside") == ["b.img"]


@pytest.mark.parametrize("name", ["../secret", "link", "link-to-folder/secret"])
def test_an_openers_refusal_reaches_the_caller(tmp_path: Path, beneath: newfile.Opener, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "inside" / "link").symlink_to("../secret")
    (tmp_path / "inside" / "link-to-folder").symlink_to("..")
    with pytest.raises(NotAllowedError):
        open_source(name, opener=beneath)
    with pytest.raises(NotAllowedError):
        open_target(name, size=100, resize=True, opener=beneath)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_an_opener_for_one_file_alone_can_make_it(tmp_path: Path) -> None:
    allowed = tmp_path / "b.img"

    def only(path: str, flags: int, mode: int) -> int:
        if path != str(allowed):
            raise NotAllowedError("outside")
        return os.open(path, flags, mode)

    with open_target(str(allowed), size=4096, opener=only) as image:
        assert image.created
        assert image.size == 4096
    with pytest.raises(MirrorpairError, match="outside"):
        open_target(str(tmp_path / "c.img"), size=1, opener=only)


# Allocation


def test_allocated_bytes_leave_holes_out(make_image: MakeImage) -> None:
    with open_source(str(make_image("a.img", 16 * MIB, {MIB: b"x" * 64 * KIB}))) as image:
        os.fsync(image.fd)
        assert 64 * KIB <= allocated_bytes(image.fd) < MIB
