/* source_work.c - what the workers do at the sending end: digest, read, answer. See copy_source.c for the whole.
 *
 * A job owns its unit or slot until it is finished; the loop does not look at either meanwhile.
 */
#define _GNU_SOURCE
#include "source.h"

static mp_status digest_window(mp_worker *worker, void *argument)
{
    unit *u = argument;
    mp_copy *copy = worker->copy;
    mp_digests unit = {.shape = u->shape, .flags = u->recheck ? MP_UNIT_RECHECK : 0};
    uint32_t blocks = mp_shape_blocks(&u->shape);
    uint64_t end = u->shape.offset + u->shape.length;
    uint8_t *digests = u->meta + 8 + 16 * mp_bit_words(blocks), *at = digests;
    u->present = 0;
    for (uint32_t i = 0; i < blocks; i++) {
        uint64_t offset = u->shape.offset + (uint64_t)i * u->shape.block, length = mp_shape_block_length(&u->shape, i);
        if (u->recheck && !mp_copy_touched(copy, offset, length))
            continue;
        mp_bit_set(unit.present, i);
        u->present++;
        bool hole;
        const uint8_t *data;
        mp_status status = mp_reader_is_hole(&worker->source, offset, length, &hole, &u->fault);
        if (status)
            return status;
        if (!hole && (status = mp_reader_get(&worker->source, offset, length, end - offset, &data, &u->fault)))
            return status;
        if (hole || mp_is_zero(data, length)) {
            mp_bit_set(unit.zero, i);
            continue;
        }
        mp_digest_store(at, mp_digest128(data, length, copy->seed));
        at += 16;
    }
    memcpy(u->zero, unit.zero, sizeof u->zero);
    MP_ASSERT(mp_digests_encode(u->meta, &unit) == digests);
    u->out.frame.meta = u->out.frame.length = (uint32_t)(at - u->meta);
    u->out.meta = u->meta;
    return MP_OK;
}

void mp_source_run_digests(mp_job *job, void *argument)
{
    unit *u = (unit *)job;
    mp_worker *worker = argument;
    mp_reader_begin(&worker->source, &worker->copy->source, u->shape.offset, u->shape.length);
    u->status = mp_worker_guarded(worker, digest_window, u, &u->fault);
    mp_reader_end(&worker->source);
    if (u->status == MP_OK)
        mp_outgoing_seal(&u->out, u->owner->session.chan->session);
}

/* The blocks that are not zero are copied, and only the copy is digested and sent: the source may change meanwhile. */
static mp_status read_bulk(mp_worker *worker, void *argument)
{
    unit *u = argument;
    const uint8_t *data;
    mp_status status = mp_reader_get(&worker->source, u->shape.offset, u->shape.length, u->shape.length, &data, &u->fault);
    if (status)
        return status;
    mp_bulk bulk = {.shape = u->shape};
    uint64_t data_length = 0;
    for (uint32_t i = 0; i < mp_shape_blocks(&u->shape); i++) {
        uint64_t length = mp_shape_block_length(&u->shape, i);
        const uint8_t *block = data + (uint64_t)i * u->shape.block;
        if (mp_is_zero(block, length)) {
            mp_bit_set(bulk.zero, i);
            continue;
        }
        memcpy(u->data + data_length, block, length);
        data_length += length;
    }
    memcpy(u->zero, bulk.zero, sizeof u->zero);
    u->out.meta = u->meta;
    u->out.data = u->data;
    u->out.frame.meta = mp_bulk_encode(u->meta, &bulk);
    u->out.frame.length = u->out.frame.meta + (uint32_t)data_length;
    return MP_OK;
}

void mp_source_run_bulk(mp_job *job, void *argument)
{
    unit *u = (unit *)job;
    mp_worker *worker = argument;
    mp_reader_begin(&worker->source, &worker->copy->source, u->shape.offset, u->shape.length);
    u->status = mp_worker_guarded(worker, read_bulk, u, &u->fault);
    mp_reader_end(&worker->source);
    if (u->status == MP_OK)
        mp_outgoing_seal(&u->out, u->owner->session.chan->session);
}

