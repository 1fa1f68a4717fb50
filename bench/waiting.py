"""Times one engine whose requests wait; bench_waiting.py runs it in a process of its own, `python -P` (see there).

Usage: waiting.py look CLIENTS | idle CLIENTS. Prints a JSON list: for `look` the seconds of each of five looks, for
`idle` the processor seconds used in each of three half seconds.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from engineside import MIB, TRIM, WRITE, Client, Node

from mirrorpair import _core

PER_CLIENT = 250
SECONDS = 0.5


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


def look(node: Node) -> float:
    """Seconds of two barriers; the end of each makes all that wait be looked at."""
    begin = time.perf_counter()
    node.flush()
    node.flush()
    return time.perf_counter() - begin


def idle(_: Node) -> float:
    begin = time.process_time()
    time.sleep(SECONDS)  # the span that is measured
    return time.process_time() - begin


def main(what: str, clients: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Node(Path(folder), "a", (1024 * MIB,)) as node:
        node.grant(_core.GRANT_PEER)  # without a peer: writes wait
        wait_in_line(node, clients, TRIM if what == "look" else WRITE)
        print(json.dumps([look(node) for _ in range(5)] if what == "look" else [idle(node) for _ in range(3)]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
