/* fuzz_client.c - NBD's transmission phase through a whole engine (onethread.h): streams of requests and rubbish, in pieces of
 * any length, with hang-ups anywhere and the disk's work done in any order.
 *
 * Input: flags u8 (1: the second client may only read), then moves (see `move`). There is one client for each volume. What is
 * checked, from the protocol and a model of each volume in memory:
 *  - every complete request is answered once, with an error only if nbd_oracle.h has one for it, reads with what stood there
 *    when they were sent (W2); nobody is hung up on who gave no reason;
 *  - what came incomplete never happens; after a hang-up, only what was on its way may or may not have;
 *  - at the end nothing is held and no buffer is missing (one_close).
 */
#define _GNU_SOURCE
#include "nbd_oracle.h"
#include "onethread.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#define REQUESTS 64u
#define STREAM (1u << 20)
#define PAYLOAD (192u << 10) /* of one write: past STRAIGHT, and past a socket's buffer */
#define PATIENCE 100u

typedef struct request {
    uint8_t raw[28];
    uint64_t end;      /* in the stream: complete once so much was sent */
    uint8_t *expected; /* of a read */
    bool valid, answered;
} request;

typedef struct client {
    unsigned volume;
    int fd;
    bool read_only, slow, ended, eof, rubbish; /* ended: nothing more is built; rubbish: it has to be hung up on */
    uint8_t *stream, *model, *inbox;
    uint64_t built, sent, inbox_used;
    request requests[REQUESTS];
    unsigned count;
} client;

static one_node node;
static client clients[ONE_VOLUMES];
static uint8_t streams[ONE_VOLUMES][STREAM], inboxes[ONE_VOLUMES][STREAM]; /* made once: page faults are dear */
static fuzz_input in;
static uint64_t passed_ns;
static unsigned tries;
static bool closing;

/* --- answers --- */

static request *by_cookie(client *c, uint64_t cookie)
{
    FUZZ_NEED(cookie < c->count && !c->requests[cookie].answered);
    return &c->requests[cookie];
}

static void take_answers(client *c)
{
    uint64_t at = 0;
    while (c->inbox_used - at >= 16) {
        const uint8_t *reply = c->inbox + at;
        FUZZ_NEED(nbd_big(reply, 4) == 0x67446698u);
        uint32_t error = (uint32_t)nbd_big(reply + 4, 4);
        request *r = by_cookie(c, nbd_big(reply + 8, 8));
        uint64_t length = !error && nbd_big(r->raw + 6, 2) == NBD_READ ? nbd_big(r->raw + 24, 4) : 0;
        FUZZ_NEED(c->sent >= r->end && nbd_may_say(error, r->raw, node.size[c->volume], c->read_only));
        if (c->inbox_used - at < 16 + length)
            break;
        FUZZ_NEED(!length || memcmp(reply + 16, r->expected, length) == 0);
        r->answered = true;
        at += 16 + length;
    }
    c->inbox_used -= at;
    memmove(c->inbox, c->inbox + at, c->inbox_used);
}

static void receive(client *c)
{
    while (c->fd >= 0 && !c->eof && !c->slow) {
        ssize_t got = recv(c->fd, c->inbox + c->inbox_used, STREAM - c->inbox_used, MSG_DONTWAIT);
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            c->eof = true;
            return;
        }
        c->inbox_used += (uint64_t)got;
        take_answers(c);
    }
}

/* --- requests --- */

static void append(client *c, const void *bytes, uint64_t length)
{
    memcpy(c->stream + c->built, bytes, length);
    c->built += length;
}

static uint64_t some_length(void)
{
    static const uint32_t usual[] = {1, 512, 4095, 4096, 4097, 16384, 65536, 131072, 150000, (32u << 20) + 1, 0xffffffffu};
    uint8_t how = (uint8_t)fuzz_number(&in, 1);
    return how < 11 ? usual[how] : how < 128 ? fuzz_number(&in, 1) : fuzz_number(&in, 2);
}

