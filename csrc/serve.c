/* serve.c - the connection of one NBD client, after its negotiation.
 *
 * Rules
 *  - A client can only hurt itself: what it says is judged in nbd.c, what it does not read is kept for it within bounds, and
 *    a connection that fails is closed while its requests in flight run to their end without it.
 *  - Its payload is received straight into the buffer that goes to the peer and to the disk (W3); only what came in the same
 *    read as a request's header is copied once.
 *  - A refused WRITE's payload is read and dropped through the small input buffer, whatever length it states, and only then
 *    answered: libnbd does not know a request yet of which it is still sending the payload.
 *  - Paused (a planned change of roles): no byte is read, also of a payload that has begun; what was submitted goes on to its
 *    answer, and when no change is in hand any more that is told. Whatever was not read has not happened.
 *  - Answers go out in one writev per round, in any order: NBD's cookies tell them apart. A long read is answered in pieces
 *    (longread.c).
 */
#define _GNU_SOURCE
#include "client.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define INPUT MP_CLIENT_INPUT
#define STRAIGHT (16u << 10)               /* a payload of which more than this is missing goes past the input buffer */
#define OUTSTANDING ((uint64_t)4 << 20)    /* payload of one client's writes in hand; one larger one is always let in */
#define READS 8u                           /* reads of the socket per round, so that one client does not keep the loop */
#define REQUESTS 256u                      /* of one client, in hand and unread answers */
#define STALLED ((uint64_t)30 * 1000000000) /* a client that takes nothing of its answers, or sends nothing of its payload, */
#define STARVING ((uint64_t)10 * 1000000000) /* for so long is hung up on; the second while others get no buffer for it */
#define BATCH 32u                          /* answers per writev */

/* An idle client costs a round nothing: only those that something happened to are looked at. */
void mp_client_touch(mp_client *c)
{
    if (c->touched)
        return;
    c->touched = true;
    c->next_touched = c->engine->touched;
    c->engine->touched = c;
}

static void untouch(mp_client *c)
{
    mp_client **at = &c->engine->touched;
    if (!c->touched)
        return;
    while (*at != c)
        at = &(*at)->next_touched;
    *at = c->next_touched;
    c->touched = false;
}

static bool full(const mp_client *c) { return c->outstanding >= OUTSTANDING || c->requests >= REQUESTS; }

static void watch(mp_client *c)
{
    bool read = !c->closing && !c->again && !c->engine->clients_paused && (!full(c) || c->receiving);
    mp_loop_change(&c->engine->loop, c->fd, (read ? MP_LOOP_READ : 0u) | (c->answers.first ? MP_LOOP_WRITE : 0u));
}

static void forget(mp_client *c)
{
    mp_engine *engine = c->engine;
    mp_loop_remove(&engine->loop, c->fd);
    pthread_mutex_lock(&engine->lock); /* somebody may go through the list: mp_engine_hang_up */
    close(c->fd);
    if ((*c->self = c->next))
        c->next->self = c->self;
    pthread_mutex_unlock(&engine->lock);
    c->volume->clients--;
    engine->client_count--;
    mp_event_post(engine, MP_EVENT_CLIENT, c->volume->index, c->volume->clients, "%s", c->dead ? "lost" : "left");
    free(c);
    if (!engine->client_count && engine->closing_clients) {
        engine->closing_clients = false;
        mp_event_post(engine, MP_EVENT_CLIENTS_CLOSED, 0, 0, "%s", "");
    }
}

/* What was coming from it is not waited for any more. */
static void forget_incoming(mp_client *c)
{
    c->drain = 0;
    if (c->refused) {
        mp_request_free(c->refused);
        c->refused = NULL;
        c->in_hand--;
    }
    if (c->receiving) {
        mp_request_free(c->receiving);
        c->receiving = NULL;
    }
}

/* Nothing more is exchanged with it; what is in hand ends without it. */
void mp_client_drop(mp_client *c)
{
    c->closing = c->dead = true;
    c->again = false;
    forget_incoming(c);
    mp_long_drop(c);
    for (mp_request *r; (r = mp_list_take(&c->answers));)
        mp_request_free(r);
    mp_request_forget(c, c->volume);
    shutdown(c->fd, SHUT_RDWR);
}

static bool over(const mp_client *c) { return c->closing && !c->in_hand && !c->answers.first && !c->receiving; }

static uint64_t data_bytes(const mp_request *r) { return r->op == MP_OP_READ && !r->reply_error ? r->length : 0; }

