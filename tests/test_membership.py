"""Arbitrated pair: who enters the in-sync set (A8), and who may be overwritten while nobody is primary (A16)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mirrorpair import roles
from mirrorpair.address import UnixAddress
from mirrorpair.arbiter import Incarnation, Register, Versioned
from mirrorpair.arbiter import Swap as Result
from mirrorpair.nodecore import Core as NodeCore
from mirrorpair.nodepeer import PeerSide
from mirrorpair.noderegister import WitnessSide
from mirrorpair.pairing import Agreement
from mirrorpair.peerdata import Stopped
from mirrorpair.peermessages import Plan, VolumePlan
from mirrorpair.rolewords import GenerationBegan, Phase, State, Swap, Swapped, Synced

OLD, NEW, OWN = (Incarnation(id=one * 32, n=0) for one in "abc")
BOTH = ("alpha", "beta")


class Kept:
    """The register, where no witness is needed."""

    def __init__(self) -> None:
        self.seen = (0, 0)
        self.record = Versioned(version=3, register=Register(epoch=7, primary="alpha", in_sync=("alpha",)))

    async def read(self, *, however_old: bool = False) -> Versioned:
        assert not however_old
        return self.record

    async def cas(self, version: int, new: Register) -> Result:
        assert version == self.record.version
        self.record = Versioned(version=version + 1, register=new)
        return Result.OK


class Core(SimpleNamespace):
    def post(self, event: object) -> None:
        self.posted.append(event)

    def incarnation(self) -> Incarnation:
        return OWN

    async def durable(self, write: Any) -> None:
        write()


def session(incarnation: Incarnation) -> Any:
    return SimpleNamespace(hello=SimpleNamespace(incarnation=incarnation))


def make_core(**state: Any) -> Any:
    file = SimpleNamespace(register_epoch=0, register_version=0, pair_uuid="", epoch_floor=7)
    return Core(
        name="alpha",
        peer=SimpleNamespace(name="beta"),
        config=SimpleNamespace(
            name="shop",
            mode="sync",
            failback="manual",
            max_role_changes_per_hour=3,
            witness=SimpleNamespace(address=UnixAddress("/nowhere")),
        ),
        open=SimpleNamespace(
            value=file, learned=lambda **_: None, raise_epoch_floor=lambda _: None, met=lambda _: None, volumes=[]
        ),
        peer_link=SimpleNamespace(
            control=None,
            heart=SimpleNamespace(promises=SimpleNamespace(bound=lambda _: False)),
            want_data=lambda: None,
        ),
        state=State(me="alpha", peer="beta", survivor="primary", arbitrated=True, suspect_ns=1, retry_ns=1, **state),
        settled=True,
        equal_in=None,
        posted=[],
    )


def expand(core: Any) -> tuple[Register, Swapped]:
    side = WitnessSide(core)
    side._register = kept = Kept()  # type: ignore[assignment]
    asyncio.run(side.swap(Swap("expand", 7, "alpha", BOTH, needs_peer=True)))
    (event,) = core.posted
    return kept.record.register, event


def test_who_was_found_equal_enters_the_set() -> None:
    core = make_core()
    core.equal_in = core.peer_link.control = session(OLD)
    register, event = expand(core)
    assert event.ok
    assert register.in_sync == BOTH
    assert register.members == {"alpha": OWN, "beta": OLD}


def test_a_replacement_that_was_found_equal_enters_in_the_place_of_who_is_in_the_set_by_its_name() -> None:
    core = make_core(epoch=7, primary="alpha", in_sync=BOTH, phase=Phase.PAIRED, linked=True)
    side = WitnessSide(core)
    side._register = kept = Kept()  # type: ignore[assignment]
    kept.record = Versioned(
        version=3, register=Register(epoch=7, primary="alpha", in_sync=BOTH, members={"alpha": OWN, "beta": OLD})
    )
    asyncio.run(side._take(kept.record))
    assert side.knows(OLD)
    assert not side.knows(NEW)
    assert roles.step(core.state, Synced(known=True), 0).actions == ()
    (action,) = roles.step(core.state, Synced(known=False), 0).actions
    assert action == Swap("expand", 7, "alpha", BOTH, needs_peer=True)
    core.equal_in = core.peer_link.control = session(NEW)
    asyncio.run(side.swap(action))
    assert kept.record.register.members["beta"] == NEW
    assert side.knows(NEW)


@pytest.mark.parametrize("connected", [NEW, OLD, None])
def test_who_connected_since_does_not_enter_the_set(connected: Incarnation | None) -> None:
    """A blank one of that name, or the same one, started anew: neither was found equal in this session."""
    core = make_core()
    core.equal_in = session(OLD)
    core.peer_link.control = None if connected is None else session(connected)
    register, event = expand(core)
    assert not event.ok
    assert register.in_sync == ("alpha",)
    assert not register.members


class Data:
    def __init__(self) -> None:
        self.said: list[Any] = []

    async def stop(self, stop: Any) -> None:
        self.said.append(stop)


def prepare(core: Any, amount: Any, source: str = "beta") -> tuple[bool, list[Any]]:
    """Whether it would be overwritten, and what the peer is told."""
    data = Data()
    plan = Plan(
        source=source,
        epoch=core.state.epoch,
        pair_uuid="1" * 32,
        flap=False,
        volumes=[VolumePlan(name="data", amount=amount, volume_uuid="2" * 32, first="", full="")],
    )
    agreement = Agreement(source, False, ())
    side = PeerSide(core)
    core.open.met = lambda _: data.said.append("prepared")
    try:
        asyncio.run(side._prepare(data, agreement, plan))  # type: ignore[arg-type]
    except Stopped:
        return False, data.said
    except ValueError:  # the volumes are not there: it was about to
        return True, data.said
    return True, data.said


@pytest.mark.parametrize(
    ("state", "amount", "overwritten"),
    [
        ({"epoch": 7, "in_sync": ("alpha",)}, "bitmap", False),
        ({"epoch": 7, "in_sync": ("alpha",)}, "full", False),
        ({"epoch": 7, "in_sync": ()}, "bitmap", False),
        ({"epoch": 7, "in_sync": ("alpha",)}, "none", True),
        ({"epoch": 7, "in_sync": BOTH}, "bitmap", True),
        ({"epoch": 7, "in_sync": ("beta",)}, "full", True),
        ({"epoch": 7, "in_sync": ("alpha",), "peer_role": "primary"}, "bitmap", True),
        ({"epoch": 0, "in_sync": ()}, "full", True),
    ],
)
def test_without_a_primary_only_a_member_of_the_set_overwrites_the_other_one(
    state: dict[str, Any], amount: str, overwritten: bool
) -> None:
    core = make_core(**state)
    core.witness = object()
    done, said = prepare(core, amount)
    assert done == overwritten
    assert ("prepared" in said) == overwritten
    if not overwritten:
        (stop,) = said
        assert stop.kind == "retry"
        assert "beta" in stop.message


def test_the_source_asks_nothing_of_the_kind() -> None:
    core = make_core(epoch=7, in_sync=("beta",))
    core.witness = object()
    assert prepare(core, "bitmap", source="alpha")[0]


def test_a_lone_pair_has_no_such_register() -> None:
    core = make_core(epoch=7, in_sync=("alpha",))
    core.witness = None
    assert prepare(core, "bitmap")[0]


def test_a_handshake_that_is_under_way_when_a_generation_begins_comes_to_nothing() -> None:
    """W9, G2: it has told the ids of before. Whether it began before the new ids were on their way or while they were,
    what it was begun with has changed since. With a link nothing completes alone, and none begins."""
    core = make_core()
    core.link, core.facts_version, core.posted = None, 4, []
    seen = []
    core.open = SimpleNamespace(began_alone=lambda _new_id: seen.append(core.facts_version))
    asyncio.run(NodeCore._begin_generation(core))
    (while_writing,) = seen
    assert 4 < while_writing < core.facts_version
    assert core.posted == [GenerationBegan()]
    core.link = object()
    asyncio.run(NodeCore._begin_generation(core))
    assert len(seen) == len(core.posted) == 1
