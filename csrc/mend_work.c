/* mend_work.c - what the workers do for the online resync: read and digest, compare, merge, store. See mend.h, wire.h.
 *
 * Everything is read with pread into own memory, never through a mapping: this runs in the daemon, where a SIGBUS is not to
 * be risked. R8: zero blocks land as holes; what is zero here already is left alone. R9: these threads run at nice 19.
 */
#define _GNU_SOURCE
#include "mend.h"

#include "disk.h"
#include "store.h"

#include <errno.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t block_offset(const mend_unit *u, uint32_t i) { return u->shape.offset + (uint64_t)i * u->shape.block; }

static bool read_block(mend_unit *u, uint32_t i, uint8_t *to)
{
    u->error = mp_disk_read(u->mend->volume->fd, to, mp_shape_block_length(&u->shape, i), block_offset(u, i));
    return !u->error;
}

/* --- source --- */

static void digest(mend_unit *u, mend_worker *w)
{
    mp_digests unit = {.shape = u->shape};
    uint32_t blocks = mp_shape_blocks(&u->shape);
    uint8_t *digests = u->meta + 8 + 16 * mp_bit_words(blocks), *at = digests;
    for (uint32_t i = 0; i < blocks; i++) {
        uint64_t length = mp_shape_block_length(&u->shape, i);
        mp_bit_set(unit.present, i);
        if (!read_block(u, i, w->block))
            return;
        if (mp_is_zero(w->block, length)) {
            mp_bit_set(unit.zero, i);
            continue;
        }
        mp_digest_store(at, mp_digest128(w->block, length, u->mend->seed));
        at += 16;
    }
    MP_ASSERT(mp_digests_encode(u->meta, &unit) == digests);
    u->out.frame = (mp_frame){.type = MP_FRAME_DIGESTS, .offset = u->shape.offset, .count = u->id, .meta = (uint32_t)(at - u->meta), .length = (uint32_t)(at - u->meta)};
    u->out.meta = u->meta;
}

static void read_bulk(mend_unit *u)
{
    mp_bulk bulk = {.shape = u->shape};
    uint64_t length = 0;
    for (uint32_t i = 0; i < mp_shape_blocks(&u->shape); i++) {
        uint64_t part = mp_shape_block_length(&u->shape, i);
        if (!read_block(u, i, u->data + length))
            return;
        if (mp_is_zero(u->data + length, part))
            mp_bit_set(bulk.zero, i);
        else
            length += part;
    }
    uint32_t meta = mp_bulk_encode(u->meta, &bulk);
    u->out.frame = (mp_frame){.type = MP_FRAME_BULK, .offset = u->shape.offset, .count = u->id, .meta = meta, .length = meta + (uint32_t)length};
    u->out.meta = u->meta;
    u->out.data = u->data;
    u->sent += length;
}

/* The blocks that the target asked for: the pieces whose tags differ. */
static void answer(mend_unit *u, mend_worker *w)
{
    uint64_t data_length = 0;
    uint32_t entries = 0;
    uint64_t seen[MP_BIT_WORDS] = {0};
    for (uint32_t at = 0; at < u->frame.meta;) {
        mp_want want;
        if (!mp_want_next(&u->shape, u->want, u->frame.meta, &at, &want) || mp_bit(seen, want.block)) {
            u->garbage = "a question of the resync is malformed";
            return;
        }
        mp_bit_set(seen, want.block);
        if (want.kind == MP_WANT_ZERO)
            continue;
        uint64_t length = mp_shape_block_length(&u->shape, want.block);
        uint32_t pieces = mp_pieces_of(length);
        if (!read_block(u, want.block, w->block))
            return;
        mp_data_entry entry = {.block = want.block};
        uint64_t nonzero = mp_pieces_nonzero(w->block, length), differ = mp_piece_mask(pieces);
        if (want.kind == MP_WANT_REFINE) {
            differ = 0;
            for (uint32_t i = 0; i < pieces; i++)
                if (mp_load32(want.tags + 4 * i) != (uint32_t)mp_digest128(w->block + i * MP_PIECE, mp_piece_length(length, i), u->mend->seed).low)
                    differ |= 1ull << i;
        } else {
            entry.flags = MP_DATA_WHOLE;
        }
        entry.pieces = differ & nonzero;
        entry.zeros = differ & ~nonzero;
        mp_data_entry_encode(u->meta + (size_t)entries++ * MP_DATA_ENTRY, &entry);
        for (uint64_t left = entry.pieces; left; left &= left - 1) {
            uint32_t i = (uint32_t)__builtin_ctzll(left);
            memcpy(u->data + data_length, w->block + i * MP_PIECE, mp_piece_length(length, i));
            data_length += mp_piece_length(length, i);
        }
    }
    if (!entries) {
        u->garbage = "a question of the resync asks for nothing";
        return;
    }
    u->out.frame = (mp_frame){.type = MP_FRAME_DATA, .offset = u->shape.offset, .count = u->id, .meta = entries * MP_DATA_ENTRY, .length = entries * MP_DATA_ENTRY + (uint32_t)data_length};
    u->out.meta = u->meta;
    u->out.data = u->data;
    u->sent += data_length;
}

