"""The demo's journal and its judgement: what a block may hold, and that nothing else passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mirrorpair.cli.demo import verdict as verdict_lines
from mirrorpair.demo.journal import BLOCK, ZEROS, Journal, Ledger, content, load, origin, payload
from mirrorpair.demo.readback import Wrong, lost, read_back, wrong_blocks
from mirrorpair.demo.report import ResultLine
from mirrorpair.errors import LocalError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

SEED = 11
SIZE = 256 * BLOCK


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal", SEED, SIZE) as made:
        yield made


def verdict(journal: Journal, block: int, data: bytes) -> list[Wrong]:
    bounds = journal.bounds(block, 1)
    return wrong_blocks(SEED, block, data, bounds, bounds)


class Volume:
    """An NBD client's face of a volume that is bytes."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def start_read(self, offset: int, length: int) -> Answer:
        return Answer(bytes(self.data[offset : offset + length]))


class Answer:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def wait(self) -> bytes:
        return self.data


# --- contents


def test_a_content_says_who_wrote_it_and_where() -> None:
    assert origin(SEED, 7, content(SEED, 3, 7)) == 3
    assert origin(SEED, 8, content(SEED, 3, 7)) is None
    assert origin(SEED + 1, 7, content(SEED, 3, 7)) is None
    assert origin(SEED, 7, ZEROS) == 0
    assert content(SEED, 0, 7) == ZEROS


def test_every_changed_byte_is_seen(rng: random.Random) -> None:
    whole = content(SEED, 3, 7)
    for at in [0, 8, 31, 32, BLOCK - 1, *(rng.randrange(BLOCK) for _ in range(200))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        assert origin(SEED, 7, bytes(damaged)) is None


@pytest.mark.parametrize("cut", [512, 1024, 2048, BLOCK - 512])
def test_a_torn_block_is_nobodys(cut: int) -> None:
    old, new = content(SEED, 3, 7), content(SEED, 4, 7)
    assert origin(SEED, 7, old[:cut] + new[cut:]) is None
    assert origin(SEED, 7, new[:cut] + ZEROS[cut:]) is None


# --- what a block may hold


def test_an_acknowledged_write_must_be_there(journal: Journal) -> None:
    number = journal.start(5, 2)
    assert verdict(journal, 5, ZEROS) == []  # it is on its way
    assert verdict(journal, 5, content(SEED, number, 5)) == []
    journal.acknowledge(number)
    assert verdict(journal, 5, content(SEED, number, 5)) == []
    assert verdict(journal, 6, ZEROS) == [Wrong(6, number, 0)]
    assert lost(verdict(journal, 6, ZEROS)) == {number}


def test_a_later_write_that_was_not_answered_allows_both_contents(journal: Journal) -> None:
    first, second = journal.start(5, 1), journal.start(5, 1)
    journal.acknowledge(first)
    for number in (first, second):
        assert verdict(journal, 5, content(SEED, number, 5)) == []
    assert verdict(journal, 5, ZEROS) != []
    third = journal.start(5, 1)
    journal.acknowledge(third)
    assert verdict(journal, 5, content(SEED, third, 5)) == []
    for number in (first, second):
        assert verdict(journal, 5, content(SEED, number, 5)) == [Wrong(5, third, number)]


def test_a_block_that_nobody_wrote_must_be_zeros(journal: Journal) -> None:
    journal.acknowledge(journal.start(5, 1))
    stray = verdict(journal, 9, content(SEED, 1, 9))
    assert stray == [Wrong(9, 0, 1)]
    assert lost(stray) == set()
    assert "no acknowledged write" in str(stray[0])


def test_beside_writers_a_read_may_be_as_old_as_when_it_was_asked_for_and_not_older(journal: Journal) -> None:
    numbers = [journal.start(5, 1), journal.start(5, 1)]
    journal.acknowledge(numbers[0])
    before = journal.bounds(5, 1)
    journal.acknowledge(numbers[1])
    numbers.append(journal.start(5, 1))
    journal.acknowledge(numbers[2])
    after = journal.bounds(5, 1)
    for number in numbers:
        assert wrong_blocks(SEED, 5, content(SEED, number, 5), before, after) == []
    assert wrong_blocks(SEED, 5, ZEROS, before, after) != []
    assert wrong_blocks(SEED, 5, content(SEED, numbers[1], 5), after, after) != []
    assert wrong_blocks(SEED, 5, content(SEED, numbers[2], 5), before, before) != []


def test_a_mark_counts_what_was_announced_after_it(journal: Journal) -> None:
    old = [journal.start(block, 1) for block in range(3)]
    assert journal.mark() == 3
    journal.acknowledge(old[0])
    assert journal.since_mark() == (0, 0)
    new = journal.start(7, 1)
    assert journal.since_mark() == (1, 0)
    journal.acknowledge(new)
    assert journal.since_mark() == (1, 1)
    assert journal.unanswered_until(3) == 2


# --- the file


def test_the_file_says_the_same_as_the_memory(journal: Journal, tmp_path: Path, rng: random.Random) -> None:
    flying: list[int] = []
    for _ in range(500):
        flying.append(journal.start(rng.randrange(250), rng.randrange(1, 6)))
        if rng.random() < 0.8:
            journal.acknowledge(flying.pop(rng.randrange(len(flying))))
    journal.flush()
    ledger = load(tmp_path / "journal")
    assert (ledger.seed, ledger.size, ledger.sent) == (SEED, SIZE, 500)
    assert (ledger.acknowledged, ledger.unanswered) == (journal.acknowledged, journal.unanswered)
    assert ledger.bounds(0, 256) == journal.bounds(0, 256)


HEAD = f"mirrorpair-demo-journal 1 seed 1 block {BLOCK} size {SIZE}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nonsense\n", 1),
        (HEAD.replace("journal 1", "journal 2"), 1),
        (HEAD.replace(str(BLOCK), "512"), 1),
        (HEAD + "done 1\n", 2),
        (HEAD + "sent 1 0 4096\nsent 1 0 4096\n", 3),
        (HEAD + "sent 1 0 4096\ndone 1\ndone 1\n", 4),
        (HEAD + "sent 1 0 100\n", 2),
        (HEAD + f"sent 1 {SIZE} 4096\n", 2),
        (HEAD + "sent 1 0\n", 2),
        (HEAD + "lost 1\n", 2),
        (HEAD + "\n", 2),
    ],
)
def test_what_is_no_journal_is_refused_by_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "journal"
    path.write_text(text)
    with pytest.raises(LocalError, match=f"line {line} "):
        load(path)


