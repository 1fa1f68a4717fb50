/* source.h - what the two halves of the sending end share: copy_source.c (the loop) and source_work.c (the workers).
 *
 * A unit or slot belongs to the loop, and to a worker while a job of it runs.
 */
#ifndef MP_SOURCE_H
#define MP_SOURCE_H

#include "session.h"

#define SLOTS 12u               /* DATA frames being filled or sent: 12 x 1.05 MiB */
#define BULK_OPEN 8u            /* BULK units read and not yet sent */
#define BULK_SPREE 64u          /* BULK units between two probes */
#define QUEUE_MAX (4u << 20)    /* bytes in the socket queue above which no unit is begun */
#define WANTS_MAX (16u << 20)   /* bytes of WANT frames held; a legal peer stays far below */

typedef enum unit_kind { DIGESTS, ZEROS, BULK } unit_kind;

typedef struct unit {
    mp_job job;
    mp_outgoing out;
    struct source *owner;
    unit_kind kind;
    uint32_t id;
    mp_unit_shape shape; /* ZEROS: up to MP_ZERO_RUN long */
    bool ready, settled, recheck, sent, probe;
    uint32_t asked, answered; /* blocks wanted of it; blocks answered */
    uint32_t present;         /* blocks whose digest was sent */
    uint64_t zero[MP_BIT_WORDS];
    uint8_t *meta;            /* MP_DIGESTS_META_MAX */
    uint8_t *data;            /* BULK: one of source.bulk_data, until it is sent */
    uint64_t *differ;         /* pieces, when ranges are wanted: MP_ZERO_RUN / MP_PIECE bits */
    mp_status status;
    mp_fault fault;
} unit;

typedef struct want_frame { /* one WANT, worked off by several slots at once */
    struct want_frame *next;
    mp_frame frame;
    uint32_t at;    /* entries before it were given to slots */
    uint32_t slots; /* that still work on it */
    uint8_t meta[];
} want_frame;

typedef struct slot { /* one DATA or MARKS frame */
    mp_job job;
    mp_outgoing out;
    struct source *owner;
    bool busy;
    want_frame *want;
    uint32_t at, end; /* the part of the WANT's entries that this slot answers */
    uint32_t entries, answered;
    uint64_t data_length;
    uint8_t *meta, *data;
    mp_status status;
    mp_fault fault;
} slot;

typedef struct source {
    mp_copy *copy;
    mp_session session;
    unit units[MP_UNITS];
    uint32_t next, oldest, next_sent; /* unit numbers */
    uint32_t allowed;                 /* open units: grows by one per settled one, so the first answers steer early */
    uint64_t cursor, extent_end;      /* planning; data is known to reach up to extent_end */
    bool planned_all, recheck, sync_sent;
    bool bulk, probing; /* sending unasked; one window of digests is out to see whether that still pays */
    unsigned bulk_open, bulk_run;
    uint32_t recent_present, recent_wanted; /* blocks of the last settled windows, halved now and then */
    slot slots[SLOTS];
    uint8_t *bulk_data[BULK_OPEN]; /* MP_BULK each; the free ones come first */
    unsigned answering; /* slots in the workers' hands */
    want_frame *wants, **wants_last;
    uint64_t wants_bytes;
    want_frame *receiving;
    uint64_t paused_until_ns;
    mp_outgoing sync;
    uint8_t sync_meta[8], small[MP_SETTLED_META];
} source;

static inline unit *unit_of(source *s, uint32_t id) { return &s->units[id % MP_UNITS]; }

/* The jobs, in source_work.c. `argument` is the mp_worker. */
void mp_source_run_digests(mp_job *job, void *argument);
void mp_source_run_bulk(mp_job *job, void *argument);
void mp_source_run_slot(mp_job *job, void *argument);

#endif
