/* hot.c - see hot.h. */
#include "hot.h"

#include "actlog.h"

#define EXTENTS MP_JOURNAL_EXTENTS
#define NONE MP_HOT_NONE

_Static_assert(EXTENTS >= 1 && EXTENTS <= MP_ACTLOG_TABLE && MP_HOT_NODES < NONE, "a record has room for every slot");
_Static_assert(MP_HOT_BUCKETS == 1u << 12, "as many as the hash has bits");

mp_hot *mp_hot_new(void)
{
    mp_hot *hot = calloc(1, sizeof *hot);
    if (!hot)
        return NULL;
    memset(hot->buckets, 0xff, sizeof hot->buckets);
    hot->oldest = hot->newest = hot->first_wish = hot->last_wish = NONE;
    hot->free_slot = 0;
    hot->free_wish = EXTENTS;
    for (uint16_t i = 0; i < MP_HOT_NODES; i++)
        hot->nodes[i].newer = (i + 1u) % EXTENTS ? (uint16_t)(i + 1) : NONE;
    return hot;
}

static uint32_t bucket_of(uint32_t extent) { return (extent * 2654435761u) >> 20; }

uint16_t mp_hot_find(const mp_hot *hot, uint32_t extent)
{
    uint16_t i = hot->buckets[bucket_of(extent)];
    while (i != NONE && hot->nodes[i].extent != extent)
        i = hot->nodes[i].chain;
    return i;
}

static void hash_in(mp_hot *hot, uint16_t i)
{
    uint16_t *bucket = &hot->buckets[bucket_of(hot->nodes[i].extent)];
    hot->nodes[i].chain = *bucket;
    *bucket = i;
}

static void hash_out(mp_hot *hot, uint16_t i)
{
    uint16_t *at = &hot->buckets[bucket_of(hot->nodes[i].extent)];
    while (*at != i) {
        MP_ASSERT(*at != NONE);
        at = &hot->nodes[*at].chain;
    }
    *at = hot->nodes[i].chain;
}

static void list_in(mp_hot *hot, uint16_t i)
{
    hot->nodes[i].older = hot->newest;
    hot->nodes[i].newer = NONE;
    *(hot->newest == NONE ? &hot->oldest : &hot->nodes[hot->newest].newer) = i;
    hot->newest = i;
}

static void list_out(mp_hot *hot, uint16_t i)
{
    const mp_hot_node *n = &hot->nodes[i];
    *(n->older == NONE ? &hot->oldest : &hot->nodes[n->older].newer) = n->newer;
    *(n->newer == NONE ? &hot->newest : &hot->nodes[n->newer].older) = n->older;
}

void mp_hot_touch(mp_hot *hot, uint16_t slot)
{
    if (hot->newest != slot) {
        list_out(hot, slot);
        list_in(hot, slot);
    }
}

void mp_hot_wish(mp_hot *hot, uint32_t extent)
{
    uint16_t i = hot->free_wish;
    if (i == NONE)
        return;
    hot->free_wish = hot->nodes[i].newer;
    hot->nodes[i] = (mp_hot_node){.extent = extent, .state = MP_HOT_WISHED, .newer = NONE};
    hash_in(hot, i);
    *(hot->first_wish == NONE ? &hot->first_wish : &hot->nodes[hot->last_wish].newer) = i;
    hot->last_wish = i;
    hot->wishes++;
}

uint32_t mp_hot_drop_wish(mp_hot *hot)
{
    uint16_t i = hot->first_wish;
    MP_ASSERT(i != NONE);
    hash_out(hot, i);
    hot->first_wish = hot->nodes[i].newer;
    hot->nodes[i].state = MP_HOT_FREE;
    hot->nodes[i].newer = hot->free_wish;
    hot->free_wish = i;
    hot->wishes--;
    return hot->nodes[i].extent;
}

void mp_hot_drop_slot(mp_hot *hot, uint16_t slot)
{
    MP_ASSERT(slot < EXTENTS && hot->nodes[slot].state != MP_HOT_FREE && hot->nodes[slot].in_flight == 0);
    hash_out(hot, slot);
    list_out(hot, slot);
    hot->nodes[slot].state = MP_HOT_FREE;
    hot->nodes[slot].newer = hot->free_slot;
    hot->free_slot = slot;
    hot->used--;
}

uint16_t mp_hot_take_slot(mp_hot *hot, uint32_t extent)
{
    uint16_t i = hot->free_slot;
    MP_ASSERT(i != NONE);
    hot->free_slot = hot->nodes[i].newer;
    hot->nodes[i] = (mp_hot_node){.extent = extent, .state = MP_HOT_ENTERING};
    hash_in(hot, i);
    list_in(hot, i);
    hot->used++;
    return i;
}