/* --- target --- */

/* Makes [offset, +length) zero unless it reads so already. `own` is what stands there. */
static bool store_zero(mend_unit *u, uint64_t offset, uint64_t length, const uint8_t *own)
{
    if (mp_is_zero(own, length)) {
        u->equal += length;
        return true;
    }
    u->punched += length;
    u->error = mp_disk_zero(u->mend->volume->fd, offset, length);
    return !u->error;
}

static bool store_data(mend_unit *u, uint64_t offset, uint64_t length, const uint8_t *data)
{
    u->written += length;
    u->error = mp_disk_write(u->mend->volume->fd, data, length, offset);
    return !u->error;
}

static void ask(mend_unit *u, uint32_t *meta, uint32_t block, uint32_t kind)
{
    mp_store32(u->meta + *meta, block);
    mp_store32(u->meta + *meta + 4, kind);
    *meta += 8;
    u->wants = true;
}

static void compare(mend_unit *u, mend_worker *w)
{
    uint32_t meta = 0;
    for (uint32_t i = 0; i < mp_shape_blocks(&u->shape); i++) {
        if (!mp_bit(u->digests.present, i))
            continue;
        uint64_t length = mp_shape_block_length(&u->shape, i);
        if (!read_block(u, i, w->block))
            return;
        if (mp_bit(u->digests.zero, i)) {
            if (!store_zero(u, block_offset(u, i), length, w->block))
                return;
        } else if (mp_digest_equal(mp_digests_of(&u->digests, i), mp_digest128(w->block, length, u->mend->seed))) {
            u->equal += length;
        } else if (mp_is_zero(w->block, length)) {
            ask(u, &meta, i, MP_WANT_EMPTY);
        } else {
            ask(u, &meta, i, MP_WANT_REFINE);
            for (uint32_t piece = 0; piece < mp_pieces_of(length); piece++) {
                mp_store32(u->meta + meta, (uint32_t)mp_digest128(w->block + piece * MP_PIECE, mp_piece_length(length, piece), u->mend->seed).low);
                meta += 4;
            }
        }
    }
    u->out.frame = (mp_frame){.type = MP_FRAME_WANT, .offset = u->shape.offset, .count = u->id, .meta = meta, .length = meta};
    u->out.meta = u->meta;
}

/* A run of adjacent blocks that are not all zero: their zero pieces become holes, or stay what they are (R8). */
static bool store_run(mend_unit *u, mend_worker *w, uint64_t offset, const uint8_t *data, uint64_t length)
{
    for (uint64_t at = 0; at < length;) {
        uint64_t begin = at;
        bool zero = mp_is_zero(data + at, mp_min(MP_PIECE, length - at));
        do
            at += mp_min(MP_PIECE, length - at);
        while (at < length && at - begin < MP_BLOCK_MAX && mp_is_zero(data + at, mp_min(MP_PIECE, length - at)) == zero);
        if (!zero) {
            if (!store_data(u, offset + begin, at - begin, data + begin))
                return false;
            continue;
        }
        u->error = mp_disk_read(u->mend->volume->fd, w->block, at - begin, offset + begin);
        if (u->error || !store_zero(u, offset + begin, at - begin, w->block))
            return false;
    }
    return true;
}

static void store(mend_unit *u, mend_worker *w)
{
    mp_bulk bulk;
    if (!mp_bulk_decode(&bulk, &u->frame, u->payload, u->mend->volume->block)) {
        u->garbage = "resync data is malformed";
        return;
    }
    const uint8_t *from = u->payload + u->frame.meta, *end = u->payload + u->frame.length;
    for (uint32_t i = 0; i < mp_shape_blocks(&bulk.shape);) {
        uint64_t length = mp_shape_block_length(&bulk.shape, i), offset = block_offset(u, i);
        if (mp_bit(bulk.zero, i)) {
            if (!read_block(u, i++, w->block) || !store_zero(u, offset, length, w->block))
                return;
            continue;
        }
        uint64_t run = 0;
        for (; i < mp_shape_blocks(&bulk.shape) && !mp_bit(bulk.zero, i); i++)
            run += mp_shape_block_length(&bulk.shape, i);
        if ((uint64_t)(end - from) < run) {
            u->garbage = "resync data is shorter than it says";
            return;
        }
        if (!store_run(u, w, offset, from, run))
            return;
        from += run;
    }
    if (from != end)
        u->garbage = "resync data is longer than it says";
}

