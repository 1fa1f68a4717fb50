"""Hosts that stand still, die, lose their clock or come back otherwise (F1, F3, F12, F15), under a load that is
judged."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from freezer import Freezer
from world import HASTY

from mirrorpair.control import AdminClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pair import Daemon
    from world import World

PROVEN = "says its sentinel"
HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def stopped(node: Daemon) -> Iterator[None]:
    node.freeze()
    try:
        yield
    finally:
        node.signal(signal.SIGCONT)


@contextlib.contextmanager
def frozen(node: Daemon) -> Iterator[None]:
    """The whole host: its sentinel too."""
    try:
        freezer = Freezer()
    except OSError as error:
        pytest.skip(f"no group can be frozen here: {error}")
    with freezer:
        assert node.process is not None
        freezer.freeze(node.process.pid, node.sentinel())
        try:
            yield
        finally:
            freezer.thaw()


@pytest.mark.parametrize("still", [stopped, frozen])
def test_f1_a_primary_that_stood_still_for_too_long_answers_nothing_afterwards(
    make_world: Callable[..., World], still: Callable[[Daemon], contextlib.AbstractContextManager[None]]
) -> None:
    world = make_world(**HASTY).up()
    with world.load(patience_s=1.0, bound=(world.alpha,)) as load:
        load.acknowledges()
        lines = load.lines(world.alpha)
        with still(world.alpha):
            world.beta.wait("primary")
            load.acknowledges(node=world.beta)
            since = time.monotonic_ns()
            load.ask(world.alpha, lines)
        assert PROVEN not in world.beta.log()
        world.in_sync("alpha", "beta")
        assert world.alpha.status().role == "secondary"
        assert load.history.answers_to("alpha", since) == []
        world.finish(load, terms=("alpha", "beta"), role_changes=1, epoch=2)


def test_a_killed_primary_is_replaced_by_the_proof_that_travels(world: World) -> None:
    world.up()
    with world.load() as load:
        load.acknowledges()
        world.alpha.kill()
        load.acknowledges(node=world.beta)
        assert PROVEN in world.beta.log()
        world.alpha.start()
        world.finish(load, terms=("alpha", "beta"), role_changes=1, epoch=2)


def test_a_host_that_is_lost_is_replaced_after_its_promise(make_world: Callable[..., World]) -> None:
    world = make_world(**HASTY).up()
    with world.load() as load:
        load.acknowledges()
        world.lose_host(world.alpha)
        load.acknowledges(node=world.beta)
        assert PROVEN not in world.beta.log()
        world.alpha.start()
        world.finish(load, terms=("alpha", "beta"), role_changes=1, epoch=2)


def test_whoever_else_is_killed_changes_no_role(world: World) -> None:
    """The witness, a sentinel, the secondary, and the host of the secondary."""
    world.up()
    with world.load() as load:
        load.acknowledges(30)
        world.witness.kill()
        load.acknowledges(30)
        world.witness.start()
        for node in world.pair.nodes:
            before = node.sentinel()
            os.kill(before, signal.SIGKILL)
            world.until(lambda node=node, before=before: node.sentinels() not in ([], [before]), "a new sentinel")
        load.acknowledges(30)
        for lose in (world.beta.kill, lambda: world.lose_host(world.beta)):
            lose()
            load.acknowledges(30)
            world.in_sync("alpha")
            world.beta.start()
            world.in_sync("alpha", "beta")
        load.acknowledges(30)
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


@pytest.mark.parametrize("first", ["alpha", "beta"])
def test_f12_both_are_lost_and_the_primary_of_record_takes_its_role_back(world: World, first: str) -> None:
    world.up()
    with world.load() as load:
        load.acknowledges()
        world.lose_host(world.alpha, world.beta)
        for node in sorted(world.pair.nodes, key=lambda node: node.name != first):
            node.start()
        load.acknowledges(node=world.alpha)
        world.finish(load, terms=("alpha",), role_changes=0, epoch=2)


def test_f12_both_are_lost_and_the_one_that_is_back_takes_over(make_world: Callable[..., World]) -> None:
    world = make_world(**HASTY).up()
    with world.load() as load:
        load.acknowledges()
        world.lose_host(world.alpha, world.beta)
        world.beta.start()
        load.acknowledges(node=world.beta)
        world.alpha.start()
        world.finish(load, terms=("alpha", "beta"), role_changes=1, epoch=2)


# --- F3


class WallClock:
    """Of one host."""

    def __init__(self, path: Path, shim: Path) -> None:
        self._path = path
        self.set(0)
        self.words = ("env", f"LD_PRELOAD={shim}", f"WALL_CLOCK={path}")

    def set(self, ahead_s: int) -> None:
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.write(struct.pack("=q", ahead_s))


@pytest.fixture
def wall_clock_shim(need_tool: Callable[[str], str], tmp_path: Path) -> Path:
    made = tmp_path / "wallclock.so"
    words = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(made)]
    subprocess.run([need_tool("gcc"), *words, str(HERE / "wallclock.c")], check=True)
    return made


@pytest.mark.not_sanitized("the sanitizers' runtime wants to be the first library, and this one comes before it")
def test_f3_wall_clocks_that_are_set_change_nothing(world: World, wall_clock_shim: Path) -> None:
    """An hour forth and back, on every host, another way on each; CLOCK_REALTIME alone (wallclock.c)."""
    hosts = (world.alpha, world.beta, world.witness)
    clocks = [WallClock(world.pair.folder / f"clock{number}", wall_clock_shim) for number in range(len(hosts))]
    for host, clock in zip(hosts, clocks, strict=True):
        host.prefix += clock.words
    world.up()
    with world.load() as load:
        for steps in ((3600, 0, 0), (0, 3600, -3600), (-3600, 3600, 0), (3600, -3600, 3600)):
            for clock, ahead_s in zip(clocks, steps, strict=True):
                clock.set(ahead_s)
            load.acknowledges()
        world.beta.kill()
        world.in_sync("alpha")
        assert ahead(world.alpha) > 3000
        load.acknowledges()
        world.beta.start()
        world.in_sync("alpha", "beta")
        assert ahead(world.beta) < -3000
        load.acknowledges()
        world.finish(load, terms=("alpha",), role_changes=0, epoch=1)


def ahead(node: Daemon) -> float:
    """Of this clock, at the last thing that happened."""
    with AdminClient(str(node.path("ctl"))) as client:
        return client.events()[-1].time_s - time.time()


# --- F15


UNSEEN = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="A8: no member is ever given a new n, so the register cannot tell an old copy of its state",
)


@pytest.mark.parametrize(
    ("what", "in_place"),
    [
        ("image", False),
        ("image-and-state", False),
        pytest.param("state", False, marks=UNSEEN),
        pytest.param("image-and-state", True, marks=UNSEEN, id="image-and-state-as-a-snapshot"),
    ],
)
def test_f15_what_was_restored_from_an_old_copy_is_not_taken_for_up_to_date(
    make_world: Callable[..., World], what: str, in_place: bool
) -> None:
    """Both are lost, and only the restored one comes back: the register has it in the set, as another incarnation.
    `in_place`: the files are the same ones, as those of a volume that was rolled back to a snapshot."""
    world = make_world(**HASTY).up()
    beta = world.beta
    with world.load() as load:
        load.acknowledges()
        assert beta.stop() == 0
        copies = {path: path.read_bytes() for path in of(beta, what)}
        load.acknowledges()
        beta.start()
        world.in_sync("alpha", "beta")
        load.acknowledges()
        world.lose_host(world.alpha, beta)
        for path, content in copies.items():
            if not in_place:
                path.unlink()
            path.write_bytes(content)
        began = len(beta.log())
        beta.start()
        world.until(
            lambda: "did not become primary" in beta.log()[began:] or beta.status().role == "primary", "beta tries"
        )
        assert beta.status().role == "secondary"
        world.alpha.start()
        load.acknowledges(node=world.alpha)
        world.in_sync("alpha", "beta")
        world.finish(load, terms=("alpha",), role_changes=0, epoch=2)


def of(node: Daemon, what: str) -> list[Path]:
    """Its files."""
    state = [path for path in (node.pair.folder / node.name).rglob("*") if path.is_file()]
    return [*([node.image()] if "image" in what else []), *(state if "state" in what else [])]


@pytest.mark.parametrize("lost", ["beta", "alpha"])
def test_f15_a_blank_replacement_gets_everything_and_enters_the_set(
    make_world: Callable[..., World], lost: str
) -> None:
    world = make_world(**HASTY).up()
    node = world.alpha if lost == "alpha" else world.beta
    other = world.beta if lost == "alpha" else world.alpha
    terms = ("alpha", "beta") if lost == "alpha" else ("alpha",)
    with world.load() as load:
        load.acknowledges()
        world.lose_host(node)
        load.acknowledges(node=other)
        node.image().unlink()
        shutil.rmtree(node.pair.folder / node.name)
        node.init()
        node.start()
        world.in_sync("alpha", "beta")
        load.acknowledges(node=other)
        world.finish(load, terms=terms, role_changes=len(terms) - 1, epoch=len(terms))
