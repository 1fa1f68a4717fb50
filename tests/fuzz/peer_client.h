/* peer_client.h - the part of fuzz_peer.c that is a client of the source: it asks, and judges the answers by what the peer had. */
#define REQUESTS 64u

typedef struct asked { /* by the client */
    unsigned type, volume;
    uint64_t offset, length, flushed_before;
    uint8_t *expected;
    bool answered;
} asked;

static int client_fd[ONE_VOLUMES];
static asked requests[REQUESTS];
static unsigned request_count;
static uint8_t answers[ONE_VOLUMES][1 << 20];
static uint64_t answers_used[ONE_VOLUMES];

static void take_answers(unsigned v)
{
    uint8_t *box = answers[v];
    ssize_t got;
    while (client_fd[v] >= 0 && (got = recv(client_fd[v], box + answers_used[v], sizeof answers[v] - answers_used[v], MSG_DONTWAIT)) > 0) {
        answers_used[v] += (uint64_t)got;
        while (answers_used[v] >= 16) {
            uint64_t error = nbd_big(box + 4, 4), cookie = nbd_big(box + 8, 8);
            FUZZ_NEED(cookie < request_count && !requests[cookie].answered && (error == 0 || (error == 108 && closing)));
            asked *r = &requests[cookie];
            uint64_t length = !error && r->type == NBD_READ ? r->length : 0;
            if (answers_used[v] < 16 + length)
                break;
            r->answered = true;
            FUZZ_NEED(!length || memcmp(box + 16, r->expected, length) == 0);
            FUZZ_NEED(error || r->type != NBD_FLUSH || flushed_sent > r->flushed_before); /* W5 */
            bool had = error || r->type == NBD_READ || r->type == NBD_FLUSH;
            for (unsigned i = 0; i < write_count && !had; i++) {
                written *w = &writes[i];
                had = w->acked && !w->used && w->volume == v && w->offset == r->offset && w->length == r->length;
                w->used |= had;
            }
            FUZZ_NEED(had || node.lost); /* W4; of an earlier session nothing is kept here */
            answers_used[v] -= 16 + length;
            memmove(box, box + 16 + length, answers_used[v]);
        }
    }
}

static void ask(uint8_t what)
{
    static const uint8_t types[8] = {NBD_WRITE, NBD_WRITE, NBD_WRITE, NBD_READ, NBD_FLUSH, NBD_TRIM, NBD_ZEROES, NBD_READ};
    static const uint16_t lengths[8] = {1, 512, 4096, 5000, 4096, 100, 16384, 20000};
    unsigned v = what >> 7;
    uint8_t header[28] = {0}, data[20000];
    uint64_t length = lengths[what >> 3 & 7], offset = fuzz_number(&in, 2) * 3 % (sizes[v] - length + 1);
    if (!source || request_count == REQUESTS || client_fd[v] < 0)
        return;
    asked *r = &requests[request_count];
    *r = (asked){.type = types[what & 7], .volume = v, .offset = offset, .length = length, .flushed_before = flushed_sent};
    if (r->type == NBD_FLUSH)
        offset = length = 0;
    memcpy(header, "\x25\x60\x95\x13", 4);
    nbd_put(header + 4, 2, what & 64 && r->type != NBD_READ && r->type != NBD_FLUSH ? 1 : 0);
    nbd_put(header + 6, 2, r->type);
    nbd_put(header + 8, 8, request_count++);
    nbd_put(header + 16, 8, offset);
    nbd_put(header + 24, 4, length);
    FUZZ_NEED(send(client_fd[v], header, sizeof header, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof header);
    if (r->type == NBD_READ) {
        r->expected = malloc(length);
        memcpy(r->expected, model[v] + offset, length);
    } else if (r->type == NBD_WRITE) {
        for (uint64_t i = 0; i < length; i++)
            data[i] = (uint8_t)(request_count * 31 + i * 5 + (i >> 8));
        FUZZ_NEED(send(client_fd[v], data, length, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)length);
        memcpy(model[v] + offset, data, length);
    } else if (r->type != NBD_FLUSH) {
        memset(model[v] + offset, 0, length);
    }
}
