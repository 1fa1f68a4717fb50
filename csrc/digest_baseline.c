/* The kernel of the architecture's baseline: SSE2 on x86-64, NEON on arm64. */
#define MP_KERNEL mp_digest_baseline
#include "digest_kernel.h"
