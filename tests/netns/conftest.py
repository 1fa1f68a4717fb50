"""Worlds of the tests with network namespaces: a pair and a witness on three hosts, and clients beside them.

Rules:
- A host is a network namespace (network.py). Clients and whoever administrates are on no network: they use unix
  sockets, and reach a node that is cut off from everybody. That is how it is seen that it says nothing.
- It needs root and Debian's nftables and iproute2; where one is missing the tests are skipped and say which.
- Whatever happens, processes, namespaces, rules and groups are gone at the end of the test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE.parent / "e2e"))  # pair.py

from network import Network  # noqa: E402
from world import World  # noqa: E402

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator


@pytest.fixture
def network(root: None, need_tool: Callable[[str], str]) -> Iterator[Network]:
    for tool in ("ip", "nft", "nsenter"):
        need_tool(tool)
    try:
        made = Network()
    except PermissionError as error:
        pytest.skip(f"no network namespaces can be had here: {error}")
    with made:
        yield made


@pytest.fixture
def make_world(network: Network, tmp_path: Path, rng: random.Random) -> Iterator[Callable[..., World]]:
    """`make_world(promise=...)`, once; its processes end with the test."""
    made: list[World] = []

    def make(**options: Any) -> World:
        folder = tmp_path / f"p{len(made)}"
        folder.mkdir()
        made.append(World(network, folder, rng, **options))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.end()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
