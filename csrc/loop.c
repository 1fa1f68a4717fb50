/* loop.c - see loop.h. Level-triggered: a call-back that leaves bytes behind is simply called again. */
#define _GNU_SOURCE
#include "loop.h"

#include <errno.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 64 /* fetched by one call */

uint64_t mp_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

mp_status mp_loop_init(mp_loop *loop)
{
    memset(loop, 0, sizeof *loop);
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    return loop->epoll_fd < 0 ? MP_INTERNAL : MP_OK;
}

void mp_loop_close(mp_loop *loop)
{
    if (loop->epoll_fd >= 0)
        close(loop->epoll_fd);
    loop->epoll_fd = -1;
    free(loop->source);
    loop->source = NULL;
    loop->places = 0;
}

static uint32_t epoll_events(unsigned events)
{
    return (events & MP_LOOP_READ ? EPOLLIN : 0u) | (events & MP_LOOP_WRITE ? EPOLLOUT : 0u);
}

static uint64_t key(const mp_loop *loop, int fd) { return (uint64_t)loop->source[fd].generation << 32 | (uint32_t)fd; }

bool mp_loop_add(mp_loop *loop, int fd, unsigned events, mp_loop_ready ready, void *argument)
{
    MP_ASSERT(fd >= 0);
    if ((unsigned)fd >= loop->places) {
        unsigned places = (unsigned)fd + 64;
        mp_loop_source *more = realloc(loop->source, places * sizeof *more);
        if (!more)
            return false;
        memset(more + loop->places, 0, (places - loop->places) * sizeof *more);
        loop->source = more;
        loop->places = places;
    }
    mp_loop_source *source = &loop->source[fd];
    MP_ASSERT(!source->ready);
    source->generation = ++loop->generation;
    struct epoll_event event = {.events = epoll_events(events), .data.u64 = key(loop, fd)};
    if (events && epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        return false;
    source->events = events;
    source->ready = ready;
    source->argument = argument;
    return true;
}

void mp_loop_change(mp_loop *loop, int fd, unsigned events)
{
    mp_loop_source *source = &loop->source[fd];
    MP_ASSERT(fd >= 0 && (unsigned)fd < loop->places && source->ready);
    if (source->events == events)
        return;
    /* A source nobody wants is taken out: epoll reports a hang-up even with an empty event set, and would spin. */
    int operation = !events ? EPOLL_CTL_DEL : source->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    struct epoll_event event = {.events = epoll_events(events), .data.u64 = key(loop, fd)};
    MP_ASSERT(epoll_ctl(loop->epoll_fd, operation, fd, &event) == 0);
    source->events = events;
}

void mp_loop_remove(mp_loop *loop, int fd)
{
    mp_loop_change(loop, fd, 0);
    loop->source[fd].ready = NULL;
}

void mp_loop_every(mp_loop *loop, uint64_t period_ns, void (*tick)(void *, uint64_t), void *argument)
{
    loop->tick_ns = period_ns;
    loop->next_tick_ns = mp_now_ns() + period_ns;
    loop->tick = tick;
    loop->tick_argument = argument;
}

static void dispatch(mp_loop *loop, const struct epoll_event *ready)
{
    unsigned fd = (unsigned)(ready->data.u64 & 0xffffffffu);
    mp_loop_source *source = &loop->source[fd];
    if (!source->ready || source->generation != ready->data.u64 >> 32)
        return; /* removed by a call-back of the same round */
    unsigned events = 0;
    if (ready->events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP))
        events |= MP_LOOP_READ;
    if (ready->events & (EPOLLOUT | EPOLLERR))
        events |= MP_LOOP_WRITE;
    events &= source->events | (ready->events & EPOLLERR ? MP_LOOP_READ | MP_LOOP_WRITE : 0u);
    if (!events) /* hung up while only writing is wanted: the write will report it */
        events = source->events;
    if (events)
        source->ready(source->argument, events);
}

static int sleep_ms(const mp_loop *loop)
{
    if (!loop->tick)
        return -1;
    uint64_t now = mp_now_ns();
    return now >= loop->next_tick_ns ? 0 : (int)((loop->next_tick_ns - now + 999999u) / 1000000u);
}

bool mp_loop_run(mp_loop *loop)
{
    struct epoll_event ready[EVENTS];
    uint64_t worked_ns = 0;
    while (!loop->stopped) {
        bool spinning = loop->spin_ns && worked_ns && mp_now_ns() - worked_ns < loop->spin_ns;
        atomic_store_explicit(&loop->busy_since_ns, 0, memory_order_relaxed);
        int count = epoll_wait(loop->epoll_fd, ready, EVENTS, spinning || loop->again ? 0 : sleep_ms(loop));
        loop->again = false;
        if (count < 0 && errno != EINTR)
            return false;
        atomic_store_explicit(&loop->busy_since_ns, mp_now_ns(), memory_order_relaxed);
        for (int i = 0; i < count && !loop->stopped; i++)
            dispatch(loop, &ready[i]);
        if (count > 0 && loop->spin_ns)
            worked_ns = mp_now_ns();
        if (loop->tick && !loop->stopped) {
            uint64_t now = mp_now_ns();
            if (now >= loop->next_tick_ns) {
                loop->next_tick_ns = now + loop->tick_ns;
                loop->tick(loop->tick_argument, now);
            }
        }
        if (loop->round && !loop->stopped)
            loop->round(loop->round_argument);
    }
    return true;
}

void mp_loop_stop(mp_loop *loop) { loop->stopped = true; }
