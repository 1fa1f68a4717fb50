/* fuzz_nbd.c - NBD requests: parsed and judged as the protocol has it, and the replies that follow.
 *
 * Input: read-only u8, size of the volume u64, then a request's 28 bytes as they come from the socket.
 */
#include "fuzz.h"
#include "nbd.h"
#include "nbd_oracle.h"

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
    FUZZ_NEED(request.flags == nbd_big(raw + 4, 2) && request.type == nbd_big(raw + 6, 2) && request.cookie == nbd_big(raw + 8, 8));
    FUZZ_NEED(request.offset == nbd_big(raw + 16, 8) && request.length == nbd_big(raw + 24, 4));
    uint32_t error = mp_nbd_judge(&request, size, read_only);
    FUZZ_NEED(nbd_may_say(error, raw, size, read_only));
    mp_nbd_reply(reply, request.cookie, error);
    FUZZ_NEED(nbd_big(reply, 4) == 0x67446698u && nbd_big(reply + 4, 4) == error && memcmp(reply + 8, raw + 8, 8) == 0);
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
