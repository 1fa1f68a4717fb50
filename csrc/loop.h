/* loop.h - the event loop: epoll and one periodic timer. Other threads reach it through an eventfd it watches.
 *
 * Contract: one thread runs a loop and calls everything here. Call-backs may add and change sources, their own included.
 * Times are CLOCK_MONOTONIC nanoseconds. What a call-back does must be short: long work goes to the pool (pool.h).
 */
#ifndef MP_LOOP_H
#define MP_LOOP_H

#include "base.h"

#define MP_LOOP_SOURCES 8
#define MP_LOOP_READ 1u
#define MP_LOOP_WRITE 2u

typedef void (*mp_loop_ready)(void *argument, unsigned events);

typedef struct mp_loop {
    int epoll_fd;
    bool stopped;
    struct mp_loop_source {
        int fd;
        unsigned events;
        mp_loop_ready ready;
        void *argument;
    } source[MP_LOOP_SOURCES];
    uint64_t tick_ns, next_tick_ns; /* the one periodic timer */
    void (*tick)(void *argument, uint64_t now_ns);
    void *tick_argument;
} mp_loop;

uint64_t mp_now_ns(void);

mp_status mp_loop_init(mp_loop *loop);
void mp_loop_close(mp_loop *loop);
/* Watches fd. False if the kernel refuses it (a regular file cannot be watched) or all places are taken. */
bool mp_loop_add(mp_loop *loop, int fd, unsigned events, mp_loop_ready ready, void *argument);
void mp_loop_change(mp_loop *loop, int fd, unsigned events); /* events 0: keep it, but do not watch */
void mp_loop_every(mp_loop *loop, uint64_t period_ns, void (*tick)(void *, uint64_t), void *argument);
/* Runs until mp_loop_stop. False if epoll itself failed. */
bool mp_loop_run(mp_loop *loop);
void mp_loop_stop(mp_loop *loop);

#endif
