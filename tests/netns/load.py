"""Clients that write and read one volume all the time, several at once and the same blocks, and remember everything.

    1.204117 alpha write 381 block 7           acknowledged: a line of the journal, outside the volume

Rules:
- One request at a time for each client. What it wrote is content that no other write has; a block says itself whose it
  is (demo/journal.py).
- A client knows both nodes, unless it is bound to one, and asks one after the other until one serves. It never asks
  which is primary.
- Nothing is taken for unanswered too early: who loses patience goes to the other node, and somebody else goes on
  waiting on his connection. So the answer of a node that was frozen is heard, whenever it comes.
- An answer that is an error is a defect (`problems`), unless it says that the server shuts down.
- `judge` is the verdict: of each block whether it was one register for all who looked (registers.py), the last reading
  of the whole volume included, and of the nodes whether they ever answered in turn.
"""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pair import HANG_S
from registers import Answer, Op, fewest_terms, flaw

from mirrorpair.demo.journal import BLOCK, ZEROS, content, origin
from mirrorpair.errors import MirrorpairError, RemoteError
from mirrorpair.nbdclient import NbdClient, NbdError, Pending, connect

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pair import Daemon, Pair

HOT = 6
"""Blocks that half of all requests go to."""
PAUSE_S = 0.002
"""Between two requests of a client: the machine belongs to the daemons."""
AGAIN_S = 0.01
BOUND_S = 0.2
PIECE = 64


@dataclass(eq=False)
class Request:
    node: str
    write: bool
    block: int
    value: int | None
    called: int
    answered: int | None = None
    error: str | None = None


class History:
    """Every request of every client, and the journal of what was acknowledged."""

    def __init__(self, path: Path, seed: int, blocks: int) -> None:
        self.seed, self.blocks = seed, blocks
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self._file = path.open("x", encoding="ascii", buffering=1)
        self._changed = threading.Condition()
        self._acknowledged: Counter[tuple[str, bool]] = Counter()
        self._number = 0

    def ask(self, node: str, block: int, *, write: bool) -> Request:
        with self._changed:
            self._number += write
            request = Request(node, write, block, self._number if write else None, time.monotonic_ns())
            self.requests.append(request)
            return request

    def answer(self, request: Request, data: bytes) -> None:
        with self._changed:
            request.answered = time.monotonic_ns()
            if not request.write:
                request.value = origin(self.seed, request.block, data)
            else:
                at = request.answered / 1e9
                self._file.write(f"{at:.6f} {request.node} write {request.value} block {request.block}\n")
            self._acknowledged[request.node, request.write] += 1
            self._changed.notify_all()

    def refuse(self, request: Request, error: Exception) -> None:
        """It may have been done or not."""
        with self._changed:
            request.error = str(error)
            if isinstance(error, NbdError) and error.errno != errno.ESHUTDOWN:
                self.problems.append(f"{request}: {error}")

    def acknowledged(self, node: str | None = None, *, write: bool = True) -> int:
        with self._changed:
            return sum(n for (name, kind), n in self._acknowledged.items() if kind == write and node in (None, name))

    def waiting(self, node: str, *, write: bool) -> list[Request]:
        """What is asked of this node and not yet answered, nor ended by an error."""
        with self._changed:
            return [
                one
                for one in self.requests
                if one.node == node and one.write == write and one.answered is None and one.error is None
            ]

    def answers_to(self, node: str, since: int) -> list[Request]:
        """What this node was asked since then and has answered."""
        with self._changed:
            return [
                one for one in self.requests if one.node == node and one.called > since and one.answered is not None
            ]

    def until(self, holds: Callable[[], bool], what: Callable[[], Any]) -> None:
        """Looks at each answer; `what` is told when a hang is certain."""
        with self._changed:
            assert self._changed.wait_for(holds, HANG_S), what()

    # --- the verdict

    def flaws(self) -> list[str]:
        registers: dict[int, list[Op]] = defaultdict(list)
        for one in self.requests:
            registers[one.block].append(Op(one.write, one.value, one.called, one.answered or float("inf")))
        return [
            f"block {block}: {found}" for block, ops in sorted(registers.items()) if (found := flaw(ops)) is not None
        ]

    def terms(self) -> list[str]:
        return fewest_terms(
            [Answer(one.node, one.called, one.answered) for one in self.requests if one.answered is not None]
        )

    def close(self) -> None:
        self._file.close()


