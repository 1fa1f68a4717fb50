/* shim.c - stands between a daemon and its C library (LD_PRELOAD): counts system calls, kills at the Nth, records writes.
 *
 * CRASH_PAGE   a file that the test has mapped too: counters, and what is armed. Nothing is armed at first.
 * CRASH_ROOT   the folder whose files count and are recorded: images and metadata, not logs.
 * CRASH_LOG    if set, a file that gets a record for each change to such a file, and for each flush.
 *
 * Rules
 *  - N counts over all threads of the process, from the moment of arming: strace's `when=` counts per thread.
 *  - SIGKILL comes before the call is made, or right after it was made and before anybody can hear of it.
 *  - A record "begin" is in the log before its call is made, with the data; "end" after it returned, with the clock. So a call
 *    without an end may or may not have happened, and what ended before a flush began is covered by it.
 *  - A record is one append: records of several threads, and of one process after the other, never mix.
 *  - What an open truncates is recorded like a write: a file that is written anew has lost its old content.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum call { PWRITE, PWRITEV2, WRITE, FDATASYNC, FSYNC, FALLOCATE, RENAME, SEND, RECV, CALLS, OPEN = CALLS };

typedef struct page {
    _Atomic uint64_t count[CALLS];
    _Atomic int64_t left[CALLS]; /* N: the Nth call from now; 0: none */
    _Atomic uint64_t after;      /* the signal comes after the call */
    _Atomic uint64_t fired;      /* 1 + the call that it was */
} page;

typedef struct head {
    uint32_t size; /* of the whole record */
    uint8_t kind;  /* 0 begin, 1 end */
    uint8_t call;
    uint16_t name; /* bytes of the path, which follows; then data */
    uint64_t id, clock_ns;
    int64_t offset; /* begin */
    int64_t length; /* begin: bytes; end: the result */
    uint64_t flags; /* begin: of the call */
} head;

static page nowhere, *shared = &nowhere;
static int log_fd = -1;
static char root[512];
static size_t root_length;
static _Atomic uint64_t ids;

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("CRASH_PAGE"), *log = getenv("CRASH_LOG"), *under = getenv("CRASH_ROOT");
    unsetenv("LD_PRELOAD"); /* what the daemon starts is left alone */
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd >= 0) {
        void *mapped = mmap(NULL, sizeof(page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (mapped != MAP_FAILED)
            shared = mapped;
        close(fd);
    }
    if (under)
        root_length = (size_t)snprintf(root, sizeof root, "%s/", under);
    if (log && under)
        log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    ids = (uint64_t)getpid() << 32;
}

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void die(enum call call)
{
    shared->fired = 1 + call;
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Whether the signal shall come after this call. */
static int passes(enum call call)
{
    shared->count[call]++;
    if (shared->left[call] <= 0 || --shared->left[call] != 0)
        return 0;
    if (!shared->after)
        die(call);
    return 1;
}

/* The path below the root, or NULL: none of our files. */
static const char *ours(const char *path)
{
    size_t length = strlen(path);
    if (!root_length || strncmp(path, root, root_length) || (length > 4 && !strcmp(path + length - 4, ".log")))
        return NULL;
    return path + root_length;
}

static const char *path_of(int fd, char *path, size_t room)
{
    char link[64];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, path, room - 1);
    errno = saved;
    if (got <= 0)
        return NULL;
    path[got] = 0;
    return ours(path);
}

static void put(const head *h, const char *name, const struct iovec *parts, int count)
{
    struct iovec all[18] = {{(void *)(uintptr_t)h, sizeof *h}, {(void *)(uintptr_t)name, h->name}};
    for (int i = 0; i < count; i++)
        all[2 + i] = parts[i];
    if (syscall(SYS_writev, log_fd, all, 2 + count) != (long)h->size)
        abort();
}

/* The id of the call's record; 0: it is not recorded. */
static uint64_t begin(enum call call, int fd, const char *name, int64_t offset, const struct iovec *parts, int count, int64_t length, int flags)
{
    char path[1024];
    if (log_fd < 0 || count > 16)
        return 0;
    name = name ? ours(name) : path_of(fd, path, sizeof path);
    if (!name)
        return 0;
    int saved = errno;
    head h = {.call = (uint8_t)call, .name = (uint16_t)strlen(name), .id = ++ids, .offset = offset, .length = length, .flags = (uint64_t)(unsigned)flags};
    h.size = (uint32_t)(sizeof h + h.name);
    for (int i = 0; i < count; i++)
        h.size += (uint32_t)parts[i].iov_len;
    h.clock_ns = clock_ns();
    put(&h, name, parts, count);
    errno = saved;
    return h.id;
}

static void end(enum call call, uint64_t id, int64_t result, int deadly)
{
    if (id) {
        int saved = errno;
        head h = {.size = sizeof h, .kind = 1, .call = (uint8_t)call, .id = id, .clock_ns = clock_ns(), .length = result};
        put(&h, "", NULL, 0);
        errno = saved;
    }
    if (deadly)
        die(call);
}

static ssize_t at(int fd, const void *data, size_t length, off_t offset)
{
    struct iovec part = {(void *)(uintptr_t)data, length};
    int deadly = passes(PWRITE);
    uint64_t id = begin(PWRITE, fd, NULL, offset, &part, 1, (int64_t)length, 0);
    ssize_t done = syscall(SYS_pwrite64, fd, data, length, offset);
    end(PWRITE, id, done, deadly);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return at(fd, data, length, offset); }
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) { return at(fd, data, length, offset); }

