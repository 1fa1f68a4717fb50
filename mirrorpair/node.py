"""The node's daemon: the only place where decision meets effect. It reads what happened, asks roles.py, and acts.

    peer link, engine, control socket, timer  ->  inbox  ->  roles.step  ->  grant to the engine, then the actions

Rules:
- One event at a time: the inbox is a queue with one reader. What takes long (a swap, draining) runs beside it and comes
  back as an event.
- Durable first: an epoch, an in-sync set, a generation, `inconsistent` are on the disk before the event that says so is
  in the inbox, hence before a grant or a frame can follow from it (A4, A1, G2, R1).
- The grant is set after every step, from the state alone. A hung daemon loses it by itself where the peer could take
  over (A10).
- What an earlier end left open (crashed as primary, lost its boot) stays in the node file as it was until the data are
  known to be equal, or this node has become primary: a second crash must not make it forget the first.
- A step that did something is one line in the log: its sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING, ClassVar

from mirrorpair import __version__, roles
from mirrorpair._core import NO_LIMIT, PLAN_BITMAP, PLAN_FULL, PLAN_NONE, Engine
from mirrorpair.admin import AdminServer
from mirrorpair.arbiter import Incarnation, Register, Swap, Writer
from mirrorpair.arbiter.lone import LoneRegister
from mirrorpair.datalink import Party, negotiate
from mirrorpair.errors import (
    LocalError,
    MirrorpairError,
    PeerError,
    PeerTimeoutError,
    RefusedError,
    UnreachableError,
)
from mirrorpair.handshake import Export
from mirrorpair.history import MAX_ID, Ids
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.liveness import Timing
from mirrorpair.nbdserver import NbdServer
from mirrorpair.nodeview import NodeView
from mirrorpair.pairing import side_to_facts
from mirrorpair.peerdata import Stopped
from mirrorpair.peerlink import PeerLink
from mirrorpair.peermessages import (
    Beat,
    Facts,
    Hello,
    LeaveAsk,
    Plan,
    RelinkAsk,
    Shape,
    Stop,
    SwapAsk,
    SyncedAsk,
    from_hex,
    to_hex,
)
from mirrorpair.peersocket import Backoff
from mirrorpair.rolewords import (
    PRIMARY,
    Answer,
    CaughtUp,
    Demote,
    Drain,
    Drained,
    DropLink,
    GenerationBegan,
    HangUp,
    LinkLost,
    LinkUp,
    PeerDown,
    PeerLeft,
    PeerSaid,
    PeerUp,
    Phase,
    Promote,
    RecordChanged,
    Started,
    State,
    Swapped,
    Synced,
    Tick,
)
from mirrorpair.rolewords import Stop as StopEvent
from mirrorpair.status import Event as LoggedEvent
from mirrorpair.status import Refusal, holds, hopeless
from mirrorpair.text import printable
from mirrorpair.volumes import OpenNode, OpenVolume, finish_source, finish_target, open_all, prepare, side_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from mirrorpair.config import Config
    from mirrorpair.control import ResyncPlan
    from mirrorpair.datalink import Made
    from mirrorpair.history import Decision
    from mirrorpair.pairing import Agreement
    from mirrorpair.peerdata import DataConnection
    from mirrorpair.peermessages import Ask
    from mirrorpair.rolewords import Action, Event, RoleName
    from mirrorpair.rolewords import Swap as SwapAction
    from mirrorpair.status import Condition, Status

LINK_TIMEOUT_S = 6.0  # F8: a secondary whose disk hangs leaves the set
SWAP_S = 2.0
SYNCED_S = 30.0
DRAIN_S = 30.0
LEAVE_S = 10.0
SLOW_CODE = 13
SLOW_S = (1.0, 60.0)  # a peer that was too slow is left alone for so long, growing
SERVING_S = 15.0
WATCH_S = 0.05
_PLANS = {"none": PLAN_NONE, "bitmap": PLAN_BITMAP, "full": PLAN_FULL}

log = logging.getLogger("mirrorpair.node")


class Link:
    """The data link that the engine has."""

    def __init__(self, session: int, source: bool, made: Made, open_volumes: set[int]) -> None:
        self.session = session
        self.source = source
        self.made = made
        self.open_volumes = open_volumes
        """indexes of volumes whose resync has not ended"""
        self.since = time.monotonic()


class Node:
    """One node of one pair, in the running event loop. `start`, `stopped.wait`, `close`; the methods of
    `admin.NodeApi` between them."""

    def __init__(self, config: Config, name: str) -> None:
        self.config = config
        self.name = name
        self.me = config.node(name)
        self.peer = config.peer_of(name)
        beat = config.heartbeat
        self.timing = Timing(
            interval_ns=round(beat.interval * 1e9),
            promise_ns=round(beat.promise * 1e9),
            suspect_after=beat.suspect_after,
        )
        self.state = State(
            me=name,
            peer=self.peer.name,
            survivor=config.survivor,
            suspect_ns=self.timing.suspect_ns,
            retry_ns=self.timing.interval_ns,
        )
        self.link: Link | None = None
        self.refusal: Refusal | None = None
        self.decisions: dict[str, Decision] = {}
        self.peer_beat: Beat | None = None
        self.survivor_flag = False
        """its peer was lost as a connected primary (F18)"""
        self._peer_boot: str | None = None
        """the peer's boot in the last data link"""
        self._process = secrets.token_hex(8)
        self._slow = Backoff(SLOW_S, random.Random())
        self._slow_until = 0.0
        self._inbox: asyncio.Queue[Event | Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._disk = asyncio.Lock()
        self._tokens: dict[int, asyncio.Future[int]] = {}
        self._clients_closed = asyncio.Event()
        self._drained = asyncio.Event()
        self._quiet = False
        self._answer: asyncio.Future[Answer] | None = None
        self._admin = asyncio.Lock()
        self._changed = asyncio.Event()
        self._granted: tuple[int, int, int] | None = None
        self._facts_version = 0
        self._ticking: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Event = asyncio.Event()
        self.failed = asyncio.Event()
        """an internal error, or metadata that cannot be written: the daemon must end, as by kill"""

    # --- opening and closing

    async def start(self) -> None:
        """Opens everything and begins. MirrorpairError: something cannot be had; then nothing is left open."""
        self.open: OpenNode = await asyncio.to_thread(open_all, self.config, self.me)
        stack = contextlib.AsyncExitStack()
        async with stack:
            stack.callback(self.open.close)
            self.register = LoneRegister(os.path.join(self.me.folder, "register"), self.open.value.incarnation_id)
            self._check_register()
            self.engine = Engine([volume.engine_entry() for volume in self.open.volumes])
            stack.callback(self.engine.stop)
            self.view = NodeView(self)
            self.peer_link = PeerLink(
                self,
                node=self.name,
                peer=self.peer.name,
                listen=self.me.address,
                dial=self.peer.address,
                timing=self.timing,
            )
            exports = {volume.name: Export(size=volume.size) for volume in self.open.volumes}
            self.nbd = NbdServer(
                self.me.nbd,
                exports,
                self._accept,
                refusal=self._why_no_clients,
                clients=lambda: sum(self.engine.volume_status(v.index).clients for v in self.open.volumes),
                log=log.info,
            )
            self.admin = AdminServer(self.me.control, self)
            await self.admin.start()
            stack.push_async_callback(self.admin.close)
            await self.nbd.start()
            stack.push_async_callback(self.nbd.close)
            started = self._started()
            await self._durable(lambda: self.open.started(settled=not (started.boot_lost or self._crashed())))
            self.engine.start()
            loop = asyncio.get_running_loop()
            loop.add_reader(self.engine.event_fd, self._engine_events)
            stack.callback(loop.remove_reader, self.engine.event_fd)
            self._step(started)
            self._spawn(self._work())
            stack.push_async_callback(self._end_tasks)
            await self.peer_link.start()
            stack.push_async_callback(self.peer_link.stop)
            self._stack = stack.pop_all()
        self.view.event("daemon", f"{self.name} runs, version {__version__}")
        for volume in self.open.volumes:
            if (obstacle := volume.obstacle()) is not None:
                log.warning("%s", obstacle)

    async def stop(self) -> None:
        """SIGTERM: clients drained, everything durable and marked so, the peer told (A18). Never raises."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._drained.clear()
        self._post(StopEvent())
        if self.state.phase in PRIMARY:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._drained.wait()
        # From here on nothing is decided: a link that the peer drops now must not look like a loss.
        self._quiet = True
        await self.nbd.close()
        durable = True
        if self.peer_link.connected:
            try:
                await self.peer_link.ask(LeaveAsk(role=self.state.role), LEAVE_S)
            except MirrorpairError as error:
                log.warning("%s was not told that this node stops: %s", self.peer.name, error)
        self.engine.close_clients(graceful=False)
        self.engine.detach_link()
        self.link = None
        failure = await self._token(self.engine.save, DRAIN_S)
        if failure:
            log.error("not everything could be made durable: %s", os.strerror(failure))
            durable = False
        if durable and all(volume.failed is None for volume in self.open.volumes):
            try:
                await self._durable(lambda: self.open.stopped(settled=self._settled))
            except MirrorpairError as error:
                log.error("the stop is not marked as clean: %s", error)
        log.info("%s stopped", self.name)

    async def close(self) -> None:
        await self._stack.aclose()

    async def _end_tasks(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._ticking is not None:
            self._ticking.cancel()

    def _check_register(self) -> None:
        """F17: a record older than what this node has seen is not believed."""
        seen = self.open.value.register_epoch
        record = self.register.copy
        if record.version and record.register.epoch < seen:
            raise RefusedError(
                f"the record of the pair's roles knows epoch {record.register.epoch}, this node has seen {seen}: it was "
                "restored from an older copy; remove it, and this node learns its peer's"
            )
        mine, pair = self.open.value.pair_uuid, record.register.pair_uuid
        if mine and pair and mine != pair:
            raise RefusedError("the record of the pair's roles is that of another pair")

    def _crashed(self) -> bool:
        return self.open.value.crashed_primary

    def _started(self) -> Started:
        file, record = self.open.value, self.register.copy.register
        return Started(
            epoch=max(record.epoch, file.epoch),
            primary=record.primary,
            in_sync=record.in_sync,
            was_primary=file.role == "primary",
            clean=file.clean,
            boot_lost=file.boot_lost(self.open.boot_id),
            wait_ns=self.timing.obligation_ns(self.timing.promise_ns),
            obstacle=self.open.obstacle(),
        )

    @property
    def _settled(self) -> bool:
        return not (self.state.crashed or self.state.boot_lost)

    # --- the inbox: one event at a time

    def _post(self, event: Event | Callable[[], Awaitable[None]]) -> None:
        self._inbox.put_nowait(event)

    async def _work(self) -> None:
        while True:
            item = await self._inbox.get()
            if callable(item):
                await item()
            else:
                self._step(item)

    def _step(self, event: Event) -> None:
        if self._quiet and not isinstance(event, RecordChanged):
            return
        before = self.state
        state, actions, sentence = roles.step(before, event, clock_boottime_ns())
        self.state = state
        if (state.role, state.phase, state.epoch, state.in_sync, state.linked) != (
            before.role,
            before.phase,
            before.epoch,
            before.in_sync,
            before.linked,
        ) or actions:
            self._facts_version += 1
            log.info("%s", sentence)
            self.view.stepped(before, state, sentence)
        else:
            log.debug("%s", sentence)
        self._grant()
        self._arm()
        for action in actions:
            self._do(action)
        self._changed.set()

    def _grant(self) -> None:
        mode = int(roles.mode_of(self.state))
        until = self.peer_link.heart.beats.valid_until_ns if roles.bounded(self.state) else NO_LIMIT
        grant = (self.state.epoch, until, mode)
        if grant != self._granted:
            self._granted = grant
            self.engine.set_grant(*grant)

    def _arm(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        if self.state.deadline_ns is not None:
            wait = max(0.0, (self.state.deadline_ns - clock_boottime_ns()) / 1e9)
            self._ticking = asyncio.get_running_loop().call_later(wait + 0.001, self._post, Tick())

    # --- actions

    def _do(self, action: Action) -> None:
        if isinstance(action, Answer):
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(action)
        elif isinstance(action, HangUp):
            self.engine.close_clients(graceful=False)
        elif isinstance(action, DropLink):
            self._drop_link(action.why)
        elif isinstance(action, Drain):
            self._drained.clear()
            self._spawn(self._drain())
        else:
            self._spawn(self._swap(action))

    def _drop_link(self, why: str) -> None:
        """Also at the peer, whose engine would call it a loss."""
        had, self.link = self.link, None
        if had is not None:
            self.engine.detach_link()
            log.info("data link with %s ended: %s", self.peer.name, why)
        if self.peer_link.connected and not self.state.peer_left and not self._stopping.is_set():
            if had is not None:
                self._spawn(self._tell_relink(why))
            self.peer_link.want_data()

    async def _tell_relink(self, why: str) -> None:
        with contextlib.suppress(MirrorpairError):
            await self.peer_link.ask(RelinkAsk(why=printable(why, 500)))

    async def _drain(self) -> None:
        self._clients_closed.clear()
        self.engine.close_clients(graceful=True)
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._clients_closed.wait()
        except TimeoutError:
            log.warning("clients did not end within %g s: they are hung up on", DRAIN_S)
            self.engine.close_clients(graceful=False)
        error = await self._token(self.engine.barrier, DRAIN_S)
        if error:
            log.error("the last writes could not be made durable on both nodes: %s", os.strerror(error))
        self._drained.set()
        self._post(Drained())

    async def _swap(self, action: SwapAction) -> None:
        """The register first at the peer, then here; around it the node file (A13, A4)."""
        version, old = self.register.copy.version, self.register.copy.register
        new = Register(
            pair_uuid=self.open.value.pair_uuid or old.pair_uuid,
            epoch=action.epoch,
            primary=action.primary,
            in_sync=action.in_sync,
            members={**old.members, self.name: self._incarnation()},
            mode=self.config.mode,
            writer=Writer(node=self.name, nonce=secrets.randbits(48)),
        )
        try:
            if action.epoch > old.epoch:
                await self._durable(lambda: self.open.raise_epoch_floor(action.epoch))
            result = await self.register.cas(version, new)
            if result is Swap.OK:
                role: RoleName = "primary" if action.primary == self.name else "secondary"
                takes = action.purpose in ("promote", "readopt")
                await self._durable(
                    lambda: self.open.learned(
                        epoch=action.epoch, version=version + 1, role=role, settled=takes or self._settled
                    )
                )
        except MirrorpairError as error:
            self._post(Swapped(action, False, str(error)))
            return
        why = {
            Swap.OK: "",
            Swap.CONFLICT: f"{self.peer.name} did not agree, or changed the roles itself at this moment",
            Swap.UNKNOWN: f"{self.peer.name} did not answer",
        }[result]
        self._post(Swapped(action, result is Swap.OK, why))

    async def _ask_swap(self, version: int, new: Register) -> Swap:
        try:
            said = await self.peer_link.ask(SwapAsk(version=version, register=new), SWAP_S)
        except PeerError:
            return Swap.CONFLICT
        except (UnreachableError, PeerTimeoutError):
            return Swap.UNKNOWN
        return Swap.OK if said == "ok" else Swap.CONFLICT

    # --- what the engine says

    def _engine_events(self) -> None:
        for kind, a, b, text in self.engine.take_events():
            handler = self._ENGINE.get(kind)
            if handler is not None:
                handler(self, a, b, text)
        self._changed.set()

    def _link_lost(self, session: int, code: int, text: str) -> None:
        link = self.link
        if link is None or link.session != session:
            return
        self.link = None
        log.warning("data link with %s lost: %s", self.peer.name, text)
        if time.monotonic() - link.since > SLOW_S[1]:
            self._slow.reset()
        if code == SLOW_CODE:
            self._slow_until = time.monotonic() + self._slow.delay()
        if self.state.peer_role == "primary" and not self.state.peer_left:
            self.survivor_flag = True
        self._post(LinkLost(f"data link with {self.peer.name} lost: {text}"))
        self.peer_link.want_data()

    def _need_generation(self, _a: int, _b: int, _text: str) -> None:
        self._spawn(self._begin_generation())

    async def _begin_generation(self) -> None:
        try:
            await self._durable(lambda: self.open.began_alone(_new_id))
        except MirrorpairError as error:
            log.error("no write is answered alone: %s", error)
            return
        self._post(GenerationBegan())

    def _resync_done(self, index: int, _b: int, _text: str) -> None:
        link = self.link
        if link is not None and link.source:
            self._spawn(self._finish_resync(link, self.open.volumes[index]))

    async def _finish_resync(self, link: Link, volume: OpenVolume) -> None:
        """G4, at the source: the target makes our ids its own and says so, then our bitmap id may go."""
        ids = volume.block.ids
        ask = SyncedAsk(
            session=to_hex(link.session),
            volume=volume.name,
            current=to_hex(ids.current),
            history=[to_hex(one) for one in (ids.bitmap, *ids.history) if one][:32],
        )
        try:
            await self.peer_link.ask(ask, SYNCED_S)
            if self.link is not link:
                return
            await self._durable(lambda: finish_source(volume))
        except MirrorpairError as error:
            log.warning("volume %s: the end of its resync is not known to both: %s", volume.name, error)
            if self.link is link:
                self._drop_link("the end of a resync is not known to both")
                self._post(LinkLost("the end of a resync is not known to both nodes"))
            return
        self.view.event("resync", f"{self.peer.name} has everything of {volume.name}", volume=volume.name)
        self._volume_equal(link, volume.index)

    def _volume_equal(self, link: Link, index: int) -> None:
        link.open_volumes.discard(index)
        if self.link is link and not link.open_volumes:
            self._all_equal(link)

    def _all_equal(self, link: Link) -> None:
        """Nothing differs any more: what was left open by an earlier end is settled."""
        self.survivor_flag = False
        was_settled = self._settled

        async def settle() -> None:
            if self.link is not link:
                return
            if not was_settled:
                await self._durable(lambda: self.open.settled(self.state.role))
            self._step(CaughtUp())
            if link.source:
                self._step(Synced())

        self._post(settle)

    def _disk_error(self, index: int, number: int, text: str) -> None:
        volume = self.open.volumes[index]
        log.error("volume %s: %s: %s", volume.name, text, os.strerror(number))
        if volume.failed is None:
            volume.failed = f"{text}: {os.strerror(number)}"
            self.view.event("disk", volume.failed, volume=volume.name, new="failed")

    def _clients_gone(self, _a: int, _b: int, _text: str) -> None:
        self._clients_closed.set()

    def _token_done(self, token: int, error: int, _text: str) -> None:
        future = self._tokens.pop(token, None)
        if future is not None and not future.done():
            future.set_result(error)

    def _noted(self, _a: int, _b: int, _text: str) -> None:
        """Only the status changes."""

    _ENGINE: ClassVar[dict[str, Callable[[Node, int, int, str], None]]] = {
        "link-lost": _link_lost,
        "need-generation": _need_generation,
        "clients-closed": _clients_gone,
        "client": _noted,
        "disk-error": _disk_error,
        "journal-error": _disk_error,
        "bits-merged": _noted,
        "resync-done": _resync_done,
        "flushed": _token_done,
        "saved": _token_done,
    }

    async def _token(self, ask: Callable[[int], None], timeout: float) -> int:
        """0, or the errno with which it ended."""
        token = secrets.randbits(48)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tokens[token] = future
        ask(token)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            return 110  # ETIMEDOUT
        finally:
            self._tokens.pop(token, None)

    # --- NBD

    def _accept(self, volume: str, sock: socket.socket, leftover: bytes) -> None:
        if self._why_no_clients() is not None:
            raise LocalError("this node does not serve any more")
        self.engine.add_client(sock.fileno(), self.open.volume(volume).index, leftover=leftover)
        sock.close()

    def _why_no_clients(self) -> str | None:
        state = self.state
        if self._stopping.is_set():
            return f"{self.name} is stopping"
        if state.role == "primary":
            return f"{self.name} gives the primary role up" if state.draining else None
        if state.peer_role == "primary":
            return f"{self.name} is secondary: {self.peer.name} is primary"
        return f"{self.name} is secondary, and nobody is known to be primary"

    # --- what the peer link asks and says (peercontrol.ControlHandler, peerlink.PeerHandler)

    def _incarnation(self) -> Incarnation:
        return Incarnation(id=self.open.value.incarnation_id, n=self.open.value.incarnation)

    def hello(self, session: str) -> Hello:
        return Hello(
            version=__version__,
            pair=self.config.name,
            pair_uuid=self.open.value.pair_uuid,
            node=self.name,
            mode=self.config.mode,
            survivor=self.config.survivor,
            boot_id=self.open.boot_id,
            incarnation=self._incarnation(),
            process=self._process,
            session=session,
            role=self.state.role,
            epoch=self.state.epoch,
            record=self.register.copy,
            shapes=[Shape(name=v.name, size=v.size, block_size=v.block_size) for v in self.open.volumes],
        )

    def check(self, hello: Hello) -> str | None:
        mine = self.hello("0")
        for what, ours, theirs in (
            ("pair", mine.pair, hello.pair),
            ("mode", mine.mode, hello.mode),
            ("survivor", mine.survivor, hello.survivor),
        ):
            if ours != theirs:
                return f"its {what} is {printable(theirs, 80)}, ours {ours}"
        if mine.pair_uuid and hello.pair_uuid and mine.pair_uuid != hello.pair_uuid:
            return (
                f"it belongs to another pair of this name ({hello.pair_uuid}, ours is {mine.pair_uuid}): one of the two "
                "was made anew"
            )
        if mine.shapes != hello.shapes:
            return f"its volumes are {_shown(hello.shapes)}, ours {_shown(mine.shapes)}"
        return None

    def peer_refused(self, reason: str) -> None:
        if not self.peer_link.connected:
            self._refuse(Refusal(kind="refused", reason=reason))

    def peer_up(self, hello: Hello) -> None:
        self.register.ask_peer = self._ask_swap
        self.peer_beat = None
        log.info("%s is connected: %s of epoch %d, version %s", hello.node, hello.role, hello.epoch, hello.version)
        self.view.event("link", f"{hello.node} is connected")
        self._post(lambda: self._meet(hello))

    def peer_down(self, reason: str, last_heard_ns: int | None) -> None:
        self.register.ask_peer = None
        self.peer_beat = None
        if self.state.linked and self.state.peer_role == "primary" and not self.state.peer_left:
            self.survivor_flag = True
        self.view.event("link", reason)
        self._post(PeerDown(reason, last_heard_ns))

    async def _meet(self, hello: Hello) -> None:
        """L0: the two records become one, before anything follows from who the peer is."""
        control = self.peer_link.control
        if control is None or control.hello is not hello:
            return
        if hello.record is not None:
            try:
                changed = self.register.meet(hello.record)
            except MirrorpairError as error:
                self._refuse(Refusal(kind="refused", reason=str(error)))
                return
            if changed:
                await self._record_changed()
        self._step(PeerUp(hello.role, hello.epoch))
        self.peer_link.want_data()

    async def _record_changed(self) -> None:
        record = self.register.copy
        register = record.register
        role: RoleName = "primary" if register.primary == self.name and self.state.role == "primary" else "secondary"
        await self._durable(
            lambda: self.open.learned(epoch=register.epoch, version=record.version, role=role, settled=self._settled)
        )
        self._step(RecordChanged(max(register.epoch, self.state.epoch), register.primary, register.in_sync))

    def beat(self, seq: int) -> Beat:
        return Beat(
            seq=seq,
            epoch=self.state.epoch,
            floor=max(self.state.epoch, self.open.value.epoch_floor),
            role=self.state.role,
            linked=self.link is not None,
            disks={v.name: self.view.disk(v) for v in self.open.volumes},
            dirty={
                v.name: min(v.size, self.engine.volume_status(v.index).dirty_blocks * v.block_size)
                for v in self.open.volumes
            },
        )

    def on_beat(self, beat: Beat) -> bool:
        before, self.peer_beat = self.peer_beat, beat
        if before is None or (before.role, before.epoch) != (beat.role, beat.epoch):
            self._post(PeerSaid(beat.role, beat.epoch))
        if before is None or (before.disks, before.dirty) != (beat.disks, beat.dirty):
            self._changed.set()
        return self.state.phase is not Phase.ACQUIRING

    def on_promise(self) -> None:
        if roles.bounded(self.state):
            self._grant()

    async def on_request(self, ask: Ask) -> str:
        if isinstance(ask, SwapAsk):
            return await self._asked_swap(ask)
        if isinstance(ask, SyncedAsk):
            return await self._asked_synced(ask)
        if isinstance(ask, RelinkAsk):
            if self.link is not None:
                self.link = None
                self.engine.detach_link()
                self._post(LinkLost(f"{self.peer.name} makes the data link anew: {printable(ask.why, 300)}"))
            self.peer_link.want_data()
            return "ok"
        return await self._asked_leave(ask)

    async def _asked_swap(self, ask: SwapAsk) -> str:
        new = ask.register
        objection = roles.consents(self.state, new.epoch, new.primary)
        if objection is not None:
            raise RefusedError(objection)
        result = self.register.receive(ask.version, new)
        if result is not Swap.OK:
            return "conflict"
        await self._record_changed()
        return "ok"

    async def _asked_synced(self, ask: SyncedAsk) -> str:
        link = self.link
        if link is None or link.source or to_hex(link.session) != ask.session:
            raise RefusedError("the data link that was resynced is not there any more")
        volume = self.open.volume(ask.volume)
        try:
            ids = Ids(from_hex(ask.current), 0, tuple(from_hex(one) for one in ask.history))
        except ValueError as error:
            raise RefusedError(f"volume {volume.name}: ids that cannot be: {error}") from None
        await self._durable(lambda: finish_target(volume, ids))
        log.info("volume %s has everything of %s", volume.name, self.peer.name)
        self.view.event("resync", f"{self.name} has everything of {self.peer.name}", volume=volume.name)
        self._volume_equal(link, volume.index)
        return "ok"

    async def _asked_leave(self, ask: LeaveAsk) -> str:
        """A18: answered when this node needs the peer no more."""
        log.info("%s stops gracefully", self.peer.name)
        if ask.role == "primary":
            self.peer_link.heart.promises.release(clock_boottime_ns())
        self._post(PeerLeft())
        try:
            async with asyncio.timeout(LEAVE_S):
                while not self.state.peer_left or (self.state.role == "primary" and self.state.peer_in_sync):
                    await self._change()
        except TimeoutError:
            raise PeerTimeoutError(
                f"{self.name} could not take {self.peer.name} out of the in-sync set in time"
            ) from None
        return "outdated" if self.state.role == "primary" else "ok"

    # --- the data link

    async def on_data(self, data: DataConnection, *, dialed: bool) -> None:
        control = self.peer_link.control
        if control is None:
            raise Stopped(Stop(code=1, kind="retry", message=f"{self.peer.name} is not connected"))
        if self.link is not None:  # the peer has lost it, or it would not begin anew
            self.link = None
            self.engine.detach_link()
            self._step(LinkLost(f"{self.peer.name} makes the data link anew"))
        version = self._facts_version
        try:
            made = await negotiate(
                data,
                self._party(control.sessions),
                dialed=dialed,
                peer=self.peer.name,
                objection=self._objection(),
                decided=self._decided,
                prepare=self._prepare,
                new_id=_new_id,
                new_uuid=lambda: secrets.token_hex(16),
            )
        except Stopped as stopped:
            stop = stopped.stop
            if stop.kind != "retry":
                self._refuse(Refusal(kind=stop.kind, reason=printable(stop.message)))
            raise
        if self._facts_version != version or self.peer_link.control is not control:
            raise Stopped(Stop(code=1, kind="retry", message="the roles changed during the handshake"))
        self._attach(data, made)
        self._peer_boot = control.hello.boot_id if control.hello is not None else None

    def _objection(self) -> Stop | None:
        """Why no data link is wanted now."""
        if self._stopping.is_set() or self.state.phase is Phase.ACQUIRING:
            return Stop(code=1, kind="retry", message=f"{self.name} is not ready for a data link")
        left = self._slow_until - time.monotonic()
        if left > 0:
            message = f"{self.peer.name} was too slow for {self.name}: tried again in {left:.0f} s"
            return Stop(code=1, kind="refused", message=message)
        return None

    def _party(self, sessions: tuple[str, str]) -> Party:
        state = self.state
        hello = self.peer_link.control.hello if self.peer_link.control is not None else None
        same_life = hello is not None and hello.boot_id == self._peer_boot
        volumes = self.open.volumes
        sides = {
            volume.name: side_of(
                volume,
                node=self.name,
                role=state.role,
                epoch=state.epoch,
                disk=self.view.disk(volume),
                dirty=self.engine.volume_status(volume.index).dirty_blocks > 0,
                crashed=state.crashed,
                boot_lost=state.boot_lost,
                survivor=self.survivor_flag,
                alone=state.phase is Phase.ALONE and state.alone_began,
            )
            for volume in volumes
        }
        facts = Facts(
            sessions=sessions,
            epoch=state.epoch,
            role=state.role,
            flap=state.phase is Phase.WAITING and state.peer_in_sync and same_life,
            pair_uuid=self.open.value.pair_uuid,
            volumes=len(volumes),
        )
        return Party(facts, [side_to_facts(v.name, sides[v.name], v.block.volume_uuid) for v in volumes], sides)

    def _decided(self, decisions: dict[str, Decision]) -> None:
        self.decisions = decisions

    def _refuse(self, refusal: Refusal) -> None:
        if refusal != self.refusal:
            self.refusal = refusal
            self.view.event("refused", refusal.reason)
            log.warning("no mirror with %s: %s", self.peer.name, refusal.reason)
        self._changed.set()

    async def _prepare(self, agreement: Agreement, plan: Plan) -> None:
        """R1, M10."""
        target = plan.source != self.name

        def write() -> None:
            self.open.met(plan.pair_uuid)
            for volume, one in zip(self.open.volumes, plan.volumes, strict=True):
                prepare(
                    volume,
                    volume_uuid=one.volume_uuid,
                    first_id=from_hex(one.first),
                    target=target and one.amount != "none" and not agreement.flap,
                )

        await self._durable(write)

    def _attach(self, data: DataConnection, made: Made) -> None:
        source = made.plan.source == self.name
        plans = [_PLANS[one.amount] for one in made.plan.volumes]
        busy = {index for index, plan in enumerate(plans) if plan != PLAN_NONE}
        link = Link(data.session, source, made, busy)
        self.engine.attach_link(
            data.channel, epoch=self.state.epoch, source=source, plans=plans, timeout=LINK_TIMEOUT_S
        )
        self.link = link
        self.refusal = None
        self.view.linked(link)
        self._post(LinkUp())
        for volume, decision in zip(self.open.volumes, made.agreement.decisions, strict=True):
            log.info("volume %s: %s from %s: %s", volume.name, decision.amount, made.plan.source, decision.reason)
        if source:
            for volume in self.open.volumes:
                if volume.index not in busy and volume.block.ids.bitmap:
                    self._spawn(self._forget_bitmap(volume))
        if not busy:
            self._all_equal(link)

    async def _forget_bitmap(self, volume: OpenVolume) -> None:
        """The ids are equal: the "done" of an earlier resync was lost on its way."""
        await self._durable(lambda: finish_source(volume))

    # --- admin.NodeApi

    async def status(self) -> Status:
        return self.view.status()

    async def events(self, since: int) -> list[LoggedEvent]:
        return self.view.log.since(since)

    async def promote(self, *, accept_data_loss: bool, force: bool) -> str:
        async with self._admin:
            while True:
                answer = await self._ask_roles(
                    Promote(
                        accept_data_loss=accept_data_loss,
                        force=force,
                        obstacle=self.open.obstacle(),
                        bound_until_ns=self.peer_link.heart.promises.bound_until_ns,
                    )
                )
                if answer.code == 0:
                    break
                if answer.retry_at_ns is None:
                    raise RefusedError(answer.message)
                log.info("%s", answer.message)
                await asyncio.sleep(max(0.0, (answer.retry_at_ns - clock_boottime_ns()) / 1e9) + 0.001)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SERVING_S):
                    await self.wait_for("primary")
            return answer.message

    async def demote(self) -> str:
        async with self._admin:
            answer = await self._ask_roles(Demote())
        if answer.code:
            raise RefusedError(answer.message)
        return answer.message

    async def _ask_roles(self, event: Event) -> Answer:
        self._answer = asyncio.get_running_loop().create_future()
        self._post(event)
        try:
            return await self._answer
        finally:
            self._answer = None

    async def plan_resync(self, volume: str | None, *, full: bool) -> list[ResyncPlan]:
        names = [self.open.volume(volume).name] if volume is not None else [v.name for v in self.open.volumes]
        if not self.peer_link.connected:
            raise UnreachableError(f"{self.peer.name} is not connected: what a resync would do is not known")
        if self.link is None and not self.decisions:
            self.peer_link.hurry()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    while self.link is None and not self.decisions:
                        await self._change()
        return self.view.plans(names, full=full)

    async def resync(self, volume: str | None, *, full: bool) -> str:
        volumes = [self.open.volume(volume)] if volume is not None else self.open.volumes
        if not self.peer_link.connected:
            self.peer_link.hurry()
            raise UnreachableError(f"{self.peer.name} is not connected")
        if full:
            for one in volumes:
                self.engine.set_all_dirty(one.index)
            if self.link is not None:
                self._drop_link("a full compare was asked for")
                self._step(LinkLost("the data link is made anew for a full compare"))
        self.refusal = None
        self.decisions = {}
        self._slow_until = 0.0
        self.peer_link.want_data()
        self.peer_link.hurry()
        try:
            async with asyncio.timeout(SERVING_S):
                while self.link is None and self.refusal is None:
                    await self._change()
        except TimeoutError:
            raise PeerTimeoutError(f"no data link with {self.peer.name} yet: see the logs of both nodes") from None
        if self.refusal is not None and self.link is None:
            if self.refusal.kind == "refused":
                raise RefusedError(self.refusal.reason)
            raise PeerError(self.refusal.reason, 20)
        return self.view.resync_sentence()

    async def wait_for(self, condition: Condition, volume: str | None = None) -> None:
        while True:
            status = self.view.status()
            if holds(status, condition, volume):
                return
            if (why := hopeless(status, condition)) is not None:
                raise PeerError(why, 20)
            await self._change()

    # --- small things

    async def _change(self) -> None:
        """Something may be different; at the latest after a moment, since the engine's counters tell nobody."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_S):
                await self._changed.wait()

    async def _durable(self, write: Callable[[], object]) -> None:
        async with self._disk:
            await asyncio.to_thread(write)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the daemon has to end", exc_info=error)
            self.failed.set()


def _new_id() -> int:
    return secrets.randbelow(MAX_ID) + 1


def _shown(shapes: list[Shape]) -> str:
    return printable(", ".join(f"{one.name} ({one.size} bytes, blocks of {one.block_size})" for one in shapes), 500)


def run(config: Config, name: str) -> int:
    """The daemon in the foreground, until SIGTERM or SIGINT; its exit code. MirrorpairError: it cannot start."""
    return asyncio.run(_run(config, name))


async def _run(config: Config, name: str) -> int:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    node = Node(config, name)
    await node.start()
    ends = [loop.create_task(asked.wait()), loop.create_task(node.failed.wait())]
    try:
        notify("READY=1")
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        if node.failed.is_set():
            return 1
        await node.stop()
        return 0
    finally:
        for end in ends:
            end.cancel()
        await node.close()


def notify(state: str) -> None:
    """Tells systemd, if it asked for it (sd_notify)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(state.encode())