/* It was sent. */
static void dispose(mp_client *c, mp_request *r)
{
    c->outstanding -= r->op == MP_OP_WRITE ? r->length : 0;
    if (r->op == MP_OP_READ && r->buffer)
        c->reads -= mp_slab_bytes(r->buffer_bytes);
    c->requests -= !r->piece || r->last;
    mp_request_free(r);
}

static void send_answers(mp_client *c)
{
    while (c->answers.first && !c->dead) {
        struct iovec vector[BATCH * 2];
        unsigned parts = 0;
        uint64_t skip = c->sent;
        for (mp_request *r = c->answers.first; r && parts + 2 <= BATCH * 2; r = r->next) {
            struct iovec piece[2] = {{r->reply, r->reply_bytes}, {r->buffer, data_bytes(r)}};
            for (int i = 0; i < 2; i++) {
                if (skip >= piece[i].iov_len) {
                    skip -= piece[i].iov_len;
                    continue;
                }
                vector[parts++] = (struct iovec){(char *)piece[i].iov_base + skip, piece[i].iov_len - skip};
                skip = 0;
            }
        }
        struct msghdr message = {.msg_iov = vector, .msg_iovlen = parts};
        ssize_t sent = sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                mp_client_drop(c);
            return;
        }
        c->moved_ns = mp_now_ns();
        c->sent += (uint64_t)sent;
        while (c->answers.first) {
            mp_request *r = c->answers.first;
            uint64_t whole = r->reply_bytes + data_bytes(r);
            if (c->sent < whole)
                break;
            c->sent -= whole;
            mp_list_take(&c->answers);
            dispose(c, r);
        }
    }
}

void mp_client_put(mp_client *c, mp_request *r)
{
    if (!c->answers.first)
        c->moved_ns = mp_now_ns();
    mp_list_put(&c->answers, r);
}

/* What a pause waits for begins, or has ended. */
static void count(mp_request *r)
{
    r->counted = r->op != MP_OP_READ;
    r->engine->changes += r->counted;
}

static void uncount(mp_request *r)
{
    r->engine->changes -= r->counted;
    r->counted = false;
}

void mp_client_answer(mp_request *r)
{
    mp_client *c = r->client;
    uncount(r);
    if (!c) {
        mp_request_free(r);
        return;
    }
    c->in_hand--;
    mp_client_touch(c);
    if (r->piece) {
        mp_long_arrived(r);
        return;
    }
    if (c->dead) {
        mp_request_free(r);
        return;
    }
    if (r->buffer && (r->op == MP_OP_WRITE || r->reply_error)) { /* the budget is for those who still need it */
        c->reads -= r->op == MP_OP_READ ? mp_slab_bytes(r->buffer_bytes) : 0;
        mp_request_drop_buffer(r);
    }
    r->reply_bytes = MP_NBD_REPLY;
    mp_nbd_reply(r->reply, r->cookie, r->reply_error);
    if (c->opened) /* between two pieces */
        mp_list_put(&c->later, r);
    else
        mp_client_put(c, r);
}

bool mp_client_gone(const mp_request *r) { return r->client && r->client->dead; }

void mp_client_lost(mp_request *r)
{
    r->client->in_hand--;
    r->client->pieces -= r->piece;
    mp_client_touch(r->client);
    mp_request_free(r);
}

