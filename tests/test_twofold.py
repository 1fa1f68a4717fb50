"""A record kept twice: whatever is torn, flipped, cut off or interrupted, the file holds the old value or the new one,
or is refused."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mirrorpair import twofold
from mirrorpair.errors import ImageError, MirrorpairError, RefusedError, UsageError
from mirrorpair.linux import ofd_lock
from mirrorpair.twofold import (
    COPY_BYTES,
    MAX_JSON,
    TWOFOLD_BYTES,
    Kind,
    Stored,
    create_stored,
    look,
    newest,
    open_stored,
    open_to_look,
    pack,
    parse,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECTOR = 512


class Note(msgspec.Struct, frozen=True):
    text: str
    number: int = 0


KIND = Kind(b"TESTNOTE", Note, "note")
OLD, NEW = Note("old", 1), Note("new", 2)


@pytest.fixture(autouse=True)
def no_descriptor_leaks(open_descriptors: Callable[[], set[int]]) -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a file that holds OLD."""
    found = str(tmp_path / "note")
    create_stored(KIND, found, OLD).close()
    return found


def read(path: str) -> Note:
    with open_stored(KIND, path) as stored:
        return stored.value


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def overwrite(path: str, data: bytes, offset: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def kind_of_error(call: Callable[[], object]) -> type[MirrorpairError]:
    with pytest.raises(MirrorpairError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return type(caught.value)


# --- one copy


@pytest.mark.parametrize("sequence", [0, 1, 2**32, 2**63])
def test_a_copy_reads_back(sequence: int) -> None:
    data = pack(KIND, sequence, OLD)
    assert len(data) == COPY_BYTES
    copy = parse(KIND, sequence % 2, data)
    assert (copy.state, copy.sequence, copy.value) == ("good", sequence, OLD)
    assert parse(KIND, 1 - sequence % 2, data).state == "bad"


def test_m2_any_flipped_bit_makes_a_copy_invalid() -> None:
    data = bytearray(pack(KIND, 4, OLD))
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert parse(KIND, 0, bytes(data)).state == "bad"
        data[bit // 8] ^= 1 << bit % 8
    assert parse(KIND, 0, bytes(data)).state == "good"


def test_m2_a_copy_that_is_cut_off_anywhere_is_invalid() -> None:
    data = pack(KIND, 4, OLD)
    assert all(parse(KIND, 0, data[:length]).state == "bad" for length in range(COPY_BYTES))


def test_rubbish_is_no_copy(rng: random.Random) -> None:
    for _ in range(2000):
        data = bytearray(rng.randbytes(COPY_BYTES))
        if rng.random() < 0.5:
            data[:12] = pack(KIND, 0, OLD)[:12]
        if rng.random() < 0.5:
            data[12:16] = rng.randrange(COPY_BYTES).to_bytes(4, "little")
        assert parse(KIND, 0, bytes(data)).value is None
    assert parse(KIND, 1, bytes(COPY_BYTES)).state == "empty"


def seal(text: bytes, *, version: int = 1, sequence: int = 0) -> bytes:
    """A copy with a right digest, whatever is in it."""
    head = twofold._HEADER.pack(KIND.magic, version, len(text), sequence, bytes(16))
    head = twofold._HEADER.pack(KIND.magic, version, len(text), sequence, twofold.digest128(head + text))
    return (head + text).ljust(COPY_BYTES, b"\0")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"text":1}', b'{"number":1}', b"\xff", b"[" * 4000])
def test_a_value_of_another_type_is_not_accepted_even_with_a_right_digest(text: bytes) -> None:
    assert parse(KIND, 0, seal(text)).state == "bad"


def test_what_a_newer_version_added_is_skipped() -> None:
    assert parse(KIND, 0, seal(b'{"text":"a","number":3,"more":[1]}')).value == Note("a", 3)


def test_a_value_that_does_not_fit_or_read_back_is_not_packed() -> None:
    pack(KIND, 0, Note("x" * (MAX_JSON - len('{"text":"","number":0}'))))
    with pytest.raises(ValueError, match="longer than"):
        pack(KIND, 0, Note("x" * MAX_JSON))
    with pytest.raises(ValueError, match="read back"):
        pack(KIND, 0, Note(text=7))  # type: ignore[arg-type]


# --- both copies


def test_writes_alternate_and_the_newest_copy_is_never_touched(path: str) -> None:
    with open_stored(KIND, path) as stored:
        for number in range(1, 8):
            before, place = content(path), stored.sequence % 2 * COPY_BYTES
            stored.write(Note("n", number))
            assert content(path)[place : place + COPY_BYTES] == before[place : place + COPY_BYTES]
            assert stored.sequence == number + 1
    assert read(path) == Note("n", 7)


def test_update_changes_some_fields_and_writes_nothing_if_none(path: str) -> None:
    with open_stored(KIND, path) as stored:
        assert stored.update(number=5) == stored.value == Note("old", 5)
        sequence, before = stored.sequence, content(path)
        stored.update(number=5)
        assert (stored.sequence, content(path)) == (sequence, before)


@pytest.mark.parametrize("sequence", [2, 3])
def test_m2_a_torn_write_of_one_copy_leaves_the_other(path: str, sequence: int) -> None:
    with open_stored(KIND, path) as stored:
        while stored.sequence < sequence - 1:
            stored.write(OLD)
    before, data, offset = content(path), pack(KIND, sequence, NEW), sequence % 2 * COPY_BYTES
    for sectors in range(1 << 4):  # any of the first four sectors may have arrived; JSON fits the first
        torn = bytearray(before)
        for sector in range(4):
            if sectors >> sector & 1:
                at = sector * SECTOR
                torn[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
        overwrite(path, bytes(torn))
        assert read(path) == (NEW if sectors & 1 else OLD)
    for length in range(0, COPY_BYTES, 61):
        overwrite(path, before)
        overwrite(path, data[:length], offset)
        assert read(path) in (OLD, NEW)


@pytest.mark.parametrize("place", [0, 1])
def test_m2_a_damaged_copy_is_told_and_repaired_by_the_next_write(path: str, place: int) -> None:
    with open_stored(KIND, path) as stored:
        while stored.sequence % 2 == place:  # the older one is damaged
            stored.write(OLD)
    overwrite(path, b"x", place * COPY_BYTES + 100)
    with open_stored(KIND, path) as stored:
        assert stored.value == OLD
        assert f"copy {'AB'[place]}" in (stored.damage or "")
        stored.write(NEW)
    with open_stored(KIND, path) as stored:
        assert (stored.value, stored.damage) == (NEW, None)


def test_m2_if_the_newest_is_damaged_the_older_one_counts(path: str) -> None:
    with open_stored(KIND, path) as stored:
        stored.write(NEW)
    overwrite(path, b"x", 0)
    assert read(path) == OLD


def test_m2_both_copies_bad_is_refused_and_nothing_is_changed(path: str) -> None:
    overwrite(path, b"x", 20)
    overwrite(path, bytes(COPY_BYTES), COPY_BYTES)
    before = content(path)
    with pytest.raises(RefusedError, match="meta check") as caught:
        open_stored(KIND, path)
    assert caught.value.exit_code == 12
    assert content(path) == before


def test_m2_a_file_that_is_cut_off_anywhere_is_refused_or_holds_the_older_value(path: str) -> None:
    whole = content(path)
    for length in [*range(0, TWOFOLD_BYTES, 97), COPY_BYTES - 1, COPY_BYTES, TWOFOLD_BYTES - 1]:
        os.truncate(path, 0)
        overwrite(path, whole[:length])
        if length < COPY_BYTES:
            assert kind_of_error(lambda: open_stored(KIND, path)) is RefusedError
        else:
            assert read(path) == OLD


def test_a_newer_format_is_refused_even_beside_a_good_copy(path: str) -> None:
    overwrite(path, seal(b'{"later":1}', version=2, sequence=2))
    with pytest.raises(RefusedError, match="newer mirrorpair"):
        open_stored(KIND, path)


def test_a_reader_needs_no_lock(path: str) -> None:
    with open_stored(KIND, path) as stored:
        stored.write(NEW)
        fd = open_to_look(KIND, path)
        try:
            best = newest(look(KIND, fd))
        finally:
            os.close(fd)
        assert best is not None
        assert best.value == NEW


def test_a_failed_write_is_the_last_one(path: str) -> None:
    with open_stored(KIND, path) as stored:
        reader = os.open(path, os.O_RDONLY)
        writer = os.dup(stored.fd)
        os.dup2(reader, stored.fd)
        with pytest.raises(ImageError, match="cannot write the note"):
            stored.write(NEW)
        os.dup2(writer, stored.fd)  # as if the storage were well again
        with pytest.raises(ImageError, match="earlier write"):
            stored.write(NEW)
        assert stored.value == OLD
        os.close(reader)
        os.close(writer)
    assert read(path) == OLD


# --- opening


def test_two_opens_of_one_file_are_refused(path: str) -> None:
    with open_stored(KIND, path) as stored:
        with pytest.raises(RefusedError, match="in use") as caught:
            open_stored(KIND, path)
        assert caught.value.exit_code == 12
        os.close(os.dup(stored.fd))  # the lock is the open file's, whoever has a descriptor of it
        assert kind_of_error(lambda: open_stored(KIND, path)) is RefusedError
    assert read(path) == OLD


def test_the_descriptor_is_the_callers_until_the_close(path: str) -> None:
    stored = open_stored(KIND, path)
    assert os.pread(stored.fd, 8, 0) == KIND.magic
    assert not os.get_inheritable(stored.fd)
    stored.close()
    stored.close()
    assert stored.fd == -1


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (str, UsageError),
        (os.mkdir, ImageError),
        (os.mkfifo, UsageError),
        (lambda path: os.symlink("nowhere", path), UsageError),
    ],
    ids=["nothing", "folder", "fifo", "dangling link"],
)
def test_what_is_no_such_file_is_refused(
    tmp_path: Path, never_blocks: None, make: Callable[[str], object], error: type[MirrorpairError]
) -> None:
    found = str(tmp_path / "thing")
    make(found)
    assert kind_of_error(lambda: open_stored(KIND, found)) is error


def test_a_name_with_a_terminal_escape_is_shown_harmlessly(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\\x1b"):
        open_stored(KIND, str(tmp_path / "a\x1b[2J"))
    with pytest.raises(UsageError, match="not a valid path"):
        open_stored(KIND, "a\0b")


# --- making


def test_a_new_file_is_whole_reserved_private_locked_and_has_both_copies(tmp_path: Path) -> None:
    path = tmp_path / "note"
    with create_stored(KIND, str(path), OLD, length=100_000, rest={50_000: b"rest"}) as stored:
        assert kind_of_error(lambda: open_stored(KIND, str(path))) is RefusedError
        status = os.fstat(stored.fd)
        assert (status.st_size, stat.S_IMODE(status.st_mode)) == (100_000, 0o600)
        assert status.st_blocks * 512 >= 100_000
        assert content(str(path))[50_000:50_004] == b"rest"
        stored.write(NEW)
    with open_stored(KIND, str(path)) as stored:
        assert (stored.value, stored.damage) == (NEW, None)
    assert os.listdir(tmp_path) == ["note"]


def test_an_existing_file_is_kept_unless_it_is_said(path: str) -> None:
    with pytest.raises(RefusedError, match="--force"):
        create_stored(KIND, path, NEW)
    assert read(path) == OLD
    create_stored(KIND, path, NEW, force=True).close()
    assert read(path) == NEW


def test_a_file_in_use_is_kept_whatever_is_said(path: str) -> None:
    with open_stored(KIND, path):
        for force in (False, True):
            assert kind_of_error(lambda force=force: create_stored(KIND, path, NEW, force=force)) is RefusedError
    assert read(path) == OLD
    assert not os.path.exists(f"{path}.new")


def link_to_nothing(path: str) -> None:
    os.symlink("nowhere", path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, link_to_nothing])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_never_replaced(
    tmp_path: Path, never_blocks: None, make: Callable[[str], object], force: bool
) -> None:
    found = str(tmp_path / "thing")
    make(found)
    before = os.lstat(found).st_mode
    assert kind_of_error(lambda: create_stored(KIND, found, NEW, force=force)) is RefusedError
    assert os.lstat(found).st_mode == before
    assert os.listdir(tmp_path) == ["thing"]


def test_what_a_killed_attempt_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "note.new").write_bytes(b"half" * 10_000)
    with create_stored(KIND, str(tmp_path / "note"), OLD) as stored:
        assert os.fstat(stored.fd).st_size == TWOFOLD_BYTES
    assert os.listdir(tmp_path) == ["note"]


