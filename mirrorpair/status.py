"""What a node says of itself: the structs behind `mirrorpair status --json`, and the judgement that stands in them.

Rules:
- A struct's fields are the JSON's (`schema` names and versions it); they are only ever added to.
- The node fills in facts; `judge` alone says what they mean: health, the headline, one sentence why, one sentence what
  to do. Its rules are a table, the first that matches wins, and the worst comes first.
- Nothing is promised that is not so: `synced` holds only when no block of any volume may differ (M3), progress is
  clamped (R11), and a node that hears no primary does not call the pair healthy because it is well itself.
- Pure: ages in seconds are facts that the node measured; nobody here looks at a clock.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import msgspec

from mirrorpair.report import Meter, clamp
from mirrorpair.units import format_percent, format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Role = Literal["primary", "secondary"]
PeerRole = Literal["primary", "secondary", "unknown"]
Disk = Literal["diskless", "failed", "inconsistent", "outdated", "consistent", "up-to-date", "unknown"]
Health = Literal["healthy", "degraded", "critical", "unknown"]
Link = Literal["connected", "connecting", "silent", "refused"]
Serving = Literal["mirrored", "alone", "held", "no"]
RefusalKind = Literal["refused", "split-brain", "unrelated"]
Condition = Literal["primary", "secondary", "connected", "synced"]
EventKind = Literal["daemon", "role", "disk", "link", "resync", "refused", "error"]

# From worst to best; what is not known says nothing about the others and stands last.
DISKS: tuple[Disk, ...] = get_args(Disk)
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
STALL_S = 3.0
KEPT_EVENTS = 1000


class Resync(msgspec.Struct, frozen=True, kw_only=True):
    """A resync under way. `direction` is what this node is in it. `done` counts what has been dealt with, of which
    `skipped` was equal; `sent` is the payload that travelled. `rate` is bytes done per second over the last seconds,
    `eta_s` None when it cannot be told, `stalled` why nothing moves, or None. All sizes are bytes."""

    direction: Literal["source", "target"]
    done_bytes: int
    total_bytes: int
    skipped_bytes: int
    sent_bytes: int
    rate: float
    eta_s: float | None
    stalled: str | None = None


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """One volume as this node sees it. `out_of_sync_bytes`: in blocks that may differ between the nodes, whichever of
    them holds the bits. `peer_disk` is "unknown" while the peer has not told. Byte counters are since the start."""

    name: str
    size: int
    disk: Disk
    peer_disk: Disk
    out_of_sync_bytes: int
    resync: Resync | None = None
    clients: int = 0
    in_flight: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """The other node. `connected`: the replication session is up, writes or a resync flow; `link` says more:
    "refused" when the two talk and do not agree to mirror (Status.refusal), "silent" when nothing is heard of a peer
    that was there, "connecting" before. `heartbeat_age_s`: since its last beat arrived, None before the first."""

    node: str
    connected: bool
    role: PeerRole = "unknown"
    heartbeat_age_s: float | None = None
    rtt_s: float | None = None
    link: Link = "connecting"
    address: str = ""
    version: str | None = None


class Arbiter(msgspec.Struct, frozen=True, kw_only=True):
    """`reachable`: it gave its record when it was last asked; else `trouble` says why not. `disbelieved`: it has one,
    but an older one than this node has seen (F17)."""

    kind: Literal["witness", "etcd", "none"]
    reachable: bool
    trouble: str | None = None
    disbelieved: bool = False


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why the two nodes do not mirror although they talk (the H rows that refuse). `reason` is one sentence that
    names nodes."""

    kind: RefusalKind
    reason: str
    volume: str | None = None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """The last thing that happened to roles or the link: "failed over alpha -> beta", "heartbeat lost for 3.0 s"."""

    text: str
    cause: str
    age_s: float


