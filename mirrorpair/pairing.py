"""What two nodes agree on when a data link begins: per volume who is source and how much is copied, and the ids. Pure.

Rules:
- H4 Both ends compute the same agreement from the same two sides; the dialer says what it came to, the acceptor
  compares.
- One link has one source, for all volumes together. A primary is it. Without one the volumes must agree; those that
  need nothing follow. If they do not agree: refused, until a person promotes one node.
- Any volume that is refused, split or unrelated refuses the whole link: volumes change roles together, so a pair that
  mirrors half of them could not be failed over.
- M10 Pair and volume uuid, and the first generation id of volumes that are new on both nodes, are made by the lower
  node name, which is the dialer. A node that has none takes its peer's; two different ones are refused.
- A17 A flap: the source is the primary, has not taken its peer out of the set since, and every volume has nothing but
  left-over bits. Then they are sent again, and the target stays what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from mirrorpair.errors import PeerProtocolError
from mirrorpair.history import Decision, Ids, Side, decide
from mirrorpair.peermessages import Facts, Plan, Stop, VolumeFacts, VolumePlan, from_hex, to_hex
from mirrorpair.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REFUSED = 12
SPLIT = 20
_FLAP_RULES = ("reconnect", "left-over-bits", "primary")


class Agreement(NamedTuple):
    """Per volume, in the order of the sides; `source` is a node's name."""

    source: str
    flap: bool
    decisions: tuple[Decision, ...]


def side_to_facts(name: str, side: Side, volume_uuid: str) -> VolumeFacts:
    """One volume as it travels."""
    return VolumeFacts(
        name=name,
        size=side.size,
        block_size=side.block_size,
        volume_uuid=volume_uuid,
        current=to_hex(side.ids.current),
        bitmap=to_hex(side.ids.bitmap),
        history=[to_hex(one) for one in side.ids.history],
        new=side.new,
        disk=side.disk,
        crashed_primary=side.crashed_primary,
        boot_lost=side.boot_lost,
        connected_survivor=side.connected_survivor,
        missed_end=side.missed_end,
        dirty=side.dirty,
        alone=side.alone,
        discard=side.discard,
        distrusted=side.distrusted,
        full=to_hex(side.full_id),
    )


def facts_to_side(facts: VolumeFacts, node: str, session: Facts) -> Side:
    """PeerProtocolError: ids or sizes that no node can have."""
    try:
        return Side(
            node=node,
            size=facts.size,
            block_size=facts.block_size,
            ids=Ids(from_hex(facts.current), from_hex(facts.bitmap), tuple(from_hex(one) for one in facts.history)),
            new=facts.new,
            role=session.role,
            disk=facts.disk,
            crashed_primary=facts.crashed_primary,
            boot_lost=facts.boot_lost,
            connected_survivor=facts.connected_survivor,
            missed_end=facts.missed_end,
            dirty=facts.dirty,
            alone=facts.alone,
            epoch=session.epoch,
            discard=facts.discard,
            distrusted=facts.distrusted,
            full_id=from_hex(facts.full),
        )
    except ValueError as error:
        raise PeerProtocolError(
            f"{node} says of volume {printable(facts.name, 80)} what cannot be: {printable(str(error), 200)}"
        ) from None


def compare(mine: Mapping[str, Side], theirs: Mapping[str, Side]) -> dict[str, Decision] | Stop:
    """What the table says of each volume, by name."""
    if list(mine) != list(theirs):
        return Stop(code=REFUSED, kind="refused", message="the two nodes have different volumes")
    return {name: decide(side, theirs[name]) for name, side in mine.items()}


