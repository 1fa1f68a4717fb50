/* copy.c - what the three arrangements of copy.h have in common. */
#define _GNU_SOURCE
#include "copy.h"

#include "disk.h"
#include "guard.h"
#include "loop.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define THREADS_MAX 16u

void mp_copy_fail(mp_copy *copy, const mp_fault *fault)
{
    MP_ASSERT(fault->status != MP_OK);
    if (copy->fault.status == MP_OK)
        copy->fault = *fault;
}

mp_status mp_copy_begin(mp_copy *copy)
{
    mp_guard_install();
    atomic_store(&copy->shared->progress.total, copy->size);
    if (copy->source_fd >= 0)
        mp_image_open(&copy->source, copy->source_fd, copy->size, MP_SIDE_SOURCE);
    if (copy->target_fd >= 0)
        mp_image_open(&copy->target, copy->target_fd, copy->size, MP_SIDE_TARGET);
    unsigned threads = copy->threads;
    if (!threads) {
        long processors = sysconf(_SC_NPROCESSORS_ONLN);
        threads = processors < 1 ? 1 : processors > 4 ? 4 : (unsigned)processors; /* memory bandwidth is used up by then */
    }
    threads = threads > THREADS_MAX ? THREADS_MAX : threads;
    copy->workers = calloc(threads, sizeof *copy->workers);
    bool memory = copy->workers != NULL;
    for (unsigned i = 0; memory && i < threads; i++) {
        copy->workers[i].copy = copy;
        memory = (copy->workers[i].block = aligned_alloc(4096, MP_BLOCK_MAX)) != NULL;
    }
    if (memory && copy->recheck) {
        uint64_t bits = mp_ceil_div(copy->size, MP_TOUCHED);
        void *words = calloc(1, mp_bitmap_bytes(bits) + 8);
        memory = words != NULL;
        mp_bitmap_init(&copy->touched, words, bits);
    }
    mp_status status = memory ? mp_pool_start(&copy->pool, threads, copy->workers, sizeof *copy->workers) : MP_INTERNAL;
    if (status) {
        copy->threads = threads;
        mp_copy_fail(copy, &(mp_fault){.status = status, .text = "out of memory or threads"});
    }
    copy->threads = threads;
    return status;
}

void mp_copy_sync(mp_copy *copy)
{
    if (!copy->write || copy->target_fd < 0 || copy->synced)
        return;
    copy->synced = true;
    int error = mp_disk_sync(copy->target_fd);
    if (!error)
        return;
    if (copy->fault.status == MP_CANCELLED)
        copy->fault.status = MP_OK;
    mp_fault fault;
    mp_fault_io(&fault, error, MP_SIDE_TARGET, 0, "fdatasync");
    mp_copy_fail(copy, &fault);
}

void mp_copy_check_sizes(mp_copy *copy)
{
    const mp_image *images[] = {&copy->source, &copy->target};
    int fds[] = {copy->source_fd, copy->target_fd};
    for (int i = 0; i < 2; i++) {
        int error = fds[i] >= 0 ? mp_disk_holds(fds[i], copy->size) : 0;
        mp_fault fault;
        if (!error)
            continue;
        mp_fault_io(&fault, error, images[i]->side, copy->size, "ask for the size");
        mp_copy_fail(copy, &fault);
    }
}

void mp_copy_finish(mp_copy *copy)
{
    if (copy->pool.thread)
        mp_pool_stop(&copy->pool);
    if (copy->workers) /* also after an interruption or a failure: what was written so far is made durable */
        mp_copy_sync(copy);
    for (unsigned i = 0; copy->workers && i < copy->threads; i++) {
        mp_reader_free(&copy->workers[i].source);
        mp_reader_free(&copy->workers[i].target);
        free(copy->workers[i].block);
    }
    free(copy->workers);
    free((void *)copy->touched.words);
    if (copy->source_fd >= 0)
        mp_image_close(&copy->source);
    if (copy->target_fd >= 0)
        mp_image_close(&copy->target);
    if (copy->fault.status == MP_OK && copy->shared->progress.changed_blocks)
        copy->fault = (mp_fault){.status = MP_SOURCE_CHANGED, .side = MP_SIDE_SOURCE};
    copy->shared->fault = copy->fault;
    atomic_store(&copy->shared->ended, 1);
}

