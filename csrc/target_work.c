/* target_work.c - what the workers do at the receiving end: compare, merge, verify, write. See copy_target.c for the rules.
 *
 * A job owns its unit or slot until it is finished; the loop does not look at either meanwhile.
 */
#define _GNU_SOURCE
#include "target.h"

#include "disk.h"

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

void mp_target_run_compare(mp_job *job, void *argument)
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
void mp_target_run_zeros(mp_job *job, void *argument)
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

void mp_target_run_slot(mp_job *job, void *argument)
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

void mp_target_run_sync(mp_job *job, void *argument)
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