/* Takes the request that stands in the input. False: not now, or never again. */
static bool take(mp_client *c)
{
    mp_nbd_request n;
    if (!mp_nbd_parse(c->input + c->input_at, &n)) {
        mp_client_drop(c); /* whatever this is, nothing behind it can be understood */
        return false;
    }
    if (n.type == MP_NBD_DISCONNECT) {
        c->closing = true;
        return false;
    }
    mp_request *r = mp_request_new(c->engine);
    if (!r)
        return false;
    c->requests++;
    r->volume = c->volume;
    r->client = c;
    r->cookie = n.cookie;
    r->offset = n.offset;
    r->length = n.length;
    r->flags = (n.flags & MP_NBD_FUA ? MP_REQUEST_FUA : 0u) | (n.flags & MP_NBD_NO_HOLE ? MP_REQUEST_NO_HOLE : 0u);
    r->op = n.type == MP_NBD_READ ? MP_OP_READ : n.type == MP_NBD_WRITE ? MP_OP_WRITE : n.type == MP_NBD_FLUSH ? MP_OP_FLUSH : MP_OP_ZERO;
    r->reply_error = mp_nbd_judge(&n, c->volume->size, c->read_only);
    if (r->reply_error) {
        r->op = MP_OP_FLUSH; /* it has no payload of its own any more */
        c->in_hand++;
        if (n.type == MP_NBD_WRITE && n.length) {
            c->drain = n.length;
            c->refused = r;
            c->moved_ns = mp_now_ns();
        } else {
            mp_client_answer(r);
        }
    } else if (r->op == MP_OP_READ && n.length > MP_SLAB_READ_MAX) {
        c->in_hand++;
        c->input_at += MP_NBD_REQUEST;
        mp_long_begin(r);
        return !c->dead;
    } else if ((r->op == MP_OP_READ && !mp_client_may_read(c, n.length))
               || (r->op <= MP_OP_WRITE && !mp_request_buffer(r, n.length))) { /* nothing that waits ever waits for a buffer */
        c->requests--;
        mp_request_free(r);
        return false;
    } else if (r->op == MP_OP_WRITE) {
        c->receiving = r;
        c->moved_ns = mp_now_ns();
        c->got = 0;
        c->outstanding += n.length;
    } else {
        c->in_hand++;
        c->reads += r->op == MP_OP_READ ? mp_slab_bytes(n.length) : 0;
        c->input_at += MP_NBD_REQUEST;
        count(r);
        mp_request_submit(r);
        return true;
    }
    c->input_at += MP_NBD_REQUEST;
    return true;
}

static void complete(mp_client *c)
{
    mp_request *r = c->receiving;
    c->receiving = NULL;
    c->in_hand++;
    count(r);
    mp_request_submit(r);
}

/* Works off what is in the input buffer. False: something has to be waited for that is not the socket. */
static bool digest_input(mp_client *c)
{
    while (!c->closing) {
        uint32_t there = c->input_end - c->input_at;
        if (c->drain) {
            uint32_t part = (uint32_t)mp_min(there, c->drain);
            c->input_at += part;
            c->drain -= part;
            if (part)
                c->moved_ns = mp_now_ns();
            if (c->drain)
                return true;
            mp_request *refused = c->refused;
            c->refused = NULL;
            mp_client_answer(refused);
        } else if (c->receiving) {
            uint32_t part = (uint32_t)mp_min(there, c->receiving->length - c->got);
            memcpy(c->receiving->buffer + c->got, c->input + c->input_at, part);
            c->input_at += part;
            c->got += part;
            if (c->got < c->receiving->length)
                return true;
            complete(c);
        } else if (there < MP_NBD_REQUEST) {
            return true;
        } else if (full(c) || !take(c)) {
            return false;
        }
    }
    return true;
}

/* One recv. False: nothing more is there now, or the connection is over. */
static bool read_some(mp_client *c)
{
    uint8_t *to;
    size_t room;
    bool straight = c->receiving && !c->drain && c->receiving->length - c->got > STRAIGHT;
    if (straight) {
        to = c->receiving->buffer + c->got;
        room = c->receiving->length - c->got;
    } else {
        if (c->input_at) {
            memmove(c->input, c->input + c->input_at, c->input_end - c->input_at);
            c->input_end -= c->input_at;
            c->input_at = 0;
        }
        to = c->input + c->input_end;
        room = INPUT - c->input_end;
    }
    ssize_t got = recv(c->fd, to, room, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR)
        return true;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return false;
    if (got <= 0) {
        if (got < 0 || c->receiving || c->drain || c->input_end != c->input_at)
            mp_client_drop(c); /* in the middle of something */
        else if (!c->in_hand && !c->answers.first)
            c->closing = true;
        else
            mp_client_drop(c); /* hung up with answers pending: nobody is there to read them */
        return false;
    }
    if (!straight) {
        c->input_end += (uint32_t)got;
    } else {
        c->got += (uint64_t)got;
        c->moved_ns = mp_now_ns();
        if (c->got == c->receiving->length)
            complete(c);
    }
    return (size_t)got == room; /* less than there was room for: the socket is empty, epoll tells when it is not */
}

static void read_more(mp_client *c)
{
    for (unsigned i = 0; i < READS && !c->closing; i++) {
        c->again = !digest_input(c) && !c->closing;
        if (c->again || c->closing || !read_some(c))
            break;
    }
    if (!c->closing && !c->again)
        c->again = !digest_input(c) && !c->closing;
}

