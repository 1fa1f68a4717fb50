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

enum { SMALL, MIDDLE, LARGE, READS };

static const uint64_t budget[MP_SLAB_GROUPS] = {MP_SLAB_SMALL, MP_SLAB_MIDDLE, MP_SLAB_LARGE, MP_SLAB_READS};

static unsigned group_of(uint64_t bytes) { return bytes <= 131072 ? SMALL : bytes <= (2u << 20) ? MIDDLE : LARGE; }

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

static void *get(mp_slab *slab, unsigned class, unsigned group)
{
    uint64_t bytes = class_bytes[class];
    if (slab->used[group] + bytes > budget[group])
        return NULL;
    struct mp_slab_free *buffer = slab->kept[class];
    if (buffer) {
        slab->kept[class] = buffer->next;
        slab->used[group] += bytes;
        return buffer;
    }
    while (slab->held + bytes > MP_SLAB_ALL && drop_one(slab, class))
        ;
    void *fresh = aligned_alloc(4096, bytes);
    if (!fresh)
        return NULL;
    slab->held += bytes;
    slab->used[group] += bytes;
    return fresh;
}

static void put(mp_slab *slab, void *buffer, unsigned class, unsigned group)
{
    uint64_t bytes = class_bytes[class];
    MP_ASSERT(slab->used[group] >= bytes);
    slab->used[group] -= bytes;
    if (bytes > (uint64_t)4 << 20) { /* too dear to keep: an idle node must not hold 32 MiB for a client of yesterday */
        slab->held -= bytes;
        free(buffer);
        return;
    }
    struct mp_slab_free *kept = buffer;
    kept->next = slab->kept[class];
    slab->kept[class] = kept;
}

void *mp_slab_get(mp_slab *slab, uint64_t length) { return get(slab, class_of(length), group_of(mp_slab_bytes(length))); }
void mp_slab_put(mp_slab *slab, void *buffer, uint64_t length) { put(slab, buffer, class_of(length), group_of(mp_slab_bytes(length))); }

void *mp_slab_get_read(mp_slab *slab, uint64_t length)
{
    MP_ASSERT(length <= MP_SLAB_READ_MAX);
    return get(slab, class_of(length), READS);
}

void mp_slab_put_read(mp_slab *slab, void *buffer, uint64_t length) { put(slab, buffer, class_of(length), READS); }
uint64_t mp_slab_bytes(uint64_t length) { return class_bytes[class_of(length)]; }
uint64_t mp_slab_free_for_reads(const mp_slab *slab) { return budget[READS] - slab->used[READS]; }
