"""Text of others, shown: one line, no control characters, nothing lost in silence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.text import last_words, printable


def test_plain_text_stays_as_it_is() -> None:
    assert printable("/srv/größe 1.img") == "/srv/größe 1.img"


def test_an_escape_sequence_cannot_reach_the_terminal() -> None:
    assert printable("\x1b[2J\r\n\x07") == r"\x1b[2J\x0d\x0a\x07"


def test_a_bidirectional_override_is_written_out() -> None:
    assert printable("a\u202eb") == r"a\u202eb"


def test_bytes_that_are_not_utf8_are_written_as_bytes() -> None:
    assert printable(b"a\xff\x80".decode("utf-8", "surrogateescape")) == r"a\xff\x80"


def test_what_is_too_long_says_so() -> None:
    assert printable("x" * 100, 10) == "x" * 10 + "..."


@given(st.text(alphabet=st.characters(), max_size=200), st.integers(0, 100))
def test_any_text_becomes_one_printable_bounded_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + 3
    shown.encode("utf-8")


@given(st.binary(max_size=300))
def test_the_last_words_of_a_command_are_one_printable_line(said: bytes) -> None:
    assert last_words(said).isprintable()


def test_the_last_words_are_the_last_lines() -> None:
    assert last_words(b"one\ntwo\n\nthree\r\nfour\n") == "two / three / four"
    assert last_words(b"\n \n") == ""
