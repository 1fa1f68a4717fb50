/* wire.h - what the frames of a copy session say.
 *
 * The source walks its image once, in order, and cuts it into numbered units that together cover every byte:
 *   DIGESTS  a window of blocks, each absent (not asked about), zero, or with its 128-bit digest
 *   ZEROS    a run that is a hole at the source
 *   BULK     up to 1 MiB of data sent without asking, while nearly everything differs anyway
 * The target compares each with its own image and answers
 *   WANT     the blocks that differ; for a block it holds data of: a 32-bit tag of each 4 KiB piece of its own
 *   SETTLED  the unit is done: every block of it is equal, written or (dry run) counted
 * and the source sends, for a WANT,
 *   DATA     the pieces whose tags differ; the target merges them into its own block, and the whole must then have the
 *            128-bit digest that DIGESTS announced; if not (a tag that collided, a source that changed) the block is wanted whole
 *   MARKS    in a dry run: which pieces differ, without their data; by their tags, so one piece in 2^32 that differs may be
 *            missing from the list (never a block: that is found by its digest)
 * So digests and data stream one way and only short questions the other; nothing ever waits for one unit before the next
 * is on its way. SYNC asks for fdatasync when all units are settled; SYNCED says that it was done.
 *
 * The header's `count` is the unit's number, `offset` its first byte. Layouts of the meta part, little-endian:
 *   DIGESTS  length u32, flags u32, present bits, zero bits (each ceil(blocks / 64) words), 16 bytes per present non-zero block
 *   ZEROS    length u64
 *   BULK     length u32, flags u32, zero bits; data = the blocks that are not zero
 *   WANT     entries: block u32, kind u32, then ZERO: u64 mask of own non-zero pieces; REFINE: a u32 tag per piece
 *   DATA     entries: block u32, flags u32, pieces u64, zeros u64; data = the pieces in `pieces`, in order
 *   MARKS    entries as DATA, no data
 *   SETTLED  equal bytes, written bytes, punched bytes, changed blocks, differing blocks: 5 x u64
 *   SYNC     pass u64 (0: copy, 1: re-check)         SYNCED  pass u64
 *
 * Contract: pure, no system calls. Everything a peer can say is checked here or where it is used before it is acted on.
 */
#ifndef MP_WIRE_H
#define MP_WIRE_H

#include "base.h"
#include "frame.h"

#define MP_UNITS 64u /* open units at the most: 512 MiB on the way, 2 MiB of digests */
#define MP_WINDOW_BLOCKS_MAX (MP_WINDOW / MP_BLOCK_MIN)
#define MP_BIT_WORDS (MP_WINDOW_BLOCKS_MAX / 64)
#define MP_DIGESTS_META_MAX (8 + 2 * 8 * MP_BIT_WORDS + 16 * MP_WINDOW_BLOCKS_MAX)
#define MP_WANT_META_MAX ((uint64_t)16 * MP_WINDOW_BLOCKS_MAX) /* one entry per block: 16 bytes, or 8 + 4 per piece */
#define MP_DATA_ENTRY 24u
#define MP_DATA_META_MAX (MP_DATA_ENTRY * MP_WINDOW_BLOCKS_MAX)
#define MP_SETTLED_META 40u
#define MP_UNIT_RECHECK 1u /* DIGESTS flags: re-reading what was written */

enum mp_want_kind {
    MP_WANT_REFINE = 0, /* here are my pieces' tags */
    MP_WANT_EMPTY = 1,  /* my block is all zeros */
    MP_WANT_WHOLE = 2,  /* send everything: refining does not pay, or what I merged is not what you announced */
    MP_WANT_ZERO = 3,   /* not a wish: your block is zero, mine was not (I zero it myself) */
};

#define MP_DATA_WHOLE 1u /* every piece is in `pieces` or in `zeros` */

typedef struct mp_unit_shape { /* a unit of blocks and how it is cut */
    uint64_t offset, length;
    uint32_t block;
} mp_unit_shape;

static inline uint32_t mp_shape_blocks(const mp_unit_shape *s) { return (uint32_t)mp_ceil_div(s->length, s->block); }
static inline uint64_t mp_shape_block_length(const mp_unit_shape *s, uint32_t i) { return mp_min(s->block, s->length - (uint64_t)i * s->block); }
static inline uint32_t mp_pieces_of(uint64_t block_length) { return (uint32_t)mp_ceil_div(block_length, MP_PIECE); }
static inline uint64_t mp_piece_length(uint64_t block_length, uint32_t i) { return mp_min(MP_PIECE, block_length - i * MP_PIECE); }
static inline uint64_t mp_piece_mask(uint32_t pieces) { return pieces == 64 ? ~0ull : (1ull << pieces) - 1; }
static inline uint32_t mp_bit_words(uint32_t blocks) { return (blocks + 63) / 64; }
static inline bool mp_bit(const uint64_t *words, uint32_t i) { return words[i / 64] >> (i % 64) & 1; }
static inline void mp_bit_set(uint64_t *words, uint32_t i) { words[i / 64] |= 1ull << (i % 64); }

/* Bytes of the pieces in `mask` of a block of this length. */
uint64_t mp_mask_bytes(uint64_t mask, uint64_t block_length);

typedef struct mp_digests {
    mp_unit_shape shape;
    uint32_t flags;
    uint64_t present[MP_BIT_WORDS], zero[MP_BIT_WORDS];
    const uint8_t *digests;
} mp_digests;

/* Writes head and bits; returns where the digests go. */
uint8_t *mp_digests_encode(uint8_t *meta, const mp_digests *unit);
/* False if it is malformed. `digests` then points into meta. */
bool mp_digests_decode(mp_digests *unit, const mp_frame *frame, const uint8_t *meta, uint32_t block);
/* The announced digest of a block that is present and not zero. */
mp_digest mp_digests_of(const mp_digests *unit, uint32_t block);

typedef struct mp_bulk {
    mp_unit_shape shape;
    uint64_t zero[MP_BIT_WORDS];
} mp_bulk;

uint32_t mp_bulk_encode(uint8_t *meta, const mp_bulk *bulk); /* returns the meta length */
bool mp_bulk_decode(mp_bulk *bulk, const mp_frame *frame, const uint8_t *meta, uint32_t block);

typedef struct mp_want {
    uint32_t block, kind;
    uint64_t mask;       /* ZERO */
    const uint8_t *tags; /* REFINE */
} mp_want;

/* Reads the entry at *at and moves *at behind it; false at a malformed one. */
bool mp_want_next(const mp_unit_shape *shape, const uint8_t *meta, uint32_t length, uint32_t *at, mp_want *want);

typedef struct mp_data_entry {
    uint32_t block, flags;
    uint64_t pieces, zeros;
} mp_data_entry;

void mp_data_entry_encode(uint8_t *meta, const mp_data_entry *entry);
bool mp_data_entry_decode(const mp_unit_shape *shape, const uint8_t *meta, mp_data_entry *entry);

#endif
