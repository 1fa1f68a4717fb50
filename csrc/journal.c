/* journal.c - see journal.h. What a job does to the file is in the last section; all else belongs to the owner thread.
 *
 * An evicted extent is forgotten at once: whoever wants it back wishes for it like anybody else, so it comes with a later
 * record than the one that dropped it.
 */
#include "journal.h"

#include "actlog.h"
#include "digest.h"
#include "disk.h"

#include <errno.h>

#define EXTENTS MP_JOURNAL_EXTENTS
#define NONE MP_HOT_NONE
#define EVICTION_PAGES (MP_JOURNAL_JOB_PAGES * 3 / 4) /* the rest of a job is for flushes, which evictions must not starve */

struct mp_journal_work { /* a job and all it touches */
    mp_job job;
    int fd, error;
    bool syncs_first, writes_record, empties;
    uint32_t page_count, record_count; /* how many places get the record */
    uint64_t sequence;                 /* of the first of them */
    uint64_t page[MP_JOURNAL_JOB_PAGES]; /* ascending */
    uint8_t record[MP_ACTLOG_RECORD];
    uint8_t data[MP_JOURNAL_JOB_PAGES][MP_JOURNAL_PAGE];
};

static void run(mp_job *job, void *worker);

/* --- ranges --- */

typedef struct range {
    uint64_t first, last;               /* blocks, both included */
    uint32_t first_extent, last_extent; /* both included */
} range;

static range range_of(const mp_journal *j, uint64_t offset, uint64_t length)
{
    MP_ASSERT(length > 0 && offset < j->size && length <= j->size - offset);
    uint64_t first = offset / j->block, last = (offset + length - 1) / j->block;
    return (range){first, last, (uint32_t)(first / 64), (uint32_t)(last / 64)};
}

/* The range's blocks in that extent. */
static uint64_t mask_of(const range *r, uint64_t extent)
{
    uint64_t low = mp_max(r->first, extent * 64) % 64, high = mp_min(r->last, extent * 64 + 63) % 64;
    return ~0ull << low & ~0ull >> (63 - high);
}

static uint64_t word(const mp_journal *j, uint64_t extent)
{
    return atomic_load_explicit(&j->dirty.words[extent], memory_order_relaxed);
}

static void mark_changed(mp_journal *j, uint64_t extent)
{
    j->changed_count += !mp_bitmap_set(&j->changed, extent / MP_JOURNAL_PAGE_EXTENTS);
}

static void set_word(mp_journal *j, uint64_t extent, uint64_t mask)
{
    if ((word(j, extent) & mask) == mask)
        return; /* a page is not written for what it says already */
    atomic_fetch_or_explicit(&j->dirty.words[extent], mask, memory_order_relaxed);
    mark_changed(j, extent);
}

/* As set_word, of bits that may well be equal at the peer. */
static void doubt_word(mp_journal *j, uint64_t extent, uint64_t mask)
{
    set_word(j, extent, mask);
    if (mask)
        mp_bitmap_set(&j->doubt, extent);
}

/* --- opening --- */

static mp_status read_failed(mp_fault *fault, int error, uint64_t offset, const char *what)
{
    *fault = (mp_fault){.status = MP_IO, .error = error == MP_DISK_ENDED ? 0 : error, .offset = offset};
    snprintf(fault->text, sizeof fault->text, "the metadata file's %s cannot be read: %s", what,
             error == MP_DISK_ENDED ? "the file is too short" : strerror(error));
    return MP_IO;
}

