/* The arbitration of a mirrored pair: two nodes, the register, one volume. Included by the models beside it, each of
   which switches on what it is about (LATE, POWER, BLANK, STOPS, HANDOFF) and says how much of it happens.

   What is modelled is what the code does: mirrorpair/roles.py, rolesteps.py, takeover.py (a node's phase and what it
   knows), swaprules.py and noderegister.py (what a swap may follow from, and that its outcome may stay unknown),
   nodepeer.py (when a promise is given, when a data link is made), history.py (who is source without a primary).

   Rules of the model:
   - A node is never made careful by what it believes of its peer ("it is primary", "it is silent"): whatever it may do
     at some time it may do at any time. So deadlines, suspicion and heartbeats' contents are not in here, and what
     holds here needs none of them.
   - Time is in here only as the one fact that lease.pml proves of the arithmetic of promises: the giver's obligation
     (prom) ends after the holder's validity (bel). A promise that was given before a start is kept after it.
   - A swap reads, objects or writes, in one step: it is on a version, so one that lands is as if it had read just then.
     Its outcome is known, unknown though it landed, unknown and still to land (late; also after its sender has died),
     or known not to have been sent. That a known outcome is processed later is no state of its own: until then a node
     behaves as with an unknown one.
   - Data are a set of writes. A write in flight is in the set of who has it; a link carries one at a time. `seen` is what
     a client has been told: acknowledged, or read.
   - Every count has a bound (W writes, C crashes, E epochs, L unknown outcomes), so that the search is complete.

   Invariants (assertions):
   - I1, I2 Who serves a read has all that was seen, on a disk that is no half-copied one.
   - I3 When one node acknowledges, the other one could not.
   - I4 Who becomes primary has all that was seen.
   - I5 (POWER) What was flushed stays, also when a boot is lost by the only member. What was seen and not flushed may
     go then, and only then.
   - No two histories: nobody writes alone beside somebody who did.

   A macro WEAK_x weakens one rule; each must be found (tests/test_model.py). */

#define SEC 0
#define ACQ 1
#define HAND 2    /* gives the role away and serves no more */
#define PAIRED 3
#define WAITING 4
#define SHRINK 5
#define ALONE 6

#define EQUAL 2   /* rel: both have the same generation; 0, 1: that node has a newer one; 3: both have */
#define SPLIT 3

/* REACH_x: what must be come to as a write is answered, so an assertion that must fail too. */
#ifdef REACH_BACK      /* who took over has its peer in sync again */
#define REACH (i == 1 && ph[1] == PAIRED && ri[0] && ep[1] > 1)
#endif
#ifdef REACH_UNKNOWN   /* all that can go wrong has, and both are in sync again */
#define REACH (nl == L && nc == C && re == E && ph[i] == PAIRED && ri[j])
#endif
#ifdef REACH_BLANK     /* the new node is in the set */
#define REACH (inc[j] && ri[j] && ph[i] == PAIRED)
#endif
#ifdef REACH_HANDED    /* the role was handed over, in spite of a kill and an unknown outcome */
#define REACH (i == 1 && ph[1] == PAIRED && ri[0] && re == 2 && nl == L && nc == C)
#endif
#ifndef REACH
#define REACH false
#endif

#define i _pid
#define j (1 - _pid)

/* The register; rk: the incarnation that it has for each member. */
byte re = 1, rp = 0, rk[2];
bit ri[2], rh;
/* Swaps on their way that can still land: of whom, and what they would write. */
bit lt[2];
byte le[2], lp[2], lk0[2], lk1[2];
bit li0[2], li1[2], lh[2];

/* What a node keeps through a crash: epoch, floor, the unsettled end, data. */
byte ep[2], fl[2], inc[2];
bit cr[2], bl[2], snd[2];
byte dat[2];
/* And what it does not. */
bit up[2], lnk[2], pin[2], kn[2], qs[2], got[2], own[2], both[2];
byte ph[2], exq[2], qr[2], ask[2], infl[2];
byte eq[2];          /* the linked peer has everything; 2: who had it is gone, and this node does not know it yet */
byte qx[2];          /* an expand is to be sent; 2: not any more, who was to enter is gone */
bit prom[2], bel[2];

