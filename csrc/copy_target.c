/* copy_target.c - the receiving end of a copy session. The protocol is told in wire.h.
 *
 * Rules
 *  - Nothing is written that was not verified first: a frame's digest before its data is used, and for a merged block the
 *    128-bit digest that the source announced for it (R7).
 *  - A piece that is equal is never written. A differing zero piece becomes a hole where the image can (R8).
 *  - A frame that is not exactly what may come next is garbage and ends the session: units in order and without gaps, data
 *    only for blocks that were asked for, each once.
 *
 * Whether a differing block is refined to pieces or wanted whole is learnt from the last ones: tags are a waste where
 * everything differs.
 */
#define _GNU_SOURCE
#include "target.h"

static void settled_sent(mp_outgoing *out) { ((unit *)((char *)out - offsetof(unit, settled)))->settled_queued = false; }

static void settle_if_done(target *t, unit *u)
{
    if (!u->open || !u->compared || u->want_queued || u->slots || u->answered != u->asked)
        return;
    mp_progress *progress = &t->copy->shared->progress;
    u->open = false;
    mp_store64(u->settled_meta, u->equal);
    mp_store64(u->settled_meta + 8, u->written);
    mp_store64(u->settled_meta + 16, u->punched);
    mp_store64(u->settled_meta + 24, u->changed);
    mp_store64(u->settled_meta + 32, u->differing_blocks);
    u->settled = (mp_outgoing){.frame = {.type = MP_FRAME_SETTLED, .count = u->id, .offset = u->shape.offset, .meta = MP_SETTLED_META, .length = MP_SETTLED_META},
                               .meta = u->settled_meta, .sent = settled_sent};
    u->settled_queued = true;
    mp_session_send(&t->session, &u->settled);
    if (u->recheck) {
        atomic_fetch_add(&progress->recheck_done, u->equal);
    } else {
        atomic_fetch_add(&progress->done, u->shape.length);
        atomic_fetch_add(&progress->skipped, u->equal);
        atomic_fetch_add(&progress->changed_blocks, u->changed);
        atomic_fetch_add(&progress->differing, u->shape.length - u->equal);
        atomic_fetch_add(&progress->differing_blocks, u->differing_blocks);
    }
    while (t->oldest != t->next && !unit_of(t, t->oldest)->open) {
        unit *old = unit_of(t, t->oldest++);
        if (!old->differ || old->recheck)
            continue;
        mp_bitmap pieces;
        mp_bitmap_init(&pieces, old->differ, mp_ceil_div(old->shape.length, MP_PIECE));
        if (!mp_copy_report(t->copy, old->shape.offset, old->shape.length, &pieces))
            mp_session_fail(&t->session, &(mp_fault){.status = MP_CANCELLED});
        memset(old->differ, 0, mp_bitmap_bytes(pieces.bits));
    }
}

static void want_sent(mp_outgoing *out)
{
    unit *u = (unit *)((char *)out - offsetof(unit, want));
    u->want_queued = false;
    u->want.frame.meta = u->want.frame.length = 0;
    if (u->kind == ZEROS && u->zeros_at < u->shape.offset + u->shape.length)
        mp_pool_submit(&u->owner->copy->pool, &u->job);
    /* Settling waits for pump(): it may queue a frame, and this is called from inside the flush. */
}

static void retry_sent(mp_outgoing *out)
{
    slot *t = (slot *)((char *)out - offsetof(slot, retry));
    t->busy = false;
}

/* Seven eighths of the pieces of the last refined blocks differ: blocks are wanted whole for a while, then one tries again. */
static void learn(target *t, uint32_t pieces, uint32_t differ, uint32_t asked_whole)
{
    t->refined_pieces += pieces;
    t->refined_differ += differ;
    t->asked_whole += asked_whole;
    if (t->refined_pieces > 4096 || t->asked_whole > 1024) {
        t->refined_pieces /= 2;
        t->refined_differ /= 2;
    }
    if (t->asked_whole > 1024)
        t->asked_whole = t->refined_pieces = t->refined_differ = 0;
    t->whole = t->refined_pieces >= 1024 && t->refined_differ >= t->refined_pieces - t->refined_pieces / 8;
}

