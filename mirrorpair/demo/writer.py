"""The demo's clients: writers with several connections and several requests in flight, and a reader that judges.

Rules:
- A client knows both nodes and nothing of roles: when its connection ends it tries one node after the other until one
  of them serves. It never asks which.
- A write that was not answered is not repeated: its block may hold either content from then on, and the acknowledged
  one below it stays to be checked.
- Writers share no block, and a writer has no two requests in flight for one block: so the order of writes is known.
- An answer that is an error is a defect of the pair, unless it says that the server shuts down; so is any other end of
  a client than the one that was asked for. `problems` holds the sentences.
- They are paced: the machine belongs to the daemons. The pace is never part of a verdict.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from mirrorpair.demo.journal import BLOCK, Bounds, Journal, payload
from mirrorpair.demo.processes import HANG_S, VOLUME
from mirrorpair.demo.readback import Wrong, wrong_blocks
from mirrorpair.errors import PeerTimeoutError, RemoteError
from mirrorpair.nbdclient import NbdClient, NbdError, Pending, connect

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STRIPE = 16
"""Blocks that belong to one writer together: 64 KiB."""
LENGTHS = (1, 1, 1, 1, 1, 2, 3, 8, 16)
FUA_OF = 64
"""One write in so many is durable on both nodes before it is answered (FUA)."""
READS_PER_SECOND = 100.0
READ = 4
READS = 64
"""Blocks of one read; reads in flight at most. One that overlaps a write in flight waits for it; small ones are few of
those, and do not keep the others out of what a server holds for one client."""
LOOK_S = 0.05
RETRY_S = 0.01
CATCH_UP_S = 0.05
"""What a stall held up for longer is not caught up."""

Flight = tuple[Pending, int, range]


class Client(threading.Thread, ABC):
    """One that lives until it is told to leave: `leave`, well behaved, or `abort`, at once."""

    def __init__(self, name: str, paths: Sequence[Path], journal: Journal, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.problems: list[str] = []
        self.leaves = threading.Event()
        self.aborted = threading.Event()
        self._paths = [str(path) for path in paths]
        self._journal = journal
        self._rng = random.Random(seed)

    def run(self) -> None:
        try:
            while not self.over() and (client := self._find_primary()) is not None:
                try:
                    self._use(client)
                finally:
                    client.hang_up()
        except Exception as error:  # noqa: BLE001 - a client that ended is no client: it must be told
            self.problems.append(f"{self.name} ended: {type(error).__name__}: {error}")

    def over(self) -> bool:
        return self.leaves.is_set() or self.aborted.is_set()

    @abstractmethod
    def _use(self, client: NbdClient) -> None:
        """Until the connection ends, or this client is to leave."""

    def _find_primary(self) -> NbdClient | None:
        while not self.over():
            for path in self._paths:
                try:
                    return connect(path, VOLUME, timeout=HANG_S)
                except RemoteError:
                    continue
            self.leaves.wait(RETRY_S)
        return None

    def _failed(self, error: RemoteError) -> None:
        """An answer that says no. A connection's end is none."""
        if isinstance(error, NbdError) and error.errno != errno.ESHUTDOWN:
            self.problems.append(f"{self.name} was answered with an error: {error}")


