/* disk.c - see disk.h. */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
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

static int allocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    int result;
    do
        result = fallocate(fd, mode, (off_t)offset, (off_t)length);
    while (result < 0 && errno == EINTR);
    return result < 0 ? errno : 0;
}

int mp_disk_zero(int fd, uint64_t offset, uint64_t length)
{
    /* On a block device both modes are done by the kernel as write-zeroes with and without unmap; a device that cannot
     * says EOPNOTSUPP, and a range that is not a multiple of its sector EINVAL. */
    int error = allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (error == EOPNOTSUPP || error == EINVAL || error == ENOSYS)
        error = allocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (error != EOPNOTSUPP && error != EINVAL && error != ENOSYS)
        return error;
    static const uint8_t zeros[65536];
    while (length) {
        size_t part = (size_t)mp_min(length, sizeof zeros);
        if ((error = mp_disk_write(fd, zeros, part, offset)))
            return error;
        offset += part;
        length -= part;
    }
    return 0;
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
