"""Sizes, rates and times as people write and read them.

Rules:
- Parsing is exact (integers, no float arithmetic): "1.5KiB" is 1536, "0.3B" is refused because half a byte is
  nobody's wish.
- `KiB MiB GiB TiB PiB EiB` and the bare letters `K M G T P E` are powers of 1024, `kB MB GB TB PB EB` powers of 1000;
  upper and lower case are the same. A bare number is bytes, or seconds.
- A number that is shown never promises more than is true: a percentage reads 100.0 only when everything is done.
- Errors are ValueError with a sentence that names the text and shows a right one; the caller knows which option it was.
"""

from __future__ import annotations

import re

MAX_BYTES = 2**63 - 1  # off_t
MAX_SECONDS = 10 * 365 * 86400

_SIZE_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _SIZE_UNITS[_letter] = 1024**_power
    _SIZE_UNITS[_letter + "ib"] = 1024**_power
    _SIZE_UNITS[_letter + "b"] = 1000**_power

_TIME_UNITS_NS: dict[str, int] = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "": 10**9,
    "s": 10**9,
    "sec": 10**9,
    "m": 60 * 10**9,
    "min": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}

_QUANTITY = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,9}))?\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes: "65536", "64KiB", "1.5GiB", "10G"."""
    value = _parse(text, _SIZE_UNITS, "a size", "64KiB or 10GiB")
    if value > MAX_BYTES:
        raise ValueError(f"{_quoted(text)} is too large: the largest size is {MAX_BYTES} bytes (8 EiB - 1)")
    return value


def parse_rate(text: str) -> int:
    """Bytes per second, 0 for no limit: "200MiB/s", "1GB/s", "50M", "auto"."""
    stripped = text.strip()
    if stripped.lower() in ("auto", "none"):
        return 0
    if stripped.lower().endswith("/s"):
        stripped = stripped[:-2]
    try:
        return parse_size(stripped)
    except ValueError:
        raise ValueError(f"{_quoted(text)} is not a rate; write it like 200MiB/s, or auto for no limit") from None


def parse_seconds(text: str) -> float:
    """Seconds: "250ms", "3s", "5min", "30"."""
    value_ns = _parse(text, _TIME_UNITS_NS, "a time", "250ms, 30s or 5min")
    if value_ns > MAX_SECONDS * 10**9:
        raise ValueError(f"{_quoted(text)} is too long: the longest time is ten years")
    return value_ns / 10**9


def format_size(size: int) -> str:
    """Three significant digits: "512 B", "1.21 GiB", "212 MiB"."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        if value < 1023.5 or unit == "EiB":
            break
    return f"{_three_digits(value)} {unit}"


def format_exact(size: int) -> str:
    """For messages in which every byte counts: "4097 bytes", "10737418240 bytes (10.0 GiB)"."""
    plural = "byte" if size == 1 else "bytes"
    return f"{size} {plural}" if size < 10 * 1024 else f"{size} {plural} ({format_size(size)})"


def format_progress(done: int, total: int) -> str:
    """Both numbers in the unit of the second: "2.70/3.90 GiB"."""
    if total < 1024:
        return f"{done}/{total} B"
    number, unit = format_size(total).split(" ")
    scale = _SIZE_UNITS[unit.lower()]
    decimals = len(number.partition(".")[2])
    return f"{done / scale:.{decimals}f}/{number} {unit}"


def format_rate(bytes_per_second: float) -> str:
    return f"{format_size(int(bytes_per_second))}/s"


def format_percent(part: int, whole: int) -> str:
    """Rounded down to a tenth, so that 100.0 % is said only of everything; a whole of nothing is done."""
    tenths = 1000 if whole <= 0 else max(0, min(1000, part * 1000 // whole))
    return f"{tenths // 10}.{tenths % 10} %"


def format_seconds(seconds: float) -> str:
    """A length of time: "0.19 s", "12.3 s", "2m14s", "1h02m", "3d04h"."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_clock(seconds: float | None) -> str:
    """A count-down of fixed look: "0:06", "1:02:03"; "-:--" when nobody knows."""
    if seconds is None:
        return "-:--"
    whole = int(seconds + 0.999)  # rounded up: an ETA of 0:00 is said only of the end
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _parse(text: str, units: dict[str, int], what: str, example: str) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    scale = units.get(match[3].lower()) if match else None
    if match is None or scale is None:
        raise ValueError(f"{_quoted(text)} is not {what}; write it like {example}")
    fraction = match[2] or ""
    scaled = int(match[1] + fraction) * scale
    parts = int("1" + "0" * len(fraction))
    value, rest = divmod(scaled, parts)
    if rest:
        raise ValueError(f"{_quoted(text)} is not a whole number of the smallest unit; write it like {example}")
    return value


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _quoted(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return ascii(shown)
