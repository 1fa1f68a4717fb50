/* Floor of a resync that already knows what differs (a bitmap): the listed pieces, and nothing else.
 *
 *   dirtylist SOURCE TARGET LIST [--over=read|map|pwrite|tcp] [--sync]
 *
 * LIST holds pairs of native 64-bit (offset, length). `read` only reads them, `map` and `pwrite` copy locally, `tcp`
 * sends (offset, length, bytes) to a second process that stores them through its mapping. */
#include "two.h"

int main(int argc, char **argv)
{
    double start = now();
    const char *over = option(argc, argv, "over");
    struct image source = image_map(positional(argc, argv, 0), false);
    struct image target = image_map(positional(argc, argv, 1), true);
    struct image list = image_map(positional(argc, argv, 2), false);
    uint64_t pieces = list.size / 16, bytes = 0, header[2];
    bool sync = option(argc, argv, "sync") != NULL;
    over = over ? over : "map";

    if (!strcmp(over, "tcp")) {
        struct two two = two_start();
        uint8_t done = 1;
        if (two.child == 0) {
            for (uint64_t i = 0; i < pieces; i++) {
                receive_whole(two.fd, header, sizeof header);
                if (header[0] > target.size || header[1] > target.size - header[0])
                    exit(1);
                receive_whole(two.fd, target.map + header[0], header[1]);
            }
            image_sync(&target, sync);
            send_whole(two.fd, &done, 1);
            two_end(&two);
        }
        uint8_t *buffer = buffer_new(MiB);
        size_t fill = 0;
        for (uint64_t i = 0; i < pieces; i++) {
            memcpy(header, list.map + i * 16, sizeof header);
            bytes += header[1];
            if (fill + sizeof header + header[1] > MiB)
                send_whole(two.fd, buffer, fill), fill = 0;
            memcpy(buffer + fill, header, sizeof header);
            fill += sizeof header;
            if (header[1] > MiB - sizeof header) {
                send_whole(two.fd, buffer, fill), fill = 0;
                send_whole(two.fd, source.map + header[0], header[1]);
            } else {
                memcpy(buffer + fill, source.map + header[0], header[1]);
                fill += header[1];
            }
        }
        send_whole(two.fd, buffer, fill);
        receive_whole(two.fd, &done, 1);
        two_end(&two);
    } else {
        uint8_t *buffer = buffer_new(MiB);
        for (uint64_t i = 0; i < pieces; i++) {
            memcpy(header, list.map + i * 16, sizeof header);
            bytes += header[1];
            if (!strcmp(over, "map"))
                memcpy(target.map + header[0], source.map + header[0], header[1]);
            else if (!strcmp(over, "pwrite"))
                write_whole(target.fd, source.map + header[0], header[1], header[0]);
            else
                for (uint64_t at = 0; at < header[1]; at += MiB)
                    read_whole(source.fd, buffer, least(MiB, header[1] - at), header[0] + at);
        }
        image_sync(&target, sync);
    }
    printf("{\"seconds\": %.6f, \"pieces\": %llu, \"bytes\": %llu}\n", now() - start, (unsigned long long)pieces,
           (unsigned long long)bytes);
    return 0;
}
