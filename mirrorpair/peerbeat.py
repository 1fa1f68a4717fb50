"""Heartbeats over one connection to the peer, be it the control connection or a further path: sent, answered, counted.

Rules:
- A10, A11: the clock is read before a beat is handed to the socket and after one was received. What a promise is worth
  follows from the beat that it answers, whatever way either of them went.
- Every beat has a number of its own, counted over all connections. What comes again, or was overtaken by a later one,
  is answered, but is no news: the peer counts as heard only by what says more than was known, and by the answer to a
  beat of ours from the moment on at which that was sent. So a slow path can keep nobody alive who has died since.
- Each connection knows whether it is silent itself; whether the peer is, all of them know together (`Heart`).
- A loop of ours that was itself late (stopped, swapped out) first reads what came meanwhile: our own sleep is not the
  peer's death.
- A11 To whom a promise was given is kept with it.
- A connection that does not take what it is sent is ended; nothing is queued for it without bound.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from mirrorpair.linux import clock_boottime_ns
from mirrorpair.liveness import Beats, Hearing, Newest, Promises, Timing
from mirrorpair.peermessages import Beat, Promise, Word, encode_line
from mirrorpair.proofs import Life, Lives

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_UNSENT = 1 << 20  # bytes waiting for a peer that does not read


class BeatHandler(Protocol):
    """What the node does with them. All of it must be short."""

    def beat(self, seq: int) -> Beat:
        """The beat to send now."""
        ...

    def on_beat(self, beat: Beat) -> bool:
        """A beat arrived, perhaps once more or after a later one; whether the reply may promise anything (A13)."""
        ...

    def on_promise(self) -> None:
        """A reply arrived: round trip and validity are new."""
        ...


class Heart:
    """What outlives a connection: when the peer was heard, and what was promised by whom, to whom."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.beats = Beats(timing)
        self.hearing = Hearing(timing)
        self.newest = Newest()
        self.promises = Promises(timing, clock_boottime_ns())
        self.lives = Lives()

    def begin(self, life: Life) -> None:
        """A new session."""
        self.hearing.heard(clock_boottime_ns())
        self.beats.forget()
        self.newest.forget()
        self.lives.met = life


class Pulse:
    """The beats of one connection. Who reads it says `heard` for each word and gives beats and promises to `take`;
    `run` sends."""

    def __init__(self, handler: BeatHandler, heart: Heart, peer: str, writer: asyncio.StreamWriter) -> None:
        self._handler, self._heart, self._peer, self._writer = handler, heart, peer, writer
        self.hearing = Hearing(heart.timing)
        self.rtt_ns: int | None = None
        """of the newest reply here"""
        self.received = 0
        """beats of the peer"""

    def heard(self, now: int) -> None:
        """Something came over this connection."""
        self.hearing.heard(now)

    def take(self, word: Beat | Promise, now: int, life: Life) -> None:
        """`life`: whose word it is."""
        heart = self._heart
        if isinstance(word, Beat):
            self.received += 1
            if heart.newest.is_news(word.seq):
                heart.hearing.heard(now)
            promise_ns = 0
            if self._handler.on_beat(word):
                promise_ns = heart.promises.give(now)
                heart.lives.promised = life
            self.send(Promise(seq=word.seq, promise_ns=promise_ns))
            return
        sent = heart.beats.sent_ns(word.seq)
        if heart.beats.reply(word.seq, word.promise_ns, now):
            assert sent is not None
            self.rtt_ns = now - sent
            heart.hearing.heard(sent)
            self._handler.on_promise()

    async def run(self, tell: Callable[[str], None]) -> None:
        """Beats until the connection is silent for too long, or full; `tell` is then told why."""
        timing = self._heart.timing
        due = wake = clock_boottime_ns()
        while True:
            now = clock_boottime_ns()
            late = now - wake > 2 * timing.interval_ns
            if not late and self.hearing.suspected(now):
                age = self.hearing.age_ns(now) or 0
                tell(f"{self._peer} was silent for {age / 1e9:.2f} s")
                return
            if self._writer.transport.get_write_buffer_size() > MAX_UNSENT:
                tell(f"{self._peer} does not read what it is sent")
                return
            if now >= due:
                self.beat(now)
                due = now + timing.interval_ns
            # Silence is noticed when it is one, not a beat later: writes wait for that.
            at = self.hearing.suspect_at_ns
            wake = due if at is None or at <= now else min(due, at)
            await asyncio.sleep((wake - now) / 1e9 + 0.0005)

    def beat(self, now: int) -> None:
        """One more, ahead of its turn, when it has something new to say."""
        self.send(self._handler.beat(self._heart.beats.send(now)))

    def send(self, word: Word) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(encode_line(word))
