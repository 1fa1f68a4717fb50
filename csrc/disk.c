/* disk.c - see disk.h. */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* the same number on every architecture */
#endif

int mp_disk_read(int fd, void *buffer, size_t length, uint64_t offset)
{
    uint8_t *at = buffer;
    while (length) {
        ssize_t got = pread(fd, at, length, (off_t)offset);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (got == 0)
            return MP_DISK_ENDED;
        at += got;
        offset += (uint64_t)got;
        length -= (size_t)got;
    }
    return 0;
}

int mp_disk_write(int fd, const void *buffer, size_t length, uint64_t offset)
{
    const uint8_t *at = buffer;
    while (length) {
        ssize_t put = pwrite(fd, at, length, (off_t)offset);
        if (put < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (put == 0)
            return EIO; /* never seen; a loop that does not move would be worse */
        at += put;
        offset += (uint64_t)put;
        length -= (size_t)put;
    }
    return 0;
}

int mp_disk_write_durable(int fd, const void *buffer, size_t length, uint64_t offset)
{
    const uint8_t *at = buffer;
    while (length) {
        struct iovec part = {(void *)(uintptr_t)at, length};
        ssize_t put = pwritev2(fd, &part, 1, (off_t)offset, RWF_DSYNC);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) {
            int error = mp_disk_write(fd, at, length, offset);
            return error ? error : mp_disk_sync(fd);
        }
        if (put <= 0)
            return put < 0 ? errno : EIO;
        at += put;
        offset += (uint64_t)put;
        length -= (size_t)put;
    }
    return 0;
}

int mp_disk_read_cached(int fd, void *buffer, size_t length, uint64_t offset)
{
    struct iovec part = {buffer, length};
    ssize_t got = preadv2(fd, &part, 1, (off_t)offset, RWF_NOWAIT);
    if (got == (ssize_t)length)
        return 0;
    return got >= 0 || errno == EAGAIN || errno == EOPNOTSUPP || errno == ENOSYS || errno == EINTR ? EAGAIN : errno;
}

static int allocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    int result;
    do
        result = fallocate(fd, mode, (off_t)offset, (off_t)length);
    while (result < 0 && errno == EINTR);
    return result < 0 ? errno : 0;
}

static bool cannot(int error) { return error == EOPNOTSUPP || error == EINVAL || error == ENOSYS; }

static int write_zeros(int fd, uint64_t offset, uint64_t length)
{
    static const uint8_t zeros[65536];
    int error = 0;
    while (length && !error) {
        size_t part = (size_t)mp_min(length, sizeof zeros);
        error = mp_disk_write(fd, zeros, part, offset);
        offset += part;
        length -= part;
    }
    return error;
}

int mp_disk_zero_allocated(int fd, uint64_t offset, uint64_t length)
{
    int error = allocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
    return cannot(error) ? write_zeros(fd, offset, length) : error;
}

int mp_disk_zero(int fd, uint64_t offset, uint64_t length)
{
    /* On a block device both modes are done by the kernel as write-zeroes with and without unmap; a device that cannot
     * says EOPNOTSUPP, and a range that is not a multiple of its sector EINVAL. */
    int error = allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (cannot(error))
        return mp_disk_zero_allocated(fd, offset, length);
    return error;
}

int mp_disk_sync(int fd)
{
    return fdatasync(fd) < 0 ? errno : 0;
}

int mp_disk_holds(int fd, uint64_t size)
{
    off_t end = lseek(fd, 0, SEEK_END);
    return end < 0 ? errno : (uint64_t)end < size ? MP_DISK_ENDED : 0;
}

static int seek(int fd, int whence, uint64_t offset, uint64_t end, uint64_t *found)
{
    if (offset >= end) {
        *found = end;
        return 0;
    }
    off_t at = lseek(fd, (off_t)offset, whence);
    if (at < 0) {
        if (errno == ENXIO) { /* only a hole follows, or the file has shrunk and nothing follows */
            *found = end;
            return mp_disk_holds(fd, end);
        }
        if (errno == EINVAL || errno == EOPNOTSUPP || errno == ESPIPE) {
            *found = whence == SEEK_DATA ? offset : end;
            return 0;
        }
        return errno;
    }
    *found = mp_min((uint64_t)at, end);
    return 0;
}

int mp_disk_next_data(int fd, uint64_t offset, uint64_t end, uint64_t *data) { return seek(fd, SEEK_DATA, offset, end, data); }
int mp_disk_next_hole(int fd, uint64_t offset, uint64_t end, uint64_t *hole) { return seek(fd, SEEK_HOLE, offset, end, hole); }

uint64_t mp_disk_cached(int fd, uint64_t offset, uint64_t length, uint64_t unknown)
{
    struct { uint64_t offset, length; } range = {offset, length};
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
    if (syscall(SYS_cachestat, (unsigned)fd, &range, &pages, 0u) < 0)
        return unknown;
    return pages.cached * (uint64_t)sysconf(_SC_PAGESIZE);
}

int mp_disk_open_direct(int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
}

void mp_disk_drop_cache(int fd, uint64_t offset, uint64_t length)
{
    (void)posix_fadvise(fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
}
