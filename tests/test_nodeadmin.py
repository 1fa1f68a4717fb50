"""What a person's word does to two real nodes that live in one event loop: so that a message can be put between two
others, which between processes comes about once in many runs."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Self

import msgspec
import pytest
from farside import LIMIT_S, run_cli
from pairfile import read_pair, write_pair

from mirrorpair.errors import MirrorpairError, WrongRoleError
from mirrorpair.node import Node
from mirrorpair.nodeadmin import AdminSide
from mirrorpair.nodepeer import PeerSide
from mirrorpair.peermessages import LeaveAsk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from mirrorpair.config import Config
    from mirrorpair.nodecore import Core


def with_a_pair(
    folder: Path,
    scenario: Callable[[Core, Core], Awaitable[None]],
    *,
    kept: int = 0,
    resync_rate: str = "auto",
) -> None:
    """`scenario(alpha, beta)` once both are connected. `kept`: so many bytes of data that alpha had before."""

    async def run() -> None:
        async with Runs(read_pair(folder)) as nodes:
            alpha, beta = await nodes.start("alpha"), await nodes.start("beta")
            async with asyncio.timeout(LIMIT_S):
                await AdminSide(alpha).wait_for("connected")
                await AdminSide(beta).wait_for("connected")
                await scenario(alpha, beta)

    init_pair(folder, kept, resync_rate)
    asyncio.run(run())


def init_pair(folder: Path, kept: int, resync_rate: str) -> None:
    path = write_pair(folder, {"data": f"{kept or 1 << 20}B"}, resync_rate=resync_rate)
    if kept:
        (folder / "alpha-data.img").write_bytes(os.urandom(kept))
    for name in ("alpha", "beta"):
        more = ["--keep-data"] if kept and name == "alpha" else []
        done = run_cli("-c", path, "--node", name, "init", *more)
        assert done.returncode == 0, done.stderr


class Runs:
    """The nodes of a pair that run; those that are left are stopped at the end."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._nodes: dict[str, Node] = {}

    async def start(self, name: str) -> Core:
        node = Node(self._config, name)
        await node.start()
        self._nodes[name] = node
        return node._core

    async def stop(self, name: str) -> None:
        node = self._nodes.pop(name)
        await node.stop()
        await node.close()

    async def crash(self, name: str) -> None:
        """Nothing is written any more, and nobody is told."""
        await self._nodes.pop(name).close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self._nodes):
            await self.stop(name)


async def promote(core: Core) -> None:
    await AdminSide(core).promote(accept_data_loss=False, force=False, dry_run=False)


def test_a_heartbeat_from_before_the_peers_demotion_does_not_stop_a_promotion(tmp_path: Path) -> None:
    async def scenario(alpha: Core, beta: Core) -> None:
        await promote(alpha)
        await AdminSide(alpha).wait_for("synced")
        before = PeerSide(alpha).beat(0)
        assert before.role == "primary"
        await AdminSide(alpha).demote(dry_run=False)
        beta.peer_beat = msgspec.structs.replace(before, role="secondary", epoch=0)  # the last one that had arrived
        PeerSide(beta).on_beat(before)
        await promote(beta)
        assert beta.state.role == "primary"

    with_a_pair(tmp_path, scenario)


def test_a_primary_is_not_replaced_however_often_one_looks(tmp_path: Path) -> None:
    async def scenario(alpha: Core, beta: Core) -> None:
        await promote(alpha)
        await AdminSide(beta).wait_for("synced")
        with pytest.raises(WrongRoleError, match="alpha is primary of epoch 1"):
            await promote(beta)
        assert alpha.state.role == "primary"

    with_a_pair(tmp_path, scenario)


def test_w8_nobody_is_promoted_whose_disk_cannot_be_flushed(tmp_path: Path) -> None:
    """What the last link brought may be in the page cache only: it is durable before the role is taken."""

    async def scenario(alpha: Core, beta: Core) -> None:
        await promote(alpha)
        await AdminSide(beta).wait_for("synced")
        await AdminSide(alpha).demote(dry_run=False)
        reader, writer = os.pipe()
        try:
            os.dup2(reader, beta.open.volumes[0].image.fd)  # no fdatasync works on a pipe
            with pytest.raises(MirrorpairError, match="beta cannot flush its images: Invalid argument") as caught:
                await promote(beta)
            assert caught.value.exit_code == 1
        finally:
            os.close(reader)
            os.close(writer)
        assert (beta.state.role, beta.register.copy.register.epoch) == ("secondary", 1)
        await promote(alpha)
        assert alpha.state.role == "primary"

    with_a_pair(tmp_path, scenario)