byte src;            /* of the last data link */
bit flap;            /* it only goes on (A17) */
byte rel = EQUAL;
byte fc[2];          /* the frame on its way to a node: the writes it brings the block to */
#ifdef STALE
byte fo[2], foe[2];  /* one of an older session, and its epoch */
#endif
bit ak[2];           /* the acknowledgement on its way to a node */
byte seen;
byte nw, nc, nl;
#ifdef POWER
byte dur[2], fls;
#define DURABLE(x) dur[x] = dat[x]
#else
#define DURABLE(x) skip
#endif

/* --- what is weakened */

#ifdef WEAK_A2
#define PIS(x) pin[x]
#else
#define PIS(x) (pin[x] || exq[x])
#endif
#ifdef WEAK_A10
#define VALID(x) true
#else
#define VALID(x) (bel[x] || !PIS(x))
#endif
#ifdef WEAK_A11_PROMISE
#define BOUND(x) false
#else
#define BOUND(x) prom[x]
#endif
#ifdef WEAK_A3
#define MEMBER(x) true
#else
#define MEMBER(x) ri[x]
#endif
#ifdef WEAK_A8
#define KNOWN(x) true
#else
#define KNOWN(x) (rk[x] == inc[x])
#endif
#ifdef WEAK_A8_LIFE
#define SAME_LIFE(x) 1
#else
#define SAME_LIFE(x) x
#endif
#ifdef WEAK_A4_BOOT
#define LOST(x) false
#else
#define LOST(x) bl[x]
#endif
#ifdef WEAK_A13_FLOOR
#define FLOOR(x) 0
#else
#define FLOOR(x) fl[x]
#endif
#ifdef WEAK_A13_PROMISE
#define PROMISES(x) (ph[x] == SEC || ph[x] == ACQ)
#else
#define PROMISES(x) (ph[x] == SEC)
#endif
#ifdef WEAK_A0
#define UNKNOWN(before) before
#else
#define UNKNOWN(before) 2
#endif
#ifdef WEAK_A6
#define FORGET infl[i] = 0
#else
#define FORGET skip
#endif
#ifdef WEAK_R1
#define UNSOUND(x) dat[x] = 0
#else
#define UNSOUND(x) snd[x] = 0; dat[x] = 0
#endif

#ifdef WEAK_H_SERVES
#define PRIMARY(x) (ph[x] >= HAND)
#else
#define PRIMARY(x) (ph[x] >= PAIRED)
#endif
#define SERVES(x) (up[x] && PRIMARY(x) && VALID(x))
#define ANSWERS(x) (SERVES(x) && (ph[x] == ALONE || (ph[x] == PAIRED && lnk[x])))
#define HAS_ALL(x) (!(seen & ~dat[x]))

/* --- pieces */

inline no_queue() { qx[i] = 0; qs[i] = 0; qr[i] = 0 }

/* The register has another version: what was read before it, or sent on it, comes to nothing. */
inline no_late(x) {
  lt[x] = 0; le[x] = 0; lp[x] = 0; li0[x] = 0; li1[x] = 0; lh[x] = 0; lk0[x] = 0; lk1[x] = 0; got[x] = 0 }

/* A link ends at one end; what is on its way to the other one may still arrive there. */
inline unlink(x) { lnk[x] = 0; eq[x] = 0; ak[x] = 0; src = 0; flap = 0 }

inline lose_link(x) {
  unlink(x);
  if :: ph[x] == PAIRED -> if :: PIS(x) -> ph[x] = WAITING :: else -> ph[x] = ALONE fi
     :: else fi }

/* The peer is in the set, and it is the one that the register knows by its name (A8). */
#define LISTED (pin[i] && rk[j] == inc[j])

