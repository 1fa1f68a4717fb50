"""The words of the role decisions: a node's state, what can happen to it, what is to be done. Pure; see roles.py.

Rules:
- Everything that a decision depends on is in State or in the event: no clock, no file, no other module's memory.
- Times are CLOCK_BOOTTIME ns.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

RoleName = Literal["primary", "secondary"]
Survivor = Literal["primary", "secondary"]
Purpose = Literal[
    "bootstrap",
    "promote",
    "readopt",
    "takeover",
    "raise",
    "shrink",
    "expand",
    "release",
    "handoff",
    "abdicate",
    "hold",
]
ACQUISITIONS: frozenset[Purpose] = frozenset({"bootstrap", "promote", "readopt", "takeover"})

FAILED = 1
REFUSED = 12
WRONG_ROLE = 15
SPLIT_BRAIN = 20


class Phase(enum.Enum):
    SECONDARY = "secondary"
    RETURNING = "returning"
    ACQUIRING = "acquiring"
    PAIRED = "paired"
    WAITING = "waiting"
    SHRINKING = "shrinking"
    ALONE = "alone"
    FROZEN = "frozen"


PRIMARY = frozenset({Phase.PAIRED, Phase.WAITING, Phase.SHRINKING, Phase.ALONE, Phase.FROZEN})


class Mode(enum.IntEnum):
    """What the engine is granted; the numbers are the engine's."""

    NONE = 0
    PEER = 1
    ALONE_FIRST = 2
    ALONE = 3


class Cover(enum.IntFlag):
    """What the engine may rely on the peer for when this node's disk fails (A14); the numbers are the engine's."""

    NONE = 0
    READS = 1
    """it is asked for what cannot be read here"""
    HOLD = 2
    """the answer to what only the peer has is held: an abdication may follow"""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """All that the decisions depend on. `in_sync`, `epoch` and `primary` are the register's."""

    me: str
    peer: str
    survivor: Survivor
    arbitrated: bool = False
    """the register is kept by a third party: who is silent may be replaced"""
    suspect_ns: int
    retry_ns: int
    handoff_ns: int = 10 * 10**9
    """how long clients may be kept waiting before the swap of a handoff is sent"""
    failback_ns: int | None = None
    """the peer is the preferred primary and gets the role back by itself once it has been in sync for so long"""
    preferred: bool = False
    """arbitrated: it becomes the first primary by itself (A15)"""
    phase: Phase = Phase.SECONDARY
    epoch: int = 0
    primary: str | None = None
    in_sync: tuple[str, ...] = ()
    peer_up: bool = False
    peer_role: RoleName | None = None
    peer_epoch: int = 0
    peer_left: bool = False
    """it stopped gracefully, and has not been seen since"""
    linked: bool = False
    """a data link is attached"""
    whole: bool = False
    """linked, as no primary: the peer holds nothing that is not here"""
    last_heard_ns: int | None = None
    deadline_ns: int | None = None
    bound_until_ns: int = 0
    """arbitrated: until then this node has promised not to take over (A11); as the peer was lost, or at the start"""
    steady_since_ns: int | None = None
    """the pair is linked and in sync, and nothing is under way, since then"""
    asked: Swap | None = None
    """the acquisition under way (ACQUIRING); with a deadline: nothing is known of it, and it is asked for again then"""
    raising: bool = False
    """a swap to a higher epoch is under way (A13)"""
    crashed: bool = False
    """ended as primary without a clean stop, and neither primary nor in sync since"""
    boot_lost: bool = False
    alone_began: bool = False
    """the new generation is durable (G2)"""
    equal: bool = False
    """the linked peer has everything (told at the link's source end)"""
    expanding: Literal["no", "asked", "unknown"] = "no"
    """a swap that takes the peer into the set is under way, or may have happened: the peer is required (A2)"""
    draining: bool = False
    releasing: bool = False
    released: bool = False
    """arbitrated: a person has demoted it, and whether the register knows it is not known"""
    stopping: bool = False
    handing: Literal["no", "pausing", "asked", "unknown"] = "no"
    """a handoff to the peer: clients are being paused; its swap is on its way; nothing is known of that (A0). An
    abdication has no pause"""
    ailing: str | None = None
    """what this node's disk failed with (A14)"""
    again_ns: int | None = None
    """an abdication failed: when the next one is due"""
    redirecting: bool = False
    """the role was handed over; the paused clients are hung up on when the peer serves, or does not in time"""
    paused: bool = False
    """A19: by a person; no change of primary that nobody asked for"""
    latched: bool = False
    """F16: too many changes within an hour; as paused, but for a failover from a dead primary"""
    answering: bool = False
    """a person waits for the outcome of a promotion, demotion or handoff"""

    @property
    def role(self) -> RoleName:
        return "primary" if self.phase in PRIMARY else "secondary"

    @property
    def peer_in_sync(self) -> bool:
        return self.expanding != "no" or self.peer in self.in_sync

    @property
    def failback_at_ns(self) -> int | None:
        """When the preferred peer has been in sync for long enough."""
        if self.failback_ns is None or self.steady_since_ns is None:
            return None
        return self.steady_since_ns + self.failback_ns

    @property
    def wake_ns(self) -> int | None:
        """When a Tick is due at the latest."""
        again = self.again_ns if self.phase is Phase.PAIRED and self.handing == "no" else None
        due = [at for at in (self.deadline_ns, self.failback_at_ns, again) if at is not None]
        return min(due, default=None)

    @property
    def sole(self) -> bool:
        """This node is the only one that has every acknowledged write."""
        return self.in_sync == (self.me,) and self.expanding == "no"


