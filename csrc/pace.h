/* pace.h - how fast the online resync may go (R9). Pure; the clock is given.
 *
 * Rules
 *  - While no client writes, nothing holds it back but a rate that the configuration names.
 *  - With clients it is the number of units on their way that is governed: they stand in front of the clients' frames on the
 *    link and in front of their writes at the target's disk. Too slow an answer to the clients halves it, a good one adds one.
 *  - Too slow is a 99th percentile of more than twice what it is without a resync, or 1 ms more, whichever is later; that is
 *    learned while none runs. What was never learned is taken for 4 ms.
 *  - A resync that loses ground is never held back for the clients' sake: it would never end.
 *  - The rate counts what is sent. It is a bucket of a fifth of a second.
 *
 * Contract: one owner thread. Times are nanoseconds of one monotonic clock.
 */
#ifndef MP_PACE_H
#define MP_PACE_H

#include "base.h"

#define MP_PACE_UNITS 16u     /* open at a time, of all volumes; what the slab has room for on both ends */
#define MP_PACE_BUCKETS 256u  /* of latencies: four for each power of two of nanoseconds */
#define MP_PACE_ENOUGH 20u    /* answers that tell something about the slowest of a hundred */
#define MP_PACE_PATIENCE ((uint64_t)1000000000) /* with fewer, judge by what has come in so long; with none, no client writes */

typedef struct mp_pace {
    uint64_t rate;      /* bytes a second; 0: none named */
    int64_t budget;     /* of the rate, bytes; below zero: more was sent than it allows so far */
    uint64_t last_ns;   /* the last tick */
    uint32_t window;    /* units that the clients allow */
    uint64_t usual_ns;  /* the 99th percentile without a resync, smoothed; 0: not known */
    uint64_t since_ns;  /* when the counting below began */
    uint32_t answers, bucket[MP_PACE_BUCKETS];
    bool mixed;         /* a resync ran during some of the time that was counted, not during all of it */
    bool resyncing;
} mp_pace;

void mp_pace_init(mp_pace *pace, uint64_t rate);
void mp_pace_answer(mp_pace *pace, uint64_t took_ns); /* a client's write was confirmed by the peer */
void mp_pace_sent(mp_pace *pace, uint64_t bytes);     /* of the resync */
/* About ten times a second while anything goes on. losing: the resync has more to do than when it began. */
void mp_pace_tick(mp_pace *pace, uint64_t now_ns, bool resyncing, bool losing);
/* Whether one more unit may be begun while so many are open. */
bool mp_pace_may_open(const mp_pace *pace, uint32_t open);

#endif
