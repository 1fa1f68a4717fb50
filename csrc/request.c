/* request.c - one request, from the moment it was read to its answer.
 *
 * A request is in one of these places, and `next` belongs to that place:
 *   waiting (of its volume)   something is in its way: the grant, an overlapping request, a cold extent, no buffer
 *   local (of the engine)     its frame is queued to the peer; the local write is done at the end of the round
 *   the pool                  a long or blocking local part
 *   held                      (own links) it holds its range until it is done locally and at the peer
 *   barrier.next / .flushing  a FLUSH
 *   a client's answers
 * A long trim or zero goes through waiting once for each step of MP_CHUNK; a long read is many requests (longread.c).
 * `waiting` is in the order in which they came: who came earlier never waits for who came later, but for what is in flight.
 */
#define _GNU_SOURCE
#include "engine.h"

#include "disk.h"

#include <errno.h>

#define TAG_INDEX 0x7fffu /* the low 15 bits of a tag; above it how often the place was used */

static void answer(mp_request *r);

/* --- memory --- */

mp_request *mp_request_new(mp_engine *engine)
{
    if (!engine->free_requests.first && engine->requests < MP_REQUESTS_MAX) {
        mp_request *chunk = calloc(MP_REQUESTS_CHUNK, sizeof *chunk);
        for (unsigned i = 0; chunk && i < MP_REQUESTS_CHUNK; i++) {
            chunk[i].tag = engine->requests;
            engine->request[engine->requests++] = &chunk[i];
            mp_list_put(&engine->free_requests, &chunk[i]);
        }
    }
    mp_request *r = mp_list_take(&engine->free_requests);
    if (!r) {
        engine->starved = true;
        return NULL;
    }
    if (!engine->requests_busy++)
        mp_engine_hurry(engine);
    uint64_t tag = (r->tag + TAG_INDEX + 1) & 0xffffffffu;
    *r = (mp_request){.engine = engine, .tag = tag, .job.run = mp_request_run};
    return r;
}

bool mp_request_buffer(mp_request *r, uint64_t length)
{
    r->buffer = r->op == MP_OP_READ ? mp_slab_get_read(&r->engine->slab, length) : mp_slab_get(&r->engine->slab, length);
    r->buffer_bytes = length;
    if (!r->buffer)
        r->engine->starved = true;
    return r->buffer != NULL;
}

void mp_request_drop_buffer(mp_request *r)
{
    if (r->buffer)
        (r->op == MP_OP_READ ? mp_slab_put_read : mp_slab_put)(&r->engine->slab, r->buffer, r->buffer_bytes);
    r->buffer = NULL;
}

void mp_request_free(mp_request *r)
{
    mp_engine *engine = r->engine;
    MP_ASSERT(!r->holds && !r->on_wire && !r->placed);
    engine->changes -= r->counted;
    mp_request_drop_buffer(r);
    engine->requests_busy--;
    mp_list_put(&engine->free_requests, r);
}

/* --- the local part --- */

static int do_write(const mp_request *r)
{
    if (r->flags & MP_REQUEST_FUA)
        return mp_disk_write_durable(r->volume->fd, r->buffer, r->part, r->at);
    return mp_disk_write(r->volume->fd, r->buffer, r->part, r->at);
}

static int do_zero(const mp_request *r)
{
    int fd = r->volume->fd;
    int error = r->flags & MP_REQUEST_NO_HOLE ? mp_disk_zero_allocated(fd, r->at, r->part) : mp_disk_zero(fd, r->at, r->part);
    return !error && r->flags & MP_REQUEST_FUA ? mp_disk_sync(fd) : error;
}

void mp_request_run(mp_job *job, void *worker)
{
    mp_request *r = (mp_request *)job;
    (void)worker;
    if (r->op == MP_OP_READ)
        r->error = mp_disk_read(r->volume->fd, r->buffer, r->length, r->offset);
    else
        r->error = r->op == MP_OP_WRITE ? do_write(r) : do_zero(r);
}

