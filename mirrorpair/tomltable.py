"""Reads one table of a TOML file by what each key must be, and says exactly what is wrong with a key that is not so.

Rules:
- Every error is a ConfigError of one sentence: file, key path, what was found, what was expected; a near word is
  suggested when there is one.
- An unknown key is told before a missing one: the missing one is often the unknown one, misspelt.
- No value is converted silently: 3 is no "3", true is no 1, one string is no list.
- Pure: the text comes as a parameter.
"""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Generic, TypeVar

from mirrorpair.errors import ConfigError
from mirrorpair.text import printable
from mirrorpair.units import parse_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

_T = TypeVar("_T")
_D = TypeVar("_D")

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN = 60  # characters of a wrong value; enough to find it again
_MAX_ITEMS = 64  # of a list; more is a mistake


class Kind(Generic[_T]):
    """What a value must be: `parse` takes the raw TOML value and raises ValueError when it is something else;
    `expected` completes "expected ..."; `words` are all right texts, where they can be told."""

    __slots__ = ("expected", "parse", "words")

    def __init__(self, parse: Callable[[object], _T], expected: str, words: Collection[str] = ()) -> None:
        self.parse = parse
        self.expected = expected
        self.words = words


def text(parse: Callable[[str], _T], expected: str, words: Collection[str] = ()) -> Kind[_T]:
    """A string that `parse` understands."""

    def checked(value: object) -> _T:
        if not isinstance(value, str):
            raise ValueError("not a string")
        return parse(value)

    return Kind(checked, expected, words)


def choice(*words: str) -> Kind[str]:
    """One of the words."""

    def checked(value: str) -> str:
        if value not in words:
            raise ValueError("none of the words")
        return value

    return text(checked, either(words), words)


