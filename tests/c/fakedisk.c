/* fakedisk.c - see fakedisk.h. */
#include "fakedisk.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

static fake_disk disks[FAKE_DISKS];
void (*fake_hook)(fake_disk *disk);

ssize_t __real_pread(int fd, void *buffer, size_t length, off_t offset);
ssize_t __real_pwrite(int fd, const void *buffer, size_t length, off_t offset);
int __real_fdatasync(int fd);
ssize_t __wrap_pread(int fd, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *buffer, size_t length, off_t offset);
int __wrap_fdatasync(int fd);

int fake_fd(unsigned number) { return FAKE_FD + (int)number; }
fake_disk *fake_of(int fd) { return fd >= FAKE_FD && fd < FAKE_FD + FAKE_DISKS ? &disks[fd - FAKE_FD] : NULL; }

static void forget_pending(fake_disk *disk)
{
    for (unsigned i = 0; i < disk->count; i++)
        free(disk->pending[i].data);
    disk->count = 0;
}

void fake_free(fake_disk *disk)
{
    forget_pending(disk);
    free(disk->pending);
    free(disk->now);
    free(disk->durable);
    memset(disk, 0, sizeof *disk);
}

void fake_make(fake_disk *disk, size_t size)
{
    fake_free(disk);
    disk->size = size;
    disk->now = calloc(1, size);
    disk->durable = calloc(1, size);
    if (!disk->now || !disk->durable)
        abort();
}

static void add_pending(fake_disk *disk, uint64_t offset, const void *data, size_t length)
{
    if (disk->count == disk->room) {
        disk->room = disk->room ? 2 * disk->room : 16;
        disk->pending = realloc(disk->pending, disk->room * sizeof *disk->pending);
        if (!disk->pending)
            abort();
    }
    fake_write *w = &disk->pending[disk->count++];
    *w = (fake_write){offset, length, malloc(length)};
    if (!w->data)
        abort();
    memcpy(w->data, data, length);
}

void fake_crash(fake_disk *to, const fake_disk *from, fake_cut cut, uint64_t *random)
{
    if (to->size != from->size)
        fake_make(to, from->size);
    forget_pending(to);
    to->dead = false;
    to->fail_write = to->fail_sync = 0;
    memcpy(to->durable, from->durable, from->size);
    if (cut == FAKE_KILLED) {
        memcpy(to->now, from->now, from->size);
        for (unsigned i = 0; i < from->count; i++)
            add_pending(to, from->pending[i].offset, from->pending[i].data, from->pending[i].length);
        return;
    }
    uint64_t keep = cut == FAKE_LOST ? 0 : cut == FAKE_ALL ? 8 : below(random, 9); /* of 8 */
    for (unsigned i = 0; i < from->count; i++) {
        const fake_write *w = &from->pending[i];
        for (size_t at = 0; at < w->length;) {
            size_t part = FAKE_SECTOR - (w->offset + at) % FAKE_SECTOR;
            part = part < w->length - at ? part : w->length - at;
            if (below(random, 8) < keep)
                memcpy(to->durable + w->offset + at, w->data + at, part);
            at += part;
        }
    }
    memcpy(to->now, to->durable, from->size);
}

static void call_hook(fake_disk *disk)
{
    if (fake_hook && !disk->dead)
        fake_hook(disk);
}

ssize_t __wrap_pread(int fd, void *buffer, size_t length, off_t offset)
{
    fake_disk *disk = fake_of(fd);
    if (!disk)
        return __real_pread(fd, buffer, length, offset);
    disk->reads++;
    if ((size_t)offset >= disk->size)
        return 0;
    size_t part = disk->size - (size_t)offset < length ? disk->size - (size_t)offset : length;
    memcpy(buffer, disk->now + offset, part);
    return (ssize_t)part;
}

ssize_t __wrap_pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    fake_disk *disk = fake_of(fd);
    if (!disk)
        return __real_pwrite(fd, buffer, length, offset);
    call_hook(disk);
    disk->writes++;
    if (disk->dead || (disk->fail_write && --disk->fail_write == 0)) {
        errno = EIO;
        return -1;
    }
    if ((uint64_t)offset + length > disk->size) {
        fprintf(stderr, "a write of %zu bytes at %lld is past the file's end\n", length, (long long)offset);
        abort();
    }
    memcpy(disk->now + offset, buffer, length);
    add_pending(disk, (uint64_t)offset, buffer, length);
    call_hook(disk);
    return (ssize_t)length;
}

int __wrap_fdatasync(int fd)
{
    fake_disk *disk = fake_of(fd);
    if (!disk)
        return __real_fdatasync(fd);
    call_hook(disk);
    disk->syncs++;
    if (disk->dead || (disk->fail_sync && --disk->fail_sync == 0)) {
        disk->failed_syncs++;
        if (!disk->dead)
            forget_pending(disk); /* as Linux does: the pages are clean now, and not on the disk */
        errno = EIO;
        return -1;
    }
    for (unsigned i = 0; i < disk->count; i++) /* not all of `now`: what a failed fdatasync dropped stays away */
        memcpy(disk->durable + disk->pending[i].offset, disk->pending[i].data, disk->pending[i].length);
    forget_pending(disk);
    call_hook(disk);
    return 0;
}
