/* pace_rules.c - csrc/pace.h (R9) by a clock of its own: what clients, a rate and lost ground do to the resync.
 *
 * Use: pace_rules. Nothing here is random, so a seed is not looked at.
 */
#include "pace.h"

#include <stdio.h>
#include <stdlib.h>

#define MS ((uint64_t)1000000)
#define TICK (100 * MS)
#define MIB ((uint64_t)1 << 20)

static mp_pace pace;
static uint64_t now;

#define need(holds) need_at(holds, #holds, __LINE__)

static void need_at(bool holds, const char *what, int line)
{
    if (!holds) {
        printf("line %d: %s\n", line, what);
        exit(1);
    }
}

static void begin(uint64_t rate)
{
    mp_pace_init(&pace, rate);
    now = 1000 * MS;
    mp_pace_tick(&pace, now, false, false);
}

/* So many ticks, in each so many answers, all as slow as that. */
static void run(unsigned ticks, unsigned answers, uint64_t took, bool resyncing, bool losing)
{
    for (unsigned i = 0; i < ticks; i++) {
        for (unsigned k = 0; k < answers; k++)
            mp_pace_answer(&pace, took);
        now += TICK;
        mp_pace_tick(&pace, now, resyncing, losing);
    }
}

static uint32_t window(void)
{
    uint32_t open = 0;
    while (mp_pace_may_open(&pace, open))
        open++;
    return open;
}

static void clients(void)
{
    begin(0);
    run(20, 50, MS / 4, false, false); /* a quarter of a millisecond is usual here */
    run(5, 50, MS / 4, true, false);
    need(window() == MP_PACE_UNITS);
    run(1, 50, 2 * MS, true, false); /* eight times slower */
    need(window() == MP_PACE_UNITS / 2);
    run(10, 50, 2 * MS, true, false);
    need(window() == 1); /* never none: it goes on */
    run(4, 50, MS / 4, true, false);
    need(window() == 5);
    run(40, 50, MS / 4, true, false);
    need(window() == MP_PACE_UNITS);
    run(10, 50, 7 * MS / 8, true, false); /* more than twice as slow, but less than 1 ms more: nobody minds */
    need(window() == MP_PACE_UNITS);
}

static void slow_clients_have_their_own_measure(void)
{
    begin(0);
    run(40, 50, 20 * MS, false, false);
    run(10, 50, 30 * MS, true, false);
    need(window() == MP_PACE_UNITS);
    run(10, 50, 60 * MS, true, false);
    need(window() == 1);
}

static void one_of_a_hundred(void)
{
    begin(0);
    run(20, 100, MS / 4, false, false);
    for (unsigned i = 0; i < 10; i++) { /* one in a hundred is allowed for, two are not */
        mp_pace_answer(&pace, 50 * MS);
        run(1, 99, MS / 4, true, false);
    }
    need(window() == MP_PACE_UNITS);
    for (unsigned i = 0; i < 10; i++) {
        mp_pace_answer(&pace, 50 * MS);
        mp_pace_answer(&pace, 50 * MS);
        run(1, 98, MS / 4, true, false);
    }
    need(window() == 1);
}

static void few_answers(void)
{
    begin(0);
    run(20, 50, MS / 4, false, false);
    run(9, 1, 50 * MS, true, false);
    need(window() == MP_PACE_UNITS); /* nine say little */
    run(11, 1, 50 * MS, true, false);
    need(window() < MP_PACE_UNITS); /* but nobody waits longer than a second */
    run(60, 1, 50 * MS, true, false);
    need(window() == 1);
    run(11, 0, 0, true, false); /* the client has stopped */
    need(window() == MP_PACE_UNITS);
}

static void unknown_clients(void)
{
    begin(0);
    run(3, 50, 7 * MS, true, false);
    need(window() == MP_PACE_UNITS);
    run(3, 50, 12 * MS, true, false);
    need(window() == 2);
    run(1, 50, 12 * MS, false, false); /* half of what was counted came from before its end */
    need(window() == MP_PACE_UNITS && pace.usual_ns == 0);
    run(1, 50, 12 * MS, false, false);
    need(pace.usual_ns >= 12 * MS && pace.usual_ns < 16 * MS);
}

static void lost_ground(void)
{
    begin(0);
    run(20, 50, MS / 4, false, false);
    run(20, 50, 50 * MS, true, false);
    need(window() == 1);
    run(1, 50, 50 * MS, true, true);
    need(window() == MP_PACE_UNITS);
}

/* What is sent in ten seconds if every chance is taken. */
static uint64_t sent_at(uint64_t rate)
{
    uint64_t sent = 0;
    begin(rate);
    for (unsigned i = 0; i < 100; i++) {
        for (uint32_t open = 0; mp_pace_may_open(&pace, open); open++) {
            mp_pace_sent(&pace, MIB);
            sent += MIB;
        }
        run(1, 0, 0, true, false);
    }
    return sent;
}

static void rates(void)
{
    static const uint64_t rate[] = {64 << 10, MIB, 10 * MIB, 100 * MIB};
    for (unsigned i = 0; i < sizeof rate / sizeof *rate; i++) {
        uint64_t sent = sent_at(rate[i]);
        need(sent >= 10 * rate[i] * 9 / 10);
        need(sent <= 10 * rate[i] + mp_max(rate[i] / 5, MIB) + MIB);
    }
    begin(MIB);
    mp_pace_sent(&pace, 100 * MIB);
    run(50, 0, 0, true, true); /* lost ground is no excuse for more than the configured rate */
    need(window() == 0);
    begin(100 * MIB);
    now += 3600000 * MS; /* an hour asleep earns nothing */
    mp_pace_tick(&pace, now, true, false);
    mp_pace_sent(&pace, 21 * MIB);
    need(window() == 0);
}

static void any_latency(void)
{
    begin(0);
    for (uint64_t took = 0; took < (uint64_t)1 << 62; took = took * 3 / 2 + 1) {
        run(1, 50, took, false, false);
        need(pace.usual_ns > 0);
    }
    begin(0);
    uint64_t before = 0;
    for (uint64_t took = 1000; took < 100000 * MS; took += took / 7) { /* told to within a quarter, never too low */
        mp_pace_init(&pace, 0);
        mp_pace_tick(&pace, now, false, false);
        run(11, 50, took, false, false);
        need(pace.usual_ns >= took && pace.usual_ns <= took + took / 4 + 1000 && pace.usual_ns >= before);
        before = pace.usual_ns;
    }
}

int main(void)
{
    clients();
    slow_clients_have_their_own_measure();
    one_of_a_hundred();
    few_answers();
    unknown_clients();
    lost_ground();
    rates();
    any_latency();
    printf("done\n");
    return 0;
}
