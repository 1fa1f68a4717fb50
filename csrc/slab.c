/* slab.c - see slab.h. */
#include "slab.h"

/* What clients send most: 4 KiB pages, 64 and 128 KiB readahead, 1 MiB streams, and the largest that NBD allows. */
static const uint64_t class_bytes[MP_SLAB_CLASSES] = {4096, 16384, 131072, (1u << 20) + (256u << 10), 4u << 20, MP_SLAB_MAX};

struct mp_slab_free {
    struct mp_slab_free *next;
};

static unsigned class_of(uint64_t length)
{
    unsigned class = 0;
    while (class_bytes[class] < length) {
        class++;
        MP_ASSERT(class < MP_SLAB_CLASSES);
    }
    return class;
}

void mp_slab_init(mp_slab *slab) { memset(slab, 0, sizeof *slab); }

static const uint64_t budget[MP_SLAB_GROUPS] = {MP_SLAB_SMALL, MP_SLAB_MIDDLE, MP_SLAB_LARGE};

static unsigned group_of(uint64_t bytes) { return bytes <= 131072 ? 0 : bytes <= (2u << 20) ? 1 : 2; }

static bool drop_one(mp_slab *slab, unsigned but)
{
    for (unsigned class = MP_SLAB_CLASSES; class-- > 0;) {
        struct mp_slab_free *buffer = slab->kept[class];
        if (class == but || !buffer)
            continue;
        slab->kept[class] = buffer->next;
        slab->held -= class_bytes[class];
        free(buffer);
        return true;
    }
    return false;
}

void mp_slab_close(mp_slab *slab)
{
    for (unsigned group = 0; group < MP_SLAB_GROUPS; group++)
        MP_ASSERT(slab->used[group] == 0);
    while (drop_one(slab, MP_SLAB_CLASSES))
        ;
}

void *mp_slab_get(mp_slab *slab, uint64_t length)
{
    unsigned class = class_of(length);
    uint64_t bytes = class_bytes[class];
    uint64_t *used = &slab->used[group_of(bytes)];
    if (*used + bytes > budget[group_of(bytes)])
        return NULL;
    struct mp_slab_free *buffer = slab->kept[class];
    if (buffer) {
        slab->kept[class] = buffer->next;
        *used += bytes;
        return buffer;
    }
    while (slab->held + bytes > MP_SLAB_SMALL + MP_SLAB_MIDDLE + MP_SLAB_LARGE && drop_one(slab, class))
        ;
    void *fresh = aligned_alloc(4096, bytes);
    if (!fresh)
        return NULL;
    slab->held += bytes;
    *used += bytes;
    return fresh;
}

void mp_slab_put(mp_slab *slab, void *buffer, uint64_t length)
{
    unsigned class = class_of(length);
    uint64_t bytes = class_bytes[class];
    uint64_t *used = &slab->used[group_of(bytes)];
    MP_ASSERT(*used >= bytes);
    *used -= bytes;
    if (bytes > (uint64_t)4 << 20) { /* too dear to keep: an idle node must not hold 32 MiB for a client of yesterday */
        slab->held -= bytes;
        free(buffer);
        return;
    }
    struct mp_slab_free *kept = buffer;
    kept->next = slab->kept[class];
    slab->kept[class] = kept;
}
