/* digest.c - which digest kernel runs, and the zero test. See digest.h. */
#include "digest.h"

mp_digest mp_digest_scalar(const void *data, size_t length, uint64_t seed);
mp_digest mp_digest_baseline(const void *data, size_t length, uint64_t seed);

static bool always(void) { return true; }

#if defined(__x86_64__)
mp_digest mp_digest_avx2(const void *data, size_t length, uint64_t seed);
mp_digest mp_digest_avx512(const void *data, size_t length, uint64_t seed);
static bool has_avx2(void) { return __builtin_cpu_supports("avx2"); }
static bool has_avx512(void) { return __builtin_cpu_supports("avx512f"); }
#define BASELINE "sse2"
#elif defined(__aarch64__)
#define BASELINE "neon"
#else
#define BASELINE "baseline"
#endif

static const mp_digest_kernel kernels[] = {
    {"scalar", mp_digest_scalar, always},
    {BASELINE, mp_digest_baseline, always},
#if defined(__x86_64__)
    {"avx2", mp_digest_avx2, has_avx2},
    {"avx512", mp_digest_avx512, has_avx512},
#endif
    {NULL, NULL, NULL},
};

const mp_digest_kernel *mp_digest_kernels(void) { return kernels; }

static _Atomic(mp_digest_function) chosen;

static mp_digest_function choose(void)
{
    mp_digest_function best = kernels[0].digest;
    for (const mp_digest_kernel *k = kernels; k->name; k++)
        if (k->runs_here())
            best = k->digest;
    chosen = best; /* two threads that race here store the same value */
    return best;
}

mp_digest mp_digest128(const void *data, size_t length, uint64_t seed)
{
    mp_digest_function digest = chosen;
    if (!digest)
        digest = choose();
    return digest(data, length, seed);
}

uint32_t mp_piece_tag(const void *piece, size_t length, uint64_t seed)
{
    return (uint32_t)mp_digest128(piece, length, seed).low;
}

bool mp_is_zero(const void *data, size_t length)
{
    /* The first bytes by hand, then the block against itself shifted: libc's memcmp is the fastest loop there is here. */
    const uint8_t *p = data;
    size_t head = length < 16 ? length : 16;
    for (size_t i = 0; i < head; i++)
        if (p[i])
            return false;
    return length <= 16 || memcmp(p, p + 16, length - 16) == 0;
}