def matching(pattern: str, expected: str) -> Kind[str]:
    """A string that matches the whole pattern."""
    compiled = re.compile(pattern)

    def checked(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError("no match")
        return value

    return text(checked, expected)


def seconds(low: float, high: float) -> Kind[float]:
    """A time from `low` to `high` seconds, both included."""

    def checked(value: str) -> float:
        found = parse_seconds(value)
        if not low <= found <= high:
            raise ValueError("not in the range")
        return found

    return text(checked, f'a time from {_in_one_unit(low)} to {_in_one_unit(high)}, such as "250ms", "3s" or "5min"')


def whole_number(low: int, high: int) -> Kind[int]:
    """An integer from `low` to `high`, both included."""

    def checked(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError("not in the range")
        return value

    return Kind(checked, f"a whole number from {low} to {high}")


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not a boolean")
    return value


FLAG: Kind[bool] = Kind(_flag, "true or false")


class Table:
    """One table: its values by key, each asked for once with the kind it must be of.

    `names`: all keys that it may have; None when the keys are names that the user gives.
    """

    __slots__ = ("at", "file", "values")

    def __init__(self, file: str, at: tuple[str, ...], value: object, names: Collection[str] | None) -> None:
        self.file = file
        self.at = at
        if not isinstance(value, dict):
            raise self._wrong(at, value, "a table")
        self.values: dict[str, object] = value
        for key in () if names is None else value:
            assert names is not None
            if key not in names:
                near = _near(key, names)
                known = f"did you mean {near}?" if near else f"expected {either(sorted(names), quoted=False)}"
                raise ConfigError(f"{self._place(key)}: unknown key; {known}")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def need(self, key: str, kind: Kind[_T]) -> _T:
        """The value of a key that must be there."""
        if key not in self.values:
            raise ConfigError(f"{self._place(key)}: missing; expected {kind.expected}")
        return self._parsed((*self.at, key), self.values[key], kind)

    def get(self, key: str, kind: Kind[_T], default: _D) -> _T | _D:
        """The value of a key, or `default` when it is not there."""
        return self._parsed((*self.at, key), self.values[key], kind) if key in self.values else default

    def items(self, key: str, kind: Kind[_T], *, required: bool) -> tuple[_T, ...]:
        """A list of values, each of this kind; empty only when it is not required."""
        value = self.values.get(key, [])
        if required and key not in self.values:
            raise ConfigError(f"{self._place(key)}: missing; expected a list, each {kind.expected}")
        if not isinstance(value, list) or (required and not value) or len(value) > _MAX_ITEMS:
            least = "at least one" if required else "any number"
            raise self._wrong((*self.at, key), value, f"a list with {least}, at most {_MAX_ITEMS}: {kind.expected}")
        return tuple(self._parsed((*self.at, f"{key}[{index}]"), item, kind) for index, item in enumerate(value))

    def table(self, key: str, names: Collection[str] | None, *, required: bool = False) -> Table:
        """The table under this key; an empty one when it is not there and need not be."""
        if required and key not in self.values:
            raise ConfigError(f"{self._place(key)}: missing; expected a table [{dotted((*self.at, key))}]")
        return Table(self.file, (*self.at, key), self.values.get(key, {}), names)

    def error(self, key: str, expected: str, words: Collection[str] = ()) -> ConfigError:
        """For a value that is right by itself but not beside the others."""
        if key not in self.values:
            return ConfigError(f"{self._place(key)}: missing; expected {expected}")
        return self._wrong((*self.at, key), self.values[key], expected, words)

    def _parsed(self, at: tuple[str, ...], value: object, kind: Kind[_T]) -> _T:
        try:
            return kind.parse(value)
        except ValueError:
            raise self._wrong(at, value, kind.expected, kind.words) from None

    def _wrong(self, at: tuple[str, ...], value: object, expected: str, words: Collection[str] = ()) -> ConfigError:
        near = _near(value, words) if isinstance(value, str) else None
        hint = f"; did you mean {near}?" if near else ""
        return ConfigError(
            f"{printable(self.file)}: {dotted(at) or 'the whole file'}: found {shown(value)}, expected {expected}{hint}"
        )

    def _place(self, key: str) -> str:
        return f"{printable(self.file)}: {dotted((*self.at, key))}"


def parse_toml(content: bytes, file: str) -> dict[str, object]:
    """The whole file as TOML has it; ConfigError with the line when it is no TOML."""
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{printable(file)}: line {line}: found byte 0x{content[error.start]:02x}, expected UTF-8"
        ) from None
    try:
        return tomllib.loads(decoded)
    except RecursionError:
        raise ConfigError(f"{printable(file)}: found lists or tables nested too deeply, expected TOML") from None
    except ValueError as error:  # also what int() says about a number of thousands of digits
        raise ConfigError(f"{printable(file)}: not valid TOML: {printable(str(error), 300)}") from None


def dotted(at: Iterable[str]) -> str:
    """A key path as it would be written in the file: node."alpha.example.org".address."""
    pieces = []
    for key in at:
        base, bracket, index = key.partition("[")
        bare = _BARE_KEY.fullmatch(base) and (not bracket or index.rstrip("]").isdigit())
        pieces.append(key if bare else f'"{printable(key, _SHOWN)}"')
    return ".".join(pieces)


def shown(value: object) -> str:
    """A value from the file as one short harmless piece of a sentence."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{printable(value, _SHOWN)}"'
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, int | float):
        return f"the number {printable(str(value), _SHOWN)}"
    return f"the time {value}"  # TOML's dates and times


def either(words: Iterable[str], *, quoted: bool = True) -> str:
    """`"a", "b" or "c"`."""
    pieces = [f'"{word}"' if quoted else word for word in words]
    return " or ".join(filter(None, [", ".join(pieces[:-1]), pieces[-1]])) if pieces else "none"


def _in_one_unit(time: float) -> str:
    """Seconds, exact, as they are written in the file."""
    for unit, scale in (("d", 86400), ("min", 60), ("s", 1)):
        if time >= scale and time % scale == 0:
            return f"{time / scale:g}{unit}"
    return f"{time * 1000:g}ms"


def _near(word: str, words: Collection[str]) -> str | None:
    by_lower = {known.lower(): known for known in words}
    near = get_close_matches(word.lower().replace("_", "-"), by_lower, n=1)
    return by_lower[near[0]] if near else None