static void report_error(const mp_request *r)
{
    static const char *const what[] = {"read", "write", "zero", "flush"};
    int error = r->error == MP_DISK_ENDED ? EIO : r->error;
    mp_event_post(r->engine, MP_EVENT_DISK_ERROR, r->volume->index, error, "%s of %llu bytes at offset %llu: %s", what[r->op],
                  (unsigned long long)(r->op == MP_OP_READ ? r->length : r->part), (unsigned long long)(r->op == MP_OP_READ ? r->offset : r->at),
                  r->error == MP_DISK_ENDED ? "the image ends there" : strerror(error));
}

void mp_request_finished(mp_request *r)
{
    if (r->error)
        report_error(r);
    if (r->apply && r->op == MP_OP_READ) {
        mp_cover_served(r);
    } else if (r->apply) {
        mp_link_applied(r);
    } else if (r->op == MP_OP_READ) {
        if (r->holds) {
            r->holds = false;
            mp_flight_leave(&r->volume->reading, r->place);
            mp_volume_look_again(r->volume);
        }
        if (!r->error) {
            answer(r);
            return;
        }
        r->here = r->error;
        r->error = 0;
        if (mp_cover_read(r) == MP_COVER_WAIT)
            mp_request_wait(r);
    } else {
        r->local_done = true;
        r->volume->unsynced = true;
        if (r->error) { /* the peer has what the local image lacks: so say the bits, whatever the client does now */
            mp_journal_set(&r->volume->journal, r->at, r->part);
            mp_mend_spoil(r->volume);
            if (r->flags & MP_REQUEST_FUA && !r->volume->sync_error)
                r->volume->sync_error = r->error == MP_DISK_ENDED ? EIO : r->error; /* it may have reported other lost pages */
            if (mp_cover_holds(r->engine)) {
                r->here = r->here ? r->here : r->error;
                r->error = 0; /* its further steps go to the peer */
            }
        }
        mp_barrier_local_done(r->engine, r->parity);
        mp_request_settle(r);
    }
}

static bool short_enough(const mp_request *r)
{
    return r->op == MP_OP_WRITE && r->part <= MP_INLINE && !(r->flags & MP_REQUEST_FUA);
}

void mp_request_do_local(mp_engine *engine)
{
    mp_request *r;
    while ((r = mp_list_take(&engine->local))) {
        if (!short_enough(r)) {
            mp_pool_submit(&engine->pool, &r->job);
            continue;
        }
        r->error = do_write(r);
        mp_request_finished(r);
    }
}

/* --- start and end --- */

static void hold(mp_request *r)
{
    mp_engine *engine = r->engine;
    mp_volume *volume = r->volume;
    bool connected = engine->link.up;
    if (!r->placed) /* all of it at the first step: nothing may come between two */
        r->place = mp_flight_enter(&volume->flight, r->offset, r->length);
    r->placed = r->holds = true;
    r->next_held = NULL;
    r->previous_held = engine->held_last;
    *(engine->held_last ? &engine->held_last->next_held : &engine->held_first) = r;
    engine->held_last = r;
    r->parity = engine->barrier.parity;
    engine->barrier.local[r->parity]++;
    engine->barrier.bytes_since += r->part;
    r->local_done = false;
    r->peer_done = !connected;
    if (connected) {
        mp_journal_unflushed(&volume->journal, r->at, r->part);
        mp_link_send_write(r);
    } else {
        mp_journal_set(&volume->journal, r->at, r->part);
    }
    mp_list_put(&engine->local, r);
}

static void release(mp_request *r)
{
    mp_engine *engine = r->engine;
    mp_journal_leave(&r->volume->journal, r->at, r->part);
    *(r->previous_held ? &r->previous_held->next_held : &engine->held_first) = r->next_held;
    *(r->next_held ? &r->next_held->previous_held : &engine->held_last) = r->previous_held;
    r->holds = false;
    mp_volume_look_again(r->volume);
}

static void leave(mp_request *r)
{
    if (r->placed)
        mp_flight_leave(&r->volume->flight, r->place);
    r->placed = false;
    mp_volume_look_again(r->volume);
}