def test_two_that_make_the_same_file_do_not_meet(tmp_path: Path) -> None:
    scratch = os.open(tmp_path / "note.new", os.O_RDWR | os.O_CREAT)
    ofd_lock(scratch, exclusive=True)
    assert kind_of_error(lambda: create_stored(KIND, str(tmp_path / "note"), OLD)) is RefusedError
    assert os.listdir(tmp_path) == ["note.new"]
    os.close(scratch)


def test_a_missing_folder_is_a_wrong_argument(tmp_path: Path) -> None:
    assert kind_of_error(lambda: create_stored(KIND, str(tmp_path / "none/note"), OLD)) is UsageError


def test_f10_without_space_nothing_is_left_behind(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("1m")
    with pytest.raises(ImageError, match="no space"):
        create_stored(KIND, str(folder / "note"), OLD, length=8 << 20)
    assert os.listdir(folder) == []
    create_stored(KIND, str(folder / "note"), OLD, length=512 << 10).close()
    with pytest.raises(ImageError, match="no space"):
        create_stored(KIND, str(folder / "note"), NEW, length=8 << 20, force=True)
    assert os.listdir(folder) == ["note"]
    assert read(str(folder / "note")) == OLD


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "rename", "ftruncate"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["EIO", "interrupt"])
def test_interrupted_anywhere_there_is_the_old_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, existing: bool, error: BaseException
) -> None:
    path = str(tmp_path / "note")
    if existing:
        create_stored(KIND, path, OLD).close()
    real, calls = getattr(os, call), []

    def broken(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == nth:
            raise error
        return real(*given, **named)

    monkeypatch.setattr(os, call, broken)
    try:
        made: Stored[Note] | None = create_stored(KIND, path, NEW, force=True)
    except (ImageError, KeyboardInterrupt):
        made = None
    monkeypatch.undo()
    if made is not None:
        assert len(calls) < nth
        made.close()
        assert read(path) == NEW
    elif os.path.exists(path):
        assert existing
        assert read(path) == OLD
    assert set(os.listdir(tmp_path)) <= {"note"}
