"""The pair that the end-to-end tests work with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from model import Model
from pair import Pair

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """`make_pair(size=..., survivor=...)`; its processes end with the test."""
    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        folder = tmp_path / f"p{len(made)}"
        folder.mkdir()
        made.append(Pair(folder, **options))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.end()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def model(pair: Pair, rng: random.Random) -> Model:
    return Model(pair.size, rng)
