/* journal_rules.c - the journal's rules one by one: log, eviction, bits, barriers, flushes. See journal_hand.h. */
#include "journal_hand.h"

static void m4_an_extent_is_hot_only_after_its_record_is_durable(void)
{
    start();
    HOLDS(mp_journal_job(&j) == NULL); /* a fresh volume has nothing to write */
    HOLDS(!mp_journal_enter(&j, 5 * EXTENT, 1));
    mp_job *job = mp_journal_job(&j);
    HOLDS(job && !mp_journal_enter(&j, 5 * EXTENT, 1) && !mp_journal_job(&j));
    job->run(job, NULL);
    HOLDS(!mp_journal_enter(&j, 5 * EXTENT, 1));
    HOLDS(mp_journal_finished(&j, job) == 0);
    HOLDS(mp_journal_enter(&j, 5 * EXTENT, 1) && mp_journal_active(&j) == 1);
    mp_journal_leave(&j, 5 * EXTENT, 1);
    cut(FAKE_LOST);
    HOLDS(dirty() == 64 && is_dirty(5 * EXTENT) && is_dirty(6 * EXTENT - 1));
}

static void m4_all_or_nothing_over_several_extents(void)
{
    start();
    enter(0, 1);
    HOLDS(!mp_journal_enter(&j, EXTENT - 1, EXTENT + 2)); /* three: the first is hot */
    mp_journal_leave(&j, 0, 1); /* no other is in flight in it, or this would not be the last */
    HOLDS(j.hot->nodes[mp_hot_find(j.hot, 0)].in_flight == 0);
    HOLDS(work() == 0 && mp_journal_enter(&j, EXTENT - 1, EXTENT + 2) && mp_journal_active(&j) == 3);
}

static void m4_several_activations_share_one_fdatasync(void)
{
    start();
    enter(0, 1);
    unsigned before = disk->syncs;
    for (uint64_t e = 1; e <= 500; e++)
        HOLDS(!mp_journal_enter(&j, e * EXTENT, 1));
    HOLDS(work() == 0 && disk->syncs == before + 1);
    for (uint64_t e = 1; e <= 500; e++)
        HOLDS(mp_journal_enter(&j, e * EXTENT, 1));
}

static void m5_unflushed_extents_stay_until_a_barrier_ended_well(void)
{
    start();
    fill(write_connected);
    HOLDS(!mp_journal_enter(&j, 1500 * EXTENT, 1) && !mp_journal_job(&j) && mp_journal_wants_barrier(&j));
    barrier(false);
    HOLDS(!mp_journal_enter(&j, 1500 * EXTENT, 1) && !mp_journal_job(&j) && mp_journal_wants_barrier(&j));
    mp_journal_barrier_begin(&j);
    HOLDS(!mp_journal_job(&j) && !mp_journal_wants_barrier(&j));
    mp_journal_barrier_end(&j, true);
    enter(1500 * EXTENT, 1);
    HOLDS(dirty() == 0);
}

static void m5_an_extent_in_flight_is_never_evicted(void)
{
    start();
    for (uint64_t e = 0; e < MP_JOURNAL_EXTENTS; e++)
        enter(e * EXTENT, 1);
    HOLDS(!mp_journal_enter(&j, 1500 * EXTENT, 1) && !mp_journal_job(&j) && !mp_journal_wants_barrier(&j));
    mp_journal_leave(&j, 77 * EXTENT, 1);
    HOLDS(work() == 0 && mp_journal_enter(&j, 1500 * EXTENT, 1));
    HOLDS(mp_hot_find(j.hot, 77) == MP_HOT_NONE);
}

static void m5_the_least_recently_used_extent_goes(void)
{
    start();
    fill(write_connected);
    for (uint64_t e = 0; e < 10; e++)
        write_connected(e * EXTENT, 1);
    barrier(true);
    enter(1500 * EXTENT, 1);
    HOLDS(mp_hot_find(j.hot, 10) == MP_HOT_NONE && mp_hot_find(j.hot, 0) != MP_HOT_NONE && mp_hot_find(j.hot, 11) != MP_HOT_NONE);
}

