/* Floor of a resync between two hosts: each process maps its own image and makes one XXH3-128 per 64 KiB; then what
 * differs is written.
 *
 *   digestpass SOURCE TARGET [--write=map|pwrite] [--seed=N] [--sync]
 *
 * Two processes, one thread each, digests left in shared memory: nothing travels. The pieces of a differing block are
 * found by memcmp against the source's mapping and copied from it, which is less than any two hosts can do. */
#define XXH_INLINE_ALL
#include "two.h"
#include <xxhash.h>

static void digests(const struct image *image, XXH128_hash_t *out, uint64_t seed)
{
    for (uint64_t offset = 0; offset < image->size; offset += BLOCK)
        *out++ = XXH3_128bits_withSeed(image->map + offset, least(BLOCK, image->size - offset), seed);
}

int main(int argc, char **argv)
{
    double start = now();
    uint64_t seed = number_option(argc, argv, "seed", 1), written = 0;
    const char *how = option(argc, argv, "write");
    bool by_map = !how || !strcmp(how, "map");
    struct image source = image_map(positional(argc, argv, 0), false);
    struct image target = image_map(positional(argc, argv, 1), true);
    uint64_t size = least(source.size, target.size), blocks = (size + BLOCK - 1) / BLOCK;
    size_t room = (blocks + 1) * sizeof(XXH128_hash_t);
    XXH128_hash_t *theirs = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    XXH128_hash_t *ours = (XXH128_hash_t *)buffer_new(room);
    if (theirs == MAP_FAILED)
        die("mmap");
    source.size = target.size = size;

    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        digests(&source, theirs, seed);
        _exit(0);
    }
    digests(&target, ours, seed);
    int status;
    if (waitpid(child, &status, 0) < 0 || status != 0)
        die("the child failed");
    for (uint64_t i = 0; i < blocks; i++) {
        if (!memcmp(&ours[i], &theirs[i], sizeof *ours))
            continue;
        uint64_t end = least((i + 1) * BLOCK, size), run = 0;
        for (uint64_t piece = i * BLOCK; piece <= end; piece += PIECE) {
            uint64_t part = piece < end ? least(PIECE, end - piece) : 0;
            if (part && memcmp(source.map + piece, target.map + piece, part)) {
                run += part;
                continue;
            }
            uint64_t from = (part ? piece : end) - run;
            if (run && by_map)
                memcpy(target.map + from, source.map + from, run);
            else if (run)
                write_whole(target.fd, source.map + from, run, from);
            written += run;
            run = 0;
            if (!part)
                break;
        }
    }
    image_sync(&target, option(argc, argv, "sync") != NULL);
    printf("{\"seconds\": %.6f, \"different\": %llu}\n", now() - start, (unsigned long long)written);
    return 0;
}
