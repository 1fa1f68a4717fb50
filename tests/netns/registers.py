"""Judges what clients saw of a volume: whether it was one linearizable register for each block, and whether two nodes
ever answered in turn.

Rules:
- A block is a register. No two writes have the same value, so each read says which write it saw, and the question "is
  there an order?" has an answer in n log n: all that saw or made one value are a cluster, from which a stretch of time
  follows in which the register must have held it (zones, after Gibbons and Korach, "Testing shared memories").
- A write that was not answered may have happened at any time after it was asked for, or never. A read that was not
  answered says nothing.
- An acknowledged write that is not there at the end is found here as well: the read at the end is one of the reads.
- Of two nodes only what is certain is an accusation: an answer was given at some time between question and answer.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

INITIAL = 0
"""What every register holds at first; no write writes it."""


class Op(NamedTuple):
    """One read or write of one register; `answered` is infinite if it never was. Times of one clock."""

    write: bool
    value: int | None
    called: float
    answered: float = math.inf

    def __str__(self) -> str:
        return f"{'write' if self.write else 'read'} of {self.value} from {self.called} to {self.answered}"


class _Zone(NamedTuple):
    """`begin`: the first answer that shows the value; `end`: the last question that was to find it. If the one is
    before the other, the register holds the value all that time (`forward`); else at some time between them."""

    value: int
    begin: float
    end: float

    @property
    def forward(self) -> bool:
        return self.begin < self.end


def flaw(ops: Iterable[Op]) -> str | None:
    """Why no order of these operations on one register explains what was answered, or None."""
    clusters: dict[int, list[Op]] = defaultdict(list)
    clusters[INITIAL].append(Op(True, INITIAL, -math.inf, -math.inf))
    reads: list[Op] = []
    for op in ops:
        if op.write:
            assert op.value is not None
            assert op.value not in clusters, f"two writes of {op.value}"
            clusters[op.value].append(op)
        elif op.answered < math.inf:
            reads.append(op)
    for read in reads:
        if read.value is None or read.value not in clusters:
            return f"what nobody wrote: {read}"
        write = clusters[read.value][0]
        if read.answered < write.called:
            return f"read before it was written: {read}, {write}"
        clusters[read.value].append(read)
    zones = [
        _Zone(value, min(op.answered for op in cluster), max(op.called for op in cluster))
        for value, cluster in clusters.items()
        if len(cluster) > 1 or cluster[0].answered < math.inf  # never seen and never answered: it may not have been
    ]
    forward = sorted((zone for zone in zones if zone.forward), key=lambda zone: zone.begin)
    for one, other in itertools.pairwise(forward):
        if other.begin < one.end:
            return f"{_seen(clusters, one)} and {_seen(clusters, other)}: neither can be the earlier one"
    begins = [zone.begin for zone in forward]
    for zone in zones:
        if not zone.forward and (at := bisect.bisect_left(begins, zone.end)) and zone.begin < forward[at - 1].end:
            return f"{_seen(clusters, zone)}, all within the time of {_seen(clusters, forward[at - 1])}"
    return None


def _seen(clusters: dict[int, list[Op]], zone: _Zone) -> str:
    cluster = clusters[zone.value]
    first, last = min(cluster, key=lambda op: op.answered), max(cluster, key=lambda op: op.called)
    return f"{zone.value} ({first}; {last})" if first is not last else f"{zone.value} ({first})"


class Answer(NamedTuple):
    """`node` gave it at some time from `called` to `answered`."""

    node: str
    called: float
    answered: float


def fewest_terms(answers: Sequence[Answer]) -> list[str]:
    """Who answered one after the other, with as few changes as the times allow. Two nodes that answer in turn have more
    terms than there were changes of roles.

    A change is as late as it can be: at the first answer of the other node that no term has covered yet.
    """
    names = sorted({answer.node for answer in answers})
    assert len(names) <= 2, names
    if len(names) < 2:
        return names
    return min((_terms(answers, first, second) for first, second in (names, names[::-1])), key=len)


def _terms(answers: Sequence[Answer], node: str, other: str) -> list[str]:
    left = {
        name: sorted((a for a in answers if a.node == name), key=lambda answer: answer.answered)
        for name in (node, other)
    }
    terms = []
    while left[node] or left[other]:
        terms.append(node)
        until = left[other][0].answered if left[other] else math.inf
        left[node] = [answer for answer in left[node] if answer.called > until]
        node, other = other, node
    return terms