static mp_status read_bitmap(mp_journal *j, mp_fault *fault)
{
    uint8_t *memory = (uint8_t *)j->dirty.words;
    int error = mp_disk_read(j->fd, memory, j->pages * MP_JOURNAL_PAGE, MP_JOURNAL_BITMAP);
    if (error)
        return read_failed(fault, error, MP_JOURNAL_BITMAP, "bitmap");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (uint64_t i = 0; i < j->extents; i++)
        atomic_store_explicit(&j->dirty.words[i], mp_load64(memory + 8 * i), memory_order_relaxed);
#endif
    if (j->dirty.bits % 64) /* no block is there to be found by a stray bit */
        atomic_fetch_and_explicit(&j->dirty.words[j->extents - 1], ~0ull >> (64 - j->dirty.bits % 64), memory_order_relaxed);
    memset(memory + 8ull * j->extents, 0, j->pages * MP_JOURNAL_PAGE - 8ull * j->extents);
    for (uint64_t i = 0; i < j->extents; i++) /* nobody wrote down what they stand for */
        if (word(j, i))
            mp_bitmap_set(&j->doubt, i);
    for (uint64_t page = 0; page < j->pages; page++) /* bits that perhaps only a page cache holds are not durable yet */
        if (!mp_is_zero(memory + page * MP_JOURNAL_PAGE, MP_JOURNAL_PAGE))
            mark_changed(j, page * MP_JOURNAL_PAGE_EXTENTS);
    return MP_OK;
}

static mp_status read_log(mp_journal *j, mp_fault *fault)
{
    uint8_t ring[MP_ACTLOG_PLACES][MP_ACTLOG_RECORD];
    int error = mp_disk_read(j->fd, ring, sizeof ring, MP_JOURNAL_LOG);
    if (error)
        return read_failed(fault, error, MP_JOURNAL_LOG, "activity log");
    mp_actlog_place places[MP_ACTLOG_PLACES];
    for (uint32_t k = 0; k < MP_ACTLOG_PLACES; k++) {
        places[k] = mp_actlog_check(ring[k], k, j->extents);
        if (places[k].valid)
            j->sequence = mp_max(j->sequence, places[k].sequence);
    }
    uint32_t newest = mp_actlog_newest(places), extent;
    if (newest == MP_ACTLOG_PLACES) {
        j->lost_log = j->ring_lost = j->recovering = true;
        mp_bitmap_set_range(&j->dirty, 0, j->dirty.bits);
        mp_bitmap_set_range(&j->doubt, 0, j->extents);
        mp_bitmap_set_range(&j->changed, 0, j->pages);
        j->changed_count = j->pages;
        return MP_OK;
    }
    for (uint32_t i = 0; i < MP_ACTLOG_TABLE; i++)
        if (mp_actlog_get(ring[newest], i, &extent)) {
            mp_bitmap_set_range(&j->dirty, extent * 64ull, mp_min(extent * 64ull + 64, j->dirty.bits));
            mp_bitmap_set(&j->doubt, extent);
            mark_changed(j, extent);
            j->recovering = true;
        }
    return MP_OK;
}

mp_status mp_journal_open(mp_journal *j, int meta_fd, uint64_t size, uint32_t block, mp_fault *fault)
{
    MP_ASSERT(size > 0 && block >= MP_BLOCK_MIN && block <= MP_BLOCK_MAX);
    uint64_t blocks = mp_ceil_div(size, block), extents = mp_ceil_div(blocks, 64);
    MP_ASSERT(extents < UINT32_MAX); /* the configuration allows no more */
    *j = (mp_journal){.fd = meta_fd, .size = size, .block = block, .extents = (uint32_t)extents, .fresh = true};
    j->pages = mp_ceil_div(extents, MP_JOURNAL_PAGE_EXTENTS);
    size_t page_bits = mp_bitmap_bytes(j->pages);
    void *words = calloc(j->pages, MP_JOURNAL_PAGE), *page_words = calloc(3, page_bits), *doubt_words = calloc(1, mp_bitmap_bytes(extents));
    j->hot = mp_hot_new();
    j->work = calloc(1, sizeof *j->work);
    mp_bitmap_init(&j->dirty, words, blocks);
    mp_bitmap_init(&j->doubt, doubt_words, extents);
    mp_bitmap_init(&j->changed, page_words, j->pages);
    mp_status status = MP_INTERNAL;
    if (words && page_words && doubt_words && j->hot && j->work) {
        mp_bitmap_init(&j->due, (uint8_t *)page_words + page_bits, j->pages);
        mp_bitmap_init(&j->taken, (uint8_t *)page_words + 2 * page_bits, j->pages);
        j->work->fd = meta_fd;
        j->work->job.run = run;
        if (!(status = read_bitmap(j, fault)))
            status = read_log(j, fault);
    } else {
        *fault = (mp_fault){.status = MP_INTERNAL, .error = ENOMEM, .text = "no memory for the dirty bitmap"};
    }
    if (status)
        mp_journal_close(j);
    return status;
}

