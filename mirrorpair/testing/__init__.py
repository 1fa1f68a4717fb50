"""A simulated pair, to drive the product's own decisions through whatever can happen, without I/O and without time.

Two nodes, their witness and their clients, all in one process; one seed decides everything. What decides is the code
that runs in production: the role machine (roles.py and its parts), what a swap may follow from and what it makes
(swaprules.py, successor.py, arbiter/), promises and proofs (liveness.py, proofs.py), and the handshake (history.py,
pairing.py). What is simulated is what lies around it:

    witness.py     the register: away, slow, its replies lost, swaps that land late, a copy from a backup
    wire.py        sessions and heartbeats: lost, doubled, out of order, late; cuts, and one way alone; sentinels
    mirror.py      the data link: handshakes, frames in order, resyncs, writes in flight, flushes
    disk.py        images: what was not flushed is lost or torn with the boot, EIO, copies from a backup, blank ones
    faults.py      deaths, lost power, frozen processes, clean stops; and what a person does
    invariants.py  I1 to I8, and when each of them is checked
    plays.py       storms of all that, and the worst moments one by one
    campaign.py    many seeds, on all CPUs

What is not played: the engine's own races (they are the business of its tests), more than one volume, `async` mode,
a lone pair, an abdication (A14), and a host whose boot clock stands still with it (F2), which asks for
`reads = "confirm"`. Clocks differ by up to rho, nodes freeze; there is no wall clock in here at all (A12).

A scenario of your own: make a World, let things happen in it, and look. `heal` ends all faults and goes on until the
pair is well again; `fair` lets time pass in which everybody does what is due; `run` throws dice. After each step every
invariant is checked, and BrokenError carries the id of the one that does not hold, and what happened before.

>>> from mirrorpair.testing import World
>>> world = World(seed=7, faults=False, sentinels=True)
>>> world.prefer = None
>>> world.heal()                                    # a person promotes one, both come in sync
>>> old = world.primary()
>>> world.fault.crash(old)                          # silence: the sentinel is dead too
>>> before = world.checks.acks
>>> waited = world.fair(lambda: world.checks.acks > before, 4 * 10**9)
>>> world.primary() is old.other, waited > 2 * 10**9
(True, True)
>>> world.run(500)                                  # whatever else comes; `faults` True: everything fails
>>> world.heal()
>>> world.witness.record.register.in_sync
('alpha', 'beta')

From a shell: `python -m mirrorpair.testing --help`.
"""

from __future__ import annotations

from mirrorpair.testing.plays import PLAYS, play
from mirrorpair.testing.words import BrokenError
from mirrorpair.testing.world import World

__all__ = ["PLAYS", "BrokenError", "World", "play"]
