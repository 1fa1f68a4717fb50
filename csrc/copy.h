/* copy.h - the copy engine: makes a target image equal to a source image, or says where they differ.
 *
 * Three entries, one per arrangement: both images here (no digests: they are compared directly), the source here, the target
 * here. Each runs to its end in the calling process, which is a helper (helper.h): it installs a SIGBUS handler.
 *
 * Contract: MP_OK only after every completion was checked and the target's fdatasync succeeded. Counters in `shared` only
 * grow, and only to values that are true at that moment (rule R11).
 */
#ifndef MP_COPY_H
#define MP_COPY_H

#include "base.h"
#include "bitmap.h"
#include "chan.h"
#include "pool.h"
#include "scan.h"
#include "store.h"
#include "wire.h"

typedef struct mp_progress { /* bytes, but where named otherwise */
    _Atomic uint64_t total, done, skipped; /* skipped: found equal (holes too) */
    _Atomic uint64_t sent;                 /* data that travelled; 0 locally */
    _Atomic uint64_t differing, differing_blocks;
    _Atomic uint64_t written, punched;
    _Atomic uint64_t wire_out, wire_in;
    _Atomic uint64_t changed_blocks; /* blocks of the source that changed while it was copied */
    _Atomic uint64_t recheck_total, recheck_done;
} mp_progress;

typedef struct mp_shared { /* the memory that parent and helper share */
    mp_progress progress;
    _Atomic int cancel;
    _Atomic int ended; /* fault is final */
    mp_fault fault;
} mp_shared;

typedef struct mp_worker { /* one thread's own things */
    struct mp_copy *copy;
    mp_reader source, target;
    uint8_t *block; /* MP_BLOCK_MAX bytes: a block being put together */
} mp_worker;

typedef struct mp_copy {
    /* set by the caller */
    int source_fd, target_fd; /* -1: that side is the peer's */
    mp_chan *chan;            /* NULL: local */
    uint64_t size, seed, rate;
    uint32_t block;
    bool write, recheck, ranges;
    unsigned threads;
    uint64_t timeout_ns;
    int range_fd;  /* differing ranges go here as pairs of host u64, in order; -1: not wanted */
    int cancel_fd; /* readable once shared->cancel was set */
    mp_shared *shared;
    /* the engine's */
    mp_image source, target;
    mp_pool pool;
    mp_worker *workers;
    mp_bitmap touched; /* for the re-check: MP_TOUCHED bytes a bit */
    _Atomic uint64_t paced_until_ns;
    bool synced; /* the target's fdatasync was done or does not matter */
    uint64_t range_offset, range_length; /* the range being gathered for range_fd */
    mp_fault fault;
} mp_copy;

#define MP_TOUCHED ((uint64_t)64 << 10)

void mp_copy_local(mp_copy *copy);
void mp_copy_source(mp_copy *copy);
void mp_copy_target(mp_copy *copy);

/* Shared by the three. */
static inline void mp_copy_store(mp_copy *copy, mp_store *store)
{
    mp_store_begin(store, &copy->target, &copy->shared->progress.written, &copy->shared->progress.punched);
}
mp_status mp_copy_begin(mp_copy *copy); /* images, workers, pool */
void mp_copy_finish(mp_copy *copy);     /* frees them; the outcome goes to shared->fault */
void mp_copy_fail(mp_copy *copy, const mp_fault *fault); /* the first one stays */
static inline bool mp_copy_cancelled(const mp_copy *copy) { return copy->shared->cancel; }
/* Takes `bytes` from the rate's budget and returns the nanoseconds to wait before going on. */
uint64_t mp_copy_pace(mp_copy *copy, uint64_t bytes);
void mp_copy_touch(mp_copy *copy, uint64_t offset, uint64_t length);
bool mp_copy_touched(const mp_copy *copy, uint64_t offset, uint64_t length); /* any of it */
/* Reports differing pieces of a unit, units in the order of their offsets. False: the parent is gone. */
bool mp_copy_report(mp_copy *copy, uint64_t offset, uint64_t length, const mp_bitmap *pieces);
/* fdatasync of the target, at the end of a run however it ended, when no worker writes any more. Its failure outweighs an
 * interruption: the kernel reports it once, and the next run would not hear of it. */
void mp_copy_sync(mp_copy *copy);
/* Fails the run if an image holds less than it did at the start. */
void mp_copy_check_sizes(mp_copy *copy);
bool mp_copy_report_end(mp_copy *copy);

/* Runs a job's body guarded: a SIGBUS becomes an MP_SHRANK fault that names the image and the offset. */
mp_status mp_worker_guarded(mp_worker *worker, mp_status (*body)(mp_worker *, void *), void *argument, mp_fault *fault);

#endif
