/* What this machine can do: one figure a line, {"name": , "threads": , "bytes": , "seconds": }.
 *
 *   limits A B
 *
 * Memory figures use buffers larger than any cache; file figures use the whole of A and B, which should be in the
 * page cache. */
#define XXH_INLINE_ALL
#include "two.h"
#include <xxhash.h>

#define MEMORY (256 * MiB)

struct job {
    const uint8_t *a, *b;
    uint8_t *out;
    int fd, other;
    size_t chunk;
};

static _Atomic uint64_t sink; /* results that nobody reads would be optimised away */

static uint64_t work_read(void *context, uint64_t offset, uint64_t length)
{
    struct job *job = context;
    uint64_t lane[8] = {0}, word;
    for (uint64_t i = 0; i + 64 <= length; i += 64)
        for (int k = 0; k < 8; k++) {
            memcpy(&word, job->a + offset + i + 8 * k, 8);
            lane[k] += word;
        }
    return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
}

static uint64_t work_memcpy(void *context, uint64_t offset, uint64_t length)
{
    struct job *job = context;
    memcpy(job->out + offset, job->a + offset, length);
    return job->out[offset];
}

static uint64_t work_memcmp(void *context, uint64_t offset, uint64_t length)
{
    struct job *job = context;
    uint64_t different = 0;
    for (uint64_t i = 0; i < length; i += BLOCK)
        different += memcmp(job->a + offset + i, job->b + offset + i, least(BLOCK, length - i)) != 0;
    return different;
}

static uint64_t work_digest(void *context, uint64_t offset, uint64_t length)
{
    struct job *job = context;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < length; i += BLOCK)
        sum += XXH3_128bits(job->a + offset + i, least(BLOCK, length - i)).low64;
    return sum;
}

static uint64_t pread_work(struct job *job, uint64_t offset, uint64_t length, bool digest)
{
    static _Thread_local uint8_t *buffer;
    uint64_t sum = 0;
    if (!buffer)
        buffer = buffer_new(MiB);
    for (uint64_t i = 0; i < length; i += job->chunk) {
        uint64_t part = least(job->chunk, length - i);
        read_whole(job->fd, buffer, part, offset + i);
        sum += digest ? XXH3_128bits(buffer, part).low64 : buffer[0];
    }
    return sum;
}

static uint64_t work_pread(void *context, uint64_t offset, uint64_t length)
{
    return pread_work(context, offset, length, false);
}

static uint64_t work_pread_digest(void *context, uint64_t offset, uint64_t length)
{
    return pread_work(context, offset, length, true);
}

typedef uint64_t work_function(void *context, uint64_t offset, uint64_t length);

static void tell(const char *name, int threads, uint64_t bytes, double seconds)
{
    printf("{\"name\": \"%s\", \"threads\": %d, \"bytes\": %llu, \"seconds\": %.6f}\n", name, threads,
           (unsigned long long)bytes, seconds);
    fflush(stdout);
}

/* Three times, the median: the caller interleaves nothing here, a single figure would be luck. */
static void measure(const char *name, work_function *work, struct job *job, uint64_t size, int threads)
{
    double seconds[3];
    for (int i = 0; i < 3; i++) {
        struct team team = {.size = size, .window = WINDOW, .work = work, .context = job};
        double start = now();
        atomic_fetch_add(&sink, team_run(&team, threads));
        seconds[i] = now() - start;
    }
    for (int i = 0; i < 2; i++)
        for (int k = i + 1; k < 3; k++)
            if (seconds[k] < seconds[i]) {
                double swap = seconds[i];
                seconds[i] = seconds[k];
                seconds[k] = swap;
            }
    tell(name, threads, size, seconds[1]);
}

static void mapped(const char *name, work_function *work, const char *a, const char *b, int threads)
{
    struct image x = image_map(a, false), y = b ? image_map(b, false) : x;
    struct job job = {.a = x.map, .b = y.map};
    struct team team = {.size = least(x.size, y.size), .window = WINDOW, .work = work, .context = &job};
    double start = now(); /* a fresh mapping each time: page faults are the larger part of the price */
    atomic_fetch_add(&sink, team_run(&team, threads));
    tell(name, threads, team.size, now() - start);
    munmap(x.map, x.size);
    if (b)
        munmap(y.map, y.size);
}

static void loopback(uint64_t size)
{
    fflush(stdout);
    struct two two = two_start();
    uint8_t *buffer = buffer_new(MiB), done = 1;
    if (two.child == 0) {
        for (uint64_t offset = 0; offset < size; offset += MiB)
            receive_whole(two.fd, buffer, MiB);
        send_whole(two.fd, &done, 1);
        two_end(&two);
    }
    double start = now();
    for (uint64_t offset = 0; offset < size; offset += MiB)
        send_whole(two.fd, buffer, MiB);
    receive_whole(two.fd, &done, 1);
    double seconds = now() - start;
    two_end(&two);
    tell("loopback TCP, 1 MiB sends", 2, size, seconds);
}

int main(int argc, char **argv)
{
    const char *a = positional(argc, argv, 0), *b = positional(argc, argv, 1);
    struct job memory = {.out = buffer_new(MEMORY)};
    uint8_t *x = buffer_new(MEMORY), *y = buffer_new(MEMORY);
    memset(x, 7, MEMORY);
    memset(y, 7, MEMORY);
    memory.a = x;
    memory.b = y;
    loopback(MEMORY * 2);
    for (int threads = 1; threads <= 2; threads++) {
        measure("read memory", work_read, &memory, MEMORY, threads);
        measure("memcpy", work_memcpy, &memory, MEMORY, threads);
        measure("memcmp of memory", work_memcmp, &memory, MEMORY, threads);
        measure("XXH3-128 of memory", work_digest, &memory, MEMORY, threads);
        mapped("mmap + memcmp of two files", work_memcmp, a, b, threads);
        mapped("mmap + XXH3-128", work_digest, a, NULL, threads);
    }
    struct image file = image_open(a, O_RDONLY);
    struct job job = {.fd = file.fd, .chunk = 4 * KiB};
    measure("pread 4 KiB", work_pread, &job, least(file.size, 256 * MiB), 1);
    job.chunk = 128 * KiB;
    measure("pread 128 KiB", work_pread, &job, file.size, 1);
    job.chunk = MiB;
    measure("pread 1 MiB", work_pread, &job, file.size, 1);
    measure("pread 1 MiB", work_pread, &job, file.size, 2);
    measure("pread 1 MiB + XXH3-128", work_pread_digest, &job, file.size, 2);
    return 0;
}
