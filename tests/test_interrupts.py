"""An interrupt at the worst moment: between the engine's start and its first look, or after its last."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from farside import peer, silent_after_start

import mirrorpair as mp
from mirrorpair import drive, offline
from mirrorpair.interrupts import Hold

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeImage

MIB = 1 << 20


@pytest.fixture(autouse=True)
def python_handles_sigint() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def two(make_image: MakeImage, size: int = 4 * MIB) -> tuple[Path, Path]:
    return make_image("a.img", size, {0: os.urandom(size)}), make_image("b.img", size)


@pytest.mark.parametrize("function", ["resync", "compare"])
def test_one_before_the_first_look_ends_the_run_and_its_result_is_told(
    function: str, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image("a.img", MIB, {0: b"x"})

    def late(*args: Any, **kwargs: Any) -> drive.Run:
        interrupt()  # the engine runs; nobody looks after it yet
        return drive.drive(*args, **kwargs)

    monkeypatch.setattr(offline, "drive", late)
    with peer(silent_after_start) as port, pytest.raises(mp.Interrupted, match="compared") as caught:
        getattr(mp, function)(image, f"tcp://127.0.0.1:{port}/x")
    result = caught.value.result
    assert isinstance(result, mp.ResyncResult | mp.CompareResult)
    assert result.done_bytes < MIB
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_after_a_run_that_finished_does_not_undo_it(make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = two(make_image)

    def done(*args: Any, **kwargs: Any) -> drive.Run:
        run = drive.drive(*args, **kwargs)
        interrupt()
        return run

    monkeypatch.setattr(offline, "drive", done)
    assert mp.resync(source, target).written_bytes == 4 * MIB


def test_what_is_held_is_told_at_the_next_release_or_is_pending_at_the_end() -> None:
    with Hold() as hold:
        interrupt()
        assert hold.pending == signal.SIGINT
        with pytest.raises(KeyboardInterrupt), hold.released():
            pytest.fail("it came before this part")
        assert hold.pending is None
        with pytest.raises(KeyboardInterrupt), hold.released():
            interrupt()
        interrupt()  # the part is over
    assert hold.pending == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_handler_that_does_not_raise_leaves_the_part_open() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number))
    with Hold() as hold:
        with hold.released():
            interrupt()
            interrupt()
        interrupt()
        assert heard == [signal.SIGINT] * 2
        with hold.released():
            assert heard == [signal.SIGINT] * 3
    assert hold.pending is None


def test_what_is_ignored_stays_ignored_and_other_threads_are_left_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Hold() as hold:
        interrupt()
    assert hold.pending is None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen: list[object] = []

    def elsewhere() -> None:
        with Hold() as other, other.released():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
