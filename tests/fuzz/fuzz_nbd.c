/* fuzz_nbd.c - NBD requests: parsed and judged as the protocol has it, and the replies that follow.
 *
 * Input: read-only u8, size of the volume u64, then a request's 28 bytes as they come from the socket.
 */
#include "fuzz.h"
#include "nbd.h"

#include <errno.h>

static uint64_t big(const uint8_t *at, unsigned bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | *at++;
    return value;
}

enum { KIND_UNKNOWN, KIND_READ, KIND_CHANGE, KIND_FLUSH };

typedef struct command {
    unsigned kind, flags;
    bool payload; /* the length is that of a payload */
} command;

static const command commands[] = {
    [0] = {KIND_READ, 0, true},                /* READ */
    [1] = {KIND_CHANGE, 1, true},              /* WRITE: FUA */
    [3] = {KIND_FLUSH, 0, false},
    [4] = {KIND_CHANGE, 1, false},             /* TRIM: FUA */
    [6] = {KIND_CHANGE, 1 | 2, false},         /* WRITE_ZEROES: FUA, NO_HOLE */
};

/* All that is wrong with it, as a set: which of them is named is the server's choice. */
static bool may_say(uint32_t error, const uint8_t *raw, uint64_t size, bool read_only)
{
    uint64_t flags = big(raw + 4, 2), type = big(raw + 6, 2), length = big(raw + 24, 4);
    unsigned __int128 end = (unsigned __int128)big(raw + 16, 8) + length;
    command c = type < sizeof commands / sizeof *commands ? commands[type] : (command){0};
    bool wrong_flags = (flags & ~(uint64_t)c.flags) != 0, unknown = c.kind == KIND_UNKNOWN, ranged = c.kind == KIND_READ || c.kind == KIND_CHANGE;
    bool forbidden = c.kind == KIND_CHANGE && read_only, too_long = ranged && c.payload && length > (32u << 20), empty = ranged && !length, outside = ranged && end > size;
    switch (error) {
    case 0: return !wrong_flags && !unknown && !forbidden && !too_long && !empty && !outside;
    case 1: return forbidden;                                                   /* EPERM */
    case 22: return unknown || wrong_flags || empty || (outside && c.kind == KIND_READ); /* EINVAL */
    case 28: return outside && c.kind == KIND_CHANGE;                           /* ENOSPC */
    case 75: return too_long;                                                   /* EOVERFLOW */
    default: return false;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    fuzz_input in = {data, data + length};
    bool read_only = fuzz_number(&in, 1) & 1;
    uint64_t size = fuzz_number(&in, 8);
    uint8_t *raw = malloc(28), *reply = malloc(16); /* exactly: a byte more is found */
    mp_nbd_request request;
    fuzz_bytes(&in, raw, 28);
    bool parsed = mp_nbd_parse(raw, &request);
    FUZZ_NEED(parsed == (memcmp(raw, "\x25\x60\x95\x13", 4) == 0));
    memcpy(raw, "\x25\x60\x95\x13", 4); /* whatever it began with, the rest is judged */
    FUZZ_NEED(mp_nbd_parse(raw, &request));
    FUZZ_NEED(request.flags == big(raw + 4, 2) && request.type == big(raw + 6, 2) && request.cookie == big(raw + 8, 8));
    FUZZ_NEED(request.offset == big(raw + 16, 8) && request.length == big(raw + 24, 4));
    uint32_t error = mp_nbd_judge(&request, size, read_only);
    FUZZ_NEED(may_say(error, raw, size, read_only));
    mp_nbd_reply(reply, request.cookie, error);
    FUZZ_NEED(big(reply, 4) == 0x67446698u && big(reply + 4, 4) == error && memcmp(reply + 8, raw + 8, 8) == 0);
    static const uint32_t known[] = {1, 5, 12, 22, 28, 75, 95, 108}; /* all that the protocol has */
    uint32_t told = mp_nbd_error_of((int)(size % 200));
    bool good = size % 200 == 0 && told == 0;
    for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
        good = good || (size % 200 && told == known[i]);
    FUZZ_NEED(good);
    free(raw);
    free(reply);
    return 0;
}