void mp_journal_close(mp_journal *j)
{
    MP_ASSERT(!j->running);
    free((void *)j->dirty.words);
    free((void *)j->doubt.words);
    free((void *)j->changed.words);
    free(j->hot);
    free(j->work);
    *j = (mp_journal){.fd = -1};
}

/* --- one write --- */

bool mp_journal_enter(mp_journal *j, uint64_t offset, uint64_t length)
{
    MP_ASSERT(length <= MP_JOURNAL_LENGTH_MAX);
    mp_hot *t = j->hot;
    range r = range_of(j, offset, length);
    MP_ASSERT(r.last_extent - r.first_extent < EXTENTS);
    bool hot = !j->emptying;
    for (uint32_t e = r.first_extent; e <= r.last_extent && hot; e++) {
        uint16_t i = mp_hot_find(t, e);
        hot = i != NONE && t->nodes[i].state == MP_HOT_IN;
    }
    if (!hot && (j->emptying || j->error))
        return false;
    j->stuck &= hot; /* somebody came back: a reason to look, after which nothing is kept for those who do not */
    for (uint32_t e = r.first_extent; e <= r.last_extent; e++) {
        uint16_t i = mp_hot_find(t, e);
        if (i == NONE) {
            mp_hot_wish(t, e);
            continue;
        }
        mp_hot_node *n = &t->nodes[i];
        if (n->state == MP_HOT_IN || n->state == MP_HOT_ENTERING) {
            mp_hot_touch(t, i);
            n->in_flight += hot;
            n->kept = hot ? 0 : j->looks;
        }
    }
    return hot;
}

/* A slot that is in use by a write in flight. */
static mp_hot_node *slot_of(const mp_journal *j, uint32_t extent)
{
    uint16_t i = mp_hot_find(j->hot, extent);
    MP_ASSERT(i < EXTENTS);
    mp_hot_node *n = &j->hot->nodes[i];
    MP_ASSERT(n->state == MP_HOT_IN && n->in_flight > 0);
    return n;
}

void mp_journal_leave(mp_journal *j, uint64_t offset, uint64_t length)
{
    range r = range_of(j, offset, length);
    for (uint32_t e = r.first_extent; e <= r.last_extent; e++)
        if (--slot_of(j, e)->in_flight == 0)
            j->stuck = false;
}

void mp_journal_unflushed(mp_journal *j, uint64_t offset, uint64_t length)
{
    range r = range_of(j, offset, length);
    for (uint32_t e = r.first_extent; e <= r.last_extent; e++)
        slot_of(j, e)->current |= mask_of(&r, e);
    j->unflushed = true;
    j->unflushed_bytes += length;
}

void mp_journal_set(mp_journal *j, uint64_t offset, uint64_t length)
{
    range r = range_of(j, offset, length);
    for (uint64_t e = r.first_extent; e <= r.last_extent; e++)
        set_word(j, e, mask_of(&r, e));
    j->stuck = false;
}

void mp_journal_doubt(mp_journal *j, uint64_t offset, uint64_t length)
{
    range r = range_of(j, offset, length);
    for (uint64_t e = r.first_extent; e <= r.last_extent; e++)
        doubt_word(j, e, mask_of(&r, e));
    j->stuck = false;
}

