/* mend.h - what the two halves of the online resync share: mend.c (the loop) and mend_work.c (the workers).
 *
 * A unit is up to MP_BULK of adjacent blocks. At the source it holds its range (flight.h) from before it is read until the
 * target said SETTLED: no client's write can come between, so old data never lands on newer (R3), and what the target
 * merges is exactly what was digested. At the target it exists while its jobs run.
 *
 * A unit belongs to the loop, and to a worker while its job runs.
 */
#ifndef MP_MEND_H
#define MP_MEND_H

#include "engine.h"
#include "wire.h"

#define MEND_UNITS MP_PACE_UNITS
#define MEND_UNIT_BLOCKS (MP_BULK / MP_BLOCK_MIN)
#define MEND_META (16u << 10) /* DIGESTS of 256 blocks: 4.2 KiB; DATA's entries: 6 KiB; WANT: 256 x 12 bytes, or 4 tags a KiB */
#define MEND_SETTLED 1024u    /* runs of blocks that wait for a barrier */
#define MEND_SETTLED_META 24u /* SETTLED: equal, written, punched: 3 x u64 */

typedef enum mend_state {
    MEND_IDLE,
    MEND_BITS,    /* source: the target's bits are coming; target: they are being sent */
    MEND_MERGING, /* source: the union is being made durable (R2) */
    MEND_RUNNING,
    MEND_DONE,
} mend_state;

typedef enum unit_work { WORK_NONE, WORK_DIGEST, WORK_READ, WORK_ANSWER, WORK_COMPARE, WORK_STORE, WORK_MERGE } unit_work;

typedef struct mend_unit {
    mp_job job;
    mp_outgoing out;
    mp_mend *mend;
    uint32_t id;
    unit_work work; /* NONE: no job runs */
    bool open, on_wire, compares; /* compares: source: begun by digests */
    bool dropped; /* dropped: the link went while the job ran */
    mp_unit_shape shape;
    uint16_t place;
    mp_digests digests;  /* target: as announced; they point into `held` */
    uint8_t *held;       /* target: the DIGESTS payload, for as long as the unit is open */
    uint64_t held_bytes;
    uint8_t *payload;    /* target: the frame that the job works on */
    uint64_t since_ns;   /* source: when something was sent that the target has to answer */
    uint64_t payload_bytes;
    mp_frame frame;
    uint8_t *data;       /* source: what is sent, MP_SLAB of MP_BULK */
    uint64_t equal, written, punched, sent;
    bool wants;          /* target: the job made questions, which are in meta */
    int error;           /* errno of the image */
    const char *garbage; /* what the peer did wrong */
    uint8_t meta[MEND_META];
    uint8_t want[MEND_META]; /* source: the WANT that came */
} mend_unit;

struct mp_mend {
    mp_volume *volume;
    mend_state state;
    bool source, full;
    uint64_t seed;
    uint64_t cursor; /* next block to look at */
    uint64_t retry_ns; /* source: a unit could not be read; no second pass before that */
    uint64_t ticket; /* of the journal: MERGING, or the target's clearing */
    bool merged_bits;
    unsigned open_units, jobs;
    uint64_t word; /* target: the next word of the bitmap to be sent */
    mp_outgoing bits_out;
    uint8_t *bits;
    bool bits_on_wire;
    struct { uint64_t first, count; } settled[MEND_SETTLED];
    unsigned settled_count, settled_before; /* before: covered by the running barrier */
    uint64_t settled_bytes;
    uint64_t total, done, skipped, sent; /* bytes */
    mend_unit unit[MEND_UNITS];
};

/* One per thread of the pool. On a page's boundary: the kernel's copy into a buffer at an odd address is 4 times slower. */
typedef struct mend_worker {
    _Alignas(4096) uint8_t block[MP_BLOCK_MAX];
    uint8_t merged[MP_BLOCK_MAX];
    bool nice;
} mend_worker;

void mp_mend_run(mp_job *job, void *worker);

#endif
