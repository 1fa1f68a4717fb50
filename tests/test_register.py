"""What every backend of the register must do, whatever it is made of: one suite for the lone pair's two copies and for
the witness, over a unix socket and over TCP.

Two clients of one record, as two nodes have it. A restart is a kill: nothing but what is durable is left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import pytest
from witnessside import Witness, record

from mirrorpair.arbiter import Arbiter, Incarnation, Register, Swap, Versioned, Writer
from mirrorpair.arbiter.lone import LoneRegister

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    Scenario = Callable[["Backend", Arbiter, Arbiter], Awaitable[None]]

FULL = Register(
    format=1,
    pair_uuid="f" * 64,
    epoch=2**62,
    primary="alpha",
    in_sync=("alpha", "beta"),
    members={name: Incarnation(id="e" * 64, n=2**62) for name in ("alpha", "beta")},
    mode="async",
    handoff="beta",
    failed=("beta",),
    pause=True,
    role_changes=tuple(range(64)),
    writer=Writer(node="alpha", nonce=2**48),
)
OLD_PAIR = Register(epoch=5, primary="alpha", in_sync=("alpha",), pair_uuid="a")


class Backend(Protocol):
    async def open(self) -> tuple[Arbiter, Arbiter]:
        """The register as alpha and as beta sees it."""
        ...

    async def restart(self) -> tuple[Arbiter, Arbiter]:
        """Everything that has a part in it is killed, and begins anew."""
        ...

    async def end(self) -> None: ...


class Lone:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def open(self) -> tuple[Arbiter, Arbiter]:
        alpha, beta = (LoneRegister(str(self._folder / name), f"life of {name}") for name in ("alpha", "beta"))
        for one, other in ((alpha, beta), (beta, alpha)):

            async def ask(version: int, new: Register, *, other: LoneRegister = other) -> Swap:
                await asyncio.sleep(0)
                return other.receive(version, new)

            one.ask_peer = ask
        return alpha, beta

    async def restart(self) -> tuple[Arbiter, Arbiter]:
        return await self.open()

    async def end(self) -> None:
        pass


class AtWitness:
    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._clients = (witness.client(), witness.client())

    async def open(self) -> tuple[Arbiter, Arbiter]:
        return self._clients

    async def restart(self) -> tuple[Arbiter, Arbiter]:
        await self.end()
        self._witness.kill()
        self._witness.start()
        self._clients = (self._witness.client(), self._witness.client())
        return self._clients

    async def end(self) -> None:
        for client in self._clients:
            await client.close()


@pytest.fixture(params=["lone", "witness", "witness, tcp"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Scenario], None]]:
    witness = Witness(tmp_path, tcp=request.param.endswith("tcp"))

    def run(scenario: Scenario) -> None:
        async def all_of_it() -> None:
            backend: Backend = Lone(tmp_path) if request.param == "lone" else AtWitness(witness)
            try:
                await scenario(backend, *await backend.open())
            finally:
                await backend.end()

        asyncio.run(all_of_it())

    try:
        if request.param != "lone":
            witness.start()
        yield run
    finally:
        witness.close()


def test_it_begins_empty(play: Callable[[Scenario], None]) -> None:
    async def scenario(_backend: Backend, alpha: Arbiter, beta: Arbiter) -> None:
        assert await alpha.read() == await beta.read() == Versioned(version=0, register=Register())

    play(scenario)


def test_both_read_what_one_has_swapped_also_after_a_kill(play: Callable[[Scenario], None]) -> None:
    async def scenario(backend: Backend, alpha: Arbiter, beta: Arbiter) -> None:
        assert await alpha.cas(0, record(1)) is Swap.OK
        assert await beta.cas(1, record(2, "alpha", "beta", primary="beta")) is Swap.OK
        wanted = Versioned(version=2, register=record(2, "alpha", "beta", primary="beta"))
        assert await alpha.read() == await beta.read() == wanted
        alpha, beta = await backend.restart()
        assert await alpha.read() == await beta.read() == wanted
        assert await alpha.cas(2, record(3)) is Swap.OK

    play(scenario)


def test_a_swap_on_another_version_changes_nothing(play: Callable[[Scenario], None]) -> None:
    async def scenario(_backend: Backend, alpha: Arbiter, beta: Arbiter) -> None:
        assert await alpha.cas(0, record(1)) is Swap.OK
        for version in (0, 2, 2**62):
            assert await beta.cas(version, record(2, primary="beta")) is Swap.CONFLICT
        assert await alpha.read() == Versioned(version=1, register=record(1))

    play(scenario)


@pytest.mark.parametrize(
    "new",
    [
        record(4),
        record(5, primary="beta"),
        Register(epoch=6, primary="alpha", in_sync=("alpha",), pair_uuid="b"),
        Register(epoch=6, primary="alpha", in_sync=("alpha",)),
    ],
    ids=["epoch falls", "new primary, old epoch", "another pair", "no pair any more"],
)
def test_a4_what_may_not_follow_is_refused(play: Callable[[Scenario], None], new: Register) -> None:
    async def scenario(_backend: Backend, alpha: Arbiter, beta: Arbiter) -> None:
        assert await alpha.cas(0, OLD_PAIR) is Swap.OK
        assert await beta.cas(1, new) is Swap.CONFLICT
        assert await alpha.read() == Versioned(version=1, register=OLD_PAIR)

    play(scenario)


def test_a_record_with_every_field_comes_back_as_it_was(play: Callable[[Scenario], None]) -> None:
    async def scenario(backend: Backend, alpha: Arbiter, _beta: Arbiter) -> None:
        assert await alpha.cas(0, FULL) is Swap.OK
        alpha, beta = await backend.restart()
        assert (await alpha.read()).register == (await beta.read()).register == FULL

    play(scenario)


def test_of_swaps_at_the_same_moment_each_version_is_made_once(play: Callable[[Scenario], None]) -> None:
    """Each of the two counts the epoch up so many times, whatever the other does: nothing is lost, nothing twice."""
    each = 40
    made: list[int] = []

    async def count(register: Arbiter, name: str) -> None:
        done = 0
        while done < each:
            now = await register.read()
            new = record(now.register.epoch + 1, "alpha", "beta", primary=name)
            swap = await register.cas(now.version, new)
            assert swap is not Swap.UNKNOWN
            if swap is Swap.OK:
                made.append(now.version + 1)
                done += 1
            await asyncio.sleep(0)

    async def scenario(backend: Backend, alpha: Arbiter, beta: Arbiter) -> None:
        await asyncio.gather(count(alpha, "alpha"), count(beta, "beta"))
        assert sorted(made) == list(range(1, 2 * each + 1))
        alpha, beta = await backend.restart()
        last = await alpha.read()
        assert (last.version, last.register.epoch) == (2 * each, 2 * each)
        assert last == await beta.read()

    play(scenario)
