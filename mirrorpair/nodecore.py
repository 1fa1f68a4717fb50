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
import time
from typing import TYPE_CHECKING, ClassVar

import msgspec

from mirrorpair import roles
from mirrorpair._core import NO_LIMIT, Engine
from mirrorpair.abdication import cover_of
from mirrorpair.arbiter import Incarnation, Register, Swap, Writer
from mirrorpair.errors import (
    MirrorpairError,
    PeerError,
    PeerTimeoutError,
    UnreachableError,
    WrongRoleError,
)
from mirrorpair.foresee import foresee
from mirrorpair.history import MAX_ID
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.liveness import Timing
from mirrorpair.peermessages import (
    Beat,
    RelinkAsk,
    SwapAsk,
    SyncedAsk,
    from_hex,
    to_hex,
)
from mirrorpair.peersocket import Backoff
from mirrorpair.rolewords import (
    FAILED,
    Answer,
    CaughtUp,
    DiskFailed,
    DiskWell,
    Drain,
    Drained,
    DropLink,
    Forgive,
    GenerationBegan,
    HangUp,
    LinkLost,
    PauseClients,
    Phase,
    Quiet,
    RecordChanged,
    ResumeClients,
    State,
    Swapped,
    Synced,
    Tick,
)
from mirrorpair.text import printable
from mirrorpair.volumes import OpenNode, OpenVolume, began_full, finish_source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from mirrorpair.arbiter.lone import LoneRegister
    from mirrorpair.config import Config
    from mirrorpair.datalink import Made
    from mirrorpair.history import Decision
    from mirrorpair.noderegister import WitnessSide
    from mirrorpair.nodesentinel import Keeper
    from mirrorpair.nodeview import NodeView
    from mirrorpair.peercontrol import Control
    from mirrorpair.peerlink import PeerLink
    from mirrorpair.rolewords import Action, Demote, Event, Handoff, Promote, RoleName
    from mirrorpair.rolewords import Swap as SwapAction
    from mirrorpair.status import Refusal

LINK_TIMEOUT_S = 6.0  # F8: a secondary whose disk hangs leaves the set
SWAP_S = 2.0
SWAP_ATTEMPTS = 5
SYNCED_S = 30.0
DRAIN_S = 30.0
LEAVE_S = 10.0
FLUSH_S = 60.0
SLOW_CODE = 13
SLOW_S = (1.0, 60.0)  # a peer that was too slow is left alone for so long, growing
SERVING_S = 15.0
WATCH_S = 0.05
HUNG_S = 10.0  # F8
STUCK_S = 1.0  # slow enough not to be waited for, and fast enough to be called well
DISK_LOOK_S = 0.5

log = logging.getLogger("mirrorpair.node")


class Link:
    """The data link that the engine has."""

    def __init__(self, session: int, source: bool, made: Made, open_volumes: set[int], control: Control) -> None:
        self.session = session
        self.source = source
        self.made = made
        self.open_volumes = open_volumes
        """indexes of volumes whose resync has not ended"""
        self.control = control
        """the session it was made in"""
        self.since = time.monotonic()


