/* journal_damage.c - the journal on files that are torn, damaged, hostile, huge or failing. See journal_hand.h.
 *
 * `journal_damage file PATH SIZE BLOCK OFFSET LENGTH` opens a real file, says what it found, and writes there alone.
 */
#define _GNU_SOURCE
#include "journal_hand.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

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

static const check checks[] = {
    CHECK(m7_one_torn_record_is_tolerated),
    CHECK(m7_an_old_record_may_be_damaged),
    CHECK(m7_two_unreadable_records_set_all_bits),
    CHECK(m7_a_lost_log_is_whole_again_once_all_bits_are_durable),
    CHECK(m7_replay_is_idempotent_and_writes_nothing),
    CHECK(m7_two_records_are_never_on_their_way_at_once),
    CHECK(r2_bits_of_a_killed_process_s_page_cache_are_written_again),
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
    if (argc == 7 && !strcmp(argv[1], "file"))
        return use_file(argv + 2);
    return run_checks(checks, sizeof checks / sizeof *checks, argc > 1 ? argv[1] : "list");
}
