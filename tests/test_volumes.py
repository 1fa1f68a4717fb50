"""What a node finds when it opens what an earlier life left half done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from farside import run_cli
from pairfile import read_pair, write_pair

from mirrorpair.errors import RefusedError
from mirrorpair.history import Ids
from mirrorpair.volumes import finish_target, open_all

if TYPE_CHECKING:
    from pathlib import Path

    from mirrorpair.volumes import OpenNode

PAIR, OTHER = "11" * 16, "22" * 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = write_pair(tmp_path, {"data": "1MiB", "more": "1MiB"})
    done = run_cli("-c", path, "--node", "alpha", "init")
    assert done.returncode == 0, done.stderr
    return tmp_path


def opened(folder: Path) -> OpenNode:
    config = read_pair(folder)
    return open_all(config, config.node("alpha"))


@pytest.mark.parametrize("written", [1, 2])
def test_m10_a_first_meeting_that_was_cut_short_is_completed(folder: Path, written: int) -> None:
    node = opened(folder)
    for volume in node.volumes[:written]:
        volume.meta.update(pair_uuid=PAIR)
    node.close()
    for _ in range(2):
        node = opened(folder)
        assert node.value.pair_uuid == PAIR
        assert [volume.block.pair_uuid for volume in node.volumes] == [PAIR, PAIR]
        assert [volume.distrust for volume in node.volumes] == [None, None]
        node.close()


def test_m10_before_the_first_meeting_there_is_no_uuid(folder: Path) -> None:
    node = opened(folder)
    assert node.value.pair_uuid == ""
    node.close()


def test_m1_metadata_of_two_pairs_are_refused(folder: Path) -> None:
    node = opened(folder)
    for volume, pair in zip(node.volumes, (PAIR, OTHER), strict=True):
        volume.meta.update(pair_uuid=pair)
    node.close()
    with pytest.raises(RefusedError, match="different pairs"):
        opened(folder)


def test_f15_a_volume_from_an_older_copy_stays_distrusted_until_everything_was_copied(folder: Path) -> None:
    """Whatever is written meanwhile: a new epoch would take away what told the copy's age."""
    node = opened(folder)
    node.file.update(epoch=5)
    node.volumes[1].meta.update(epoch=5)
    node.close()
    for epoch in (5, 6, 7):
        node = opened(folder)
        assert node.volumes[0].distrust is not None
        assert node.volumes[1].distrust is None
        node.started(settled=True)
        node.met(PAIR)
        node.learned(epoch=epoch, version=epoch, role="secondary", settled=True)
        node.close()
    node = opened(folder)
    assert "older" in (node.volumes[0].obstacle() or "")
    finish_target(node.volumes[0], Ids(current=9))
    assert node.volumes[0].obstacle() is None
    node.close()
    node = opened(folder)
    assert [volume.distrust for volume in node.volumes] == [None, None]
    node.close()
