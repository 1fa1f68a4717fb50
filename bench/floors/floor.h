/* What every floor program shares: a clock, errors that end the program, whole reads and writes, mappings, and
 * threads that take
 * windows of an image in turn.
 *
 * A floor is the least work that leads to the same result. It checks every system call, handles no fault of the
 * image (no SIGBUS,
 * no shrinking file) and shows no progress. Each program prints one JSON line: {"seconds": inside main, ...}.
 * None of them flushes unless told by `--sync`: the harness says which of the two it measures. */
#ifndef FLOOR_H
#define FLOOR_H

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define KiB 1024ull
#define MiB (1024ull * KiB)
#define PIECE (4 * KiB)
#define BLOCK (64 * KiB)
#define WINDOW (4 * MiB)

static inline double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, ": %s\n", strerror(errno));
    exit(1);
}

struct image {
    int fd;
    uint64_t size;
    uint8_t *map;
};

static inline struct image image_open(const char *path, int flags)
{
    struct image image = {.fd = open(path, flags | O_CLOEXEC), .map = NULL};
    struct stat status;
    if (image.fd < 0 || fstat(image.fd, &status) < 0)
        die("%s", path);
    image.size = (uint64_t)status.st_size;
    return image;
}

static inline struct image image_map(const char *path, bool write)
{
    struct image image = image_open(path, write ? O_RDWR : O_RDONLY);
    if (image.size == 0)
        return image;
    image.map = mmap(NULL, image.size, write ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, image.fd, 0);
    if (image.map == MAP_FAILED)
        die("mmap of %s", path);
    return image;
}

static inline void image_sync(const struct image *image, bool wanted)
{
    if (wanted && fdatasync(image->fd) < 0)
        die("fdatasync");
}

static inline void read_whole(int fd, void *buffer, size_t length, uint64_t offset)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = pread(fd, (uint8_t *)buffer + done, length - done, (off_t)(offset + done));
        if (n <= 0 && !(n < 0 && errno == EINTR))
            die("pread");
        done += n > 0 ? (size_t)n : 0;
    }
}

static inline void write_whole(int fd, const void *buffer, size_t length, uint64_t offset)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = pwrite(fd, (const uint8_t *)buffer + done, length - done, (off_t)(offset + done));
        if (n < 0 && errno != EINTR)
            die("pwrite");
        done += n > 0 ? (size_t)n : 0;
    }
}

static inline uint8_t *buffer_new(size_t length)
{
    uint8_t *buffer = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (buffer == MAP_FAILED)
        die("mmap of %zu bytes", length);
    return buffer;
}

static inline uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Threads that take windows in turn. `work` returns what is added up (bytes written, bytes that differ, a checksum). */
struct team {
    uint64_t size, window;
    uint64_t (*work)(void *context, uint64_t offset, uint64_t length);
    void *context;
    _Atomic uint64_t next, sum;
};

static void *team_member(void *argument)
{
    struct team *team = argument;
    uint64_t sum = 0;
    for (;;) {
        uint64_t offset = atomic_fetch_add(&team->next, team->window);
        if (offset >= team->size)
            break;
        sum += team->work(team->context, offset, least(team->window, team->size - offset));
    }
    atomic_fetch_add(&team->sum, sum);
    return NULL;
}

static inline uint64_t team_run(struct team *team, int threads)
{
    pthread_t id[64];
    threads = threads < 1 ? 1 : threads > 64 ? 64 : threads;
    for (int i = 1; i < threads; i++)
        if ((errno = pthread_create(&id[i], NULL, team_member, team)))
            die("pthread_create");
    team_member(team);
    for (int i = 1; i < threads; i++)
        pthread_join(id[i], NULL);
    return team->sum;
}

/* Options of the form --name or --name=value, anywhere; the rest are the positional arguments. */
static inline const char *option(int argc, char **argv, const char *name)
{
    size_t length = strlen(name);
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], "--", 2) && !strncmp(argv[i] + 2, name, length)) {
            if (argv[i][2 + length] == '\0')
                return "1";
            if (argv[i][2 + length] == '=')
                return argv[i] + 3 + length;
        }
    return NULL;
}

static inline uint64_t number_option(int argc, char **argv, const char *name, uint64_t otherwise)
{
    const char *text = option(argc, argv, name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static inline const char *positional(int argc, char **argv, int index)
{
    for (int i = 1; i < argc; i++)
        if (strncmp(argv[i], "--", 2) && index-- == 0)
            return argv[i];
    fprintf(stderr, "an argument is missing\n");
    exit(2);
}

#endif
