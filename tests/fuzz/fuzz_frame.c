/* fuzz_frame.c - a frame's header, and a channel that receives frames whole, in pieces and byte by byte.
 *
 * Input: mode u8. Even: 80 bytes of a header, whose checksum is made valid if bit 1 of the mode is set. Odd: a stream, made of
 * frames (see `make_frame`) with what an unreliable or hostile line does to them.
 */
#define _GNU_SOURCE
#include "chan.h"
#include "frame.h"
#include "fuzz.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#define SESSION 77u
#define STREAM (512u << 10)
#define TRACE 200u

/* frame.h: over the header with its own field as zero. */
static void make_valid(uint8_t *header)
{
    memset(header + 64, 0, 8);
    mp_digest digest = mp_digest128(header, 80, 0x6d6972726f727072ull);
    mp_store64(header + 64, digest.low ^ digest.high);
}

static void one_header(fuzz_input *in, bool valid)
{
    uint8_t *raw = malloc(80), again[80], checked[80];
    mp_frame frame;
    fuzz_bytes(in, raw, 80);
    if (valid) {
        memcpy(raw, "MPR1", 4);
        make_valid(raw);
    }
    memcpy(checked, raw, 80);
    make_valid(checked);
    bool ours = memcmp(raw, "MPR1", 4) == 0, whole = memcmp(raw + 64, checked + 64, 8) == 0;
    uint32_t length = mp_load32(raw + 8), meta = mp_load32(raw + 12);
    uint32_t most = (mp_load32(raw + 4) & 0xffff) == 32 ? 32u << 20 : (256u << 10) + (1u << 20); /* a WRITE is as long as NBD has them */
    bool sane = meta <= length && meta <= 262144 && length <= most;
    mp_frame_fault fault = mp_frame_decode(raw, &frame);
    FUZZ_NEED(fault == (!ours ? MP_FRAME_BAD_MAGIC : !whole ? MP_FRAME_BAD_CHECKSUM : !sane ? MP_FRAME_BAD_LENGTH : MP_FRAME_GOOD));
    if (fault == MP_FRAME_GOOD && mp_load32(raw + 76) == 0) {
        mp_frame_encode(&frame, again);
        FUZZ_NEED(memcmp(again, raw, 80) == 0);
    }
    free(raw);
}

/* --- a stream --- */

typedef struct seen {
    mp_chan_result result;
    mp_frame frame;
    bool good;
} seen;

static uint8_t *stream; /* STREAM bytes */
static size_t used;

/* length: 2 bytes, of which the high one counts 1 KiB steps; meta; what the line does to it, and where. */
static void make_frame(fuzz_input *in, uint64_t *sequence)
{
    uint8_t what = (uint8_t)fuzz_number(in, 1);
    uint32_t low = (uint32_t)fuzz_number(in, 1), high = (uint32_t)fuzz_number(in, 1), length = low + (high > 200 ? high << 10 : high), where = (uint32_t)fuzz_number(in, 2);
    mp_frame frame = {.type = (uint16_t)(what >> 3), .length = length, .meta = (uint32_t)mp_min(length, where), .count = where, .offset = where, .sequence = *sequence, .session = SESSION};
    size_t whole = 80 + (size_t)length;
    if (used + 2 * whole > STREAM)
        return;
    uint8_t *at = stream + used;
    for (uint32_t i = 0; i < length; i++)
        at[80 + i] = (uint8_t)(i * 7 + what);
    frame.digest = mp_frame_digest(SESSION, at + 80, frame.meta, at + 80 + frame.meta, length - frame.meta);
    switch (what & 7) {
    case 1: frame.session = where; break;
    case 2: frame.sequence += where; break;
    default: break;
    }
    mp_frame_encode(&frame, at);
    ++*sequence;
    used += whole;
    switch (what & 7) {
    case 3: at[where % whole] ^= (uint8_t)(1u << (where >> 13)); break; /* a bit on its way */
    case 4: used -= where % whole; break;                               /* cut, and what follows comes at once */
    case 5:                                                             /* again */
        memcpy(at + whole, at, whole);
        used += whole;
        break;
    case 6: /* a header that lies, with a checksum that holds */
        mp_store32(at + 8 + where % 2 * 4, 0x100000u << (where >> 8 & 15));
        make_valid(at);
        break;
    default: break;
    }
}

