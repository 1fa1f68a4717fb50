/* player.c - see player.h. */
#define _GNU_SOURCE
#include "player.h"

#include "fakedisk.h"
#include "nbd.h"

#include <errno.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define PATIENCE_S 120 /* for a byte from an engine; under a sanitizer, on a busy machine */
#define LENGTH_MAX (300u << 10)
#define READ_ALL (1u << 20)

player_stage stage = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
    _exit(1);
}

static void tell(void)
{
    uint64_t one = 1;
    if (write(stage.progress_fd, &one, sizeof one) != sizeof one)
        die("eventfd: %s", strerror(errno));
}

/* --- bytes --- */

/* False: the connection is over. */
static bool receive(const player *p, void *to, uint64_t length)
{
    uint8_t *at = to;
    while (length) {
        ssize_t got = recv(p->fd, at, length, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            die("player %u: no answer for %d s", p->number, PATIENCE_S);
        if (got <= 0)
            return false;
        at += got;
        length -= (uint64_t)got;
    }
    return true;
}

static bool transmit(const player *p, const void *from, uint64_t length)
{
    const uint8_t *at = from;
    while (length) {
        ssize_t put = send(p->fd, at, length, MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            die("player %u: nothing is taken for %d s", p->number, PATIENCE_S);
        if (put <= 0)
            return false;
        at += put;
        length -= (uint64_t)put;
    }
    return true;
}

static void big(uint8_t *at, unsigned bytes, uint64_t value)
{
    while (bytes--) {
        at[bytes] = (uint8_t)value;
        value >>= 8;
    }
}

static void fill(player *p, uint8_t *at, uint64_t length)
{
    uint64_t word = next_random(&p->random);
    for (uint64_t i = 0; i < length; i++)
        at[i] = (uint8_t)(word >> (i % 8 * 8)) ^ (uint8_t)(i >> 8);
}

/* --- requests --- */

static bool ask(player *p, unsigned slot, uint16_t kind, uint16_t flags, uint64_t offset, uint64_t length)
{
    player_flight *f = &p->flight[slot];
    uint8_t header[MP_NBD_REQUEST];
    bool ranged = kind != MP_NBD_FLUSH;
    big(header, 4, 0x25609513u);
    big(header + 4, 2, flags);
    big(header + 6, 2, kind);
    big(header + 8, 8, ++p->cookie << 8 | slot);
    big(header + 16, 8, ranged ? p->base + offset : 0);
    big(header + 24, 4, ranged ? length : 0);
    *f = (player_flight){.busy = true, .kind = kind, .offset = offset, .length = length};
    if (kind == MP_NBD_READ) {
        f->expected = malloc(length);
        memcpy(f->expected, p->model + offset, length);
    } else if (kind == MP_NBD_WRITE) {
        fill(p, p->model + offset, length);
    } else if (ranged) {
        memset(p->model + offset, 0, length);
    }
    return transmit(p, header, sizeof header) && (kind != MP_NBD_WRITE || transmit(p, p->model + offset, length));
}

static bool ask_something(player *p, unsigned slot)
{
    static const uint16_t kinds[] = {MP_NBD_WRITE, MP_NBD_WRITE, MP_NBD_WRITE, MP_NBD_WRITE, MP_NBD_READ, MP_NBD_READ, MP_NBD_TRIM, MP_NBD_WRITE_ZEROES, MP_NBD_FLUSH};
    static const uint32_t lengths[] = {1, 511, 512, 4096, 4096, 16384, 65536};
    uint16_t kind = kinds[below(&p->random, sizeof kinds / sizeof *kinds)], flags = 0;
    uint64_t length = one_in(&p->random, 8) ? 1 + below(&p->random, LENGTH_MAX) : lengths[below(&p->random, 7)];
    if ((kind == MP_NBD_TRIM || kind == MP_NBD_WRITE_ZEROES) && one_in(&p->random, 10))
        length = 1 + below(&p->random, p->length); /* in several steps */
    uint64_t most = p->length - length, hot = p->length / 16;
    uint64_t offset = below(&p->random, (one_in(&p->random, 2) && hot < most ? hot : most) + 1);
    if (kind != MP_NBD_READ && kind != MP_NBD_FLUSH && one_in(&p->random, 6))
        flags |= MP_NBD_FUA;
    if (kind == MP_NBD_WRITE_ZEROES && one_in(&p->random, 2))
        flags |= MP_NBD_NO_HOLE;
    return ask(p, slot, kind, flags, offset, length);
}

static void land(player *p, unsigned slot)
{
    free(p->flight[slot].expected);
    p->flight[slot] = (player_flight){0};
}

static bool take_answer(player *p)
{
    uint8_t reply[MP_NBD_REPLY];
    if (!receive(p, reply, sizeof reply))
        return false;
    if (memcmp(reply, "\x67\x44\x66\x98", 4) != 0)
        die("player %u: an answer begins with other bytes", p->number);
    if (memcmp(reply + 4, "\0\0\0\0", 4) != 0)
        die("player %u: error %u", p->number, reply[7]);
    unsigned slot = reply[15];
    if (slot >= PLAYER_DEPTH || !p->flight[slot].busy)
        die("player %u: an answer to nothing", p->number);
    player_flight *f = &p->flight[slot];
    if (f->kind == MP_NBD_READ) {
        uint8_t *data = malloc(f->length);
        if (!receive(p, data, f->length)) {
            free(data);
            return false;
        }
        for (uint64_t i = 0; i < f->length; i++)
            if (data[i] != f->expected[i])
                die("player %u: read %llu + %llu: byte %llu is %02x, not %02x", p->number, (unsigned long long)(p->base + f->offset), (unsigned long long)f->length,
                    (unsigned long long)i, data[i], f->expected[i]);
        free(data);
    }
    land(p, slot);
    p->answered_here++;
    atomic_fetch_add(&stage.answers, 1);
    tell();
    return true;
}

static unsigned busy(const player *p)
{
    unsigned count = 0;
    for (unsigned i = 0; i < PLAYER_DEPTH; i++)
        count += p->flight[i].busy;
    return count;
}

static unsigned free_slot(const player *p)
{
    unsigned slot = 0;
    while (p->flight[slot].busy)
        slot++;
    return slot;
}

/* --- connections --- */

static void connect_again(player *p)
{
    pthread_mutex_lock(&stage.lock);
    p->wants = p->given < 0; /* the first one is wished for, and may be here, before the thread runs */
    tell();
    while (p->given < 0)
        pthread_cond_wait(&stage.changed, &stage.lock);
    p->fd = p->given;
    p->given = -1;
    pthread_mutex_unlock(&stage.lock);
    struct timeval patience = {.tv_sec = PATIENCE_S};
    (void)setsockopt(p->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    (void)setsockopt(p->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    p->answered_here = 0;
}

/* The part as it is now. False: the connection ended again meanwhile. */
static bool read_all(player *p, uint8_t *to)
{
    for (uint64_t at = 0; at < p->length; at += READ_ALL) {
        uint64_t part = p->length - at < READ_ALL ? p->length - at : READ_ALL;
        uint8_t header[MP_NBD_REQUEST] = {0}, reply[MP_NBD_REPLY];
        big(header, 4, 0x25609513u);
        big(header + 16, 8, p->base + at);
        big(header + 24, 4, part);
        if (!transmit(p, header, sizeof header) || !receive(p, reply, sizeof reply))
            return false;
        if (memcmp(reply, "\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0", 16) != 0)
            die("player %u: a read after the reconnection failed", p->number);
        if (!receive(p, to + at, part))
            return false;
    }
    return true;
}

/* After an end: a new connection, and what the part holds now must differ from the model only where something flew. */
static void go_on(player *p)
{
    uint8_t *unsure = calloc(1, p->length), *now = malloc(p->length);
    for (unsigned i = 0; i < PLAYER_DEPTH; i++) {
        if (p->flight[i].busy && p->flight[i].kind != MP_NBD_READ && p->flight[i].kind != MP_NBD_FLUSH)
            memset(unsure + p->flight[i].offset, 1, p->flight[i].length);
        land(p, i);
    }
    close(p->fd);
    do {
        p->fd = -1;
        connect_again(p);
    } while (!read_all(p, now) && (close(p->fd), true));
    for (uint64_t i = 0; i < p->length; i++)
        if (now[i] != p->model[i] && !unsure[i])
            die("player %u: after its reconnection byte %llu is %02x, not %02x: a confirmed write is lost", p->number, (unsigned long long)(p->base + i), now[i], p->model[i]);
    memcpy(p->model, now, p->length);
    free(unsure);
    free(now);
}

/* Without a goodbye, mostly in the middle of a write. */
static void hang_up(player *p)
{
    p->hung_up++;
    if (one_in(&p->random, 2)) { /* what is incomplete must not happen: it would be seen */
        uint64_t length = 65536;
        uint8_t header[MP_NBD_REQUEST] = {0};
        big(header, 4, 0x25609513u);
        big(header + 6, 2, MP_NBD_WRITE);
        big(header + 16, 8, p->base);
        big(header + 24, 4, length);
        uint8_t *half = malloc(length);
        for (uint64_t i = 0; i < length; i++)
            half[i] = (uint8_t)~p->model[i];
        (void)(transmit(p, header, sizeof header) && transmit(p, half, below(&p->random, length)));
        free(half);
    }
    go_on(p);
}

static void *play(void *argument)
{
    player *p = argument;
    connect_again(p);
    for (;;) {
        bool stopping = atomic_load(&stage.stop), alive = true;
        if (stopping && !busy(p))
            break;
        if (!stopping && p->answered_here > 50 && one_in(&p->random, 400)) {
            hang_up(p);
            continue;
        }
        if (!stopping && busy(p) < PLAYER_DEPTH && !one_in(&p->random, PLAYER_DEPTH))
            alive = ask_something(p, free_slot(p));
        else if (busy(p))
            alive = take_answer(p);
        if (alive)
            continue;
        if (atomic_load(&stage.kills) == p->given_at)
            die("player %u: the engine hung up", p->number);
        p->cut_off++;
        go_on(p);
    }
    uint8_t goodbye[MP_NBD_REQUEST] = {0};
    big(goodbye, 4, 0x25609513u);
    big(goodbye + 6, 2, MP_NBD_DISCONNECT);
    (void)transmit(p, goodbye, sizeof goodbye);
    close(p->fd);
    pthread_mutex_lock(&stage.lock);
    p->left = true;
    tell();
    pthread_mutex_unlock(&stage.lock);
    return NULL;
}

void player_start(player *p, uint8_t *model)
{
    p->fd = p->given = -1;
    p->model = model ? model : calloc(1, p->length);
    if (!p->model || pthread_create(&p->thread, NULL, play, p))
        die("no thread");
}

void player_join(player *p)
{
    pthread_join(p->thread, NULL);
}
