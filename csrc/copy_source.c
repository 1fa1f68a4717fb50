/* copy_source.c - the sending end of a copy session. The protocol is told in wire.h.
 *
 * Units are planned in order, filled by the workers in any order, and sent in order. The ring below holds every unit from
 * the oldest unsettled one on, so its size is the credit: never more than MP_UNITS are on the way.
 *
 * What a WANT asks for goes out before new units are begun. So when the target falls behind, the scan waits for it and not
 * the other way round, and the second read of a block finds it in the page cache.
 *
 * When nearly all of the last windows differed, asking is a waste: data goes out unasked (BULK) for a while, then one window
 * of digests probes whether that still holds. The target compares before it writes either way.
 */
#define _GNU_SOURCE
#include "source.h"

#include "disk.h"

static void unit_sent(mp_outgoing *out)
{
    unit *u = (unit *)((char *)out - offsetof(unit, out));
    u->sent = true;
    if (u->kind == BULK)
        u->owner->bulk_data[--u->owner->bulk_open] = u->data;
}

static void send_ready(source *s)
{
    while (s->next_sent != s->next && unit_of(s, s->next_sent)->ready) {
        unit *u = unit_of(s, s->next_sent++);
        mp_session_send(&s->session, &u->out);
        if (u->kind == BULK)
            atomic_fetch_add(&s->copy->shared->progress.sent, u->out.frame.length - u->out.frame.meta);
    }
}

static void slot_sent(mp_outgoing *out)
{
    slot *t = (slot *)((char *)out - offsetof(slot, out));
    t->busy = false;
}

static bool mostly_differs(const source *s)
{
    return s->copy->write && !s->recheck && (!s->copy->rate || s->copy->rate >= 8 * MP_BULK) && s->recent_present >= 64 && s->recent_wanted >= s->recent_present - s->recent_present / 8;
}

/* Plans one unit and hands it to the workers. False: nothing is left, or nothing may be begun now. */
static bool plan(source *s)
{
    mp_copy *copy = s->copy;
    if (s->planned_all || s->next - s->oldest >= s->allowed)
        return false;
    uint64_t offset = s->cursor, length;
    unit_kind kind = DIGESTS;
    bool probe = false;
    if (s->recheck) {
        uint64_t first, last;
        if (!mp_bitmap_next(&copy->touched, mp_ceil_div(offset, MP_TOUCHED), &first, &last)) {
            s->planned_all = true;
            return false;
        }
        offset = mp_max(offset, first * MP_TOUCHED);
        length = mp_min(MP_WINDOW, copy->size - offset);
    } else {
        if (offset >= copy->size) {
            s->planned_all = true;
            return false;
        }
        uint64_t data = offset;
        if (offset >= s->extent_end) {
            int error = mp_disk_next_data(copy->source_fd, offset, copy->size, &data);
            if (!error)
                error = mp_disk_next_hole(copy->source_fd, data, copy->size, &s->extent_end);
            if (error) {
                mp_fault fault;
                mp_fault_io(&fault, error, MP_SIDE_SOURCE, offset, "find holes");
                mp_session_fail(&s->session, &fault);
                return false;
            }
        }
        uint64_t begin = data >= copy->size ? copy->size : mp_max(offset, mp_down(data, MP_WINDOW));
        if (begin > offset) {
            kind = ZEROS;
            length = mp_min(begin - offset, MP_ZERO_RUN);
            s->extent_end = 0; /* look again behind it */
        } else if (s->bulk && offset % MP_BULK == 0 && !(probe = offset % MP_WINDOW == 0 && s->bulk_run >= BULK_SPREE && !s->probing)) {
            kind = BULK;
            length = mp_min(MP_BULK, copy->size - offset);
        } else {
            length = mp_min(mp_down(offset, MP_WINDOW) + MP_WINDOW, copy->size) - offset;
        }
    }
    if (kind == BULK && s->bulk_open >= BULK_OPEN)
        return false;
    uint32_t id = s->next++;
    unit *u = unit_of(s, id);
    u->owner = s;
    u->id = id;
    u->kind = kind;
    u->shape = (mp_unit_shape){offset, length, copy->block};
    u->recheck = s->recheck;
    u->ready = u->settled = u->sent = false;
    u->probe = probe;
    if (probe)
        s->probing = true, s->bulk_run = 0;
    u->asked = u->answered = u->present = 0;
    u->status = MP_OK;
    memset(u->zero, 0, sizeof u->zero);
    u->out = (mp_outgoing){.frame = {.count = id, .offset = offset}, .sent = unit_sent};
    s->cursor = offset + length;
    if (kind == ZEROS) {
        mp_store64(u->meta, length);
        u->out.frame.type = MP_FRAME_ZEROS;
        u->out.frame.meta = u->out.frame.length = 8;
        u->out.meta = u->meta;
        u->ready = true;
        send_ready(s);
        return true;
    }
    if (kind == BULK) {
        s->bulk_run++;
        u->data = s->bulk_data[s->bulk_open++];
        s->paused_until_ns = mp_now_ns() + mp_copy_pace(copy, length);
        mp_copy_touch(copy, offset, length);
    }
    u->out.frame.type = kind == BULK ? MP_FRAME_BULK : MP_FRAME_DIGESTS;
    u->job.run = kind == BULK ? mp_source_run_bulk : mp_source_run_digests;
    mp_pool_submit(&copy->pool, &u->job);
    return true;
}

