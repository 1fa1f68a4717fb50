/* fakedisk.h - files in memory that know what is durable, behind pread, pwrite and fdatasync.
 *
 * A program is linked with -Wl,--wrap=pread,--wrap=pwrite,--wrap=fdatasync. Descriptors from FAKE_FD on are disks, others go
 * to the kernel. A write is seen at once and is durable after the next fdatasync; until then a power cut keeps any of its
 * sectors. The program gives the hook, called before and after each write and fdatasync on a disk.
 */
#ifndef FAKEDISK_H
#define FAKEDISK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FAKE_FD 100000
#define FAKE_DISKS 4
#ifndef FAKE_SECTOR
#define FAKE_SECTOR 512u /* a test with small structures tears them finer */
#endif

typedef struct fake_write {
    uint64_t offset;
    size_t length;
    uint8_t *data;
} fake_write;

typedef struct fake_disk {
    size_t size;
    uint8_t *now, *durable;
    fake_write *pending; /* since the last fdatasync, oldest first */
    unsigned count, room;
    bool dead; /* every call fails with EIO and does nothing */
    int fail_write, fail_sync; /* the n-th call from now fails (1: the next one); 0: none */
    unsigned writes, syncs, reads, failed_syncs;
} fake_disk;

typedef enum fake_cut {
    FAKE_KILLED, /* only the process ends: what was written is seen, and not durable yet */
    FAKE_LOST,   /* power cut, nothing that was not synced arrived */
    FAKE_ALL,    /* all of it arrived */
    FAKE_TORN,   /* any sectors of it */
} fake_cut;

extern void (*fake_hook)(fake_disk *disk); /* or NULL */

int fake_fd(unsigned number);
fake_disk *fake_of(int fd); /* NULL: a real descriptor */
void fake_make(fake_disk *disk, size_t size); /* all zero and durable; frees what it held */
void fake_free(fake_disk *disk);
/* `to` becomes what `from` is after the cut. Same size. */
void fake_crash(fake_disk *to, const fake_disk *from, fake_cut cut, uint64_t *random);

/* --- random numbers from a seed --- */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}
static inline uint64_t below(uint64_t *state, uint64_t limit) { return next_random(state) % limit; }
static inline bool one_in(uint64_t *state, uint64_t n) { return below(state, n) == 0; }

#endif
