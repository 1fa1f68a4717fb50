/* loop.c - see loop.h. Level-triggered: a call-back that leaves bytes behind is simply called again. */
#define _GNU_SOURCE
#include "loop.h"

#include <errno.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

uint64_t mp_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

mp_status mp_loop_init(mp_loop *loop)
{
    memset(loop, 0, sizeof *loop);
    for (int i = 0; i < MP_LOOP_SOURCES; i++)
        loop->source[i].fd = -1;
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    return loop->epoll_fd < 0 ? MP_INTERNAL : MP_OK;
}

void mp_loop_close(mp_loop *loop)
{
    if (loop->epoll_fd >= 0)
        close(loop->epoll_fd);
    loop->epoll_fd = -1;
}

static uint32_t epoll_events(unsigned events)
{
    return (events & MP_LOOP_READ ? EPOLLIN : 0u) | (events & MP_LOOP_WRITE ? EPOLLOUT : 0u);
}

bool mp_loop_add(mp_loop *loop, int fd, unsigned events, mp_loop_ready ready, void *argument)
{
    for (int i = 0; i < MP_LOOP_SOURCES; i++) {
        if (loop->source[i].fd >= 0)
            continue;
        struct epoll_event event = {.events = epoll_events(events), .data.u32 = (uint32_t)i};
        if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
            return false;
        loop->source[i] = (struct mp_loop_source){fd, events, ready, argument};
        return true;
    }
    return false;
}

void mp_loop_change(mp_loop *loop, int fd, unsigned events)
{
    for (int i = 0; i < MP_LOOP_SOURCES; i++) {
        struct mp_loop_source *source = &loop->source[i];
        if (source->fd != fd || source->events == events)
            continue;
        /* A source nobody wants is taken out: epoll reports a hang-up even with an empty event set, and would spin. */
        int operation = !events ? EPOLL_CTL_DEL : source->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
        struct epoll_event event = {.events = epoll_events(events), .data.u32 = (uint32_t)i};
        MP_ASSERT(epoll_ctl(loop->epoll_fd, operation, fd, &event) == 0);
        source->events = events;
    }
}

void mp_loop_every(mp_loop *loop, uint64_t period_ns, void (*tick)(void *, uint64_t), void *argument)
{
    loop->tick_ns = period_ns;
    loop->next_tick_ns = mp_now_ns() + period_ns;
    loop->tick = tick;
    loop->tick_argument = argument;
}

bool mp_loop_run(mp_loop *loop)
{
    while (!loop->stopped) {
        int timeout = -1;
        if (loop->tick) {
            uint64_t now = mp_now_ns();
            timeout = now >= loop->next_tick_ns ? 0 : (int)((loop->next_tick_ns - now + 999999u) / 1000000u);
        }
        struct epoll_event ready[MP_LOOP_SOURCES];
        int count = epoll_wait(loop->epoll_fd, ready, MP_LOOP_SOURCES, timeout);
        if (count < 0 && errno != EINTR)
            return false;
        for (int i = 0; i < count && !loop->stopped; i++) {
            struct mp_loop_source *source = &loop->source[ready[i].data.u32];
            unsigned events = 0;
            if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP))
                events |= MP_LOOP_READ;
            if (ready[i].events & (EPOLLOUT | EPOLLERR))
                events |= MP_LOOP_WRITE;
            events &= source->events | (ready[i].events & EPOLLERR ? MP_LOOP_READ | MP_LOOP_WRITE : 0u);
            if (events)
                source->ready(source->argument, events);
            else /* hung up while only writing is wanted: the write will report it */
                source->ready(source->argument, source->events);
        }
        if (loop->tick && !loop->stopped) {
            uint64_t now = mp_now_ns();
            if (now >= loop->next_tick_ns) {
                loop->next_tick_ns = now + loop->tick_ns;
                loop->tick(loop->tick_argument, now);
            }
        }
    }
    return true;
}

void mp_loop_stop(mp_loop *loop) { loop->stopped = true; }
