/* disk.h - every system call on an image.
 *
 * Contract: each function finishes the whole range or returns an errno (0 = done); EINTR and short transfers are handled
 * here. A read that meets the end of the image returns MP_DISK_ENDED. Offsets and lengths are bytes. Nothing here retries
 * an fsync: after a failed one the kernel has dropped the pages and the next one would report success.
 */
#ifndef MP_DISK_H
#define MP_DISK_H

#include "base.h"

#define MP_DISK_ENDED (-1) /* the image ends inside the range */

int mp_disk_read(int fd, void *buffer, size_t length, uint64_t offset);
int mp_disk_write(int fd, const void *buffer, size_t length, uint64_t offset);

/* As mp_disk_write, and durable when it returns. */
int mp_disk_write_durable(int fd, const void *buffer, size_t length, uint64_t offset);
/* A read that needs no disk: 0, EAGAIN where some of it is not in the page cache (or the file system cannot tell), or as
 * mp_disk_read. */
int mp_disk_read_cached(int fd, void *buffer, size_t length, uint64_t offset);

/* Makes the range read as zeros without giving its space back, where the image can tell the difference. */
int mp_disk_zero_allocated(int fd, uint64_t offset, uint64_t length);
/* Makes the range read as zeros and, where the image can, gives its space back: punch a hole, else a zeroed range,
 * else zeros written. */
int mp_disk_zero(int fd, uint64_t offset, uint64_t length);

int mp_disk_sync(int fd);

/* Whether the image still holds `size` bytes: 0, MP_DISK_ENDED or an errno. */
int mp_disk_holds(int fd, uint64_t size);

/* The next byte of data at or after offset, or the end of the image if only a hole follows. An image without hole
 * support is all data. */
int mp_disk_next_data(int fd, uint64_t offset, uint64_t end, uint64_t *data);
int mp_disk_next_hole(int fd, uint64_t offset, uint64_t end, uint64_t *hole);

/* Bytes of the range that are in the page cache (cachestat, Linux 6.5), or `unknown` where it cannot be told. */
uint64_t mp_disk_cached(int fd, uint64_t offset, uint64_t length, uint64_t unknown);

/* A second descriptor for reads past the page cache, or -1 where the file system has no O_DIRECT. */
int mp_disk_open_direct(int fd);

/* Drops clean pages of the range, so that the next read comes from the disk. */
void mp_disk_drop_cache(int fd, uint64_t offset, uint64_t length);

#endif
