/* scan.h - reads an image for comparing: what is a hole, what is warm, and how a range gets into memory.
 *
 * An image is covered window by window (MP_WINDOW). For each run of data in a window a reader chooses once, by asking the
 * kernel how much of it is in the page cache: at least half -> it is mapped, else it is read past the cache in large aligned
 * pieces (O_DIRECT), else (no O_DIRECT there) by pread. Holes are never read, and do not count as missing from the cache.
 *
 * Measured, GB/s, one thread / two, Zen 4 with ext4 on Linux 6.18:
 *   warm: mmap + XXH3 16 / 24, pread 1 MiB + XXH3 11 / 14; two files: mmap + memcmp 12 / 14, pread + memcmp 4.4 / 8
 *   cold: O_DIRECT 1 MiB 2.1-2.3, buffered with read-ahead 1.2-1.4, O_DIRECT 64 KiB 0.54
 *   cold, two images by this engine, two threads: 1 MiB requests into small pages 1.27, 4 MiB into huge pages 1.9, 2 MiB 2.9
 * With a share c of a run in the cache, mapping costs (1-c)/1.3 + c/16 and O_DIRECT 1/2.2 seconds a GB: even at c = 0.45.
 *
 * Contract: a reader belongs to one thread. Mapped data may raise SIGBUS: touch it only inside mp_guard_call.
 */
#ifndef MP_SCAN_H
#define MP_SCAN_H

#include "base.h"

typedef struct mp_image {
    int fd, direct_fd; /* direct_fd -1: no O_DIRECT there */
    uint64_t size;     /* bytes that take part, not more than the image holds */
    mp_side side;
    bool always_cold; /* re-reading what was written: the disk is asked, not the cache */
} mp_image;

/* Makes the second descriptor for O_DIRECT; the caller keeps fd. */
void mp_image_open(mp_image *image, int fd, uint64_t size, mp_side side);
void mp_image_close(mp_image *image);

typedef struct mp_reader {
    const mp_image *image;
    uint64_t offset, length; /* the window */
    uint8_t *map;            /* of the whole window, read-only, shared; made when the first warm run is met */
    bool unmappable;         /* no address space, or a file system without mmap */
    uint64_t chosen, chosen_end; /* the run that was asked about last, and the answer */
    bool warm;
    uint8_t *buffer;         /* one huge page, made at the first need */
    uint64_t buffer_offset, buffer_length;
    uint64_t extent, extent_end; /* a known run of data [extent, extent_end) ... */
    uint64_t hole;               /* ... and the hole [hole, extent) in front of it */
} mp_reader;

/* Begins a window. */
void mp_reader_begin(mp_reader *reader, const mp_image *image, uint64_t offset, uint64_t length);
void mp_reader_end(mp_reader *reader);  /* unmaps; keeps the buffer for the next window */
void mp_reader_free(mp_reader *reader); /* gives the buffer back */

/* Data of [offset, offset + length), inside the window, at most MP_BULK long. `ahead` bytes (>= length) may be fetched in
 * one go when the caller is going to walk on. Valid until the next call on this reader. Fails with MP_IO or MP_SHRANK. */
mp_status mp_reader_get(mp_reader *reader, uint64_t offset, uint64_t length, uint64_t ahead, const uint8_t **data,
                        mp_fault *fault);

/* Whether mp_reader_get of that range leaves the data of earlier calls where it is. */
bool mp_reader_keeps(const mp_reader *reader, uint64_t offset, uint64_t length);

/* Whether all of [offset, offset + length) is a hole. */
mp_status mp_reader_is_hole(mp_reader *reader, uint64_t offset, uint64_t length, bool *is_hole, mp_fault *fault);

/* If address lies in this reader's map: true, and the image offset it stands for. */
bool mp_reader_maps(const mp_reader *reader, const void *address, uint64_t *offset);

mp_status mp_fault_io(mp_fault *fault, int error, mp_side side, uint64_t offset, const char *what);

#endif
