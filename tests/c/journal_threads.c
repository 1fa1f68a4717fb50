/* journal_threads.c - the journal's jobs in a real pool on a real file, for the thread sanitizer: the owner goes on meanwhile.
 *
 * Use: journal_threads SEED STEPS. At the end the file is opened again and must hold every bit that was asked for.
 */
#define _GNU_SOURCE
#include "actlog.h"
#include "fakedisk.h"
#include "journal.h"

#include <sys/mman.h>
#include <unistd.h>

#define BLOCK 65536u
#define EXTENT (64ull * BLOCK)
#define EXTENTS 3000u
#define SIZE (EXTENTS * EXTENT)

static mp_journal j;
static mp_pool pool;

static void need(bool holds, const char *what)
{
    if (!holds) {
        printf("%s\n", what);
        exit(1);
    }
}

static void finish(mp_job *job)
{
    if (job)
        need(mp_journal_finished(&j, job) == 0, "a job failed");
}

int main(int argc, char **argv)
{
    uint64_t rng = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, steps = argc > 2 ? strtoull(argv[2], NULL, 0) : 20000, jobs = 0, writes = 0;
    int fd = memfd_create("meta", MFD_CLOEXEC);
    uint64_t length = MP_JOURNAL_BITMAP + mp_ceil_div(EXTENTS, MP_JOURNAL_PAGE_EXTENTS) * MP_JOURNAL_PAGE;
    uint8_t empty[MP_ACTLOG_RECORD];
    mp_fault fault;
    mp_actlog_begin(empty);
    mp_actlog_seal(empty, 0);
    need(fd >= 0 && ftruncate(fd, (off_t)length) == 0 && pwrite(fd, empty, sizeof empty, (off_t)MP_JOURNAL_LOG) > 0, "no file");
    need(mp_journal_open(&j, fd, SIZE, BLOCK, &fault) == MP_OK, "open");
    need(mp_pool_start(&pool, 2, NULL, 0) == MP_OK, "no threads");
    for (uint64_t step = 0; step < steps; step++) {
        uint64_t offset = below(&rng, EXTENTS) * EXTENT, part = 1 + below(&rng, 3 * BLOCK);
        bool alone = one_in(&rng, 2);
        while (!mp_journal_enter(&j, offset, part)) {
            mp_job *job = mp_journal_job(&j);
            if (job) {
                mp_pool_submit(&pool, job);
                jobs++;
            }
            if (mp_journal_wants_barrier(&j)) {
                mp_journal_barrier_begin(&j);
                mp_journal_barrier_end(&j, true);
            }
            if (one_in(&rng, 2)) /* change bits of all kinds of pages under the job */
                mp_journal_set(&j, below(&rng, SIZE), 1);
            else
                mp_journal_clear(&j, below(&rng, j.dirty.bits), 1);
            if (one_in(&rng, 8))
                mp_journal_flush(&j);
            finish(mp_pool_take(&pool));
        }
        if (alone)
            mp_journal_set(&j, offset, part);
        else
            mp_journal_unflushed(&j, offset, part);
        mp_journal_leave(&j, offset, part);
        writes++;
        if (one_in(&rng, 500))
            mp_journal_link_lost(&j);
    }
    mp_job *job;
    while ((job = mp_pool_wait(&pool)))
        finish(job);
    uint64_t ticket = mp_journal_empty(&j);
    while (!mp_journal_reached(&j, ticket)) {
        need((job = mp_journal_job(&j)) != NULL, "the clean stop does not end");
        mp_pool_submit(&pool, job);
        finish(mp_pool_wait(&pool));
    }
    mp_pool_stop(&pool);
    mp_journal again;
    need(mp_journal_open(&again, fd, SIZE, BLOCK, &fault) == MP_OK && !again.lost_log, "open again");
    for (uint64_t e = 0; e < EXTENTS; e++)
        need(atomic_load(&again.dirty.words[e]) == atomic_load(&j.dirty.words[e]), "the file does not hold the bits");
    mp_journal_close(&again);
    mp_journal_close(&j);
    close(fd);
    printf("%llu writes, %llu jobs\n", (unsigned long long)writes, (unsigned long long)jobs);
    return jobs > 10 ? 0 : 2;
}
