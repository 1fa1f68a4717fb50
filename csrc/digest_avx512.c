/* AVX-512F. Empty on other architectures. */
#if defined(__x86_64__)
#pragma GCC target("avx512f")
#define XXH_VECTOR 3 /* XXH_AVX512 */
#define MP_KERNEL mp_digest_avx512
#include "digest_kernel.h"
#else
typedef int mp_digest_avx512_is_empty;
#endif