class Client(threading.Thread):
    """`patience_s`: for how long it waits for one answer before it turns to the other node; None: for ever."""

    def __init__(
        self,
        history: History,
        nodes: tuple[Daemon, ...],
        seed: int,
        *,
        writes: float,
        hot: float,
        patience_s: float | None,
    ) -> None:
        super().__init__(name=f"client {seed} of {[node.name for node in nodes]}", daemon=True)
        self.leaves = threading.Event()
        self.waiters: list[threading.Thread] = []
        self._history, self._nodes = history, nodes
        self._rng = random.Random(seed)
        self._writes, self._hot, self._patience_s = writes, hot, patience_s

    def run(self) -> None:
        turn = 0
        try:
            while not self.leaves.is_set():
                node = self._nodes[turn % len(self._nodes)]
                turn += 1
                try:
                    client = connect(node.path("nbd"), "data", timeout=self._patience_s or HANG_S)
                except RemoteError:
                    self.leaves.wait(AGAIN_S)
                    continue
                self._use(client, node)
        except Exception as error:  # noqa: BLE001 - a client that ended is no client: it must be told
            self._history.problems.append(f"{self.name} ended: {type(error).__name__}: {error}")

    def _use(self, client: NbdClient, node: Daemon) -> None:
        while not self.leaves.is_set():
            write = self._rng.random() < self._writes
            block = self._rng.randrange(HOT if self._rng.random() < self._hot else self._history.blocks)
            request = self._history.ask(node.name, block, write=write)
            pending = None
            try:
                pending = send(client, request, self._history.seed, fua=self._rng.random() < 0.02)
                data = pending.wait(self._patience_s or HANG_S)
            except RemoteError as error:
                if pending is not None and not pending.done:
                    self.waiters.append(outlast(self._history, client, pending, request))
                    return  # the connection is the waiter's now
                self._history.refuse(request, error)
                break
            self._history.answer(request, data)
            self.leaves.wait(PAUSE_S)
        client.close()


def send(client: NbdClient, request: Request, seed: int, *, fua: bool = False) -> Pending:
    at = request.block * BLOCK
    if not request.write:
        return client.start_read(at, BLOCK)
    assert request.value is not None
    return client.start_write(at, content(seed, request.value, request.block), fua=fua)


