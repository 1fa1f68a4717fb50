/* onethread.c - see onethread.h. */
#define _GNU_SOURCE
#include "onethread.h"

#include "actlog.h"
#include "mend.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SPINS 200000u /* rounds of the loop without a move of the fuzzer's: it goes round for nothing */

typedef struct fake_pool {
    mp_pool *pool;
    char *workers;
    size_t worker_size;
    unsigned threads;
} fake_pool;

static fake_pool pools[2];
static unsigned pool_count, spins;
static bool faking; /* an engine is being started, run or closed: what the fuzzer's own runtime does is left alone */
static uint64_t clock_ns;
static void (*when_idle)(void);

int __real_pthread_create(pthread_t *id, const pthread_attr_t *how, void *(*run)(void *), void *argument);
int __real_pthread_join(pthread_t id, void **result);
int __real_clock_gettime(clockid_t which, struct timespec *now);
int __real_epoll_wait(int fd, struct epoll_event *ready, int most, int timeout);
int __wrap_pthread_create(pthread_t *id, const pthread_attr_t *how, void *(*run)(void *), void *argument);
int __wrap_pthread_join(pthread_t id, void **result);
int __wrap_clock_gettime(clockid_t which, struct timespec *now);
int __wrap_epoll_wait(int fd, struct epoll_event *ready, int most, int timeout);
mp_status __wrap_mp_pool_start(mp_pool *pool, unsigned threads, void *workers, size_t worker_size);
void __wrap_mp_pool_stop(mp_pool *pool);
void __wrap_mp_pool_submit(mp_pool *pool, mp_job *job);
mp_job *__wrap_mp_pool_take(mp_pool *pool);

/* --- threads, time and sleep --- */

int __wrap_pthread_create(pthread_t *id, const pthread_attr_t *how, void *(*run)(void *), void *argument)
{
    return faking ? 0 : __real_pthread_create(id, how, run, argument);
}

int __wrap_pthread_join(pthread_t id, void **result) { return faking ? 0 : __real_pthread_join(id, result); }

int __wrap_clock_gettime(clockid_t which, struct timespec *now)
{
    if (!faking || (which != CLOCK_MONOTONIC && which != CLOCK_BOOTTIME))
        return __real_clock_gettime(which, now);
    *now = (struct timespec){(time_t)(clock_ns / 1000000000u), (long)(clock_ns % 1000000000u)};
    return 0;
}

int __wrap_epoll_wait(int fd, struct epoll_event *ready, int most, int timeout)
{
    for (;;) {
        int count = __real_epoll_wait(fd, ready, most, 0);
        FUZZ_NEED(++spins < SPINS);
        if (count || !timeout)
            return count;
        spins = 0;
        when_idle();
        if (timeout > 0)
            return __real_epoll_wait(fd, ready, most, 0); /* the clock may have reached the tick */
    }
}

void one_pass(uint64_t ns) { clock_ns += ns; }

/* --- pools --- */

static void put(mp_queue *queue, mp_job *job)
{
    job->next = NULL;
    *queue->last = job;
    queue->last = &job->next;
}

mp_status __wrap_mp_pool_start(mp_pool *pool, unsigned threads, void *workers, size_t worker_size)
{
    FUZZ_NEED(pool_count < 2);
    memset(pool, 0, sizeof *pool);
    pool->jobs.last = &pool->jobs.first;
    pool->done.last = &pool->done.first;
    pool->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pools[pool_count++] = (fake_pool){pool, workers, worker_size, threads};
    return MP_OK;
}

void __wrap_mp_pool_stop(mp_pool *pool)
{
    close(pool->event_fd);
    pool_count--;
}

void __wrap_mp_pool_submit(mp_pool *pool, mp_job *job)
{
    put(&pool->jobs, job);
    pool->pending++;
}

mp_job *__wrap_mp_pool_take(mp_pool *pool)
{
    mp_job *job = pool->done.first;
    uint64_t count;
    if (!job) {
        (void)!read(pool->event_fd, &count, sizeof count);
        return NULL;
    }
    if (!(pool->done.first = job->next))
        pool->done.last = &pool->done.first;
    pool->pending--;
    return job;
}

static unsigned runnable(const fake_pool *f)
{
    unsigned count = 0;
    for (const mp_job *job = f->pool->jobs.first; job && count < f->threads; job = job->next)
        count++;
    return count;
}

unsigned one_jobs(void)
{
    unsigned count = 0;
    for (unsigned i = 0; i < pool_count; i++)
        count += runnable(&pools[i]);
    return count;
}

void one_job(unsigned which)
{
    for (unsigned i = 0; i < pool_count; which -= runnable(&pools[i++])) {
        if (which >= runnable(&pools[i]))
            continue;
        mp_queue *queue = &pools[i].pool->jobs;
        mp_job **at = &queue->first, *job;
        for (unsigned k = which % pools[i].threads; k; k--)
            at = &(*at)->next;
        job = *at;
        if (!(*at = job->next))
            queue->last = at;
        job->run(job, pools[i].workers + which % pools[i].threads * pools[i].worker_size);
        put(&pools[i].pool->done, job);
        FUZZ_NEED(write(pools[i].pool->event_fd, &(uint64_t){1}, 8) == 8);
        return;
    }
}

/* --- the node --- */

