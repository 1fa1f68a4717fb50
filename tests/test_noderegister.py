"""A node's dealings with its witness, with a witness that does what the test says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mirrorpair.address import UnixAddress
from mirrorpair.arbiter import Incarnation, Register, Swap, Versioned
from mirrorpair.errors import PeerTimeoutError, UnreachableError
from mirrorpair.noderegister import ATTEMPTS, WitnessSide
from mirrorpair.rolewords import ACQUISITIONS, Swapped
from mirrorpair.rolewords import Swap as SwapAction

if TYPE_CHECKING:
    from mirrorpair.errors import MirrorpairError
    from mirrorpair.rolewords import Purpose


class SilentWitness:
    """Answers no question, or (`reads`) the first ones and no swap."""

    def __init__(self, error: MirrorpairError, reads: int = 0) -> None:
        self.asked = self.swaps = 0
        self.seen = (1, 3)
        self._error, self._reads = error, reads

    async def read(self, **_: object) -> Versioned:
        self.asked += 1
        if self.asked > self._reads:
            raise self._error
        return Versioned(version=3, register=Register(epoch=1, primary="alpha", in_sync=("alpha", "beta")))

    async def cas(self, *_: object) -> Swap:
        self.swaps += 1
        return Swap.UNKNOWN


def outcome(witness: SilentWitness, purpose: Purpose) -> Swapped:
    posted: list[Any] = []

    async def durable(write: Any) -> None:
        write()

    async def flush_first() -> str:
        return ""

    async def play() -> None:
        core: Any = SimpleNamespace(
            config=SimpleNamespace(
                witness=SimpleNamespace(address=UnixAddress("/nowhere")),
                name="shop",
                mode="sync",
                failback="manual",
                max_role_changes_per_hour=3,
            ),
            name="beta",
            peer=SimpleNamespace(name="alpha"),
            open=SimpleNamespace(
                value=SimpleNamespace(register_epoch=1, register_version=3, pair_uuid=""),
                obstacle=lambda: None,
                raise_epoch_floor=lambda _: None,
            ),
            state=SimpleNamespace(boot_lost=False),
            peer_link=SimpleNamespace(heart=SimpleNamespace(promises=SimpleNamespace(bound=lambda _: None))),
            stopping=asyncio.Event(),
            equal_in=None,
            post=posted.append,
            durable=durable,
            flush_first=flush_first,
            incarnation=lambda: Incarnation(id="b", n=1),
        )
        side = WitnessSide(core)
        side._register = witness  # type: ignore[assignment]
        primary = "beta" if purpose in ACQUISITIONS else None
        await side.swap(SwapAction(purpose, 2, primary, ("beta",), unasked=True))

    asyncio.run(play())
    (event,) = posted
    assert isinstance(event, Swapped)
    return event


@pytest.mark.parametrize("purpose", sorted(ACQUISITIONS))
@pytest.mark.parametrize("error", [UnreachableError("away"), PeerTimeoutError("silent")], ids=["away", "silent"])
def test_who_asks_for_the_role_and_sent_nothing_is_told_after_one_look(
    purpose: Purpose, error: MirrorpairError
) -> None:
    witness = SilentWitness(error)
    event = outcome(witness, purpose)
    assert (event.ok, event.unknown, event.why, event.code) == (False, False, str(error), error.exit_code)
    assert witness.asked == 1


def test_a0_once_something_was_sent_it_looks_on() -> None:
    witness = SilentWitness(UnreachableError("away"), reads=1)
    event = outcome(witness, "takeover")
    assert (event.ok, event.unknown) == (False, True)
    assert (witness.swaps, witness.asked) == (1, ATTEMPTS)


def test_who_takes_the_peer_out_looks_several_times() -> None:
    witness = SilentWitness(UnreachableError("away"))
    assert not outcome(witness, "shrink").ok
    assert witness.asked == ATTEMPTS
