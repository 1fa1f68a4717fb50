/* pool_threads.c - csrc/pool.h: jobs go out and come back exactly once, through the eventfd and through the blocking wait.
 *
 * Use: pool_threads SEED JOBS. A job writes to its own memory and to its worker's, without any lock: the hand-over alone must
 * order that, which is what the thread sanitizer checks.
 */
#define _GNU_SOURCE
#include "fakedisk.h"
#include "pool.h"

#include <poll.h>

#define ROOM 256u

typedef struct worker {
    uint64_t ran;
} worker;

typedef struct task {
    mp_job job; /* first */
    uint64_t number, result, turns;
    bool out;
} task;

static task tasks[ROOM];
static worker workers[8];
static uint64_t next_in_order; /* with one worker */

static void need(bool holds, const char *what)
{
    if (!holds) {
        printf("%s\n", what);
        exit(1);
    }
}

static void run(mp_job *job, void *argument)
{
    task *t = (task *)job;
    worker *w = argument;
    w->ran++;
    for (uint64_t i = 0; i < t->turns; i++)
        t->result = t->result * 31 + i;
    t->result += t->number;
}

static void run_in_order(mp_job *job, void *argument)
{
    need(((task *)job)->number == next_in_order++, "jobs of one worker run in another order");
    run(job, argument);
}

static uint64_t expected(const task *t)
{
    uint64_t result = 0;
    for (uint64_t i = 0; i < t->turns; i++)
        result = result * 31 + i;
    return result + t->number;
}

static void came_back(mp_job *job, uint64_t *back)
{
    task *t = (task *)job;
    need(t->out, "a job came back twice");
    need(t->result == expected(t), "a job came back before it was done");
    t->out = false;
    ++*back;
}

static void play(uint64_t *rng, uint64_t jobs, unsigned threads)
{
    mp_pool pool;
    uint64_t sent = 0, back = 0, ran = 0;
    memset(workers, 0, sizeof workers);
    memset(tasks, 0, sizeof tasks);
    next_in_order = 0;
    need(mp_pool_start(&pool, threads, workers, sizeof *workers) == MP_OK, "no threads");
    need(mp_pool_wait(&pool) == NULL && mp_pool_take(&pool) == NULL, "a job out of nothing");
    while (back < jobs) {
        for (uint64_t burst = below(rng, ROOM); burst && sent < jobs && sent - back < ROOM; burst--) {
            task *t = &tasks[below(rng, ROOM)];
            while (t->out)
                t = &tasks[(size_t)(t - tasks + 1) % ROOM];
            *t = (task){.job.run = threads == 1 ? run_in_order : run, .number = sent++, .turns = below(rng, 64), .out = true};
            mp_pool_submit(&pool, &t->job);
        }
        need(pool.pending == sent - back, "the count of pending jobs is wrong");
        mp_job *job;
        if (one_in(rng, 2)) {
            if ((job = mp_pool_wait(&pool)))
                came_back(job, &back);
            continue;
        }
        struct pollfd ready = {.fd = mp_pool_fd(&pool), .events = POLLIN};
        if (sent != back)
            need(poll(&ready, 1, 60000) == 1, "the eventfd does not tell of a finished job"); /* a lost wake-up would hang here */
        while ((job = mp_pool_take(&pool)))
            came_back(job, &back);
    }
    for (unsigned i = 0; i < ROOM && i < jobs; i++) { /* stopped with jobs in the queue: each has run once or never */
        tasks[i] = (task){.job.run = run, .number = i, .turns = 50, .out = true};
        mp_pool_submit(&pool, &tasks[i].job);
    }
    mp_pool_stop(&pool);
    for (unsigned i = 0; i < ROOM; i++) {
        need(!tasks[i].out || tasks[i].result == 0 || tasks[i].result == expected(&tasks[i]), "stopped in the middle of a job");
        ran += tasks[i].out && tasks[i].result != 0;
    }
    for (unsigned i = 0; i < 8; i++)
        back -= workers[i].ran;
    need(back + ran == 0, "a job ran twice");
}

int main(int argc, char **argv)
{
    uint64_t rng = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, jobs = argc > 2 ? strtoull(argv[2], NULL, 0) : 20000;
    play(&rng, jobs, 4);
    play(&rng, jobs / 4 + 1, 1);
    printf("%llu jobs\n", (unsigned long long)jobs);
    return 0;
}
