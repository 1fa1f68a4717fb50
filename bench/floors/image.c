/* The harness's own hands: builds images, makes them differ, tells and changes their cache state, compares and hashes
 * the result. Never timed.
 *
 *   image build PATH SIZE [--seed=N] [--chunk=BYTES]
 *       random bytes by pwrites of CHUNK (it decides the folio size), flushed
 *   image sparse PATH SIZE DATA [--seed=N] [--chunk=BYTES]
 *       a hole of SIZE with DATA bytes, scattered evenly in pieces of CHUNK, flushed
 *   image clone SOURCE PATH [--chunk=BYTES]
 *       the same bytes and the same way of writing, holes kept, flushed
 *   image dirty TARGET LIST [--seed=N]
 *       overwrites the listed pieces with other random bytes, flushed
 *   image evict PATH...
 *       writes back and drops the pages
 *   image warm PATH...
 *       reads every allocated page in
 *   image state PATH...
 *       {"resident": share of allocated pages in the cache, "folio_kib": mean, or null}
 *   image equal A B
 *       {"equal": bool, "different": bytes in 4 KiB pieces}
 *   image hash PATH
 *       {"hash": "64 bits, hex"}
 *
 * Random bytes are a function of (seed, offset), so every run builds the same file. LIST holds pairs of native 64-bit
 * (offset, length). */
#include "floor.h"

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void fill(uint8_t *buffer, uint64_t length, uint64_t seed, uint64_t offset)
{
    uint64_t i = 0;
    for (; i + 8 <= length; i += 8) {
        uint64_t word = mix(seed * 0x100000001b3ull + ((offset + i) >> 3));
        memcpy(buffer + i, &word, 8);
    }
    for (; i < length; i++)
        buffer[i] = (uint8_t)mix(seed + offset + i);
}

static struct image create(const char *path, uint64_t size)
{
    struct image image = {.fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), .size = size};
    if (image.fd < 0 || ftruncate(image.fd, (off_t)size) < 0)
        die("%s", path);
    return image;
}

static void build(const char *path, uint64_t size, uint64_t seed, uint64_t chunk)
{
    struct image image = create(path, size);
    uint8_t *buffer = buffer_new(chunk);
    for (uint64_t offset = 0; offset < size; offset += chunk) {
        uint64_t length = least(chunk, size - offset);
        fill(buffer, length, seed, offset);
        write_whole(image.fd, buffer, length, offset);
    }
    image_sync(&image, true);
}

static void sparse(const char *path, uint64_t size, uint64_t data, uint64_t seed, uint64_t chunk)
{
    struct image image = create(path, size);
    uint8_t *buffer = buffer_new(chunk);
    uint64_t pieces = data / chunk, stride = pieces ? size / pieces / chunk * chunk : 0;
    for (uint64_t i = 0; i < pieces; i++) {
        fill(buffer, chunk, seed, i * stride);
        write_whole(image.fd, buffer, chunk, i * stride);
    }
    image_sync(&image, true);
}

static void copy(const char *source_path, const char *path, uint64_t chunk)
{
    struct image source = image_open(source_path, O_RDONLY), image = create(path, source.size);
    uint8_t *buffer = buffer_new(chunk);
    for (off_t data = 0; (data = lseek(source.fd, data, SEEK_DATA)) >= 0;) {
        off_t hole = lseek(source.fd, data, SEEK_HOLE);
        if (hole < 0)
            die("SEEK_HOLE");
        for (; data < hole;) {
            uint64_t length = least(chunk, (uint64_t)(hole - data));
            read_whole(source.fd, buffer, length, (uint64_t)data);
            write_whole(image.fd, buffer, length, (uint64_t)data);
            data += (off_t)length;
        }
    }
    if (errno != ENXIO)
        die("SEEK_DATA");
    image_sync(&image, true);
}

/* By stores, not pwrite: a pwrite into a large folio costs 35 us a piece, and neither changes the folios. */
static void dirty(const char *path, const char *list_path, uint64_t seed)
{
    struct image image = image_map(path, true), list = image_map(list_path, false);
    uint64_t bytes = 0;
    for (uint64_t i = 0; i + 16 <= list.size; i += 16) {
        uint64_t piece[2];
        memcpy(piece, list.map + i, 16);
        if (piece[0] > image.size || piece[1] > image.size - piece[0]) {
            errno = ERANGE;
            die("%s", list_path);
        }
        fill(image.map + piece[0], piece[1], seed, piece[0]);
        bytes += piece[1];
    }
    image_sync(&image, true);
    printf("{\"bytes\": %llu}\n", (unsigned long long)bytes);
}