/* One wanted block: decides its pieces and puts their data into the slot. */
static mp_status answer(mp_worker *worker, slot *t, const unit *u, const mp_want *want)
{
    mp_copy *copy = worker->copy;
    uint64_t offset = u->shape.offset + (uint64_t)want->block * u->shape.block, length = mp_shape_block_length(&u->shape, want->block);
    uint32_t pieces = mp_pieces_of(length);
    const uint8_t *data;
    mp_status status = mp_reader_get(&worker->source, offset, length, length, &data, &t->fault);
    if (status)
        return status;
    mp_data_entry entry = {.block = want->block};
    uint64_t nonzero = mp_pieces_nonzero(data, length), all = mp_piece_mask(pieces);
    if (want->kind == MP_WANT_REFINE) {
        for (uint32_t i = 0; i < pieces; i++) {
            uint64_t piece = mp_piece_length(length, i);
            if (mp_load32(want->tags + 4 * i) != mp_piece_tag(data + i * MP_PIECE, piece, copy->seed))
                entry.pieces |= 1ull << i;
        }
        entry.zeros = entry.pieces & ~nonzero;
        entry.pieces &= nonzero;
        /* All tags equal, yet the block differs: a tag collided or the source changed since. The target's check of the
         * whole block finds out and asks again; a dry run counts the whole block. */
        if (!copy->write && !(entry.pieces | entry.zeros))
            entry.pieces = nonzero, entry.zeros = all & ~nonzero;
    } else {
        entry.flags = MP_DATA_WHOLE;
        entry.pieces = nonzero;
        entry.zeros = all & ~nonzero;
        if (want->kind == MP_WANT_EMPTY && !copy->write)
            entry.flags = 0, entry.zeros = 0;
    }
    mp_data_entry_encode(t->meta + (size_t)t->entries++ * MP_DATA_ENTRY, &entry);
    if (copy->write) {
        for (uint64_t left = entry.pieces; left; left &= left - 1) {
            uint32_t i = (uint32_t)__builtin_ctzll(left);
            uint64_t piece = mp_piece_length(length, i);
            memcpy(t->data + t->data_length, data + i * MP_PIECE, piece);
            t->data_length += piece;
        }
    }
    t->answered++;
    return MP_OK;
}

static mp_status fill_slot(mp_worker *worker, void *argument)
{
    slot *t = argument;
    const want_frame *w = t->want;
    const unit *u = unit_of(t->owner, w->frame.count);
    for (uint32_t at = t->at; at < t->end;) {
        mp_want want;
        MP_ASSERT(mp_want_next(&u->shape, w->meta, t->end, &at, &want)); /* checked when it came in */
        mp_status status = answer(worker, t, u, &want);
        if (status)
            return status;
    }
    return MP_OK;
}

void mp_source_run_slot(mp_job *job, void *argument)
{
    slot *t = (slot *)job;
    mp_worker *worker = argument;
    const unit *u = unit_of(t->owner, t->want->frame.count);
    mp_reader_begin(&worker->source, &worker->copy->source, u->shape.offset, u->shape.length);
    t->status = mp_worker_guarded(worker, fill_slot, t, &t->fault);
    mp_reader_end(&worker->source);
    if (t->status)
        return;
    t->out.frame = (mp_frame){.type = t->owner->copy->write ? MP_FRAME_DATA : MP_FRAME_MARKS, .count = u->id, .offset = u->shape.offset,
                              .meta = t->entries * MP_DATA_ENTRY, .length = t->entries * MP_DATA_ENTRY + (uint32_t)t->data_length};
    t->out.meta = t->meta;
    t->out.data = t->data;
    mp_outgoing_seal(&t->out, t->owner->session.chan->session);
}