static void unit_finished(target *t, unit *u)
{
    if (u->status) {
        mp_session_fail(&t->session, &u->fault);
        return;
    }
    if (u->recheck && u->differing_blocks) {
        mp_session_fail(&t->session, &(mp_fault){.status = MP_RECHECK, .side = MP_SIDE_TARGET, .offset = u->shape.offset, .text = "what was written does not read back"});
        return;
    }
    learn(t, 0, 0, u->asked_whole);
    bool walked = u->kind != ZEROS || u->zeros_at == u->shape.offset + u->shape.length;
    if (u->want.frame.meta) {
        u->want_queued = true;
        mp_session_send(&t->session, &u->want);
    } else if (!walked) {
        mp_pool_submit(&t->copy->pool, &u->job);
    }
    u->compared = walked;
    settle_if_done(t, u);
}

static void slot_finished(target *t, slot *s)
{
    if (s->status) {
        mp_session_fail(&t->session, &s->fault);
        return;
    }
    unit *u = s->unit;
    u->slots--;
    learn(t, s->refined_pieces, s->refined_differ, 0);
    u->answered += s->answered;
    u->equal += s->equal;
    u->written += s->written;
    u->punched += s->punched;
    u->changed += s->changed;
    u->differing_blocks += s->differing_blocks;
    atomic_fetch_add(&t->copy->shared->progress.sent, s->frame.length - s->frame.meta);
    if (s->frame.type == MP_FRAME_BULK)
        u->compared = true;
    if (s->retries) {
        u->asked += s->retries;
        s->retry = (mp_outgoing){.frame = {.type = MP_FRAME_WANT, .count = u->id, .offset = u->shape.offset, .meta = 8 * s->retries, .length = 8 * s->retries},
                                 .meta = s->retry_meta, .sent = retry_sent};
        mp_session_send(&t->session, &s->retry);
    } else {
        s->busy = false;
    }
    mp_session_resume(&t->session);
    settle_if_done(t, u);
}

static void finished(mp_session *session, mp_job *job)
{
    target *t = session->owner;
    if (session->closing)
        return;
    if (job == &t->sync_job) {
        t->syncing = false;
        if (t->sync_error) {
            mp_fault fault;
            mp_fault_io(&fault, t->sync_error, MP_SIDE_TARGET, 0, "fdatasync");
            mp_session_fail(session, &fault);
            return;
        }
        mp_store64(t->synced_meta, t->recheck);
        t->synced = (mp_outgoing){.frame = {.type = MP_FRAME_SYNCED, .meta = 8, .length = 8}, .meta = t->synced_meta};
        mp_session_send(session, &t->synced);
        if (!t->copy->recheck || t->recheck) {
            if (!mp_copy_report_end(t->copy))
                mp_copy_fail(t->copy, &(mp_fault){.status = MP_CANCELLED});
            mp_session_end(session, true);
            return;
        }
        t->recheck = true;
        t->cursor = 0;
        t->copy->target.always_cold = true; /* no job is running: the pass is over */
        atomic_store(&t->copy->shared->progress.recheck_total, mp_bitmap_count(&t->copy->touched) * MP_TOUCHED);
    } else if ((char *)job >= (char *)t->slots && (char *)job < (char *)(t->slots + SLOTS)) {
        slot_finished(t, (slot *)job);
    } else {
        unit_finished(t, (unit *)job);
    }
}

/* The place of a unit that may come now, or NULL. */
static unit *next_unit(target *t, const mp_frame *frame, uint64_t length)
{
    uint64_t size = t->copy->size;
    if (t->syncing || frame->count != t->next || t->next - t->oldest >= MP_UNITS || !length || frame->offset >= size || length > size - frame->offset
        || frame->offset % MP_PIECE)
        return NULL;
    if (t->recheck ? frame->offset < t->cursor : frame->offset != t->cursor)
        return NULL;
    unit *u = unit_of(t, frame->count);
    return u->settled_queued ? NULL : u; /* the place is taken until the source can know that it is free */
}

