"""A real AdminServer on a real socket, for tests, with a small node behind it that does what the test says.

Rules:
- The server runs in an event loop of its own, in a thread; both are gone when the `with` ends, whatever happened.
- The node really waits, promotes and resyncs as far as its status tells; nothing in it sleeps. A test changes it by
  `daemon.change(...)`, which returns when everyone who waits has been woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from mirrorpair.admin import AdminServer
from mirrorpair.control import AdminClient, ResyncPlan
from mirrorpair.errors import MirrorpairError, PeerError, UsageError
from mirrorpair.status import Arbiter, Change, EventLog, Peer, Resync, Status, Volume, holds, hopeless, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from mirrorpair.status import Condition, Event

LIMIT_S = 30.0
GIB = 1 << 30


def volume(name: str = "data", **facts: Any) -> Volume:
    return Volume(
        **{"name": name, "size": 10 * GIB, "disk": "up-to-date", "peer_disk": "up-to-date", "out_of_sync_bytes": 0}
        | facts
    )


def status(**facts: Any) -> Status:
    """Beta, primary of epoch 7, mirrored to alpha, but for `facts`; not yet judged."""
    peer = facts.pop("peer", {})
    if not isinstance(peer, Peer):
        peer = Peer(
            **{
                "node": "alpha",
                "connected": True,
                "role": "secondary",
                "heartbeat_age_s": 0.014,
                "rtt_s": 0.0003,
                "link": "connected",
                "address": "10.0.0.1:7790",
            }
            | peer
        )
    base: dict[str, Any] = {
        "pair": "shop",
        "node": "beta",
        "role": "primary",
        "epoch": 7,
        "in_sync": ["alpha", "beta"],
        "peer": peer,
        "arbiter": Arbiter(kind="none", reachable=True),
        "volumes": [volume()],
        "serving": "mirrored",
        "address": "10.0.0.2:7790",
        "heartbeat_age_s": 0.012,
    }
    return Status(**base | facts)


def resyncing() -> Status:
    """The one that 4-interface.md shows."""
    resync = Resync(
        direction="source",
        done_bytes=2899102924,
        total_bytes=4187593113,
        skipped_bytes=1780049195,
        sent_bytes=1119053729,
        rate=212 * 1048576.0,
        eta_s=5.8,
    )
    return status(
        in_sync=["beta"],
        volumes=[volume(peer_disk="inconsistent", out_of_sync_bytes=1299234816, resync=resync)],
        change=Change(text="failed over alpha -> beta", cause="heartbeat lost for 3.0 s", age_s=134.2),
    )


class SmallNode:
    """Holds a status; every method is the NodeApi's. `fails` maps a method's name to what it raises."""

    def __init__(self, first: Status) -> None:
        self.facts = first
        self.plans: list[ResyncPlan] = []
        self.fails: dict[str, Exception] = {}
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.log = EventLog(first.node)
        self.hold: asyncio.Event | None = None  # promote, demote and resync wait for it
        self.cancelled: list[str] = []
        self.finished: list[str] = []
        self.on_resync: Callable[[SmallNode], None] = lambda _node: None
        self._changed = asyncio.Condition()

    async def status(self) -> Status:
        self._called("status")
        return judge(self.facts)

    async def promote(self, *, accept_data_loss: bool, force: bool, dry_run: bool) -> str:
        await self._change("promote", accept_data_loss=accept_data_loss, force=force, dry_run=dry_run)
        if dry_run:
            return f"{self.facts.node} would become primary"
        self.facts = msgspec.structs.replace(self.facts, role="primary", epoch=self.facts.epoch + 1)
        return f"{self.facts.node} is primary of epoch {self.facts.epoch}"

    async def demote(self, *, dry_run: bool) -> str:
        await self._change("demote", dry_run=dry_run)
        if dry_run:
            return f"{self.facts.node} would become secondary"
        self.facts = msgspec.structs.replace(self.facts, role="secondary", serving="no")
        return f"{self.facts.node} is secondary"

    async def plan_resync(self, volume: str | None, *, full: bool) -> list[ResyncPlan]:
        self._called("plan_resync", volume=volume, full=full)
        if volume is not None and volume not in {entry.name for entry in self.facts.volumes}:
            raise UsageError(f"there is no volume {volume}")
        return [plan for plan in self.plans if volume in (None, plan.volume)]

    async def resync(self, volume: str | None, *, full: bool) -> str:
        await self._change("resync", volume=volume, full=full)
        self.on_resync(self)
        return "the resync is under way"

    async def wait_for(self, condition: Condition, volume: str | None = None) -> None:
        self._called("wait_for", condition=condition, volume=volume)
        try:
            async with self._changed:
                while not holds(judge(self.facts), condition, volume):
                    if reason := hopeless(judge(self.facts), condition):
                        raise PeerError(reason, 20)
                    await self._changed.wait()
        except asyncio.CancelledError:
            self.cancelled.append("wait_for")
            raise

    async def events(self, since: int) -> list[Event]:
        self._called("events", since=since)
        return self.log.since(since)

    async def set(self, facts: Status) -> None:
        async with self._changed:
            self.facts = facts
            self._changed.notify_all()

    def _called(self, name: str, **arguments: object) -> None:
        self.calls.append((name, arguments))
        if name in self.fails:
            raise self.fails[name]

    async def _change(self, name: str, **arguments: object) -> None:
        self._called(name, **arguments)
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        self.finished.append(name)


class Daemon:
    """The server and its loop. `run` runs a coroutine there and returns its result."""

    def __init__(self, path: Path, first: Status, **options: Any) -> None:
        self.path = str(path)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.logged: list[str] = []
        try:
            self.node = self.run(self._make(first))
            self.server = AdminServer(self.path, self.node, **options)
            self.run(self.server.start())
        except BaseException:
            self._stop()
            raise

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(LIMIT_S)

    def client(self, **options: Any) -> AdminClient:
        return AdminClient(self.path, **options)

    def change(self, facts: Status) -> None:
        self.run(self.node.set(facts))

    def until(self, holds: Callable[[], bool]) -> None:
        """Lets the loop run until it is so: what the server does is done in turns of the loop, which we count."""

        async def turns() -> None:
            async with asyncio.timeout(LIMIT_S):
                while not holds():
                    await asyncio.sleep(0)

        self.run(turns())

    def close_server(self) -> None:
        self.run(self.server.close())

    def close(self) -> None:
        try:
            self.close_server()
        finally:
            self._stop()

    async def _make(self, first: Status) -> SmallNode:
        return SmallNode(first)

    def _stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LIMIT_S)
        self.loop.close()


@contextlib.contextmanager
def daemon_at(path: Path, first: Status | None = None, **options: Any) -> Iterator[Daemon]:
    daemon = Daemon(path, first or status(), **options)
    try:
        yield daemon
    finally:
        daemon.close()


def failure(error: MirrorpairError | None) -> tuple[int, str]:
    assert error is not None
    return error.exit_code, str(error)