static void evict(const char *path)
{
    struct image image = image_open(path, O_RDONLY);
    if (fdatasync(image.fd) < 0 || (errno = posix_fadvise(image.fd, 0, 0, POSIX_FADV_DONTNEED)))
        die("%s", path);
}

/* The allocated parts, so that a sparse image of many TiB takes no longer than its data. */
struct extent {
    uint64_t start, end;
};

static struct extent *extents(const struct image *image, size_t *count)
{
    struct extent *list = NULL;
    size_t room = 0;
    *count = 0;
    for (off_t at = 0; (at = lseek(image->fd, at, SEEK_DATA)) >= 0;) {
        off_t hole = lseek(image->fd, at, SEEK_HOLE);
        if (hole < 0)
            die("SEEK_HOLE");
        if (*count == room && !(list = realloc(list, (room = 2 * room + 64) * sizeof *list)))
            die("realloc");
        list[(*count)++] = (struct extent){(uint64_t)at, (uint64_t)hole};
        at = hole;
    }
    if (errno != ENXIO)
        die("SEEK_DATA");
    return list;
}

static void warm(const char *path)
{
    struct image image = image_open(path, O_RDONLY);
    uint8_t *buffer = buffer_new(MiB);
    size_t count;
    struct extent *list = extents(&image, &count);
    for (size_t k = 0; k < count; k++)
        for (uint64_t offset = list[k].start; offset < list[k].end; offset += MiB)
            read_whole(image.fd, buffer, least(MiB, list[k].end - offset), offset);
    free(list);
}

static double resident(const struct image *image)
{
    uint64_t present = 0, pages = 0, step = 256 * MiB, page = (uint64_t)getpagesize();
    size_t count;
    struct extent *list = extents(image, &count);
    unsigned char *vector = malloc(step / page);
    if (!vector)
        die("malloc");
    for (size_t k = 0; k < count; k++)
        for (uint64_t offset = list[k].start; offset < list[k].end; offset += step) {
            uint64_t length = least(step, list[k].end - offset);
            if (mincore(image->map + offset, length, vector) < 0)
                die("mincore");
            pages += (length + page - 1) / page;
            for (uint64_t i = 0; i < (length + page - 1) / page; i++)
                present += vector[i] & 1;
        }
    free(vector);
    free(list);
    return pages ? (double)present / (double)pages : 1.0;
}

/* Mean folio size by /proc/kpageflags, over pages sampled evenly; 0 when it cannot be told (not root, or nothing
 * resident). */
static double folio_kib(const struct image *image)
{
    enum { COMPOUND_HEAD = 15, COMPOUND_TAIL = 16 };
    int flags_fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    int map_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t page = (uint64_t)getpagesize(), samples = 64, found = 0, entry, flags;
    size_t count;
    struct extent *list = extents(image, &count);
    double inverse = 0;
    if (flags_fd < 0 || map_fd < 0)
        return 0;
    for (uint64_t i = 0; i < samples && count; i++) {
        struct extent *extent = &list[i * count / samples];
        uint64_t pages = (extent->end - extent->start) / page;
        if (!pages)
            continue;
        /* By a hash: a stride of whole folios would only ever meet their heads. */
        const volatile uint8_t *address = image->map + extent->start + mix(i) % pages * page;
        (void)*address;
        if (pread(map_fd, &entry, 8, (off_t)((uintptr_t)address / page * 8)) != 8 || !(entry >> 63))
            continue;
        uint64_t frame = entry & ((1ull << 55) - 1), length = 1, first = frame;
        if (!frame || pread(flags_fd, &flags, 8, (off_t)(frame * 8)) != 8)
            continue;
        while ((flags >> COMPOUND_TAIL) & 1) {
            first--;
            if (pread(flags_fd, &flags, 8, (off_t)(first * 8)) != 8)
                break;
        }
        if ((flags >> COMPOUND_HEAD) & 1)
            while (pread(flags_fd, &flags, 8, (off_t)((first + length) * 8)) == 8 && (flags >> COMPOUND_TAIL) & 1)
                length++;
        inverse += 1.0 / (double)length;
        found++;
    }
    close(flags_fd);
    close(map_fd);
    free(list);
    /* Harmonic: bytes per folio. A sample by bytes meets large folios more often than small ones. */
    return found ? (double)found / inverse * (double)page / 1024 : 0;
}

static void state(const char *path)
{
    struct image image = image_map(path, false);
    double share = image.size ? resident(&image) : 1.0, folio = image.size && share > 0.5 ? folio_kib(&image) : 0;
    if (folio > 0)
        printf("{\"resident\": %.6f, \"folio_kib\": %.1f}\n", share, folio);
    else
        printf("{\"resident\": %.6f, \"folio_kib\": null}\n", share);
}

