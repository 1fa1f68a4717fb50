/* Planned switchover: the primary drains, gives the role up here, then asks the register for {epoch + 1, peer, both in
   sync, handoff}; the receiver accepts by a swap at that epoch, before it serves. Either swap may be unknown or late;
   either daemon may be killed in between. Who does not know whether its swap has happened goes on only after a swap
   that says so (A0).

   Weakened: H_SERVES (it serves until the swap is known), H_READ (it goes on after a read alone), H_ACCEPT (no swap at
   the receiver), H_MEMBER (to a peer that is not in sync, which does not look at its disks either). */

#ifndef W
#define W 1
#endif
#ifndef C
#define C 1
#endif
#ifndef E
#define E 3
#endif
#ifndef L
#define L 1
#endif
#define HANDOFF
#include "pair.pml"
