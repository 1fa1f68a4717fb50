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
#include "session.h"

#include "disk.h"

#define SLOTS 12u         /* payloads of DATA, BULK and MARKS: 12 x 1.25 MiB */
#define SLOT_BYTES (MP_FRAME_META_MAX + MP_BULK)

typedef enum unit_kind { DIGESTS, ZEROS, BULK } unit_kind;

typedef struct unit {
    mp_job job;
    mp_outgoing want, settled;
    struct target *owner;
    unit_kind kind;
    uint32_t id;
    mp_unit_shape shape;
    mp_digests digests;
    bool open, compared, want_queued, settled_queued, recheck;
    uint32_t slots; /* in the workers' hands */
    uint32_t asked, answered, asked_whole;
    _Atomic uint64_t wanted[MP_BIT_WORDS]; /* blocks asked for and not answered */
    _Atomic uint64_t retried[MP_BIT_WORDS];
    uint64_t zeros_at; /* ZEROS: how far it was walked */
    uint64_t equal, written, punched, changed, differing_blocks;
    uint8_t *meta;      /* the DIGESTS payload */
    uint8_t *want_meta; /* MP_WANT_META_MAX */
    uint8_t settled_meta[MP_SETTLED_META];
    uint64_t *differ; /* pieces, when ranges are wanted */
    mp_status status;
    mp_fault fault;
} unit;

typedef struct slot { /* one DATA, BULK or MARKS frame */
    mp_job job;
    mp_outgoing retry;
    struct target *owner;
    bool busy;
    mp_frame frame;
    unit *unit;
    uint8_t *payload, *retry_meta;
    uint32_t answered, retries, refined_pieces, refined_differ;
    uint64_t equal, written, punched, changed, differing_blocks;
    mp_status status;
    mp_fault fault;
} slot;

typedef struct target {
    mp_copy *copy;
    mp_session session;
    unit units[MP_UNITS];
    uint32_t next, oldest; /* unit numbers: the next to come, the oldest not settled or not reported */
    uint64_t cursor;       /* the next unit begins here */
    slot slots[SLOTS], *receiving;
    mp_job sync_job;
    bool syncing, recheck;
    int sync_error;
    mp_outgoing synced;
    uint8_t synced_meta[8], small[16];
    /* Whether refining pays. Kept by the loop, read by the workers. */
    uint32_t refined_pieces, refined_differ, asked_whole; /* of the last blocks; halved now and then */
    _Atomic bool whole;
} target;

static unit *unit_of(target *t, uint32_t id) { return &t->units[id % MP_UNITS]; }

/* --- in the workers ------------------------------------------------------------------------------------------------- */

static void mark(unit *u, uint32_t block, uint64_t mask)
{
    mp_bitmap map;
    if (!u->differ)
        return;
    mp_bitmap_init(&map, u->differ, MP_ZERO_RUN / MP_PIECE);
    for (; mask; mask &= mask - 1)
        mp_bitmap_set(&map, (uint64_t)block * (u->shape.block / MP_PIECE) + (uint64_t)__builtin_ctzll(mask));
}

static void put_want(unit *u, uint32_t block, uint32_t kind)
{
    mp_store32(u->want_meta + u->want.frame.meta, block);
    mp_store32(u->want_meta + u->want.frame.meta + 4, kind);
    u->want.frame.meta += 8;
}

/* A block that is zero at the source: what is not zero here becomes so. */
static mp_status settle_zero(mp_worker *worker, unit *u, mp_store *store, uint32_t block, uint64_t ahead, bool *differs)
{
    uint64_t offset = u->shape.offset + (uint64_t)block * u->shape.block, length = mp_shape_block_length(&u->shape, block);
    bool hole;
    const uint8_t *data;
    mp_status status = mp_reader_is_hole(&worker->target, offset, length, &hole, &u->fault);
    *differs = false;
    if (status)
        return status;
    if (hole) {
        u->equal += length;
        return MP_OK;
    }
    if ((status = mp_reader_get(&worker->target, offset, length, ahead, &data, &u->fault)))
        return status;
    uint64_t nonzero = mp_pieces_nonzero(data, length);
    u->equal += length - mp_mask_bytes(nonzero, length);
    if (!nonzero)
        return MP_OK;
    *differs = true;
    u->differing_blocks++;
    mark(u, block, nonzero);
    mp_copy_touch(u->owner->copy, offset, length);
    put_want(u, block, MP_WANT_ZERO);
    mp_store64(u->want_meta + u->want.frame.meta, nonzero);
    u->want.frame.meta += 8;
    for (uint64_t left = store ? nonzero : 0; left; left &= left - 1) {
        uint32_t i = (uint32_t)__builtin_ctzll(left);
        if ((status = mp_store_add(store, offset + i * MP_PIECE, mp_piece_length(length, i), NULL, &u->fault)))
            return status;
    }
    return MP_OK;
}