uint64_t mp_copy_pace(mp_copy *copy, uint64_t bytes)
{
    if (!copy->rate || !bytes)
        return 0;
    /* One moving point in time: "all that was sent so far is paid for at". A pause earns no credit beyond 100 ms. */
    uint64_t now = mp_now_ns(), price = (uint64_t)((double)bytes * 1e9 / (double)copy->rate);
    uint64_t before = atomic_load(&copy->paced_until_ns), after;
    do
        after = mp_max(before, now - 100000000u) + price;
    while (!atomic_compare_exchange_weak(&copy->paced_until_ns, &before, after));
    return after > now ? after - now : 0;
}

void mp_copy_touch(mp_copy *copy, uint64_t offset, uint64_t length)
{
    if (copy->recheck && length)
        mp_bitmap_set_range(&copy->touched, offset / MP_TOUCHED, mp_ceil_div(offset + length, MP_TOUCHED));
}

bool mp_copy_touched(const mp_copy *copy, uint64_t offset, uint64_t length)
{
    uint64_t first, last;
    return mp_bitmap_next(&copy->touched, offset / MP_TOUCHED, &first, &last) && first * MP_TOUCHED < offset + length;
}

static bool put_range(mp_copy *copy)
{
    uint64_t pair[2] = {copy->range_offset, copy->range_length};
    copy->range_length = 0;
    const char *at = (const char *)pair;
    size_t left = sizeof pair;
    while (left) {
        ssize_t put = write(copy->range_fd, at, left);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return false;
        at += put;
        left -= (size_t)put;
    }
    return true;
}

bool mp_copy_report(mp_copy *copy, uint64_t offset, uint64_t length, const mp_bitmap *pieces)
{
    if (copy->range_fd < 0)
        return true;
    uint64_t first, last = 0;
    while (mp_bitmap_next(pieces, last, &first, &last)) {
        uint64_t begin = offset + first * MP_PIECE, end = mp_min(offset + last * MP_PIECE, offset + length);
        if (copy->range_length && copy->range_offset + copy->range_length == begin) {
            copy->range_length = end - copy->range_offset;
            continue;
        }
        if (copy->range_length && !put_range(copy))
            return false;
        copy->range_offset = begin;
        copy->range_length = end - begin;
    }
    return true;
}

bool mp_copy_report_end(mp_copy *copy)
{
    return copy->range_fd < 0 || !copy->range_length || put_range(copy);
}

typedef struct guarded {
    mp_worker *worker;
    mp_status (*body)(mp_worker *, void *);
    void *argument;
    mp_status status;
} guarded;

static void run_guarded(void *argument)
{
    guarded *call = argument;
    call->status = call->body(call->worker, call->argument);
}

mp_status mp_worker_guarded(mp_worker *worker, mp_status (*body)(mp_worker *, void *), void *argument, mp_fault *fault)
{
    guarded call = {worker, body, argument, MP_OK};
    const void *address;
    if (mp_guard_call(run_guarded, &call, &address))
        return call.status;
    *fault = (mp_fault){.status = MP_SHRANK, .text = "the image shrank or failed while it was read"};
    uint64_t offset;
    if (mp_reader_maps(&worker->source, address, &offset))
        fault->side = MP_SIDE_SOURCE;
    else if (mp_reader_maps(&worker->target, address, &offset))
        fault->side = MP_SIDE_TARGET;
    else
        offset = 0;
    fault->offset = offset;
    return MP_SHRANK;
}