def test_an_empty_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    with pytest.raises(LocalError, match="empty"):
        load(tmp_path / "journal")


# --- reading back


def test_a_volume_is_read_back_whole(rng: random.Random) -> None:
    ledger, volume = Ledger(SEED, SIZE), Volume()
    for number in range(1, 300):
        first = rng.randrange(250)
        count = rng.randrange(1, 6)
        ledger.add(number, first, count)
        ledger.acknowledge(number)
        volume.data[first * BLOCK : (first + count) * BLOCK] = payload(SEED, number, first, count)
    assert read_back(volume, ledger) == []  # type: ignore[arg-type]
    for block in range(256):
        whole = bytes(volume.data)
        volume.data[block * BLOCK + rng.randrange(BLOCK)] ^= 1
        assert [one.block for one in read_back(volume, ledger)] == [block]  # type: ignore[arg-type]
        volume.data[:] = whole


# --- the verdict


def good() -> ResultLine:
    return ResultLine(
        problems=[],
        acknowledged_writes=10,
        lost_writes=0,
        images_identical=True,
        failover_s=1.0,
        resync_bytes=1,
        failback_s=1.0,
        frozen_writes=3,
        frozen_acknowledged=0,
        thawed_acknowledged=3,
    )


def test_it_passes_when_every_check_was_made_and_nothing_is_wrong() -> None:
    result = good()
    result.conclude()
    assert result.passed
    assert result.problems == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("acknowledged_writes", 0),
        ("lost_writes", 1),
        ("lost_writes", None),
        ("images_identical", False),
        ("images_identical", None),
        ("wrong_reads", 1),
        ("failover_s", None),
        ("resync_bytes", None),
        ("failback_s", None),
        ("frozen_writes", 0),
        ("frozen_writes", None),
        ("frozen_acknowledged", 1),
        ("frozen_acknowledged", None),
        ("thawed_acknowledged", 0),
        ("thawed_acknowledged", None),
        ("problems", ["something"]),
    ],
)
def test_it_fails_when_anything_is_wrong_or_was_not_looked_at(field: str, value: object) -> None:
    result = good()
    setattr(result, field, value)
    result.conclude()
    assert not result.passed
    assert result.problems


def test_the_verdict_as_people_see_it() -> None:
    result = good()
    result.acknowledged_writes, result.longest_stall_s, result.failover_s, result.failback_s = 48211, 0.2, 0.19, 0.05
    result.resync_bytes, result.resync_skipped_bytes, result.resync_sent_bytes = 312 << 20, 610, 390
    result.resync_s, result.frozen_s = 0.6, 4.0
    result.conclude()
    resync = "resync 312 MiB in 0.60 s (61.0 % skipped)"
    assert verdict_lines(result) == [
        "PASS  0 of 48,211 acknowledged writes lost   images identical",
        f"      failover 0.19 s   longest client stall 0.20 s   {resync}   failback 0.05 s",
        "      cut off from peer and witness for 4.00 s: 0 of 3 writes acknowledged",
    ]


def test_the_verdict_of_a_run_that_broke_off() -> None:
    result = ResultLine(problems=["beta ended by itself with 1"], acknowledged_writes=7)
    result.conclude()
    assert verdict_lines(result) == [
        "FAIL  ? of 7 acknowledged writes lost   images not compared",
        "      problem: beta ended by itself with 1",
    ]