bool mp_journal_doubted(const mp_journal *j, uint64_t offset, uint64_t length)
{
    range r = range_of(j, offset, length);
    bool doubted = false;
    for (uint64_t e = r.first_extent; e <= r.last_extent; e++)
        doubted |= mp_bitmap_test(&j->doubt, e);
    return doubted;
}

void mp_journal_believe(mp_journal *j) { memset((void *)(uintptr_t)j->doubt.words, 0, mp_bitmap_bytes(j->extents)); }

/* --- confirmed by both --- */

void mp_journal_clear(mp_journal *j, uint64_t first_block, uint64_t blocks)
{
    MP_ASSERT(first_block <= j->dirty.bits && blocks <= j->dirty.bits - first_block);
    if (!blocks)
        return;
    range r = {first_block, first_block + blocks - 1, 0, 0};
    for (uint64_t e = r.first / 64; e <= r.last / 64; e++) {
        uint64_t mask = mask_of(&r, e);
        if (!(word(j, e) & mask))
            continue;
        uint64_t old = atomic_fetch_and_explicit(&j->dirty.words[e], ~mask, memory_order_relaxed);
        j->cleared += (uint64_t)__builtin_popcountll(old & mask);
        mark_changed(j, e);
    }
    if (j->cleared >= MP_JOURNAL_CLEARED)
        mp_journal_flush(j);
}

void mp_journal_barrier_begin(mp_journal *j)
{
    MP_ASSERT(!j->barrier);
    j->barrier = true;
    for (mp_hot_node *n = j->hot->nodes; j->unflushed && n < j->hot->nodes + EXTENTS; n++) {
        n->before |= n->current;
        n->current = 0;
    }
    j->unflushed_before = j->unflushed;
    j->unflushed_bytes_before = j->unflushed_bytes;
    j->unflushed = false;
    j->unflushed_bytes = 0;
}

void mp_journal_barrier_end(mp_journal *j, bool ok)
{
    MP_ASSERT(j->barrier);
    j->barrier = false;
    for (mp_hot_node *n = j->hot->nodes; j->unflushed_before && n < j->hot->nodes + EXTENTS; n++) {
        n->current |= ok ? 0 : n->before;
        n->before = 0;
    }
    j->unflushed |= !ok && j->unflushed_before;
    j->unflushed_bytes += ok ? 0 : j->unflushed_bytes_before;
    j->unflushed_before = false;
    j->unflushed_bytes_before = 0;
    j->stuck = false;
}

static bool covered(const mp_journal *j, const mp_hot_node *n) /* by dirty bits */
{
    uint64_t unflushed = n->current | n->before;
    return !unflushed || !(unflushed & ~word(j, n->extent));
}

/* Somebody who still waits for other slots came for this one since the look before last. */
static bool kept(const mp_journal *j, const mp_hot_node *n) { return n->kept && n->kept + 1 >= j->looks; }

bool mp_journal_wants_barrier(const mp_journal *j)
{
    const mp_hot *t = j->hot;
    uint32_t room = EXTENTS - t->used, held = 0;
    if (j->barrier || j->error || t->wishes <= room)
        return false;
    for (uint32_t i = 0; i < EXTENTS; i++) {
        const mp_hot_node *n = &t->nodes[i];
        if (n->in_flight || n->state != MP_HOT_IN)
            continue;
        held += !covered(j, n);
        room += covered(j, n) && !kept(j, n);
    }
    return held && t->wishes > room;
}

void mp_journal_link_lost(mp_journal *j)
{
    const mp_hot *t = j->hot;
    for (uint16_t i = t->oldest; i != NONE; i = t->nodes[i].newer)
        doubt_word(j, t->nodes[i].extent, t->nodes[i].current | t->nodes[i].before);
    j->stuck = false;
}

/* --- making a job --- */

