/* loop.h - the event loop: epoll and one periodic timer. Other threads reach it through an eventfd it watches.
 *
 * Contract: one thread runs a loop and calls everything here. Call-backs may add, change and remove sources, their own
 * included; a removed source is not called again, also not for an event that was fetched together with this one. Its
 * descriptor must be closed after the removal, not before. Times are CLOCK_MONOTONIC nanoseconds. What a call-back does
 * must be short: long work goes to the pool (pool.h).
 */
#ifndef MP_LOOP_H
#define MP_LOOP_H

#include "base.h"

#define MP_LOOP_READ 1u
#define MP_LOOP_WRITE 2u

typedef void (*mp_loop_ready)(void *argument, unsigned events);

typedef struct mp_loop_source {
    unsigned events;
    uint32_t generation; /* tells a descriptor number that was used again from the one an event was fetched for */
    mp_loop_ready ready; /* NULL: the place is free */
    void *argument;
} mp_loop_source;

typedef struct mp_loop {
    int epoll_fd;
    bool stopped;
    bool again; /* a call-back left work behind that no descriptor tells of: look, but do not sleep */
    mp_loop_source *source; /* by descriptor number */
    unsigned places;
    uint32_t generation;
    uint64_t tick_ns, next_tick_ns; /* the one periodic timer */
    void (*tick)(void *argument, uint64_t now_ns);
    void *tick_argument;
    void (*round)(void *argument); /* after every round of call-backs, before the loop sleeps */
    void *round_argument;
    _Atomic uint64_t busy_since_ns; /* any thread may look: since when it has not been asleep, 0 = it is */
    uint64_t spin_ns; /* how long to look for work before sleeping: a wake-up across cores costs 40-70 us */
} mp_loop;

uint64_t mp_now_ns(void);

mp_status mp_loop_init(mp_loop *loop);
void mp_loop_close(mp_loop *loop);
/* Watches fd. False if the kernel refuses it (a regular file cannot be watched) or memory is short. */
bool mp_loop_add(mp_loop *loop, int fd, unsigned events, mp_loop_ready ready, void *argument);
void mp_loop_change(mp_loop *loop, int fd, unsigned events); /* events 0: keep it, but do not watch */
void mp_loop_remove(mp_loop *loop, int fd);
void mp_loop_every(mp_loop *loop, uint64_t period_ns, void (*tick)(void *, uint64_t), void *argument);
/* Runs until mp_loop_stop. False if epoll itself failed. */
bool mp_loop_run(mp_loop *loop);
void mp_loop_stop(mp_loop *loop);

#endif
