/* bitmap_threads.c - csrc/bitmap.h: threads that share words, then every function against an array of bools.
 *
 * Use: bitmap_threads SEED STEPS. Each thread owns the bits whose number is its own modulo THREADS, so all words are shared;
 * it must find its own bits as it left them, whatever the others do, while one more thread counts, seeks and merges.
 */
#define _GNU_SOURCE
#include "bitmap.h"
#include "fakedisk.h"

#include <pthread.h>

#define THREADS 4u
#define BITS 5003u

static uint64_t words[(BITS + 63) / 64], copy_words[(BITS + 63) / 64];
static mp_bitmap map, copy;
static bool model[BITS];
static atomic_bool stop;
static pthread_barrier_t together; /* a thread that is done before the next one begins would meet nobody */

typedef struct worker {
    pthread_t id;
    unsigned number;
    uint64_t rng, steps;
} worker;

static void need(bool holds, const char *what)
{
    if (!holds) {
        printf("%s\n", what);
        exit(1);
    }
}

static void *own_bits(void *argument)
{
    worker *w = argument;
    pthread_barrier_wait(&together);
    for (uint64_t step = 0; step < w->steps; step++) {
        uint64_t bit = below(&w->rng, BITS / THREADS) * THREADS + w->number;
        need(mp_bitmap_test(&map, bit) == model[bit], "a bit changed by itself");
        if (one_in(&w->rng, 2))
            need(mp_bitmap_set(&map, bit) == model[bit], "set: the bit was not what it said");
        else
            need(mp_bitmap_clear(&map, bit) == model[bit], "clear: the bit was not what it said");
        model[bit] = mp_bitmap_test(&map, bit);
    }
    return NULL;
}

static void *look(void *argument)
{
    worker *w = argument;
    pthread_barrier_wait(&together);
    while (!atomic_load(&stop)) {
        uint64_t first, last, from = below(&w->rng, BITS);
        need(mp_bitmap_count(&map) <= BITS, "more bits than there are");
        if (mp_bitmap_next(&map, from, &first, &last))
            need(from <= first && first < last && last <= BITS, "a run outside the map");
        mp_bitmap_merge(&copy, &map);
    }
    return NULL;
}

static void by_a_model(uint64_t rng, uint64_t steps)
{
    for (uint64_t step = 0; step < steps; step++) {
        uint64_t first = below(&rng, BITS + 1), last = first + below(&rng, mp_min(BITS - first, 200) + 1), total = 0, from = below(&rng, BITS + 1), a = 0, b = 0;
        if (one_in(&rng, 2)) {
            mp_bitmap_set_range(&map, first, last);
            memset(model + first, true, last - first);
        } else {
            for (uint64_t i = first; i < last; i++)
                need(mp_bitmap_clear(&map, i) == model[i], "clear: the bit was not what it said");
            memset(model + first, false, last - first);
        }
        for (uint64_t i = 0; i < BITS; i++) {
            need(mp_bitmap_test(&map, i) == model[i], "a bit is wrong");
            total += model[i];
        }
        need(mp_bitmap_count(&map) == total, "the count is wrong");
        uint64_t begin = from, end;
        while (begin < BITS && !model[begin])
            begin++;
        for (end = begin; end < BITS && model[end];)
            end++;
        need(mp_bitmap_next(&map, from, &a, &b) == (begin < BITS) && (begin == BITS || (a == begin && b == end)), "the next run is wrong");
    }
}

int main(int argc, char **argv)
{
    uint64_t rng = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, steps = argc > 2 ? strtoull(argv[2], NULL, 0) : 20000;
    worker workers[THREADS + 1];
    mp_bitmap_init(&map, words, BITS);
    mp_bitmap_init(&copy, copy_words, BITS);
    pthread_barrier_init(&together, NULL, THREADS + 1);
    for (unsigned i = 0; i <= THREADS; i++) {
        workers[i] = (worker){.number = i, .rng = next_random(&rng), .steps = steps};
        need(pthread_create(&workers[i].id, NULL, i < THREADS ? own_bits : look, &workers[i]) == 0, "no thread");
    }
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(workers[i].id, NULL);
    atomic_store(&stop, true);
    pthread_join(workers[THREADS].id, NULL);
    mp_bitmap_merge(&copy, &map);
    for (uint64_t i = 0; i < BITS; i++) {
        need(mp_bitmap_test(&map, i) == model[i], "a bit is wrong in the end");
        need(!model[i] || mp_bitmap_test(&copy, i), "a bit was not merged");
    }
    by_a_model(next_random(&rng), steps / 50 + 1);
    printf("%llu bits set\n", (unsigned long long)mp_bitmap_count(&map));
    return 0;
}
