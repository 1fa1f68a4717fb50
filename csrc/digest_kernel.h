/* digest_kernel.h - the body of one digest kernel. Included once by each digest_<set>.c after it has named the kernel
 * (MP_KERNEL) and, where needed, switched the compiler's target. XXH_INLINE_ALL makes every function of libxxhash static. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "digest.h"

mp_digest MP_KERNEL(const void *data, size_t length, uint64_t seed);

mp_digest MP_KERNEL(const void *data, size_t length, uint64_t seed)
{
    XXH128_hash_t hash = XXH3_128bits_withSeed(data, length, seed);
    return (mp_digest){hash.low64, hash.high64};
}
