/* The register's replies: one is lost, or the swap lands late, also after its sender has died; beside kills and clean stops.

   Weakened: A0, A2, A13_FLOOR, A13_PROMISE. */

#ifndef W
#define W 1
#endif
#ifndef C
#define C 1
#endif
#ifndef E
#define E 4
#endif
#ifndef L
#define L 1
#endif
#define STOPS
#include "pair.pml"
