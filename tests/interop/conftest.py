"""The pair that real NBD clients work with: the end-to-end tests' own, with a TCP port on each node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))  # its `pair` is not in a package

from mirror import Mirror

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test that passed without comparing the images has not passed."""
    result = yield
    made = pyfuncitem.funcargs.get("mirror")
    assert made is None or made.finished, "the test did not call mirror.finish()"
    return result


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    """Running and in sync, alpha primary, with the volumes `data` and `logs`. A test ends with `mirror.finish()`;
    processes and ports are released whatever it did."""
    folder = tmp_path / "m"
    folder.mkdir()
    made = Mirror(folder)
    try:
        made.up()
        yield made
    finally:
        made.end()