class Path(msgspec.Struct, frozen=True, kw_only=True):
    """One way for heartbeats. `kind` "control": the control connection, beside which the data go; "heartbeat": a
    further one (`heartbeat-address`), at `address` of `node`. `alive`: the peer has been heard over it lately;
    `received`: beats of the peer in the present connection."""

    kind: Literal["control", "heartbeat"]
    node: str
    address: str
    alive: bool
    rtt_s: float | None = None
    heartbeat_age_s: float | None = None
    received: int = 0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One glance at a node. `health`, `summary`, `reason` and `action` are what `judge` makes of the rest.

    `serving` is what the grant lets clients have: "mirrored" (an answer waits for the peer), "alone", "held" (requests
    wait; `held` says why) or "no" (not primary). `heartbeat_age_s`: since the last beat of ours that the peer
    answered was sent. `paused`, `latched`: the primary does not change by itself, because a person said so, or because
    it changed too often within an hour. `paths`: where heartbeats go, the control connection first. `starting`: the
    daemon has not opened everything yet, and nothing else here is certain.
    """

    schema: str = "mirrorpair.status/1"
    pair: str
    node: str
    role: Role
    epoch: int
    in_sync: list[str]
    health: Health = "unknown"
    reason: str = ""
    action: str = ""
    peer: Peer
    arbiter: Arbiter
    volumes: list[Volume]
    summary: str = ""
    serving: Serving
    held: str | None = None
    refusal: Refusal | None = None
    change: Change | None = None
    starting: bool = False
    insecure: bool = False
    mode: Literal["sync", "semi-sync", "async"] = "sync"
    paused: bool = False
    latched: bool = False
    address: str = ""
    heartbeat_age_s: float | None = None
    uptime_s: float = 0.0
    version: str | None = None
    paths: list[Path] = []


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that changed, with its reason. `time_s` is wall-clock time in seconds since 1970; `seq` counts from 1
    in each run of the daemon."""

    schema: str = "mirrorpair.event/1"
    seq: int
    time_s: float
    node: str
    epoch: int
    kind: EventKind
    volume: str | None = None
    old: str | None = None
    new: str | None = None
    reason: str


class EventLog:
    """The last events of a node, in order; bounded, so that a flapping link cannot fill the memory."""

    def __init__(self, node: str, keep: int = KEPT_EVENTS) -> None:
        self._node = node
        self._seq = 0
        self._kept: deque[Event] = deque(maxlen=keep)

    def add(
        self,
        time_s: float,
        kind: EventKind,
        reason: str,
        *,
        epoch: int,
        volume: str | None = None,
        old: str | None = None,
        new: str | None = None,
    ) -> Event:
        self._seq += 1
        event = Event(
            seq=self._seq,
            time_s=time_s,
            node=self._node,
            epoch=epoch,
            kind=kind,
            volume=volume,
            old=old,
            new=new,
            reason=reason,
        )
        self._kept.append(event)
        return event

    def since(self, seq: int) -> list[Event]:
        """Those after `seq`. A number that was never given out is of an earlier run: then all are new."""
        if seq > self._seq:
            seq = 0
        return [event for event in self._kept if event.seq > seq]


class _Counted(NamedTuple):
    """`report.Counters` of an online resync, which has no read-back and counts no differences."""

    total_bytes: int
    done_bytes: int
    skipped_bytes: int
    sent_bytes: int
    differing_bytes: int = 0
    differing_blocks: int = 0
    written_bytes: int = 0
    punched_bytes: int = 0
    wire_out_bytes: int = 0
    wire_in_bytes: int = 0
    recheck_total_bytes: int = 0
    recheck_done_bytes: int = 0


