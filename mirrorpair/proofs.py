"""What a proof of death may end: whom this node has met, to whom it gave its word, and who of them is dead. Pure.

Rules:
- A11 A proof ends the promise only if it names the very life to which that was given: node, process, control session
  and incarnation, as they stood in the hello of that session. A promise given to a later process of the node is not
  its business, however late it comes, and however often.
- A process that this node never met proves nothing. Nor does a session of which it does not know.
- It proves the end of a process. Only if that is the last one that was met is the peer itself gone.
- Who is dead stays dead: what it sent before, and what comes only now, is not the beginning of anything.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

KEPT_DEAD = 64


class Life(NamedTuple):
    """Who somebody is in one control session: what its hello there says."""

    node: str
    process: str
    """a number made at every start of the daemon"""
    session: str
    incarnation: tuple[str, int]


class Proof(NamedTuple):
    """What follows from one. `known`: it names somebody of whom this node knows; `fresh`: it says something new."""

    known: bool = False
    fresh: bool = False
    releases: bool = False
    """our present promise was given to it"""
    gone: bool = False
    """it was the peer's last process that was met"""


class Lives:
    __slots__ = ("_dead", "met", "promised")

    def __init__(self) -> None:
        self.met: Life | None = None
        """the last one"""
        self.promised: Life | None = None
        """to whom the present promise was given, in this process of ours"""
        self._dead: deque[str] = deque(maxlen=KEPT_DEAD)

    def dead(self, process: str) -> bool:
        return process in self._dead

    def knows(self, lives: Iterable[Life]) -> bool:
        return any(life in (self.met, self.promised) for life in lives)

    def prove(self, died: Iterable[Life]) -> Proof:
        """`died`: the sessions of one process, which has ended."""
        lives = frozenset(died)
        releases, gone = self.promised in lives, self.met in lives
        processes = {one.process for one in lives}
        if len(processes) != 1 or not (releases or gone):
            return Proof()
        (process,) = processes
        fresh = not self.dead(process)
        if fresh:
            self._dead.append(process)
        return Proof(True, fresh, releases, gone)
