/* Volatile caches: hosts lose power and with it what was not flushed, also both, also in the middle of a planned
   switchover; or a daemon is killed, or stops cleanly.

   Weakened: A4_BOOT (a lost boot is no reason), A7 (a flap, though the peer has lost its boot), A16 (who is source
   without a primary does not ask who is in the set). */

#ifndef W
#define W 1
#endif
#ifndef C
#define C 2
#endif
#ifndef E
#define E 3
#endif
#ifndef L
#define L 0
#endif
#define POWER
#define HANDOFF
#define STOPS
#include "pair.pml"