/* What follows a step: an equal peer enters the set; who is alone beside a member takes it out (A1). */
inline settle() {
  if :: ph[i] == PAIRED && eq[i] && !LISTED && exq[i] != 1 && !qx[i] ->
        exq[i] = (exq[i] == 0 -> 1 : 2); qx[i] = SAME_LIFE(eq[i])
     :: ph[i] == ALONE && PIS(i) -> ph[i] = SHRINK; qs[i] = 1
     :: else fi }

inline answered() {
  assert(!ANSWERS(j));                                          /* I3 */
  assert(!(REACH));
  seen = seen | infl[i]; infl[i] = 0 }

inline demoted() {
  ph[i] = SEC; unlink(i); infl[i] = 0; bel[i] = 0; exq[i] = 0; no_queue(); got[i] = 0; own[i] = 0 }

#define FLOORED(e) fl[i] = (fl[i] > e -> fl[i] : e)

/* The register is looked at. */
inline learn() {
  kn[i] = 1;
  if :: PRIMARY(i) && rp != i -> demoted(); ep[i] = re; pin[i] = ri[j]
     :: PRIMARY(i) && rp == i && re > ep[i] ->
        ep[i] = re; pin[i] = ri[j]; no_queue(); unlink(i); exq[i] = (exq[i] == 2 -> 2 : 0);
        if :: ph[i] == PAIRED -> ph[i] = WAITING
           :: ph[i] == SHRINK -> ph[i] = WAITING
           :: else fi;
        settle()
     :: PRIMARY(i) && rp == i && re <= ep[i] -> pin[i] = ri[j]; settle()
     :: ph[i] == ACQ -> ep[i] = re; pin[i] = ri[j];
        if :: re >= ask[i] -> ph[i] = SEC; ask[i] = 0; got[i] = 0; own[i] = 0; both[i] = 0 :: else fi
     :: ph[i] == HAND && (re > ep[i] || rp != i) -> ph[i] = SEC; ep[i] = re; pin[i] = ri[j]
     :: ph[i] == HAND && re == ep[i] && rp == i -> skip
     :: ph[i] == SEC -> ep[i] = re; pin[i] = ri[j]
  fi;
  FLOORED(ep[i]) }

inline keep_late(e, p, a, b, h, enters) {
  lt[i] = 1; le[i] = e; lp[i] = p; li0[i] = a; li1[i] = b; lh[i] = h;
  lk0[i] = (i == 0 || (a && !ri[0]) || enters -> inc[0] : rk[0]);
  lk1[i] = (i == 1 || (b && !ri[1]) || enters -> inc[1] : rk[1]) }

inline write_record(e, p, a, b, h, enters) {
  no_late(0); no_late(1);
  re = e; rp = p;
  rk[0] = (i == 0 || (a && !ri[0]) || enters -> inc[0] : rk[0]);
  rk[1] = (i == 1 || (b && !ri[1]) || enters -> inc[1] : rk[1]);
  ri[0] = a; ri[1] = b; rh = h }

#define ONLY_ME_0 (i == 0)
#define ONLY_ME_1 (i == 1)
/* Whether an outcome may be unknown, and whether a swap may be late, now. */
#define MISSED (nl < L)
#define DELAYED (nl < L && !lt[i])

/* A4, W8, I4. */
inline acquired() {
  assert(snd[i] && HAS_ALL(i));                                 /* I4 */
  ep[i] = re; ph[i] = WAITING; unlink(i); pin[i] = ri[j]; exq[i] = 0; cr[i] = 0; bl[i] = 0; no_queue();
  ask[i] = 0; got[i] = 0; own[i] = 0; both[i] = 0; bel[i] = 0 }

#ifdef POWER
/* C3: the only member lost its boot, or all did: what was not flushed may be gone, and clients are told. */
#define ONLY_LOST if :: bl[i] && !ri[j] && rp == i -> seen = fls :: else fi
#define SOURCE_LOST \
       if :: bl[src] && (!ri[1 - src] || bl[1 - src] || !snd[1 - src] || rel == src) -> seen = fls :: else fi
