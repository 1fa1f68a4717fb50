"""What a node shows of itself: status, events, plans of a resync. Reads the node, changes nothing.

Rules:
- R11 What is shown is counted by the engine or heard from the peer, never guessed. A volume counts as up-to-date on a
  secondary only while a data link is attached, its resync has ended, and the register says so: only then is it true
  that this node could be promoted without loss.
- Bits count once: both nodes may hold them, so the larger number is what may differ.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, Protocol

from mirrorpair import __version__, roles
from mirrorpair.control import ResyncPlan
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.rolewords import Mode, Phase
from mirrorpair.status import (
    Arbiter,
    Change,
    EventLog,
    Path,
    Peer,
    Refusal,
    ResyncMeter,
    Status,
    Volume,
    judge,
)

if TYPE_CHECKING:
    from mirrorpair._core import Engine
    from mirrorpair.address import Address
    from mirrorpair.chronicle import Scribe
    from mirrorpair.config import Config
    from mirrorpair.config import Node as NodeConfig
    from mirrorpair.history import Decision, DiskState
    from mirrorpair.peerbeat import Pulse
    from mirrorpair.peerlink import PeerLink
    from mirrorpair.peermessages import Beat
    from mirrorpair.rolewords import Started, State
    from mirrorpair.status import EventKind, Serving
    from mirrorpair.status import Link as LinkName
    from mirrorpair.volumes import OpenNode, OpenVolume


class LinkLike(Protocol):
    """The node's data link, as far as it is shown."""

    source: bool
    open_volumes: set[int]


class WitnessLike(Protocol):
    """Its witness, as far as it is shown."""

    reachable: bool
    trouble: str | None
    disbelieved: bool


class NodeLike(Protocol):
    """The node, as far as it is shown."""

    config: Config
    name: str
    me: NodeConfig
    peer: NodeConfig
    open: OpenNode
    engine: Engine
    peer_link: PeerLink
    state: State
    refusal: Refusal | None
    decisions: dict[str, Decision]
    peer_beat: Beat | None

    @property
    def link(self) -> LinkLike | None: ...

    @property
    def witness(self) -> WitnessLike | None: ...