static void m5_dirty_extents_go_without_a_barrier_their_pages_first(void)
{
    start();
    fill(write_alone);
    unsigned before = disk->syncs;
    enter(1500 * EXTENT, 1);
    HOLDS(disk->syncs == before + 2 && mp_hot_find(j.hot, 0) == MP_HOT_NONE);
    cut(FAKE_LOST);
    HOLDS(is_dirty(0) && !is_dirty(BLOCK) && is_dirty(EXTENT) && is_dirty(EXTENT + BLOCK));
}

static void m5_a_page_that_is_durable_is_not_written_again(void)
{
    start();
    fill(write_alone);
    mp_journal_flush(&j);
    HOLDS(work() == 0);
    for (uint64_t e = 0; e < MP_JOURNAL_EXTENTS; e++)
        write_alone(e * EXTENT, 1); /* the same bits */
    unsigned before = disk->syncs;
    enter(1500 * EXTENT, 1);
    HOLDS(disk->syncs == before + 1);
}

static void m5_an_evicted_extent_comes_back_with_a_later_record(void)
{
    start();
    fill(write_connected);
    barrier(true);
    HOLDS(!mp_journal_enter(&j, 1500 * EXTENT, 1));
    mp_job *job = mp_journal_job(&j);
    HOLDS(!mp_journal_enter(&j, 0, 1)); /* it is in the record on disk, but not in the next */
    job->run(job, NULL);
    HOLDS(mp_journal_finished(&j, job) == 0 && !mp_journal_enter(&j, 0, 1));
    HOLDS(work() == 0 && mp_journal_enter(&j, 0, 1));
}

static void m5_many_wide_writes_get_through_in_their_order(void)
{
    enum { WAITERS = 24 };
    block = 4096; /* 32 MiB touch 129 extents */
    size = 64ull << 30;
    start();
    uint64_t wide = MP_JOURNAL_LENGTH_MAX, extent = 64ull * block;
    bool in[WAITERS] = {false};
    unsigned done = 0, first = 0;
    for (unsigned round = 0; done < WAITERS; round++) {
        HOLDS(round < 4 * WAITERS);
        for (unsigned i = 0; i < WAITERS; i++)
            if (!in[i] && mp_journal_enter(&j, i * 2 * wide + extent / 2, wide)) {
                mp_journal_unflushed(&j, i * 2 * wide + extent / 2, wide);
                in[i] = true;
            }
        for (; first < WAITERS && in[first]; first++, done++)
            mp_journal_leave(&j, first * 2 * wide + extent / 2, wide);
        if (work() < 0 && mp_journal_wants_barrier(&j))
            barrier(true);
    }
}

static void m5_wishes_of_those_who_went_away_do_no_harm(void)
{
    start();
    for (unsigned round = 0; round < 50; round++) {
        for (unsigned k = 0; k < 300; k++) {
            uint64_t offset = below(&rng, 2040) * EXTENT, length = 1 + below(&rng, 7 * EXTENT);
            if (mp_journal_enter(&j, offset, length))
                mp_journal_leave(&j, offset, length);
        }
        work();
    }
    enter(3 * EXTENT, 5 * EXTENT);
}

static void m6_bits_stay_in_memory_only_while_their_extent_is_hot(void)
{
    start();
    unsigned before = disk->writes;
    write_alone(9 * EXTENT, 3 * BLOCK);
    HOLDS(disk->writes == before + 1); /* the record, no page */
    uint64_t ticket = mp_journal_empty(&j);
    HOLDS(!mp_journal_reached(&j, ticket) && work() == 0 && mp_journal_reached(&j, ticket) && mp_journal_active(&j) == 0);
    cut(FAKE_LOST);
    HOLDS(dirty() == 3 && mp_journal_job(&j) == NULL);
    enter(0, 1); /* and it goes on */
}

