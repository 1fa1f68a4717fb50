/* AVX2. Empty on other architectures. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define XXH_VECTOR 2 /* XXH_AVX2: the pragma does not define __AVX2__ for every compiler */
#define MP_KERNEL mp_digest_avx2
#include "digest_kernel.h"
#else
typedef int mp_digest_avx2_is_empty;
#endif
