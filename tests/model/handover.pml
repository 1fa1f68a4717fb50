/* Planned switchover as mirrorpair/handoff.py does it: as in handoff.pml, but the receiver acquires the role by one more
   epoch, as after a restart, and there is nothing to accept. */

#define BY_READOPTION
#ifndef E
#define E 4
#endif
#include "handoff.pml"
