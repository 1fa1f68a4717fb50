/* loop_threads.c - csrc/loop.h: a mailbox for other threads, and call-backs that add, change and remove sources all the time.
 *
 * Use: loop_threads SEED ROUNDS. Descriptor numbers are used again at once, so that an event fetched for a source that is gone
 * would reach the wrong one: each source checks that it is alive and that its descriptor really is ready.
 */
#define _GNU_SOURCE
#include "fakedisk.h"
#include "loop.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define SOURCES 40u
#define POSTERS 3u

typedef struct source {
    int fd, far;
    bool alive;
    unsigned events;
    uint64_t called;
} source;

static mp_loop loop;
static source sources[SOURCES];
static uint64_t rng, calls, limit, made, removed_ready, ticks, rounds;
static int mailbox;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t posted, taken; /* under the lock */

static void need(bool holds, const char *what)
{
    if (!holds) {
        printf("%s (%s)\n", what, strerror(errno));
        exit(1);
    }
}

static void ready(void *argument, unsigned events);

static void make(source *s)
{
    int ends[2];
    need(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0, "socketpair");
    s->fd = ends[0];
    s->far = ends[1];
    s->alive = true;
    s->events = MP_LOOP_READ;
    if (!one_in(&rng, 3)) /* one that has nothing must not get an event of the one whose number it has */
        need(write(s->far, "x", 1) == 1, "write");
    need(mp_loop_add(&loop, s->fd, s->events, ready, s), "add");
    made++;
}

static bool is_ready(const source *s, short what)
{
    struct pollfd entry = {.fd = s->fd, .events = what};
    return poll(&entry, 1, 0) == 1 && entry.revents;
}

static void unmake(source *s)
{
    removed_ready += is_ready(s, POLLIN);
    mp_loop_remove(&loop, s->fd);
    close(s->fd);
    close(s->far);
    s->alive = false;
}

static void ready(void *argument, unsigned events)
{
    source *s = argument;
    need(s->alive, "a source that was removed is called");
    need(events && !(events & ~s->events), "called for what it does not watch");
    need(!(events & MP_LOOP_READ) || is_ready(s, POLLIN), "called although nothing is there to be read");
    s->called++;
    calls++;
    uint8_t rest[64];
    switch (below(&rng, 6)) {
    case 0: /* others go, in the middle of their round */
        for (unsigned i = (unsigned)below(&rng, 8); i; i--) {
            source *other = &sources[below(&rng, SOURCES)];
            if (other->alive && other != s)
                unmake(other);
        }
        break;
    case 1: /* itself, and it comes back with the same numbers */
        unmake(s);
        make(s);
        break;
    case 2:
        unmake(s);
        break;
    case 3:
        (void)!read(s->fd, rest, sizeof rest);
        s->events = MP_LOOP_READ | MP_LOOP_WRITE;
        mp_loop_change(&loop, s->fd, s->events);
        break;
    case 4: /* not watched for a while: a hang-up must not spin; the round brings it back */
        shutdown(s->far, SHUT_RDWR);
        s->events = 0;
        mp_loop_change(&loop, s->fd, 0);
        break;
    default: /* level-triggered: it is simply called again */
        s->events = MP_LOOP_READ;
        mp_loop_change(&loop, s->fd, s->events);
        (void)!write(s->far, "x", 1);
    }
}

static void round_over(void *argument)
{
    need(argument == &rounds, "the round's argument is another one");
    rounds++;
    for (unsigned i = 0; i < SOURCES; i++) {
        source *s = &sources[i];
        if (!s->alive && one_in(&rng, 2)) {
            make(s);
        } else if (s->alive && !s->events && one_in(&rng, 4)) {
            unmake(s);
            make(s);
        } else if (s->alive && one_in(&rng, 8)) {
            (void)!send(s->far, "x", 1, MSG_NOSIGNAL | MSG_DONTWAIT); /* one that had nothing gets something */
        }
    }
}

static void tick(void *argument, uint64_t now_ns)
{
    need(argument == &ticks && now_ns >= loop.next_tick_ns - loop.tick_ns, "the tick came early");
    ticks++;
}

static void mail(void *argument, unsigned events)
{
    uint64_t count;
    need(argument == &mailbox && events == MP_LOOP_READ, "the mailbox's call is wrong");
    need(read(mailbox, &count, sizeof count) == sizeof count, "the mailbox is empty");
    pthread_mutex_lock(&lock);
    taken = posted;
    bool over = taken == POSTERS * limit;
    pthread_mutex_unlock(&lock);
    if (over && calls >= limit && ticks)
        mp_loop_stop(&loop);
    else if (over)
        need(write(mailbox, &(uint64_t){1}, 8) == 8, "write");
}

static void *post(void *argument)
{
    (void)argument;
    for (uint64_t i = 0; i < limit; i++) {
        pthread_mutex_lock(&lock);
        posted++;
        pthread_mutex_unlock(&lock);
        need(write(mailbox, &(uint64_t){1}, 8) == 8, "write");
        uint64_t since = atomic_load_explicit(&loop.busy_since_ns, memory_order_relaxed);
        need(since == 0 || since <= mp_now_ns(), "busy since the future");
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t posters[POSTERS];
    rng = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    limit = argc > 2 ? strtoull(argv[2], NULL, 0) : 5000;
    need(mp_loop_init(&loop) == MP_OK, "no loop");
    mailbox = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    need(mp_loop_add(&loop, mailbox, MP_LOOP_READ, mail, &mailbox), "add");
    int file = memfd_create("file", MFD_CLOEXEC);
    need(file >= 0 && !mp_loop_add(&loop, file, MP_LOOP_READ, ready, NULL), "a file can be watched");
    close(file);
    for (unsigned i = 0; i < SOURCES; i++)
        make(&sources[i]);
    mp_loop_every(&loop, 1000000, tick, &ticks);
    loop.round = round_over;
    loop.round_argument = &rounds;
    loop.spin_ns = argc > 3 ? strtoull(argv[3], NULL, 0) : 0;
    for (unsigned i = 0; i < POSTERS; i++)
        need(pthread_create(&posters[i], NULL, post, NULL) == 0, "no thread");
    need(mp_loop_run(&loop), "epoll failed");
    for (unsigned i = 0; i < POSTERS; i++)
        pthread_join(posters[i], NULL);
    need(taken == POSTERS * limit, "mail was lost");
    for (unsigned i = 0; i < SOURCES; i++)
        if (sources[i].alive)
            unmake(&sources[i]);
    mp_loop_remove(&loop, mailbox);
    close(mailbox);
    mp_loop_close(&loop);
    printf("%llu calls, %llu rounds, %llu ticks, %llu sources, %llu removed while ready\n", (unsigned long long)calls, (unsigned long long)rounds, (unsigned long long)ticks,
           (unsigned long long)made, (unsigned long long)removed_ready);
    return removed_ready > 10 && rounds && ticks ? 0 : 2;
}