static void build(client *c, uint8_t what)
{
    static const uint8_t types[16] = {NBD_READ, NBD_WRITE, NBD_WRITE, NBD_WRITE, NBD_TRIM, NBD_ZEROES, NBD_FLUSH, NBD_READ, NBD_READ, NBD_WRITE, NBD_TRIM, NBD_ZEROES, NBD_DISCONNECT, 5, 7, 255};
    request *r = &c->requests[c->count];
    uint64_t size = node.size[c->volume], length = some_length(), offset = fuzz_number(&in, 3), type = types[what & 15];
    uint16_t flags = what & 16 ? (uint16_t)fuzz_number(&in, 1) : 0;
    if (offset < 0xff0000) /* mostly inside */
        offset %= size + 8;
    else
        offset = UINT64_MAX - (offset & 0xffff);
    if (what & 32 && length <= size)
        offset %= size - length + 1;
    if (c->ended || c->count == REQUESTS || STREAM - c->built < PAYLOAD + 100)
        return;
    memcpy(r->raw, "\x25\x60\x95\x13", 4);
    nbd_put(r->raw + 4, 2, flags);
    nbd_put(r->raw + 6, 2, type);
    nbd_put(r->raw + 8, 8, c->count);
    nbd_put(r->raw + 16, 8, offset);
    nbd_put(r->raw + 24, 4, length);
    append(c, r->raw, 28);
    if (type == NBD_DISCONNECT) {
        c->ended = true;
        return;
    }
    r->valid = nbd_may_say(0, r->raw, size, c->read_only);
    c->count++;
    if (type == NBD_WRITE) {
        uint64_t part = mp_min(length, PAYLOAD);
        for (uint64_t i = 0; i < part; i++)
            c->stream[c->built + i] = (uint8_t)(c->count * 37 + i * 3 + (i >> 8));
        if (r->valid && part == length)
            memcpy(c->model + offset, c->stream + c->built, length);
        c->built += part;
        c->ended = part < length; /* the rest never comes */
        r->end = c->ended ? UINT64_MAX : c->built;
        return;
    }
    r->end = c->built;
    if (!r->valid)
        return;
    if (type == NBD_READ) {
        r->expected = malloc(length);
        memcpy(r->expected, c->model + offset, length);
    } else if (type != NBD_FLUSH) {
        memset(c->model + offset, 0, length);
    }
}

static void build_rubbish(client *c)
{
    uint8_t bytes[28];
    fuzz_bytes(&in, bytes, sizeof bytes);
    if (c->ended || memcmp(bytes, "\x25\x60\x95\x13", 4) == 0)
        return;
    append(c, bytes, sizeof bytes);
    c->ended = c->rubbish = true;
}

