/* target.h - what the two halves of the receiving end share: copy_target.c (the loop) and target_work.c (the workers).
 *
 * A unit or slot belongs to the loop, and to a worker while a job of it runs; what both touch at once is atomic.
 */
#ifndef MP_TARGET_H
#define MP_TARGET_H

#include "session.h"

#define SLOTS 12u         /* payloads of DATA, BULK and MARKS: 12 x 1.25 MiB */
#define SLOT_BYTES (MP_FRAME_META_MAX + MP_BULK)

typedef enum unit_kind { DIGESTS, ZEROS, BULK } unit_kind;

typedef struct unit {
    mp_job job;
    mp_outgoing want, settled;
    struct target *owner;
    unit_kind kind;
    uint32_t id;
    mp_unit_shape shape;
    mp_digests digests;
    bool open, compared, want_queued, settled_queued, recheck;
    uint32_t slots; /* in the workers' hands */
    uint32_t asked, answered, asked_whole;
    _Atomic uint64_t wanted[MP_BIT_WORDS]; /* blocks asked for and not answered */
    _Atomic uint64_t retried[MP_BIT_WORDS];
    uint64_t zeros_at; /* ZEROS: how far it was walked */
    uint64_t equal, written, punched, changed, differing_blocks;
    uint8_t *meta;      /* the DIGESTS payload */
    uint8_t *want_meta; /* MP_WANT_META_MAX */
    uint8_t settled_meta[MP_SETTLED_META];
    uint64_t *differ; /* pieces, when ranges are wanted */
    mp_status status;
    mp_fault fault;
} unit;

typedef struct slot { /* one DATA, BULK or MARKS frame */
    mp_job job;
    mp_outgoing retry;
    struct target *owner;
    bool busy;
    mp_frame frame;
    unit *unit;
    uint8_t *payload, *retry_meta;
    uint32_t answered, retries, refined_pieces, refined_differ;
    uint64_t equal, written, punched, changed, differing_blocks;
    mp_status status;
    mp_fault fault;
} slot;

typedef struct target {
    mp_copy *copy;
    mp_session session;
    unit units[MP_UNITS];
    uint32_t next, oldest; /* unit numbers: the next to come, the oldest not settled or not reported */
    uint64_t cursor;       /* the next unit begins here */
    slot slots[SLOTS], *receiving;
    mp_job sync_job;
    bool syncing, recheck;
    int sync_error;
    mp_outgoing synced;
    uint8_t synced_meta[8], small[16];
    /* Whether refining pays. Kept by the loop, read by the workers. */
    uint32_t refined_pieces, refined_differ, asked_whole; /* of the last blocks; halved now and then */
    _Atomic bool whole;
} target;

static inline unit *unit_of(target *t, uint32_t id) { return &t->units[id % MP_UNITS]; }

/* The jobs, in target_work.c. `argument` is the mp_worker. */
void mp_target_run_compare(mp_job *job, void *argument);
void mp_target_run_zeros(mp_job *job, void *argument);
void mp_target_run_slot(mp_job *job, void *argument);
void mp_target_run_sync(mp_job *job, void *argument);

#endif
