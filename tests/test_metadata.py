"""Node file and volume metadata: layout, whose they are, what is said of damage; M1, M2, M7, M9, M10, F10, F15."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mirrorpair import metadata
from mirrorpair.errors import ImageError, MirrorpairError, RefusedError, UsageError
from mirrorpair.history import HISTORY_IDS, MAX_ID, Ids, began_alone, first
from mirrorpair.identity import Identity
from mirrorpair.metadata import (
    BITMAP_OFFSET,
    LOG_OFFSET,
    LOG_RECORD_BYTES,
    LOG_RECORDS,
    NodeFile,
    Superblock,
    bitmap_bytes,
    check,
    check_owner,
    create_node,
    create_volume,
    dump,
    empty_record,
    metadata_bytes,
    newest_record,
    node_path,
    open_node,
    open_volume,
    parse_record,
    rolled_back,
    volume_path,
)
from mirrorpair.twofold import COPY_BYTES, pack

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
BLOCK = 64 * KIB


@pytest.fixture(autouse=True)
def no_descriptor_leaks(open_descriptors: Callable[[], set[int]]) -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def superblock(**facts: Any) -> Superblock:
    given: dict[str, Any] = {"size": 100 * MIB + 512, "block_size": BLOCK}
    image = Identity(kind="file", inode=7, born_ns=5)
    given |= {"pair": "shop", "node": "alpha", "volume": "data", "identity": image}
    return Superblock(**(given | facts))


def node_file(**facts: Any) -> NodeFile:
    return NodeFile(pair="shop", node="alpha", incarnation_id="ab" * 16, **facts)


@pytest.fixture
def volume(tmp_path: Path) -> str:
    path = volume_path(str(tmp_path), "data")
    create_volume(path, superblock()).close()
    return path


@pytest.fixture
def node(tmp_path: Path) -> str:
    path = node_path(str(tmp_path))
    create_node(path, node_file()).close()
    return path


def overwrite(path: str, data: bytes, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def spoil_both_copies(path: str) -> None:
    overwrite(path, b"x", 50)
    overwrite(path, b"x", COPY_BYTES + 50)


def record(sequence: int, extents: list[int]) -> bytes:
    """As the C journal writes it."""
    data = bytearray(LOG_RECORD_BYTES)
    data[:8] = b"MPRACTLG"
    data[8:16] = sequence.to_bytes(8, "little")
    data[16:20] = len(extents).to_bytes(4, "little")
    for slot, extent in enumerate(extents):
        data[64 + 8 * slot : 68 + 8 * slot] = (extent + 1).to_bytes(4, "little")  # free slots between
    data[24:40] = metadata.digest128(data)
    return bytes(data)


def put_record(path: str, sequence: int, extents: list[int]) -> None:
    overwrite(path, record(sequence, extents), LOG_OFFSET + sequence % LOG_RECORDS * LOG_RECORD_BYTES)


# --- layout


@pytest.mark.parametrize(
    ("size", "block", "expected"),
    [
        (1, 64 * KIB, 4 * KIB),
        (64 * 64 * KIB * 512, 64 * KIB, 4 * KIB),
        (64 * 64 * KIB * 512 + 1, 64 * KIB, 8 * KIB),
        (TIB, 64 * KIB, 2 * MIB),
        (8 * TIB, 64 * KIB, 16 * MIB),
        (TIB, 4 * KIB, 32 * MIB),
    ],
)
def test_the_bitmap_has_a_bit_for_each_block_in_whole_pages(size: int, block: int, expected: int) -> None:
    assert bitmap_bytes(size, block) == expected
    assert metadata_bytes(size, block) == 64 * KIB + expected


def test_a_new_volume_is_reserved_clean_and_has_an_empty_log(volume: str) -> None:
    with open(volume, "rb") as file:
        data = file.read()
    assert len(data) == metadata_bytes(100 * MIB + 512, BLOCK)
    assert os.stat(volume).st_blocks * 512 >= len(data)
    assert data[:8] == b"MPRSUPER"
    assert data[LOG_OFFSET : LOG_OFFSET + LOG_RECORD_BYTES] == empty_record()
    assert not any(data[LOG_OFFSET + LOG_RECORD_BYTES :])
    found = check(volume)
    assert (found.good, found.usable, found.problems, found.dirty_blocks) == (True, True, (), 0)
    assert (found.active_extents, found.log_lost) == ((), False)  # M7


def test_m10_a_new_volume_has_no_uuids_and_no_generation(volume: str) -> None:
    with open_volume(volume) as stored:
        assert (stored.value.pair_uuid, stored.value.volume_uuid) == ("", "")
        assert stored.value.new
        assert not stored.update(ids=first(9)).new


def test_the_longest_values_still_fit() -> None:
    """A superblock that could not be written would be found out at the worst moment."""
    ids = Ids(MAX_ID, MAX_ID - 1, tuple(MAX_ID - 2 - one for one in range(HISTORY_IDS)))
    biggest = superblock(
        size=2**63 - 1,
        block_size=BLOCK,
        ids=ids,
        disk="inconsistent",
        peer_disk="inconsistent",
        epoch=2**63 - 1,
        incarnation=2**63 - 1,
        full_id=2**64 - 1,
        verify_cursor=2**63 - 1,
        pair_uuid="f" * 64,
        volume_uuid="f" * 64,
        boot_id="f" * 64,
    )
    name = '"' * 255  # each becomes two bytes
    image = Identity(kind="device", inode=2**64 - 1, born_ns=2**63, id='"' * 256)
    biggest = msgspec.structs.replace(biggest, pair=name, node=name, volume=name, identity=image)
    assert pack(metadata.SUPERBLOCK, 0, biggest)
    with pytest.raises(ValueError, match="a name is"):
        superblock(boot_id="", node="\u20ac" * 86)


@pytest.mark.parametrize(
    "facts",
    [
        {"size": -1},
        {"size": 2**63},
        {"block_size": 0},
        {"extent_blocks": 32},
        {"epoch": -1},
        {"full_id": -1},
        {"full_id": 2**64},
        {"verify_cursor": -1},
        {"pair_uuid": "x" * 65},
        {"boot_id": "a\nb"},
    ],
)
def test_a_superblock_out_of_range_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"out of range|at most"):
        superblock(**facts)


@pytest.mark.parametrize("facts", [{"epoch": -1}, {"position": -1}, {"pair_uuid": "x" * 65}, {"promise_ns": 2**63}])
def test_a_node_file_out_of_range_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"out of range|at most"):
        node_file(**facts)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="a name is"):
        NodeFile(pair="", node="alpha", incarnation_id="")


# --- what is written lasts


def test_everything_is_there_after_a_restart(volume: str, node: str) -> None:
    with open_volume(volume) as stored:
        stored.write(superblock(ids=began_alone(first(MAX_ID), 5), disk="inconsistent", clean=False, discard=True))
        kept = stored.value
    with open_node(node) as opened:
        opened.update(epoch=7, role="primary", clean=False, boot_id="here", promise_ns=3 * 10**9)
        told = opened.value
    with open_volume(volume) as stored, open_node(node) as opened:
        assert stored.value == kept
        assert stored.value.inconsistent
        assert opened.value == told


def test_the_journal_uses_the_same_descriptor_and_its_regions_are_left_alone(volume: str) -> None:
    with open_volume(volume) as stored:
        os.pwrite(stored.fd, b"\xff" * 8, BITMAP_OFFSET)
        os.pwrite(stored.fd, record(1, [3]), LOG_OFFSET + LOG_RECORD_BYTES)
        for epoch in range(1, 5):
            stored.update(epoch=epoch)
    found = check(volume)
    assert (found.dirty_blocks, found.active_extents, found.good) == (64, (3,), True)


def test_m9_a_crash_as_primary_and_a_lost_boot_follow_from_the_node_file() -> None:
    assert not node_file(role="primary", clean=True).crashed_primary
    assert node_file(role="primary", clean=False).crashed_primary
    assert not node_file(role="secondary", clean=False).crashed_primary
    assert node_file(clean=False, boot_id="one").boot_lost("two")
    assert not node_file(clean=False, boot_id="one").boot_lost("one")
    assert not node_file(clean=True, boot_id="one").boot_lost("two")


def test_two_daemons_of_one_node_are_refused(volume: str, node: str) -> None:
    with open_volume(volume), open_node(node):
        for again in (lambda: open_volume(volume), lambda: open_node(node)):
            with pytest.raises(RefusedError, match="in use") as caught:
                again()
            assert caught.value.exit_code == 12


def test_init_before_anything_else(tmp_path: Path) -> None:
    for again in (lambda: open_volume(str(tmp_path / "a.meta")), lambda: check(str(tmp_path / "node"))):
        with pytest.raises(UsageError, match="mirrorpair init"):
            again()


def test_nothing_is_overwritten_unless_it_is_said(volume: str, node: str) -> None:
    with pytest.raises(RefusedError):
        create_volume(volume, superblock())
    with pytest.raises(RefusedError):
        create_node(node, node_file())
    overwrite(volume, b"\xff" * 100, BITMAP_OFFSET)
    create_volume(volume, superblock(), force=True).close()
    assert check(volume).dirty_blocks == 0


def test_f10_without_space_nothing_is_left(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("1m")
    with pytest.raises(ImageError, match="no space"):
        create_volume(volume_path(str(folder), "data"), superblock(size=8 * TIB))
    assert os.listdir(folder) == []


# --- whose it is


OURS: dict[str, Any] = {"pair": "shop", "node": "alpha", "volume": "data", "size": 100 * MIB + 512, "block_size": BLOCK}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pair": "bank"}, "pair bank"),
        ({"node": "beta"}, "node beta"),
        ({"volume": "logs"}, "volume data, not of logs"),
        ({"size": MIB}, r"size of 104858112 bytes, the configuration says 1048576"),
        ({"block_size": 4096}, "block size"),
        ({"pair_uuid": "other"}, "another pair of this name"),
    ],
)
def test_m1_metadata_of_another_pair_node_volume_or_size_are_refused(change: dict[str, Any], said: str) -> None:
    value = superblock(pair_uuid="mine")
    check_owner(value, **OURS)
    check_owner(value, **OURS, pair_uuid="mine")
    with pytest.raises(RefusedError, match=said):
        check_owner(value, **(OURS | change))


def test_m10_an_empty_uuid_fits_every_pair() -> None:
    check_owner(superblock(), **OURS, pair_uuid="mine")
    check_owner(node_file(), pair="shop", node="alpha", pair_uuid="mine")
    with pytest.raises(RefusedError, match="node alpha"):
        check_owner(node_file(), pair="shop", node="beta")


def test_f15_a_superblock_that_knows_less_than_its_node_is_from_an_older_copy() -> None:
    node = node_file(epoch=5, pair_uuid="mine")
    assert rolled_back(superblock(epoch=5, pair_uuid="mine"), node) is None
    assert rolled_back(superblock(epoch=6, pair_uuid="mine"), node) is None  # killed before the node file
    assert "epoch 4" in (rolled_back(superblock(epoch=4, pair_uuid="mine"), node) or "")
    assert "first met" in (rolled_back(superblock(epoch=5), node) or "")
    assert "copied" in (rolled_back(superblock(epoch=5, pair_uuid="mine", distrusted=True), node) or "")


# --- the activity log, as far as Python reads it


def test_a_record_of_the_journal_is_read() -> None:
    found = parse_record(2, record(6, [9, 4, 2**32 - 2]))
    assert (found.state, found.sequence, found.extents) == ("good", 6, (4, 9, 2**32 - 2))


def test_any_flipped_bit_makes_a_record_invalid(rng: random.Random) -> None:
    data = bytearray(record(1, [1, 2]))
    for bit in [*range(70 * 8), *rng.sample(range(len(data) * 8), 2000)]:
        data[bit // 8] ^= 1 << bit % 8
        assert parse_record(1, bytes(data)).state == "bad"
        data[bit // 8] ^= 1 << bit % 8
    assert parse_record(1, bytes(data)).state == "good"


def test_a_record_in_the_wrong_place_or_cut_off_is_invalid() -> None:
    assert parse_record(0, record(1, [])).state == "bad"
    assert parse_record(1, record(1, [])[:-1]).state == "bad"
    assert parse_record(3, bytes(LOG_RECORD_BYTES)).state == "empty"
    miscounted = bytearray(record(1, [1]))
    miscounted[16] = 2
    miscounted[24:40] = bytes(16)
    miscounted[24:40] = metadata.digest128(miscounted)
    assert parse_record(1, bytes(miscounted)).state == "bad"


@pytest.mark.parametrize(
    ("states", "newest"),
    [
        ("0...", 0),
        ("01..", 1),
        ("4123", 4),
        ("4x23", 4),  # the record behind the newest is torn
        ("4xx3", None),  # two are lost: a whole one may have been among them
        ("x123", 3),
        ("x12x", None),
        ("....", None),
        ("xxxx", None),
        ("0x..", 0),
        ("0.x.", 0),
        ("0xx.", None),
        (".1..", 1),
    ],
)
def test_m7_the_record_that_counts(states: str, newest: int | None) -> None:
    special = {".": bytes(LOG_RECORD_BYTES), "x": b"x" * LOG_RECORD_BYTES}
    content = [special[state] if state in special else record(int(state), []) for state in states]
    found = newest_record([parse_record(place, data) for place, data in enumerate(content)])
    assert (found.sequence if found else None) == newest


# --- check and dump


def test_check_and_dump_work_beside_the_daemon(volume: str, node: str) -> None:
    with open_volume(volume) as stored, open_node(node) as opened:
        stored.update(epoch=3)
        opened.update(epoch=3)
        assert dump(volume).value == stored.value
        assert dump(node).value == opened.value
        assert check(volume).good
        assert check(node).good


def test_dirty_blocks_and_active_extents_are_counted(volume: str) -> None:
    overwrite(volume, b"\x05\x80", BITMAP_OFFSET)
    overwrite(volume, b"\x01", BITMAP_OFFSET + 1600 // 8)  # block 1600, the last one, of 512 bytes
    put_record(volume, 1, [0, 24])
    found = check(volume)
    assert (found.dirty_blocks, found.active_extents, found.good) == (4, (0, 24), True)
    overwrite(volume, b"\x02", BITMAP_OFFSET + 1600 // 8)
    assert "behind the last block" in check(volume).problems[0]


def test_one_bad_copy_is_told_and_costs_nothing(volume: str, node: str) -> None:
    for path in (volume, node):
        overwrite(path, b"x", 50)
        found = check(path)
        assert (found.good, found.usable, found.value is None) == (False, True, False)
        assert "copy A" in found.problems[0]
        assert found.recoverable.startswith("nothing is lost")


def test_m2_both_copies_bad_is_refused_and_check_says_what_can_be_saved(volume: str, node: str) -> None:
    for path, opening in ((volume, open_volume), (node, open_node)):
        spoil_both_copies(path)
        with pytest.raises(RefusedError, match="meta check"):
            opening(path)
        found = check(path)
        assert (found.good, found.usable, found.value) == (False, False, None)
        assert "init --force" in found.recoverable
        with pytest.raises(RefusedError, match="init --force"):
            dump(path)
    assert "--keep-data" in check(volume).recoverable


def test_m7_a_lost_log_is_told(volume: str) -> None:
    overwrite(volume, b"x", LOG_OFFSET + 100)
    found = check(volume)
    assert (found.log_lost, found.usable, found.good) == (True, True, False)
    assert "every block counts as different" in found.recoverable


def test_metadata_cut_off_anywhere_are_refused(volume: str, rng: random.Random) -> None:
    with open(volume, "rb") as file:
        whole = file.read()
    ends = {0, COPY_BYTES, LOG_OFFSET, LOG_OFFSET + LOG_RECORD_BYTES, BITMAP_OFFSET, len(whole)}
    lengths = (
        {end - 1 for end in ends} | {end + 1 for end in ends} | ends | {rng.randrange(len(whole)) for _ in range(60)}
    )
    for length in sorted(one for one in lengths if 0 <= one < len(whole)):
        os.truncate(volume, 0)
        overwrite(volume, whole[:length], 0)
        with pytest.raises(RefusedError):
            open_volume(volume)
        found = check(volume)
        assert not found.good
        assert not found.usable
        assert (found.value is None) == (length < COPY_BYTES)
        if found.value is not None:
            assert "the generation ids are whole" in found.recoverable


def test_whatever_a_file_holds_is_told_and_opening_never_crashes(volume: str, node: str, rng: random.Random) -> None:
    for path, opening in ((volume, open_volume), (node, open_node)):
        with open(path, "rb") as file:
            whole = file.read()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(rng.choice([len(data), min(len(data), 2 * COPY_BYTES), 400]))
                data[at : at + rng.choice([1, 16, 512, 4096])] = rng.randbytes(rng.choice([0, 1, 16, 512]))
            os.truncate(path, 0)
            overwrite(path, bytes(data), 0)
            found = check(path)
            assert found.recoverable
            try:
                with opening(path) as stored:
                    assert found.usable
                    assert stored.value == found.value == check(path).value
            except MirrorpairError:
                assert not found.usable


def test_a_file_of_another_kind_is_not_taken_for_ours(volume: str, node: str) -> None:
    with pytest.raises(RefusedError, match="does not begin like a superblock"):
        open_volume(node)
    with pytest.raises(RefusedError, match="does not begin like a node file"):
        open_node(volume)


def test_what_check_finds_can_be_shown_as_json(volume: str, node: str) -> None:
    for path in (volume, node):
        shown = msgspec.json.decode(msgspec.json.encode(check(path)))
        assert shown["good"] is True
        assert shown["value"]["pair"] == "shop"