class Core:
    """The state of one node and what it does about events. The other parts of the node are given it."""

    open: OpenNode
    register: LoneRegister
    """a lone pair's"""
    witness: WitnessSide | None = None
    """an arbitrated pair's way to the register"""
    sentinel: Keeper | None = None
    """an arbitrated pair's, if this is a process of its own"""
    engine: Engine
    view: NodeView
    peer_link: PeerLink

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
            arbitrated=config.arbiter != "none",
            suspect_ns=self.timing.suspect_ns,
            retry_ns=self.timing.interval_ns,
            failback_ns=self._failback_ns(),
            preferred=config.prefer == name,
        )
        self.link: Link | None = None
        self.refusal: Refusal | None = None
        self.decisions: dict[str, Decision] = {}
        self.peer_beat: Beat | None = None
        self.survivor_flag = False
        """its peer was lost as a connected primary (F18)"""
        self.peer_leaves = False
        """the connected peer has said that it stops"""
        self.equal_in: Control | None = None
        """the session in which the peer was last found equal: whoever connects later is not"""
        self._peer_boot: str | None = None
        """the peer's boot in the last data link"""
        self.process = secrets.token_hex(8)
        self._slow = Backoff(SLOW_S, random.Random())
        self.slow_until = 0.0
        self._inbox: asyncio.Queue[Event | Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._disk = asyncio.Lock()
        self._swapping = asyncio.Lock()
        self._objected: MirrorpairError | None = None
        """why the peer did not consent to the last swap"""
        self._tokens: dict[int, asyncio.Future[int]] = {}
        self._clients_closed = asyncio.Event()
        self._pauses = 0
        self.drained = asyncio.Event()
        self.drain_failed = False
        """something may be here that the peer lacks, though both are in the set"""
        self.quiet = False
        self.answer: asyncio.Future[Answer] | None = None
        self.one_change = asyncio.Lock()
        """of roles that somebody waits for, here or at the peer; held around `ask_roles`"""
        self.changed = asyncio.Event()
        self._granted: tuple[int, int, int, int] | None = None
        self.facts_version = 0
        self._ticking: asyncio.TimerHandle | None = None
        self.stopping: asyncio.Event = asyncio.Event()
        self.failed = asyncio.Event()
        """an internal error, or metadata that cannot be written: the daemon must end, as by kill"""

    def _failback_ns(self) -> int | None:
        wanted = self.config.failback == "auto" and self.config.prefer == self.peer.name
        return round(self.config.failback_delay * 1e9) if wanted else None

    @property
    def settled(self) -> bool:
        return not (self.state.crashed or self.state.boot_lost)

    @property
    def record_version(self) -> int:
        """Of the register, as last seen."""
        return self.register.copy.version if self.witness is None else self.witness.known[1]

    def incarnation(self) -> Incarnation:
        return Incarnation(id=self.open.value.incarnation_id, n=self.open.value.incarnation)

    # --- the inbox: one event at a time

    def post(self, event: Event | Callable[[], Awaitable[None]]) -> None:
        self._inbox.put_nowait(event)

    async def work(self) -> None:
        while True:
            item = await self._inbox.get()
            if callable(item):
                await item()
            else:
                self.step(item)

    def step(self, event: Event) -> None:
        if self.quiet and not isinstance(event, RecordChanged):
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
            self.facts_version += 1
            log.info("%s", sentence)
            self.view.stepped(before, state, sentence)
        else:
            log.debug("%s", sentence)
        self.view.look_at_disks(sentence)
        self.renew_grant()
        self._tell_roles(before, state)
        self._arm()
        if self.witness is not None and state.phase is Phase.ALONE and before.phase is not Phase.ALONE:
            self.witness.look_now()  # A1: each second from now on
        for action in actions:
            self._do(action)
        self.changed.set()

    def _tell_roles(self, before: State, state: State) -> None:
        """What both must know before a data link can be made does not wait for the next beat, nor for a back-off."""
        if self.peer_link.session is None:
            return
        if (state.role, state.epoch) != (before.role, before.epoch):
            self.peer_link.beat()
        if not state.linked and (state.epoch, state.peer_epoch) != (before.epoch, before.peer_epoch):
            self.peer_link.want_data()

    def renew_grant(self) -> None:
        mode, cover = int(roles.mode_of(self.state)), int(cover_of(self.state))
        until = self.peer_link.heart.beats.valid_until_ns if roles.bounded(self.state) else NO_LIMIT
        grant = (self.state.epoch, until, mode, cover)
        if grant != self._granted:
            self._granted = grant
            self.engine.set_grant(*grant)

    def _arm(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        if self.state.wake_ns is not None:
            wait = max(0.0, (self.state.wake_ns - clock_boottime_ns()) / 1e9)
            self._ticking = asyncio.get_running_loop().call_later(wait + 0.001, self.post, Tick())

    # --- actions

    def _do(self, action: Action) -> None:
        if isinstance(action, Answer):
            if self.answer is not None and not self.answer.done():
                self.answer.set_result(action)
        elif isinstance(action, Forgive):
            self.engine.forgive()
        elif isinstance(action, HangUp):
            self.engine.close_clients(graceful=False)
            if self.engine.stuck_s > STUCK_S:
                self.engine.hang_up()
        elif isinstance(action, PauseClients):
            self.spawn(self._pause())
        elif isinstance(action, ResumeClients):
            self._pauses += 1
            self.engine.resume_clients()
        elif isinstance(action, DropLink):
            self.drop_link(action.why)
        elif isinstance(action, Drain):
            self.drained.clear()
            self.spawn(self._drain())
        elif self.witness is not None:
            self.spawn(self.witness.swap(action))
        else:
            self.spawn(self._swap(action))

    def drop_link(self, why: str) -> None:
        """Also at the peer, whose engine would call it a loss."""
        had, self.link = self.link, None
        if had is not None:
            self.engine.detach_link()
            log.info("data link with %s ended: %s", self.peer.name, why)
        if self.peer_link.connected and not self.state.peer_left and not self.stopping.is_set():
            self.spawn(self._tell_relink(why))
            self.peer_link.want_data()

    async def _tell_relink(self, why: str) -> None:
        with contextlib.suppress(MirrorpairError):
            await self.peer_link.ask(RelinkAsk(why=printable(why, 500)))

    async def _pause(self) -> None:
        self._pauses += 1
        mine = self._pauses
        limit = self.state.handoff_ns / 1e9
        error = await self.token(self.engine.pause_clients, limit)
        if not error:
            error = await self.token(self.engine.barrier, limit)
        if mine == self._pauses:  # not one that was given up meanwhile
            self.post(Quiet(f"the last writes could not be made durable: {os.strerror(error)}" if error else ""))

    async def _drain(self) -> None:
        self._clients_closed.clear()
        self.drain_failed = False
        self.engine.close_clients(graceful=True)
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._clients_closed.wait()
        except TimeoutError:
            log.warning("clients did not end within %g s: they are hung up on", DRAIN_S)
            self.engine.close_clients(graceful=False)
        error = await self.token(self.engine.barrier, DRAIN_S)
        if error:
            self.drain_failed = True
            log.error("the last writes could not be made durable on both nodes: %s", os.strerror(error))
        self.drained.set()
        self.post(Drained())

    async def _swap(self, action: SwapAction) -> None:
        """The images first (W8), then the register at the peer, then here; around it the node file (A13, A4)."""
        try:
            async with self._swapping:
                if action.purpose in ("promote", "readopt") and (error := await self.flush_first()):
                    self.post(Swapped(action, False, error, code=FAILED))
                    return
                await self.durable(lambda: self.open.raise_epoch_floor(action.epoch))
                result = await self._swap_once(action)
                for _ in range(SWAP_ATTEMPTS - 1):
                    # The other node swapped at the same moment, about something else; or it refuses, with a reason.
                    if result is not Swap.CONFLICT or self._objected or not self._still_right(action):
                        break
                    await asyncio.sleep(random.uniform(0.01, 0.05))
                    result = await self._swap_once(action)
        except MirrorpairError as error:
            self.post(Swapped(action, False, str(error), unknown=True, code=error.exit_code))
            return
        if result is Swap.UNKNOWN:
            silent = PeerTimeoutError(f"{self.peer.name} did not answer")
            self.post(Swapped(action, False, str(silent), unknown=True, code=silent.exit_code))
            return
        done = msgspec.structs.replace(action, in_sync=self.register.copy.register.in_sync)
        if result is Swap.OK:
            self.post(Swapped(done, True))
            return
        objected = self._objected or WrongRoleError(f"{self.peer.name} changed the roles at this moment")
        self.post(Swapped(done, False, str(objected), code=objected.exit_code))

    async def flush_first(self) -> str:
        """W8: whole frames of the last link are applied, then all is durable, then the role is taken. Why it cannot be,
        or nothing."""
        error = await self.token(self.engine.barrier, FLUSH_S)
        return f"{self.name} cannot flush its images: {os.strerror(error)}" if error else ""

    def _still_right(self, action: SwapAction) -> bool:
        """Whether a swap that met a conflict may be tried again: it takes a new epoch, or is about the present one."""
        record = self.register.copy.register
        if action.purpose in ("promote", "readopt"):
            return record.epoch < action.epoch
        return record.epoch == action.epoch and record.primary in (action.primary, self.name)

    async def _swap_once(self, action: SwapAction) -> Swap:
        version, old = self.register.copy.version, self.register.copy.register
        new = Register(
            pair_uuid=self.open.value.pair_uuid or old.pair_uuid,
            epoch=action.epoch,
            primary=action.primary,
            in_sync=old.in_sync if action.in_sync is None else action.in_sync,
            members={**old.members, self.name: self.incarnation()},
            mode=self.config.mode,
            writer=Writer(node=self.name, nonce=secrets.randbits(48)),
        )
        self._objected = None
        if action.needs_peer and self.register.ask_peer is None:
            self._objected = UnreachableError(f"{self.peer.name} is not connected any more")
            return Swap.CONFLICT
        result = await self.register.cas(version, new)
        if result is Swap.OK:
            role: RoleName = "primary" if action.primary == self.name else "secondary"
            settled = action.purpose in ("promote", "readopt") or self.settled
            await self.durable(
                lambda: self.open.learned(
                    epoch=action.epoch, version=self.register.copy.version, role=role, settled=settled
                )
            )
        return result

    async def ask_swap(self, version: int, new: Register) -> Swap:
        try:
            said = await self.peer_link.ask(SwapAsk(version=version, register=new), SWAP_S)
        except PeerError as error:
            self._objected = error
            return Swap.CONFLICT
        except UnreachableError:
            return Swap.UNKNOWN
        except PeerTimeoutError as error:
            # The records may differ now: they have to meet before the next swap.
            if self.peer_link.control is not None:
                self.peer_link.control.hang_up(str(error))
            return Swap.UNKNOWN
        return Swap.OK if said == "ok" else Swap.CONFLICT

    # --- what the engine says

    def engine_events(self) -> None:
        for kind, a, b, text in self.engine.take_events():
            handler = self._ENGINE.get(kind)
            if handler is not None:
                handler(self, a, b, text)
        self.changed.set()

    def _link_lost(self, session: int, code: int, text: str) -> None:
        link = self.link
        if link is None or link.session != session:
            return
        self.link = None
        log.warning("data link with %s lost: %s", self.peer.name, text)
        if time.monotonic() - link.since > SLOW_S[1]:
            self._slow.reset()
        if code == SLOW_CODE:
            self.slow_until = time.monotonic() + self._slow.delay()
        if self.state.peer_role == "primary" and not self.state.peer_left:
            self.survivor_flag = True
        self.post(LinkLost(f"data link with {self.peer.name} lost: {text}"))
        self.peer_link.want_data()

    def _need_generation(self, _a: int, _b: int, _text: str) -> None:
        self.spawn(self._begin_generation())

    async def _begin_generation(self) -> None:
        """G2. A handshake that is under way has told the peer the ids of before: no link may come of it, or what is
        answered alone from now on would be taken for equal there."""
        if self.link is not None:
            return  # nothing is answered alone any more; after this link it is asked for again
        self.facts_version += 1
        try:
            await self.durable(lambda: self.open.began_alone(new_id))
        except MirrorpairError as error:
            log.error("no write is answered alone: %s", error)
            return
        self.facts_version += 1
        self.post(GenerationBegan())

    def _resync_done(self, index: int, _b: int, _text: str) -> None:
        link = self.link
        if link is not None and link.source:
            self.spawn(self._finish_resync(link, self.open.volumes[index]))

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
            await self.durable(lambda: finish_source(volume))
        except MirrorpairError as error:
            log.warning("volume %s: the end of its resync is not known to both: %s", volume.name, error)
            if self.link is link:
                self.drop_link("the end of a resync is not known to both")
                self.post(LinkLost("the end of a resync is not known to both nodes"))
            return
        self.view.event("resync", f"{self.peer.name} has everything of {volume.name}", volume=volume.name)
        self.volume_equal(link, volume.index)

    def volume_equal(self, link: Link, index: int) -> None:
        link.open_volumes.discard(index)
        self.view.look_at_disks("its resync has ended")
        if self.link is link and not link.open_volumes:
            self.all_equal(link)

    def all_equal(self, link: Link) -> None:
        """Nothing differs any more: what was left open by an earlier end is settled."""
        self.survivor_flag = False
        was_settled = self.settled

        async def settle() -> None:
            if self.link is not link:
                return
            if not was_settled:
                await self.durable(lambda: self.open.settled(self.state.role))
            self.step(CaughtUp())
            if link.source:
                self.equal_in = link.control
                hello = link.control.hello
                known = self.witness is None or hello is None or self.witness.knows(hello.incarnation)
                self.step(Synced(known))

        self.post(settle)

    def _disk_error(self, index: int, _number: int, text: str) -> None:
        volume = self.open.volumes[index]
        log.error("volume %s: %s", volume.name, text)
        if volume.failed is None:
            volume.failed = text
            self.view.look_at_disks(volume.failed)
            self.post(DiskFailed(f"volume {volume.name}: {text}"))

    async def watch_disk(self) -> None:
        """F8: an operation that does not end is a disk that fails. What ends after all makes the disk one that works:
        nothing was refused by it."""
        hung: list[OpenVolume] = []
        while True:
            await asyncio.sleep(DISK_LOOK_S)
            stuck = self.engine.stuck_s
            if not hung and stuck > HUNG_S:
                # Which volume's it is does not matter: the threads that serve them all may be waiting for it.
                hung = [volume for volume in self.open.volumes if volume.failed is None]
                for volume in hung:
                    volume.failed = f"a disk operation has not ended for {stuck:.0f} s"
                    log.error("volume %s: %s", volume.name, volume.failed)
                    self.view.look_at_disks(volume.failed)
                self.post(DiskFailed(f"an operation has not ended for {stuck:.0f} s"))
            elif hung and stuck < STUCK_S:
                for volume in hung:
                    volume.failed = None
                    self.view.look_at_disks("what hung has ended")
                hung = []
                if self.open.obstacle() is None:
                    self.post(DiskWell())
                self.peer_link.want_data()

    def _bits_merged(self, index: int, _b: int, session: str) -> None:
        link = self.link
        if link is None or not link.source or link.session != int(session, 16):
            return
        if full_id := from_hex(link.made.plan.volumes[index].full):
            self.spawn(self._keep_full(link, self.open.volumes[index], full_id))

    async def _keep_full(self, link: Link, volume: OpenVolume, full_id: int) -> None:
        """R6: nobody waits for it. One that is cut off before it is durable begins anew."""

        def write() -> None:
            if self.link is link and volume.index in link.open_volumes:
                began_full(volume, full_id)

        try:
            await self.durable(write)
        except MirrorpairError as error:
            log.warning("volume %s: a full compare that is cut off will begin anew: %s", volume.name, error)

    def _clients_gone(self, _a: int, _b: int, _text: str) -> None:
        self._clients_closed.set()

    def _token_done(self, token: int, error: int, _text: str) -> None:
        future = self._tokens.pop(token, None)
        if future is not None and not future.done():
            future.set_result(error)

    def _noted(self, _a: int, _b: int, _text: str) -> None:
        """Only the status changes."""

    _ENGINE: ClassVar[dict[str, Callable[[Core, int, int, str], None]]] = {
        "link-lost": _link_lost,
        "need-generation": _need_generation,
        "clients-closed": _clients_gone,
        "clients-quiet": _token_done,
        "client": _noted,
        "disk-error": _disk_error,
        "journal-error": _disk_error,
        "bits-merged": _bits_merged,
        "resync-done": _resync_done,
        "flushed": _token_done,
        "saved": _token_done,
    }

    async def token(self, ask: Callable[[int], None], timeout: float) -> int:
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

    # --- small things

    async def change(self) -> None:
        """Something may be different; at the latest after a moment, since the engine's counters tell nobody."""
        self.changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_S):
                await self.changed.wait()

    async def ask_roles(self, event: Event) -> Answer:
        """The outcome of what a person wants."""
        assert self.one_change.locked()
        self.answer = asyncio.get_running_loop().create_future()
        self.post(event)
        try:
            return await self.answer
        finally:
            self.answer = None

    async def foresee(self, event: Promote | Demote | Handoff) -> Answer:
        """What `ask_roles` would come to. In its turn, as the real one: what was posted before has been decided."""
        found: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        async def look() -> None:
            if not found.done():
                found.set_result(foresee(self.state, event, clock_boottime_ns()))

        self.post(look)
        return await found

    async def durable(self, write: Callable[[], object]) -> None:
        async with self._disk:
            await asyncio.to_thread(write)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the daemon has to end", exc_info=error)
            self.failed.set()

    async def end_tasks(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._ticking is not None:
            self._ticking.cancel()


def new_id() -> int:
    return secrets.randbelow(MAX_ID) + 1
