/* frame.c - see frame.h. */
#include "frame.h"

#define CHECKSUM_SEED 0x6d6972726f727072ull /* fixed: a header must be checkable before anything was agreed */
#define CHECKSUM_AT 64

static uint64_t checksum(const uint8_t header[MP_FRAME_HEADER])
{
    uint8_t copy[MP_FRAME_HEADER];
    memcpy(copy, header, sizeof copy);
    memset(copy + CHECKSUM_AT, 0, 8);
    mp_digest digest = mp_digest128(copy, sizeof copy, CHECKSUM_SEED);
    return digest.low ^ digest.high;
}

static uint32_t longest(uint16_t type) { return type == MP_FRAME_WRITE ? MP_FRAME_WRITE_MAX : MP_FRAME_LENGTH_MAX; }

void mp_frame_encode(const mp_frame *frame, uint8_t out[MP_FRAME_HEADER])
{
    MP_ASSERT(frame->meta <= frame->length && frame->length <= longest(frame->type) && frame->meta <= MP_FRAME_META_MAX);
    mp_store32(out, MP_FRAME_MAGIC);
    mp_store32(out + 4, (uint32_t)frame->type | (uint32_t)frame->flags << 16);
    mp_store32(out + 8, frame->length);
    mp_store32(out + 12, frame->meta);
    mp_store64(out + 16, frame->sequence);
    mp_store64(out + 24, frame->session);
    mp_store64(out + 32, frame->epoch);
    mp_store64(out + 40, frame->offset);
    mp_digest_store(out + 48, frame->digest);
    mp_store32(out + 72, frame->count);
    mp_store32(out + 76, 0);
    mp_store64(out + CHECKSUM_AT, checksum(out));
}

mp_frame_fault mp_frame_decode(const uint8_t in[MP_FRAME_HEADER], mp_frame *frame)
{
    if (mp_load32(in) != MP_FRAME_MAGIC)
        return MP_FRAME_BAD_MAGIC;
    if (mp_load64(in + CHECKSUM_AT) != checksum(in))
        return MP_FRAME_BAD_CHECKSUM;
    uint32_t kind = mp_load32(in + 4);
    frame->type = (uint16_t)kind;
    frame->flags = (uint16_t)(kind >> 16);
    frame->length = mp_load32(in + 8);
    frame->meta = mp_load32(in + 12);
    frame->sequence = mp_load64(in + 16);
    frame->session = mp_load64(in + 24);
    frame->epoch = mp_load64(in + 32);
    frame->offset = mp_load64(in + 40);
    frame->digest = mp_digest_load(in + 48);
    frame->count = mp_load32(in + 72);
    if (frame->length > longest(frame->type) || frame->meta > frame->length || frame->meta > MP_FRAME_META_MAX)
        return MP_FRAME_BAD_LENGTH;
    return MP_FRAME_GOOD;
}

mp_digest mp_frame_digest(uint64_t session, const void *meta, size_t meta_length, const void *data, size_t data_length)
{
    mp_digest first = mp_digest128(meta, meta_length, session);
    return data_length ? mp_digest128(data, data_length, first.low ^ first.high) : first;
}
