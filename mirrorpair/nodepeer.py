"""The node as its peer meets it: hellos, heartbeats, requests, and the making of a data link.

Rules:
- L0 The two records become one before anything follows from who the peer is.
- A16 In an arbitrated pair a primary is the source; without one, only who is in the set, by a record that was read
  since its start.
- W9 A data link belongs to the control connection and to the roles with which its handshake began; when either changed
  meanwhile it is not attached.
- R1 A request to take over ids is believed only on the data link that it names.
- A11 A dead peer's promise ends, and its connection with it, before anything follows from its death.
- A18 A leaving peer gets its answer when this node needs it no more.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING

from mirrorpair import __version__, roles
from mirrorpair._core import PLAN_BITMAP, PLAN_FULL, PLAN_NONE
from mirrorpair.arbiter import Swap
from mirrorpair.datalink import Party, negotiate
from mirrorpair.errors import (
    MirrorpairError,
    PeerTimeoutError,
    RefusedError,
    WrongRoleError,
    error_of,
)
from mirrorpair.history import Ids
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.nodecore import LEAVE_S, LINK_TIMEOUT_S, Core, Link, new_id
from mirrorpair.pairing import side_to_facts
from mirrorpair.peerdata import Stopped
from mirrorpair.peermessages import (
    Beat,
    Facts,
    HandoffAsk,
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
from mirrorpair.rolewords import (
    Handoff,
    LinkLost,
    LinkUp,
    PeerDied,
    PeerDown,
    PeerFloor,
    PeerLeft,
    PeerSaid,
    PeerUp,
    Phase,
    RecordChanged,
)
from mirrorpair.status import Refusal
from mirrorpair.text import printable
from mirrorpair.volumes import OpenVolume, finish_source, finish_target, prepare, side_of

if TYPE_CHECKING:
    from mirrorpair.datalink import Made
    from mirrorpair.history import Decision
    from mirrorpair.pairing import Agreement
    from mirrorpair.peercontrol import Control
    from mirrorpair.peerdata import DataConnection
    from mirrorpair.peermessages import Ask, Watch
    from mirrorpair.peerpath import Path
    from mirrorpair.proofs import Proof
    from mirrorpair.rolewords import RoleName

_PLANS = {"none": PLAN_NONE, "bitmap": PLAN_BITMAP, "full": PLAN_FULL}

log = logging.getLogger("mirrorpair.node")


class PeerSide:
    """What the peer link asks of the node and tells it (`peerlink.PeerHandler`)."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._peer_boot: str | None = None
        """the peer's boot in the last data link"""

    def hello(self, session: str) -> Hello:
        return Hello(
            version=__version__,
            pair=self._core.config.name,
            pair_uuid=self._core.open.value.pair_uuid,
            node=self._core.name,
            mode=self._core.config.mode,
            arbiter=self._core.config.arbiter,
            survivor=self._core.config.survivor,
            boot_id=self._core.open.boot_id,
            incarnation=self._core.incarnation(),
            process=self._core.process,
            session=session,
            role=self._core.state.role,
            epoch=self._core.state.epoch,
            record=self._core.register.copy if self._core.witness is None else None,
            shapes=[Shape(name=v.name, size=v.size, block_size=v.block_size) for v in self._core.open.volumes],
        )

    def check(self, hello: Hello) -> str | None:
        mine = self.hello("0")
        for what, ours, theirs in (
            ("pair", mine.pair, hello.pair),
            ("mode", mine.mode, hello.mode),
            ("arbiter", mine.arbiter, hello.arbiter),
            ("survivor", mine.survivor, hello.survivor),
        ):
            if ours != theirs:
                return f"its {what} is {printable(theirs, 80)}, ours {ours}"
        if mine.pair_uuid and hello.pair_uuid and mine.pair_uuid != hello.pair_uuid:
            return (
                f"it belongs to another pair of this name ({hello.pair_uuid}, ours is {mine.pair_uuid}): one of the "
                "two was made anew"
            )
        if mine.shapes != hello.shapes:
            return f"its volumes are {_shown(hello.shapes)}, ours {_shown(mine.shapes)}"
        return None

    def peer_refused(self, reason: str) -> None:
        if not self._core.peer_link.connected:
            self._refuse(Refusal(kind="refused", reason=reason))

    def peer_up(self, hello: Hello) -> None:
        if self._core.witness is None:
            self._core.register.ask_peer = self._core.ask_swap
        self._core.peer_beat = None
        self._core.peer_leaves = False
        self._core.refusal = None  # of an earlier session: this peer may have been made anew
        self._core.decisions = {}
        control = self._core.peer_link.control
        if self._core.sentinel is not None and control is not None and control.mine is not None:
            self._core.sentinel.met(control.mine)
        log.info("%s is connected: %s of epoch %d, version %s", hello.node, hello.role, hello.epoch, hello.version)
        self._core.view.event("link", f"{hello.node} is connected")
        self._core.post(lambda: self._meet(hello))

    def peer_down(self, reason: str, last_heard_ns: int | None) -> None:
        if self._core.witness is None:
            self._core.register.ask_peer = None
        self._core.peer_beat = None
        if self._core.state.linked and self._core.state.peer_role == "primary" and not self._core.state.peer_left:
            self._core.survivor_flag = True
        self._core.view.event("link", reason)
        self._core.post(PeerDown(reason, last_heard_ns, self._core.peer_link.heart.promises.bound_until_ns))

    def link_down(self, reason: str, last_heard_ns: int | None) -> None:
        """The peer lives, and this node's word to it binds as before; but there is no way for writes and requests."""
        core = self._core
        if core.witness is None:
            core.register.ask_peer = None
        if core.state.linked and core.state.peer_role == "primary" and not core.state.peer_left:
            core.survivor_flag = True
        if core.link is not None:
            core.link = None
            core.engine.detach_link()
        log.warning("no way to %s for data: %s", core.peer.name, reason)
        core.view.event("link", reason)
        core.post(LinkLost(reason, last_heard_ns))
        core.peer_link.want_data()

    def path_up(self, path: Path) -> None:
        self._core.view.event("link", f"heartbeats with {self._core.peer.name} also go over {path.address}")
        self._core.changed.set()

    def path_down(self, path: Path, reason: str) -> None:
        self._core.view.event("link", f"no heartbeats over {path.address} any more: {reason}")
        self._core.changed.set()

    def check_sentinel(self, watch: Watch) -> str | None:
        if watch.pair != self._core.config.name:
            return f"its pair is {printable(watch.pair, 80)}, ours {self._core.config.name}"
        return "this pair has no arbiter" if self._core.witness is None else None

    def peer_died(self, process: str, proof: Proof, status: int | None) -> None:
        heart, peer = self._core.peer_link.heart, self._core.peer.name
        how = "" if status is None else f" (signal {-status})" if status < 0 else f" (exit code {status})"
        why = f"the daemon of {peer} has ended{how}, says its sentinel"
        if not proof.gone:
            why = f"an earlier one: {why}"
        log.warning("%s", why)
        self._core.view.event("link", why)
        if proof.releases:
            heart.promises.release(clock_boottime_ns())
        if proof.gone:
            self._core.peer_link.bury(process, why)
        self._core.post(PeerDied(why, proof.gone, heart.promises.bound_until_ns))

    async def _meet(self, hello: Hello) -> None:
        """L0: the two records become one, before anything follows from who the peer is."""
        control = self._core.peer_link.control
        if control is None or control.hello is not hello:
            return
        if self._core.witness is not None:
            self._core.witness.heard(hello.epoch, 0)
        elif hello.record is not None:
            try:
                changed = self._core.register.meet(hello.record)
            except MirrorpairError as error:
                self._refuse(Refusal(kind="refused", reason=str(error)))
                return
            if changed:
                await self._record_changed()
        self._core.step(PeerUp(hello.role, hello.epoch))
        self._core.peer_link.want_data()

    async def _record_changed(self) -> None:
        record = self._core.register.copy
        register = record.register
        role: RoleName = (
            "primary" if register.primary == self._core.name and self._core.state.role == "primary" else "secondary"
        )
        await self._core.durable(
            lambda: self._core.open.learned(
                epoch=register.epoch, version=record.version, role=role, settled=self._core.settled
            )
        )
        self._core.step(RecordChanged(max(register.epoch, self._core.state.epoch), register.primary, register.in_sync))

    def beat(self, seq: int) -> Beat:
        return Beat(
            seq=seq,
            epoch=self._core.state.epoch,
            version=self._core.record_version,
            floor=max(self._core.state.epoch, self._core.open.value.epoch_floor),
            role=self._core.state.role,
            linked=self._core.link is not None,
            disks={v.name: self._core.view.disk(v) for v in self._core.open.volumes},
            dirty={
                v.name: min(v.size, self._core.engine.volume_status(v.index).dirty_blocks * v.block_size)
                for v in self._core.open.volumes
            },
        )

    def on_beat(self, beat: Beat) -> bool:
        before = self._core.peer_beat
        if before is not None and beat.seq <= before.seq:
            return self._promises(before)  # over another path a later one was quicker: that is what is known
        self._core.peer_beat = beat
        if before is None or (before.role, before.epoch) != (beat.role, beat.epoch):
            self._core.post(PeerSaid(beat.role, beat.epoch))
        if self._core.witness is not None:
            self._core.witness.heard(beat.epoch, beat.version)
            if beat.floor > self._core.state.epoch and self._core.state.role == "primary":
                self._core.post(PeerFloor(beat.floor))
        if before is None or (before.disks, before.dirty) != (beat.disks, beat.dirty):
            self._core.changed.set()
        return self._promises(beat)

    def _promises(self, beat: Beat) -> bool:
        """A13: only to a primary that nobody has overtaken, and to none that this node has tried to overtake: what it
        asked for may still land."""
        core = self._core
        if core.state.role == "primary" or core.state.phase is Phase.ACQUIRING or beat.epoch < core.state.epoch:
            return False
        if core.peer_leaves:
            return False
        return core.witness is None or (beat.role == "primary" and beat.epoch >= core.open.value.epoch_floor)

    def on_promise(self) -> None:
        if roles.bounded(self._core.state):
            self._core.renew_grant()

    async def on_request(self, ask: Ask) -> str:
        if isinstance(ask, SwapAsk):
            return await self._asked_swap(ask)
        if isinstance(ask, SyncedAsk):
            return await self._asked_synced(ask)
        if isinstance(ask, HandoffAsk):
            return await self._asked_handoff(ask)
        if isinstance(ask, RelinkAsk):
            if self._core.witness is not None:
                self._core.witness.look_now()  # its roles have changed
            if self._core.link is not None:
                self._core.link = None
                self._core.engine.detach_link()
                self._core.post(LinkLost(f"{self._core.peer.name} makes the data link anew: {printable(ask.why, 300)}"))
            self._core.peer_link.want_data()
            return "ok"
        return await self._asked_leave(ask)

    async def _asked_swap(self, ask: SwapAsk) -> str:
        new = ask.register
        objection = roles.consents(self._core.state, new.epoch, new.primary)
        if objection is not None:
            raise WrongRoleError(objection)
        result = self._core.register.receive(ask.version, new)
        if result is not Swap.OK:
            return "conflict"
        await self._record_changed()
        return "ok"

    async def _asked_synced(self, ask: SyncedAsk) -> str:
        link = self._core.link
        if link is None or link.source or to_hex(link.session) != ask.session:
            raise RefusedError("the data link that was resynced is not there any more")
        volume = self._core.open.volume(ask.volume)
        try:
            ids = Ids(from_hex(ask.current), 0, tuple(from_hex(one) for one in ask.history))
        except ValueError as error:
            raise RefusedError(f"volume {volume.name}: ids that cannot be: {error}") from None
        await self._core.durable(lambda: finish_target(volume, ids))
        log.info("volume %s has everything of %s", volume.name, self._core.peer.name)
        self._core.view.event(
            "resync", f"{self._core.name} has everything of {self._core.peer.name}", volume=volume.name
        )
        self._core.volume_equal(link, volume.index)
        return "ok"

    async def _asked_handoff(self, ask: HandoffAsk) -> str:
        async with self._core.one_change:
            answer = await (self._core.foresee(Handoff()) if ask.dry_run else self._core.ask_roles(Handoff()))
        if answer.code:
            raise error_of(answer.code, answer.message)
        return "ok"

    async def _asked_leave(self, ask: LeaveAsk) -> str:
        """A18: answered when this node needs the peer no more. One that has drained in order to stop itself needs it no
        more, and decides nothing any more that could be waited for."""
        log.info("%s stops gracefully", self._core.peer.name)
        self._core.peer_leaves = True
        if ask.role == "primary":
            self._core.peer_link.heart.promises.release(clock_boottime_ns())
        self._core.post(PeerLeft())
        try:
            async with asyncio.timeout(LEAVE_S):
                while not self._core.quiet and (
                    not self._core.state.peer_left
                    or (self._core.state.role == "primary" and self._core.state.peer_in_sync)
                ):
                    await self._core.change()
        except TimeoutError:
            raise PeerTimeoutError(
                f"{self._core.name} could not take {self._core.peer.name} out of the in-sync set in time"
            ) from None
        shrunk = self._core.state.role == "primary" and not self._core.state.peer_in_sync
        return "outdated" if shrunk else "ok"

    # --- the data link

    async def on_data(self, data: DataConnection, *, dialed: bool) -> None:
        control = self._core.peer_link.control
        if control is None:
            raise Stopped(Stop(code=1, kind="retry", message=f"{self._core.peer.name} is not connected"))
        if self._core.link is not None:  # the peer has lost it, or it would not begin anew
            self._core.link = None
            self._core.engine.detach_link()
            self._core.step(LinkLost(f"{self._core.peer.name} makes the data link anew"))
        version = self._core.facts_version
        try:
            made = await negotiate(
                data,
                self._party(control.sessions),
                dialed=dialed,
                peer=self._core.peer.name,
                objection=self._objection(),
                decided=self._decided,
                prepare=lambda agreement, plan: self._prepare(data, agreement, plan),
                new_id=new_id,
                new_uuid=lambda: secrets.token_hex(16),
            )
        except Stopped as stopped:
            stop = stopped.stop
            if stop.kind != "retry":
                self._refuse(Refusal(kind=stop.kind, reason=printable(stop.message)))
            raise
        if self._core.facts_version != version or self._core.peer_link.control is not control:
            raise Stopped(Stop(code=1, kind="retry", message="the roles changed during the handshake"))
        self._attach(data, made, control)
        self._peer_boot = control.hello.boot_id if control.hello is not None else None

    def _objection(self) -> Stop | None:
        """Why no data link is wanted now."""
        if self._core.stopping.is_set() or self._core.state.phase is Phase.ACQUIRING:
            return Stop(code=1, kind="retry", message=f"{self._core.name} is not ready for a data link")
        if self._unread():
            message = f"{self._core.name} has not read the register since its start, and nobody is primary"
            return Stop(code=1, kind="retry", message=message)
        left = self._core.slow_until - time.monotonic()
        if left > 0:
            message = f"{self._core.peer.name} was too slow for {self._core.name}: tried again in {left:.0f} s"
            return Stop(code=1, kind="refused", message=message)
        return None

    def _unread(self) -> bool:
        """A16: without a primary the record says who may be a source, and it may have changed as this node ended, which
        may have abdicated and not know it."""
        core, state = self._core, self._core.state
        if core.witness is None or "primary" in (state.role, state.peer_role):
            return False
        return not core.witness.known[1] and core.open.value.register_epoch > 0

    def _party(self, sessions: tuple[str, str]) -> Party:
        state = self._core.state
        hello = self._core.peer_link.control.hello if self._core.peer_link.control is not None else None
        same_life = hello is not None and hello.boot_id == self._peer_boot
        volumes = self._core.open.volumes
        sides = {
            volume.name: side_of(
                volume,
                node=self._core.name,
                role=state.role,
                epoch=state.epoch,
                disk=self._core.view.disk(volume),
                dirty=self._core.engine.volume_status(volume.index).dirty_blocks > 0,
                crashed=state.crashed,
                boot_lost=state.boot_lost,
                survivor=self._core.survivor_flag,
                alone=state.phase is Phase.ALONE and state.alone_began,
            )
            for volume in volumes
        }
        facts = Facts(
            sessions=sessions,
            epoch=state.epoch,
            role=state.role,
            flap=state.phase is Phase.WAITING and state.peer_in_sync and same_life,
            pair_uuid=self._core.open.value.pair_uuid,
            volumes=len(volumes),
        )
        return Party(facts, [side_to_facts(v.name, sides[v.name], v.block.volume_uuid) for v in volumes], sides)

    def _decided(self, decisions: dict[str, Decision]) -> None:
        self._core.decisions = decisions

    def _refuse(self, refusal: Refusal) -> None:
        if refusal != self._core.refusal:
            self._core.refusal = refusal
            self._core.view.event("refused", refusal.reason)
            log.warning("no mirror with %s: %s", self._core.peer.name, refusal.reason)
        self._core.changed.set()

    async def _prepare(self, data: DataConnection, agreement: Agreement, plan: Plan) -> None:
        """R1, M10, A16."""
        target = plan.source != self._core.name
        if target and any(one.amount != "none" for one in plan.volumes) and (stop := self._unlisted()) is not None:
            await data.stop(stop)
            raise Stopped(stop)

        def write() -> None:
            self._core.open.met(plan.pair_uuid)
            for volume, one in zip(self._core.open.volumes, plan.volumes, strict=True):
                prepare(
                    volume,
                    volume_uuid=one.volume_uuid,
                    first_id=from_hex(one.first),
                    full_id=from_hex(one.full),
                    target=target and one.amount != "none" and not agreement.flap,
                )

        await self._core.durable(write)

    def _attach(self, data: DataConnection, made: Made, control: Control) -> None:
        source = made.plan.source == self._core.name
        plans = [_PLANS[one.amount] for one in made.plan.volumes]
        busy = {index for index, plan in enumerate(plans) if plan != PLAN_NONE}
        link = Link(data.session, source, made, busy, control)
        self._core.engine.attach_link(
            data.channel, epoch=self._core.state.epoch, source=source, plans=plans, timeout=LINK_TIMEOUT_S
        )
        self._core.link = link
        self._core.refusal = None
        self._core.view.linked(link)
        self._core.post(LinkUp(source))
        for volume, decision in zip(self._core.open.volumes, made.agreement.decisions, strict=True):
            log.info("volume %s: %s from %s: %s", volume.name, decision.amount, made.plan.source, decision.reason)
        if source:
            for volume in self._core.open.volumes:
                if volume.index not in busy and volume.block.ids.bitmap:
                    self._core.spawn(self._forget_bitmap(volume))
        if not busy:
            self._core.all_equal(link)

    def _unlisted(self) -> Stop | None:
        """A16: without a primary this node is not overwritten by who is not in the set, as far as it knows: it may be
        the only one that has everything."""
        core, state = self._core, self._core.state
        if core.witness is None or state.peer_role == "primary" or core.peer.name in state.in_sync or not state.epoch:
            return None
        message = f"{core.name} does not know {core.peer.name} as one that has everything, and nobody is primary"
        return Stop(code=1, kind="retry", message=message)

    async def _forget_bitmap(self, volume: OpenVolume) -> None:
        """The ids are equal: the "done" of an earlier resync was lost on its way."""
        await self._core.durable(lambda: finish_source(volume))


def _shown(shapes: list[Shape]) -> str:
    return printable(", ".join(f"{one.name} ({one.size} bytes, blocks of {one.block_size})" for one in shapes), 500)