class ResyncMeter:
    """Turns the engine's counters of one resync into Resync; `now` is monotonic seconds. One per resync."""

    def __init__(self, direction: Literal["source", "target"], now: float) -> None:
        self._direction: Literal["source", "target"] = direction
        self._meter = Meter(now)
        self._moved = now
        self._last = 0

    def update(self, now: float, *, total: int, done: int, skipped: int, sent: int, waits_for: str = "") -> Resync:
        """`waits_for`: what is known to hold it up ("the peer's disk"), for the stall's sentence."""
        progress = self._meter.update(_Counted(total, done, skipped, sent), now)
        if progress.done_bytes != self._last:
            self._last, self._moved = progress.done_bytes, now
        still = now - self._moved
        stalled = None
        if still >= STALL_S and progress.done_bytes < progress.total_bytes:
            stalled = f"nothing has moved for {int(still)} s" + (f", waiting for {waits_for}" if waits_for else "")
        return Resync(
            direction=self._direction,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            skipped_bytes=progress.skipped_bytes,
            sent_bytes=progress.sent_bytes,
            rate=progress.rate,
            eta_s=progress.eta_s,
            stalled=stalled,
        )


# --- what the facts come to

CHOOSE = (
    "nothing is overwritten until a person chooses the node whose data shall stay: on the other one save what is "
    "needed, stop the daemon, then `mirrorpair init --force` and `mirrorpair run`: it takes everything from the first"
)
"""what to do about a split brain or unrelated data"""


def worst(disks: Iterable[Disk]) -> Disk:
    """The worst of them; "unknown" when there is none."""
    return min(disks, key=DISKS.index, default="unknown")


def ago(seconds: float) -> str:
    """ "4 s ago", "2m14s ago" """
    return f"{int(seconds)} s ago" if seconds < 60 else f"{format_seconds(seconds)} ago"


def out_of_sync(status: Status) -> int:
    return sum(max(0, volume.out_of_sync_bytes) for volume in status.volumes)


def resync_totals(volumes: Iterable[Volume]) -> tuple[int, int]:
    """(done, total) bytes of all resyncs under way."""
    running = [volume.resync for volume in volumes if volume.resync is not None]
    total = sum(max(0, resync.total_bytes) for resync in running)
    return clamp(sum(resync.done_bytes for resync in running), total), total


def volumes_of(status: Status, volume: str | None) -> list[Volume]:
    return [entry for entry in status.volumes if volume is None or entry.name == volume]


def holds(status: Status, condition: Condition, volume: str | None = None) -> bool:
    """Whether `wait --for CONDITION` is over. `volume` narrows "synced" to one of them.

    primary    this node is primary and answers clients
    secondary  it is not, and has finished starting
    connected  the replication session is up
    synced     connected, and no block may differ: both disks up-to-date, no bit set, no resync under way
    """
    if status.starting:
        return False
    if condition == "primary":
        return status.role == "primary" and status.serving in ("mirrored", "alone")
    if condition == "secondary":
        return status.role == "secondary"
    if condition == "connected":
        return status.peer.connected
    return status.peer.connected and all(_in_sync(entry) for entry in volumes_of(status, volume))


def hopeless(status: Status, condition: Condition) -> str | None:
    """Why waiting for it is in vain until a person decides something, or None. Unlike a silent peer, which may come
    back, a split brain stays; but a peer that is away may be made anew, which is how it is ended."""
    refusal = status.refusal
    if status.peer.role == "unknown":
        return None
    if condition in ("connected", "synced") and refusal is not None and refusal.kind != "refused":
        return next_step(refusal)
    return None


def next_step(refusal: Refusal) -> str:
    """Of a split brain or unrelated data: the reason, and what a person has to do."""
    return f"{refusal.reason}; {CHOOSE}"


def judge(status: Status) -> Status:
    """The same facts with `health`, `summary`, `reason` and `action` filled in."""
    for rule in _RULES:
        verdict = rule(status)
        if verdict is not None:
            break
    else:
        verdict = _Verdict("healthy", "mirrored", "every write is on both nodes", "none")
    reason = verdict.reason
    if status.change is not None:
        change = f"{status.change.text} {ago(status.change.age_s)}: {status.change.cause}"
        reason = f"{reason}; {change}" if reason else change
    return msgspec.structs.replace(
        status, health=verdict.health, summary=verdict.summary, reason=reason, action=verdict.action
    )


