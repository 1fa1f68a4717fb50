"""Who still lives, and for how long a word given is good: failure detector and promise arithmetic, without a clock.

Rules:
- Every time is nanoseconds of CLOCK_BOOTTIME (it goes on while the machine sleeps), of this host alone, and a
  parameter. No time of the peer is ever compared with one of ours: a reply carries a duration, and the round trip
  binds it to our own clock. So a wrong or stepping wall clock changes nothing (A12).
- A10 A promise is good for us until `t_send + T (1 - rho) - delta`: from the *send* time of the beat that it answers.
- A11 We are bound by a promise until `t_received + T (1 + rho)`; a node that has just started is bound for a full T,
  since it does not know what it promised before. A promise never gets shorter by a later one.
- Both roundings are to the safe side: validity down, obligation up. With clocks whose rates differ by less than rho
  the holder's end is before the giver's, whatever the network does to the two messages (a test draws many).
- A beat is answered once: an unknown, repeated or forgotten sequence number gives nothing. So whatever goes over
  several paths, in any order and more than once, gives what its first answer gives.
- Silence is suspicion, never proof: `suspect_ns` after the last word the peer counts as gone for answering writes; only
  a promise that has run out says that it may not act.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

RHO_PER_MILLE = 10
DELTA_NS = 100_000_000
MAX_PROMISE_NS = 3600 * 10**9
KEPT_BEATS = 512  # over all paths

_MILLE = 1000


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The pair's numbers, ns. ValueError for numbers by which a promise would be worth nothing."""

    interval_ns: int
    promise_ns: int
    suspect_after: int
    rho_per_mille: int = RHO_PER_MILLE
    delta_ns: int = DELTA_NS

    def __post_init__(self) -> None:
        if self.interval_ns <= 0 or self.suspect_after <= 0:
            raise ValueError("interval and suspect-after must be more than 0")
        if not 0 <= self.rho_per_mille < _MILLE or self.delta_ns < 0:
            raise ValueError("rho is 0 to 999 per mille, delta not negative")
        if self.promise_ns > MAX_PROMISE_NS:
            raise ValueError("a promise is an hour at the most")
        if self.validity_ns(self.promise_ns) <= self.interval_ns:
            raise ValueError("the promise is too short: it would run out before the next heartbeat")

    @property
    def suspect_ns(self) -> int:
        """Silence after which the peer is suspected."""
        return self.interval_ns * self.suspect_after

    def validity_ns(self, promise_ns: int) -> int:
        """How long after the beat was sent a promise of this length is good for its holder (A10); may be negative."""
        return promise_ns * (_MILLE - self.rho_per_mille) // _MILLE - self.delta_ns

    def obligation_ns(self, promise_ns: int) -> int:
        """How long after the beat was received its giver is bound (A11)."""
        return -(-promise_ns * (_MILLE + self.rho_per_mille) // _MILLE)


class Beats:
    """Our own heartbeats and what their replies are worth: round trip and validity (A10)."""

    __slots__ = ("_next", "_sent", "_timing", "rtt_ns", "valid_until_ns")

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._next = 1
        self._sent: OrderedDict[int, int] = OrderedDict()
        self.rtt_ns: int | None = None
        """of the newest reply"""
        self.valid_until_ns = 0
        """until when the peer has promised not to take over"""

    def send(self, now: int) -> int:
        """The sequence number of a beat that goes out at `now`, a clock read *before* it is handed to the socket."""
        seq = self._next
        self._next += 1
        self._sent[seq] = now
        while len(self._sent) > KEPT_BEATS:
            self._sent.popitem(last=False)
        return seq

    def sent_ns(self, seq: int) -> int | None:
        """When a beat that has not been answered yet was sent."""
        return self._sent.get(seq)

    def reply(self, seq: int, promise_ns: int, now: int) -> bool:
        """The peer's answer to beat `seq`; False when it is worth nothing. `promise_ns` 0: it promises nothing."""
        sent = self._sent.pop(seq, None)
        if sent is None or now < sent:
            return False
        self.rtt_ns = now - sent
        if 0 < promise_ns <= MAX_PROMISE_NS:
            self.valid_until_ns = max(self.valid_until_ns, sent + self._timing.validity_ns(promise_ns))
        return True

    def forget(self) -> None:
        """A new session: replies to older beats count no more. What was promised stays promised."""
        self._sent.clear()
        self.rtt_ns = None

    def released(self) -> None:
        """The promise has ended early (A11: a handoff, a proof of death)."""
        self._sent.clear()
        self.valid_until_ns = 0


class Newest:
    """Which beat of the peer is the latest that came, in one session of it."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def is_news(self, seq: int) -> bool:
        """False for one that came before, or that a later one has overtaken."""
        news = seq > self._last
        self._last = max(self._last, seq)
        return news

    def forget(self) -> None:
        self._last = 0


class Hearing:
    """When the peer was last heard, on any path."""

    __slots__ = ("_timing", "last_ns")

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.last_ns: int | None = None

    def heard(self, now: int) -> None:
        self.last_ns = now if self.last_ns is None else max(self.last_ns, now)

    def age_ns(self, now: int) -> int | None:
        return None if self.last_ns is None else max(0, now - self.last_ns)

    def suspected(self, now: int) -> bool:
        """Never heard counts as silent."""
        return self.last_ns is None or now - self.last_ns >= self._timing.suspect_ns

    @property
    def suspect_at_ns(self) -> int | None:
        """When suspicion begins unless a word comes."""
        return None if self.last_ns is None else self.last_ns + self._timing.suspect_ns


class Promises:
    """What this node has promised (A11)."""

    __slots__ = ("_timing", "bound_until_ns")

    def __init__(self, timing: Timing, now: int) -> None:
        """`now`: when the process started; what an earlier one promised is unknown, so it counts as a full T."""
        self._timing = timing
        self.bound_until_ns = now + timing.obligation_ns(timing.promise_ns)

    def give(self, received: int) -> int:
        """The promise (ns) to put into the reply to a beat that was received at `received`."""
        promise_ns = self._timing.promise_ns
        self.bound_until_ns = max(self.bound_until_ns, received + self._timing.obligation_ns(promise_ns))
        return promise_ns

    def release(self, now: int) -> None:
        """Ended early: the peer itself said that it does not serve (A11)."""
        self.bound_until_ns = min(self.bound_until_ns, now)

    def remaining_ns(self, now: int) -> int:
        return max(0, self.bound_until_ns - now)

    def bound(self, now: int) -> bool:
        return now < self.bound_until_ns