static bool take_page(mp_journal *j, uint64_t page, uint32_t limit)
{
    if (!mp_bitmap_test(&j->changed, page))
        return true; /* the same on disk, or in this job already */
    if (j->work->page_count >= limit)
        return false;
    mp_bitmap_clear(&j->changed, page);
    j->changed_count--;
    j->due_count -= mp_bitmap_clear(&j->due, page);
    mp_bitmap_set(&j->taken, page);
    j->work->page_count++;
    return true;
}

static void take_due(mp_journal *j)
{
    uint64_t first, last, from = 0;
    while (j->due_count && mp_bitmap_next(&j->due, from, &first, &last))
        for (from = first; from < last; from++)
            if (!take_page(j, from, MP_JOURNAL_JOB_PAGES))
                return;
}

/* M5: nothing in flight, what is unflushed is dirty, and the page with these bits can go to disk before the record. */
static bool evict(mp_journal *j, uint16_t i)
{
    mp_hot_node *n = &j->hot->nodes[i];
    if (n->in_flight || !covered(j, n) || !take_page(j, n->extent / MP_JOURNAL_PAGE_EXTENTS, EVICTION_PAGES))
        return false;
    mp_hot_drop_slot(j->hot, i);
    return true;
}

/* Gives slots to those who wait, in their order, and returns how many. Slots go by last use, but for those that are kept. Such
 * a one goes only if all slots are kept and idle, and then the newest, whose owner is the last in line: so the first in line
 * always gets on. */
static uint32_t give_slots(mp_journal *j)
{
    mp_hot *t = j->hot;
    uint32_t given = 0;
    uint16_t i = t->oldest;
    bool idle = true;
    if (!t->wishes || j->stuck)
        return 0;
    j->looks++;
    while (t->wishes) {
        while (t->free_slot == NONE && i != NONE) {
            uint16_t candidate = i;
            i = t->nodes[i].newer;
            const mp_hot_node *n = &t->nodes[candidate];
            idle &= !n->in_flight && covered(j, n);
            if (n->state == MP_HOT_IN && !kept(j, n))
                evict(j, candidate);
        }
        if (t->free_slot == NONE && (given || !idle || !evict(j, t->newest)))
            break;
        uint16_t slot = mp_hot_take_slot(t, mp_hot_drop_wish(t));
        t->nodes[slot].kept = j->looks;
        given++;
    }
    j->stuck = t->wishes > 0;
    return given;
}

static void make_record(mp_journal *j)
{
    struct mp_journal_work *w = j->work;
    mp_actlog_begin(w->record);
    for (uint32_t i = 0; i < EXTENTS; i++)
        if (j->hot->nodes[i].state != MP_HOT_FREE)
            mp_actlog_put(w->record, i, j->hot->nodes[i].extent);
    w->sequence = j->sequence + 1;
    w->record_count = j->ring_lost ? MP_ACTLOG_PLACES : 1;
}

static void copy_pages(mp_journal *j)
{
    struct mp_journal_work *w = j->work;
    uint64_t first, last, from = 0;
    uint32_t count = 0;
    while (count < w->page_count && mp_bitmap_next(&j->taken, from, &first, &last))
        for (from = first; from < last; from++) {
            mp_bitmap_clear(&j->taken, from);
            uint64_t extent = from * MP_JOURNAL_PAGE_EXTENTS; /* the memory too is a whole number of pages */
            for (uint32_t k = 0; k < MP_JOURNAL_PAGE_EXTENTS; k++)
                mp_store64(w->data[count] + 8 * k, word(j, extent + k));
            w->page[count++] = from;
        }
    MP_ASSERT(count == w->page_count);
}

