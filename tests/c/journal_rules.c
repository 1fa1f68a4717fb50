/* journal_rules.c - the journal's rules one by one, on a disk that can be cut off, damaged or made to fail.
 *
 * Use: journal_rules NAME runs one check, journal_rules list names them all. `journal_rules file PATH SIZE BLOCK OFFSET
 * LENGTH` opens a real file, says what it found, and leaves a write in flight there.
 */
#define _GNU_SOURCE
#include "actlog.h"
#include "fakedisk.h"
#include "journal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define TIB ((uint64_t)1 << 40)
#define BLOCK 65536u
#define EXTENT (64ull * BLOCK)

static mp_journal j;
static fake_disk *disk;
static uint64_t size = 2048 * EXTENT, rng = 1; /* four pages of the bitmap */
static uint32_t block = BLOCK;

#define HOLDS(condition)                                                           \
    do {                                                                           \
        if (!(condition)) {                                                        \
            printf("%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);  \
            exit(1);                                                               \
        }                                                                          \
    } while (0)

/* --- counted memory --- */

static uint64_t allocations, allocated;
void *__real_malloc(size_t length);
void *__real_calloc(size_t count, size_t length);
void *__wrap_malloc(size_t length);
void *__wrap_calloc(size_t count, size_t length);
void *__wrap_malloc(size_t length) { allocations++, allocated += length; return __real_malloc(length); }
void *__wrap_calloc(size_t count, size_t length) { allocations++, allocated += count * length; return __real_calloc(count, length); }

/* --- what most checks do --- */

static uint64_t file_length(void) { return MP_JOURNAL_BITMAP + mp_ceil_div(mp_ceil_div(size, block), 64 * MP_JOURNAL_PAGE_EXTENTS) * MP_JOURNAL_PAGE; }

static void init(void)
{
    disk = fake_of(fake_fd(0));
    fake_make(disk, file_length());
    mp_actlog_begin(disk->now + MP_JOURNAL_LOG);
    mp_actlog_seal(disk->now + MP_JOURNAL_LOG, 0);
    memcpy(disk->durable, disk->now, disk->size);
}

static void open_it(void)
{
    mp_fault fault;
    HOLDS(mp_journal_open(&j, fake_fd(0), size, block, &fault) == MP_OK);
}

static void start(void) { init(); open_it(); }

static void cut(fake_cut how)
{
    static fake_disk copy;
    mp_journal_close(&j);
    fake_crash(&copy, disk, how, &rng);
    fake_crash(disk, &copy, FAKE_KILLED, &rng);
    fake_free(&copy);
    open_it();
}

static int work(void) /* one job; -1: there was none */
{
    mp_job *job = mp_journal_job(&j);
    if (!job)
        return -1;
    job->run(job, NULL);
    return mp_journal_finished(&j, job);
}

static void enter(uint64_t offset, uint64_t length)
{
    for (int tries = 0; !mp_journal_enter(&j, offset, length); tries++) {
        HOLDS(tries < 100);
        HOLDS(work() == 0);
    }
}

static void write_connected(uint64_t offset, uint64_t length)
{
    enter(offset, length);
    mp_journal_unflushed(&j, offset, length);
    mp_journal_leave(&j, offset, length);
}

static void write_alone(uint64_t offset, uint64_t length)
{
    enter(offset, length);
    mp_journal_set(&j, offset, length);
    mp_journal_leave(&j, offset, length);
}

static void barrier(bool ok)
{
    mp_journal_barrier_begin(&j);
    mp_journal_barrier_end(&j, ok);
}

static uint64_t dirty(void) { return mp_bitmap_count(&j.dirty); }
static bool is_dirty(uint64_t offset) { return mp_bitmap_test(&j.dirty, offset / block); }
static uint8_t *record(unsigned k) { return disk->now + MP_JOURNAL_LOG + k * MP_ACTLOG_RECORD; }
static void damage(unsigned k) { record(k)[100] ^= 1; memcpy(disk->durable, disk->now, disk->size); }

/* --- the checks --- */

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

static void fill(void (*write)(uint64_t, uint64_t))
{
    for (uint64_t e = 0; e < MP_JOURNAL_EXTENTS; e++)
        write(e * EXTENT, 1);
    HOLDS(mp_journal_active(&j) == MP_JOURNAL_EXTENTS);
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

static void six_records(void) /* the newest is number 6, at place 2 */
{
    start();
    for (uint64_t e = 0; e < 6; e++) {
        enter(e * EXTENT, 1);
        mp_journal_leave(&j, e * EXTENT, 1);
    }
    HOLDS(j.sequence == 6);
}

static void m7_one_torn_record_is_tolerated(void)
{
    six_records();
    damage(2);
    cut(FAKE_LOST);
    HOLDS(!j.lost_log && dirty() == 5 * 64); /* what record 5 says */
    HOLDS(work() == 0 && j.sequence == 6);
    cut(FAKE_LOST);
    HOLDS(!j.lost_log && dirty() == 5 * 64);
}

static void m7_an_old_record_may_be_damaged(void)
{
    six_records();
    damage(0);
    damage(1);
    cut(FAKE_LOST);
    HOLDS(!j.lost_log && dirty() == 6 * 64);
}

static void m7_two_unreadable_records_set_all_bits(void)
{
    six_records();
    damage(2);
    damage(1);
    cut(FAKE_LOST);
    HOLDS(j.lost_log && dirty() == j.dirty.bits);
}

static void m7_a_lost_log_is_whole_again_once_all_bits_are_durable(void)
{
    for (int how = 0; how < 2; how++) {
        six_records();
        for (unsigned k = 0; k < 4; k++)
            how ? damage(k) : (void)memset(record(k), 0, MP_ACTLOG_RECORD);
        memcpy(disk->durable, disk->now, disk->size);
        cut(FAKE_LOST);
        HOLDS(j.lost_log && dirty() == j.dirty.bits);
        cut(FAKE_LOST); /* nothing was written yet: the same again */
        HOLDS(j.lost_log && dirty() == j.dirty.bits);
        HOLDS(!mp_journal_enter(&j, 0, 1) && work() == 0 && mp_journal_enter(&j, 0, 1));
        mp_journal_clear(&j, 64, 64);
        mp_journal_flush(&j);
        HOLDS(work() == 0);
        cut(FAKE_LOST);
        HOLDS(!j.lost_log && dirty() == j.dirty.bits - 64);
        mp_journal_close(&j);
    }
    init();
    open_it();
}

static void m7_replay_is_idempotent_and_writes_nothing(void)
{
    six_records();
    cut(FAKE_TORN);
    unsigned writes = disk->writes;
    for (int again = 0; again < 3; again++) {
        HOLDS(dirty() == 6 * 64 && mp_journal_active(&j) == 0 && disk->writes == writes);
        cut(FAKE_KILLED);
    }
    mp_job *job = mp_journal_job(&j); /* and a crash in the middle of making it durable changes nothing */
    for (int call = 1; call < 3; call++) {
        disk->fail_write = call;
        job->run(job, NULL);
        HOLDS(mp_journal_finished(&j, job) == EIO);
        cut(FAKE_TORN);
        HOLDS(dirty() == 6 * 64);
        job = mp_journal_job(&j);
    }
    job->run(job, NULL);
    HOLDS(mp_journal_finished(&j, job) == 0);
    cut(FAKE_LOST);
    HOLDS(dirty() == 6 * 64 && !mp_journal_job(&j));
}

static void at_most_one_record(fake_disk *fake)
{
    unsigned places = 0;
    for (unsigned i = 0; i < fake->count; i++)
        if (fake->pending[i].offset < MP_JOURNAL_BITMAP)
            places |= 1u << (fake->pending[i].offset - MP_JOURNAL_LOG) / MP_ACTLOG_RECORD;
    HOLDS((places & (places - 1)) == 0);
}

static void m7_two_records_are_never_on_their_way_at_once(void)
{
    init(); /* a process was killed after it wrote record 1, an empty one, and before the fdatasync */
    uint8_t empty[MP_ACTLOG_RECORD];
    mp_actlog_begin(empty);
    mp_actlog_seal(empty, 1);
    HOLDS(pwrite(fake_fd(0), empty, sizeof empty, (off_t)(MP_JOURNAL_LOG + MP_ACTLOG_RECORD)) == (ssize_t)sizeof empty);
    open_it();
    fake_hook = at_most_one_record;
    enter(0, 1);
    HOLDS(j.sequence == 2);
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

static void r2_bits_of_a_killed_process_s_page_cache_are_written_again(void)
{
    start();
    mp_journal_set(&j, 0, 1);
    mp_journal_flush(&j);
    mp_job *job = mp_journal_job(&j);
    fake_disk *aside = fake_of(fake_fd(1));
    job->run(job, NULL);
    HOLDS(mp_journal_finished(&j, job) == 0);
    /* the same file as if the process had died before its fdatasync */
    fake_make(aside, disk->size);
    memcpy(aside->now, disk->now, disk->size);
    fake_crash(disk, aside, FAKE_KILLED, &rng);
    mp_journal_close(&j);
    open_it();
    HOLDS(is_dirty(0));
    mp_journal_set(&j, 0, 1); /* the peer says it again */
    uint64_t ticket = mp_journal_flush(&j);
    HOLDS(!mp_journal_reached(&j, ticket) && work() == 0 && mp_journal_reached(&j, ticket));
    cut(FAKE_LOST);
    HOLDS(is_dirty(0));
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

static void a_failed_call_is_final_and_never_repeated(void)
{
    for (int what = 0; what < 2; what++)
        for (int call = 1; call <= 2; call++) {
            start();
            fill(write_alone);
            *(what ? &disk->fail_sync : &disk->fail_write) = call;
            HOLDS(!mp_journal_enter(&j, 1500 * EXTENT, 1));
            mp_job *job = mp_journal_job(&j);
            uint64_t ticket = mp_journal_flush(&j);
            unsigned writes = disk->writes, syncs = disk->syncs;
            job->run(job, NULL);
            HOLDS(disk->writes == writes + (unsigned)call);
            HOLDS(disk->syncs == syncs + (unsigned)(what ? call : call - 1));
            HOLDS(mp_journal_finished(&j, job) == EIO && j.error == EIO);
            HOLDS(!mp_journal_enter(&j, 1500 * EXTENT, 1) && !mp_journal_job(&j) && !mp_journal_reached(&j, ticket));
            HOLDS(!mp_journal_wants_barrier(&j));
            HOLDS(mp_journal_enter(&j, 1023 * EXTENT, 1)); /* what was hot is hot */
            mp_journal_set(&j, 1023 * EXTENT, 1);
            mp_journal_leave(&j, 1023 * EXTENT, 1);
            mp_journal_close(&j);
        }
    start();
}

static void a_hostile_file_is_not_believed(void)
{
    for (int how = 0; how < 7; how++) {
        init();
        uint8_t *r = record(0);
        mp_actlog_begin(r);
        mp_actlog_put(r, 0, how == 1 ? 2048 : 2047);
        if (how == 2)
            mp_store32(r + 16, 2); /* the count */
        if (how == 3)
            r[0] = 'X';
        mp_actlog_seal(r, how == 4 ? 1 : how == 5 ? UINT64_MAX / 2 - 3 : 0);
        if (how == 6)
            r[8100] ^= 0x80; /* padding, too, is under the digest */
        memcpy(disk->durable, disk->now, disk->size);
        open_it();
        HOLDS(j.lost_log == (how != 0) && dirty() == (how ? j.dirty.bits : 64));
        mp_journal_close(&j);
    }
    size -= 7 * BLOCK + 1;
    init();
    memset(disk->now + MP_JOURNAL_BITMAP, 0xff, disk->size - MP_JOURNAL_BITMAP);
    open_it();
    HOLDS(dirty() == j.dirty.bits);
    mp_journal_close(&j);
    for (unsigned trial = 0; trial < 300; trial++) { /* rubbish anywhere */
        init();
        for (uint64_t k = below(&rng, 40); k--;)
            disk->now[below(&rng, disk->size)] = (uint8_t)below(&rng, 256);
        open_it();
        enter(0, 1);
        mp_journal_leave(&j, 0, 1);
        mp_journal_close(&j);
    }
    start();
}

static void a_file_that_is_too_short_is_refused(void)
{
    init();
    uint64_t lengths[] = {0, MP_JOURNAL_LOG + 100, MP_JOURNAL_BITMAP, file_length() - 1};
    for (unsigned i = 0; i < 4; i++) {
        fake_make(disk, lengths[i]);
        mp_fault fault;
        HOLDS(mp_journal_open(&j, fake_fd(0), size, block, &fault) == MP_IO && fault.status == MP_IO && strstr(fault.text, "too short"));
    }
    start();
}

static void memory_is_bounded_and_taken_only_at_open(void)
{
    size = 8 * TIB;
    int fd = memfd_create("meta", MFD_CLOEXEC);
    HOLDS(fd >= 0 && ftruncate(fd, (off_t)file_length()) == 0);
    uint8_t empty[MP_ACTLOG_RECORD];
    mp_actlog_begin(empty);
    mp_actlog_seal(empty, 0);
    HOLDS(pwrite(fd, empty, sizeof empty, (off_t)MP_JOURNAL_LOG) == (ssize_t)sizeof empty);
    mp_fault fault;
    allocations = allocated = 0;
    HOLDS(mp_journal_open(&j, fd, size, block, &fault) == MP_OK);
    HOLDS(allocations > 0 && allocated <= 8 * (5ull << 19)); /* 2.5 MiB per TiB */
    allocations = 0;
    fill(write_connected);
    barrier(true);
    for (uint64_t e = 5000; e < 9000; e++)
        write_alone(e * EXTENT, 3 * EXTENT);
    mp_journal_set(&j, 0, size);
    mp_journal_flush(&j);
    while (work() == 0)
        ;
    HOLDS(allocations == 0);
    mp_journal_close(&j);
    size = 2048 * EXTENT;
    close(fd);
    start();
}

static void a_big_file_is_read_in_few_calls(void)
{
    size = 8 * TIB;
    init();
    open_it();
    HOLDS(disk->reads <= 8);
}

typedef struct check {
    const char *name;
    void (*run)(void);
} check;

#define CHECK(name) {#name, name}
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
    CHECK(m7_one_torn_record_is_tolerated),
    CHECK(m7_an_old_record_may_be_damaged),
    CHECK(m7_two_unreadable_records_set_all_bits),
    CHECK(m7_a_lost_log_is_whole_again_once_all_bits_are_durable),
    CHECK(m7_replay_is_idempotent_and_writes_nothing),
    CHECK(m7_two_records_are_never_on_their_way_at_once),
    CHECK(m8_every_touched_block_is_set),
    CHECK(r2_a_flush_is_reached_when_all_its_pages_are_durable),
    CHECK(r2_a_flush_during_a_job_waits_for_what_the_job_does_not_have),
    CHECK(r2_bits_of_a_killed_process_s_page_cache_are_written_again),
    CHECK(r3_cleared_bits_go_to_disk_by_themselves_after_a_while),
    CHECK(w7_what_no_barrier_confirmed_is_dirty_once_the_link_is_lost),
    CHECK(a_failed_call_is_final_and_never_repeated),
    CHECK(a_hostile_file_is_not_believed),
    CHECK(a_file_that_is_too_short_is_refused),
    CHECK(memory_is_bounded_and_taken_only_at_open),
    CHECK(a_big_file_is_read_in_few_calls),
};

static int use_file(char **argument)
{
    int fd = open(argument[0], O_RDWR | O_CLOEXEC);
    uint64_t offset = strtoull(argument[3], NULL, 0), length = strtoull(argument[4], NULL, 0);
    mp_fault fault;
    size = strtoull(argument[1], NULL, 0);
    block = (uint32_t)strtoull(argument[2], NULL, 0);
    if (fd < 0 || mp_journal_open(&j, fd, size, block, &fault)) {
        printf("%s\n", fd < 0 ? strerror(errno) : fault.text);
        return 1;
    }
    printf("lost=%d dirty=", j.lost_log);
    uint64_t first, last = 0;
    while (mp_bitmap_next(&j.dirty, last, &first, &last))
        printf("%llu-%llu,", (unsigned long long)first, (unsigned long long)last);
    printf("\n");
    enter(offset, length);
    mp_journal_set(&j, offset, length);
    mp_journal_flush(&j);
    while (work() == 0)
        ;
    mp_journal_close(&j);
    close(fd);
    return 0;
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "list";
    if (!strcmp(name, "file") && argc == 7)
        return use_file(argv + 2);
    bool found = !strcmp(name, "list");
    for (unsigned i = 0; i < sizeof checks / sizeof *checks; i++) {
        if (!strcmp(name, "list"))
            printf("%s\n", checks[i].name);
        if (strcmp(name, checks[i].name))
            continue;
        found = true;
        checks[i].run();
        mp_journal_close(&j);
    }
    for (unsigned i = 0; i < FAKE_DISKS; i++)
        fake_free(fake_of(fake_fd(i)));
    return found ? 0 : 2;
}