class Swap(msgspec.Struct, frozen=True):
    """Change the register; its outcome is an event Swapped. They are carried out in the order in which they were asked
    for. `in_sync` None: as the register has it then, which an earlier swap may still change; the event says what it
    was. `needs_peer`: it was decided because of what the peer said, so it fails when the peer is gone by then.
    `overrides`: a person said that what the register keeps this node from may be lost (A3); `forced`: that the primary
    of record serves no more; `unasked`: no person wants it (A19). A "handoff" gives the role to the peer; so does an
    "abdicate", which leaves the set, too (A14); a "hold" changes nothing: once it is ok no earlier swap can land any
    more (A0)."""

    purpose: Purpose
    epoch: int
    primary: str | None
    in_sync: tuple[str, ...] | None
    needs_peer: bool = False
    overrides: bool = False
    forced: bool = False
    unasked: bool = False


# --- events


class Started(msgspec.Struct, frozen=True):
    """First of all. `was_primary`: the node file's role; `wait_ns`: a promise's full time (A11). In an arbitrated pair
    the register is not known yet: `primary` None and `in_sync` empty, a RecordChanged tells them."""

    epoch: int
    primary: str | None
    in_sync: tuple[str, ...]
    was_primary: bool
    clean: bool
    boot_lost: bool
    wait_ns: int
    obstacle: str | None = None
    """why the disks cannot serve"""


class PeerUp(msgspec.Struct, frozen=True):
    role: RoleName
    epoch: int


class PeerSaid(msgspec.Struct, frozen=True):
    """A heartbeat; an event only when something in it has changed."""

    role: RoleName
    epoch: int


class PeerFloor(msgspec.Struct, frozen=True):
    """A13: the peer has asked for epochs up to this one, above ours, and an attempt may still be on its way."""

    floor: int


class PeerDown(msgspec.Struct, frozen=True):
    """The control connection is lost, or silent for too long. `bound_until_ns`: our own promise to it (A11)."""

    why: str
    last_heard_ns: int | None = None
    bound_until_ns: int = 0


class PeerDied(msgspec.Struct, frozen=True):
    """A11: a process of the peer is proven to have ended. `gone`: the last that was met here, so it is not there (a
    PeerDown came first). `bound_until_ns`: our own promise, which may have ended with it."""

    why: str
    gone: bool
    bound_until_ns: int


class PeerLeft(msgspec.Struct, frozen=True):
    """It stops gracefully: it serves no more, and does not come back in this session."""


class LinkUp(msgspec.Struct, frozen=True):
    """A data link is attached to the engine. `source`: this node is its source."""

    source: bool = False