/* Where the part of a WANT ends that one slot can surely answer: so many blocks as fit its data, and under a rate limit not
 * more than an eighth of a second of it. The oldest unit is finished before the next: its end is progress. */
static uint32_t cut(const source *s, const want_frame *w)
{
    const unit *u = &s->units[w->frame.count % MP_UNITS];
    uint64_t room = s->copy->rate ? mp_min(MP_BULK, mp_max(s->copy->rate / 8, u->shape.block)) : MP_BULK;
    uint32_t at = w->at;
    mp_want want;
    for (uint64_t data = 0; at < w->frame.meta && data + u->shape.block <= room;) {
        MP_ASSERT(mp_want_next(&u->shape, w->meta, w->frame.meta, &at, &want)); /* checked when it came in */
        data += u->shape.block;
    }
    return at;
}

/* Gives the next part of the oldest WANT to a free slot. False: no want, no slot. */
static bool serve_want(source *s)
{
    want_frame *w = s->wants;
    if (!w)
        return false;
    for (unsigned i = 0; i < SLOTS; i++) {
        slot *t = &s->slots[i];
        if (t->busy)
            continue;
        t->job.run = mp_source_run_slot;
        t->out = (mp_outgoing){.sent = slot_sent};
        t->owner = s;
        t->busy = true;
        t->want = w;
        t->at = w->at;
        t->end = w->at = cut(s, w);
        w->slots++;
        t->entries = t->answered = 0;
        t->data_length = 0;
        if (w->at == w->frame.meta && !(s->wants = w->next)) /* all of it is in work; freed by its last slot */
            s->wants_last = &s->wants;
        s->answering++;
        mp_pool_submit(&s->copy->pool, &t->job);
        return true;
    }
    return false;
}

static void pump(mp_session *session)
{
    source *s = session->owner;
    mp_copy *copy = s->copy;
    if (s->paused_until_ns && mp_now_ns() < s->paused_until_ns)
        return; /* the rate limit; the tick comes back */
    while (!session->closing && !(copy->rate && s->answering) && serve_want(s))
        ;
    while (!session->closing && !s->wants && session->chan->queued_bytes < QUEUE_MAX && plan(s))
        if (s->paused_until_ns > mp_now_ns())
            break;
    if (s->planned_all && s->oldest == s->next && !s->sync_sent && !session->closing) {
        mp_store64(s->sync_meta, s->recheck);
        s->sync = (mp_outgoing){.frame = {.type = MP_FRAME_SYNC, .meta = 8, .length = 8}, .meta = s->sync_meta};
        s->sync_sent = true;
        mp_copy_check_sizes(copy);
        if (copy->fault.status) {
            mp_session_fail(session, &(mp_fault){.status = copy->fault.status, .side = copy->fault.side, .offset = copy->fault.offset, .text = "the image shrank while it was read"});
            return;
        }
        if (!s->recheck) { /* the images are covered: nothing may still be on its way to the parent */
            if (!mp_copy_report_end(copy))
                mp_copy_fail(copy, &(mp_fault){.status = MP_CANCELLED});
        }
        mp_session_send(session, &s->sync);
    }
}