class NodeView:
    def __init__(self, node: NodeLike, scribe: Scribe) -> None:
        """`scribe`: keeps changes of the role and of the disks for longer than this process lives."""
        self._node = node
        self._scribe = scribe
        self._began = time.monotonic()
        self._meters: dict[int, ResyncMeter] = {}
        self._change: tuple[str, str, float] | None = None
        self.log = EventLog(node.name)

    # --- what happened

    def event(
        self, kind: EventKind, reason: str, *, volume: str | None = None, old: str | None = None, new: str | None = None
    ) -> None:
        epoch, now = self._node.state.epoch, time.time()
        self.log.add(now, kind, reason, epoch=epoch, volume=volume, old=old, new=new)
        if kind in ("role", "disk") and new is not None:
            self._scribe.add(now, self._node.name, epoch, kind, reason, volume=volume, old=old, new=new)

    def began(self, started: Started) -> None:
        """An earlier daemon may have ended as primary, and could not write down that it did."""
        if self._scribe.last("role") == "primary":
            how = "" if started.clean else ", without a clean stop"
            reason = f"the daemon of {self._node.name} was started; the one before it ended as primary{how}"
            self.event("role", reason, old="primary", new=self._node.state.role)

    def look_at_disks(self, reason: str) -> None:
        """What has changed of them is an event."""
        for volume in self._node.open.volumes:
            old, new = self._scribe.last("disk", volume.name), self.disk(volume)
            if old != new:
                self.event("disk", reason, volume=volume.name, old=old, new=new)

    def stepped(self, before: State, state: State, sentence: str) -> None:
        if before.role != state.role:
            self.event("role", sentence, old=before.role, new=state.role)
            self._change = (f"{before.role} -> {state.role}", sentence, time.monotonic())
        elif before.phase is not state.phase or before.in_sync != state.in_sync:
            self.event("link", sentence, old=before.phase.value, new=state.phase.value)
            if state.phase in (Phase.WAITING, Phase.ALONE, Phase.FROZEN):
                self._change = (state.phase.value, sentence, time.monotonic())

    def linked(self, link: LinkLike) -> None:
        """A new data link: its resyncs begin."""
        now = time.monotonic()
        self._meters = {index: ResyncMeter("source" if link.source else "target", now) for index in link.open_volumes}
        self.event("link", f"mirroring with {self._node.peer.name}")

    # --- what is

    def disk(self, volume: OpenVolume) -> DiskState:
        """This node's disk state of the volume."""
        node, state = self._node, self._node.state
        if volume.failed is not None:
            return "failed"
        if volume.block.inconsistent:
            return volume.block.disk
        if state.role == "primary":
            return "up-to-date"
        if node.link is not None and volume.index not in node.link.open_volumes:
            return "up-to-date" if state.me in state.in_sync else "consistent"
        if state.in_sync and state.me not in state.in_sync:
            return "outdated"
        return "consistent"

    def status(self) -> Status:
        node, state, now = self._node, self._node.state, clock_boottime_ns()
        age = node.peer_link.heart.hearing.age_ns(now)
        rtt = node.peer_link.heart.beats.rtt_ns
        session = node.peer_link.session
        change = self._change
        return judge(
            Status(
                pair=node.config.name,
                node=node.name,
                role=state.role,
                epoch=state.epoch,
                in_sync=list(state.in_sync),
                peer=Peer(
                    node=node.peer.name,
                    connected=node.link is not None,
                    role=(state.peer_role or "unknown") if session is not None else "unknown",
                    heartbeat_age_s=None if age is None else age / 1e9,
                    rtt_s=None if rtt is None else rtt / 1e9,
                    link=self._link_name(age),
                    address=str(node.peer.address),
                    version=session.hello.version if session is not None and session.hello is not None else None,
                ),
                arbiter=self._arbiter(),
                volumes=[self._volume(volume) for volume in node.open.volumes],
                serving=self._serving(),
                held=self._held(),
                refusal=node.refusal if node.link is None else None,
                change=None
                if change is None
                else Change(text=change[0], cause=change[1], age_s=time.monotonic() - change[2]),
                insecure=node.config.insecure,
                mode=node.config.mode,
                paused=state.paused,
                latched=state.latched,
                address=str(node.me.address),
                heartbeat_age_s=None if age is None else age / 1e9,
                uptime_s=time.monotonic() - self._began,
                version=__version__,
                paths=self._paths(now),
            )
        )

    def _paths(self, now: int) -> list[Path]:
        node, link = self._node, self._node.peer_link
        pulse = link.control.pulse if link.control is not None else None
        ways: list[tuple[Literal["control", "heartbeat"], str, Address, Pulse | None]] = [
            ("control", node.peer.name, node.peer.address, pulse),
            *(("heartbeat", node.name if one.ours else node.peer.name, one.address, one.pulse) for one in link.paths),
        ]
        found = []
        for kind, whose, address, pulse in ways:
            age = pulse.hearing.age_ns(now) if pulse is not None else None
            rtt = pulse.rtt_ns if pulse is not None else None
            found.append(
                Path(
                    kind=kind,
                    node=whose,
                    address=str(address),
                    alive=pulse is not None and not pulse.hearing.suspected(now),
                    rtt_s=None if rtt is None else rtt / 1e9,
                    heartbeat_age_s=None if age is None else age / 1e9,
                    received=pulse.received if pulse is not None else 0,
                )
            )
        return found

    def _arbiter(self) -> Arbiter:
        kind, witness = self._node.config.arbiter, self._node.witness
        if witness is None:
            return Arbiter(kind=kind, reachable=True)
        return Arbiter(kind=kind, reachable=witness.reachable, trouble=witness.trouble, disbelieved=witness.disbelieved)

    def _link_name(self, age_ns: int | None) -> LinkName:
        node = self._node
        if node.link is not None:
            return "connected"
        if node.refusal is not None:
            return "refused"
        return "connecting" if node.peer_link.session is not None or age_ns is None else "silent"

    def _serving(self) -> Serving:
        mode = roles.mode_of(self._node.state)
        if mode is Mode.NONE:
            return "held" if self._node.state.role == "primary" else "no"
        if mode is Mode.PEER:
            return "mirrored" if self._node.state.phase is Phase.PAIRED else "held"
        return "alone"

    def _held(self) -> str | None:
        state = self._node.state
        if state.handing in ("asked", "unknown"):
            return f"{state.me} has given the role to {state.peer}, and does not know yet whether the register has it"
        if state.phase is Phase.FROZEN:
            return f'{state.peer} is silent, and with survivor = "secondary" it may have taken over'
        if state.phase in (Phase.WAITING, Phase.SHRINKING):
            return f"{state.me} waits for {state.peer} before it goes on alone"
        return None

    def _volume(self, volume: OpenVolume) -> Volume:
        node = self._node
        counted = node.engine.volume_status(volume.index)
        beat, link = node.peer_beat, node.link
        mine = counted.dirty_blocks * volume.block_size
        theirs = beat.dirty.get(volume.name, 0) if beat is not None else 0
        resync = None
        if link is not None and volume.index in link.open_volumes and (meter := self._meters.get(volume.index)):
            resync = meter.update(
                time.monotonic(),
                total=counted.resync_total,
                done=counted.resync_done,
                skipped=counted.resync_skipped,
                sent=counted.resync_sent,
            )
        return Volume(
            name=volume.name,
            size=volume.size,
            disk=self.disk(volume),
            peer_disk=beat.disks.get(volume.name, "unknown") if beat is not None else "unknown",
            out_of_sync_bytes=min(volume.size, max(mine, theirs)),
            resync=resync,
            clients=counted.clients,
            in_flight=counted.in_flight,
            read_bytes=counted.read_bytes,
            written_bytes=counted.written_bytes,
        )

    # --- plans

    def plans(self, names: list[str], *, full: bool) -> list[ResyncPlan]:
        """What a resync does or would do, by the last handshake's decisions."""
        return [self._plan(self._node.open.volume(name), full) for name in names]

    def _plan(self, volume: OpenVolume, full: bool) -> ResyncPlan:
        node = self._node
        decision = node.decisions.get(volume.name)
        shown = self._volume(volume)
        if decision is None:
            reason = (
                node.refusal.reason if node.refusal is not None else "the two nodes have not compared their data yet"
            )
            return ResyncPlan(
                volume=volume.name, amount="refuse", source=None, target=None, bytes=0, rule="options", reason=reason
            )
        amount, source, target, count = decision.amount, decision.source, decision.target, shown.out_of_sync_bytes
        reason = decision.reason
        if node.link is not None:
            source, target = (node.name, node.peer.name) if node.link.source else (node.peer.name, node.name)
            amount = "none" if count == 0 and volume.index not in node.link.open_volumes else "bitmap"
            if amount == "none":
                reason = f"{node.name} and {node.peer.name} have the same data"
        if amount == "full" or (full and amount in ("none", "bitmap")):
            amount, count = "full", volume.size
        if amount == "none":
            source, target, count = None, None, 0
        return ResyncPlan(
            volume=volume.name,
            amount=amount,
            source=source,
            target=target,
            bytes=count if amount in ("bitmap", "full") else 0,
            rule=decision.rule,
            reason=reason,
        )

    def resync_sentence(self) -> str:
        node = self._node
        link = node.link
        if link is None or not link.open_volumes:
            return f"{node.name} and {node.peer.name} are linked and have the same data"
        names = ", ".join(node.open.volumes[index].name for index in sorted(link.open_volumes))
        source, target = (node.name, node.peer.name) if link.source else (node.peer.name, node.name)
        return f"resync of {names} from {source} to {target} is under way"