/* One entry: laid over the own block, checked against the announced digest, and only then written. */
static const uint8_t *merge_entry(mend_unit *u, mend_worker *w, const mp_data_entry *entry, const uint8_t *from, uint32_t *meta)
{
    uint64_t length = mp_shape_block_length(&u->shape, entry->block), offset = block_offset(u, entry->block);
    if (!read_block(u, entry->block, w->block))
        return NULL;
    memcpy(w->merged, w->block, length);
    for (uint64_t left = entry->pieces | entry->zeros; left; left &= left - 1) {
        uint32_t i = (uint32_t)__builtin_ctzll(left);
        uint64_t piece = mp_piece_length(length, i);
        if (entry->pieces >> i & 1) {
            memcpy(w->merged + i * MP_PIECE, from, piece);
            from += piece;
        } else {
            memset(w->merged + i * MP_PIECE, 0, piece);
        }
    }
    if (!mp_digest_equal(mp_digests_of(&u->digests, entry->block), mp_digest128(w->merged, length, u->mend->seed))) {
        if (entry->flags & MP_DATA_WHOLE)
            u->garbage = "a whole block of the resync is not what was announced";
        else
            ask(u, meta, entry->block, MP_WANT_WHOLE); /* a tag collided */
        return from;
    }
    uint64_t differ = mp_pieces_differ(w->block, w->merged, length);
    for (uint32_t i = 0; i < mp_pieces_of(length);) {
        if (!(differ >> i & 1)) {
            u->equal += mp_piece_length(length, i++);
            continue;
        }
        uint32_t first = i;
        uint64_t run = 0;
        bool zero = mp_is_zero(w->merged + i * MP_PIECE, mp_piece_length(length, i));
        for (; i < mp_pieces_of(length) && differ >> i & 1 && mp_is_zero(w->merged + i * MP_PIECE, mp_piece_length(length, i)) == zero; i++)
            run += mp_piece_length(length, i);
        if (zero ? !store_zero(u, offset + first * MP_PIECE, run, w->block + first * MP_PIECE) : !store_data(u, offset + first * MP_PIECE, run, w->merged + first * MP_PIECE))
            return NULL;
    }
    return from;
}

static void merge(mend_unit *u, mend_worker *w)
{
    const uint8_t *from = u->payload + u->frame.meta, *end = u->payload + u->frame.length;
    uint32_t meta = 0;
    uint64_t seen[MP_BIT_WORDS] = {0};
    for (uint32_t at = 0; at < u->frame.meta; at += MP_DATA_ENTRY) {
        mp_data_entry entry;
        if (u->frame.meta - at < MP_DATA_ENTRY || !mp_data_entry_decode(&u->shape, u->payload + at, &entry) || mp_bit(seen, entry.block)
            || !mp_bit(u->digests.present, entry.block) || mp_bit(u->digests.zero, entry.block)
            || (uint64_t)(end - from) < mp_mask_bytes(entry.pieces, mp_shape_block_length(&u->shape, entry.block))) {
            u->garbage = "resync data is malformed";
            return;
        }
        mp_bit_set(seen, entry.block);
        if (!(from = merge_entry(u, w, &entry, from, &meta)) || u->garbage)
            return;
    }
    if (from != end)
        u->garbage = "resync data is longer than it says";
    u->out.frame = (mp_frame){.type = MP_FRAME_WANT, .offset = u->shape.offset, .count = u->id, .meta = meta, .length = meta};
    u->out.meta = u->meta;
}

void mp_mend_run(mp_job *job, void *worker)
{
    mend_unit *u = (mend_unit *)job;
    mend_worker *w = worker;
    if (!w->nice) {
        w->nice = true;
        (void)setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 19);
    }
    u->error = 0;
    u->garbage = NULL;
    u->wants = false;
    u->out = (mp_outgoing){0};
    switch (u->work) {
    case WORK_DIGEST: digest(u, w); break;
    case WORK_READ: read_bulk(u); break;
    case WORK_ANSWER: answer(u, w); break;
    case WORK_COMPARE: compare(u, w); break;
    case WORK_STORE: store(u, w); break;
    case WORK_MERGE: merge(u, w); break;
    case WORK_NONE: MP_ASSERT(false);
    }
}