#else
#define ONLY_LOST skip
#define SOURCE_LOST skip
#endif

/* A3, A4, A8, A11: what the register and this node's own promise say against an acquisition (swaprules.py). */
#define MAY_ACQUIRE (re < ask[i] && MEMBER(i) && KNOWN(i) && !(LOST(i) && ri[j]) && (rp == i || !BOUND(i)))
/* handoff.py: who was handed the role acquires it like one that takes its own back, by yet another epoch. */
#ifdef BY_READOPTION
#define NAMED true
#else
#define NAMED (!rh)
#endif
#define OWN (own[i] && re == ask[i] && rp == i)
#define ONE_OF(x) ((i == x) || both[i])

/* Who is source of a link without a primary: history.py's table, in short. 2: refused. */
#define BETTER(x) (snd[x] && (!snd[1 - x] || rel == x || (rel == EQUAL && ( \
  (bl[1 - x] && !bl[x]) || (bl[x] == bl[1 - x] && cr[x] && !cr[1 - x]) || \
  (bl[x] == bl[1 - x] && cr[x] == cr[1 - x] && dat[x] != dat[1 - x] && !(dat[1 - x] & ~dat[x]))))))
#define TABLE(x) (rel == EQUAL || rel == x)
#define SOURCE ( \
  PRIMARY(0) -> (TABLE(0) && snd[0] -> 0 : 2) : \
  (PRIMARY(1) -> (TABLE(1) && snd[1] -> 1 : 2) : \
  (rel == SPLIT || (!snd[0] && !snd[1]) -> 2 : \
  (rel < 2 && !snd[rel] -> 2 : \
  (BETTER(1) && !BETTER(0) -> 1 : 0)))))
#ifdef WEAK_A7
#define FLAP(x) (ph[x] == WAITING && PIS(x) && snd[1 - x] && rel == EQUAL)
#else
#define FLAP(x) (ph[x] == WAITING && PIS(x) && snd[1 - x] && rel == EQUAL && !bl[1 - x])
#endif
/* A16: without a primary nothing is overwritten by who is not in the set. */
#ifdef WEAK_A16
#define MAY_BE_TARGET(x) true
#else
#define QUIET (rel == EQUAL && dat[0] == dat[1] && snd[0] && snd[1] && !bl[0] && !bl[1] && !cr[0] && !cr[1])
#define MAY_BE_TARGET(x) (PRIMARY(1 - x) || pin[x] || QUIET)
#endif