static mp_status compare_window(mp_worker *worker, void *argument)
{
    unit *u = argument;
    mp_copy *copy = worker->copy;
    mp_store store;
    mp_copy_store(copy, &store);
    uint32_t blocks = mp_shape_blocks(&u->shape);
    uint64_t end = u->shape.offset + u->shape.length;
    bool write = copy->write && !u->recheck;
    for (uint32_t i = 0; i < blocks; i++) {
        if (!mp_bit(u->digests.present, i))
            continue;
        uint64_t offset = u->shape.offset + (uint64_t)i * u->shape.block, length = mp_shape_block_length(&u->shape, i);
        mp_status status;
        bool hole, differs;
        const uint8_t *data;
        if (mp_bit(u->digests.zero, i)) {
            if ((status = settle_zero(worker, u, write ? &store : NULL, i, end - offset, &differs)))
                return status;
            continue;
        }
        if ((status = mp_reader_is_hole(&worker->target, offset, length, &hole, &u->fault)))
            return status;
        if (!hole && (status = mp_reader_get(&worker->target, offset, length, end - offset, &data, &u->fault)))
            return status;
        if (!hole && mp_digest_equal(mp_digests_of(&u->digests, i), mp_digest128(data, length, copy->seed))) {
            u->equal += length;
            continue;
        }
        u->differing_blocks++;
        u->asked++;
        atomic_fetch_or(&u->wanted[i / 64], 1ull << (i % 64));
        if (hole || mp_is_zero(data, length)) {
            put_want(u, i, MP_WANT_EMPTY);
        } else if (copy->write && (u->shape.block == MP_PIECE || u->owner->whole)) {
            put_want(u, i, MP_WANT_WHOLE);
            u->asked_whole++;
        } else {
            put_want(u, i, MP_WANT_REFINE);
            for (uint32_t piece = 0; piece < mp_pieces_of(length); piece++) {
                mp_store32(u->want_meta + u->want.frame.meta, mp_piece_tag(data + piece * MP_PIECE, mp_piece_length(length, piece), copy->seed));
                u->want.frame.meta += 4;
            }
        }
    }
    mp_status status = mp_store_flush(&store, &u->fault);
    u->written += store.written;
    u->punched += store.punched;
    return status;
}

static void run_compare(mp_job *job, void *argument)
{
    unit *u = (unit *)job;
    mp_worker *worker = argument;
    mp_reader_begin(&worker->target, &worker->copy->target, u->shape.offset, u->shape.length);
    u->status = mp_worker_guarded(worker, compare_window, u, &u->fault);
    mp_reader_end(&worker->target);
    u->want.frame.length = u->want.frame.meta;
}

static mp_status clear_window(mp_worker *worker, void *argument)
{
    unit *u = argument;
    mp_store store;
    mp_copy_store(worker->copy, &store);
    uint64_t end = worker->target.offset + worker->target.length;
    mp_status status = MP_OK;
    for (uint64_t at = worker->target.offset; at < end && !status; at += u->shape.block) {
        bool differs;
        status = settle_zero(worker, u, worker->copy->write ? &store : NULL, (uint32_t)((at - u->shape.offset) / u->shape.block), end - at, &differs);
    }
    if (!status)
        status = mp_store_flush(&store, &u->fault);
    u->written += store.written;
    u->punched += store.punched;
    return status;
}

/* One step through a hole of the source: the next window here that holds data. The loop calls again until zeros_at is at
 * the end, so that the questions of each step are on their way before the next begins. */
static void run_zeros(mp_job *job, void *argument)
{
    unit *u = (unit *)job;
    mp_worker *worker = argument;
    mp_copy *copy = worker->copy;
    uint64_t end = u->shape.offset + u->shape.length, data;
    while (u->zeros_at < end && !u->want.frame.meta && !mp_copy_cancelled(copy)) {
        int error = mp_disk_next_data(copy->target_fd, u->zeros_at, end, &data);
        if (error) {
            u->status = mp_fault_io(&u->fault, error, MP_SIDE_TARGET, u->zeros_at, "find holes");
            return;
        }
        if (data < end)
            data = u->shape.offset + mp_down(data - u->shape.offset, u->shape.block);
        data = mp_max(data, u->zeros_at);
        u->equal += data - u->zeros_at;
        u->zeros_at = data;
        if (data == end)
            break;
        uint64_t length = mp_min(MP_WINDOW, end - data);
        mp_reader_begin(&worker->target, &copy->target, data, length);
        u->status = mp_worker_guarded(worker, clear_window, u, &u->fault);
        mp_reader_end(&worker->target);
        if (u->status)
            return;
        u->zeros_at += length;
    }
    u->want.frame.length = u->want.frame.meta;
}

