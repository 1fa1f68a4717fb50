/* pool.c - see pool.h. A mutex and two condition variables: a job here is about a millisecond, a hand-over under 60 us.
 * Nobody is woken who does not sleep, and never with the lock held: he would only run into it. */
#define _GNU_SOURCE
#include "pool.h"

#include <signal.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

typedef struct mp_pool_thread {
    pthread_t id;
    mp_pool *pool;
    void *worker;
    _Atomic uint64_t since_ns; /* when its job began; 0: it has none */
} mp_pool_thread;

/* mp_now_ns of loop.h: the pool stands below it. */
static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void put(mp_queue *queue, mp_job *job)
{
    job->next = NULL;
    *queue->last = job;
    queue->last = &job->next;
}

static mp_job *get(mp_queue *queue)
{
    mp_job *job = queue->first;
    if (job && !(queue->first = job->next))
        queue->last = &queue->first;
    return job;
}

static void *work(void *argument)
{
    mp_pool_thread *self = argument;
    mp_pool *pool = self->pool;
    pthread_mutex_lock(&pool->lock);
    while (!pool->stopping) {
        mp_job *job = get(&pool->jobs);
        if (!job) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        atomic_store_explicit(&self->since_ns, now(), memory_order_relaxed);
        job->run(job, self->worker);
        atomic_store_explicit(&self->since_ns, 0, memory_order_relaxed);
        pthread_mutex_lock(&pool->lock);
        bool first = !pool->done.first, waited = first && pool->waiting;
        put(&pool->done, job);
        if (!first)
            continue;
        pthread_mutex_unlock(&pool->lock);
        if (waited)
            pthread_cond_signal(&pool->finished);
        uint64_t one = 1;
        MP_ASSERT(write(pool->event_fd, &one, sizeof one) == sizeof one);
        pthread_mutex_lock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

mp_status mp_pool_start(mp_pool *pool, unsigned threads, void *workers, size_t worker_size)
{
    memset(pool, 0, sizeof *pool);
    pool->jobs.last = &pool->jobs.first;
    pool->done.last = &pool->done.first;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    pool->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pool->thread = calloc(threads, sizeof *pool->thread);
    if (pool->event_fd < 0 || !pool->thread)
        return MP_INTERNAL;
    for (unsigned i = 0; i < threads; i++) {
        mp_pool_thread *thread = &pool->thread[pool->threads];
        thread->pool = pool;
        thread->worker = (char *)workers + i * worker_size;
        if (pthread_create(&thread->id, NULL, work, thread))
            break;
        pool->threads++;
    }
    return pool->threads ? MP_OK : MP_INTERNAL;
}

void mp_pool_stop(mp_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < pool->threads; i++)
        pthread_join(pool->thread[i].id, NULL);
    free(pool->thread);
    pool->thread = NULL;
    pool->threads = 0;
    if (pool->event_fd >= 0)
        close(pool->event_fd);
    pool->event_fd = -1;
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->finished);
    pthread_mutex_destroy(&pool->lock);
}

void mp_pool_submit(mp_pool *pool, mp_job *job)
{
    pthread_mutex_lock(&pool->lock);
    put(&pool->jobs, job);
    bool wake = pool->idle;
    pthread_mutex_unlock(&pool->lock);
    if (wake)
        pthread_cond_signal(&pool->work);
    pool->pending++;
}

mp_job *mp_pool_take(mp_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    mp_job *job = get(&pool->done);
    if (!job) {
        uint64_t count;
        (void)!read(pool->event_fd, &count, sizeof count); /* drained under the lock: no wake-up is lost */
    }
    pthread_mutex_unlock(&pool->lock);
    pool->pending -= job != NULL;
    return job;
}

mp_job *mp_pool_wait(mp_pool *pool)
{
    if (!pool->pending)
        return NULL;
    pthread_mutex_lock(&pool->lock);
    while (!pool->done.first) {
        pool->waiting = true;
        pthread_cond_wait(&pool->finished, &pool->lock);
    }
    pool->waiting = false;
    mp_job *job = get(&pool->done);
    pthread_mutex_unlock(&pool->lock);
    pool->pending--;
    return job;
}

int mp_pool_fd(const mp_pool *pool) { return pool->event_fd; }

uint64_t mp_pool_oldest_ns(const mp_pool *pool, uint64_t now_ns)
{
    uint64_t oldest = 0;
    for (unsigned i = 0; i < pool->threads; i++) {
        uint64_t since = atomic_load_explicit(&pool->thread[i].since_ns, memory_order_relaxed);
        if (since && since < now_ns)
            oldest = mp_max(oldest, now_ns - since);
    }
    return oldest;
}
