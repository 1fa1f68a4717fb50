/* A node is replaced by a blank one of the same name, at any moment, while the other one has everything.

   Weakened: A8 (the register's incarnation is not compared), A8_LIFE (who enters the set is who is connected by then, not
   who was found equal). */

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
#define BLANK
#include "pair.pml"
