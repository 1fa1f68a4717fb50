"""What requests cost while they wait for a grant: every look at them compares each with those in front of it.

One run holds all sizes, so the table's ratios tell how the cost grows; 64 times as many may cost 64 times as much, not
4096 times. `idle` is the share of a core that a node uses while thousands of held writes wait and nothing happens.
"""

from __future__ import annotations

import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mirrorpair import _core

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from engineside import MIB, TRIM, WRITE, Client, Node

if TYPE_CHECKING:
    from collections.abc import Iterator

PER_CLIENT = 250
SECONDS = 0.5


@pytest.fixture
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory() as folder, Node(Path(folder), "a", (1024 * MIB,)) as made:
        made.grant(_core.GRANT_PEER)  # without a peer: writes wait
        yield made


def wait_in_line(node: Node, clients: int, kind: int) -> None:
    """`clients` x 250 requests of one byte, a page apart, that nothing lets begin."""
    for k in range(clients):
        data = b"x" if kind == WRITE else b""
        heads = (
            struct.pack(">IHHQQI", 0x25609513, 0, kind, i, (k * PER_CLIENT + i) * 4096, 1) + data
            for i in range(PER_CLIENT)
        )
        Client(node).sock.sendall(b"".join(heads))
    node.flush()
    node.flush()


@pytest.mark.parametrize("clients", [1, 16, 64])
def test_a_look_at_those_that_wait(benchmark: Any, node: Node, clients: int) -> None:
    wait_in_line(node, clients, TRIM)
    benchmark.group = "waiting: two barriers while so many trims wait"
    benchmark.extra_info["waiting"] = clients * PER_CLIENT

    def look() -> None:
        node.flush()  # its end makes them be looked at
        node.flush()

    benchmark.pedantic(look, rounds=5)


def test_idle_share_of_a_core(benchmark: Any, node: Node) -> None:
    wait_in_line(node, 16, WRITE)
    benchmark.group = "waiting: processor seconds in half a second, 4000 held writes"

    def used() -> float:
        begin = time.process_time()
        time.sleep(SECONDS)  # the span that is measured
        return time.process_time() - begin

    benchmark.extra_info["share_of_a_core"] = benchmark.pedantic(used, rounds=3) / SECONDS
