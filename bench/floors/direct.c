/* Floor of a cold compare: both images read by O_DIRECT, several requests at a time, and compared.
 *
 *   direct A [B] [--threads=4] [--chunk=4194304]
 *
 * Measured on a virtual disk that takes 254 segments and 4 MiB a request, 2 GiB: buffers of small pages, 1 MiB a request
 * 1.4-2.8 s; huge pages, 1 MiB 1.5-3.4 s, 2 MiB 0.7-1.7 s, 4 MiB 0.7-1.3 s: the number of requests is what costs, and
 * small pages split each of them.
 * One image: only its rate of reading. It leaves the page cache as it found it, so it can be interleaved with the
 * others. */
#include "floor.h"

struct job {
    int a, b;
};

static uint8_t *buffer_huge(size_t length)
{
    uint8_t *buffer;
    if ((errno = posix_memalign((void **)&buffer, 2 * MiB, length)))
        die("%zu bytes", length);
    madvise(buffer, length, MADV_HUGEPAGE);
    memset(buffer, 0, length);
    return buffer;
}

static uint64_t read_chunk(void *context, uint64_t offset, uint64_t length)
{
    static _Thread_local uint8_t *x, *y;
    static _Thread_local uint64_t room;
    struct job *job = context;
    if (room < length) {
        room = (length + PIECE - 1) / PIECE * PIECE;
        x = buffer_huge(room);
        y = buffer_huge(room);
    }
    /* O_DIRECT wants whole blocks; at the end of the file it returns what is there. */
    uint64_t asked = (length + PIECE - 1) / PIECE * PIECE;
    for (int i = 0; i < (job->b >= 0 ? 2 : 1); i++)
        if (pread(i ? job->b : job->a, i ? y : x, asked, (off_t)offset) < (ssize_t)length)
            die("O_DIRECT read");
    return job->b >= 0 && memcmp(x, y, length) ? length : 0;
}

int main(int argc, char **argv)
{
    double start = now();
    bool two = argc > 2 && strncmp(argv[2], "--", 2);
    struct image a = image_open(positional(argc, argv, 0), O_RDONLY | O_DIRECT);
    struct image b = {.fd = -1, .size = a.size};
    if (two)
        b = image_open(positional(argc, argv, 1), O_RDONLY | O_DIRECT);
    struct job job = {.a = a.fd, .b = b.fd};
    struct team team = {.size = least(a.size, b.size), .work = read_chunk, .context = &job};
    team.window = number_option(argc, argv, "chunk", 4 * MiB);
    uint64_t different = team_run(&team, (int)number_option(argc, argv, "threads", 4));
    printf("{\"seconds\": %.6f, \"different\": %llu}\n", now() - start, (unsigned long long)different);
    return 0;
}
