/* longread.c - a READ longer than MP_SLAB_READ_MAX is answered in pieces of that length, so that what a client does not take
 * is kept for it within bounds: WINDOW bytes, or less while many clients are slow.
 *
 * Rules
 *  - One long read of a client at a time has pieces. Each is a request of its own: it waits for what is in flight on its
 *    range (A6) and needs the grant when it is read (A10).
 *  - W2: the pieces keep the read's place in the order. A later write of the same client waits until they were read; one of
 *    another client has no order with a read that was not answered, and only waits for the piece that is being read. Else who
 *    takes no answers would stop who writes.
 *  - NBD's simple reply says in front of the data whether the read failed, and the protocol wants the connection closed if it
 *    fails behind that. So the header goes out as late as it can: when all of the read is here (nbdkit and qemu-nbd read all
 *    of it always), or the window holds no more of it. Up to WINDOW an error is answered; beyond, it may end the connection.
 *  - The window is DT, as switches share their buffers: each may hold a quarter of what is free. So what many slow ones hold
 *    leaves some for one more, who gets one piece in any case as long as there is one.
 */
#include "client.h"

#define WINDOW ((uint64_t)1 << 20)
#define SHARE 4u

bool mp_client_may_read(mp_client *c, uint64_t length)
{
    uint64_t bytes = mp_slab_bytes(length), free_bytes = mp_slab_free_for_reads(&c->engine->slab);
    if (c->reads)
        return bytes <= free_bytes && c->reads + bytes <= mp_min(WINDOW, free_bytes / SHARE);
    c->engine->starved |= bytes > free_bytes;
    return bytes <= free_bytes;
}

void mp_long_init(mp_client *c)
{
    mp_list_init(&c->whole);
    mp_list_init(&c->ready);
    mp_list_init(&c->later);
}

void mp_long_begin(mp_request *r)
{
    r->serial = ++r->engine->serial;
    mp_list_put(&r->client->whole, r);
    mp_long_pump(r->client);
}

bool mp_long_reads_first(const mp_request *w)
{
    const mp_client *c = w->client;
    for (const mp_request *r = c ? c->whole.first : NULL; r && r->serial < w->serial; r = r->next) {
        uint64_t from = r->offset + (r == c->whole.first ? c->asked : 0), end = r->offset + r->length;
        if (w->offset < end && from < w->offset + w->length && from < end)
            return true;
    }
    return false;
}

void mp_long_arrived(mp_request *piece)
{
    mp_client *c = piece->client;
    c->pieces--;
    if (c->dead) {
        mp_request_free(piece);
        return;
    }
    if (piece->reply_error && !c->whole.first->reply_error)
        c->whole.first->reply_error = piece->reply_error;
    mp_list_put(&c->ready, piece);
}

static void discard_ready(mp_client *c)
{
    for (mp_request *piece; (piece = mp_list_take(&c->ready));) {
        c->reads -= mp_slab_bytes(piece->buffer_bytes);
        mp_request_free(piece);
    }
}

/* False: no more of it now, for want of room. */
static bool start_pieces(mp_client *c, const mp_request *r)
{
    while (c->asked < r->length && !r->reply_error) {
        uint64_t part = mp_min(MP_SLAB_READ_MAX, r->length - c->asked);
        mp_request *piece = mp_client_may_read(c, part) ? mp_request_new(c->engine) : NULL;
        if (!piece)
            return false;
        piece->op = MP_OP_READ;
        if (!mp_request_buffer(piece, part)) {
            mp_request_free(piece);
            return false;
        }
        piece->volume = r->volume;
        piece->client = c;
        piece->piece = true;
        piece->serial = r->serial;
        piece->cookie = r->cookie;
        piece->offset = r->offset + c->asked;
        piece->length = part;
        c->asked += part;
        piece->last = c->asked == r->length;
        c->reads += mp_slab_bytes(part);
        c->pieces++;
        c->in_hand++;
        mp_request_submit(piece); /* it may arrive in this very call */
    }
    if (c->asked == r->length)
        mp_volume_look_again(c->volume); /* this client's writes behind it now wait for its pieces only */
    return true;
}

static mp_request *take_ready(mp_client *c, uint64_t offset)
{
    mp_request **at = &c->ready.first;
    while (*at && (*at)->offset != offset)
        at = &(*at)->next;
    mp_request *piece = *at;
    if (piece && !(*at = piece->next))
        c->ready.last = at;
    return piece;
}

static void put_pieces(mp_client *c, const mp_request *r)
{
    for (mp_request *piece; c->put < r->length && (piece = take_ready(c, r->offset + c->put));) {
        piece->reply_bytes = c->put ? 0 : MP_NBD_REPLY;
        mp_nbd_reply(piece->reply, r->cookie, MP_NBD_OK);
        c->put += piece->length;
        mp_client_put(c, piece);
    }
}

/* The first one stands in `answers` to its end, or has failed before it stood there at all. */
static mp_request *finish(mp_client *c)
{
    mp_request *r = mp_list_take(&c->whole);
    c->asked = c->put = 0;
    c->opened = false;
    mp_volume_look_again(c->volume);
    return r;
}

static void put_later(mp_client *c)
{
    for (mp_request *r; (r = mp_list_take(&c->later));)
        mp_client_put(c, r);
}

void mp_long_pump(mp_client *c)
{
    for (const mp_request *r; (r = c->whole.first) && !c->dead;) {
        bool room = start_pieces(c, r);
        if (r->reply_error) {
            if (c->opened) {
                mp_client_drop(c);
                return;
            }
            discard_ready(c);
            if (c->pieces)
                return; /* they would be taken for those of the next one */
            mp_client_answer(finish(c));
            continue;
        }
        bool all = c->asked == r->length && !c->pieces, no_more = !room && !c->pieces && c->ready.first && !c->answers.first;
        if (!c->opened && !all && !no_more)
            return;
        c->opened = true;
        put_pieces(c, r);
        if (c->put < r->length)
            return;
        mp_request_free(finish(c)); /* its last piece stands for it */
        c->in_hand--;
        put_later(c);
    }
}

void mp_long_drop(mp_client *c)
{
    discard_ready(c);
    for (mp_request *r; (r = mp_list_take(&c->whole));) {
        mp_request_free(r);
        c->in_hand--;
    }
    for (mp_request *r; (r = mp_list_take(&c->later));)
        mp_request_free(r);
    c->opened = false;
    mp_volume_look_again(c->volume);
}
