/* Floor of a local resync and of a local verify: both images mapped, memcmp by 64 KiB, a differing block again by
 * 4 KiB, and what differs written.
 *
 *   compare SOURCE TARGET [--threads=2] [--write=map|pwrite] [--window=BYTES] [--sync]
 *
 * `--write=map` stores through the target's mapping. Which of the two is cheaper depends on the folios in the cache, so
 * the harness runs both and takes the faster one as the floor. Without --write it only compares.
 * Measured and left out: MADV_POPULATE_READ ahead of each window makes it 1.4 times slower (fault-around already maps
 * whole folios). */
#include "floor.h"

enum how { NOT, MAP, PWRITE };

struct job {
    struct image a, b;
    enum how how;
};

static uint64_t put(struct job *job, uint64_t offset, uint64_t length)
{
    if (job->how == MAP)
        memcpy(job->b.map + offset, job->a.map + offset, length);
    else if (job->how == PWRITE)
        write_whole(job->b.fd, job->a.map + offset, length, offset);
    return length;
}

static uint64_t compare(void *context, uint64_t offset, uint64_t length)
{
    struct job *job = context;
    uint64_t bytes = 0, run = 0, start = 0;
    for (uint64_t block = offset; block < offset + length; block += BLOCK) {
        uint64_t size = least(BLOCK, offset + length - block);
        if (!memcmp(job->a.map + block, job->b.map + block, size)) {
            if (run)
                bytes += put(job, start, run), run = 0;
            continue;
        }
        for (uint64_t piece = block; piece < block + size; piece += PIECE) {
            uint64_t part = least(PIECE, block + size - piece);
            if (memcmp(job->a.map + piece, job->b.map + piece, part)) {
                start = run ? start : piece;
                run += part;
            } else if (run)
                bytes += put(job, start, run), run = 0;
        }
    }
    return run ? bytes + put(job, start, run) : bytes;
}

int main(int argc, char **argv)
{
    double start = now();
    const char *how = option(argc, argv, "write");
    struct job job = {.how = !how ? NOT : !strcmp(how, "map") ? MAP : PWRITE};
    job.a = image_map(positional(argc, argv, 0), false);
    job.b = image_map(positional(argc, argv, 1), job.how == MAP);
    if (job.how == PWRITE && (job.b.fd = open(positional(argc, argv, 1), O_RDWR | O_CLOEXEC)) < 0)
        die("%s", positional(argc, argv, 1));
    struct team team = {.size = least(job.a.size, job.b.size), .work = compare, .context = &job};
    team.window = number_option(argc, argv, "window", WINDOW);
    uint64_t bytes = team_run(&team, (int)number_option(argc, argv, "threads", 2));
    image_sync(&job.b, option(argc, argv, "sync") != NULL);
    printf("{\"seconds\": %.6f, \"different\": %llu}\n", now() - start, (unsigned long long)bytes);
    return 0;
}