static void answer(mp_request *r)
{
    if (r->abandoned)
        r->reply_error = MP_NBD_ESHUTDOWN;
    else if (r->error)
        r->reply_error = mp_nbd_error_of(r->error == MP_DISK_ENDED ? EIO : r->error);
    else if (r->op == MP_OP_READ)
        r->volume->read_bytes += r->length;
    else if (r->op != MP_OP_FLUSH)
        r->volume->written_bytes += r->length;
    mp_client_answer(r);
}

void mp_request_end(mp_request *r)
{
    leave(r);
    answer(r);
}

/* What came after it stays after it. */
static void wait_in_line(mp_request *r)
{
    mp_list *waiting = &r->volume->waiting;
    if (!waiting->first || r->serial == r->engine->serial) {
        mp_list_put(waiting, r);
        return;
    }
    mp_request **at = &waiting->first;
    while (*at && (*at)->serial <= r->serial)
        at = &(*at)->next;
    r->next = *at;
    *at = r;
    if (!r->next)
        waiting->last = &r->next;
}

void mp_request_wait(mp_request *r) { wait_in_line(r); }

void mp_request_settle(mp_request *r)
{
    if (!r->holds || !r->local_done || !r->peer_done || r->on_wire)
        return;
    release(r);
    uint64_t next = r->at + r->part, end = r->offset + r->length;
    if (r->here && !r->error && !r->abandoned && next == end) {
        mp_cover_doubt(r);
        return;
    }
    if (r->error || r->abandoned || next == end) {
        mp_request_end(r);
        return;
    }
    r->at = next;
    r->part = mp_min(MP_CHUNK, end - next);
    wait_in_line(r);
}

/* Whether a write may be submitted at all: to the peer, or alone. */
static bool writable(mp_engine *engine)
{
    if (engine->link.up)
        return engine->link.source;
    if (engine->grant.mode == MP_GRANT_ALONE)
        return true;
    if (engine->grant.mode == MP_GRANT_ALONE_FIRST && !engine->asked_generation) {
        engine->asked_generation = true;
        mp_event_post(engine, MP_EVENT_NEED_GENERATION, 0, 0, "a write is the first one without the peer");
    }
    return false;
}

static bool start(mp_request *r)
{
    mp_volume *volume = r->volume;
    if (!r->placed && mp_flight_overlaps(&volume->flight, r->offset, r->length))
        return false;
    if (r->op == MP_OP_READ) {
        if (!r->here && r->length <= MP_INLINE && (r->error = mp_disk_read_cached(volume->fd, r->buffer, r->length, r->offset)) != EAGAIN) {
            mp_request_finished(r);
            return true;
        }
        r->error = 0;
        mp_cover_verdict verdict = r->here || mp_cover_slow(r->engine) ? mp_cover_read(r) : MP_COVER_HERE;
        if (verdict != MP_COVER_HERE)
            return verdict == MP_COVER_DONE;
        if (mp_flight_full(&volume->reading))
            return false;
        r->place = mp_flight_enter(&volume->reading, r->offset, r->length);
        r->holds = true;
        mp_pool_submit(&r->engine->pool, &r->job);
        return true;
    }
    if (!r->placed && (mp_flight_full(&volume->flight) || mp_flight_overlaps(&volume->reading, r->offset, r->length) || mp_long_reads_first(r)))
        return false;
    if (!writable(r->engine) || !mp_journal_enter(&volume->journal, r->at, r->part))
        return false;
    hold(r);
    return true;
}

static bool granted(mp_engine *engine)
{
    bool holds = mp_grant_holds(engine, mp_boot_ns());
    engine->granted &= holds; /* somebody waits for it: the next time that it holds is news, however soon */
    return holds;
}

static bool behind_one(const mp_list *waiting, const mp_request *r)
{
    for (const mp_request *w = waiting->first; w && w->serial < r->serial; w = w->next)
        if (w->offset < r->offset + r->length && r->offset < w->offset + w->length)
            return true;
    return false;
}

void mp_request_submit(mp_request *r)
{
    if (r->op == MP_OP_FLUSH) {
        mp_barrier_flush(r);
        return;
    }
    mp_volume *volume = r->volume;
    if (!r->piece)
        r->serial = ++r->engine->serial;
    r->at = r->offset;
    r->part = r->op == MP_OP_ZERO ? mp_min(MP_CHUNK, r->length) : r->length;
    if (granted(r->engine) && !behind_one(&volume->waiting, r) && start(r))
        return;
    wait_in_line(r);
}

