/* Links, frames and kills: a link ends at one end before the other one knows it, frames of an earlier link arrive late, a
   write is resent, a daemon is killed with a write in flight or stops cleanly, a target is half-copied. Nothing of the
   register is lost here.

   Weakened: A1, A2, A3, A4_CRASHED, A5_SESSION, A5_EPOCH, A6, A10, A11_PROMISE, A11_START, R1. */

#ifndef W
#define W 2
#endif
#ifndef C
#define C 1
#endif
#ifndef E
#define E 3
#endif
#ifndef L
#define L 0
#endif
#define STALE
#define STOPS
#include "pair.pml"