static void slot_finished(source *s, slot *t)
{
    want_frame *w = t->want;
    s->answering--;
    if (t->status) {
        mp_session_fail(&s->session, &t->fault);
        return;
    }
    mp_progress *progress = &s->copy->shared->progress;
    unit *u = unit_of(s, w->frame.count);
    u->answered += t->answered;
    atomic_fetch_add(&progress->sent, t->data_length);
    if (u->differ && s->copy->range_fd >= 0) {
        for (uint32_t i = 0; i < t->entries; i++) {
            mp_data_entry entry;
            MP_ASSERT(mp_data_entry_decode(&u->shape, t->meta + (size_t)i * MP_DATA_ENTRY, &entry));
            uint64_t first = (uint64_t)entry.block * (u->shape.block / MP_PIECE);
            for (uint64_t left = entry.pieces | entry.zeros; left; left &= left - 1)
                mp_bit_set(u->differ, (uint32_t)(first + (uint64_t)__builtin_ctzll(left)));
        }
    }
    if (--w->slots == 0 && w->at == w->frame.meta) {
        s->wants_bytes -= w->frame.meta;
        free(w);
    }
    t->want = NULL;
    uint64_t wait = mp_copy_pace(s->copy, t->data_length);
    if (wait)
        s->paused_until_ns = mp_now_ns() + wait;
    mp_session_send(&s->session, &t->out);
}

static void finished(mp_session *session, mp_job *job)
{
    source *s = session->owner;
    if (session->closing)
        return;
    if ((char *)job >= (char *)s->slots && (char *)job < (char *)(s->slots + SLOTS)) {
        slot_finished(s, (slot *)job);
        return;
    }
    unit *u = (unit *)job;
    if (u->status) {
        mp_session_fail(session, &u->fault);
        return;
    }
    u->ready = true;
    send_ready(s);
}

static void *payload(mp_session *session)
{
    source *s = session->owner;
    const mp_frame *frame = &session->chan->frame;
    if (frame->type == MP_FRAME_SETTLED || frame->type == MP_FRAME_SYNCED) {
        if (frame->length <= sizeof s->small && frame->length == frame->meta)
            return s->small;
    } else if (frame->type == MP_FRAME_WANT) {
        if (frame->length <= MP_WANT_META_MAX && frame->length == frame->meta && s->wants_bytes + frame->length <= WANTS_MAX) {
            s->receiving = malloc(sizeof *s->receiving + frame->length);
            if (s->receiving)
                return s->receiving->meta;
            mp_session_fail(session, &(mp_fault){.status = MP_INTERNAL, .text = "out of memory"});
            return NULL;
        }
    }
    mp_session_garbage(session, "the target sent a frame that it may not send");
    return NULL;
}

/* A unit that was sent and is not settled, or NULL. */
static unit *open_unit(source *s, const mp_frame *frame)
{
    if (frame->count - s->oldest >= s->next_sent - s->oldest)
        return NULL;
    unit *u = unit_of(s, frame->count);
    return u->settled || !u->sent ? NULL : u;
}

