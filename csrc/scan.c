/* scan.c - see scan.h. */
#define _GNU_SOURCE
#include "scan.h"

#include "disk.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define FETCH ((uint64_t)2 << 20) /* one huge page: see the measurement in scan.h */
#define FETCH_ALIGN ((size_t)2 << 20)

void mp_image_open(mp_image *image, int fd, uint64_t size, mp_side side)
{
    *image = (mp_image){.fd = fd, .direct_fd = mp_disk_open_direct(fd), .size = size, .side = side};
}

void mp_image_close(mp_image *image)
{
    if (image->direct_fd >= 0)
        close(image->direct_fd);
    image->direct_fd = -1;
}

mp_status mp_fault_io(mp_fault *fault, int error, mp_side side, uint64_t offset, const char *what)
{
    *fault = (mp_fault){.side = side, .offset = offset};
    if (error == MP_DISK_ENDED) {
        fault->status = MP_SHRANK;
        snprintf(fault->text, sizeof fault->text, "the image ends before byte %llu", (unsigned long long)offset);
    } else {
        fault->status = MP_IO;
        fault->error = error;
        snprintf(fault->text, sizeof fault->text, "%s", what);
    }
    return fault->status;
}

void mp_reader_begin(mp_reader *reader, const mp_image *image, uint64_t offset, uint64_t length)
{
    MP_ASSERT(!reader->map && length && length <= MP_WINDOW && offset + length <= image->size);
    if (reader->image != image)
        reader->extent = reader->extent_end = reader->hole = 0;
    reader->image = image;
    reader->offset = offset;
    reader->length = length;
    reader->buffer_length = 0;
    reader->chosen = reader->chosen_end = 0;
    reader->unmappable = false;
}

/* Decides about the run of data at `offset`: the extent if it is known, else the rest of the window. */
static void choose(mp_reader *reader, uint64_t offset)
{
    const mp_image *image = reader->image;
    uint64_t window_end = reader->offset + reader->length;
    bool known = offset >= reader->hole && offset < reader->extent_end;
    uint64_t data = known ? mp_max(offset, reader->extent) : offset;
    reader->chosen = offset;
    reader->chosen_end = known ? mp_min(reader->extent_end, window_end) : window_end;
    uint64_t length = reader->chosen_end - data;
    reader->warm = !image->always_cold && !reader->unmappable && mp_disk_cached(image->fd, data, length, length) >= length / 2;
    if (!reader->warm || reader->map)
        return;
    void *map = mmap(NULL, reader->length, PROT_READ, MAP_SHARED, image->fd, (off_t)reader->offset);
    if (map != MAP_FAILED)
        reader->map = map;
    else
        reader->warm = false, reader->unmappable = true;
}

void mp_reader_end(mp_reader *reader)
{
    if (reader->map)
        munmap(reader->map, reader->length);
    reader->map = NULL;
    reader->length = reader->buffer_length = 0;
    reader->extent = reader->extent_end = reader->hole = 0; /* what was a hole may be written before the next window */
}

void mp_reader_free(mp_reader *reader)
{
    mp_reader_end(reader);
    free(reader->buffer);
    reader->buffer = NULL;
}

static mp_status fill(mp_reader *reader, uint64_t offset, uint64_t length, mp_fault *fault)
{
    const mp_image *image = reader->image;
    if (!reader->buffer) {
        reader->buffer = aligned_alloc(FETCH_ALIGN, FETCH);
        if (!reader->buffer) {
            *fault = (mp_fault){.status = MP_INTERNAL, .text = "out of memory"};
            return MP_INTERNAL;
        }
        (void)madvise(reader->buffer, FETCH, MADV_HUGEPAGE); /* one segment of a request per huge page, not per 4 KiB */
    }
    /* Offsets are multiples of a piece; only the end of the image may not be. O_DIRECT wants whole sectors, and gives a
     * short answer at the end of a file, which is all right as long as it reaches the image's size. */
    uint64_t whole = mp_ceil_div(length, MP_PIECE) * MP_PIECE, got = 0;
    int error = EINVAL;
    if (image->direct_fd >= 0 && offset % MP_PIECE == 0) {
        error = 0;
        while (got < length && !error) {
            ssize_t part = pread(image->direct_fd, reader->buffer + got, whole - got, (off_t)(offset + got));
            if (part < 0) {
                error = errno == EINTR ? 0 : errno;
            } else if (part == 0) {
                error = MP_DISK_ENDED;
            } else if (got + (uint64_t)part < length && part % (ssize_t)MP_PIECE) {
                error = EINVAL; /* a short answer in the middle: the plain way takes it from here */
            } else {
                got += (uint64_t)part;
            }
        }
    }
    if (error == EINVAL) /* no O_DIRECT, or not at this alignment */
        error = mp_disk_read(image->fd, reader->buffer, length, offset), got = 0;
    if (error)
        return mp_fault_io(fault, error, image->side, error == MP_DISK_ENDED ? offset + got : offset, "read");
    reader->buffer_offset = offset;
    reader->buffer_length = length;
    return MP_OK;
}

mp_status mp_reader_get(mp_reader *reader, uint64_t offset, uint64_t length, uint64_t ahead, const uint8_t **data,
                        mp_fault *fault)
{
    MP_ASSERT(length && length <= MP_BULK && offset >= reader->offset && offset + length <= reader->offset + reader->length);
    if (offset < reader->chosen || offset >= reader->chosen_end)
        choose(reader, offset);
    if (reader->warm) {
        *data = reader->map + (offset - reader->offset);
        return MP_OK;
    }
    if (offset < reader->buffer_offset || offset + length > reader->buffer_offset + reader->buffer_length) {
        ahead = mp_min(ahead, mp_ceil_div(reader->chosen_end - offset, MP_PIECE) * MP_PIECE);
        uint64_t fetch = mp_min(mp_min(mp_max(length, ahead), FETCH), reader->offset + reader->length - offset);
        mp_status status = fill(reader, offset, fetch, fault);
        if (status)
            return status;
    }
    *data = reader->buffer + (offset - reader->buffer_offset);
    return MP_OK;
}

bool mp_reader_keeps(const mp_reader *reader, uint64_t offset, uint64_t length)
{
    if (offset < reader->chosen || offset >= reader->chosen_end)
        return false;
    return reader->warm || (offset >= reader->buffer_offset && offset + length <= reader->buffer_offset + reader->buffer_length);
}

mp_status mp_reader_is_hole(mp_reader *reader, uint64_t offset, uint64_t length, bool *is_hole, mp_fault *fault)
{
    uint64_t end = offset + length, window_end = reader->offset + reader->length;
    while (!(offset >= reader->hole && offset < reader->extent_end)) {
        uint64_t data, data_end;
        int error = mp_disk_next_data(reader->image->fd, offset, window_end, &data);
        if (!error)
            error = mp_disk_next_hole(reader->image->fd, data, window_end, &data_end);
        if (error)
            return mp_fault_io(fault, error, reader->image->side, offset, "find holes");
        reader->hole = offset;
        reader->extent = data;
        reader->extent_end = mp_max(data_end, data + 1); /* never stands still, whatever the file system says */
        if (data == window_end) { /* only a hole to the end */
            *is_hole = true;
            reader->extent_end = window_end;
            return MP_OK;
        }
    }
    *is_hole = end <= reader->extent;
    return MP_OK;
}

bool mp_reader_maps(const mp_reader *reader, const void *address, uint64_t *offset)
{
    const uint8_t *at = address;
    if (!reader->map || at < reader->map || at >= reader->map + reader->length)
        return false;
    *offset = reader->offset + (uint64_t)(at - reader->map);
    return true;
}
