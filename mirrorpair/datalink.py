"""The handshake of a data link, from a new connection to an agreement that both ends have made durable.

    dialer                                         acceptor
    HELLO  Facts, HELLO VolumeFacts ...   --->
                                          <---     WELCOME Facts, WELCOME VolumeFacts ...
    both compute the same agreement (pairing.py), or both the same refusal, which each tells the other
    (prepares)  START Plan                --->
                                          <---     START Plan   (compared, prepared)
    ... both ends give the channel to their engines

Rules:
- Both belong to the same control session and the same epoch, or the facts are changing: "retry".
- R1, M10 `prepare` makes durable what has to be before the first byte is overwritten; it runs before this end's START.
- Whatever ends it is raised: `Stopped` with its kind, or an error of the connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mirrorpair._core import FRAME_HELLO, FRAME_START, FRAME_WELCOME
from mirrorpair.pairing import Agreement, agree, check_plan, compare, facts_to_side, make_plan
from mirrorpair.peerdata import DataConnection, Stopped
from mirrorpair.peermessages import MAX_VOLUMES, Facts, Plan, Stop, VolumeFacts, decode_frame, encode_frame

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mirrorpair.history import Decision, Side

PREPARE_S = 30.0  # the other end may have a slow disk to make things durable on


class Party(NamedTuple):
    """What one end brings."""

    facts: Facts
    volumes: list[VolumeFacts]
    sides: dict[str, Side]


class Made(NamedTuple):
    agreement: Agreement
    plan: Plan


async def negotiate(
    data: DataConnection,
    mine: Party,
    *,
    dialed: bool,
    peer: str,
    objection: Stop | None,
    decided: Callable[[dict[str, Decision]], None],
    prepare: Callable[[Agreement, Plan], Awaitable[None]],
    new_id: Callable[[], int],
    new_uuid: Callable[[], str],
) -> Made:
    """`objection`: why this end wants no link now; the peer is told. `decided` is told what the table says of each
    volume, also when the link is then refused."""
    if dialed:
        if objection is not None:
            raise Stopped(objection)
        await _send(data, FRAME_HELLO, mine)
        theirs = await _receive(data, FRAME_WELCOME, peer)
    else:
        theirs = await _receive(data, FRAME_HELLO, peer)
        if objection is not None:
            raise await _ended(data, objection)
        await _send(data, FRAME_WELCOME, mine)
    agreement = await _agree(data, mine, theirs, decided)
    pair = (mine.facts, mine.volumes), (theirs.facts, theirs.volumes)
    epoch = mine.facts.epoch
    if dialed:
        plan = make_plan(agreement, epoch, *pair, new_id=new_id, new_uuid=new_uuid)
        if isinstance(plan, Stop):
            raise await _ended(data, plan)
        await prepare(agreement, plan)
        await data.send(FRAME_START, encode_frame(plan))
        answer = decode_frame(Plan, await data.recv(FRAME_START, PREPARE_S))
        if answer != plan:
            raise await _ended(data, _retry("the peer answered with another plan"))
        return Made(agreement, plan)
    plan = decode_frame(Plan, await data.recv(FRAME_START, PREPARE_S))
    wrong = check_plan(plan, agreement, epoch, *pair)
    if wrong is not None:
        raise await _ended(data, wrong)
    await prepare(agreement, plan)
    await data.send(FRAME_START, encode_frame(plan))
    return Made(agreement, plan)


async def _send(data: DataConnection, kind: int, party: Party) -> None:
    await data.send(kind, encode_frame(party.facts))
    for volume in party.volumes:
        await data.send(kind, encode_frame(volume))


async def _receive(data: DataConnection, kind: int, peer: str) -> Party:
    facts = decode_frame(Facts, await data.recv(kind))
    assert facts.volumes <= MAX_VOLUMES
    volumes = [decode_frame(VolumeFacts, await data.recv(kind)) for _ in range(facts.volumes)]
    return Party(facts, volumes, {one.name: facts_to_side(one, peer, facts) for one in volumes})


async def _agree(
    data: DataConnection, mine: Party, theirs: Party, decided: Callable[[dict[str, Decision]], None]
) -> Agreement:
    if theirs.facts.sessions != mine.facts.sessions:
        raise await _ended(data, _retry("the data connection belongs to another control session"))
    if theirs.facts.epoch != mine.facts.epoch:
        raise await _ended(
            data, _retry(f"the two nodes are in different epochs, {mine.facts.epoch} and {theirs.facts.epoch}")
        )
    decisions = compare(mine.sides, theirs.sides)
    if isinstance(decisions, Stop):
        raise await _ended(data, decisions)
    decided(decisions)
    agreement = agree(decisions, mine.sides, theirs.sides, i_flap=mine.facts.flap, they_flap=theirs.facts.flap)
    if isinstance(agreement, Stop):
        raise await _ended(data, agreement)
    return agreement


async def _ended(data: DataConnection, stop: Stop) -> Stopped:
    await data.stop(stop)
    return Stopped(stop)


def _retry(message: str) -> Stop:
    return Stop(code=1, kind="retry", message=message)