static void on_want(source *s, const mp_frame *frame)
{
    want_frame *w = s->receiving;
    s->receiving = NULL;
    unit *u = open_unit(s, frame);
    bool good = w && u && u->kind != BULK;
    uint32_t wanted = 0, limit = good ? mp_shape_blocks(&u->shape) : 0;
    mp_want want;
    uint32_t kept = 0; /* entries that are no wish are taken out: what is kept holds the unit open until it is answered */
    for (uint32_t at = 0, begin = 0; good && at < frame->meta; begin = at) {
        good = mp_want_next(&u->shape, w->meta, frame->meta, &at, &want);
        if (!good)
            break;
        uint64_t offset = (uint64_t)want.block * u->shape.block, length = mp_shape_block_length(&u->shape, want.block);
        if (want.kind == MP_WANT_ZERO) {
            for (uint64_t left = u->differ ? want.mask : 0; left; left &= left - 1)
                mp_bit_set(u->differ, (uint32_t)(offset / MP_PIECE + (uint64_t)__builtin_ctzll(left)));
        } else {
            good = u->kind == DIGESTS && !u->recheck; /* data is only ever asked of a window of digests */
            wanted++;
            memmove(w->meta + kept, w->meta + begin, at - begin);
            kept += at - begin;
        }
        mp_copy_touch(s->copy, u->shape.offset + offset, length);
    }
    if (!good || u->asked + wanted > 2 * limit) { /* each block at the most twice: once more after a failed merge */
        free(w);
        mp_session_garbage(&s->session, "the target asked for what it may not ask for");
        return;
    }
    u->asked += wanted;
    if (!wanted) {
        free(w);
        return;
    }
    w->frame = *frame;
    w->frame.meta = w->frame.length = kept;
    w->at = w->slots = 0;
    w->next = NULL;
    *s->wants_last = w;
    s->wants_last = &w->next;
    s->wants_bytes += kept;
}

static void on_settled(source *s, const mp_frame *frame)
{
    unit *u = open_unit(s, frame);
    if (!u || frame->length != sizeof s->small || u->answered != u->asked || mp_load64(s->small) > u->shape.length || mp_load64(s->small + 8) + mp_load64(s->small + 16) > u->shape.length
        || mp_load64(s->small + 24) > mp_shape_blocks(&u->shape) || mp_load64(s->small + 32) > mp_shape_blocks(&u->shape)) {
        mp_session_garbage(&s->session, "the target settled a unit that is not open");
        return;
    }
    uint64_t equal = mp_load64(s->small);
    mp_progress *progress = &s->copy->shared->progress;
    u->settled = true;
    if (u->recheck) {
        atomic_fetch_add(&progress->recheck_done, equal);
    } else {
        atomic_fetch_add(&progress->done, u->shape.length);
        atomic_fetch_add(&progress->skipped, equal);
        atomic_fetch_add(&progress->written, mp_load64(s->small + 8));
        atomic_fetch_add(&progress->punched, mp_load64(s->small + 16));
        atomic_fetch_add(&progress->changed_blocks, mp_load64(s->small + 24));
        atomic_fetch_add(&progress->differing_blocks, mp_load64(s->small + 32));
        atomic_fetch_add(&progress->differing, u->shape.length - equal);
    }
    if (u->probe)
        s->probing = false;
    if (u->kind == BULK || u->probe) {
        if (equal > u->shape.length / 2) {
            s->bulk = false;
            s->recent_present = s->recent_wanted = 0;
        }
    } else if (u->kind == DIGESTS && !u->recheck) {
        uint32_t zeros = 0;
        for (unsigned i = 0; i < MP_BIT_WORDS; i++)
            zeros += (uint32_t)__builtin_popcountll(u->zero[i]);
        s->recent_present += u->present - zeros;
        /* A block of which a small part differs is cheaper refined than sent: count bytes, in blocks. */
        s->recent_wanted += (uint32_t)((u->shape.length - equal) / u->shape.block);
        if (mostly_differs(s) && !s->bulk)
            s->bulk = true, s->bulk_run = 0;
        if (s->recent_present > 512)
            s->recent_present /= 2, s->recent_wanted /= 2;
    }
    if (s->allowed < MP_UNITS)
        s->allowed++;
    while (s->oldest != s->next_sent && unit_of(s, s->oldest)->settled) {
        unit *old = unit_of(s, s->oldest++);
        if (!old->differ || old->recheck)
            continue;
        mp_bitmap pieces;
        mp_bitmap_init(&pieces, old->differ, mp_ceil_div(old->shape.length, MP_PIECE));
        if (!mp_copy_report(s->copy, old->shape.offset, old->shape.length, &pieces))
            mp_session_fail(&s->session, &(mp_fault){.status = MP_CANCELLED});
        memset(old->differ, 0, mp_bitmap_bytes(pieces.bits));
    }
}

