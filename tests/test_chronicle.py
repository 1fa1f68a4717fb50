"""The history of a node on its disk: appended, torn, damaged, bounded, and written beside the event loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mirrorpair import chronicle
from mirrorpair.chronicle import Chronicle, Entry, Scribe, load
from mirrorpair.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path


def entry(seq: int, **facts: Any) -> Entry:
    plain: dict[str, Any] = {"time_s": 5.5, "node": "alpha", "epoch": 3, "kind": "role", "new": "primary"}
    return Entry(seq=seq, **{**plain, "old": "secondary", "reason": f"the {seq}. one", **facts})


def write(path: Path, *entries: Entry) -> None:
    Chronicle(str(path)).append(list(entries))


def numbers(path: Path) -> list[int]:
    return [one.seq for one in load(str(path)).entries]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history"


def test_what_was_appended_is_read_in_its_order_by_any_later_process(path: Path) -> None:
    assert load(str(path)) == ([], 0, 0, 0)
    write(path, entry(1), entry(2, kind="disk", volume="data", old=None, new="consistent"))
    write(path, entry(3))
    assert load(str(path)).entries == [
        entry(1),
        entry(2, kind="disk", volume="data", old=None, new="consistent"),
        entry(3),
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_json_says_from_and_to() -> None:
    said = msgspec.json.decode(msgspec.json.encode(entry(7)))
    assert said == {
        "schema": "mirrorpair.history/1",
        "seq": 7,
        "time_s": 5.5,
        "node": "alpha",
        "epoch": 3,
        "kind": "role",
        "volume": None,
        "from": "secondary",
        "to": "primary",
        "reason": "the 7. one",
    }


def test_a_line_torn_anywhere_costs_itself_alone_and_the_next_writer_goes_on(path: Path) -> None:
    write(path, entry(1), entry(2))
    before = path.stat().st_size
    write(path, entry(3))
    whole = path.read_bytes()
    for length in range(before, len(whole)):
        path.write_bytes(whole[:length])
        found = load(str(path))
        assert ([one.seq for one in found.entries], found.damaged) == ([1, 2], 0)
        write(path, entry(3), entry(4))
        assert (numbers(path), load(str(path)).damaged) == ([1, 2, 3, 4], 0)


def test_a_damaged_line_is_passed_over_and_counted(path: Path) -> None:
    write(path, entry(1), entry(2), entry(3))
    data = path.read_bytes()
    at = data.index(b"the 2. one")
    for position in (at, data.index(b"\n") + 1):
        path.write_bytes(data[:position] + b"#" + data[position + 1 :])
        found = load(str(path))
        assert ([one.seq for one in found.entries], found.damaged) == ([1, 3], 1)
    write(path, entry(4))
    assert numbers(path) == [1, 3, 4]


def test_it_is_bounded_and_keeps_the_newest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronicle, "MAX_BYTES", 4000)
    kept = Chronicle(str(path))
    for number in range(1, 101):
        kept.append([entry(number)])
        assert path.stat().st_size <= 4000
        found = numbers(path)
        assert found == list(range(found[0], number + 1))
        assert [one.seq for one in kept.entries] == found
    assert len(found) >= 5
    assert os.listdir(path.parent) == ["history"]


def test_a_crash_while_it_is_made_smaller_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronicle, "MAX_BYTES", 1500)
    kept = Chronicle(str(path))
    number = 0
    while path.stat().st_size < 1300 if path.exists() else True:
        number += 1
        kept.append([entry(number)])
    before = numbers(path)
    monkeypatch.setattr(os, "rename", _fails)
    with pytest.raises(ImageError, match="cannot write"):
        kept.append([entry(number + 1)])
    assert numbers(path) == before
    monkeypatch.undo()
    monkeypatch.setattr(chronicle, "MAX_BYTES", 1500)
    kept.append([entry(number + 1)])
    assert numbers(path)[-1] == number + 1
    assert os.listdir(path.parent) == ["history"]


def _fails(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_could_not_be_made_durable_is_written_once_more_and_read_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Chronicle(str(path))
    kept.append([entry(1)])
    monkeypatch.setattr(os, "fdatasync", _fails)
    with pytest.raises(ImageError):
        kept.append([entry(2)])
    monkeypatch.undo()
    kept.append([entry(2), entry(3)])
    assert numbers(path) == [1, 2, 3]
    path.write_bytes(path.read_bytes() + path.read_bytes())  # as after a sync of the folder that failed
    assert numbers(path) == [1, 2, 3]


# --- beside the event loop


async def told(path: Path, *roles: str) -> Scribe:
    scribe = Scribe(str(path))
    work = asyncio.get_running_loop().create_task(scribe.write_on())
    old = scribe.last("role")
    for role in roles:
        scribe.add(1.0, "alpha", 2, "role", f"it became {role}", old=old, new=role)
        old = role
    scribe.close()
    await work
    return scribe


def test_a_scribe_writes_all_before_it_ends_and_the_next_one_goes_on_from_there(path: Path) -> None:
    asyncio.run(told(path, "primary", "secondary", "primary"))
    again = asyncio.run(told(path, "secondary"))
    found = load(str(path)).entries
    assert [(one.seq, one.old, one.new) for one in found] == [
        (1, None, "primary"),
        (2, "primary", "secondary"),
        (3, "secondary", "primary"),
        (4, "primary", "secondary"),
    ]
    assert (again.last("role"), again.last("disk", "data")) == ("secondary", None)


def test_a_full_disk_delays_what_is_told_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        scribe = Scribe(str(path))
        work = asyncio.get_running_loop().create_task(scribe.write_on())
        tried = asyncio.Event()
        loop = asyncio.get_running_loop()

        def full(*_: object) -> None:
            loop.call_soon_threadsafe(tried.set)
            _fails()

        monkeypatch.setattr(os, "fdatasync", full)
        for number in (1, 2):
            tried.clear()
            scribe.add(1.0, "alpha", number, "role", "why", old=None, new="primary")
            await tried.wait()
        monkeypatch.undo()
        scribe.close()
        await work

    with caplog.at_level(logging.WARNING):
        asyncio.run(play())
    assert [one.epoch for one in load(str(path)).entries] == [1, 2]
    assert sum("is not written down for now" in one.message for one in caplog.records) == 1


def test_a_history_that_cannot_be_read_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir()
    scribe = asyncio.run(told(path, "primary"))
    assert scribe.last("role") == "primary"
    assert "this node's history is not kept" in caplog.text
    with pytest.raises(ImageError, match="cannot read"):
        load(str(path))


def test_a_reason_of_any_length_and_content_is_one_line(path: Path) -> None:
    async def play() -> None:
        scribe = Scribe(str(path))
        work = asyncio.get_running_loop().create_task(scribe.write_on())
        scribe.add(1.0, "alpha", 1, "role", "a\nb\x1b[2J\udcff" * 5000, old=None, new="primary")
        scribe.close()
        await work

    asyncio.run(play())
    (found,) = load(str(path)).entries
    assert found.reason.isprintable()
    assert len(found.reason) <= chronicle.MAX_REASON + 3
