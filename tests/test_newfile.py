"""A new image file comes whole or not at all, on every kind of file system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mirrorpair import newfile
from mirrorpair.errors import ImageError, RefusedError
from mirrorpair.image import open_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import LoopDevice, MakeImage, Mount

MIB = 1024 * 1024


@pytest.mark.parametrize("call", ["ftruncate", "linkat", "fsync"])
def test_a_kill_on_the_way_leaves_nothing_or_the_whole_file(
    tmp_path: Path, need_tool: Callable[[str], str], call: str
) -> None:
    script = "import sys; from mirrorpair.image import open_target; open_target(sys.argv[1], size=4097)"
    strace = [need_tool("strace"), "-f", "-o", str(tmp_path / "trace"), "-e", f"trace={call}"]
    strace += ["-e", f"inject={call}:signal=KILL"]
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "b.img"
    done = subprocess.run([*strace, sys.executable, "-c", script, str(path)], capture_output=True, check=False)
    if b"ptrace" in done.stderr:
        pytest.skip("nothing may be traced here")
    assert done.returncode != 0
    assert not path.exists() or path.stat().st_size == 4097
    with open_target(str(path), size=4097) as image:
        assert image.size == 4097


def test_a_file_system_without_inodes_gets_no_half_made_target(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("1m", "nr_inodes=2")
    (folder / "last").touch()
    with pytest.raises(ImageError, match="No space left on device"):
        open_target(str(folder / "b.img"), size=1)
    assert os.listdir(folder) == ["last"]


@pytest.mark.parametrize("whole", [True, False], ids=["by O_TMPFILE", "by name"])
def test_a_target_larger_than_any_file_here_leaves_nothing(
    mount: Mount,
    make_image: MakeImage,
    loop_device: LoopDevice,
    need_tool: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
) -> None:
    disk = make_image("disk.img", 8 * MIB)
    subprocess.run([need_tool("mkfs.ext4"), "-q", "-b", "1024", str(disk)], check=True)
    folder = mount(kind="ext4", device=loop_device(disk))
    if not whole:
        monkeypatch.setattr(newfile, "_create_whole", lambda *_: None)
    before = sorted(os.listdir(folder))
    with pytest.raises(ImageError, match="File too large"):
        open_target(str(folder / "b.img"), size=5 << 40)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("failing", ["ftruncate", "fsync"])
@pytest.mark.parametrize("whole", [True, False], ids=["by O_TMPFILE", "by name"])
def test_a_new_target_that_fails_on_the_way_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, whole: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if not whole:
        monkeypatch.setattr(newfile, "_create_whole", lambda *_: None)
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(ImageError, match="Input/output error"):
        open_target(str(tmp_path / "b.img"), size=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EAGAIN])
def test_a_new_target_that_cannot_be_locked_is_taken_back_unless_another_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fail(fd: int, exclusive: bool) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(newfile, "_create_whole", lambda *_: None)
    monkeypatch.setattr(newfile, "ofd_lock", fail)
    with pytest.raises(RefusedError):
        open_target(str(tmp_path / "b.img"), size=1)
    assert os.listdir(tmp_path) == ([] if error == errno.ENOLCK else ["b.img"])


def test_a_file_system_without_nameless_files_gets_a_new_target_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with open_target(str(tmp_path / "b.img"), size=4097) as image:
        assert image.created
        with pytest.raises(RefusedError, match="in use"):
            open_target(str(tmp_path / "b.img"), size=4097)
    assert (tmp_path / "b.img").stat().st_size == 4097