static void send_some(client *c, uint64_t most)
{
    if (c->fd < 0 || c->eof)
        return;
    uint64_t part = mp_min(most, c->built - c->sent);
    ssize_t put = part ? send(c->fd, c->stream + c->sent, part, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;
    if (put > 0)
        c->sent += (uint64_t)put;
}

static void hang_up(client *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

static void move(void)
{
    uint8_t what = (uint8_t)fuzz_number(&in, 1);
    client *c = &clients[what >> 7];
    if ((what & 127) < 64) {
        build(c, what & 63);
        return;
    }
    switch (what & 15) {
    case 0:
    case 1: send_some(c, fuzz_number(&in, 1)); break;
    case 2:
    case 3: send_some(c, UINT64_MAX); break;
    case 4: send_some(c, c->built - c->sent > 1 ? c->built - c->sent - 1 : 1); break;
    case 5:
    case 6:
    case 7:
    case 8:
    case 9:
        if (one_jobs())
            one_job((unsigned)fuzz_number(&in, 1) % one_jobs());
        break;
    case 10: c->slow = !c->slow; break;
    case 11: hang_up(c); break;
    case 12: build_rubbish(c); break;
    default: {
        uint64_t ns = fuzz_number(&in, 1) * 20000000;
        passed_ns += ns;
        one_pass(ns);
    }
    }
}

/* --- the run --- */

/* All that was sent whole has its answer, and who has to be hung up on is. */
static bool satisfied(client *c)
{
    if (c->fd < 0 || c->eof)
        return true;
    if (c->sent < c->built || (c->rubbish && !c->eof))
        return false;
    for (unsigned i = 0; i < c->count; i++)
        if (!c->requests[i].answered && c->requests[i].end != UINT64_MAX)
            return false;
    return true;
}

static void judge_end(client *c)
{
    uint64_t size = node.size[c->volume];
    uint8_t *now = malloc(size), *unsure = calloc(1, size);
    for (unsigned i = 0; i < c->count; i++) {
        request *r = &c->requests[i];
        uint64_t type = nbd_big(r->raw + 6, 2), offset = nbd_big(r->raw + 16, 8), length = nbd_big(r->raw + 24, 4);
        FUZZ_NEED(r->answered || c->fd < 0 || c->eof || r->end == UINT64_MAX);
        if (r->valid && !r->answered && type != NBD_READ && type != NBD_FLUSH && r->end != UINT64_MAX)
            memset(unsure + offset, 1, length);
    }
    one_read(&node, c->volume, now);
    for (uint64_t i = 0; i < size; i++) {
        uint64_t part = mp_min(512, size - i);
        if (i % 512 == 0 && memcmp(now + i, c->model + i, part) == 0)
            i += part - 1;
        else
            FUZZ_NEED(unsure[i] || now[i] == c->model[i]);
    }
    free(unsure);
    free(now);
}

static void idle(void)
{
    one_events(&node);
    for (unsigned i = 0; i < ONE_VOLUMES; i++) {
        client *c = &clients[i];
        receive(c);
        /* hung up on: for rubbish, after a goodbye, or because it let the engine wait */
        FUZZ_NEED(!c->eof || c->rubbish || c->ended || closing || passed_ns >= (uint64_t)10 * 1000000000);
    }
    if (fuzz_left(&in)) {
        move();
        return;
    }
    bool all = true;
    for (unsigned i = 0; i < ONE_VOLUMES; i++) {
        clients[i].slow = false;
        send_some(&clients[i], UINT64_MAX);
        all = all && satisfied(&clients[i]);
    }
    if (one_jobs()) {
        one_job(0);
        return;
    }
    if (!all && !closing) {
        FUZZ_NEED(++tries < PATIENCE); /* somebody waits for ever */
        one_pass(100000000);
        return;
    }
    if (!closing) {
        closing = true;
        tries = 0;
        for (unsigned i = 0; i < ONE_VOLUMES; i++)
            judge_end(&clients[i]);
    }
    for (unsigned i = 0; i < ONE_VOLUMES; i++)
        hang_up(&clients[i]);
    if (node.clients || !one_rests(&node)) {
        FUZZ_NEED(++tries < PATIENCE);
        one_pass(100000000);
        return;
    }
    one_stop(&node);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    static const uint64_t sizes[ONE_VOLUMES] = {65 * 1024 + 77, 160 * 1024};
    static const uint32_t blocks[ONE_VOLUMES] = {4096, 65536};
    in = (fuzz_input){data, data + length};
    bool read_only = fuzz_number(&in, 1) & 1;
    passed_ns = tries = closing = 0;
    one_open(&node, sizes, blocks, 0xe1);
    one_grant(&node, MP_GRANT_ALONE);
    for (unsigned i = 0; i < ONE_VOLUMES; i++) {
        client *c = &clients[i];
        *c = (client){.volume = i, .read_only = i && read_only, .stream = streams[i], .inbox = inboxes[i], .model = malloc(sizes[i])};
        memset(c->model, 0xe1, sizes[i]);
        c->fd = one_client(&node, i, c->read_only);
    }
    one_run(&node, idle);
    one_close(&node);
    for (unsigned i = 0; i < ONE_VOLUMES; i++) {
        client *c = &clients[i];
        for (unsigned k = 0; k < c->count; k++)
            free(c->requests[k].expected);
        free(c->model);
    }
    return 0;
}
