/* wire.c - see wire.h. */
#include "wire.h"

uint64_t mp_mask_bytes(uint64_t mask, uint64_t block_length)
{
    uint32_t last = mp_pieces_of(block_length) - 1;
    uint64_t bytes = (uint64_t)__builtin_popcountll(mask) * MP_PIECE;
    if (mask >> last & 1)
        bytes -= MP_PIECE - mp_piece_length(block_length, last);
    return bytes;
}

/* Whether bits at or behind `blocks` are clear. */
static bool within(const uint64_t *words, uint32_t blocks)
{
    return blocks % 64 == 0 || words[blocks / 64] >> (blocks % 64) == 0;
}

static void put_words(uint8_t *at, const uint64_t *words, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        mp_store64(at + 8 * i, words[i]);
}

static void get_words(const uint8_t *at, uint64_t *words, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        words[i] = mp_load64(at + 8 * i);
}

uint8_t *mp_digests_encode(uint8_t *meta, const mp_digests *unit)
{
    uint32_t words = mp_bit_words(mp_shape_blocks(&unit->shape));
    mp_store32(meta, (uint32_t)unit->shape.length);
    mp_store32(meta + 4, unit->flags);
    put_words(meta + 8, unit->present, words);
    put_words(meta + 8 + 8 * words, unit->zero, words);
    return meta + 8 + 16 * words;
}

bool mp_digests_decode(mp_digests *unit, const mp_frame *frame, const uint8_t *meta, uint32_t block)
{
    if (frame->meta < 8 || frame->length != frame->meta)
        return false;
    unit->shape = (mp_unit_shape){frame->offset, mp_load32(meta), block};
    unit->flags = mp_load32(meta + 4);
    if (!unit->shape.length || unit->shape.length > MP_WINDOW)
        return false;
    uint32_t blocks = mp_shape_blocks(&unit->shape), words = mp_bit_words(blocks), digests = 0;
    if (frame->meta < 8 + 16 * words)
        return false;
    get_words(meta + 8, unit->present, words);
    get_words(meta + 8 + 8 * words, unit->zero, words);
    if (!within(unit->present, blocks))
        return false;
    for (uint32_t i = 0; i < words; i++) {
        if (unit->zero[i] & ~unit->present[i])
            return false;
        digests += (uint32_t)__builtin_popcountll(unit->present[i] & ~unit->zero[i]);
    }
    unit->digests = meta + 8 + 16 * words;
    return frame->meta == 8 + 16 * words + 16 * digests;
}

mp_digest mp_digests_of(const mp_digests *unit, uint32_t block)
{
    uint32_t rank = 0;
    for (uint32_t i = 0; i < block / 64; i++)
        rank += (uint32_t)__builtin_popcountll(unit->present[i] & ~unit->zero[i]);
    uint64_t below = (1ull << (block % 64)) - 1;
    rank += (uint32_t)__builtin_popcountll(unit->present[block / 64] & ~unit->zero[block / 64] & below);
    return mp_digest_load(unit->digests + (size_t)16 * rank);
}

uint32_t mp_bulk_encode(uint8_t *meta, const mp_bulk *bulk)
{
    uint32_t words = mp_bit_words(mp_shape_blocks(&bulk->shape));
    mp_store32(meta, (uint32_t)bulk->shape.length);
    mp_store32(meta + 4, 0);
    put_words(meta + 8, bulk->zero, words);
    return 8 + 8 * words;
}

bool mp_bulk_decode(mp_bulk *bulk, const mp_frame *frame, const uint8_t *meta, uint32_t block)
{
    if (frame->meta < 8)
        return false;
    bulk->shape = (mp_unit_shape){frame->offset, mp_load32(meta), block};
    if (!bulk->shape.length || bulk->shape.length > MP_BULK)
        return false;
    uint32_t blocks = mp_shape_blocks(&bulk->shape), words = mp_bit_words(blocks);
    if (frame->meta != 8 + 8 * words)
        return false;
    get_words(meta + 8, bulk->zero, words);
    if (!within(bulk->zero, blocks))
        return false;
    uint64_t data = 0;
    for (uint32_t i = 0; i < blocks; i++)
        data += mp_bit(bulk->zero, i) ? 0 : mp_shape_block_length(&bulk->shape, i);
    return frame->length - frame->meta == data;
}

bool mp_want_next(const mp_unit_shape *shape, const uint8_t *meta, uint32_t length, uint32_t *at, mp_want *want)
{
    if (length - *at < 8)
        return false;
    want->block = mp_load32(meta + *at);
    want->kind = mp_load32(meta + *at + 4);
    if (want->block >= mp_shape_blocks(shape) || want->kind > MP_WANT_ZERO)
        return false;
    uint32_t pieces = mp_pieces_of(mp_shape_block_length(shape, want->block)), more = 0;
    if (want->kind == MP_WANT_ZERO)
        more = 8;
    else if (want->kind == MP_WANT_REFINE)
        more = 4 * pieces;
    if (length - *at < 8 + more)
        return false;
    want->tags = meta + *at + 8;
    want->mask = want->kind == MP_WANT_ZERO ? mp_load64(want->tags) : 0;
    *at += 8 + more;
    return !(want->mask & ~mp_piece_mask(pieces));
}

void mp_data_entry_encode(uint8_t *meta, const mp_data_entry *entry)
{
    mp_store32(meta, entry->block);
    mp_store32(meta + 4, entry->flags);
    mp_store64(meta + 8, entry->pieces);
    mp_store64(meta + 16, entry->zeros);
}

bool mp_data_entry_decode(const mp_unit_shape *shape, const uint8_t *meta, mp_data_entry *entry)
{
    *entry = (mp_data_entry){mp_load32(meta), mp_load32(meta + 4), mp_load64(meta + 8), mp_load64(meta + 16)};
    if (entry->block >= mp_shape_blocks(shape))
        return false;
    uint64_t all = mp_piece_mask(mp_pieces_of(mp_shape_block_length(shape, entry->block)));
    if ((entry->pieces | entry->zeros) & ~all || entry->pieces & entry->zeros)
        return false;
    return !(entry->flags & MP_DATA_WHOLE) || (entry->pieces | entry->zeros) == all;
}
