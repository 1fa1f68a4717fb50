"""`arbiter = "witness"`: how a node changes the register that a witness keeps, and when it looks at it.

Rules:
- A0 After an attempt of which nothing is known the next one follows, on the version then read, until one is ok or the
  record says that it must not be. What is reported before that is "unknown".
- A14 An abdication waits for this node's disks for a moment only; who made it is written into the record, until that
  one is in sync again.
- Who asks for the role while the witness is silent, and has sent nothing, is told after one look: until it is told, a
  node makes no link, and the peer may be back. It looks again by itself.
- A13 The node file's epoch floor is durable before an acquisition is sent; the role and the epoch are before it counts.
- W8 The images are flushed before the role is taken.
- A8 Who enters the set is who was found equal, in the session in which it was: a new one of the same name is not.
- It looks once at the start, each second while its node answers writes alone (A1), when the peer has seen a newer
  record, and now and then to know that the witness is there. What it finds becomes an event only if it is new.
- F17 A record that is older than one that this node has seen is not believed: the roles stay as they are, until a
  person has it made anew (`promote --accept-data-loss`).
- F16 Each change of the primary is written into the record with its time; when there have been too many within an hour
  the record is latched, and no failback happens by itself until a person says `resume`.
- Metadata that cannot be written end the daemon: what is known must be durable before anything follows from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from typing import TYPE_CHECKING, Protocol

import msgspec

from mirrorpair.arbiter import Incarnation, Register, Swap, Versioned, Writer
from mirrorpair.errors import MirrorpairError, PeerTimeoutError, RefusedError, UnreachableError, WrongRoleError
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.rolewords import ACQUISITIONS, FAILED, WRONG_ROLE, Phase, RecordChanged, Swapped
from mirrorpair.successor import Author, successor
from mirrorpair.swaprules import Read, objection
from mirrorpair.witness.client import StaleRecordError, WitnessRegister

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mirrorpair.config import Config
    from mirrorpair.config import Node as NodeConfig
    from mirrorpair.peercontrol import Control
    from mirrorpair.peerlink import PeerLink
    from mirrorpair.rolewords import Event, RoleName, State
    from mirrorpair.rolewords import Swap as SwapAction
    from mirrorpair.volumes import OpenNode

ATTEMPTS = 5
PAUSE_S = (0.01, 0.1)
ALONE_S = 1.0
IDLE_S = 10.0
ABDICATION_S = 2.0

log = logging.getLogger("mirrorpair.node")


class CoreLike(Protocol):
    """The node, as far as it is needed here."""

    config: Config
    name: str
    peer: NodeConfig
    open: OpenNode
    state: State
    peer_link: PeerLink
    failed: asyncio.Event
    stopping: asyncio.Event
    quiet: bool
    equal_in: Control | None

    def post(self, event: Event | Callable[[], Awaitable[None]]) -> None: ...

    def incarnation(self) -> Incarnation: ...

    async def durable(self, write: Callable[[], object]) -> None: ...

    async def flush_first(self) -> str: ...

    @property
    def settled(self) -> bool: ...


class WitnessSide:
    """The node's dealings with its witness. `look` runs until it is cancelled; `swap` reports by an event Swapped."""

    def __init__(self, core: CoreLike) -> None:
        table = core.config.witness
        assert table is not None
        self._core = core
        file = core.open.value
        self._register = WitnessRegister(
            table.address, core.config.name, seen=(file.register_epoch, file.register_version)
        )
        self.reachable = False
        """at the last request"""
        self.trouble: str | None = None
        """of the last request"""
        self.disbelieved = False
        """its record is older than what this node has seen (F17)"""
        self._trouble: type | None = None
        self.known = (0, 0)
        """epoch and version of the record that the state is made of; version 0: none was read yet"""
        self.members: dict[str, Incarnation] = {}
        """of that record"""
        self._wanted = asyncio.Event()
        self._one = asyncio.Lock()

    async def close(self) -> None:
        await self._register.close()

    # --- looking

    def look_now(self) -> None:
        """Something says that the record has changed."""
        self._wanted.set()

    def heard(self, epoch: int, version: int) -> None:
        """What the peer has seen."""
        if (epoch, version) > self.known:
            self.look_now()

    def knows(self, incarnation: Incarnation) -> bool:
        """A8: whether the record has the peer by this incarnation, or has it not at all."""
        return self.members.get(self._core.peer.name, incarnation) == incarnation

    async def look(self) -> None:
        while True:
            self._wanted.clear()
            async with self._one:
                record = None
                with contextlib.suppress(MirrorpairError):
                    record = await self._read()
                if record is not None:
                    await self._take(record)
            alone = self._core.state.phase is Phase.ALONE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ALONE_S if alone or not self.known[1] else IDLE_S):
                    await self._wanted.wait()

    async def _read(self, *, however_old: bool = False) -> Versioned:
        try:
            record = await self._register.read(however_old=however_old)
            mine, pair = self._core.open.value.pair_uuid, record.register.pair_uuid
            if mine and pair and mine != pair:
                name = self._core.config.name
                raise RefusedError(f"the witness keeps the record of another pair called {name}: name one otherwise")
        except MirrorpairError as error:
            self._say(error)
            raise
        self._say(None)
        return record

    def _say(self, error: MirrorpairError | None) -> None:
        """Each kind of trouble once, and its end."""
        self.reachable = error is None
        self.trouble = None if error is None else str(error)
        self.disbelieved = isinstance(error, StaleRecordError)
        if type(error) is self._trouble:
            return
        self._trouble = type(error)
        if error is None:
            log.info("the register of this pair: the witness answers")
        else:
            log.warning("the register of this pair: %s", error)

    async def _take(self, record: Versioned) -> None:
        """Makes what was read this node's knowledge, durably, then an event."""
        register = record.register
        if (register.epoch, record.version) == self.known:
            return
        first = not self.known[1]
        mine = register.primary == self._core.name and self._core.state.role == "primary"
        await self._learned(record, "primary" if mine else "secondary", settled=self._core.settled)
        self._core.post(
            RecordChanged(register.epoch, register.primary, register.in_sync, register.pause, register.latched)
        )
        if first:
            self._core.peer_link.want_data()  # see nodepeer.py

    async def _learned(self, record: Versioned, role: RoleName, *, settled: bool) -> None:
        epoch, version = record.register.epoch, record.version
        try:
            await self._core.durable(
                lambda: self._core.open.learned(epoch=epoch, version=version, role=role, settled=settled)
            )
        except MirrorpairError:
            # Nothing follows any more from what is not durable.
            self._core.quiet = True
            self._core.failed.set()
            raise
        self.known = (epoch, version)
        self.members = record.register.members

    # --- changing

    async def swap(self, action: SwapAction) -> None:
        peer = self._core.equal_in
        async with self._one:
            try:
                event = await self._swap(action, peer)
            except MirrorpairError as error:
                event = Swapped(action, False, str(error), unknown=True, code=error.exit_code)
        self._core.post(event)

    async def _swap(self, action: SwapAction, peer: Control | None) -> Swapped:
        """`peer`: the session in which it was found equal."""
        if action.purpose in ACQUISITIONS:
            if (obstacle := self._core.open.obstacle()) is not None:
                return Swapped(action, False, obstacle, code=FAILED)
            if error := await self._core.flush_first():
                return Swapped(action, False, error, code=FAILED)
        nonces: set[int] = set()
        unknown, tried = False, -1
        why: MirrorpairError = UnreachableError("the witness was not asked")
        for _ in range(ATTEMPTS):
            if action.purpose in ("expand", "handoff", "abdicate") and (
                peer is None or self._core.peer_link.control is not peer
            ):
                return Swapped(action, False, f"{self._core.peer.name} is not connected any more", unknown=unknown)
            if action.purpose in ACQUISITIONS and self._core.stopping.is_set():
                return Swapped(action, False, f"{self._core.name} is stopping", unknown=unknown)
            try:
                record = await self._read(however_old=action.overrides)
                read = self._as_read(record, nonces)
                if (reason := objection(action, self._core.name, read)) is not None:
                    await self._take(record)
                    # An attempt that is still on its way can land as long as the version is the one that it swaps on.
                    late = unknown and record.version <= tried
                    return Swapped(action, False, reason, unknown=late, code=WRONG_ROLE)
                if action.purpose != "abdicate":
                    await self._core.durable(lambda: self._core.open.raise_epoch_floor(action.epoch))
                new = self._successor(action, record, peer)
                assert new.writer is not None
                nonces.add(new.writer.nonce)
                tried = record.version
                result = await self._register.cas(record.version, new)
            except MirrorpairError as error:
                why = error
                if isinstance(error, RefusedError) or (action.purpose in ACQUISITIONS and not nonces):
                    break
            else:
                if result is Swap.OK:
                    return await self._done(action, Versioned(version=record.version + 1, register=new))
                unknown = unknown or result is Swap.UNKNOWN
                why = (
                    PeerTimeoutError("the witness did not answer")
                    if result is Swap.UNKNOWN
                    else WrongRoleError("somebody else changes the register at this moment")
                )
            await asyncio.sleep(random.uniform(*PAUSE_S))
        return Swapped(action, False, str(why), unknown=unknown, code=why.exit_code)

    async def _done(self, action: SwapAction, record: Versioned) -> Swapped:
        if action.purpose == "abdicate":
            # A14: what a disk has to do may hang. What is not durable only takes away; but then nothing was answered.
            learning = asyncio.ensure_future(self._learned(record, "secondary", settled=self._core.settled))
            lasting = learning in (await asyncio.wait([learning], timeout=ABDICATION_S))[0]
            if lasting:
                await learning
            else:
                learning.add_done_callback(lambda late: late.cancelled() or late.exception())
            register = record.register
            return Swapped(action, True, paused=register.pause, latched=register.latched, lasting=lasting)
        acquired = action.purpose in ACQUISITIONS
        role: RoleName = "primary" if record.register.primary == self._core.name else "secondary"
        await self._learned(record, role, settled=acquired or self._core.settled)
        register = record.register
        done = msgspec.structs.replace(action, in_sync=register.in_sync)
        return Swapped(done, True, paused=register.pause, latched=register.latched)

    def _as_read(self, record: Versioned, nonces: set[int]) -> Read:
        register = record.register
        member = register.members.get(self._core.name)
        writer = register.writer
        return Read(
            epoch=register.epoch,
            primary=register.primary,
            in_sync=register.in_sync,
            pause=register.pause,
            known=member is None or member == self._core.incarnation(),
            boot_lost=self._core.state.boot_lost,
            bound=self._core.peer_link.heart.promises.bound(clock_boottime_ns()),
            own=writer is not None and writer.node == self._core.name and writer.nonce in nonces,
            latched=register.latched,
        )

    def _successor(self, action: SwapAction, record: Versioned, peer: Control | None) -> Register:
        core = self._core
        equal = peer.hello.incarnation if peer is not None and peer.hello is not None else None
        return successor(
            record.register,
            action,
            Author(
                node=core.name,
                incarnation=core.incarnation(),
                peer=core.peer.name,
                equal=equal,
                pair_uuid=core.open.value.pair_uuid,
                mode=core.config.mode,
                cap=core.config.max_role_changes_per_hour if core.config.failback == "auto" else 0,
            ),
            believed=(record.register.epoch, record.version) >= self._register.seen,
            now_s=int(time.time()),
            nonce=secrets.randbits(48),
        )

    # --- A19

    async def set_pause(self, *, paused: bool) -> None:
        """Durable at the witness when this returns; the end of a pause also ends a latch (F16). A late attempt changes
        no role, so nothing is unknown for long. UnreachableError, PeerTimeoutError, StaleRecordError and the like."""
        why: MirrorpairError = UnreachableError("the witness was not asked")
        async with self._one:
            for _ in range(ATTEMPTS):
                record = await self._read()
                old = record.register
                if old.pause == paused and not (old.latched and not paused):
                    await self._take(record)
                    return
                new = msgspec.structs.replace(
                    old,
                    pause=paused,
                    latched=old.latched and paused,
                    role_changes=old.role_changes if paused else (),
                    writer=Writer(node=self._core.name, nonce=secrets.randbits(48)),
                )
                result = await self._register.cas(record.version, new)
                if result is Swap.OK:
                    await self._take(Versioned(version=record.version + 1, register=new))
                    return
                why = PeerTimeoutError("the witness did not answer: whether it has changed is not known")
                if result is Swap.CONFLICT:
                    why = WrongRoleError("somebody else changes the register at this moment")
                await asyncio.sleep(random.uniform(*PAUSE_S))
        raise why
