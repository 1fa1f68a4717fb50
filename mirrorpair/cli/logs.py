"""The daemon's log on stderr: one line an event, plain or (--json) one JSON object a line.

Rules:
- A line is one line: what it quotes from elsewhere cannot break it or forge another.
- The same message is written at most REPEATS times a second; what was left out is counted, and told when it may be
  written again, so that a flapping link or a hostile client cannot fill a disk.
- -q errors and warnings, otherwise what happens, -v also what is only of use to a developer.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mirrorpair.text import printable

if TYPE_CHECKING:
    from mirrorpair.cli.common import Settings

REPEATS = 5
KINDS = 1000  # of messages that are counted at a time


class RepeatFilter(logging.Filter):
    """By the message before its values are filled in, or by the whole of one that is nothing but its value; time is the
    record's own."""

    def __init__(self) -> None:
        super().__init__()
        self._second: dict[str, tuple[int, int]] = {}  # message -> (the second, how many in it)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage() if record.msg == "%s" else str(record.msg)
        second = int(record.created)
        began, count = self._second.get(message, (second, 0))
        if began == second:
            self._second[message] = (second, count + 1)
            self._forget()
            return count < REPEATS
        self._second[message] = (second, 1)
        if count > REPEATS:
            record.left_out = count - REPEATS
        return True

    def _forget(self) -> None:
        while len(self._second) > KINDS:
            del self._second[next(iter(self._second))]


class PlainFormatter(logging.Formatter):
    """2026-03-01T12:00:00.123Z warning: the message"""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        return f"{_time(record)} {level}{_message(record)}"


class JsonFormatter(logging.Formatter):
    """{"type":"log","time":,"level":,"logger":,"message":}; what a caller adds by `extra={"event": {...}}` is in it
    too."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "type": "log",
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        event = getattr(record, "event", None)
        if isinstance(event, dict):
            line |= {key: value for key, value in event.items() if key not in line}
        return json.dumps(line, default=str)


def log_to_stderr(settings: Settings) -> None:
    """From here on what the package logs goes to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.json else PlainFormatter())
    handler.addFilter(RepeatFilter())
    logger = logging.getLogger("mirrorpair")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if settings.quiet else logging.DEBUG if settings.verbose else logging.INFO)
    logging.raiseExceptions = False  # a closed stderr is no reason for a traceback, nor to stop


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    left_out = getattr(record, "left_out", 0)
    more = f" ({left_out} more like it were left out)" if left_out else ""
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        text += f": {type(error).__name__}: {error}"
    return printable(text) + more
