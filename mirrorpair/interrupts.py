"""Keeps an interrupt back while a result is in the making, so that a run that was begun always says what it did.

- A handler that raises (Python's own for SIGINT does) may be run between any two instructions: also after the engine
  has been started and before anybody drives it, or when it has ended and its counters are not read yet.
- `Hold` runs it in its `released()` parts only; one that came before is run at the begin of the next part. What nobody
  was told when the hold ends is in `pending`, for its owner to act upon.
- Only the main thread runs handlers, so in any other a hold does nothing.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Hold:
    """A context manager; not to be entered twice."""

    def __init__(self) -> None:
        self.pending: signal.Signals | None = None
        self._released = False
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler):  # else it is ignored, ends the process, or was not installed by Python
                    self._handlers[number] = handler
                    signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Here the handlers run as ever, and may raise."""
        number, self.pending = self.pending, None
        if number is not None:
            self._handlers[number](number, None)
        self._released = True
        try:
            yield
        finally:
            self._released = False

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._released:
            self._released = False  # if the handler raises, that part is over, whatever is left in between
            self._handlers[number](number, frame)
            self._released = True
        else:
            self.pending = signal.Signals(number)
