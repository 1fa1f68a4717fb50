/* slab.h - buffers for payloads, by size class, under one budget.
 *
 * Contract: one thread. A buffer is page-aligned, at least as long as asked for, and comes back through mp_slab_put with the
 * same length and purpose. What was given back is kept for the next request of its class, so that a warm server allocates nothing; when
 * the budget is short the kept ones of other classes go first. NULL means "not now": the caller stops reading from whoever
 * asks, and goes on when something came back. Small, middle and large buffers have a budget each, and so have those that
 * clients read into: who announces 32 MiB and sends nothing, or reads and takes none, takes nothing of what writes live on.
 */
#ifndef MP_SLAB_H
#define MP_SLAB_H

#include "base.h"

#define MP_SLAB_CLASSES 6
#define MP_SLAB_MAX ((uint64_t)32 << 20)    /* NBD's largest payload */
#define MP_SLAB_READ_MAX ((uint64_t)128 << 10) /* the largest piece of a read */
#define MP_SLAB_GROUPS 4
#define MP_SLAB_SMALL ((uint64_t)20 << 20)  /* up to 128 KiB each */
#define MP_SLAB_MIDDLE ((uint64_t)32 << 20) /* up to 1.25 MiB each; all resyncs together may hold 20 of it */
#define MP_SLAB_LARGE ((uint64_t)32 << 20)  /* one of the largest */
#define MP_SLAB_READS ((uint64_t)16 << 20)  /* pieces of answers to reads; with it 100 MiB are full */
#define MP_SLAB_ALL (MP_SLAB_SMALL + MP_SLAB_MIDDLE + MP_SLAB_LARGE + MP_SLAB_READS)

typedef struct mp_slab {
    struct mp_slab_free *kept[MP_SLAB_CLASSES];
    uint64_t used[MP_SLAB_GROUPS], held; /* bytes handed out; handed out or kept */
} mp_slab;

void mp_slab_init(mp_slab *slab);
void mp_slab_close(mp_slab *slab); /* everything handed out must have come back */
void *mp_slab_get(mp_slab *slab, uint64_t length);
void mp_slab_put(mp_slab *slab, void *buffer, uint64_t length);
void *mp_slab_get_read(mp_slab *slab, uint64_t length); /* likewise, for reads: up to MP_SLAB_READ_MAX */
void mp_slab_put_read(mp_slab *slab, void *buffer, uint64_t length);
uint64_t mp_slab_bytes(uint64_t length); /* what a buffer of that length takes of its budget */
uint64_t mp_slab_free_for_reads(const mp_slab *slab);

#endif
