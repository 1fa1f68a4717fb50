/* cover.c - a source whose own disk fails or hangs: what the peer has covers for it (F8, F9, A14).
 *
 * The control plane says with the grant how far the peer may be relied on (`mp_cover`):
 *   MP_COVER_READS  the peer is linked and equal: what this disk cannot read is read there
 *   MP_COVER_HOLD   the peer is in the in-sync set, and this node can abdicate: an error of this disk is nobody's answer yet
 *
 * Rules
 *  - A14 a write that the peer has and this disk lacks is held, with its range, until the abdication is durable (`forgive`:
 *    it is answered well), or there will be none (the grant comes without HOLD: it is answered with this disk's error). A
 *    FLUSH that is durable at the peer only, likewise. While no role is granted nothing is decided about them.
 *  - A6 a read that goes to the peer holds its range against later writes, like one in the pool; the writes in front of it
 *    are confirmed by the peer before it is sent. So it reads what a local one would have read.
 *  - A read that was on its way when the link was lost is asked again on the next one. One that failed here waits for that
 *    as long as HOLD says that there is a peer to wait for.
 *  - While the disk is slow (a job has been running for SLOW) what is not in the page cache is read from the peer at once:
 *    the pool's threads may all hang.
 *  - The peer reads into buffers of its own budget for reads, and pauses the link when that is used up. It never waits for
 *    the source to do anything but take what it sends.
 */
#include "engine.h"

#include <errno.h>

#define SLOW ((uint64_t)1 * 1000000000)
#define TAG_INDEX 0x7fffu

static mp_request *by_tag(mp_engine *engine, uint64_t tag)
{
    uint32_t index = (uint32_t)(tag & TAG_INDEX);
    mp_request *r = index < engine->requests ? engine->request[index] : NULL;
    return r && r->tag == tag && r->holds && r->elsewhere && !r->on_wire ? r : NULL;
}

bool mp_cover_holds(const mp_engine *engine) { return engine->grant.cover & MP_COVER_HOLD; }

static bool peer_reads(const mp_engine *engine)
{
    return engine->link.up && engine->link.source && engine->grant.cover & MP_COVER_READS;
}

bool mp_cover_slow(const mp_engine *engine) { return engine->disk_slow && peer_reads(engine); }

void mp_cover_tick(mp_engine *engine, uint64_t now_ns)
{
    engine->disk_slow = mp_pool_oldest_ns(&engine->pool, now_ns) > SLOW;
    if (!engine->reads_elsewhere || !engine->link.up)
        return;
    for (uint32_t i = 0; i < engine->requests; i++) {
        const mp_request *r = engine->request[i];
        if (!r->holds || !r->elsewhere || r->apply || now_ns - mp_min(now_ns, r->sent_ns) <= engine->link.timeout_ns)
            continue;
        mp_link_detach(engine, true, 13, "the peer left a read unanswered for %.1f s", (double)(now_ns - r->sent_ns) / 1e9);
        return;
    }
}

/* --- reads, at the source --- */

static void let_go(mp_request *r)
{
    r->holds = r->elsewhere = false;
    r->engine->reads_elsewhere--;
    mp_flight_leave(&r->volume->reading, r->place);
    mp_volume_look_again(r->volume);
}

mp_cover_verdict mp_cover_read(mp_request *r)
{
    mp_engine *engine = r->engine;
    if (peer_reads(engine)) {
        if (mp_flight_full(&r->volume->reading))
            return MP_COVER_WAIT;
        r->place = mp_flight_enter(&r->volume->reading, r->offset, r->length);
        r->holds = r->elsewhere = true;
        engine->reads_elsewhere++;
        mp_link_send_read(r);
        return MP_COVER_DONE;
    }
    if (!r->here)
        return MP_COVER_HERE;
    if (mp_cover_holds(engine))
        return MP_COVER_WAIT;
    r->error = r->here;
    mp_request_end(r);
    return MP_COVER_DONE;
}

void *mp_cover_answer_buffer(mp_engine *engine, const mp_frame *frame)
{
    mp_request *r = by_tag(engine, frame->count);
    return r && !r->apply && engine->link.source && !frame->meta && frame->length == r->length ? r->buffer : NULL;
}