static void open_unit(target *t, unit *u, const mp_frame *frame, unit_kind kind, mp_unit_shape shape)
{
    u->owner = t;
    u->kind = kind;
    u->id = frame->count;
    u->shape = shape;
    u->open = true;
    u->compared = u->want_queued = false;
    u->recheck = t->recheck;
    u->asked = u->answered = u->asked_whole = u->slots = 0;
    u->zeros_at = shape.offset;
    u->equal = u->written = u->punched = u->changed = u->differing_blocks = 0;
    u->status = MP_OK;
    for (unsigned i = 0; i < MP_BIT_WORDS; i++)
        u->wanted[i] = u->retried[i] = 0;
    u->want = (mp_outgoing){.frame = {.type = MP_FRAME_WANT, .count = u->id, .offset = shape.offset}, .meta = u->want_meta, .sent = want_sent};
    t->next++;
    t->cursor = shape.offset + shape.length;
}

static void *payload(mp_session *session)
{
    target *t = session->owner;
    const mp_frame *frame = &session->chan->frame;
    switch (frame->type) {
    case MP_FRAME_DIGESTS:
        if (frame->length <= MP_DIGESTS_META_MAX && frame->count == t->next && t->next - t->oldest < MP_UNITS)
            return unit_of(t, t->next)->meta;
        break;
    case MP_FRAME_ZEROS:
    case MP_FRAME_SYNC:
        if (frame->length == 8 && frame->meta == 8)
            return t->small;
        break;
    case MP_FRAME_BULK:
    case MP_FRAME_DATA:
    case MP_FRAME_MARKS:
        if ((frame->type == MP_FRAME_MARKS) == t->copy->write)
            break;
        for (unsigned i = 0; i < SLOTS; i++)
            if (!t->slots[i].busy) {
                t->receiving = &t->slots[i];
                return t->slots[i].payload;
            }
        return NULL; /* all are being written: the connection waits */
    default:
        break;
    }
    mp_session_garbage(session, "the source sent a frame that it may not send");
    return NULL;
}

static bool on_digests(target *t, const mp_frame *frame, const uint8_t *meta)
{
    unit *u = unit_of(t, t->next);
    if (!mp_digests_decode(&u->digests, frame, meta, t->copy->block) || !next_unit(t, frame, u->digests.shape.length)
        || (u->digests.flags & MP_UNIT_RECHECK) != (t->recheck ? MP_UNIT_RECHECK : 0))
        return false;
    for (uint32_t i = 0; !t->recheck && i < mp_shape_blocks(&u->digests.shape); i++)
        if (!mp_bit(u->digests.present, i))
            return false; /* every byte must be accounted for */
    open_unit(t, u, frame, DIGESTS, u->digests.shape);
    u->job.run = mp_target_run_compare;
    mp_pool_submit(&t->copy->pool, &u->job);
    return true;
}

static bool on_zeros(target *t, const mp_frame *frame)
{
    uint64_t length = mp_load64(t->small);
    unit *u = length <= MP_ZERO_RUN && !t->recheck ? next_unit(t, frame, length) : NULL;
    if (!u)
        return false;
    open_unit(t, u, frame, ZEROS, (mp_unit_shape){frame->offset, length, t->copy->block});
    u->job.run = mp_target_run_zeros;
    mp_pool_submit(&t->copy->pool, &u->job);
    return true;
}