class _Verdict(NamedTuple):
    health: Health
    summary: str
    reason: str
    action: str


def _in_sync(volume: Volume) -> bool:
    return (
        volume.disk == "up-to-date"
        and volume.peer_disk == "up-to-date"
        and volume.out_of_sync_bytes == 0
        and volume.resync is None
    )


def _starting(status: Status) -> _Verdict | None:
    if not status.starting:
        return None
    return _Verdict("unknown", "starting", "the daemon is opening its images and metadata", "none: wait")


def _two_histories(status: Status) -> _Verdict | None:
    """Split brain and unrelated data: nothing is overwritten until a person says whose data shall stay."""
    refusal = status.refusal
    if refusal is None or refusal.kind == "refused":
        return None
    return _Verdict(
        "critical",
        "split brain" if refusal.kind == "split-brain" else "unrelated data",
        refusal.reason,
        CHOOSE,
    )


def _two_primaries(status: Status) -> _Verdict | None:
    if not (status.role == "primary" and status.peer.role == "primary"):
        return None
    return _Verdict(
        "critical",
        "both nodes are primary",
        f"{status.node} and {status.peer.node} both say that they are primary",
        "stop the clients of one node at once, then `mirrorpair demote` there",
    )


def _failed_disk(status: Status) -> _Verdict | None:
    peer = status.peer
    mine, theirs = worst(volume.disk for volume in status.volumes), worst(volume.peer_disk for volume in status.volumes)
    bad = ("failed", "diskless")
    if mine not in bad and theirs not in bad:
        return None
    node, other, disk, rest = (
        (status.node, peer.node, mine, theirs) if mine in bad else (peer.node, status.node, theirs, mine)
    )
    covered = peer.connected and rest == "up-to-date"
    return _Verdict(
        "degraded" if covered else "critical",
        f"{node}'s disk has failed" if disk == "failed" else f"{node} has no disk",
        f"{node} cannot use its image; " + (f"{other} has all data" if covered else f"{other} has no current copy"),
        f"see the log of {node}; replace the disk behind the image, then `mirrorpair init` and `mirrorpair run` there",
    )


def _held(status: Status) -> _Verdict | None:
    if status.role != "primary" or status.serving != "held":
        return None
    return _Verdict(
        "critical",
        "requests wait",
        status.held or f"{status.node} may not answer without {status.peer.node}",
        f"none if it lasts only a moment; else see whether {status.peer.node} runs and can be reached",
    )


def _no_primary(status: Status) -> _Verdict | None:
    peer = status.peer
    if status.role == "primary" or peer.role == "primary":
        return None
    if status.refusal is not None:
        # Before anybody is promoted: what only the other one has may be lost by it.
        return _Verdict(
            "critical",
            "no node is primary",
            f"{status.refusal.reason}; nobody serves",
            "remove the cause, then `mirrorpair promote` on the node that shall serve",
        )
    if peer.role == "secondary" and peer.link != "silent":
        return _Verdict(
            "critical",
            "no node is primary",
            f"{status.node} and {peer.node} are both secondary: nobody serves",
            "`mirrorpair promote` on the node that shall serve",
        )
    return _Verdict(
        "critical",
        "no primary is heard",
        f"{peer.node} is {_absence(peer)}, and {status.node} is secondary",
        f"see whether {peer.node} runs; if it is gone, `mirrorpair promote --accept-data-loss` on {status.node}",
    )


def _refused(status: Status) -> _Verdict | None:
    if status.refusal is None:
        return None
    return _Verdict(
        "degraded",
        "not mirrored",
        status.refusal.reason,
        "remove the cause; the nodes try again by themselves, `mirrorpair resync` does so at once",
    )


