"""Builds `mirrorpair._linux`: the kernel's cold calls that Python's `os` lacks, by cffi in API mode.

Rules:
- Cold calls only. Whatever runs per block of an image is C behind Cython (`mirrorpair._core`).
- Each C function is one system call: no decision, no retry, no text. Those are in mirrorpair/linux.py.
- An answer >= 0 is the result, a negative one is -errno. So no thread can read another call's errno.
- The declarations are in linux.cdef; a mismatch between the two stops the build.
"""

from pathlib import Path

from cffi import FFI

SOURCE = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/openat2.h>

_Static_assert(sizeof(off_t) == 8, "offsets must be 64 bits wide: build with -D_FILE_OFFSET_BITS=64");

/* The number is the same on every architecture. Old headers lack it, and glibc has no wrapper. */
#ifndef SYS_openat2
#define SYS_openat2 437
#endif

static int64_t answer(int64_t result)
{
	return result < 0 ? -(int64_t)errno : result;
}

static int64_t mp_device_size(int fd)
{
	uint64_t bytes = 0;

	if (ioctl(fd, BLKGETSIZE64, &bytes) < 0)
		return -(int64_t)errno;
	return bytes <= INT64_MAX ? (int64_t)bytes : -(int64_t)EOVERFLOW;
}

static int64_t mp_sector_size(int fd)
{
	int bytes = 0;

	return ioctl(fd, BLKSSZGET, &bytes) < 0 ? -(int64_t)errno : bytes;
}

static int64_t mp_device_read_only(int fd)
{
	int read_only = 0;

	return ioctl(fd, BLKROGET, &read_only) < 0 ? -(int64_t)errno : read_only != 0;
}

static int64_t mp_punch(int fd, int64_t offset, int64_t length)
{
	return answer(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length));
}

static int64_t mp_zero_range(int fd, int64_t offset, int64_t length)
{
	return answer(fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length));
}

static int64_t mp_device_zero(int fd, uint64_t offset, uint64_t length)
{
	uint64_t range[2] = {offset, length};

	return answer(ioctl(fd, BLKZEROOUT, range));
}

static int64_t mp_device_discard(int fd, uint64_t offset, uint64_t length)
{
	uint64_t range[2] = {offset, length};

	return answer(ioctl(fd, BLKDISCARD, range));
}

static int64_t mp_seek_data(int fd, int64_t offset)
{
	return answer(lseek(fd, offset, SEEK_DATA));
}

static int64_t mp_seek_hole(int fd, int64_t offset)
{
	return answer(lseek(fd, offset, SEEK_HOLE));
}

static int64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	if (clock_gettime(clock, &now) < 0)
		return -(int64_t)errno;
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int64_t mp_clock_boottime(void)
{
	return clock_ns(CLOCK_BOOTTIME);
}

static int64_t mp_clock_monotonic(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static int64_t mp_open_beneath(int folder, const char *path, int flags, uint32_t mode)
{
	struct open_how how;

	memset(&how, 0, sizeof how);
	how.flags = (uint32_t)flags;
	how.mode = mode;
	how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
	return answer(syscall(SYS_openat2, folder, path, &how, sizeof how));
}

static int64_t mp_lock(int fd, int exclusive)
{
	struct flock whole;

	memset(&whole, 0, sizeof whole);
	whole.l_type = exclusive ? F_WRLCK : F_RDLCK;
	whole.l_whence = SEEK_SET;
	return answer(fcntl(fd, F_OFD_SETLK, &whole));
}

struct mp_loop {
	uint64_t device;
	uint64_t inode;
	uint64_t raw_device;
	uint64_t offset;
};

/* The kernel writes device numbers in its own 32 bits; glibc's makedev() is what os.stat() shows. */
static uint64_t as_stat_shows(uint64_t kernel)
{
	return makedev((kernel >> 8) & 0xfff, (kernel & 0xff) | ((kernel >> 12) & 0xfff00));
}

static int64_t mp_loop_status(int fd, struct mp_loop *loop)
{
	struct loop_info64 info;

	memset(&info, 0, sizeof info);
	if (ioctl(fd, LOOP_GET_STATUS64, &info) < 0)
		return -(int64_t)errno;
	loop->device = as_stat_shows(info.lo_device);
	loop->inode = info.lo_inode;
	/* With a plain file behind it the kernel writes the file system's device here instead. */
	loop->raw_device = info.lo_rdevice == info.lo_device ? 0 : as_stat_shows(info.lo_rdevice);
	loop->offset = info.lo_offset;
	return 0;
}
"""

ffi = FFI()
ffi.cdef(Path(__file__).with_name("linux.cdef").read_text(encoding="utf-8"))
ffi.set_source(
    "mirrorpair._linux",
    SOURCE,
    define_macros=[("_GNU_SOURCE", "1"), ("_FILE_OFFSET_BITS", "64"), ("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
)