static void on_client(void *argument, unsigned events)
{
    mp_client *c = argument;
    mp_client_touch(c);
    if (events & MP_LOOP_WRITE) {
        send_answers(c);
        mp_long_pump(c);
    }
    if (events & MP_LOOP_READ && !c->closing && !c->engine->clients_paused)
        read_more(c);
    else if (events & MP_LOOP_READ && !c->dead && c->closing) { /* hung up after it had said goodbye, or while we close */
        uint8_t rest[4096];
        ssize_t got = recv(c->fd, rest, sizeof rest, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
            mp_client_drop(c);
    }
}

void mp_client_add(mp_engine *engine, int fd, uint32_t volume, bool read_only, const uint8_t *extra, uint32_t length)
{
    mp_client *c = length <= INPUT ? calloc(1, sizeof *c) : NULL;
    if (!c || engine->closing_clients || !mp_loop_add(&engine->loop, fd, MP_LOOP_READ, on_client, c)) {
        free(c);
        close(fd);
        return;
    }
    c->engine = engine;
    c->volume = &engine->volume[volume];
    c->fd = fd;
    c->read_only = read_only;
    mp_list_init(&c->answers);
    mp_long_init(c);
    if (length)
        memcpy(c->input, extra, length);
    c->input_end = length;
    c->again = length != 0;
    pthread_mutex_lock(&engine->lock);
    if ((c->next = engine->clients))
        c->next->self = &c->next;
    c->self = &engine->clients;
    engine->clients = c;
    pthread_mutex_unlock(&engine->lock);
    engine->client_count++;
    c->volume->clients++;
    mp_client_touch(c);
    mp_event_post(engine, MP_EVENT_CLIENT, volume, c->volume->clients, "came");
}

void mp_clients_close(mp_engine *engine, bool graceful)
{
    engine->closing_clients = true;
    engine->clients_paused = engine->tell_quiet = false;
    if (!graceful)
        mp_cover_abandon(engine);
    for (mp_client *c = engine->clients; c; c = c->next) {
        mp_client_touch(c);
        if (!graceful) {
            mp_client_drop(c);
            continue;
        }
        c->closing = true; /* unread bytes are discarded (C1) */
        forget_incoming(c);
    }
    if (!engine->clients) {
        engine->closing_clients = false;
        mp_event_post(engine, MP_EVENT_CLIENTS_CLOSED, 0, 0, "%s", "");
    }
}

void mp_clients_send(mp_engine *engine)
{
    for (mp_client *c = engine->clients; c; c = c->next) {
        send_answers(c);
        mp_client_touch(c);
    }
}

void mp_clients_pause(mp_engine *engine, bool pause, uint64_t token)
{
    engine->quiet_token = token;
    engine->clients_paused = engine->tell_quiet = pause;
    for (mp_client *c = engine->clients; c; c = c->next) {
        c->again = !c->closing; /* what stands in the input buffer is not told of by the socket */
        c->moved_ns = mp_now_ns();
        mp_client_touch(c);
    }
}

void mp_engine_free_clients(mp_engine *engine)
{
    for (mp_client *c; (c = engine->clients);) {
        engine->clients = c->next;
        close(c->fd);
        free(c);
    }
}

void mp_clients_round(mp_engine *engine)
{
    uint64_t now = 0;
    bool room = engine->starved;
    engine->starved = false;
    mp_client *c = engine->touched, *next;
    engine->touched = NULL;
    for (; c; c = next) {
        next = c->next_touched;
        c->touched = false;
        mp_long_pump(c);
        for (unsigned turn = 0; c->answers.first && turn < READS; turn++) { /* what was sent makes room for more of a long read */
            const mp_request *whole = c->whole.first;
            uint64_t put = c->put;
            send_answers(c);
            mp_long_pump(c);
            if (c->put == put && c->whole.first == whole)
                break;
        }
        bool paused = engine->clients_paused;
        if (c->again && (room || !full(c)) && !c->closing && !paused)
            read_more(c);
        if ((c->answers.first || (!paused && (c->receiving || c->refused))) && (now ? now : (now = mp_now_ns())) > c->moved_ns + (room ? STARVING : STALLED))
            mp_client_drop(c);
        if (over(c)) {
            untouch(c); /* what it sent last may have been answered and dropped in this very turn */
            forget(c);
            continue;
        }
        watch(c);
        if ((!paused && (c->again || c->receiving || c->refused)) || c->answers.first || (c->whole.first && !c->pieces))
            mp_client_touch(c);
    }
    if (engine->tell_quiet && !engine->changes) {
        engine->tell_quiet = false;
        mp_event_post(engine, MP_EVENT_CLIENTS_QUIET, engine->quiet_token, 0, "%s", "");
    }
}
