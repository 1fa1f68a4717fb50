/* journal_hand.h - a journal on a fake disk, and what its checks do by hand: journal_rules.c, journal_damage.c.
 *
 * Use of the programs: NAME runs one check, `list` names them all. A check that does not hold says where, exit code 1. They
 * are linked with -Wl,--wrap=malloc,--wrap=calloc besides what fakedisk.h wants.
 */
#ifndef JOURNAL_HAND_H
#define JOURNAL_HAND_H

#include "actlog.h"
#include "fakedisk.h"
#include "journal.h"

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

static inline uint64_t file_length(void) { return MP_JOURNAL_BITMAP + mp_ceil_div(mp_ceil_div(size, block), 64 * MP_JOURNAL_PAGE_EXTENTS) * MP_JOURNAL_PAGE; }

static inline void init(void)
{
    disk = fake_of(fake_fd(0));
    fake_make(disk, file_length());
    mp_actlog_begin(disk->now + MP_JOURNAL_LOG);
    mp_actlog_seal(disk->now + MP_JOURNAL_LOG, 0);
    memcpy(disk->durable, disk->now, disk->size);
}

static inline void open_it(void)
{
    mp_fault fault;
    HOLDS(mp_journal_open(&j, fake_fd(0), size, block, &fault) == MP_OK);
}

static inline void start(void) { init(); open_it(); }

static inline void cut(fake_cut how)
{
    static fake_disk copy;
    mp_journal_close(&j);
    fake_crash(&copy, disk, how, &rng);
    fake_crash(disk, &copy, FAKE_KILLED, &rng);
    fake_free(&copy);
    open_it();
}

static inline int work(void) /* one job; -1: there was none */
{
    mp_job *job = mp_journal_job(&j);
    if (!job)
        return -1;
    job->run(job, NULL);
    return mp_journal_finished(&j, job);
}

static inline void enter(uint64_t offset, uint64_t length)
{
    for (int tries = 0; !mp_journal_enter(&j, offset, length); tries++) {
        HOLDS(tries < 100);
        HOLDS(work() == 0);
    }
}

static inline void write_connected(uint64_t offset, uint64_t length)
{
    enter(offset, length);
    mp_journal_unflushed(&j, offset, length);
    mp_journal_leave(&j, offset, length);
}

static inline void write_alone(uint64_t offset, uint64_t length)
{
    enter(offset, length);
    mp_journal_set(&j, offset, length);
    mp_journal_leave(&j, offset, length);
}

static inline void barrier(bool ok)
{
    mp_journal_barrier_begin(&j);
    mp_journal_barrier_end(&j, ok);
}

static inline uint64_t dirty(void) { return mp_bitmap_count(&j.dirty); }
static inline bool is_dirty(uint64_t offset) { return mp_bitmap_test(&j.dirty, offset / block); }
static inline uint8_t *record(unsigned k) { return disk->now + MP_JOURNAL_LOG + k * MP_ACTLOG_RECORD; }
static inline void damage(unsigned k) { record(k)[100] ^= 1; memcpy(disk->durable, disk->now, disk->size); }

static inline void fill(void (*write)(uint64_t, uint64_t))
{
    for (uint64_t e = 0; e < MP_JOURNAL_EXTENTS; e++)
        write(e * EXTENT, 1);
    HOLDS(mp_journal_active(&j) == MP_JOURNAL_EXTENTS);
}

typedef struct check {
    const char *name;
    void (*run)(void); /* leaves the journal open */
} check;

#define CHECK(name) {#name, name}

static inline int run_checks(const check *checks, unsigned count, const char *name)
{
    bool found = !strcmp(name, "list");
    for (unsigned i = 0; i < count; i++) {
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

#endif
