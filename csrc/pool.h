/* pool.h - worker threads and two queues: jobs in, finished jobs out.
 *
 * Contract: submit and take are called by one owner thread; jobs run on any worker, in the order submitted, several at a
 * time; a finished job comes back through mp_pool_take exactly once. The owner either blocks in mp_pool_wait or, with an
 * event loop, watches mp_pool_fd() (an eventfd that is readable while finished jobs wait).
 */
#ifndef MP_POOL_H
#define MP_POOL_H

#include "base.h"

#include <pthread.h>

typedef struct mp_job {
    void (*run)(struct mp_job *job, void *worker); /* worker: this thread's own state, as given to mp_pool_start */
    struct mp_job *next;
} mp_job;

typedef struct mp_queue {
    mp_job *first, **last;
} mp_queue;

typedef struct mp_pool {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    mp_queue jobs, done;
    bool stopping;
    int event_fd;
    unsigned threads, idle; /* idle: asleep, waiting for work */
    bool waiting; /* the owner sleeps in mp_pool_wait */
    uint64_t pending; /* submitted and not yet taken back; owner thread only */
    struct mp_pool_thread *thread;
} mp_pool;

/* Starts up to `threads` workers (at least one, or an error); worker i gets workers + i * worker_size. */
mp_status mp_pool_start(mp_pool *pool, unsigned threads, void *workers, size_t worker_size);
/* Lets running jobs finish, drops those not begun, joins the threads. */
void mp_pool_stop(mp_pool *pool);
void mp_pool_submit(mp_pool *pool, mp_job *job);
mp_job *mp_pool_take(mp_pool *pool); /* a finished job or NULL */
mp_job *mp_pool_wait(mp_pool *pool); /* a finished job; NULL if none is pending */
int mp_pool_fd(const mp_pool *pool);
/* For how long the oldest of the running jobs has run, 0: none runs. Any thread, between start and stop. */
uint64_t mp_pool_oldest_ns(const mp_pool *pool, uint64_t now_ns);

#endif
