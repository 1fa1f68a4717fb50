/* The plain reference kernel: no vector instruction on any machine. The others are tested equal to it. */
#define XXH_VECTOR 0 /* XXH_SCALAR */
#define MP_KERNEL mp_digest_scalar
#include "digest_kernel.h"