def outlast(history: History, client: NbdClient, pending: Pending, request: Request) -> threading.Thread:
    """Waits on, however long it takes, and hears what comes."""

    def wait() -> None:
        with client:
            while not pending.done:
                with contextlib.suppress(MirrorpairError):  # patience, or how it ended
                    pending.wait(HANG_S)
            if pending.error is None:
                history.answer(request, bytes(pending.data))
            else:
                history.refuse(request, pending.error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    return waiter


class Load:
    """Clients of the pair; a context manager: they have left at its end, and nothing is judged there."""

    def __init__(
        self,
        pair: Pair,
        rng: random.Random,
        *,
        clients: int = 3,
        patience_s: float | None = None,
        bound: tuple[Daemon, ...] = (),
    ) -> None:
        """`bound`: a reader more for each of these, which asks nobody else. What overlaps a write in flight is not
        answered, so it reads here and there and soon asks for another block, on another connection."""
        self.pair = pair
        self.history = History(
            pair.folder / f"journal-{rng.getrandbits(48):x}", rng.getrandbits(48), pair.size // BLOCK
        )
        self._waiters: list[threading.Thread] = []
        self._clients = [
            Client(self.history, pair.nodes, rng.getrandbits(32), writes=0.6, hot=0.5, patience_s=patience_s)
            for _ in range(clients)
        ]
        self._clients += [
            Client(self.history, (node,), rng.getrandbits(32), writes=0.0, hot=0.0, patience_s=BOUND_S)
            for node in bound
        ]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.leaves.set()

    def end(self) -> None:
        """Once no daemon runs any more: nothing of it is left, whatever the test came to."""
        self.__exit__()
        for client in self._clients:
            client.join(HANG_S)
        for waiter in self._all_waiters():
            waiter.join(HANG_S)
        self.history.close()

    def _all_waiters(self) -> list[threading.Thread]:
        return [*self._waiters, *(waiter for client in self._clients for waiter in client.waiters)]

    def acknowledges(self, more: int = 60, node: Daemon | None = None) -> None:
        """Waits until so many further writes are acknowledged, by that node."""
        name = node.name if node else None
        goal = self.history.acknowledged(name) + more
        self.history.until(
            lambda: self.history.acknowledged(name) >= goal,
            lambda: f"{name or 'nobody'} acknowledges no more: {self.history.problems[:3]}\n{self.pair.logs()}",
        )

    def lines(self, node: Daemon) -> list[NbdClient]:
        """Connections for `ask`, to be had before the node is in no state to give one."""
        return [connect(node.path("nbd"), "data", timeout=HANG_S) for _ in range(2)]

    def ask(self, node: Daemon, lines: list[NbdClient] | None = None) -> None:
        """A read and a write of this node, on a connection of their own each. Nobody waits for the answers: whatever
        comes of them is part of the history."""
        if lines is None:
            try:
                lines = [connect(node.path("nbd"), "data", timeout=0.5) for _ in range(2)]
            except RemoteError:
                return  # it takes no client: that is an answer too
        for client, write in zip(lines, (False, True), strict=True):
            request = self.history.ask(node.name, 0, write=write)
            try:
                pending = send(client, request, self.history.seed)
            except RemoteError as error:
                self.history.refuse(request, error)
                client.close()
            else:
                self._waiters.append(outlast(self.history, client, pending, request))

    def leave(self) -> None:
        """Every client has got its answer and is gone; those of lost connections may be waited for still."""
        self.__exit__()
        for client in self._clients:
            client.join(HANG_S)
            assert not client.is_alive(), f"{client.name} has no answer\n{self.pair.logs()}"

    def read_back(self, node: Daemon) -> bytes:
        """The whole volume as this node tells it, which is part of the history."""
        touched = {one.block for one in self.history.requests}
        whole = bytearray()
        with node.client() as client:
            for first in range(0, self.history.blocks, PIECE):
                blocks = range(first, first + PIECE)
                asked = [self.history.ask(node.name, block, write=False) for block in blocks if block in touched]
                piece = client.read(first * BLOCK, PIECE * BLOCK)
                for request in asked:
                    at = (request.block - first) * BLOCK
                    self.history.answer(request, piece[at : at + BLOCK])
                whole += piece
            client.flush()
        untouched = set(range(self.history.blocks)) - touched
        strange = [block for block in untouched if whole[block * BLOCK : (block + 1) * BLOCK] != ZEROS]
        assert not strange, f"what nobody asked for was written: {strange}"
        return bytes(whole)

    def judge(self, terms: list[str]) -> None:
        """Once no daemon runs any more. `terms`: who answered one after the other."""
        for waiter in self._all_waiters():
            waiter.join(HANG_S)
            assert not waiter.is_alive(), "somebody still waits although no daemon runs"
        self.history.close()
        assert self.history.problems == [], self.pair.logs()
        found = self.history.flaws()
        assert not found, "\n".join([*found[:10], self.pair.logs()])
        assert self.history.terms() == terms, self.pair.logs()