class Writer(Client):
    """Writes to every `of`-th stripe, from stripe `lane` on."""

    def __init__(
        self, lane: int, of: int, paths: Sequence[Path], journal: Journal, *, depth: int, per_second: float
    ) -> None:
        super().__init__(f"writer {lane}", paths, journal, journal.seed + journal.sent + lane)
        self.depth = depth
        self._stripes = range(lane, journal.size // BLOCK // STRIPE, of)
        self.between_s = 1 / per_second
        self._due = 0.0
        self._flying: list[Flight] = []
        self._stalls = threading.Lock()
        self._waiting_since: float | None = None
        self._longest_s = 0.0

    def longest_stall_s(self, *, forget: bool = False) -> float:
        """How long it waited at most, up to now, without any answer: for one on its connection, or for a connection."""
        with self._stalls:
            longest = self._longest_s
            if self._waiting_since is not None:
                longest = max(longest, time.monotonic() - self._waiting_since)
            if forget:
                self._longest_s = 0.0
            return longest

    def _use(self, client: NbdClient) -> None:
        self._flying = []
        try:
            while not self.aborted.is_set():
                while not self.leaves.is_set() and len(self._flying) < self.depth and self._is_due():
                    self._send(client)
                if self._flying:
                    self._await_one()
                elif self.leaves.is_set():
                    return
                else:
                    self.leaves.wait(max(0.0, self._due - time.monotonic()))
        except RemoteError as error:
            self._collect()
            self._waits()  # for somebody who serves it
            self._failed(error)

    def _waits(self) -> None:
        """From now on, unless it does already."""
        with self._stalls:
            if self._waiting_since is None:
                self._waiting_since = time.monotonic()

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = max(self._due + self.between_s, now - CATCH_UP_S)
        return True

    def _send(self, client: NbdClient) -> None:
        blocks = self._choose()
        number = self._journal.start(blocks.start, len(blocks))
        self._waits()
        data = payload(self._journal.seed, number, blocks.start, len(blocks))
        fua = self._rng.randrange(FUA_OF) == 0
        self._flying.append((client.start_write(blocks.start * BLOCK, data, fua=fua), number, blocks))

    def _choose(self) -> range:
        while True:
            length = self._rng.choice(LENGTHS)
            first = self._rng.choice(self._stripes) * STRIPE + self._rng.randrange(STRIPE - length + 1)
            blocks = range(first, first + length)
            if all(blocks.stop <= busy.start or busy.stop <= blocks.start for _, _, busy in self._flying):
                return blocks

    def _await_one(self) -> None:
        """Until the oldest is answered, the next is due or somebody may want something."""
        left = self._due - time.monotonic() if len(self._flying) < self.depth else LOOK_S
        oldest = self._flying[0][0]
        try:
            oldest.wait(min(max(left, 0.0), LOOK_S))
        except PeerTimeoutError:
            if oldest.done:  # not ours, but how the connection ended
                raise
        self._collect()

    def _collect(self) -> None:
        """Enters the answers that have come; what ended without one is not waited for any more."""
        kept: list[Flight] = []
        answered = lost = 0
        for flight in self._flying:
            pending, number, _ = flight
            if not pending.done:
                kept.append(flight)
            elif pending.error is None:
                self._journal.acknowledge(number)
                answered += 1
            else:
                lost += 1
        self._flying = kept
        if answered:
            self._answered(wants_more=bool(kept or lost))

    def _answered(self, *, wants_more: bool) -> None:
        now = time.monotonic()
        with self._stalls:
            if self._waiting_since is not None:
                self._longest_s = max(self._longest_s, now - self._waiting_since)
            self._waiting_since = now if wants_more else None


class Reader(Client):
    """Reads here and there while others write, and judges what it gets: never older than the last acknowledged write
    before it asked, never newer than the last one that was sent before it was answered."""

    def __init__(self, paths: Sequence[Path], journal: Journal, *, per_second: float) -> None:
        super().__init__("the reader", paths, journal, ~journal.seed)
        self.reads = 0
        self.wrong: list[Wrong] = []
        self.last_s = 0.0
        self._between_s = 1 / per_second

    def _use(self, client: NbdClient) -> None:
        flying: list[tuple[int, Bounds, Pending]] = []
        due = 0.0
        try:
            while not self.over():
                if len(flying) < READS and (now := time.monotonic()) >= due:
                    due = now + self._between_s
                    first = self._rng.randrange(self._journal.size // BLOCK // READ) * READ
                    before = self._journal.bounds(first, READ)
                    flying.append((first, before, client.start_read(first * BLOCK, READ * BLOCK)))
                self._await_one(flying[0][2])
                flying = [one for one in flying if not self._judged(*one)]
                if not flying:
                    self.leaves.wait(self._between_s)
        except RemoteError as error:
            self._failed(error)

    def _await_one(self, oldest: Pending) -> None:
        try:
            oldest.wait(self._between_s)
        except PeerTimeoutError:
            if oldest.done:
                raise

    def _judged(self, first: int, before: Bounds, pending: Pending) -> bool:
        if not pending.done or pending.error is not None:
            return False
        after = self._journal.bounds(first, READ)
        self.wrong += wrong_blocks(self._journal.seed, first, pending.data, before, after)
        self.reads += 1
        self.last_s = time.monotonic()
        return True


class Clients:
    """All of them. A context manager: at its end they are gone, in whatever state the servers are."""

    def __init__(self, paths: Sequence[Path], journal: Journal, *, writers: int, depth: int, per_second: float) -> None:
        """`per_second`: writes that all writers together ask for at most. They go on where the journal is."""
        self.writers = [
            Writer(lane, writers, paths, journal, depth=depth, per_second=per_second / writers)
            for lane in range(writers)
        ]
        self.reader = Reader(paths, journal, per_second=READS_PER_SECOND)

    def __enter__(self) -> Self:
        for client in self._all:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._all:
            client.aborted.set()
            client.leaves.set()
        for client in self._all:
            client.join()

    @property
    def _all(self) -> list[Client]:
        return [*self.writers, self.reader]

    @property
    def problems(self) -> list[str]:
        return [problem for client in self._all for problem in client.problems]

    def ended(self) -> str | None:
        """Which of them is gone although nobody told it to leave, and why."""
        gone = next((client for client in self._all if not client.is_alive() and not client.over()), None)
        return None if gone is None else next(iter(gone.problems), f"{gone.name} ended")

    def deepen(self, depth: int) -> None:
        """So many requests in flight each from now on."""
        for writer in self.writers:
            writer.depth = depth

    def pace(self, per_second: float | None) -> None:
        """So many writes together from now on; None: as fast as they are answered."""
        for writer in self.writers:
            writer.between_s = len(self.writers) / per_second if per_second else 0.0

    def longest_stall_s(self, *, forget: bool = False) -> float:
        return max(writer.longest_stall_s(forget=forget) for writer in self.writers)

    def leave(self) -> list[str]:
        """Every write in flight is waited for, none is begun any more. Who had not left when a hang was certain."""
        for client in self._all:
            client.leaves.set()
        deadline = time.monotonic() + HANG_S
        for client in self._all:
            client.join(max(0.0, deadline - time.monotonic()))
        return [client.name for client in self._all if client.is_alive()]