static void m6_a_clean_stop_keeps_what_no_barrier_confirmed(void)
{
    start();
    write_connected(9 * EXTENT, 3 * BLOCK);
    mp_journal_empty(&j);
    while (work() == 0)
        ;
    cut(FAKE_LOST);
    HOLDS(dirty() == 3);
}

static void m8_every_touched_block_is_set(void)
{
    size = 40 * EXTENT - 5 * BLOCK - 777;
    start();
    static bool expected[40 * 64];
    for (unsigned k = 0; k < 300; k++) {
        uint64_t offset = below(&rng, size), length = 1 + below(&rng, mp_min(size - offset, one_in(&rng, 3) ? 3 * EXTENT : 2 * BLOCK));
        if (one_in(&rng, 4))
            offset = size - length; /* up to the last, short block */
        mp_journal_set(&j, offset, length);
        for (uint64_t at = offset; at < offset + length; at = (at / BLOCK + 1) * BLOCK)
            expected[at / BLOCK] = true;
        if (one_in(&rng, 2)) {
            uint64_t first = below(&rng, j.dirty.bits), count = below(&rng, mp_min(j.dirty.bits - first, 200) + 1);
            mp_journal_clear(&j, first, count);
            memset(expected + first, 0, count);
        }
        for (uint64_t b = 0; b < j.dirty.bits; b++)
            HOLDS(mp_bitmap_test(&j.dirty, b) == expected[b]);
    }
    uint64_t ticket = mp_journal_flush(&j);
    HOLDS(work() == 0 && mp_journal_reached(&j, ticket));
    cut(FAKE_LOST);
    for (uint64_t b = 0; b < j.dirty.bits; b++)
        HOLDS(mp_bitmap_test(&j.dirty, b) == expected[b]);
}

static void r2_a_flush_is_reached_when_all_its_pages_are_durable(void)
{
    size = 2000ull * MP_JOURNAL_PAGE_EXTENTS * EXTENT; /* more pages than jobs carry */
    start();
    uint64_t nothing = mp_journal_flush(&j);
    HOLDS(mp_journal_reached(&j, nothing));
    mp_journal_set(&j, 0, size);
    uint64_t ticket = mp_journal_flush(&j);
    HOLDS(!mp_journal_reached(&j, ticket));
    unsigned count = 0;
    for (; !mp_journal_reached(&j, ticket); count++)
        HOLDS(work() == 0);
    HOLDS(count == mp_ceil_div(2000, MP_JOURNAL_JOB_PAGES));
    cut(FAKE_LOST);
    HOLDS(dirty() == j.dirty.bits && !j.lost_log);
}

static void r2_a_flush_during_a_job_waits_for_what_the_job_does_not_have(void)
{
    start();
    mp_journal_set(&j, 0, 1);
    uint64_t first = mp_journal_flush(&j);
    mp_job *job = mp_journal_job(&j);
    uint64_t same = mp_journal_flush(&j);
    HOLDS(!mp_journal_reached(&j, same));
    mp_journal_set(&j, 700 * EXTENT, 1);
    uint64_t second = mp_journal_flush(&j);
    job->run(job, NULL);
    HOLDS(mp_journal_finished(&j, job) == 0 && mp_journal_reached(&j, first) && !mp_journal_reached(&j, second));
    HOLDS(work() == 0 && mp_journal_reached(&j, second) && mp_journal_reached(&j, same));
    mp_journal_set(&j, EXTENT, 1);
    mp_journal_flush(&j);
    job = mp_journal_job(&j);
    uint64_t nothing_new = mp_journal_flush(&j);
    job->run(job, NULL);
    HOLDS(mp_journal_finished(&j, job) == 0 && mp_journal_reached(&j, nothing_new) && !mp_journal_job(&j));
}