def test_a18_a_node_that_stops_itself_keeps_no_other_one_waiting(tmp_path: Path) -> None:
    """Both were told to stop at the same moment: the one that has drained decides nothing any more."""

    async def scenario(alpha: Core, beta: Core) -> None:
        await promote(alpha)
        await AdminSide(alpha).wait_for("synced")
        beta.quiet = True
        assert await alpha.peer_link.ask(LeaveAsk(role="primary"), LIMIT_S) == "ok"
        assert beta.peer_leaves
        beta.quiet = False

    with_a_pair(tmp_path, scenario)


async def another_link(source: Core, session: int) -> None:
    while source.engine.link_status().session == session or not source.engine.volume_status(0).resync_total:
        await source.change()


async def an_eighth(source: Core, total: int) -> int:
    """Waits until so much of the resync is done; the bytes that are left."""
    while source.engine.volume_status(0).resync_done < total // 8:
        await source.change()
    assert await source.token(source.engine.barrier, LIMIT_S) == 0  # what is settled is durable, its bits go
    left = source.engine.volume_status(0).dirty_blocks * 65536
    assert 0 < left < total
    return left


def test_r6_a_full_compare_that_was_cut_off_goes_on_with_what_is_left(tmp_path: Path) -> None:
    size = 16 << 20

    async def scenario(alpha: Core, beta: Core) -> None:
        await promote(alpha)
        left = await an_eighth(alpha, size)
        session = alpha.engine.link_status().session
        beta.engine.detach_link()
        await another_link(alpha, session)
        assert alpha.engine.volume_status(0).resync_total <= left
        await AdminSide(alpha).wait_for("synced")
        assert alpha.open.volumes[0].block.full_id == beta.open.volumes[0].block.full_id == 0

    with_a_pair(tmp_path, scenario, kept=size, resync_rate="4MiB/s")
    assert (tmp_path / "alpha-data.img").read_bytes() == (tmp_path / "beta-data.img").read_bytes()


@pytest.mark.parametrize("ends", [("stop", "crash"), ("crash", "stop")])
def test_r6_it_goes_on_though_the_daemons_were_started_anew(tmp_path: Path, ends: tuple[str, str]) -> None:
    """And by digests: what the bits of an earlier life stand for is not known."""
    size = 16 << 20

    async def run() -> None:
        async with Runs(read_pair(tmp_path)) as nodes:
            alpha, beta = await nodes.start("alpha"), await nodes.start("beta")
            await AdminSide(alpha).wait_for("connected")
            await promote(alpha)
            left = await an_eighth(alpha, size)
            while not alpha.open.volumes[0].block.full_id:
                await alpha.change()
            session = alpha.engine.link_status().session
            await (nodes.stop if ends[0] == "stop" else nodes.crash)("beta")
            beta = await nodes.start("beta")
            await another_link(alpha, session)
            assert await an_eighth(alpha, left) < left
            assert alpha.engine.volume_status(0).resync_total <= left
            assert "goes on with what the last compare had left" in alpha.decisions["data"].reason
            left = alpha.engine.volume_status(0).dirty_blocks * 65536
            await (nodes.stop if ends[1] == "stop" else nodes.crash)("alpha")
            alpha = await nodes.start("alpha")
            await AdminSide(alpha).wait_for("primary")
            await AdminSide(alpha).wait_for("synced")
            status = alpha.engine.volume_status(0)
            # A crash leaves bits on the disk that were clear already: these blocks cost their digests.
            assert (status.resync_sent if ends[1] == "crash" else status.resync_total) <= left
            assert status.resync_total < size or ends[1] == "crash"
            assert "goes on with what the last compare had left" in alpha.decisions["data"].reason
            assert alpha.open.volumes[0].block.full_id == beta.open.volumes[0].block.full_id == 0

    init_pair(tmp_path, size, "4MiB/s")
    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    assert (tmp_path / "alpha-data.img").read_bytes() == (tmp_path / "beta-data.img").read_bytes()