static bool on_data(target *t, const mp_frame *frame)
{
    slot *s = t->receiving;
    t->receiving = NULL;
    if (!s)
        return false;
    if (frame->type == MP_FRAME_BULK) {
        mp_bulk bulk;
        unit *u = !t->recheck && mp_bulk_decode(&bulk, frame, s->payload, t->copy->block) ? next_unit(t, frame, bulk.shape.length) : NULL;
        if (!u)
            return false;
        open_unit(t, u, frame, BULK, bulk.shape);
        mp_copy_touch(t->copy, bulk.shape.offset, bulk.shape.length);
        s->unit = u;
    } else {
        s->unit = unit_of(t, frame->count);
        if (frame->count - t->oldest >= t->next - t->oldest || !s->unit->open || !s->unit->compared || s->unit->kind != DIGESTS || frame->meta % MP_DATA_ENTRY || frame->meta > MP_DATA_META_MAX)
            return false;
    }
    s->unit->slots++;
    s->owner = t;
    s->frame = *frame;
    s->busy = true;
    s->answered = s->retries = s->refined_pieces = s->refined_differ = 0;
    s->equal = s->written = s->punched = s->changed = s->differing_blocks = 0;
    s->status = MP_OK;
    s->job.run = mp_target_run_slot;
    mp_pool_submit(&t->copy->pool, &s->job);
    return true;
}

static bool on_sync(target *t)
{
    if (t->oldest != t->next || t->syncing || mp_load64(t->small) != t->recheck || (!t->recheck && t->cursor != t->copy->size))
        return false;
    t->syncing = true;
    t->sync_job.run = mp_target_run_sync;
    mp_pool_submit(&t->copy->pool, &t->sync_job);
    return true;
}

static void frame(mp_session *session, const mp_frame *frame, void *payload)
{
    target *t = session->owner;
    bool data = frame->type == MP_FRAME_BULK || frame->type == MP_FRAME_DATA || frame->type == MP_FRAME_MARKS;
    if (!payload || (!data && !mp_chan_check(frame, payload))) { /* data is checked by the worker that uses it */
        mp_session_garbage(session, "a frame's payload fails its digest");
        return;
    }
    bool good = frame->type == MP_FRAME_DIGESTS ? on_digests(t, frame, payload)
              : frame->type == MP_FRAME_ZEROS   ? on_zeros(t, frame)
              : frame->type == MP_FRAME_SYNC    ? on_sync(t)
                                                : on_data(t, frame);
    if (!good)
        mp_session_garbage(session, "the source sent a frame that may not come now");
}

static void pump(mp_session *session)
{
    target *t = session->owner;
    for (uint32_t id = t->oldest; id != t->next && !session->closing; id++)
        settle_if_done(t, unit_of(t, id));
}

static bool waits_rightly(mp_session *session)
{
    const target *t = session->owner;
    return t->copy->pool.pending; /* own jobs are at work */
}

static bool make(target *t, mp_copy *copy)
{
    t->copy = copy;
    for (unsigned i = 0; i < MP_UNITS; i++) {
        unit *u = &t->units[i];
        if (!(u->meta = malloc(MP_DIGESTS_META_MAX)) || !(u->want_meta = malloc(MP_WANT_META_MAX)))
            return false;
        if (copy->range_fd >= 0 && !(u->differ = calloc(1, mp_bitmap_bytes(MP_ZERO_RUN / MP_PIECE))))
            return false;
    }
    for (unsigned i = 0; i < SLOTS; i++)
        if (!(t->slots[i].payload = malloc(SLOT_BYTES)) || !(t->slots[i].retry_meta = malloc(8 * MP_WINDOW_BLOCKS_MAX)))
            return false;
    return true;
}

static void unmake(target *t)
{
    for (unsigned i = 0; i < MP_UNITS; i++) {
        free(t->units[i].meta);
        free(t->units[i].want_meta);
        free(t->units[i].differ);
    }
    for (unsigned i = 0; i < SLOTS; i++) {
        free(t->slots[i].payload);
        free(t->slots[i].retry_meta);
    }
}

void mp_copy_target(mp_copy *copy)
{
    static const mp_session_ops ops = {payload, frame, finished, pump, waits_rightly};
    target *t = NULL;
    if (mp_copy_begin(copy) == MP_OK) {
        t = calloc(1, sizeof *t);
        if (t && make(t, copy))
            mp_session_run(&t->session, copy, &ops, t);
        else
            mp_copy_fail(copy, &(mp_fault){.status = MP_INTERNAL, .text = "out of memory"});
    }
    mp_copy_finish(copy); /* joins the workers, who may still use the units */
    if (t)
        unmake(t);
    free(t);
}