static void on_synced(source *s, const mp_frame *frame)
{
    mp_copy *copy = s->copy;
    if (frame->length != 8 || !s->sync_sent || mp_load64(s->small) != s->recheck) {
        mp_session_garbage(&s->session, "the target reports an end that was not asked for");
        return;
    }
    if (copy->recheck && !s->recheck) {
        atomic_store(&copy->shared->progress.recheck_total, mp_bitmap_count(&copy->touched) * MP_TOUCHED);
        s->recheck = true;
        s->planned_all = s->sync_sent = false;
        s->cursor = 0;
        return;
    }
    mp_session_end(&s->session, false);
}

static void frame(mp_session *session, const mp_frame *frame, void *payload)
{
    source *s = session->owner;
    if (!payload || !mp_chan_check(frame, payload)) {
        free(s->receiving);
        s->receiving = NULL;
        mp_session_garbage(session, "a frame's payload fails its digest");
    } else if (frame->type == MP_FRAME_WANT) {
        on_want(s, frame);
    } else if (frame->type == MP_FRAME_SETTLED) {
        on_settled(s, frame);
    } else {
        on_synced(s, frame);
    }
}

/* Own jobs are at work, or the target's fdatasync: that of a full cache onto a slow disk takes minutes. */
static bool waits_rightly(mp_session *session)
{
    const source *s = session->owner;
    return s->sync_sent || s->copy->pool.pending;
}

static bool make(source *s, mp_copy *copy)
{
    s->copy = copy;
    s->allowed = 4;
    s->wants_last = &s->wants;
    for (unsigned i = 0; i < MP_UNITS; i++) {
        if (!(s->units[i].meta = malloc(MP_DIGESTS_META_MAX)))
            return false;
        if (copy->range_fd >= 0 && !(s->units[i].differ = calloc(1, mp_bitmap_bytes(MP_ZERO_RUN / MP_PIECE))))
            return false;
    }
    for (unsigned i = 0; i < BULK_OPEN; i++)
        if (!(s->bulk_data[i] = malloc(MP_BULK)))
            return false;
    for (unsigned i = 0; i < SLOTS; i++)
        if (!(s->slots[i].meta = malloc(MP_DATA_META_MAX)) || !(s->slots[i].data = malloc(MP_BULK)))
            return false;
    return true;
}

static void unmake(source *s)
{
    for (unsigned i = 0; i < MP_UNITS; i++) {
        free(s->units[i].meta);
        free(s->units[i].differ);
    }
    for (unsigned i = 0; i < SLOTS; i++) {
        free(s->slots[i].meta);
        free(s->slots[i].data);
    }
    free(s->receiving);
    for (want_frame *w = s->wants, *next; w; w = next) {
        next = w->next;
        free(w);
    }
}

void mp_copy_source(mp_copy *copy)
{
    static const mp_session_ops ops = {payload, frame, finished, pump, waits_rightly};
    source *s = NULL;
    if (mp_copy_begin(copy) == MP_OK) {
        s = calloc(1, sizeof *s);
        if (s && make(s, copy))
            mp_session_run(&s->session, copy, &ops, s);
        else
            mp_copy_fail(copy, &(mp_fault){.status = MP_INTERNAL, .text = "out of memory"});
    }
    mp_copy_finish(copy); /* joins the workers, who may still use the units */
    if (s)
        unmake(s);
    free(s);
}