static void r3_cleared_bits_go_to_disk_by_themselves_after_a_while(void)
{
    start();
    mp_journal_set(&j, 0, size);
    mp_journal_flush(&j);
    HOLDS(work() == 0);
    mp_journal_clear(&j, 0, MP_JOURNAL_CLEARED - 1);
    HOLDS(mp_journal_job(&j) == NULL);
    mp_journal_clear(&j, 0, MP_JOURNAL_CLEARED); /* one more */
    HOLDS(work() == 0);
    cut(FAKE_LOST);
    HOLDS(dirty() == j.dirty.bits - MP_JOURNAL_CLEARED);
}

static void w7_what_no_barrier_confirmed_is_dirty_once_the_link_is_lost(void)
{
    start();
    write_connected(0, 1);
    barrier(true);
    write_connected(EXTENT, 1);
    barrier(false);
    write_connected(2 * EXTENT, 1);
    mp_journal_barrier_begin(&j);
    write_connected(3 * EXTENT, 1);
    enter(4 * EXTENT, 1);
    mp_journal_unflushed(&j, 4 * EXTENT, 1); /* still in flight */
    mp_journal_link_lost(&j);
    HOLDS(dirty() == 4 && !is_dirty(0) && is_dirty(EXTENT) && is_dirty(2 * EXTENT) && is_dirty(3 * EXTENT) && is_dirty(4 * EXTENT));
}

static void m5_bytes_and_bits_without_a_barrier_are_told(void)
{
    start();
    HOLDS(!mp_journal_has_unflushed(&j));
    write_connected(0, 1000);
    HOLDS(mp_journal_has_unflushed(&j) && mp_journal_unflushed_bytes(&j) == 1000);
    mp_journal_barrier_begin(&j);
    HOLDS(mp_journal_has_unflushed(&j) && mp_journal_unflushed_bytes(&j) == 0);
    write_connected(0, 10);
    mp_journal_barrier_end(&j, false);
    HOLDS(mp_journal_has_unflushed(&j) && mp_journal_unflushed_bytes(&j) == 1010);
    barrier(true);
    HOLDS(!mp_journal_has_unflushed(&j) && mp_journal_unflushed_bytes(&j) == 0);
}

static const check checks[] = {
    CHECK(m4_an_extent_is_hot_only_after_its_record_is_durable),
    CHECK(m4_all_or_nothing_over_several_extents),
    CHECK(m4_several_activations_share_one_fdatasync),
    CHECK(m5_unflushed_extents_stay_until_a_barrier_ended_well),
    CHECK(m5_an_extent_in_flight_is_never_evicted),
    CHECK(m5_the_least_recently_used_extent_goes),
    CHECK(m5_dirty_extents_go_without_a_barrier_their_pages_first),
    CHECK(m5_a_page_that_is_durable_is_not_written_again),
    CHECK(m5_an_evicted_extent_comes_back_with_a_later_record),
    CHECK(m5_many_wide_writes_get_through_in_their_order),
    CHECK(m5_wishes_of_those_who_went_away_do_no_harm),
    CHECK(m5_bytes_and_bits_without_a_barrier_are_told),
    CHECK(m6_bits_stay_in_memory_only_while_their_extent_is_hot),
    CHECK(m6_a_clean_stop_keeps_what_no_barrier_confirmed),
    CHECK(m8_every_touched_block_is_set),
    CHECK(r2_a_flush_is_reached_when_all_its_pages_are_durable),
    CHECK(r2_a_flush_during_a_job_waits_for_what_the_job_does_not_have),
    CHECK(r3_cleared_bits_go_to_disk_by_themselves_after_a_while),
    CHECK(w7_what_no_barrier_confirmed_is_dirty_once_the_link_is_lost),
};

int main(int argc, char **argv)
{
    return run_checks(checks, sizeof checks / sizeof *checks, argc > 1 ? argv[1] : "list");
}
