/* hot.h - the table of hot extents: slots, by extent and by last use, and the extents that somebody waits for, in order.
 *
 * A slot is an extent's place in the activity log (its index there); a wish is an extent that shall get one. An extent is at
 * most one of both. Both are nodes of one array, found through one chained hash.
 *
 * Contract: pure, no system calls, fixed size; every step but the making is O(1).
 */
#ifndef MP_HOT_H
#define MP_HOT_H

#include "base.h"

#ifndef MP_JOURNAL_EXTENTS
#define MP_JOURNAL_EXTENTS 1024u /* hot at once; a test may compile it smaller */
#endif
#define MP_HOT_NODES (2 * MP_JOURNAL_EXTENTS)
#define MP_HOT_BUCKETS 4096u
#define MP_HOT_NONE UINT16_MAX

typedef enum mp_hot_state {
    MP_HOT_FREE,
    MP_HOT_WISHED,
    MP_HOT_ENTERING, /* in the record that is being written */
    MP_HOT_IN,       /* in the record on disk: hot */
} mp_hot_state;

typedef struct mp_hot_node {
    uint64_t current, before; /* unflushed blocks: since the running barrier began, and before */
    uint64_t kept;            /* the last look at slots before which somebody came for it who waits for others too; or 0 */
    uint32_t extent, in_flight;
    uint16_t chain;        /* the next one in its bucket */
    uint16_t older, newer; /* slots: by last use. Wishes, and free nodes of both kinds: `newer` is the next one */
    uint8_t state;
} mp_hot_node;

typedef struct mp_hot {
    mp_hot_node nodes[MP_HOT_NODES]; /* the slots come first */
    uint16_t buckets[MP_HOT_BUCKETS];
    uint16_t oldest, newest; /* slots in use */
    uint16_t free_slot, free_wish;
    uint16_t first_wish, last_wish;
    uint32_t used, wishes;
} mp_hot;

mp_hot *mp_hot_new(void); /* to be freed, or NULL */
uint16_t mp_hot_find(const mp_hot *hot, uint32_t extent); /* slot, wish or MP_HOT_NONE */
void mp_hot_touch(mp_hot *hot, uint16_t slot); /* it is the newest now */
void mp_hot_wish(mp_hot *hot, uint32_t extent); /* an extent that is not here; nothing happens if there are too many wishes */
uint32_t mp_hot_drop_wish(mp_hot *hot); /* the first; returns its extent */
void mp_hot_drop_slot(mp_hot *hot, uint16_t slot); /* nothing is in flight in it */
uint16_t mp_hot_take_slot(mp_hot *hot, uint32_t extent); /* one is free, and the extent is not here; state: ENTERING */

#endif