/* Only into our files: what it says to pipes and eventfds is no change to any. */
ssize_t write(int fd, const void *data, size_t length)
{
    char path[1024];
    if (!path_of(fd, path, sizeof path))
        return syscall(SYS_write, fd, data, length);
    struct iovec part = {(void *)(uintptr_t)data, length};
    int deadly = passes(WRITE);
    uint64_t id = begin(WRITE, fd, NULL, lseek(fd, 0, SEEK_CUR), &part, 1, (int64_t)length, 0);
    ssize_t done = syscall(SYS_write, fd, data, length);
    end(WRITE, id, done, deadly);
    return done;
}

static ssize_t vector_at(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    int64_t length = 0;
    for (int i = 0; i < count; i++)
        length += (int64_t)parts[i].iov_len;
    int deadly = passes(PWRITEV2);
    uint64_t id = begin(PWRITEV2, fd, NULL, offset, parts, count, length, flags);
    ssize_t done = syscall(SYS_pwritev2, fd, parts, (long)count, (long)offset, 0L, flags); /* 64-bit kernels take it whole */
    end(PWRITEV2, id, done, deadly);
    return done;
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) { return vector_at(fd, parts, count, offset, flags); }
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) { return vector_at(fd, parts, count, offset, flags); }

static int flush(enum call call, int fd, long number)
{
    int deadly = passes(call);
    uint64_t id = begin(call, fd, NULL, 0, NULL, 0, 0, 0);
    int done = (int)syscall(number, fd);
    end(call, id, done, deadly);
    return done;
}

int fdatasync(int fd) { return flush(FDATASYNC, fd, SYS_fdatasync); }
int fsync(int fd) { return flush(FSYNC, fd, SYS_fsync); }

static int allocate(int fd, int mode, off_t offset, off_t length)
{
    int deadly = passes(FALLOCATE);
    uint64_t id = begin(FALLOCATE, fd, NULL, offset, NULL, 0, length, mode);
    int done = (int)syscall(SYS_fallocate, fd, mode, offset, length);
    end(FALLOCATE, id, done, deadly);
    return done;
}

int fallocate(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }
int fallocate64(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }

int rename(const char *from, const char *to)
{
    const char *below = ours(to);
    struct iovec part = {(void *)(uintptr_t)(below ? below : ""), below ? strlen(below) : 0};
    int deadly = passes(RENAME);
    uint64_t id = begin(RENAME, -1, from, 0, &part, 1, 0, 0);
    int done = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    end(RENAME, id, done, deadly);
    return done;
}

static int opened(const char *path, int flags, va_list more)
{
    unsigned mode = flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)) ? va_arg(more, unsigned) : 0;
    uint64_t id = flags & O_TRUNC ? begin(OPEN, -1, path, 0, NULL, 0, 0, flags) : 0;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (id)
        end(OPEN, id, fd, 0);
    return fd;
}

int open(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    int fd = opened(path, flags, more);
    va_end(more);
    return fd;
}

int open64(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    int fd = opened(path, flags, more);
    va_end(more);
    return fd;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    int deadly = passes(SEND);
    ssize_t done = syscall(SYS_sendmsg, fd, message, flags);
    end(SEND, 0, done, deadly);
    return done;
}

ssize_t recv(int fd, void *to, size_t length, int flags)
{
    int deadly = passes(RECV);
    ssize_t done = syscall(SYS_recvfrom, fd, to, length, flags, NULL, NULL);
    end(RECV, 0, done, deadly);
    return done;
}