def agree(
    decisions: Mapping[str, Decision],
    mine: Mapping[str, Side],
    theirs: Mapping[str, Side],
    *,
    i_flap: bool,
    they_flap: bool,
) -> Agreement | Stop:
    """`i_flap`: this end is a primary for which this is a flap."""
    kinds: tuple[Literal["split-brain", "unrelated", "refuse"], ...] = ("split-brain", "unrelated", "refuse")
    for kind in kinds:
        for name, decision in decisions.items():
            if decision.amount == kind:
                return _stop(kind, name, decision)
    sides = [next(iter(mine.values())), next(iter(theirs.values()))]
    primaries = [side.node for side in sides if side.role == "primary"]
    sources = {decision.source for decision in decisions.values() if decision.source is not None}
    if len(primaries) > 1:
        both = f"{primaries[0]} and {primaries[1]} are both primary: demote one of them"
        return Stop(code=REFUSED, kind="refused", message=both)
    if len(sources) > 1:
        parts = [f"{name} from {d.source} ({d.reason})" for name, d in decisions.items() if d.source is not None]
        return Stop(
            code=REFUSED,
            kind="refused",
            message=printable(
                f"the volumes would be copied in different directions: {'; '.join(parts)}; promote the node that shall "
                "be the source",
                1800,
            ),
        )
    source = next(iter(sources), None) or next(iter(primaries), None) or min(side.node for side in sides)
    if primaries and source != primaries[0]:
        return Stop(code=REFUSED, kind="refused", message=f"{primaries[0]} is primary and would be overwritten")
    flaps = i_flap if source == sides[0].node else they_flap
    target = next(iter((theirs if source == sides[0].node else mine).values()))
    flap = (
        flaps
        and not target.boot_lost
        and all(d.amount in ("none", "bitmap") and d.rule in _FLAP_RULES for d in decisions.values())
    )
    return Agreement(source, flap, tuple(decisions.values()))


def make_plan(
    agreement: Agreement,
    epoch: int,
    mine: tuple[Facts, Sequence[VolumeFacts]],
    theirs: tuple[Facts, Sequence[VolumeFacts]],
    *,
    new_id: Callable[[], int],
    new_uuid: Callable[[], str],
) -> Plan | Stop:
    """The dialer's word (M10). Stop: the uuids are of two pairs."""
    pair_uuid = _common(mine[0].pair_uuid, theirs[0].pair_uuid)
    if pair_uuid is None:
        return _other_pair("pair")
    plans = []
    for decision, ours, peers in zip(agreement.decisions, mine[1], theirs[1], strict=True):
        volume_uuid = _common(ours.volume_uuid, peers.volume_uuid)
        if volume_uuid is None:
            return _other_pair(f"volume {ours.name}")
        plans.append(
            VolumePlan(
                name=ours.name,
                amount=_amount(decision),
                volume_uuid=volume_uuid or new_uuid(),
                first=to_hex(new_id()) if ours.new and peers.new else "",
                full=to_hex(new_id()) if decision.amount == "full" else "",
            )
        )
    return Plan(
        source=agreement.source,
        epoch=epoch,
        pair_uuid=pair_uuid or new_uuid(),
        flap=agreement.flap,
        volumes=plans,
    )


def check_plan(
    plan: Plan,
    agreement: Agreement,
    epoch: int,
    mine: tuple[Facts, Sequence[VolumeFacts]],
    theirs: tuple[Facts, Sequence[VolumeFacts]],
) -> Stop | None:
    """The acceptor's comparison (H4): None when the dialer came to the same, and made nothing that was not to be
    made."""
    pair_uuid = _common(mine[0].pair_uuid, theirs[0].pair_uuid)
    same = (plan.source, plan.epoch, plan.flap) == (agreement.source, epoch, agreement.flap)
    same = same and len(plan.volumes) == len(agreement.decisions) and _fits(plan.pair_uuid, pair_uuid)
    for one, decision, ours, peers in zip(plan.volumes, agreement.decisions, mine[1], theirs[1], strict=same):
        same = same and (one.name, one.amount) == (ours.name, decision.amount)
        same = same and _fits(one.volume_uuid, _common(ours.volume_uuid, peers.volume_uuid))
        same = same and bool(one.first) == (ours.new and peers.new) and bool(one.full) == (one.amount == "full")
    return None if same else Stop(code=1, kind="retry", message="the two nodes came to different plans: facts changed")


def _amount(decision: Decision) -> Literal["none", "bitmap", "full"]:
    assert decision.amount in ("none", "bitmap", "full")
    return decision.amount


def _stop(kind: Literal["split-brain", "unrelated", "refuse"], name: str, decision: Decision) -> Stop:
    if kind == "refuse":
        return Stop(code=REFUSED, kind="refused", message=f"volume {name}: {decision.reason}")
    return Stop(code=SPLIT, kind=kind, message=f"volume {name}: {decision.reason}")


def _fits(planned: str, common: str | None) -> bool:
    """Whether a planned uuid is the one that is there, or a new one where none is."""
    return bool(planned) and common is not None and planned == (common or planned)


def _common(ours: str, peers: str) -> str | None:
    """The uuid of both; empty: neither has one; None: they differ."""
    if ours and peers and ours != peers:
        return None
    return ours or peers


def _other_pair(what: str) -> Stop:
    return Stop(
        code=REFUSED,
        kind="refused",
        message=f"the {what} of the two nodes has two different uuids: one of them was made anew, or is another pair's",
    )