/* Writes pieces of one block: those in `pieces` from `from` (packed one behind the other), those in `zeros` as holes. With
 * `own`, a piece that is equal to it is left alone. */
static mp_status write_block(slot *t, mp_store *store, uint32_t block, uint64_t pieces, uint64_t zeros, const uint8_t *from, const uint8_t *own)
{
    const unit *u = t->unit;
    uint64_t offset = u->shape.offset + (uint64_t)block * u->shape.block, length = mp_shape_block_length(&u->shape, block), differ = 0;
    for (uint32_t i = 0; i < mp_pieces_of(length); i++) {
        uint64_t piece = mp_piece_length(length, i);
        const uint8_t *here = own ? own + i * MP_PIECE : NULL, *data = NULL;
        if (pieces >> i & 1) {
            data = from;
            from += piece;
            bool zero = mp_is_zero(data, piece); /* BULK sends a block's zero pieces like the others; they land as holes too */
            if (here ? memcmp(here, data, piece) == 0 : zero)
                continue;
            if (zero)
                data = NULL;
        } else if (!(zeros >> i & 1) || !here || mp_is_zero(here, piece)) {
            continue;
        }
        differ |= 1ull << i;
        mp_status status = mp_store_add(store, offset + i * MP_PIECE, piece, data, &t->fault);
        if (status)
            return status;
    }
    t->equal += length - mp_mask_bytes(differ, length);
    return MP_OK;
}

/* Own content of a block, NULL for a hole. */
static mp_status own_block(mp_worker *worker, slot *t, uint32_t block, uint64_t ahead, const uint8_t **own)
{
    const unit *u = t->unit;
    uint64_t offset = u->shape.offset + (uint64_t)block * u->shape.block, length = mp_shape_block_length(&u->shape, block);
    bool hole;
    *own = NULL;
    mp_status status = mp_reader_is_hole(&worker->target, offset, length, &hole, &t->fault);
    if (!status && !hole)
        status = mp_reader_get(&worker->target, offset, length, ahead, own, &t->fault);
    return status;
}

static mp_status bad(slot *t, const char *what)
{
    t->fault = (mp_fault){.status = MP_PEER_GARBAGE};
    snprintf(t->fault.text, sizeof t->fault.text, "%s", what);
    return MP_PEER_GARBAGE;
}

/* The pieces of a refined block laid over the own ones: must have the announced digest. */
static bool merges(mp_worker *worker, const slot *t, const mp_data_entry *entry, const uint8_t *from, const uint8_t *own)
{
    const unit *u = t->unit;
    uint64_t length = mp_shape_block_length(&u->shape, entry->block);
    if (own)
        memcpy(worker->block, own, length);
    else
        memset(worker->block, 0, length);
    for (uint64_t left = entry->pieces | entry->zeros; left; left &= left - 1) {
        uint32_t i = (uint32_t)__builtin_ctzll(left);
        uint64_t piece = mp_piece_length(length, i);
        if (entry->pieces >> i & 1) {
            memcpy(worker->block + i * MP_PIECE, from, piece);
            from += piece;
        } else {
            memset(worker->block + i * MP_PIECE, 0, piece);
        }
    }
    return mp_digest_equal(mp_digests_of(&u->digests, entry->block), mp_digest128(worker->block, length, worker->copy->seed));
}

