/* The arithmetic of promises (mirrorpair/liveness.py): the giver's obligation ends after the holder's validity.

   A is primary and holds, B gives. Two heartbeats may be on their way at once, take any time, or be lost. In a step of
   time either clock goes on by LOW or HIGH of its own units, as it likes: rates that differ by up to rho = 20 %, also
   changing. B's daemon may be killed and started again. There is no bound: durations run out, so the states are finite.

   Invariant: while A serves by a promise, B has not taken over (A10, A11); pair.pml builds upon it. The margin delta is
   left out: it is not needed for this.

   Weakened: WEAK_A10_RATE (validity without drift), WEAK_A10_RECEIVED (validity from when the answer came),
   WEAK_A10_EARLY (the clock is read before the request is there), WEAK_A11_RATE (obligation without drift),
   WEAK_A11_START (a start forgets what was promised), WEAK_A11_SHORTER (a later promise replaces an earlier one).

   Complete: 78 thousand states, 0.3 s. */

#define LOW 8
#define HIGH 12
/* T is 48 or 24: each answer carries its own. */
#ifdef WEAK_A10_RATE
#define VALIDITY(t) (t -> 24 : 48)
#else
#define VALIDITY(t) (t -> 19 : 38)
#endif
#ifdef WEAK_A11_RATE
#define OBLIGATION(t) (t -> 24 : 48)
#else
#define OBLIGATION(t) (t -> 29 : 58)
#endif
#ifdef WEAK_A11_START
#define AT_START 0
#else
#define AT_START OBLIGATION(0)
#endif
#ifdef WEAK_A11_SHORTER
#define LATER(old, new) new
#else
#define LATER(old, new) (old > new -> old : new)
#endif
#ifdef WEAK_A10_RECEIVED
#define SINCE(k) 0
#else
#define SINCE(k) age[k]
#endif
#define OLD 48 /* an answer to a beat of this age is worth nothing */

byte valid;      /* A's clock: for how long yet */
byte bound;      /* B's clock: for how long yet */
byte beat[2];    /* 1: on its way to B, 2: the answer on its way back */
byte age[2];     /* since it was sent, A's clock */
bit kind[2];     /* which T the answer carries */
bit up = 1, over, looked;

inline less(what, by) { what = (what > by -> what - by : 0) }
inline more(k, by) { age[k] = (beat[k] && age[k] + by < OLD -> age[k] + by : (beat[k] -> OLD : 0)) }
inline passes(a, b) { less(valid, a); less(bound, b); more(0, a); more(1, a) }
inline arrives(k, t) { bound = LATER(bound, OBLIGATION(t)); beat[k] = 2; kind[k] = t }
inline answer(k) {
  if :: SINCE(k) < VALIDITY(kind[k]) && valid < VALIDITY(kind[k]) - SINCE(k) -> valid = VALIDITY(kind[k]) - SINCE(k)
     :: else fi;
  beat[k] = 0; age[k] = 0; kind[k] = 0 }

active proctype pair() {
  byte k;
end:
  do
  :: d_step { !beat[0] -> beat[0] = 1 }
  :: d_step { !beat[1] -> beat[1] = 1 }
  :: d_step { beat[0] == 1 && up && !over -> arrives(0, 0) }
  :: d_step { beat[0] == 1 && up && !over -> arrives(0, 1) }
  :: d_step { beat[1] == 1 && up && !over -> arrives(1, 0) }
  :: d_step { beat[1] == 1 && up && !over -> arrives(1, 1) }
  :: d_step { beat[0] == 2 -> answer(0) }
  :: d_step { beat[1] == 2 -> answer(1) }
  :: d_step { beat[0] -> beat[0] = 0; age[0] = 0; kind[0] = 0 }
  :: d_step { beat[1] -> beat[1] = 0; age[1] = 0; kind[1] = 0 }
  :: d_step { true -> passes(LOW, LOW) }
  :: d_step { true -> passes(LOW, HIGH) }
  :: d_step { true -> passes(HIGH, LOW) }
  :: d_step { true -> passes(HIGH, HIGH) }
  :: d_step { up -> up = 0; bound = 0 }
  :: d_step { !up -> up = 1; bound = AT_START }
  :: d_step { up && !bound -> over = 1 }
#ifdef WEAK_A10_EARLY
  :: d_step { valid -> looked = 1 }
  :: d_step { looked -> assert(!over); looked = 0 }
#else
  :: d_step { valid -> assert(!over) }
#endif
  od }
