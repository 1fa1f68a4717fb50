/* bitmap.c - see bitmap.h. Runs are found by words, not by bits: an empty TiB at 64 KiB a bit is 262,144 words. */
#include "bitmap.h"

void mp_bitmap_init(mp_bitmap *map, void *memory, uint64_t bits)
{
    map->words = memory;
    map->bits = bits;
}

bool mp_bitmap_set(mp_bitmap *map, uint64_t bit)
{
    MP_ASSERT(bit < map->bits);
    uint64_t mask = 1ull << (bit % 64);
    return atomic_fetch_or_explicit(&map->words[bit / 64], mask, memory_order_relaxed) & mask;
}

bool mp_bitmap_clear(mp_bitmap *map, uint64_t bit)
{
    MP_ASSERT(bit < map->bits);
    uint64_t mask = 1ull << (bit % 64);
    return atomic_fetch_and_explicit(&map->words[bit / 64], ~mask, memory_order_relaxed) & mask;
}

bool mp_bitmap_test(const mp_bitmap *map, uint64_t bit)
{
    MP_ASSERT(bit < map->bits);
    return atomic_load_explicit(&map->words[bit / 64], memory_order_relaxed) >> (bit % 64) & 1;
}

void mp_bitmap_set_range(mp_bitmap *map, uint64_t first, uint64_t last)
{
    MP_ASSERT(first <= last && last <= map->bits);
    while (first < last) {
        uint64_t end = mp_min(last, (first / 64 + 1) * 64), count = end - first;
        uint64_t mask = (count == 64 ? ~0ull : (1ull << count) - 1) << (first % 64);
        atomic_fetch_or_explicit(&map->words[first / 64], mask, memory_order_relaxed);
        first = end;
    }
}

uint64_t mp_bitmap_count(const mp_bitmap *map)
{
    uint64_t total = 0;
    for (uint64_t word = 0; word < mp_ceil_div(map->bits, 64); word++)
        total += (uint64_t)__builtin_popcountll(atomic_load_explicit(&map->words[word], memory_order_relaxed));
    return total;
}

void mp_bitmap_merge(mp_bitmap *into, const mp_bitmap *from)
{
    MP_ASSERT(into->bits == from->bits);
    for (uint64_t word = 0; word < mp_ceil_div(into->bits, 64); word++) {
        uint64_t more = atomic_load_explicit(&from->words[word], memory_order_relaxed);
        if (more)
            atomic_fetch_or_explicit(&into->words[word], more, memory_order_relaxed);
    }
}

/* First bit at or after `from` whose value is `wanted`, or map->bits. */
static uint64_t find(const mp_bitmap *map, uint64_t from, bool wanted)
{
    while (from < map->bits) {
        uint64_t word = atomic_load_explicit(&map->words[from / 64], memory_order_relaxed);
        if (!wanted)
            word = ~word;
        word >>= from % 64;
        if (word)
            return mp_min(from + (uint64_t)__builtin_ctzll(word), map->bits);
        from = (from / 64 + 1) * 64;
    }
    return map->bits;
}

bool mp_bitmap_next(const mp_bitmap *map, uint64_t from, uint64_t *first, uint64_t *last)
{
    uint64_t start = find(map, from, true);
    if (start >= map->bits)
        return false;
    *first = start;
    *last = find(map, start + 1, false); /* that bit may have been cleared meanwhile, and a run is never empty */
    return true;
}
