/* frame.h - the frames of every link between two mirrorpair processes.
 *
 * A frame is a fixed 80-byte header and a payload of `length` bytes, of which the first `meta` are structure and the rest
 * is bulk data. The header carries its own checksum, the connection's session, the epoch (0 where no roles exist) and a
 * sequence number that grows by one per frame and direction: a frame that is lost, repeated, reordered, damaged or of
 * another session is detected before a byte of it is used (rules W9, A5).
 *
 *   0 magic "MPR1"   4 type u16   6 flags u16   8 length u32   12 meta u32   16 sequence u64   24 session u64
 *  32 epoch u64     40 offset u64  48 digest 16 B  64 header checksum u64 (XXH3, of bytes 0-63)  72 count u32  76 zero u32
 *
 * `count` and the reserved word stand behind the checksum's field but are covered by it too: it is taken over the 80 bytes
 * with its own field as zero. The digest is XXH3-128 of the data part, seeded with the digest of the meta part, seeded with
 * the session: it covers both although they need not be adjacent in memory. It is taken over the uncompressed payload.
 *
 * Contract: pure, no system calls; decode never reads past the 80 bytes and never trusts a field that it did not check.
 */
#ifndef MP_FRAME_H
#define MP_FRAME_H

#include "base.h"
#include "digest.h"

#define MP_FRAME_MAGIC 0x3152504du /* "MPR1" */
#define MP_FRAME_HEADER 80u
#define MP_FRAME_META_MAX (256u << 10)
#define MP_FRAME_LENGTH_MAX (MP_FRAME_META_MAX + (1u << 20))
#define MP_FRAME_WRITE_MAX (32u << 20) /* a client's whole write is one frame: NBD's largest payload */

/* Kinds 1-15: the handshake, JSON, decided in Python. 16-31: the copy session, see wire.h. 32 and up: the live mirror, see
 * link.c; there the flags hold the volume's number, and the copy's kinds DIGESTS, BULK, WANT, DATA and SETTLED are used for
 * the resync of a volume that is being served. */
enum mp_frame_type {
    MP_FRAME_HELLO = 1,
    MP_FRAME_WELCOME = 2,
    MP_FRAME_START = 3,
    MP_FRAME_ERROR = 4, /* {"code": exit code, "message": one sentence}; ends the session */
    MP_FRAME_PING = 16, /* "I am alive, my disk is slow" */
    MP_FRAME_DIGESTS,
    MP_FRAME_ZEROS,
    MP_FRAME_BULK,
    MP_FRAME_DATA,
    MP_FRAME_MARKS,
    MP_FRAME_SYNC,
    MP_FRAME_WANT,
    MP_FRAME_SETTLED,
    MP_FRAME_SYNCED,
    MP_FRAME_WRITE = 32,
    MP_FRAME_ZERO,
    MP_FRAME_ACK,
    MP_FRAME_BARRIER,
    MP_FRAME_FLUSHED,
    MP_FRAME_BITS,
    MP_FRAME_BITS_END,
    MP_FRAME_MERGED,
    MP_FRAME_RESYNC_DONE,
    MP_FRAME_READ,
    MP_FRAME_READ_DATA,
};

typedef struct mp_frame {
    uint16_t type, flags;
    uint32_t length, meta, count;
    uint64_t sequence, session, epoch, offset;
    mp_digest digest;
} mp_frame;

typedef enum mp_frame_fault {
    MP_FRAME_GOOD = 0,
    MP_FRAME_BAD_MAGIC,    /* not our protocol at all, or another version of the frame */
    MP_FRAME_BAD_CHECKSUM,
    MP_FRAME_BAD_LENGTH,
} mp_frame_fault;

void mp_frame_encode(const mp_frame *frame, uint8_t out[MP_FRAME_HEADER]);
mp_frame_fault mp_frame_decode(const uint8_t in[MP_FRAME_HEADER], mp_frame *frame);
mp_digest mp_frame_digest(uint64_t session, const void *meta, size_t meta_length, const void *data, size_t data_length);

#endif
