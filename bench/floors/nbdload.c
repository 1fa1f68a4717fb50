/* The least that an NBD client can do: requests of one kind over a unix socket, a number of them always in flight.
 *
 *   nbdload SOCKET EXPORT [--read=1] [--fua=1] [--block=BYTES] [--depth=N] [--milliseconds=N] [--requests=N] [--seed=N]
 *
 * fio's nbd engine cannot set FUA, and uses more of a core than the servers that it measures; this one does neither. Offsets
 * are random multiples of the block. One thread: it reads what answers are there, then sends as many new requests in one
 * call. Ends after the time or the number, whichever is first. Prints requests per second and the latency's percentiles. */
#include "two.h"
#include <endian.h>
#include <sys/un.h>

#define DEPTH_MAX 256u
#define SAMPLES ((size_t)1 << 22)

struct request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));
struct reply {
    uint32_t magic, error;
    uint64_t cookie;
} __attribute__((packed));

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Fixed newstyle, EXPORT_NAME: the shortest way in. */
static int negotiate(const char *path, const char *name, uint64_t *size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (strlen(path) >= sizeof address.sun_path)
        errno = ENAMETOOLONG, die("socket");
    strcpy(address.sun_path, path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect");
    uint8_t hello[18], export[10];
    receive_whole(fd, hello, sizeof hello);
    struct {
        uint32_t flags;
        char magic[8];
        uint32_t option, length;
    } __attribute__((packed)) ask = {htobe32(3), "", htobe32(1), htobe32((uint32_t)strlen(name))};
    memcpy(ask.magic, "IHAVEOPT", 8);
    send_whole(fd, &ask, sizeof ask);
    send_whole(fd, name, strlen(name));
    receive_whole(fd, export, sizeof export);
    memcpy(size, export, sizeof *size);
    *size = be64toh(*size);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    double start = now();
    uint64_t size, reads = number_option(argc, argv, "read", 0), fua = number_option(argc, argv, "fua", 0);
    uint64_t block = number_option(argc, argv, "block", 4 * KiB), depth = number_option(argc, argv, "depth", 1);
    uint64_t limit = number_option(argc, argv, "requests", 0), random = number_option(argc, argv, "seed", 1) * 2 + 1;
    double end = now() + (double)number_option(argc, argv, "milliseconds", 1000) / 1e3, sent_at[DEPTH_MAX];
    int fd = negotiate(argv[1], argv[2], &size);
    uint8_t *buffer = buffer_new(block + MiB), answers[4096];
    float *took = (float *)buffer_new(SAMPLES * sizeof *took);
    uint64_t blocks = size / block, sent = 0, done = 0;
    size_t there = 0, free_places = depth;
    unsigned places[DEPTH_MAX];
    if (!depth || depth > DEPTH_MAX || !blocks) {
        fprintf(stderr, "nbdload: a depth of 1 to %u, and a volume that holds a block\n", DEPTH_MAX);
        return 2;
    }
    for (unsigned i = 0; i < depth; i++)
        places[i] = i;
    for (size_t i = 0; i < block; i++)
        buffer[i] = (uint8_t)(i * 131 + i / 251);
    for (start = now();;) {
        struct request ask[DEPTH_MAX];
        struct iovec vector[2 * DEPTH_MAX];
        int parts = 0, asked = 0;
        double clock = now();
        while (free_places && clock < end && (!limit || sent < limit)) {
            unsigned place = places[--free_places];
            random = random * 6364136223846793005u + 1442695040888963407u;
            ask[asked] = (struct request){htobe32(0x25609513), htobe16(fua ? 1 : 0), htobe16(reads ? 0 : 1), place,
                                          htobe64((random >> 20) % blocks * block), htobe32((uint32_t)block)};
            vector[parts++] = (struct iovec){&ask[asked++], sizeof *ask};
            if (!reads)
                vector[parts++] = (struct iovec){buffer, block};
            sent_at[place] = clock;
            sent++;
        }
        for (int at = 0; at < parts;) { /* never blocks for ever: answers to writes fit the socket's buffer */
            struct msghdr message = {.msg_iov = vector + at, .msg_iovlen = (size_t)(parts - at)};
            ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);
            if (n < 0 && errno != EINTR)
                die("send");
            for (; n > 0 && at < parts; at += !vector[at].iov_len) {
                size_t part = (size_t)n < vector[at].iov_len ? (size_t)n : vector[at].iov_len;
                vector[at].iov_base = (uint8_t *)vector[at].iov_base + part;
                vector[at].iov_len -= part;
                n -= (ssize_t)part;
                if (vector[at].iov_len)
                    break;
            }
        }
        if (done == sent)
            break;
        ssize_t n = recv(fd, answers + there, sizeof answers - there, 0);
        if (n == 0)
            errno = ECONNRESET;
        if (n <= 0 && errno != EINTR)
            die("recv");
        there += n > 0 ? (size_t)n : 0;
        size_t at = 0;
        for (clock = now(); there - at >= sizeof(struct reply);) {
            struct reply reply;
            memcpy(&reply, answers + at, sizeof reply);
            if (reply.magic != htobe32(0x67446698) || reply.error || reply.cookie >= depth) {
                fprintf(stderr, "nbdload: the server answered with error %u\n", be32toh(reply.error));
                return 1;
            }
            at += sizeof reply;
            if (reads) {
                size_t have = there - at < block ? there - at : block;
                memcpy(buffer, answers + at, have);
                receive_whole(fd, buffer + have, block - have);
                at += have;
            }
            took[done++ % SAMPLES] = (float)(now() - sent_at[reply.cookie]);
            places[free_places++] = (unsigned)reply.cookie;
        }
        memmove(answers, answers + at, there - at);
        there -= at;
    }
    double seconds = now() - start;
    struct request bye = {.magic = htobe32(0x25609513), .type = htobe16(2)};
    send_whole(fd, &bye, sizeof bye);
    size_t kept = done < SAMPLES ? done : SAMPLES;
    if (!kept) {
        fprintf(stderr, "nbdload: no request was answered\n");
        return 1;
    }
    qsort(took, kept, sizeof *took, by_value);
    printf("{\"seconds\": %.6f, \"requests\": %llu, \"iops\": %.3f, \"bytes_per_s\": %.1f, \"p50_us\": %.3f, \"p99_us\": %.3f}\n",
           seconds, (unsigned long long)done, (double)done / seconds, (double)(done * block) / seconds,
           (double)took[kept / 2] * 1e6, (double)took[kept * 99 / 100] * 1e6);
    return 0;
}
