/* slab.h - buffers for payloads, by size class, under one budget.
 *
 * Contract: one thread. A buffer is page-aligned, at least as long as asked for, and comes back through mp_slab_put with the
 * same length. What was given back is kept for the next request of its class, so that a warm server allocates nothing; when
 * the budget is short the kept ones of other classes go first. NULL means "not now": the caller stops reading from whoever
 * asks, and goes on when something came back. The two largest classes have a budget of their own: who announces 32 MiB and
 * sends nothing takes none of what the others live on.
 */
#ifndef MP_SLAB_H
#define MP_SLAB_H

#include "base.h"

#define MP_SLAB_CLASSES 6
#define MP_SLAB_MAX ((uint64_t)32 << 20)    /* NBD's largest payload */
#define MP_SLAB_LARGE ((uint64_t)32 << 20)  /* one of the largest */
#define MP_SLAB_SMALL ((uint64_t)48 << 20)  /* a resync may hold 20 of it; the rest of the 100 MiB of a node is tables */

typedef struct mp_slab {
    struct mp_slab_free *kept[MP_SLAB_CLASSES];
    uint64_t used, large, held; /* bytes handed out; of these in large buffers; handed out or kept */
} mp_slab;

void mp_slab_init(mp_slab *slab);
void mp_slab_close(mp_slab *slab); /* everything handed out must have come back */
void *mp_slab_get(mp_slab *slab, uint64_t length);
void mp_slab_put(mp_slab *slab, void *buffer, uint64_t length);

#endif
