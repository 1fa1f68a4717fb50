"""The JSON decoder of a type, made once.

msgspec looks a type over when it first decodes one, and keeps what it found at the type. Two threads that do so at the
same moment crash the process: one meets what the other has only begun. Whatever decodes outside a module's import asks
here, where one thread at a time makes a decoder; using one is safe everywhere.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")

_MADE: dict[object, msgspec.json.Decoder[Any]] = {}
_MAKING = threading.Lock()


def decoder(kind: type[_T]) -> msgspec.json.Decoder[_T]:
    with _MAKING:
        if kind not in _MADE:
            _MADE[kind] = msgspec.json.Decoder(kind)
        return _MADE[kind]
