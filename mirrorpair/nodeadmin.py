"""What a person or a script asks of the node, over its control socket.

Rules:
- One promotion, demotion or handoff at a time; its outcome is the answer that roles.py gives to it.
- A promotion that our own promise forbids for now is not refused but waits for its end (A11), if data loss was
  accepted.
- A dry run asks the same questions and does nothing (foresee.py).
- A resync is asked for by making the data link anew without a back-off's wait (H3); it is under way, or known not to be
  needed, when this returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from mirrorpair.errors import (
    LocalError,
    PeerTimeoutError,
    RefusedError,
    SplitBrainError,
    UnreachableError,
    UsageError,
    WrongRoleError,
    error_of,
)
from mirrorpair.explain import Explanation, explain
from mirrorpair.linux import clock_boottime_ns
from mirrorpair.nodecore import SERVING_S, Core
from mirrorpair.peermessages import HandoffAsk
from mirrorpair.rolecommands import given_up
from mirrorpair.rolewords import Demote, Handoff, LinkLost, Promote
from mirrorpair.status import Event as LoggedEvent
from mirrorpair.status import holds, hopeless, next_step
from mirrorpair.text import printable
from mirrorpair.units import format_size

if TYPE_CHECKING:
    from mirrorpair.control import ResyncPlan
    from mirrorpair.status import Condition, Status

HANDOFF_S = 30.0  # the pause, its limit, and the swap's attempts

log = logging.getLogger("mirrorpair.node")


class AdminSide:
    """`admin.NodeApi`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def status(self) -> Status:
        return self._core.view.status()

    async def events(self, since: int) -> list[LoggedEvent]:
        return self._core.view.log.since(since)

    async def promote(self, *, accept_data_loss: bool, force: bool, dry_run: bool) -> str:
        async with self._core.one_change:
            looked_again = False
            acquires = self._core.state.role == "secondary"
            while True:
                event = self._promotion(accept_data_loss=accept_data_loss, force=force)
                lost = given_up(self._core.state) if accept_data_loss else ""
                answer = await (self._core.foresee(event) if dry_run else self._core.ask_roles(event))
                if answer.code == 0:
                    break
                if answer.retry_at_ns is None and not looked_again and self._core.state.peer_role == "primary":
                    # `demote` there, then `promote` here at once: a heartbeat from before may still say primary.
                    looked_again = True
                    await self._next_beat()
                    continue
                if answer.retry_at_ns is None:
                    raise error_of(answer.code, answer.message)
                log.info("%s", answer.message)
                await asyncio.sleep(max(0.0, (answer.retry_at_ns - clock_boottime_ns()) / 1e9) + 0.001)
            if dry_run:
                return answer.message + self._known_to_differ()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SERVING_S):
                    await self.wait_for("primary")
            return answer.message + (lost if acquires else "")

    def _promotion(self, *, accept_data_loss: bool, force: bool) -> Promote:
        refusal = self._core.refusal
        return Promote(
            accept_data_loss=accept_data_loss,
            force=force,
            obstacle=self._core.open.obstacle(),
            bound_until_ns=self._core.peer_link.heart.promises.bound_until_ns,
            divided=None if refusal is None or refusal.kind == "refused" else next_step(refusal),
        )

    def _known_to_differ(self) -> str:
        """The end of a dry run's sentence: how much the bits of both say now."""
        volumes = [one for one in self._core.view.status().volumes if one.out_of_sync_bytes > 0]
        shown = ", ".join(f"{format_size(one.out_of_sync_bytes)} of {one.name}" for one in volumes)
        return f" (known to differ now: {shown})" if shown else ""

    async def _next_beat(self) -> None:
        """Until the peer has said that it is not primary; not longer than two of its beats take."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self._core.config.heartbeat.interval):
                while self._core.state.peer_role == "primary":
                    await self._core.change()

    async def demote(self, *, dry_run: bool) -> str:
        async with self._core.one_change:
            answer = await (self._core.foresee(Demote()) if dry_run else self._core.ask_roles(Demote()))
        if answer.code:
            raise error_of(answer.code, answer.message)
        return answer.message

    async def switchover(self, to: str | None, *, dry_run: bool) -> str:
        core = self._core
        if to is None:
            to = core.peer.name if core.state.role == "primary" else core.name
        if to not in (core.name, core.peer.name):
            raise UsageError(f"{printable(to, 80)} is no node of this pair: {core.name} or {core.peer.name}")
        if core.config.arbiter == "none":
            raise RefusedError(
                'with arbiter = "none" nobody hands over in one step: `mirrorpair demote` on the primary, then '
                f"`mirrorpair promote` on {to}"
            )
        if to == core.name:
            return await self._fetch_role(dry_run=dry_run)
        if core.state.role != "primary":
            if core.state.peer_role == "primary":
                return f"{to} is primary already, of epoch {core.state.peer_epoch}"
            raise WrongRoleError(f"neither node is known to be primary: `mirrorpair promote` on {to}")
        async with core.one_change:
            answer = await (core.foresee(Handoff()) if dry_run else core.ask_roles(Handoff()))
        if answer.code:
            raise error_of(answer.code, answer.message)
        if dry_run:
            return answer.message
        if await self._peer_serves():
            return f"{to} is primary, of epoch {core.state.peer_epoch}; {core.name} is secondary"
        return f"{answer.message}; it does not serve yet, see `mirrorpair status` on both nodes"

    async def _peer_serves(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SERVING_S):
                while self._core.state.role == "secondary":
                    if self._core.state.peer_role == "primary":
                        return True
                    await self._core.change()
        return False

    async def _fetch_role(self, *, dry_run: bool) -> str:
        """The primary is asked to hand over to this node."""
        core = self._core
        me, peer = core.name, core.peer.name
        if core.state.role == "primary":
            return f"{me} is primary already, of epoch {core.state.epoch}"
        if (obstacle := core.open.obstacle()) is not None:
            raise LocalError(obstacle)
        if not core.peer_link.connected:
            raise UnreachableError(f"{peer} is not connected: it cannot be asked to hand over")
        async with core.one_change:
            await core.peer_link.ask(HandoffAsk(dry_run=dry_run), HANDOFF_S)
        if dry_run:
            return f"{me} would become primary: {peer} would hand over without a loss and without a resync"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SERVING_S):
                await self.wait_for("primary")
        if not holds(core.view.status(), "primary"):
            return f"{peer} has given the role to {me}, which does not serve yet: see `mirrorpair status`"
        return f"{me} is primary, of epoch {core.state.epoch}; {peer} is secondary"

    async def explain(self) -> Explanation:
        core = self._core
        witness = core.witness
        member = None if witness is None else witness.members.get(core.name)
        return explain(
            core.state,
            self._promotion(accept_data_loss=False, force=False),
            clock_boottime_ns(),
            witness=None if witness is None else witness.reachable,
            known=member is None or member == core.incarnation(),
        )

    async def pause(self, *, paused: bool) -> str:
        witness = self._core.witness
        if witness is None:
            raise RefusedError('with arbiter = "none" there is no failover or failback that could be paused')
        await witness.set_pause(paused=paused)
        if paused:
            return (
                f"{self._core.config.name} is paused: no failover and no failback by itself until `mirrorpair resume`"
            )
        return f"{self._core.config.name} is not paused: failover and failback happen by themselves"

    async def plan_resync(self, volume: str | None, *, full: bool) -> list[ResyncPlan]:
        names = (
            [self._core.open.volume(volume).name] if volume is not None else [v.name for v in self._core.open.volumes]
        )
        if not self._core.peer_link.connected:
            self._raise_refusal()
            raise UnreachableError(f"{self._core.peer.name} is not connected: what a resync would do is not known")
        if self._core.link is None and not self._core.decisions:
            self._core.peer_link.hurry()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    while not self._known():
                        await self._core.change()
        return self._core.view.plans(names, full=full)

    def _known(self) -> bool:
        """Whether the two nodes have come to a result: linked, or refused."""
        return self._core.link is not None or self._core.refusal is not None

    async def resync(self, volume: str | None, *, full: bool) -> str:
        volumes = [self._core.open.volume(volume)] if volume is not None else self._core.open.volumes
        if not self._core.peer_link.connected:
            self._core.peer_link.hurry()
            self._raise_refusal()
            raise UnreachableError(f"{self._core.peer.name} is not connected")
        if full:
            for one in volumes:
                self._core.engine.set_all_dirty(one.index)
            if self._core.link is not None:
                self._core.drop_link("a full compare was asked for")
                self._core.step(LinkLost("the data link is made anew for a full compare"))
        self._core.refusal = None
        self._core.decisions = {}
        self._core.slow_until = 0.0
        self._core.peer_link.want_data()
        self._core.peer_link.hurry()
        try:
            async with asyncio.timeout(SERVING_S):
                while not self._known():
                    await self._core.change()
        except TimeoutError:
            raise PeerTimeoutError(
                f"no data link with {self._core.peer.name} yet: see the logs of both nodes"
            ) from None
        if self._core.link is None:
            self._raise_refusal()
        return self._core.view.resync_sentence()

    def _raise_refusal(self) -> None:
        """Why there is no mirror, if it is known. A peer that was refused at its first word is never connected."""
        refusal = self._core.refusal
        if refusal is None:
            return
        if refusal.kind == "refused":
            raise RefusedError(refusal.reason)
        raise SplitBrainError(next_step(refusal))

    async def wait_for(self, condition: Condition, volume: str | None = None) -> None:
        while True:
            status = self._core.view.status()
            if holds(status, condition, volume):
                return
            if (why := hopeless(status, condition)) is not None:
                raise SplitBrainError(why)
            await self._core.change()