struct pair {
    struct image a, b;
    uint64_t base;
};

static uint64_t different(void *context, uint64_t offset, uint64_t length)
{
    struct pair *pair = context;
    const uint8_t *a = pair->a.map + pair->base + offset, *b = pair->b.map + pair->base + offset;
    uint64_t bytes = 0;
    if (!memcmp(a, b, length))
        return 0;
    for (uint64_t i = 0; i < length; i += PIECE) {
        uint64_t piece = least(PIECE, length - i);
        if (memcmp(a + i, b + i, piece))
            bytes += piece;
    }
    return bytes;
}

/* What is a hole in both is equal without being read. */
static void equal(const char *a, const char *b)
{
    struct pair pair = {.a = image_map(a, false), .b = image_map(b, false)};
    uint64_t size = least(pair.a.size, pair.b.size), bytes = 0;
    while (pair.base < size) {
        off_t in_a = lseek(pair.a.fd, (off_t)pair.base, SEEK_DATA);
        off_t in_b = lseek(pair.b.fd, (off_t)pair.base, SEEK_DATA);
        bool a_first = in_b < 0 || (in_a >= 0 && in_a <= in_b);
        off_t start = a_first ? in_a : in_b;
        if (start < 0 || (uint64_t)start >= size)
            break;
        off_t end = lseek(a_first ? pair.a.fd : pair.b.fd, start, SEEK_HOLE);
        if (end < 0)
            die("SEEK_HOLE");
        pair.base = (uint64_t)start;
        struct team team = {.window = WINDOW, .work = different, .context = &pair};
        team.size = least((uint64_t)end, size) - pair.base;
        bytes += team_run(&team, team.size > 8 * WINDOW ? 2 : 1);
        pair.base = (uint64_t)end;
    }
    bool same = !bytes && pair.a.size == pair.b.size;
    printf("{\"equal\": %s, \"different\": %llu}\n", same ? "true" : "false", (unsigned long long)bytes);
}

/* Order-dependent and good enough to see that a result is the wanted one; not a digest anyone relies on. */
static uint64_t window_hash(void *context, uint64_t offset, uint64_t length)
{
    const uint8_t *at = ((struct image *)context)->map + offset;
    uint64_t lane[4] = {mix(offset), mix(offset + 1), mix(offset + 2), mix(offset + 3)}, word, i = 0;
    for (; i + 32 <= length; i += 32)
        for (int k = 0; k < 4; k++) {
            memcpy(&word, at + i + 8 * k, 8);
            lane[k] = (lane[k] ^ word) * 0x9fb21c651e98df25ull;
            lane[k] ^= lane[k] >> 29;
        }
    for (; i < length; i++)
        lane[0] = (lane[0] ^ at[i]) * 0x9fb21c651e98df25ull;
    return mix(lane[0] ^ mix(lane[1] ^ mix(lane[2] ^ mix(lane[3]))));
}

static void hash(const char *path)
{
    struct image image = image_map(path, false);
    struct team team = {.size = image.size, .window = WINDOW, .work = window_hash, .context = &image};
    printf("{\"hash\": \"%016llx\"}\n", (unsigned long long)mix(team_run(&team, 2) ^ image.size));
}

int main(int argc, char **argv)
{
    const char *verb = positional(argc, argv, 0), *path = positional(argc, argv, 1);
    uint64_t seed = number_option(argc, argv, "seed", 1), chunk = number_option(argc, argv, "chunk", MiB);
    if (!strcmp(verb, "build"))
        build(path, strtoull(positional(argc, argv, 2), NULL, 10), seed, chunk);
    else if (!strcmp(verb, "sparse"))
        sparse(path, strtoull(positional(argc, argv, 2), NULL, 10), strtoull(positional(argc, argv, 3), NULL, 10), seed,
               chunk);
    else if (!strcmp(verb, "clone"))
        copy(path, positional(argc, argv, 2), chunk);
    else if (!strcmp(verb, "dirty"))
        dirty(path, positional(argc, argv, 2), seed);
    else if (!strcmp(verb, "equal"))
        equal(path, positional(argc, argv, 2));
    else if (!strcmp(verb, "hash"))
        hash(path);
    else if (!strcmp(verb, "evict") || !strcmp(verb, "warm") || !strcmp(verb, "state"))
        for (int i = 2; i < argc; i++)
            (*verb == 'e' ? evict : *verb == 'w' ? warm : state)(argv[i]);
    else
        return 2;
    return 0;
}
