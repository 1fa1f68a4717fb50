/* pace.c - see pace.h. */
#include "pace.h"

#define BUCKETS_OF_TWO 4u
#define UNKNOWN_NS ((uint64_t)4 * 1000000)
#define ROOM_NS ((uint64_t)1000000)
#define SECOND ((uint64_t)1000000000)
#define UNIT ((uint64_t)1 << 20)

void mp_pace_init(mp_pace *pace, uint64_t rate)
{
    *pace = (mp_pace){.rate = rate, .window = MP_PACE_UNITS};
}

static uint32_t bucket_of(uint64_t took_ns)
{
    uint64_t time = mp_max(took_ns, BUCKETS_OF_TWO);
    uint32_t power = 63u - (uint32_t)__builtin_clzll(time);
    return power * BUCKETS_OF_TWO + ((uint32_t)(time >> (power - 2)) & (BUCKETS_OF_TWO - 1));
}

/* The first time that is too late for it. */
static uint64_t end_of(uint32_t bucket)
{
    uint64_t next = bucket + 1, power = mp_min(next / BUCKETS_OF_TWO, 60);
    return (BUCKETS_OF_TWO + next % BUCKETS_OF_TWO) << power >> 2;
}

void mp_pace_answer(mp_pace *pace, uint64_t took_ns)
{
    pace->bucket[bucket_of(took_ns)]++;
    pace->answers++;
}

void mp_pace_sent(mp_pace *pace, uint64_t bytes) { pace->budget -= (int64_t)mp_min(bytes, (uint64_t)1 << 40); }

static uint64_t slowest_of_a_hundred(const mp_pace *pace)
{
    uint32_t beyond = pace->answers / 100, seen = 0, bucket = MP_PACE_BUCKETS;
    while (bucket > 0 && seen <= beyond)
        seen += pace->bucket[--bucket];
    return end_of(bucket);
}

static void count_anew(mp_pace *pace, uint64_t now_ns)
{
    memset(pace->bucket, 0, sizeof pace->bucket);
    pace->answers = 0;
    pace->mixed = false;
    pace->since_ns = now_ns;
}

static void judge(mp_pace *pace)
{
    uint64_t slow = slowest_of_a_hundred(pace);
    if (!pace->resyncing) {
        pace->usual_ns = pace->usual_ns ? (pace->usual_ns * 7 + slow) / 8 : slow;
        return;
    }
    uint64_t usual = pace->usual_ns ? pace->usual_ns : UNKNOWN_NS;
    if (slow > mp_max(2 * usual, usual + ROOM_NS))
        pace->window = (uint32_t)mp_max(pace->window / 2, 1);
    else
        pace->window = (uint32_t)mp_min(pace->window + 1, MP_PACE_UNITS);
}

void mp_pace_tick(mp_pace *pace, uint64_t now_ns, bool resyncing, bool losing)
{
    uint64_t passed = pace->last_ns && now_ns > pace->last_ns ? mp_min(now_ns - pace->last_ns, SECOND) : 0;
    pace->last_ns = now_ns;
    int64_t most = (int64_t)mp_max(pace->rate / 5, UNIT);
    pace->budget += (int64_t)((double)pace->rate * ((double)passed / (double)SECOND));
    pace->budget = pace->budget < most ? pace->budget : most;
    pace->mixed |= pace->answers && resyncing != pace->resyncing;
    pace->resyncing = resyncing;
    bool late = now_ns - pace->since_ns >= MP_PACE_PATIENCE;
    if (!resyncing || losing || (late && !pace->answers))
        pace->window = MP_PACE_UNITS;
    if (pace->answers < MP_PACE_ENOUGH && !late)
        return;
    if (pace->answers && !pace->mixed && !losing)
        judge(pace);
    count_anew(pace, now_ns);
}

bool mp_pace_may_open(const mp_pace *pace, uint32_t open)
{
    if (open >= pace->window)
        return false;
    if (!pace->rate)
        return true;
    return pace->budget > 0 && (uint64_t)open * UNIT <= mp_max(pace->rate / 5, UNIT - 1);
}