class LinkLost(msgspec.Struct, frozen=True):
    """`last_heard_ns`: when the peer was last heard over what was lost, if that was silent before."""

    why: str
    last_heard_ns: int | None = None


class Synced(msgspec.Struct, frozen=True):
    """Every volume of the peer is durably equal to ours (R1), told at the link's source end. `known`: the register
    has this one by its name (A8)."""

    known: bool = True


class CaughtUp(msgspec.Struct, frozen=True):
    """Every volume here is durably equal to the peer's: what an earlier end left open is settled."""


class RecordChanged(msgspec.Struct, frozen=True):
    """The register has another content than this node gave it last."""

    epoch: int
    primary: str | None
    in_sync: tuple[str, ...]
    paused: bool = False
    latched: bool = False


class Swapped(msgspec.Struct, frozen=True):
    """The outcome of an action Swap. `ok`: the register is what it asked for, durably, and `paused` and `latched` as
    said; `unknown`: it may be (A0);
    `code`: what a person's command ends with if it is neither, by default that somebody else changed the roles."""

    swap: Swap
    ok: bool
    why: str = ""
    unknown: bool = False
    code: int = WRONG_ROLE
    paused: bool = False
    latched: bool = False
    lasting: bool = True
    """an abdication: this node will know of it, whatever happens to its process now"""


class Promote(msgspec.Struct, frozen=True):
    """`obstacle`: why the disks cannot serve, or None. `bound_until_ns`: our own promise (A11). `divided`: that both
    nodes hold data which the other one lacks, and what to do; None: it is not known to be so."""

    accept_data_loss: bool
    force: bool
    obstacle: str | None
    bound_until_ns: int
    divided: str | None = None


class Demote(msgspec.Struct, frozen=True):
    pass


class Handoff(msgspec.Struct, frozen=True):
    """A person wants the peer to be primary."""


class Quiet(msgspec.Struct, frozen=True):
    """The clients are paused, no write of theirs is in hand, and all that was answered is durable on both nodes;
    `failure`: why it is not."""

    failure: str = ""


class DiskFailed(msgspec.Struct, frozen=True):
    """This node's disk, or the metadata's, has failed or hangs."""

    why: str


class DiskWell(msgspec.Struct, frozen=True):
    """What hung goes on."""


class Drained(msgspec.Struct, frozen=True):
    """No client is left and all that was answered is durable where it has to be."""


class GenerationBegan(msgspec.Struct, frozen=True):
    """The new ids are durable in every volume's superblock (G2)."""


class Stop(msgspec.Struct, frozen=True):
    pass


class Tick(msgspec.Struct, frozen=True):
    pass


Event = (
    Started
    | PeerUp
    | PeerSaid
    | PeerFloor
    | PeerDown
    | PeerDied
    | PeerLeft
    | LinkUp
    | LinkLost
    | Synced
    | CaughtUp
    | RecordChanged
    | Swapped
    | Promote
    | Demote
    | Handoff
    | Quiet
    | DiskFailed
    | DiskWell
    | Drained
    | GenerationBegan
    | Stop
    | Tick
)


# --- actions


class Drain(msgspec.Struct, frozen=True):
    """Stop reading from the clients, answer what was read, hang up, make it durable; then an event Drained."""


class PauseClients(msgspec.Struct, frozen=True):
    """Nothing more is read from the clients, who stay connected; then an event Quiet."""


class ResumeClients(msgspec.Struct, frozen=True):
    """They are read again."""


class Forgive(msgspec.Struct, frozen=True):
    """What the peer has, and only this node's disk lacks, is answered well: the peer is primary (A14)."""


class HangUp(msgspec.Struct, frozen=True):
    """Drop the clients at once: the role is lost."""


class DropLink(msgspec.Struct, frozen=True):
    """End the data link, and make a new one if the peer is there: its roles or its peer have changed."""

    why: str


class Answer(msgspec.Struct, frozen=True):
    """To whoever waits for a promotion or demotion; `code` is an exit code of errors.py, 0: done. `retry_at_ns`: it
    would be allowed from then on."""

    code: int
    message: str
    retry_at_ns: int | None = None


Action = Swap | Drain | PauseClients | ResumeClients | Forgive | HangUp | DropLink | Answer