active [2] proctype node() {
  /* The bounds end a run anywhere. */
end:
  do
  /* A client's write; it is taken while reads may be served, and answered when the phase allows it. */
  :: d_step { SERVES(i) && !infl[i] && nw < W ->
       infl[i] = 1 << nw; dat[i] = dat[i] | infl[i]; nw++ }
  :: d_step { up[i] && ph[i] == PAIRED && lnk[i] && infl[i] && !fc[j] && !ak[i] -> fc[j] = dat[i] }
  /* The frame arrives on the link that it was sent on. */
  :: d_step { fc[i] && up[i] && lnk[i] && !PRIMARY(i) -> dat[i] = fc[i]; fc[i] = 0; if :: lnk[j] -> ak[j] = 1 :: else fi }
#ifdef STALE
  /* W9, A5: one of an earlier link arrives, and is not taken. */
  :: d_step { fo[i] && up[i] ->
#ifdef WEAK_A5_SESSION
       if :: foe[i] == ep[i] && lnk[i] && !PRIMARY(i) -> dat[i] = fo[i] :: else fi;
#endif
#ifdef WEAK_A5_EPOCH
       if :: foe[i] != ep[i] && lnk[i] && !PRIMARY(i) -> dat[i] = fo[i] :: else fi;
#endif
       fo[i] = 0; foe[i] = 0 }
#endif
  :: d_step { ak[i] && infl[i] && ANSWERS(i) && ph[i] == PAIRED -> ak[i] = 0; answered() }
  :: d_step { infl[i] && ANSWERS(i) && ph[i] == ALONE ->
       rel = (rel == EQUAL || rel == i -> i : SPLIT);
       assert(rel != SPLIT);
       answered() }
  /* A read waits for a write in flight (A6). */
  :: d_step { SERVES(i) && !infl[i] ->
       assert(snd[i] && HAS_ALL(i));                            /* I1, I2 */
       seen = dat[i] }

  /* Links. */
  :: d_step { up[i] && lnk[i] -> lose_link(i); FORGET }
  :: d_step { up[i] && ph[i] == WAITING ->
#ifdef WEAK_A1
       ph[i] = ALONE
#else
       if :: PIS(i) -> ph[i] = SHRINK; qs[i] = 1 :: else -> ph[i] = ALONE fi
#endif
     }
  :: d_step { i == 0 && up[0] && up[1] && !(lnk[0] && lnk[1]) && ep[0] == ep[1] && ph[0] != ACQ && ph[1] != ACQ &&
       ph[0] != HAND && ph[1] != HAND && !(PRIMARY(0) && PRIMARY(1)) &&
       ((SOURCE == 0 && MAY_BE_TARGET(1)) || (SOURCE == 1 && MAY_BE_TARGET(0))) ->
       if :: lnk[0] -> lose_link(0) :: else fi;
       if :: lnk[1] -> lose_link(1) :: else fi;
       src = SOURCE;
       SOURCE_LOST;
       flap = FLAP(src);
       if :: !flap && dat[1 - src] != dat[src] -> UNSOUND(1 - src) :: else fi;
#ifdef STALE
       if :: fc[0] -> fo[0] = fc[0]; foe[0] = ep[0] :: else fi;
       if :: fc[1] -> fo[1] = fc[1]; foe[1] = ep[1] :: else fi;
#endif
       fc[0] = 0; fc[1] = 0;
       ak[0] = 0; ak[1] = 0; eq[0] = 0; eq[1] = 0; lnk[0] = 1; lnk[1] = 1;
       if :: ph[src] == WAITING || ph[src] == ALONE -> ph[src] = PAIRED :: else fi }
  /* Everything was copied: durable there, then told (R1, G4). What an earlier end left open is settled. */
  :: d_step { src == i && up[0] && up[1] && lnk[0] && lnk[1] && !eq[i] && ph[i] != ACQ && ph[j] != ACQ ->
       if :: !flap -> dat[j] = dat[i]; snd[j] = 1; DURABLE(j) :: else fi;
       rel = EQUAL; bl[0] = 0; bl[1] = 0; cr[0] = 0; cr[1] = 0; eq[i] = 1;
       settle() }
  /* An expand that failed is asked for again. */
  :: d_step { up[i] && ph[i] == PAIRED && eq[i] && !LISTED && exq[i] != 1 && !qx[i] -> settle() }

  /* The register is looked at. */
  :: d_step { up[i] && (!kn[i] || re != ep[i] || pin[i] != ri[j] || (rp != i && PRIMARY(i))) -> learn() }

  /* Expand (A2). */
  :: d_step { up[i] && qx[i] && (qx[i] == 2 || re != ep[i] || rp != i) ->
       qx[i] = 0; exq[i] = (exq[i] == 2 -> 2 : 0);
       if :: re != ep[i] || rp != i -> learn() :: else fi }
  :: d_step { up[i] && qx[i] == 1 -> qx[i] = 0; exq[i] = (exq[i] == 2 -> 2 : 0) }          /* it was not sent */
  :: d_step { up[i] && qx[i] == 1 && re == ep[i] && rp == i ->
       FLOORED(re); qx[i] = 0; write_record(re, rp, 1, 1, rh, 1); exq[i] = 0; pin[i] = 1; settle() }
  :: d_step { up[i] && qx[i] == 1 && re == ep[i] && rp == i && MISSED ->
       FLOORED(re); qx[i] = 0; nl++; write_record(re, rp, 1, 1, rh, 1); exq[i] = UNKNOWN(0) }
  :: d_step { up[i] && qx[i] == 1 && re == ep[i] && rp == i && DELAYED ->
       FLOORED(re); qx[i] = 0; nl++; keep_late(re, rp, 1, 1, rh, 1); exq[i] = UNKNOWN(0) }

  /* Shrink (A1, A0). */
  :: d_step { up[i] && qs[i] && (re != ep[i] || rp != i) -> qs[i] = 0; ph[i] = WAITING; learn() }
  :: d_step { up[i] && qs[i] && !qx[i] -> qs[i] = 0;                                      /* it was not sent */
       if :: lnk[i] -> ph[i] = PAIRED :: else -> ph[i] = WAITING fi }
  :: d_step { up[i] && qs[i] && !qx[i] && re == ep[i] && rp == i ->
       FLOORED(re); qs[i] = 0; write_record(re, i, ONLY_ME_0, ONLY_ME_1, 0, 0); pin[i] = 0; exq[i] = 0;
       if :: lnk[i] -> ph[i] = PAIRED :: else -> ph[i] = ALONE fi; settle() }
#define SHRUNK_UNKNOWN \
       exq[i] = UNKNOWN(exq[i]); pin[i] = (exq[i] == 2 -> 0 : pin[i]); \
       if :: lnk[i] -> ph[i] = PAIRED :: else -> ph[i] = WAITING fi; settle()
  :: d_step { up[i] && qs[i] && !qx[i] && re == ep[i] && rp == i && MISSED ->
       FLOORED(re); qs[i] = 0; nl++; write_record(re, i, ONLY_ME_0, ONLY_ME_1, 0, 0); SHRUNK_UNKNOWN }
  :: d_step { up[i] && qs[i] && !qx[i] && re == ep[i] && rp == i && DELAYED ->
       FLOORED(re); qs[i] = 0; nl++; keep_late(re, i, ONLY_ME_0, ONLY_ME_1, 0, 0); SHRUNK_UNKNOWN }

  /* Takeover (A3, A11), and taking one's own role back (A4). */
  :: d_step { up[i] && ph[i] == SEC && kn[i] && rp == j && ep[i] < E && !LOST(i) ->
       ph[i] = ACQ; ask[i] = ep[i] + 1; both[i] = 0; unlink(i) }
  :: d_step { up[i] && ph[i] == SEC && kn[i] && rp == i && NAMED && ep[i] < E && !(LOST(i) && pin[i]) ->
       ph[i] = ACQ; ask[i] = ep[i] + 1; unlink(i);
#ifdef WEAK_A4_CRASHED
       both[i] = pin[i]
#else
       both[i] = pin[i] && !cr[i]
#endif
     }
  :: d_step { up[i] && ph[i] == ACQ -> ph[i] = SEC; ask[i] = 0; got[i] = 0; own[i] = 0; both[i] = 0;
       if :: !MAY_ACQUIRE && !OWN -> learn() :: else fi }
  /* It is read, then the floor is made durable, then the swap is sent. */
  :: d_step { up[i] && ph[i] == ACQ && !got[i] && snd[i] && MAY_ACQUIRE -> got[i] = 1 }
#define SENT up[i] && ph[i] == ACQ && got[i]
  :: d_step { SENT -> FLOORED(ask[i]); DURABLE(i); ONLY_LOST;
       write_record(ask[i], i, ONE_OF(0), ONE_OF(1), 0, 0); acquired() }
  :: d_step { SENT && MISSED -> FLOORED(ask[i]); DURABLE(i); ONLY_LOST; nl++;
       write_record(ask[i], i, ONE_OF(0), ONE_OF(1), 0, 0); own[i] = 1 }
  :: d_step { SENT && DELAYED -> FLOORED(ask[i]); DURABLE(i); ONLY_LOST; nl++;
       keep_late(ask[i], i, ONE_OF(0), ONE_OF(1), 0, 0); got[i] = 0; own[i] = 1 }
  /* The next attempt finds what the last one wrote, and follows it (A0). */
  :: d_step { up[i] && ph[i] == ACQ && OWN ->
       write_record(ask[i], i, ONE_OF(0), ONE_OF(1), 0, 0); acquired() }

  /* A13: above what the peer has asked for no late attempt of it can land. */
  :: d_step { up[i] && up[j] && PRIMARY(i) && !qr[i] && fl[j] > ep[i] && fl[j] < E -> qr[i] = fl[j] + 1 }
  :: d_step { up[i] && qr[i] && (rp != i || re >= qr[i]) -> qr[i] = 0; learn() }
  :: d_step { up[i] && qr[i] -> qr[i] = 0 }                                               /* it was not sent */
  :: d_step { up[i] && qr[i] && rp == i && re < qr[i] ->
       FLOORED(qr[i]); write_record(qr[i], i, ri[0], ri[1], rh, 0); exq[i] = 0; learn() }
  :: d_step { up[i] && qr[i] && rp == i && re < qr[i] && MISSED ->
       FLOORED(qr[i]); nl++; write_record(qr[i], i, ri[0], ri[1], rh, 0); qr[i] = 0 }
  :: d_step { up[i] && qr[i] && rp == i && re < qr[i] && DELAYED ->
       FLOORED(qr[i]); nl++; keep_late(qr[i], i, ri[0], ri[1], rh, 0); qr[i] = 0 }

  /* A late swap lands: nobody has changed the register since it was sent. */
  :: d_step { lt[i] ->
       re = le[i]; rp = lp[i]; ri[0] = li0[i]; ri[1] = li1[i]; rh = lh[i]; rk[0] = lk0[i]; rk[1] = lk1[i];
       no_late(0); no_late(1) }

  /* Heartbeats: the peer promises (A10, A11, A13). An answer that is lost is one that is good for no time. */
  :: d_step { up[i] && up[j] && PRIMARY(i) && PROMISES(j) && ep[i] >= ep[j] && ep[i] >= FLOOR(j) && !bel[i] ->
       prom[j] = 1; bel[i] = 1 }
  :: d_step { bel[i] -> bel[i] = 0 }
  :: d_step { prom[i] && !bel[j] -> prom[i] = 0 }

#ifdef HANDOFF
#ifdef WEAK_H_MEMBER
#define H_EQUAL true
#define MAY_HAND (re == ep[i] && rp == i)
#define H_SOUND true
#else
#define H_EQUAL (eq[i] && pin[i] && !exq[i])
#define MAY_HAND (re == ep[i] && rp == i && ri[j])
#define H_SOUND snd[i]
#endif
  /* Planned switchover: drained, durable on both, then the role is given up here, then the register is asked. */
  :: d_step { SERVES(i) && ph[i] == PAIRED && lnk[i] && lnk[j] && up[j] && H_EQUAL && !qr[i] &&
       !infl[i] && ep[i] < E -> DURABLE(0); DURABLE(1);
#ifndef WEAK_H_SERVES
       bel[i] = 0; unlink(i);
#endif
       ph[i] = HAND; no_queue() }
  :: d_step { up[i] && ph[i] == HAND && MAY_HAND ->
       FLOORED(re + 1); write_record(re + 1, j, 1, 1, 1, 0); learn() }
  :: d_step { up[i] && ph[i] == HAND && MAY_HAND && MISSED ->
       FLOORED(re + 1); nl++; write_record(re + 1, j, 1, 1, 1, 0) }
  :: d_step { up[i] && ph[i] == HAND && MAY_HAND && DELAYED ->
       FLOORED(re + 1); nl++; keep_late(re + 1, j, 1, 1, 1, 0) }
  /* It goes on here: only after a swap that says that the other one cannot land any more (A0). */
  :: d_step { up[i] && ph[i] == HAND && re == ep[i] && rp == i ->
#ifndef WEAK_H_READ
       write_record(re, i, ri[0], ri[1], 0, 0);
#endif
       ph[i] = WAITING; pin[i] = ri[j]; exq[i] = 0 }
  /* The receiver accepts, by a swap at that epoch. Its promise to who handed the role over is void (A11). */
#define MAY_ACCEPT (!NAMED && up[i] && ph[i] == SEC && kn[i] && rp == i && rh && MEMBER(i) && KNOWN(i) && !LOST(i) && H_SOUND)
#ifdef WEAK_H_ACCEPT
  :: d_step { MAY_ACCEPT -> both[i] = 1; acquired() }
#else
  :: d_step { MAY_ACCEPT -> DURABLE(i); write_record(re, i, ri[0], ri[1], 0, 0); acquired() }
  :: d_step { MAY_ACCEPT && MISSED -> DURABLE(i); nl++; write_record(re, i, ri[0], ri[1], 0, 0) }
  :: d_step { MAY_ACCEPT && DELAYED -> DURABLE(i); nl++; keep_late(re, i, ri[0], ri[1], 0, 0) }
#endif
#endif

  /* The daemon is killed: a write in flight is on the disk or not. What it had sent is still on its way. */
#define GONE \
       nc++; up[i] = 0; cr[i] = cr[i] || PRIMARY(i); demoted(); pin[i] = 0; exq[i] = 0; kn[i] = 0; \
       ask[i] = 0; both[i] = 0; fc[i] = 0; if :: qx[j] -> qx[j] = 2 :: else fi; if :: eq[j] -> eq[j] = 2 :: else fi
  :: d_step { up[i] && nc < C -> GONE }
  :: d_step { up[i] && nc < C && infl[i] -> dat[i] = dat[i] & ~infl[i]; GONE }
#ifdef WEAK_A11_START
  :: d_step { !up[i] -> up[i] = 1; prom[i] = 0 }
#else
  :: d_step { !up[i] -> up[i] = 1; prom[i] = 1 }
#endif

#ifdef POWER
  /* FLUSH: durable on both, or here where there is no other member (W5). */
  :: d_step { SERVES(i) && !infl[i] && ph[i] == PAIRED && lnk[i] && lnk[j] && up[j] && snd[j] && !fc[j] && fls != dat[i] &&
       dat[j] == dat[i] -> DURABLE(0); DURABLE(1); fls = dat[i]; seen = dat[i] }
  :: d_step { ANSWERS(i) && !infl[i] && ph[i] == ALONE && fls != dat[i] -> DURABLE(i); fls = dat[i]; seen = dat[i] }
  :: d_step { dur[i] != dat[i] && !infl[i] -> DURABLE(i) }
  /* The host loses power, and with it what was not flushed. */
  :: d_step { nc < C && (up[i] || !bl[i]) ->
       dat[i] = dur[i]; bl[i] = 1; if :: up[i] -> GONE :: else -> nc++ fi }
#endif
#ifdef STOPS
  /* A18: a clean stop, drained and durable on both. */
  :: d_step { SERVES(i) && nc < C && ph[i] == PAIRED && lnk[i] && lnk[j] && up[j] && snd[j] && !infl[i] && !fc[j] &&
       dat[j] == dat[i] -> DURABLE(0); DURABLE(1); GONE; cr[i] = 0 }
#endif
#ifdef BLANK
  /* F15: a new node takes its place, while the other one has everything. */
  :: d_step { nc < C && !inc[i] && ri[j] && snd[j] && !bl[j] && HAS_ALL(j) && rel != i ->
       GONE; dat[i] = 0; DURABLE(i); inc[i] = 1; snd[i] = 1; bl[i] = 0; cr[i] = 0; ep[i] = 0; fl[i] = 0; rel = j }
#endif
  od }

init { d_step {
  ri[0] = 1; ri[1] = 1; up[0] = 1; up[1] = 1; snd[0] = 1; snd[1] = 1; kn[0] = 1; kn[1] = 1;
  ep[0] = 1; ep[1] = 1; fl[0] = 1; fl[1] = 1; ph[0] = WAITING; pin[0] = 1; pin[1] = 1; prom[1] = 1 } }