/* Receives all that is there now. False: it is over. */
static bool receive(mp_chan *chan, uint8_t **payload, seen *trace, unsigned *count)
{
    for (;;) {
        mp_chan_result result = mp_chan_receive(chan);
        if (result == MP_CHAN_AGAIN)
            return true;
        FUZZ_NEED(*count < TRACE);
        seen *s = &trace[(*count)++];
        s->result = result;
        if (result == MP_CHAN_FRAME) {
            FUZZ_NEED(chan->frame.length <= MP_FRAME_LENGTH_MAX && chan->frame.meta <= chan->frame.length && chan->frame.session == SESSION);
            FUZZ_NEED(mp_chan_receive(chan) == MP_CHAN_FRAME || !chan->frame.length); /* again, until it is told where to */
            if (!chan->frame.length) { /* it went on without */
                s->frame = chan->frame;
                s->result = MP_CHAN_DONE;
                s->good = mp_chan_check(&chan->frame, NULL);
                continue;
            }
            *payload = malloc(chan->frame.length);
            mp_chan_payload(chan, *payload);
            (*count)--;
        } else if (result == MP_CHAN_DONE) {
            s->frame = chan->frame;
            s->good = mp_chan_check(&chan->frame, *payload);
            free(*payload);
            *payload = NULL;
        } else {
            FUZZ_NEED(result == MP_CHAN_EOF || (result == MP_CHAN_GARBAGE && chan->text[0] && strlen(chan->text) < sizeof chan->text));
            return false;
        }
    }
}

static unsigned feed(const uint8_t *from, size_t length, size_t step, seen *trace)
{
    int ends[2];
    unsigned count = 0;
    mp_chan chan;
    uint8_t *payload = NULL;
    FUZZ_NEED(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0 && mp_chan_init(&chan, ends[0], ends[0], SESSION));
    bool going = true;
    for (size_t at = 0; at < length && going;) {
        size_t part = mp_min(length - at, step ? step : length);
        ssize_t put = send(ends[1], from + at, part, MSG_NOSIGNAL);
        if (put > 0)
            at += (size_t)put;
        going = receive(&chan, &payload, trace, &count);
    }
    close(ends[1]);
    if (going)
        FUZZ_NEED(!receive(&chan, &payload, trace, &count));
    free(payload);
    mp_chan_close(&chan);
    close(ends[0]);
    return count;
}

static void one_stream(fuzz_input *in)
{
    static seen whole[TRACE], pieces[TRACE];
    uint64_t sequence = 0;
    stream = malloc(STREAM);
    used = 0;
    size_t step = 1 + fuzz_number(in, 1);
    while (fuzz_left(in) && sequence < TRACE / 4)
        make_frame(in, &sequence);
    uint8_t *exactly = malloc(used + 1);
    memcpy(exactly, stream, used);
    memset(whole, 0, sizeof whole);
    memset(pieces, 0, sizeof pieces);
    unsigned count = feed(exactly, used, 0, whole);
    FUZZ_NEED(feed(exactly, used, used < 3000 ? 1 : step * 61, pieces) == count);
    FUZZ_NEED(memcmp(whole, pieces, sizeof whole) == 0);
    free(exactly);
    free(stream);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    fuzz_input in = {data, data + length};
    uint8_t mode = (uint8_t)fuzz_number(&in, 1);
    if (mode & 1)
        one_stream(&in);
    else
        one_header(&in, mode & 2);
    return 0;
}
