/* copy_local.c - both images on this host: compared directly, window by window, by all workers at once.
 *
 * A window is settled by the worker that compared it: it writes what differs at once, while both blocks are in its cache.
 * The owner thread only hands out windows (in order, holes of both sides skipped), and takes them back in order, so that
 * differences are reported in order however the workers finish.
 */
#define _GNU_SOURCE
#include "copy.h"

#include "disk.h"
#include "loop.h"

#include <time.h>

#define SLOTS 32u
#define SPAN ((uint64_t)2 << 20) /* bytes compared between two looks ahead: what a reader fetches at once */

typedef struct window_job {
    mp_job job;
    mp_copy *copy;
    bool finished, recheck;
    uint64_t offset, length;
    uint64_t skipped, differing, differing_blocks;
    uint64_t pieces[MP_WINDOW_PIECES / 64];
    mp_status status;
    mp_fault fault;
} window_job;

/* One block of both images: which pieces differ, and of these which are zero at the source. */
static mp_status compare_block(window_job *w, const uint8_t *source, const uint8_t *target, uint64_t offset,
                               uint64_t length, mp_store *store)
{
    uint64_t differ, zero = 0;
    if (!source) {
        differ = zero = mp_pieces_nonzero(target, length);
    } else if (!target) {
        differ = mp_pieces_nonzero(source, length);
    } else {
        differ = mp_pieces_differ(source, target, length);
        for (uint64_t left = differ; left; left &= left - 1) {
            uint32_t i = (uint32_t)__builtin_ctzll(left);
            if (mp_is_zero(source + i * MP_PIECE, mp_piece_length(length, i)))
                zero |= 1ull << i;
        }
    }
    uint64_t bytes = mp_mask_bytes(differ, length);
    w->skipped += length - bytes;
    w->differing += bytes;
    for (uint64_t left = differ; left; left &= left - 1) {
        uint32_t i = (uint32_t)__builtin_ctzll(left);
        uint64_t at = offset + i * MP_PIECE;
        mp_bit_set(w->pieces, (uint32_t)((at - w->offset) / MP_PIECE));
        if (store) {
            mp_status status = mp_store_add(store, at, mp_piece_length(length, i), zero >> i & 1 ? NULL : source + i * MP_PIECE, &w->fault);
            if (status)
                return status;
        }
    }
    return MP_OK;
}

static void pause_ns(mp_copy *copy, uint64_t nanoseconds)
{
    for (uint64_t until = mp_now_ns() + nanoseconds, now; (now = mp_now_ns()) < until && !mp_copy_cancelled(copy);) {
        uint64_t part = mp_min(until - now, 50000000u);
        nanosleep(&(struct timespec){.tv_nsec = (long)part}, NULL);
    }
}

/* Under a rate limit each block is written at once and paid for before the next. */
static mp_status pace(mp_copy *copy, mp_store *store, mp_fault *fault)
{
    uint64_t before = store->written;
    mp_status status = mp_store_flush(store, fault);
    if (!status)
        pause_ns(copy, mp_copy_pace(copy, store->written - before));
    return !status && mp_copy_cancelled(copy) ? MP_CANCELLED : status;
}

static mp_status compare_window(mp_worker *worker, void *argument)
{
    window_job *w = argument;
    mp_copy *copy = w->copy;
    mp_store store;
    mp_copy_store(copy, &store);
    bool write = copy->write && !w->recheck;
    for (uint64_t span = w->offset; span < w->offset + w->length; span += SPAN) {
        uint64_t span_end = mp_min(span + SPAN, w->offset + w->length);
        for (uint64_t at = span; at < span_end; at += MP_TOUCHED) {
            uint64_t length = mp_min(MP_TOUCHED, span_end - at);
            if (w->recheck && !mp_bitmap_test(&copy->touched, at / MP_TOUCHED))
                continue;
            bool source_hole, target_hole;
            const uint8_t *source = NULL, *target = NULL;
            mp_status status = mp_reader_is_hole(&worker->source, at, length, &source_hole, &w->fault);
            if (!status)
                status = mp_reader_is_hole(&worker->target, at, length, &target_hole, &w->fault);
            if (!status && source_hole && target_hole) {
                w->skipped += length;
                continue;
            }
            if (!status && !source_hole && !mp_reader_keeps(&worker->source, at, length))
                status = mp_store_flush(&store, &w->fault); /* the run being gathered points into what is about to go */
            if (!status && !source_hole)
                status = mp_reader_get(&worker->source, at, length, span_end - at, &source, &w->fault);
            if (!status && !target_hole)
                status = mp_reader_get(&worker->target, at, length, span_end - at, &target, &w->fault);
            if (!status)
                status = compare_block(w, source, target, at, length, write ? &store : NULL);
            if (!status && copy->rate)
                status = pace(copy, &store, &w->fault);
            if (status)
                return status;
        }
    }
    return mp_store_flush(&store, &w->fault);
}

static void run_window(mp_job *job, void *argument)
{
    window_job *w = (window_job *)job;
    mp_worker *worker = argument;
    mp_copy *copy = w->copy;
    if (mp_copy_cancelled(copy)) {
        w->status = MP_CANCELLED;
        return;
    }
    mp_reader_begin(&worker->source, &copy->source, w->offset, w->length);
    mp_reader_begin(&worker->target, &copy->target, w->offset, w->length);
    w->status = mp_worker_guarded(worker, compare_window, w, &w->fault);
    mp_reader_end(&worker->source);
    mp_reader_end(&worker->target);
    if (w->status)
        return;
    for (uint64_t at = 0; at < w->length; at += copy->block) { /* --block-size only counts here */
        bool differs = false;
        for (uint64_t piece = at / MP_PIECE; piece * MP_PIECE < mp_min(at + copy->block, w->length); piece++)
            differs = differs || mp_bit(w->pieces, (uint32_t)piece);
        w->differing_blocks += differs;
    }
}

