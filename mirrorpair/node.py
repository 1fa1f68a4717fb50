"""The node's daemon: opens everything, joins the parts, and ends in order.

    peer link   -> nodepeer.py  \
    engine      --------------->  nodecore.py: inbox -> roles.step -> grant, actions
    commands    -> nodeadmin.py /

Rules:
- Everything is opened and locked before anything is told to anybody; what fails to start leaves nothing behind.
- SIGTERM: clients drained, everything durable on both, the peer told and its answer awaited, bits and log written,
  and only then marked as clean (A18). A second look at what may differ is not needed then.
- The sentinel (arbitrated pairs) is the first to be there and the last to go; if the end is no graceful one, it stays.
- Clients are refused in negotiation with a text that names the primary.
- Metadata that cannot be written, and errors of our own, end the daemon as a kill would: what is on the disk is true.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

from mirrorpair import __version__
from mirrorpair._core import Engine
from mirrorpair.admin import AdminServer
from mirrorpair.arbiter import Register
from mirrorpair.arbiter.lone import LoneRegister
from mirrorpair.chronicle import Scribe
from mirrorpair.errors import (
    LocalError,
    MirrorpairError,
    RefusedError,
)
from mirrorpair.handshake import Export
from mirrorpair.nbdserver import NbdServer
from mirrorpair.nodeadmin import AdminSide
from mirrorpair.nodecore import DRAIN_S, LEAVE_S, Core
from mirrorpair.nodepeer import PeerSide
from mirrorpair.noderegister import WitnessSide
from mirrorpair.nodesentinel import Keeper
from mirrorpair.nodeview import NodeView
from mirrorpair.peerlink import PeerLink
from mirrorpair.peermessages import (
    LeaveAsk,
)
from mirrorpair.rolewords import (
    PRIMARY,
    Started,
)
from mirrorpair.rolewords import Stop as StopEvent
from mirrorpair.service import Termination, notify
from mirrorpair.unbuilt import refuse_unbuilt
from mirrorpair.volumes import open_all

if TYPE_CHECKING:
    import socket

    from mirrorpair.config import Config

log = logging.getLogger("mirrorpair.node")


class Node:
    """One node of one pair, in the running event loop: `start`, then `stop` for a graceful end, then `close`."""

    def __init__(self, config: Config, name: str) -> None:
        self._core = Core(config, name)
        self._stack = contextlib.AsyncExitStack()

    @property
    def failed(self) -> asyncio.Event:
        """Set when the daemon has to end at once."""
        return self._core.failed

    def keep_sentinel(self) -> Keeper | None:
        """Starts one that watches this process, if it is of use. To be called before `start`: nothing is open then."""
        core = self._core
        if core.config.arbiter == "none":
            return None
        core.sentinel = Keeper(
            pair=core.config.name, node=core.name, process=core.process, peer=core.peer.address, timing=core.timing
        )
        core.sentinel.start()
        return core.sentinel

    async def start(self) -> None:
        """Opens everything and begins. MirrorpairError: something cannot be had; then nothing is left open."""
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        core = self._core
        core.view.event("daemon", f"{core.name} runs, version {__version__}")
        for volume in core.open.volumes:
            for problem in (volume.meta.damage, volume.obstacle()):
                if problem is not None:
                    log.warning("%s", problem)

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        core = self._core
        core.open = await asyncio.to_thread(open_all, core.config, core.me)
        stack.callback(core.open.close)
        if core.config.arbiter == "none":
            core.register = LoneRegister(core.me.record_file, core.open.value.incarnation_id)
            self._check_register()
        core.engine = Engine([volume.engine_entry() for volume in core.open.volumes], resync_rate=core.config.rate)
        stack.callback(core.engine.stop)
        if core.config.arbiter == "witness":
            core.witness = WitnessSide(core)
            stack.push_async_callback(core.witness.close)
        scribe = await asyncio.to_thread(Scribe, core.me.history_file)
        core.view = NodeView(core, scribe)
        writing = asyncio.get_running_loop().create_task(scribe.write_on())

        async def written() -> None:
            scribe.close()
            await writing

        stack.push_async_callback(written)
        core.peer_link = PeerLink(
            PeerSide(core),
            node=core.name,
            peer=core.peer.name,
            listen=core.me.address,
            dial=core.peer.address,
            timing=core.timing,
            listen_more=core.me.heartbeat_addresses,
            dial_more=core.peer.heartbeat_addresses,
        )
        # The place first: a daemon that cannot have it has not begun, and what an earlier one wrote at its end stays.
        await core.peer_link.listen()
        stack.push_async_callback(core.peer_link.stop)
        admin = AdminServer(core.me.control, AdminSide(core))
        await admin.start()
        stack.push_async_callback(admin.close)
        self._nbd = NbdServer(
            core.me.nbd,
            {volume.name: Export(size=volume.size) for volume in core.open.volumes},
            self._accept,
            refusal=self._why_no_clients,
            clients=lambda: sum(core.engine.volume_status(one.index).clients for one in core.open.volumes),
            log=log.info,
        )
        await self._nbd.start()
        stack.push_async_callback(self._nbd.close)
        started = self._started()
        settled = not (started.boot_lost or core.open.value.crashed_primary)
        await core.durable(lambda: core.open.started(settled=settled))
        core.engine.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(core.engine.event_fd, core.engine_events)
        stack.callback(loop.remove_reader, core.engine.event_fd)
        core.view.began(started)
        core.step(started)
        core.spawn(core.work())
        core.spawn(core.watch_disk())
        if core.witness is not None:
            core.spawn(core.witness.look())
        stack.push_async_callback(core.end_tasks)
        await core.peer_link.start()
        stack.push_async_callback(core.peer_link.stop)

    async def stop(self) -> None:
        """SIGTERM: clients drained, everything durable and marked so, the peer told (A18). Never raises."""
        if self._core.stopping.is_set():
            return
        self._core.stopping.set()
        self._core.drained.clear()
        self._core.post(StopEvent())
        durable = True
        if self._core.state.phase in PRIMARY:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._core.drained.wait()
            # What could not be drained may be here and not at a peer that the register takes for equal: a crash.
            durable = self._core.drained.is_set() and not self._core.drain_failed
        # From here on nothing is decided: a link that the peer drops now must not look like a loss.
        self._core.quiet = True
        await self._nbd.close()
        self._core.engine.close_clients(graceful=False)
        if self._core.peer_link.connected:
            try:
                await self._core.peer_link.ask(LeaveAsk(role=self._core.state.role), LEAVE_S)
            except MirrorpairError as error:
                if self._core.peer_leaves:
                    log.info("%s stops at the same moment, and needs no word", self._core.peer.name)
                else:
                    log.warning("%s was not told that this node stops: %s", self._core.peer.name, error)
        self._core.engine.detach_link()
        self._core.link = None
        failure = await self._core.token(self._core.engine.save, DRAIN_S)
        if failure:
            log.error("not everything could be made durable: %s", os.strerror(failure))
            durable = False
        if durable and all(volume.failed is None for volume in self._core.open.volumes):
            try:
                await self._core.durable(lambda: self._core.open.stopped(settled=self._core.settled))
            except MirrorpairError as error:
                log.error("the stop is not marked as clean: %s", error)
        log.info("%s stopped", self._core.name)

    async def close(self) -> None:
        await self._stack.aclose()

    def _check_register(self) -> None:
        """F17: a record older than what this node has seen is not believed."""
        seen = self._core.open.value.register_epoch
        record = self._core.register.copy
        if record.version and record.register.epoch < seen:
            raise RefusedError(
                f"the record of the pair's roles knows epoch {record.register.epoch}, this node has seen {seen}: it "
                "was restored from an older copy; remove it, and this node learns its peer's"
            )
        mine, pair = self._core.open.value.pair_uuid, record.register.pair_uuid
        if mine and pair and mine != pair:
            raise RefusedError("the record of the pair's roles is that of another pair")

    def _started(self) -> Started:
        file = self._core.open.value
        # An arbitrated pair's record is read later, and as often as it takes: nobody waits for the witness.
        record = self._core.register.copy.register if self._core.witness is None else Register()
        return Started(
            epoch=max(record.epoch, file.epoch),
            primary=record.primary,
            in_sync=record.in_sync,
            was_primary=file.role == "primary",
            clean=file.clean,
            boot_lost=file.boot_lost(self._core.open.boot_id),
            wait_ns=self._core.timing.obligation_ns(self._core.timing.promise_ns),
            obstacle=self._core.open.obstacle(),
        )

    # --- NBD

    def _accept(self, volume: str, sock: socket.socket, leftover: bytes) -> None:
        if self._why_no_clients() is not None:
            raise LocalError("this node does not serve any more")
        self._core.engine.add_client(sock.fileno(), self._core.open.volume(volume).index, leftover=leftover)
        sock.close()

    def _why_no_clients(self) -> str | None:
        state = self._core.state
        if self._core.stopping.is_set():
            return f"{self._core.name} is stopping"
        if state.role == "primary":
            away = state.draining or state.handing in ("asked", "unknown")
            return f"{self._core.name} gives the primary role up" if away else None
        if state.peer_role == "primary":
            return f"{self._core.name} is secondary: {self._core.peer.name} is primary"
        return f"{self._core.name} is secondary, and nobody is known to be primary"


def run(config: Config, name: str) -> int:
    """The daemon in the foreground, until SIGTERM or SIGINT; its exit code. MirrorpairError: it cannot start."""
    refuse_unbuilt(config, name)
    return asyncio.run(_run(config, name))


async def _run(config: Config, name: str) -> int:
    loop = asyncio.get_running_loop()
    with Termination() as termination:
        node = Node(config, name)
        sentinel = node.keep_sentinel()
        try:
            await node.start()
        except BaseException:
            if sentinel is not None:
                await sentinel.leave()  # nothing was served, so nobody has to know
            raise
        graceful = False
        ends = [loop.create_task(termination.asked.wait()), loop.create_task(node.failed.wait())]
        try:
            notify("READY=1")
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            notify("STOPPING=1")
            if node.failed.is_set():
                return 1
            await node.stop()
            graceful = True
            return 0
        finally:
            for end in ends:
                end.cancel()
            await node.close()
            if sentinel is not None and graceful:
                await sentinel.leave()
