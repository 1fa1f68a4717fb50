/* base.h - sizes, status codes, byte order and assertions shared by the whole C core.
 *
 * Rules
 *  - Assertions check our own logic and stay on in release builds; they are never reached by peer or user input.
 *  - Everything that crosses a wire is little-endian and goes through the load/store functions below.
 *  - An operation that can fail returns an mp_status; details (errno, offset, side, text) go into an mp_fault.
 */
#ifndef MP_BASE_H
#define MP_BASE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MP_PIECE ((uint64_t)4096)            /* finest granularity of a difference and of a write, bytes */
#define MP_WINDOW ((uint64_t)8 << 20)        /* what one scan job covers, bytes: 72 bytes of header per 2 KiB of digests */
#define MP_WINDOW_PIECES (MP_WINDOW / MP_PIECE)
#define MP_BULK ((uint64_t)1 << 20)          /* data of one frame at the most, bytes */
#define MP_BLOCK_MIN ((uint64_t)4096)
#define MP_BLOCK_MAX ((uint64_t)256 << 10)   /* 64 pieces: one block's pieces fit one 64-bit mask */
#define MP_BLOCK_PIECES_MAX 64
#define MP_ZERO_RUN ((uint64_t)1 << 30)      /* longest run of zeros named by one unit, bytes */

typedef enum mp_status {
    MP_OK = 0,
    MP_CANCELLED = 1,      /* the caller asked to stop */
    MP_IO = 2,             /* a system call on an image failed: errno, offset, side */
    MP_SHRANK = 3,         /* an image shrank or failed under a mapped scan */
    MP_PEER_GONE = 4,      /* the connection ended before the work did */
    MP_PEER_GARBAGE = 5,   /* a frame failed its checks */
    MP_PEER_SILENT = 6,    /* no byte for the stated time */
    MP_PEER_ERROR = 7,     /* the peer reported an error: text */
    MP_SOURCE_CHANGED = 8, /* the source was written to while it was copied */
    MP_RECHECK = 9,        /* what was written does not read back */
    MP_KILLED = 10,        /* the helper process died: errno holds the signal */
    MP_INTERNAL = 11,      /* out of memory, no thread, no eventfd */
} mp_status;

typedef enum mp_side { MP_SIDE_NONE = 0, MP_SIDE_SOURCE = 1, MP_SIDE_TARGET = 2 } mp_side;

typedef struct mp_fault {
    int32_t status;
    int32_t error;   /* errno, or the signal of MP_KILLED */
    int32_t side;    /* mp_side */
    uint64_t offset; /* bytes into the image */
    char text[512];  /* one sentence, or the peer's own message */
} mp_fault;

#define MP_ASSERT(condition)                                                                       \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0)) {                                                   \
            fprintf(stderr, "mirrorpair: %s:%d: assertion failed: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static inline uint64_t mp_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t mp_max(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t mp_down(uint64_t value, uint64_t unit) { return value - value % unit; }
static inline uint64_t mp_ceil_div(uint64_t value, uint64_t unit) { return value / unit + (value % unit != 0); }

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
static inline uint32_t mp_le32(uint32_t v) { return __builtin_bswap32(v); }
static inline uint64_t mp_le64(uint64_t v) { return __builtin_bswap64(v); }
#else
static inline uint32_t mp_le32(uint32_t v) { return v; }
static inline uint64_t mp_le64(uint64_t v) { return v; }
#endif

static inline uint32_t mp_load32(const void *p) { uint32_t v; memcpy(&v, p, 4); return mp_le32(v); }
static inline uint64_t mp_load64(const void *p) { uint64_t v; memcpy(&v, p, 8); return mp_le64(v); }
static inline void mp_store32(void *p, uint32_t v) { v = mp_le32(v); memcpy(p, &v, 4); }
static inline void mp_store64(void *p, uint64_t v) { v = mp_le64(v); memcpy(p, &v, 8); }

#endif
