"""Sizes, rates and times: parsed exactly, shown without promising more than is true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.units import (
    MAX_BYTES,
    format_clock,
    format_exact,
    format_percent,
    format_progress,
    format_rate,
    format_seconds,
    format_size,
    parse_rate,
    parse_seconds,
    parse_size,
)

SIZES = st.integers(0, MAX_BYTES)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("512B", 512),
        ("4KiB", 4096),
        ("64 KiB", 65536),
        (" 1MiB ", 1 << 20),
        ("10GiB", 10 << 30),
        ("1TiB", 1 << 40),
        ("1PiB", 1 << 50),
        ("7EiB", 7 << 60),
        ("10G", 10 << 30),
        ("10g", 10 << 30),
        ("1kB", 1000),
        ("1GB", 10**9),
        ("1.5KiB", 1536),
        ("0.5K", 512),
        ("1.000B", 1),
        ("9223372036854775807", MAX_BYTES),
    ],
)
def test_a_size_is_what_people_mean_by_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+1",
        "1e3",
        "0x10",
        "1_000",
        "KiB",
        "4KiBs",
        "4 K iB",
        "1.5B",
        "0.3KiB",
        ".5K",
        "1.",
        "1..5K",
        "nan",
        "8EiB",
        "9223372036854775808",
        "9" * 30,
        "\uff14KiB",
        "1\nK2",
    ],
)
def test_what_is_no_size_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|smallest unit") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_parsing_any_text_gives_a_number_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_seconds):
        try:
            assert 0 <= parse(text) <= MAX_BYTES
        except ValueError as error:
            assert str(error).isprintable()  # noqa: PT017 - either way is right


@given(SIZES)
def test_a_bare_number_is_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("text", "rate"), [("200MiB/s", 200 << 20), ("1GB/s", 10**9), ("50M", 50 << 20), ("auto", 0), ("0", 0), ("NONE", 0)]
)
def test_a_rate_may_end_in_per_second(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["fast", "/s", "1MiB/h", "-1MiB/s", "1MiB/s/s"])
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="200MiB/s"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("3s", 3.0),
        ("5min", 300.0),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        ("30", 30.0),
        ("0", 0.0),
    ],
)
def test_a_time_is_in_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "3 fortnights", "-1s", "1e400s", "99999999999d", "0.1ns"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|long|smallest unit"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1299234816, "1.21 GiB"),
        (212 << 20, "212 MiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (1000 << 10, "1000 KiB"),
        (MAX_BYTES, "8.00 EiB"),
    ],
)
def test_a_size_is_shown_with_three_digits(size: int, shown: str) -> None:
    assert format_size(size) == shown


@given(SIZES)
def test_a_shown_size_is_within_half_a_percent(size: int) -> None:
    number, unit = format_size(size).split(" ")
    assert float(number) * float(parse_size(f"1{unit}")) == pytest.approx(size, rel=0.0051)
    assert len(number.replace(".", "")) <= 4


def test_an_exact_size_names_every_byte() -> None:
    assert format_exact(1) == "1 byte"
    assert format_exact(4097) == "4097 bytes"
    assert format_exact(10 << 30) == "10737418240 bytes (10.0 GiB)"


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0, 0, "0/0 B"), (1, 1000, "1/1000 B"), (2899102924, 4187593113, "2.70/3.90 GiB"), (0, 1 << 40, "0.00/1.00 TiB")],
)
def test_progress_is_in_the_unit_of_the_whole(done: int, total: int, shown: str) -> None:
    assert format_progress(done, total) == shown


def test_a_rate_ends_in_per_second() -> None:
    assert format_rate(212.4 * (1 << 20)) == "212 MiB/s"


@given(SIZES, SIZES)
def test_a_percentage_is_100_only_when_all_is_done(part: int, whole: int) -> None:
    shown = format_percent(part, whole)
    assert (shown == "100.0 %") == (part >= whole)
    assert 0 <= float(shown.removesuffix(" %")) <= 100


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0.00 s"),
        (0.194, "0.19 s"),
        (9.999, "10.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1m00s"),
        (134, "2m14s"),
        (3599.6, "1h00m"),
        (3725, "1h02m"),
        (86400 * 3 + 4 * 3600, "3d04h"),
    ],
)
def test_a_length_of_time_is_short(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-:--"), (0.0, "0:00"), (0.2, "0:01"), (6.0, "0:06"), (754, "12:34"), (3723, "1:02:03")],
)
def test_an_eta_is_zero_only_at_the_end(seconds: float | None, shown: str) -> None:
    assert format_clock(seconds) == shown