static int file_of(uint64_t size)
{
    int fd = memfd_create("volume", MFD_CLOEXEC);
    FUZZ_NEED(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

void one_open(one_node *n, const uint64_t *sizes, const uint32_t *blocks, uint8_t fill)
{
    mp_engine_volume given[ONE_VOLUMES];
    mp_fault fault;
    uint8_t record[MP_ACTLOG_RECORD];
    memset(n, 0, sizeof *n);
    faking = true;
    clock_ns = (uint64_t)1000 * 1000000000;
    spins = pool_count = 0;
    mp_actlog_begin(record);
    mp_actlog_seal(record, 0);
    for (unsigned v = 0; v < ONE_VOLUMES; v++) {
        uint64_t bytes = mp_ceil_div(mp_ceil_div(sizes[v], blocks[v]), 64) * 8;
        n->size[v] = sizes[v];
        n->block[v] = blocks[v];
        n->image[v] = file_of(sizes[v]);
        n->meta[v] = file_of(MP_JOURNAL_BITMAP + mp_ceil_div(bytes, MP_JOURNAL_PAGE) * MP_JOURNAL_PAGE);
        FUZZ_NEED(pwrite(n->meta[v], record, sizeof record, (off_t)MP_JOURNAL_LOG) == sizeof record);
        uint8_t *content = malloc(sizes[v]);
        memset(content, fill, sizes[v]);
        FUZZ_NEED(content && pwrite(n->image[v], content, sizes[v], 0) == (ssize_t)sizes[v]);
        free(content);
        given[v] = (mp_engine_volume){n->image[v], n->meta[v], sizes[v], blocks[v]};
    }
    n->engine = mp_engine_open(given, ONE_VOLUMES, &fault);
    FUZZ_NEED(n->engine && mp_engine_start(n->engine) == 0);
    faking = false;
}

void one_run(one_node *n, void (*idle)(void))
{
    when_idle = idle;
    faking = true;
    FUZZ_NEED(mp_loop_run(&n->engine->loop));
    faking = false;
}

void one_stop(one_node *n) { mp_engine_post(n->engine, one_command(MP_COMMAND_STOP)); }

bool one_rests(const one_node *n)
{
    const mp_engine *e = n->engine;
    bool rests = !e->requests_busy && !e->held_first && !e->local.first && !e->barrier.running && !e->mail && !e->attach && !one_jobs() && !e->pool.pending && !e->mend_pool.pending;
    for (unsigned v = 0; v < ONE_VOLUMES; v++)
        rests = rests && !e->volume[v].waiting.first && !e->volume[v].mend->jobs;
    return rests;
}

void one_close(one_node *n)
{
    const mp_engine *e = n->engine;
    faking = true;
    if (one_rests(n) && !e->link.up) { /* then nothing is held by anybody */
        FUZZ_NEED(!e->slab.used[0] && !e->slab.used[1] && !e->slab.used[2]);
        for (unsigned v = 0; v < ONE_VOLUMES; v++) {
            FUZZ_NEED(!e->volume[v].flight.count && !e->volume[v].reading.count && !e->volume[v].mend->open_units);
            for (const mp_hot_node *h = e->volume[v].journal.hot->nodes; h < e->volume[v].journal.hot->nodes + MP_HOT_NODES; h++)
                FUZZ_NEED(!h->in_flight);
        }
    }
    mp_engine_close(n->engine);
    for (unsigned v = 0; v < ONE_VOLUMES; v++) {
        close(n->image[v]);
        close(n->meta[v]);
    }
    faking = false;
}

mp_command *one_command(mp_command_kind kind)
{
    mp_command *made = mp_command_new(kind, 0);
    FUZZ_NEED(made);
    return made;
}

void one_grant(one_node *n, mp_grant_mode mode)
{
    mp_command *c = one_command(MP_COMMAND_GRANT);
    c->grant = (mp_grant){1, INT64_MAX, mode, mode == MP_GRANT_PEER ? MP_COVER_READS | MP_COVER_HOLD : 0};
    mp_engine_post(n->engine, c);
}

int one_client(one_node *n, unsigned volume, bool read_only)
{
    int ends[2];
    mp_command *c = one_command(MP_COMMAND_CLIENT);
    FUZZ_NEED(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    c->fd = ends[1];
    c->volume = volume;
    c->flag = read_only;
    mp_engine_post(n->engine, c);
    return ends[0];
}

void one_events(one_node *n)
{
    for (mp_event *e; (e = mp_engine_take(n->engine)); free(e))
        switch (e->kind) {
        case MP_EVENT_LINK_LOST:
            n->lost = e->a;
            memcpy(n->why, e->text, sizeof n->why);
            break;
        case MP_EVENT_NEED_GENERATION: n->need = true; break;
        case MP_EVENT_BITS_MERGED: n->merged |= 1u << e->a; break;
        case MP_EVENT_RESYNC_DONE: n->mended |= 1u << e->a; break;
        case MP_EVENT_CLIENT:
            n->came += strcmp(e->text, "came") == 0;
            n->clients += strcmp(e->text, "came") == 0 ? 1u : 0u;
            n->clients -= strcmp(e->text, "came") == 0 ? 0u : 1u;
            break;
        case MP_EVENT_FLUSHED:
            n->flushed = e->a;
            n->flushed_error = e->b;
            break;
        case MP_EVENT_CLIENTS_CLOSED:
        case MP_EVENT_CLIENTS_QUIET:
        case MP_EVENT_SAVED: break;
        case MP_EVENT_DISK_ERROR:
        case MP_EVENT_JOURNAL_ERROR: FUZZ_NEED(!"a disk failed"); break;
        }
}

void one_read(one_node *n, unsigned volume, uint8_t *to)
{
    FUZZ_NEED(pread(n->image[volume], to, n->size[volume], 0) == (ssize_t)n->size[volume]);
}
