/* Floor of a resync over TCP when everything differs: pread and send in one process, receive and pwrite in the other.
 *
 *   stream SOURCE TARGET [--chunk=BYTES] [--sync]
 *
 * No digest, no comparison, no frame. The end is one byte back, after the flush if there is one. One thread and one
 * buffer at each end: the socket's own buffer lets both run at once. */
#include "two.h"

int main(int argc, char **argv)
{
    double start = now();
    size_t chunk = number_option(argc, argv, "chunk", 256 * KiB);
    const char *source_path = positional(argc, argv, 0), *target_path = positional(argc, argv, 1);
    struct two two = two_start();
    uint8_t *buffer = buffer_new(chunk), done = 1;
    if (two.child == 0) {
        struct image target = image_open(target_path, O_RDWR);
        for (uint64_t offset = 0; offset < target.size; offset += chunk) {
            size_t length = least(chunk, target.size - offset);
            receive_whole(two.fd, buffer, length);
            write_whole(target.fd, buffer, length, offset);
        }
        image_sync(&target, option(argc, argv, "sync") != NULL);
        send_whole(two.fd, &done, 1);
        two_end(&two);
    }
    struct image source = image_open(source_path, O_RDONLY);
    for (uint64_t offset = 0; offset < source.size; offset += chunk) {
        size_t length = least(chunk, source.size - offset);
        read_whole(source.fd, buffer, length, offset);
        send_whole(two.fd, buffer, length);
    }
    receive_whole(two.fd, &done, 1);
    two_end(&two);
    printf("{\"seconds\": %.6f, \"wire\": %llu}\n", now() - start, (unsigned long long)source.size);
    return 0;
}
