/* fuzz_wire.c - the units of a copy session and of a resync (csrc/wire.h), as a hostile peer may send them.
 *
 * Input: kind u8 (DIGESTS, BULK, WANT, DATA), block size as power of two from 4096 u8, offset u64, more length u32 (claimed
 * behind the meta part), length of the unit's shape u32 (WANT and DATA), and the meta part. What is accepted must keep its
 * promises, and encoded again it must be the same bytes.
 */
#include "fuzz.h"
#include "wire.h"

static unsigned bits_in(const uint64_t *words, uint32_t from, uint32_t to)
{
    unsigned count = 0;
    for (uint32_t i = from; i < to; i++)
        count += mp_bit(words, i);
    return count;
}

static void check_shape(const mp_unit_shape *s, uint64_t most)
{
    FUZZ_NEED(s->length > 0 && s->length <= most);
    uint64_t total = 0;
    for (uint32_t i = 0; i < mp_shape_blocks(s); i++) {
        uint64_t part = mp_shape_block_length(s, i);
        FUZZ_NEED(part > 0 && part <= s->block);
        total += part;
    }
    FUZZ_NEED(total == s->length && mp_shape_blocks(s) <= 64 * MP_BIT_WORDS);
}

static void digests(const mp_frame *frame, const uint8_t *meta, uint32_t block)
{
    mp_digests *unit = malloc(sizeof *unit);
    if (mp_digests_decode(unit, frame, meta, block)) {
        check_shape(&unit->shape, MP_WINDOW);
        uint32_t blocks = mp_shape_blocks(&unit->shape), words = (blocks + 63) / 64, named = 0;
        FUZZ_NEED(bits_in(unit->present, blocks, 64 * words) == 0 && bits_in(unit->zero, blocks, 64 * words) == 0);
        for (uint32_t i = 0; i < blocks; i++) {
            FUZZ_NEED(!mp_bit(unit->zero, i) || mp_bit(unit->present, i));
            if (!mp_bit(unit->present, i) || mp_bit(unit->zero, i))
                continue;
            uint8_t stored[16];
            mp_digest_store(stored, mp_digests_of(unit, i));
            FUZZ_NEED(memcmp(stored, meta + 8 + 16 * words + 16 * named++, 16) == 0);
        }
        FUZZ_NEED(frame->meta == 8 + 16 * words + 16 * named && frame->meta <= MP_DIGESTS_META_MAX);
        uint8_t *again = malloc(frame->meta), *at = mp_digests_encode(again, unit);
        FUZZ_NEED(at == again + 8 + 16 * words);
        memcpy(at, unit->digests, 16 * named);
        FUZZ_NEED(memcmp(again, meta, frame->meta) == 0);
        free(again);
    }
    free(unit);
}

static void bulk(const mp_frame *frame, const uint8_t *meta, uint32_t block)
{
    mp_bulk unit;
    if (!mp_bulk_decode(&unit, frame, meta, block))
        return;
    check_shape(&unit.shape, MP_BULK);
    uint32_t blocks = mp_shape_blocks(&unit.shape);
    uint64_t data = 0;
    FUZZ_NEED(bits_in(unit.zero, blocks, (blocks + 63) / 64 * 64) == 0);
    for (uint32_t i = 0; i < blocks; i++)
        data += mp_bit(unit.zero, i) ? 0 : mp_shape_block_length(&unit.shape, i);
    FUZZ_NEED(data == frame->length - frame->meta);
    uint8_t *again = malloc(frame->meta);
    FUZZ_NEED(mp_bulk_encode(again, &unit) == frame->meta);
    memcpy(again + 4, meta + 4, 4); /* reserved: skipped when read */
    FUZZ_NEED(memcmp(again, meta, frame->meta) == 0);
    free(again);
}

static void wants(const mp_unit_shape *shape, const uint8_t *meta, uint32_t length)
{
    for (uint32_t at = 0, before = 0; at < length; before = at) {
        mp_want want;
        if (!mp_want_next(shape, meta, length, &at, &want))
            return;
        FUZZ_NEED(at > before && at <= length && want.block < mp_shape_blocks(shape));
        uint64_t part = mp_shape_block_length(shape, want.block);
        uint32_t pieces = (uint32_t)((part + 4095) / 4096), extra = want.kind == MP_WANT_ZERO ? 8 : want.kind == MP_WANT_REFINE ? 4 * pieces : 0;
        FUZZ_NEED(pieces >= 1 && pieces <= 64 && at - before == 8 + extra);
        FUZZ_NEED(mp_load32(meta + before) == want.block && mp_load32(meta + before + 4) == want.kind);
        if (want.kind == MP_WANT_ZERO) {
            FUZZ_NEED(mp_load64(meta + before + 8) == want.mask && (pieces == 64 || want.mask >> pieces == 0));
            FUZZ_NEED(mp_mask_bytes(want.mask, part) <= part);
        }
        if (want.kind == MP_WANT_REFINE)
            FUZZ_NEED(want.tags == meta + before + 8);
    }
}

static void entries(const mp_unit_shape *shape, const uint8_t *meta, uint32_t length)
{
    for (uint32_t at = 0; length - at >= MP_DATA_ENTRY; at += MP_DATA_ENTRY) {
        mp_data_entry entry;
        uint8_t again[MP_DATA_ENTRY];
        if (!mp_data_entry_decode(shape, meta + at, &entry))
            return;
        FUZZ_NEED(entry.block < mp_shape_blocks(shape));
        uint64_t part = mp_shape_block_length(shape, entry.block), sum = 0;
        uint32_t pieces = (uint32_t)((part + 4095) / 4096);
        for (uint32_t i = 0; i < 64; i++) {
            bool sent = entry.pieces >> i & 1, zero = entry.zeros >> i & 1;
            FUZZ_NEED(!(sent && zero) && (i < pieces || (!sent && !zero)));
            FUZZ_NEED(!(entry.flags & MP_DATA_WHOLE) || i >= pieces || sent || zero);
            sum += sent ? mp_min(4096, part - i * 4096ull) : 0;
        }
        FUZZ_NEED(mp_mask_bytes(entry.pieces, part) == sum);
        mp_data_entry_encode(again, &entry);
        FUZZ_NEED(memcmp(again, meta + at, MP_DATA_ENTRY) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, data + size};
    uint8_t kind = fuzz_number(&in, 1) & 3;
    uint32_t block = 4096u << (fuzz_number(&in, 1) % 7);
    uint64_t offset = fuzz_number(&in, 8);
    uint32_t more = (uint32_t)fuzz_number(&in, 4), shaped = (uint32_t)fuzz_number(&in, 4), length = (uint32_t)mp_min(fuzz_left(&in), MP_FRAME_META_MAX);
    uint8_t *meta = malloc(length ? length : 1); /* exactly: a byte more is found */
    fuzz_bytes(&in, meta, length);
    mp_frame frame = {.offset = offset, .meta = length, .length = length + (kind == 0 && more % 8 ? 0 : more % (MP_FRAME_LENGTH_MAX - MP_FRAME_META_MAX + 1))};
    mp_unit_shape shape = {offset, shaped % MP_WINDOW + 1, block};
    switch (kind) {
    case 0: digests(&frame, meta, block); break;
    case 1: bulk(&frame, meta, block); break;
    case 2: wants(&shape, meta, length); break;
    default: entries(&shape, meta, length);
    }
    free(meta);
    return 0;
}