def _away(status: Status) -> _Verdict | None:
    peer = status.peer
    if peer.connected:
        return None
    behind = out_of_sync(status)
    reason = f"{peer.node} is {_absence(peer)}" + (f", {format_size(behind)} out of sync" if behind else "")
    return _Verdict(
        "degraded",
        "not mirrored",
        reason,
        f"see whether {peer.node} runs and can be reached; it comes back and resyncs by itself",
    )


def _resyncing(status: Status) -> _Verdict | None:
    running = [volume for volume in status.volumes if volume.resync is not None]
    if not running:
        return None
    stalled = next((volume for volume in running if volume.resync is not None and volume.resync.stalled), None)
    first = running[0].resync
    assert first is not None
    nodes = (status.node, status.peer.node)
    source, target = nodes if first.direction == "source" else nodes[::-1]
    reason = f"resync {source} -> {target} {format_percent(*resync_totals(running))}"
    if stalled is not None and stalled.resync is not None:
        reason += f"; {stalled.name}: {stalled.resync.stalled}"
        return _Verdict("degraded", "resync is stalled", reason, f"see the log and the disk of {target}")
    return _Verdict("degraded", "mirror is resyncing", reason, "none: wait for in-sync")


def _behind(status: Status) -> _Verdict | None:
    late = [volume for volume in status.volumes if not _in_sync(volume)]
    if not late:
        return None
    first = late[0]
    return _Verdict(
        "degraded",
        "out of sync",
        f"volume {first.name}: {status.node} is {first.disk}, {status.peer.node} is {first.peer_disk}, "
        f"{format_size(max(0, first.out_of_sync_bytes))} may differ",
        "`mirrorpair resync`",
    )


def _arbiter(status: Status) -> _Verdict | None:
    if status.arbiter.kind == "none" or status.arbiter.reachable:
        return None
    if status.arbiter.disbelieved:
        return _Verdict(
            "degraded",
            "arbiter not believed",
            f"{status.arbiter.trouble or 'the record is an old one'}: both nodes go on, but no role can change",
            "`mirrorpair promote --accept-data-loss` at the primary, with its peer connected, has the record made anew",
        )
    return _Verdict(
        "degraded",
        "arbiter not reachable",
        f"the {status.arbiter.kind} does not answer: both nodes go on, but no role can change",
        f"see whether the {status.arbiter.kind} runs and can be reached",
    )


def _paused(status: Status) -> _Verdict | None:
    if not status.paused:
        return None
    return _Verdict(
        "degraded",
        "paused",
        "a person has paused the pair: no failover and no failback happens by itself",
        "`mirrorpair resume` when the work is done",
    )


def _path_lost(status: Status) -> _Verdict | None:
    """Of several; the loss of all of them has been told before."""
    lost = [path for path in status.paths if not path.alive]
    if not lost or len(status.paths) < 2:
        return None
    where = " and ".join(f"{path.address} ({path.node})" for path in lost)
    return _Verdict(
        "degraded",
        "a heartbeat path is lost",
        f"{status.node} and {status.peer.node} do not hear each other over {where}; over another path they do",
        "see whether that network is up; the path comes back by itself",
    )


def _latched(status: Status) -> _Verdict | None:
    if not status.latched:
        return None
    return _Verdict(
        "degraded",
        "failback is latched",
        "the primary has changed too often within an hour (max-role-changes-per-hour): service does not go back to the "
        "preferred node by itself; a dead primary is still replaced",
        "find out why it changes (`mirrorpair history` on both nodes), then `mirrorpair resume`",
    )


def _absence(peer: Peer) -> str:
    if peer.heartbeat_age_s is None:
        return "not heard yet"
    if peer.link == "silent":
        return f"silent, last heard {ago(peer.heartbeat_age_s)}"
    return "not connected"


_RULES: tuple[Callable[[Status], _Verdict | None], ...] = (
    _starting,
    _two_histories,
    _two_primaries,
    _failed_disk,
    _held,
    _no_primary,
    _refused,
    _away,
    _resyncing,
    _behind,
    _arbiter,
    _path_lost,
    _paused,
    _latched,
)