static bool behind(const mp_engine *engine, uint32_t count, const mp_request *r)
{
    uint64_t begin = r->offset, end = begin + r->length;
    unsigned hit = 0;
    for (uint32_t i = 0; i < count; i++) /* without a branch, as in flight.c */
        hit |= (unsigned)(engine->before[i] < end) & (unsigned)(begin < engine->before_end[i]);
    return hit;
}

void mp_request_round(mp_engine *engine)
{
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_volume *volume = &engine->volume[i];
        if (!volume->look_again)
            continue;
        volume->look_again = false;
        if (!volume->waiting.first || !granted(engine))
            continue;
        mp_list all = volume->waiting;
        if (!all.first)
            continue;
        mp_list_init(&volume->waiting);
        uint32_t count = 0;
        for (mp_request *r; (r = mp_list_take(&all));)
            if ((!r->placed && behind(engine, count, r)) || !start(r)) {
                engine->before[count] = r->offset;
                engine->before_end[count++] = r->offset + r->length;
                mp_list_put(&volume->waiting, r);
            }
    }
}

/* --- the peer's part --- */

void mp_request_acked(mp_engine *engine, uint64_t tag)
{
    uint32_t index = (uint32_t)(tag & TAG_INDEX);
    mp_request *r = index < engine->requests ? engine->request[index] : NULL;
    if (!r || r->tag != tag || !r->holds || r->peer_done || r->on_wire) {
        mp_link_detach(engine, true, 1, "the peer confirmed a write that is not on its way");
        return;
    }
    uint64_t took = mp_now_ns() - r->sent_ns;
    engine->link.ack_ns = engine->link.ack_ns ? (engine->link.ack_ns * 15 + took) / 16 : took;
    mp_pace_answer(&engine->pace, took);
    r->peer_done = true;
    mp_request_settle(r);
}

void mp_request_resend(mp_engine *engine)
{
    for (mp_request *r = engine->held_first; r; r = r->next_held)
        if (!r->peer_done) {
            mp_journal_unflushed(&r->volume->journal, r->at, r->part);
            mp_link_send_write(r);
        }
}

void mp_request_link_lost(mp_engine *engine)
{
    for (mp_request *r = engine->held_first; r; r = r->next_held)
        r->on_wire = false;
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_journal_link_lost(&engine->volume[i].journal);
        mp_volume_look_again(&engine->volume[i]);
    }
    for (mp_request *r = engine->held_first, *next; r; r = next) { /* those that had both, and were only still on the wire */
        next = r->next_held;
        mp_request_settle(r);
    }
}

void mp_request_alone(mp_engine *engine)
{
    for (mp_request *r = engine->held_first, *next; r; r = next) {
        next = r->next_held;
        if (r->peer_done)
            continue;
        mp_journal_set(&r->volume->journal, r->at, r->part);
        r->peer_done = true;
        mp_request_settle(r);
    }
}

/* The local part of what is held goes on: its buffer is given back when that is done. */
void mp_request_abandon(mp_engine *engine)
{
    for (mp_request *r = engine->held_first, *next; r; r = next) {
        next = r->next_held;
        if (r->peer_done)
            continue;
        mp_journal_set(&r->volume->journal, r->at, r->part);
        r->abandoned = true;
        r->peer_done = true;
        mp_request_settle(r);
    }
}

static void forget_in(mp_list *list, const mp_client *client, const mp_volume *volume)
{
    mp_list all = *list;
    if (!all.first)
        return;
    mp_list_init(list);
    for (mp_request *r; (r = mp_list_take(&all));) {
        if (r->client != client || r->volume != volume) {
            mp_list_put(list, r);
            continue;
        }
        leave(r);
        mp_client_lost(r);
    }
}

void mp_request_forget(mp_client *client, mp_volume *volume)
{
    forget_in(&volume->waiting, client, volume);
    forget_in(&volume->engine->barrier.next, client, volume);
}