mp_job *mp_journal_job(mp_journal *j)
{
    struct mp_journal_work *w = j->work;
    if (j->running || j->error)
        return NULL;
    w->page_count = 0;
    bool all_first = j->recovering || j->emptying, logs;
    if (all_first || (j->asked > j->begun && j->begun == j->reached)) {
        mp_bitmap_merge(&j->due, &j->changed);
        j->due_count = j->changed_count;
        j->begun = j->asked;
    }
    if (all_first) {
        take_due(j);
        logs = j->changed_count == 0;
        while (logs && j->emptying && j->hot->used)
            mp_hot_drop_slot(j->hot, j->hot->oldest);
        if (logs)
            give_slots(j);
    } else {
        logs = give_slots(j) > 0;
        take_due(j);
    }
    if (!logs && !w->page_count)
        return NULL;
    copy_pages(j);
    w->writes_record = logs;
    w->empties = logs && j->emptying;
    w->syncs_first = j->fresh; /* the last process may have written a record and not come to this */
    if (logs)
        make_record(j);
    w->error = 0;
    j->running = true;
    return &w->job;
}

/* A flush that was asked for while the last job ran, and finds nothing that the job did not write. */
static void settle_flush(mp_journal *j)
{
    if (!j->running && !j->recovering && !j->emptying && !j->error && j->begun == j->reached && !j->changed_count)
        j->begun = j->reached = j->asked;
}

int mp_journal_finished(mp_journal *j, mp_job *job)
{
    struct mp_journal_work *w = j->work;
    MP_ASSERT(job == &w->job && j->running);
    j->running = false;
    j->stuck = false;
    if ((j->error = w->error))
        return j->error;
    j->fresh = false;
    if (w->writes_record) {
        j->sequence += w->record_count;
        for (uint32_t i = 0; i < EXTENTS; i++)
            if (j->hot->nodes[i].state == MP_HOT_ENTERING)
                j->hot->nodes[i].state = MP_HOT_IN;
        j->recovering = j->ring_lost = false;
    }
    j->emptying &= !w->empties;
    if (!j->due_count && !j->emptying)
        j->reached = j->begun;
    settle_flush(j);
    return 0;
}

uint64_t mp_journal_flush(mp_journal *j)
{
    j->cleared = 0;
    if (j->asked == j->begun)
        j->asked++;
    settle_flush(j);
    return j->asked;
}

uint64_t mp_journal_empty(mp_journal *j)
{
    mp_hot *t = j->hot;
    for (uint32_t i = 0; i < EXTENTS; i++)
        MP_ASSERT(t->nodes[i].in_flight == 0);
    while (t->wishes)
        mp_hot_drop_wish(t);
    mp_journal_link_lost(j);
    j->emptying = true;
    return mp_journal_flush(j);
}

uint32_t mp_journal_active(const mp_journal *j) { return j->hot->used; }

/* --- the job, in another thread --- */

static int write_pages(struct mp_journal_work *w)
{
    for (uint32_t i = 0, next; i < w->page_count; i = next) {
        for (next = i + 1; next < w->page_count && w->page[next] == w->page[next - 1] + 1;)
            next++;
        int error = mp_disk_write(w->fd, w->data[i], (size_t)(next - i) * MP_JOURNAL_PAGE, MP_JOURNAL_BITMAP + w->page[i] * MP_JOURNAL_PAGE);
        if (error)
            return error;
    }
    return w->page_count || w->syncs_first ? mp_disk_sync(w->fd) : 0;
}

static int write_record(struct mp_journal_work *w)
{
    for (uint32_t k = 0; k < w->record_count; k++) {
        uint64_t sequence = w->sequence + k;
        mp_actlog_seal(w->record, sequence);
        uint64_t offset = MP_JOURNAL_LOG + sequence % MP_ACTLOG_PLACES * MP_ACTLOG_RECORD;
        int error = mp_disk_write(w->fd, w->record, sizeof w->record, offset);
        if (error)
            return error;
    }
    return mp_disk_sync(w->fd);
}

static void run(mp_job *job, void *worker)
{
    struct mp_journal_work *w = (struct mp_journal_work *)job; /* its first member */
    (void)worker;
    w->error = write_pages(w);
    if (!w->error && w->writes_record)
        w->error = write_record(w);
}