static mp_status take_data(mp_worker *worker, void *argument)
{
    slot *t = argument;
    unit *u = t->unit;
    mp_copy *copy = worker->copy;
    mp_store store;
    mp_copy_store(copy, &store);
    const uint8_t *from = t->payload + t->frame.meta, *end = t->payload + t->frame.length;
    bool marks = t->frame.type == MP_FRAME_MARKS;
    for (uint32_t at = 0; at < t->frame.meta; at += MP_DATA_ENTRY) {
        mp_data_entry entry;
        if (!mp_data_entry_decode(&u->shape, t->payload + at, &entry))
            return bad(t, "a data frame is malformed");
        uint64_t length = mp_shape_block_length(&u->shape, entry.block), bit = 1ull << (entry.block % 64);
        uint64_t bytes = marks ? 0 : mp_mask_bytes(entry.pieces, length);
        if ((uint64_t)(end - from) < bytes)
            return bad(t, "a data frame is shorter than it says");
        if (!(atomic_fetch_and(&u->wanted[entry.block / 64], ~bit) & bit))
            return bad(t, "data that was not asked for");
        t->answered++;
        uint64_t differ = entry.pieces | entry.zeros;
        if (!(entry.flags & MP_DATA_WHOLE)) {
            t->refined_pieces += mp_pieces_of(length);
            t->refined_differ += (uint32_t)__builtin_popcountll(differ);
        }
        if (marks) {
            mark(u, entry.block, differ);
            t->equal += length - mp_mask_bytes(differ, length);
            continue;
        }
        const uint8_t *own;
        mp_status status = own_block(worker, t, entry.block, length, &own);
        if (status)
            return status;
        bool retried = u->retried[entry.block / 64] & bit;
        if (!(entry.flags & MP_DATA_WHOLE) && !merges(worker, t, &entry, from, own)) {
            if (retried)
                return bad(t, "a block was refined again although all of it was asked for");
            atomic_fetch_or(&u->retried[entry.block / 64], bit);
            atomic_fetch_or(&u->wanted[entry.block / 64], bit);
            mp_store32(t->retry_meta + 8 * t->retries, entry.block);
            mp_store32(t->retry_meta + 8 * t->retries + 4, MP_WANT_WHOLE);
            t->retries++;
            from += bytes;
            continue;
        }
        if (entry.flags & MP_DATA_WHOLE && retried && !merges(worker, t, &entry, from, own))
            t->changed++; /* all of it came, verified, and still it is not what was announced: it changed at the source */
        if ((status = write_block(t, &store, entry.block, entry.pieces, entry.zeros, from, own)))
            return status;
        mp_copy_touch(copy, u->shape.offset + (uint64_t)entry.block * u->shape.block, length);
        from += bytes;
    }
    mp_status status = mp_store_flush(&store, &t->fault); /* runs point into the payload: blocks join into larger writes */
    if (status)
        return status;
    if (from != end)
        return bad(t, "a data frame is longer than it says");
    t->written += store.written;
    t->punched += store.punched;
    return MP_OK;
}

static mp_status take_bulk(mp_worker *worker, void *argument)
{
    slot *t = argument;
    unit *u = t->unit;
    mp_bulk bulk;
    MP_ASSERT(mp_bulk_decode(&bulk, &t->frame, t->payload, u->shape.block)); /* checked when it came in */
    mp_store store;
    mp_copy_store(worker->copy, &store);
    const uint8_t *from = t->payload + t->frame.meta;
    for (uint32_t i = 0; i < mp_shape_blocks(&u->shape); i++) {
        uint64_t length = mp_shape_block_length(&u->shape, i), equal = t->equal, all = mp_piece_mask(mp_pieces_of(length));
        bool zero = mp_bit(bulk.zero, i);
        const uint8_t *own;
        mp_status status = own_block(worker, t, i, u->shape.length - (uint64_t)i * u->shape.block, &own);
        if (!status)
            status = write_block(t, &store, i, zero ? 0 : all, zero ? all : 0, from, own);
        if (status)
            return status;
        t->differing_blocks += t->equal - equal != length;
        from += zero ? 0 : length;
    }
    mp_status status = mp_store_flush(&store, &t->fault);
    t->written += store.written;
    t->punched += store.punched;
    return status;
}

static void run_slot(mp_job *job, void *argument)
{
    slot *t = (slot *)job;
    mp_worker *worker = argument;
    if (!mp_chan_check(&t->frame, t->payload)) {
        t->status = bad(t, "a frame's payload fails its digest");
        return;
    }
    mp_reader_begin(&worker->target, &worker->copy->target, t->unit->shape.offset, t->unit->shape.length);
    t->status = mp_worker_guarded(worker, t->frame.type == MP_FRAME_BULK ? take_bulk : take_data, t, &t->fault);
    mp_reader_end(&worker->target);
}

static void run_sync(mp_job *job, void *argument)
{
    target *t = (target *)((char *)job - offsetof(target, sync_job));
    mp_worker *worker = argument;
    mp_copy *copy = worker->copy;
    t->sync_error = 0;
    if (!copy->write || t->recheck)
        return;
    t->sync_error = mp_disk_holds(copy->target_fd, copy->size);
    if (!t->sync_error)
        t->sync_error = mp_disk_sync(copy->target_fd);
    copy->synced = true; /* said once, by this job: a second fdatasync would not repeat the error */
    if (copy->recheck) /* the second pass is to ask the disk, not the cache */
        mp_disk_drop_cache(copy->target_fd, 0, 0);
}

/* --- in the loop ---------------------------------------------------------------------------------------------------- */

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
    u->job.run = run_compare;
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
    u->job.run = run_zeros;
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
    s->job.run = run_slot;
    mp_pool_submit(&t->copy->pool, &s->job);
    return true;
}

static bool on_sync(target *t)
{
    if (t->oldest != t->next || t->syncing || mp_load64(t->small) != t->recheck || (!t->recheck && t->cursor != t->copy->size))
        return false;
    t->syncing = true;
    t->sync_job.run = run_sync;
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