/* The next window in which either image has data (or, re-checking, something was written). False: none is left. */
static bool plan(mp_copy *copy, uint64_t *cursor, bool recheck, window_job *w)
{
    if (recheck) {
        uint64_t first, last;
        if (!mp_bitmap_next(&copy->touched, *cursor / MP_TOUCHED, &first, &last))
            return false;
        *cursor = mp_max(*cursor, first * MP_TOUCHED);
    } else {
        uint64_t source, target;
        int error = mp_disk_next_data(copy->source_fd, *cursor, copy->size, &source);
        mp_side side = MP_SIDE_SOURCE;
        if (!error) {
            error = mp_disk_next_data(copy->target_fd, *cursor, copy->size, &target);
            side = MP_SIDE_TARGET;
        }
        if (error) {
            mp_fault fault;
            mp_fault_io(&fault, error, side, *cursor, "find holes");
            mp_copy_fail(copy, &fault);
            return false;
        }
        uint64_t next = mp_max(*cursor, mp_down(mp_min(source, target), MP_BLOCK_MAX)); /* so that a block is never cut in two */
        if (next >= copy->size)
            next = copy->size;
        atomic_fetch_add(&copy->shared->progress.done, next - *cursor);
        atomic_fetch_add(&copy->shared->progress.skipped, next - *cursor);
        *cursor = next;
    }
    if (*cursor >= copy->size)
        return false;
    w->offset = *cursor;
    w->length = mp_min(mp_down(*cursor, MP_WINDOW) + MP_WINDOW, copy->size) - *cursor;
    *cursor += w->length;
    return true;
}

static void settle(mp_copy *copy, window_job *w)
{
    mp_progress *progress = &copy->shared->progress;
    if (w->status) {
        if (w->status == MP_CANCELLED)
            w->fault = (mp_fault){.status = MP_CANCELLED};
        mp_copy_fail(copy, &w->fault);
        return;
    }
    if (w->recheck) {
        if (w->differing)
            mp_copy_fail(copy, &(mp_fault){.status = MP_RECHECK, .side = MP_SIDE_TARGET, .offset = w->offset});
        atomic_fetch_add(&progress->recheck_done, w->skipped + w->differing); /* only what was touched was looked at */
        return;
    }
    mp_bitmap pieces;
    mp_bitmap_init(&pieces, w->pieces, mp_ceil_div(w->length, MP_PIECE));
    if (!mp_copy_report(copy, w->offset, w->length, &pieces))
        mp_copy_fail(copy, &(mp_fault){.status = MP_CANCELLED});
    uint64_t first, last = 0;
    while (copy->recheck && mp_bitmap_next(&pieces, last, &first, &last))
        mp_copy_touch(copy, w->offset + first * MP_PIECE, mp_min((last - first) * MP_PIECE, w->length - first * MP_PIECE));
    atomic_fetch_add(&progress->done, w->length);
    atomic_fetch_add(&progress->skipped, w->skipped);
    atomic_fetch_add(&progress->differing, w->differing);
    atomic_fetch_add(&progress->differing_blocks, w->differing_blocks);
}

/* One pass over the images. Windows are handed out while slots are free and come back in order. */
static void pass(mp_copy *copy, window_job *slots, bool recheck)
{
    uint64_t cursor = 0, next = 0, oldest = 0;
    bool more = true;
    while (more || oldest < next) {
        while (more && next - oldest < SLOTS && copy->fault.status == MP_OK) {
            window_job *w = &slots[next % SLOTS];
            *w = (window_job){.job.run = run_window, .copy = copy, .recheck = recheck};
            if (!(more = plan(copy, &cursor, recheck, w)))
                break;
            mp_pool_submit(&copy->pool, &w->job);
            next++;
        }
        if (copy->fault.status != MP_OK)
            more = false;
        window_job *done = (window_job *)mp_pool_wait(&copy->pool);
        if (!done)
            continue;
        done->finished = true;
        while (oldest < next && slots[oldest % SLOTS].finished)
            settle(copy, &slots[oldest++ % SLOTS]);
    }
}

void mp_copy_local(mp_copy *copy)
{
    window_job *slots = NULL;
    if (mp_copy_begin(copy) == MP_OK) {
        slots = calloc(SLOTS, sizeof *slots);
        if (!slots)
            mp_copy_fail(copy, &(mp_fault){.status = MP_INTERNAL, .text = "out of memory"});
    }
    if (slots)
        pass(copy, slots, false);
    if (slots) {
        mp_copy_check_sizes(copy);
        mp_copy_sync(copy);
    }
    if (slots && copy->write && copy->recheck && copy->fault.status == MP_OK) {
        atomic_store(&copy->shared->progress.recheck_total, mp_bitmap_count(&copy->touched) * MP_TOUCHED);
        mp_disk_drop_cache(copy->target_fd, 0, 0);
        copy->target.always_cold = true;
        pass(copy, slots, true);
    }
    if (slots && !mp_copy_report_end(copy))
        mp_copy_fail(copy, &(mp_fault){.status = MP_CANCELLED});
    mp_copy_finish(copy);
    free(slots);
}
