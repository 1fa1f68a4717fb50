/* bitmap.h - one bit per block, shared by many threads.
 *
 * Contract: pure, no system calls; the caller gives the memory (all zero = no bit set). Single bits are set, cleared and
 * tested atomically (relaxed: whoever hands a bit to another thread orders it by the hand-over itself). Ranges are
 * half-open [first, last), in bits.
 */
#ifndef MP_BITMAP_H
#define MP_BITMAP_H

#include "base.h"

typedef struct mp_bitmap {
    _Atomic uint64_t *words;
    uint64_t bits;
} mp_bitmap;

static inline size_t mp_bitmap_bytes(uint64_t bits) { return (size_t)mp_ceil_div(bits, 64) * 8; }

void mp_bitmap_init(mp_bitmap *map, void *memory, uint64_t bits);
bool mp_bitmap_set(mp_bitmap *map, uint64_t bit);   /* returns whether it was set before */
bool mp_bitmap_clear(mp_bitmap *map, uint64_t bit); /* returns whether it was set before */
bool mp_bitmap_test(const mp_bitmap *map, uint64_t bit);
void mp_bitmap_set_range(mp_bitmap *map, uint64_t first, uint64_t last);
uint64_t mp_bitmap_count(const mp_bitmap *map);
/* Union: every bit of `from` is set in `into`. Both hold the same number of bits (rule R2). */
void mp_bitmap_merge(mp_bitmap *into, const mp_bitmap *from);
/* The next run of set bits that starts at or after `from`: true and [*first, *last), or false. */
bool mp_bitmap_next(const mp_bitmap *map, uint64_t from, uint64_t *first, uint64_t *last);

#endif
