/* Floor of a replicated write: one request of 4 KiB over TCP loopback, and one small answer.
 *
 *   pingpong [--rounds=N] [--request=BYTES] [--answer=BYTES]
 *
 * Two processes, both asleep while they wait, as two hosts would be. What a wake-up costs depends on where they run: the
 * harness pins them, or does not. Prints the median and the 99th percentile of one round trip, in microseconds. */
#include "two.h"

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    double start = now();
    size_t rounds = number_option(argc, argv, "rounds", 2000);
    size_t request = number_option(argc, argv, "request", 4 * KiB + 32), answer = number_option(argc, argv, "answer", 32);
    uint8_t *buffer = buffer_new(request > answer ? request : answer);
    struct two two = two_start();
    if (two.child == 0) {
        for (size_t i = 0; i < rounds; i++) {
            receive_whole(two.fd, buffer, request);
            send_whole(two.fd, buffer, answer);
        }
        two_end(&two);
    }
    double *took = (double *)buffer_new(rounds * sizeof *took);
    for (size_t i = 0; i < rounds; i++) {
        double before = now();
        send_whole(two.fd, buffer, request);
        receive_whole(two.fd, buffer, answer);
        took[i] = now() - before;
    }
    two_end(&two);
    qsort(took, rounds, sizeof *took, by_value);
    printf("{\"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"rounds\": %zu}\n", now() - start,
           took[rounds / 2] * 1e6, took[rounds * 99 / 100] * 1e6, rounds);
    return 0;
}