bool mp_cover_answered(mp_engine *engine, const mp_frame *frame)
{
    mp_request *r = by_tag(engine, frame->count);
    if (!r || r->apply || !engine->link.source || (frame->length && frame->length != r->length))
        return false;
    let_go(r);
    r->error = frame->length ? 0 : r->here ? r->here : EIO; /* empty: it cannot read that either */
    mp_request_end(r);
    return true;
}

/* --- reads, at the peer --- */

/* The length comes with the payload: so the largest buffer that there is. */
void *mp_cover_ask_buffer(mp_engine *engine, const mp_frame *frame, mp_volume *volume)
{
    mp_request *r = mp_request_new(engine);
    if (r)
        r->op = MP_OP_READ;
    if (r && !mp_request_buffer(r, MP_SLAB_READ_MAX)) {
        mp_request_free(r);
        r = NULL;
    }
    if (!r) {
        engine->link.paused = true;
        return NULL;
    }
    r->volume = volume;
    r->apply = true;
    r->cookie = frame->count;
    r->session = frame->session;
    r->offset = frame->offset;
    engine->link.receiving = r;
    return r->meta;
}

bool mp_cover_asked(mp_engine *engine)
{
    mp_request *r = engine->link.receiving;
    if (!r)
        return false;
    r->length = mp_load64(r->meta);
    if (!r->length || r->length > MP_SLAB_READ_MAX || r->offset > r->volume->size || r->length > r->volume->size - r->offset)
        return false; /* whoever ends the link frees it */
    engine->link.receiving = NULL;
    mp_pool_submit(&engine->pool, &r->job);
    return true;
}

static void sent(mp_outgoing *out)
{
    mp_request *r = (mp_request *)((char *)out - offsetof(mp_request, out));
    r->on_wire = false;
    mp_request_free(r);
}

void mp_cover_served(mp_request *r)
{
    mp_link *link = &r->engine->link;
    if (!link->up || r->session != link->chan.session) {
        mp_request_free(r);
        return;
    }
    r->out = (mp_outgoing){.sent = sent, .data = r->error ? NULL : r->buffer,
                           .frame = {.type = MP_FRAME_READ_DATA, .flags = (uint16_t)r->volume->index, .count = (uint32_t)r->cookie, .offset = r->offset, .epoch = link->epoch,
                                     .length = r->error ? 0 : (uint32_t)r->length}};
    r->on_wire = true;
    mp_chan_queue(&link->chan, &r->out);
}

void mp_cover_link_lost(mp_engine *engine)
{
    for (uint32_t i = 0; i < engine->requests; i++) {
        mp_request *r = engine->request[i];
        if (r->op != MP_OP_READ)
            continue;
        if (r->apply && r->on_wire) {
            r->on_wire = false;
            mp_request_free(r);
        } else if (!r->apply && r->holds && r->elsewhere) {
            r->on_wire = false;
            let_go(r);
            if (mp_client_gone(r))
                mp_client_lost(r); /* nobody may ever look again */
            else
                mp_request_wait(r); /* to be read there, or here, when somebody looks */
        }
    }
}

/* --- what this disk lacks --- */

void mp_cover_doubt(mp_request *r)
{
    if (mp_cover_holds(r->engine) || r->engine->grant.mode == MP_GRANT_NONE) {
        mp_list_put(&r->engine->doubted, r);
        return;
    }
    r->error = r->here;
    mp_request_end(r);
}

static void end_all(mp_engine *engine, bool good, bool abandoned)
{
    mp_list all = engine->doubted;
    if (!all.first)
        return;
    mp_list_init(&engine->doubted);
    for (mp_request *r; (r = mp_list_take(&all));) {
        r->error = good ? 0 : r->here;
        r->abandoned = abandoned;
        mp_request_end(r);
    }
}

void mp_cover_changed(mp_engine *engine)
{
    if (engine->grant.mode != MP_GRANT_NONE && !mp_cover_holds(engine))
        end_all(engine, false, false);
}

void mp_cover_forgive(mp_engine *engine)
{
    end_all(engine, true, false);
    mp_clients_send(engine);
}

void mp_cover_abandon(mp_engine *engine) { end_all(engine, false, true); }
