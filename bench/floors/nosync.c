/* A preloaded library that turns a flush to the disk into nothing.
 *
 * mirrorpair says "done" only after fdatasync; cmp, dd, cp, rsync, qemu-img and nbdcopy by default never flush. In the
 * groups called "warm" every subject, floors included, runs with this library, so that tools are compared and not the
 * disk. In the groups called "durable" none does, and every subject flushes by its own option. Only calls through libc
 * are caught, which is what a dynamically linked tool makes. */
#define _GNU_SOURCE
#include <sys/types.h>
#include <unistd.h>

int fsync(int fd)
{
    (void)fd;
    return 0;
}

int fdatasync(int fd)
{
    (void)fd;
    return 0;
}

int syncfs(int fd)
{
    (void)fd;
    return 0;
}

int sync_file_range(int fd, off_t offset, off_t length, unsigned int flags)
{
    (void)fd, (void)offset, (void)length, (void)flags;
    return 0;
}
