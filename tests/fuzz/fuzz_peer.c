/* fuzz_peer.c - the replication link of a whole engine (onethread.h) with a peer that says whatever it likes: writes, barriers,
 * acknowledgements, bits and every frame of the resync, honest, senseless, damaged, cut off, and in any order with the work
 * that the engine has in hand.
 *
 * Input: flags u8 (1: the engine is the source; 2: full compare; 4: all blocks dirty before), then moves (see `move`).
 *  - W9, A5: a frame that is damaged, repeated or of another session or epoch ends the session, and nothing behind it counts.
 *  - Target: no byte is changed that no well-formed frame named; a write that was acknowledged is there; only what came is
 *    acknowledged, once; a barrier is answered after all in front of it (W6).
 *  - Source: a client's write is answered only once the peer had it (W4) and a FLUSH once it said FLUSHED (W5); its reads are
 *    right; when the link goes, what was not confirmed as flushed is dirty (W7); a bit goes only with a settled unit (R3).
 *  - After every end nothing is held and no buffer is missing.
 */
#define _GNU_SOURCE
#include "nbd_oracle.h"
#include "onethread.h"
#include "wire.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#define SESSION 4711u
#define EPOCH 1u
#define TIMEOUT_NS ((uint64_t)20 * 1000000000)
#define ROOM (4u << 20)
#define WRITES 256u
#define UNITS 16u
#define READS 8u
#define PATIENCE 400u

static const uint64_t sizes[ONE_VOLUMES] = {65 * 1024 + 77, 160 * 1024};
static const uint32_t blocks[ONE_VOLUMES] = {4096, 65536};
enum { UNTOUCHED, EXACT, UNSURE };

typedef struct written { /* a WRITE or ZERO on the link, either way */
    uint32_t tag;
    unsigned volume;
    uint64_t offset, length;
    bool acked, used, flushed; /* used: by an answer to a client */
} written;

static one_node node;
static fuzz_input in;
static bool source, full, up, over, closing; /* up: a session was given and its end not seen; over: it has to end */
static uint64_t session, sequence;
static unsigned tries;
static int fd;
static mp_chan chan;
static uint8_t out[ROOM], inbox[MP_FRAME_LENGTH_MAX];
static uint64_t out_used, out_sent;
static uint8_t model[ONE_VOLUMES][160 * 1024], state[ONE_VOLUMES][160 * 1024];
static written writes[WRITES];
static unsigned write_count;
static uint64_t counted, flushed_sent; /* writes since the last barrier; FLUSHED frames that may have counted */
static bool barrier_out;       /* target: one is unanswered */
static uint32_t barrier_tag, next_tag;
static unsigned barrier_writes; /* how many of `writes` were in front of it */
static bool was_dirty[ONE_VOLUMES][64], may_clean[ONE_VOLUMES][64], bits_over[ONE_VOLUMES];
static struct { bool open; uint64_t offset, length; } units[ONE_VOLUMES][UNITS];
static uint8_t want[ONE_VOLUMES][UNITS][16384];
static uint32_t want_length[ONE_VOLUMES][UNITS];
static struct read { uint32_t tag, length; uint64_t offset; } reads[READS]; /* asked for, not answered */

/* --- sending frames --- */

/* What is on its way is not read as it was written, so it counts for nothing; only damage keeps to a frame's form. */
static void spoil(uint8_t *frame, uint64_t length)
{
    uint8_t how = (uint8_t)fuzz_number(&in, 1);
    mp_frame f;
    FUZZ_NEED(mp_frame_decode(frame, &f) == MP_FRAME_GOOD);
    over = true;
    switch (how & 3) {
    case 0: f.sequence += 1 + (how >> 2); break;
    case 1: f.session += 1 + (how >> 2); break;
    case 2: f.epoch += 1; break;
    default: frame[(how >> 2) * 977u % length] ^= 1; return; /* the header's checksum, or the payload's digest */
    }
    mp_frame_encode(&f, frame);
}

static bool spoiling;

static void queue(mp_frame f, const void *meta, const void *data)
{
    uint64_t whole = MP_FRAME_HEADER + (uint64_t)f.length;
    uint8_t *at = out + out_used;
    if (ROOM - out_used < whole || !up)
        return;
    f.session = session;
    f.sequence = sequence++;
    f.epoch = f.epoch ? f.epoch : EPOCH;
    f.digest = mp_frame_digest(session, meta, f.meta, data, f.length - f.meta);
    mp_frame_encode(&f, at);
    if (f.meta)
        memcpy(at + MP_FRAME_HEADER, meta, f.meta);
    if (f.length > f.meta)
        memcpy(at + MP_FRAME_HEADER + f.meta, data, f.length - f.meta);
    /* a damaged ERROR ends it as well; what is only of another epoch may be one */
    if (spoiling)
        spoil(at, whole);
    spoiling = false;
    out_used += whole;
}

static void plain(uint16_t type, uint16_t flags, uint32_t count, uint64_t offset, const void *meta, uint32_t length)
{
    queue((mp_frame){.type = type, .flags = flags, .count = count, .offset = offset, .meta = length, .length = length}, meta, NULL);
}

static void send_some(uint64_t most)
{
    uint64_t part = mp_min(most, out_used - out_sent);
    if (!up || !part)
        return;
    ssize_t put = send(fd, out + out_sent, part, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put > 0)
        out_sent += (uint64_t)put;
}

/* --- the session --- */

static void attach(void)
{
    int ends[2];
    if (up)
        return;
    FUZZ_NEED(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    session++;
    fd = ends[0];
    mp_command *c = one_command(MP_COMMAND_ATTACH);
    FUZZ_NEED(mp_chan_init(&chan, fd, fd, session) && mp_chan_init(&c->chan, ends[1], ends[1], session));
    c->fd = ends[1];
    c->flag = source;
    c->grant.epoch = EPOCH;
    c->timeout_ns = TIMEOUT_NS;
    memset(c->plan, full ? MP_PLAN_FULL : MP_PLAN_BITMAP, sizeof c->plan);
    for (unsigned v = 0; v < ONE_VOLUMES && source && full; v++)
        memset(was_dirty[v], 1, sizeof was_dirty[v]);
    sequence = out_used = out_sent = counted = 0;
    write_count = 0;
    barrier_out = over = false;
    memset(bits_over, 0, sizeof bits_over);
    memset(units, 0, sizeof units);
    memset(reads, 0, sizeof reads);
    memset(want_length, 0, sizeof want_length);
    up = true;
    mp_engine_post(node.engine, c);
}

static bool is_dirty(unsigned v, uint64_t block) { return mp_bitmap_test(&node.engine->volume[v].journal.dirty, block); }

/* Its end was seen. */
static void lost(void)
{
    for (unsigned i = 0; i < write_count; i++) {
        written *w = &writes[i];
        for (uint64_t b = w->offset / blocks[w->volume]; source && !w->flushed && b <= (w->offset + w->length - 1) / blocks[w->volume]; b++)
            FUZZ_NEED(is_dirty(w->volume, b)); /* W7 */
        if (!source && !w->acked)
            memset(state[w->volume] + w->offset, UNSURE, w->length);
    }
    mp_chan_close(&chan);
    close(fd);
    up = false;
}

/* --- receiving frames --- */

static written *note_write(uint32_t tag, unsigned volume, uint64_t offset, uint64_t length)
{
    if (write_count == WRITES)
        return NULL;
    writes[write_count] = (written){tag, volume, offset, length, false, false, false};
    return &writes[write_count++];
}

static void take_acks(const mp_frame *f)
{
    for (uint32_t at = 0; at < f->meta; at += 4) {
        written *found = NULL;
        for (unsigned i = 0; i < write_count; i++)
            if (writes[i].tag == mp_load32(inbox + at) && !writes[i].acked)
                found = &writes[i];
        FUZZ_NEED(found);
        found->acked = true;
    }
}

static void take(const mp_frame *f)
{
    unsigned v = f->flags & 0xff;
    FUZZ_NEED(v < ONE_VOLUMES && (f->epoch == EPOCH || f->type == MP_FRAME_ERROR));
    switch (f->type) {
    case MP_FRAME_ACK:
        FUZZ_NEED(!source && f->meta && f->meta % 4 == 0);
        take_acks(f);
        break;
    case MP_FRAME_FLUSHED:
        FUZZ_NEED(!source && barrier_out && f->count == barrier_tag);
        for (unsigned i = 0; i < barrier_writes; i++)
            FUZZ_NEED(writes[i].acked);
        barrier_out = false;
        break;
    case MP_FRAME_WRITE:
        FUZZ_NEED(source && !f->meta);
        note_write(f->count, v, f->offset, f->length);
        counted++;
        break;
    case MP_FRAME_ZERO:
        FUZZ_NEED(source && f->meta == 8 && f->length == 8);
        note_write(f->count, v, f->offset, mp_load64(inbox));
        counted++;
        break;
    case MP_FRAME_BARRIER:
        FUZZ_NEED(source && !barrier_out && f->meta == 8 && mp_load64(inbox) == counted);
        counted = 0;
        barrier_out = true;
        barrier_tag = f->count;
        barrier_writes = write_count;
        break;
    case MP_FRAME_DIGESTS:
    case MP_FRAME_BULK:
        FUZZ_NEED(source && f->count < UNITS && !units[v][f->count].open);
        units[v][f->count].open = true;
        units[v][f->count].offset = f->offset;
        units[v][f->count].length = mp_load32(inbox);
        break;
    case MP_FRAME_WANT:
        FUZZ_NEED(!source && f->count < UNITS && f->meta <= sizeof want[0][0]);
        memcpy(want[v][f->count], inbox, f->meta);
        want_length[v][f->count] = f->meta;
        break;
    case MP_FRAME_SETTLED: FUZZ_NEED(!source && f->count < UNITS); break;
    case MP_FRAME_READ_DATA: {
        unsigned i = 0;
        while (i < READS && (!reads[i].length || reads[i].tag != f->count))
            i++;
        FUZZ_NEED(!source && i < READS && !f->meta && f->length == reads[i].length && f->offset == reads[i].offset);
        reads[i].length = 0;
        break;
    }
    case MP_FRAME_DATA:
    case MP_FRAME_MERGED:
    case MP_FRAME_RESYNC_DONE: FUZZ_NEED(source); break;
    case MP_FRAME_BITS:
    case MP_FRAME_BITS_END: FUZZ_NEED(!source); break;
    default: FUZZ_NEED(f->type == MP_FRAME_PING || f->type == MP_FRAME_ERROR);
    }
}

static void receive(void)
{
    while (up) {
        chan.emptied = false; /* nobody polls here: it has to look whether more has come, or the end */
        mp_chan_result result = mp_chan_receive(&chan);
        if (result == MP_CHAN_AGAIN)
            return;
        if (result == MP_CHAN_FRAME && chan.frame.length) {
            mp_chan_payload(&chan, inbox);
        } else if (result == MP_CHAN_DONE) {
            FUZZ_NEED(!chan.frame.length || mp_chan_check(&chan.frame, inbox));
            take(&chan.frame);
        } else if (result != MP_CHAN_FRAME) {
            FUZZ_NEED(result == MP_CHAN_EOF || result == MP_CHAN_ERROR); /* a reset: it did not read all that we sent */
            FUZZ_NEED(!node.engine->link.up || node.engine->link.chan.session != session);
            lost();
        }
    }
}

#include "peer_client.h"

/* --- what the peer says --- */

static void fill(uint8_t *at, uint64_t length, uint8_t with)
{
    for (uint64_t i = 0; i < length; i++)
        at[i] = with < 8 ? 0 : (uint8_t)(with + i * 3 + (i >> 8));
}

static uint64_t place(unsigned v, uint64_t length)
{
    uint64_t raw = fuzz_number(&in, 2) * 5;
    return length <= sizes[v] && raw < 0xfff0u * 5 ? raw % (sizes[v] - length + 1) : raw - 100;
}

static bool inside(unsigned v, uint64_t offset, uint64_t length) { return v < ONE_VOLUMES && length && offset <= sizes[v] && length <= sizes[v] - offset; }

static void touch(unsigned v, uint64_t offset, uint64_t length)
{
    if (!source && !over && up && inside(v, offset, length))
        memset(state[v] + offset, UNSURE, length);
}

static void say_write(uint8_t what)
{
    static const uint32_t lengths[8] = {1, 512, 4096, 5000, 65536, 100, 16384, 0};
    static uint8_t data[65536];
    if (write_count == WRITES)
        return;
    unsigned v = what >> 7 ? 1 : 0;
    bool zero = what & 1;
    uint64_t length = lengths[what >> 1 & 7], offset = place(v, length);
    uint16_t flags = (uint16_t)((what & 16 ? v : v | (unsigned)fuzz_number(&in, 1)) | (what & 32 ? 0x100u : 0) | (what & 64 ? 0x200u : 0));
    uint8_t meta[8];
    v = flags & 0xff;
    mp_store64(meta, length);
    fill(data, length, zero ? 0 : (uint8_t)(next_tag * 37 + 9));
    bool counts = !spoiling && !over && up && !source && inside(v, offset, length);
    over |= !counts;
    if (counts) {
        uint8_t how = EXACT;
        for (unsigned i = 0; i < write_count; i++) /* a source never has two on their way that overlap */
            if (!writes[i].acked && writes[i].volume == v && writes[i].offset < offset + length && offset < writes[i].offset + writes[i].length)
                how = UNSURE;
        for (uint64_t i = offset; i < offset + length; i++)
            state[v][i] = state[v][i] == UNSURE ? UNSURE : how;
        memcpy(model[v] + offset, data, length);
        note_write(next_tag, v, offset, length);
        counted++;
    }
    mp_frame f = {.type = zero ? MP_FRAME_ZERO : MP_FRAME_WRITE, .flags = flags, .count = next_tag++, .offset = offset, .length = (uint32_t)length};
    if (zero)
        f.meta = f.length = 8;
    queue(f, zero ? meta : NULL, zero ? NULL : data);
}

static void say_barrier(uint8_t what)
{
    uint8_t meta[8];
    if (barrier_out && !source)
        return; /* whether it is out of turn depends on work that the engine has in hand */
    bool honest = !spoiling && !over && up && !source && what & 7;
    mp_store64(meta, counted + (what & 7 ? 0 : 1));
    over |= !honest;
    if (honest) {
        barrier_out = true;
        barrier_tag = ++next_tag;
        barrier_writes = write_count;
        counted = 0;
    }
    plain(MP_FRAME_BARRIER, 0, next_tag, 0, meta, 8);
}

/* BULK or DIGESTS; what they name may change. */
static void say_unit(uint8_t what)
{
    static uint8_t meta[8192], data[128 << 10];
    unsigned v = what & 1;
    bool digests = what & 2;
    uint64_t offset = fuzz_number(&in, 1) * blocks[v] % (sizes[v] + blocks[v]), zeros = fuzz_number(&in, 1), length = mp_min((1 + (what >> 2 & 7)) * (uint64_t)blocks[v], sizeof data);
    if (offset < sizes[v] && what & 32)
        length = mp_min(length, sizes[v] - offset);
    uint32_t id = (uint32_t)fuzz_number(&in, 1) % (UNITS + 1), n = (uint32_t)mp_ceil_div(length, blocks[v]);
    uint64_t used = 0, at = 16;
    zeros &= n == 64 ? ~0ull : (1ull << n) - 1;
    mp_store32(meta, (uint32_t)length);
    mp_store32(meta + 4, 0);
    mp_store64(meta + 8, zeros);
    if (digests) {
        mp_store64(meta + 8, (1ull << n) - 1);
        mp_store64(meta + 16, zeros);
        at = 24;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint64_t part = mp_min(blocks[v], length - (uint64_t)i * blocks[v]);
        if (zeros >> i & 1)
            continue;
        fill(data + used, part, (uint8_t)(what + i * 7));
        if (digests) {
            mp_digest_store(meta + at, mp_digest128(data + used, part, session));
            at += 16;
        } else {
            used += part;
        }
    }
    if (!spoiling)
        touch(v, offset, length);
    queue((mp_frame){.type = digests ? MP_FRAME_DIGESTS : MP_FRAME_BULK, .flags = (uint16_t)v, .count = id, .offset = offset, .meta = (uint32_t)at, .length = (uint32_t)(at + used)}, meta, data);
}

/* To a WANT: whole blocks, which are what the digest said only if the input is lucky; so it is lucky by making them alike. */
static void say_data(uint8_t what)
{
    static uint8_t meta[64 * 24], data[256 << 10];
    unsigned v = what & 1;
    uint32_t id = (uint32_t)fuzz_number(&in, 1) % UNITS, at = 0, used = 0, entries = 0;
    uint8_t seed = (uint8_t)fuzz_number(&in, 1), lie = what & 8 ? (uint8_t)fuzz_number(&in, 1) : 0;
    while (at + 8 <= want_length[v][id] && entries < 3) {
        uint32_t block = mp_load32(want[v][id] + at), kind = mp_load32(want[v][id] + at + 4), pieces = blocks[v] / 4096;
        at += 8 + (kind == 0 ? 4 * pieces : kind == 3 ? 8 : 0);
        if (used + blocks[v] > sizeof data)
            break;
        uint64_t mask = (1ull << pieces) - 1;
        fill(data + used, blocks[v], (uint8_t)(seed + block * 7));
        uint8_t *e = meta + 24 * entries++;
        mp_store32(e, block + (lie & 1));
        mp_store32(e + 4, MP_DATA_WHOLE);
        mp_store64(e + 8, lie & 2 ? mask << 1 : mask);
        mp_store64(e + 16, lie & 4 ? 1 : 0);
        used += blocks[v];
    }
    if (!entries)
        fuzz_bytes(&in, meta, 24 * ++entries);
    queue((mp_frame){.type = MP_FRAME_DATA, .flags = (uint16_t)v, .count = id, .meta = 24 * entries, .length = 24 * entries + used - (lie & 8 ? used / 2 : 0)}, meta, data);
}

static void say_ack(uint8_t what)
{
    uint8_t tags[4 * 8];
    uint32_t count = 0, most = 1 + (what & 7);
    bool honest = !spoiling && !over && up && source;
    for (unsigned i = 0; i < write_count && count < most && !(what & 8); i++)
        if (!writes[i].acked) {
            mp_store32(tags + 4 * count++, writes[i].tag);
            writes[i].acked = honest;
        }
    if (what & 8) {
        bool known = false;
        mp_store32(tags + 4 * count++, (uint32_t)fuzz_number(&in, 3));
        for (unsigned i = 0; i < write_count; i++)
            if (writes[i].tag == mp_load32(tags) && !writes[i].acked)
                known = writes[i].acked = true;
        over |= !known; /* tags begin at 32768 and are drawn from 24 bits: a right one can be met */
    }
    if (count)
        plain(MP_FRAME_ACK, 0, 0, 0, tags, 4 * count);
}

static void say_read(uint8_t what)
{
    static uint32_t tag = 1u << 24; /* no write's */
    uint64_t offset = fuzz_number(&in, 2) * 512, length = what & 1 ? 1 + fuzz_number(&in, 2) : 4096;
    unsigned v = what >> 1 & 1, i = 0;
    uint8_t meta[8];
    if (what & 4)
        length = MP_SLAB_READ_MAX + (what >> 3);
    while (i < READS && reads[i].length)
        i++;
    if (i == READS)
        return;
    bool honest = !source && length <= MP_SLAB_READ_MAX && inside(v, offset, length);
    over |= !honest;
    if (honest && !spoiling)
        reads[i] = (struct read){.tag = tag, .length = (uint32_t)length, .offset = offset};
    mp_store64(meta, length);
    plain(MP_FRAME_READ, (uint16_t)v, tag++, offset, meta, 8);
}

static void say_flushed(uint8_t what)
{
    bool honest = barrier_out && source && !(what & 1);
    flushed_sent += !spoiling && source;
    for (unsigned i = 0; i < barrier_writes && source; i++)
        writes[i].flushed = true; /* perhaps */
    over |= !honest;
    plain(MP_FRAME_FLUSHED, 0, barrier_tag + (what & 1 ? 1u << 20 : 0), 0, NULL, 0);
    barrier_out &= !source;
}

static void say_bits(uint8_t what)
{
    uint8_t meta[24];
    unsigned v = what & 1;
    uint64_t n = mp_ceil_div(sizes[v], blocks[v]), bits = fuzz_number(&in, 3);
    uint32_t count = what & 2 ? 1 : what >> 2 & 3;
    if (what & 2)
        bits &= n == 64 ? ~0ull : (1ull << n) - 1;
    for (uint32_t i = 0; i < 3; i++)
        mp_store64(meta + 8 * i, i ? what >> 6 : bits);
    for (uint64_t b = 0; b < n && count == 1 && !(what & 16) && source && up && !over && !spoiling && !bits_over[v] && bits >> n == 0; b++)
        was_dirty[v][b] |= bits >> b & 1;
    plain(MP_FRAME_BITS, (uint16_t)v, 0, what & 16 ? what >> 5 : 0, meta, 8 * count);
}

static void say_settled(uint8_t what)
{
    uint8_t meta[24];
    unsigned v = what & 1;
    uint32_t id = (uint32_t)fuzz_number(&in, 1) % (UNITS + 1), open = id % UNITS;
    for (unsigned i = 0; i < UNITS && !units[v][open].open; i++)
        open = (open + 1) % UNITS;
    id = what & 16 ? id : open;
    uint64_t length = id < UNITS ? units[v][id].length : 0, equal = what & 2 ? length : length / 2;
    mp_store64(meta, equal);
    mp_store64(meta + 8, what & 4 ? 0 : length - equal);
    mp_store64(meta + 16, what & 4 ? length - equal : what & 8 ? 1 : 0);
    for (uint64_t b = 0; id < UNITS && units[v][id].open && b < length; b += blocks[v])
        may_clean[v][(units[v][id].offset + b) / blocks[v]] = true;
    if (id < UNITS)
        units[v][id].open = false;
    plain(MP_FRAME_SETTLED, (uint16_t)v, id, 0, meta, 24);
}

static void say_want(uint8_t what)
{
    uint8_t meta[8 * (8 + 64)];
    unsigned v = what & 1;
    uint32_t id = (uint32_t)fuzz_number(&in, 1) % (UNITS + 1), length = 0, pieces = blocks[v] / 4096;
    for (uint32_t i = 0; i < 1 + (what >> 1 & 3u); i++) {
        uint8_t entry = (uint8_t)fuzz_number(&in, 1);
        mp_store32(meta + length, entry & 31);
        mp_store32(meta + length + 4, entry >> 5 & 3);
        length += 8;
        uint32_t more = (entry >> 5 & 3) == 0 ? 4 * pieces : (entry >> 5 & 3) == 3 ? 8 : 0;
        memset(meta + length, entry & 128 ? 0xff : 0, more);
        length += more;
    }
    plain(MP_FRAME_WANT, (uint16_t)v, id, 0, meta, length - (what & 128 ? 4 : 0));
}

static void say_anything(void)
{
    uint8_t meta[300];
    mp_frame f = {.type = (uint16_t)(fuzz_number(&in, 1) % 50), .flags = (uint16_t)fuzz_number(&in, 1), .count = (uint32_t)fuzz_number(&in, 1), .offset = fuzz_number(&in, 2)};
    f.length = (uint32_t)mp_min(fuzz_number(&in, 1), fuzz_left(&in));
    f.meta = (uint32_t)mp_min(fuzz_number(&in, 1), f.length);
    fuzz_bytes(&in, meta, f.length);
    if (source ? f.type == MP_FRAME_ACK || f.type == MP_FRAME_FLUSHED || f.type == MP_FRAME_SETTLED : f.type == MP_FRAME_WRITE || f.type == MP_FRAME_ZERO || f.type == MP_FRAME_BARRIER || f.type == MP_FRAME_READ)
        return; /* those say what they mean above */
    if (f.type == MP_FRAME_DIGESTS || f.type == MP_FRAME_BULK)
        touch(f.flags & 0xff, f.offset, mp_load32(meta));
    if (f.type == MP_FRAME_BITS_END && f.flags < ONE_VOLUMES)
        bits_over[f.flags] = true;
    queue(f, meta, meta + f.meta);
}

static void move(void)
{
    uint8_t kind = (uint8_t)fuzz_number(&in, 1), what = (uint8_t)fuzz_number(&in, 1), volume = what & 1;
    bool now = !(kind & 32);
    if (ROOM - out_used < (1u << 20))
        return; /* a frame that is left out says nothing */
    spoiling = up && (kind & 0xc0) == 0xc0;
    switch (kind & 31) {
    case 0:
    case 1:
    case 2: say_write(what); break;
    case 3: say_barrier(what); break;
    case 4:
    case 5: say_unit(what); break;
    case 6: say_data(what); break;
    case 7: plain(MP_FRAME_MERGED, volume, 0, 0, &(uint64_t){what}, 8); break;
    case 8: plain(MP_FRAME_RESYNC_DONE, volume, 0, 0, NULL, 0); break;
    case 9: say_anything(); break;
    case 10:
    case 11: say_ack(what); break;
    case 12: say_flushed(what); break;
    case 13: say_bits(what); break;
    case 14:
        bits_over[volume] = true;
        plain(MP_FRAME_BITS_END, volume, 0, 0, NULL, 0);
        break;
    case 15:
    case 16: say_settled(what); break;
    case 17: say_want(what); break;
    case 18:
    case 19:
    case 20:
    case 21: ask(what); break;
    case 22: attach(); break;
    case 23:
        if (up)
            shutdown(fd, what & 1 ? SHUT_WR : SHUT_RDWR);
        over = true;
        break;
    case 24: one_pass((uint64_t)what * 10000000); break;
    case 25: send_some(what); break;
    case 27: say_read(what); break;
    default:
        if (one_jobs())
            one_job(what % one_jobs());
    }
    spoiling = false;
    if (now)
        send_some(UINT64_MAX);
}

/* --- the run --- */

static void judge_images(void)
{
    static uint8_t now[160 * 1024];
    for (unsigned v = 0; v < ONE_VOLUMES; v++) {
        one_read(&node, v, now);
        for (unsigned i = 0; source && i < request_count; i++) /* begun or not: nobody knows */
            if (!requests[i].answered && requests[i].volume == v && requests[i].type != NBD_READ && requests[i].type != NBD_FLUSH)
                memset(state[v] + requests[i].offset, UNSURE, requests[i].length);
        for (uint64_t i = 0; i < sizes[v]; i++) {
            uint64_t part = mp_min(512, sizes[v] - i);
            if (i % 512 == 0 && memcmp(now + i, model[v] + i, part) == 0)
                i += part - 1;
            else
                FUZZ_NEED(now[i] == model[v][i] || state[v][i] == UNSURE);
        }
        for (uint64_t b = 0; source && b < mp_ceil_div(sizes[v], blocks[v]); b++)
            FUZZ_NEED(is_dirty(v, b) || !was_dirty[v][b] || may_clean[v][b]); /* R3 */
    }
}

static void idle(void)
{
    one_events(&node);
    receive();
    for (unsigned v = 0; v < ONE_VOLUMES; v++)
        take_answers(v);
    if (fuzz_left(&in)) {
        move();
        return;
    }
    uint64_t before = out_sent;
    send_some(UINT64_MAX);
    if (out_sent != before)
        return; /* it has not read that yet */
    if (one_jobs()) {
        one_job(0);
        return;
    }
    if (out_sent < out_used && up) {
        FUZZ_NEED(++tries < PATIENCE); /* it reads no more and does not end it */
        one_pass(100000000);
        return;
    }
    FUZZ_NEED(!up || !over); /* W9: all was read, and it goes on */
    if (!closing) {
        closing = true;
        tries = 0;
        if (up)
            shutdown(fd, SHUT_RDWR);
        one_grant(&node, MP_GRANT_NONE);
        return;
    }
    if (!up)
        for (unsigned v = 0; v < ONE_VOLUMES; v++) {
            if (client_fd[v] >= 0)
                close(client_fd[v]);
            client_fd[v] = -1;
        }
    if (up || node.clients || !one_rests(&node)) {
        FUZZ_NEED(++tries < PATIENCE);
        one_pass(100000000);
        return;
    }
    judge_images();
    one_stop(&node);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    in = (fuzz_input){data, data + length};
    uint8_t flags = (uint8_t)fuzz_number(&in, 1);
    source = flags & 1;
    full = flags & 2;
    up = over = closing = barrier_out = spoiling = false;
    session = SESSION;
    flushed_sent = 0;
    tries = request_count = write_count = 0;
    next_tag = 1;
    memset(state, UNTOUCHED, sizeof state);
    memset(model, 0xe1, sizeof model);
    memset(was_dirty, 0, sizeof was_dirty);
    memset(may_clean, 0, sizeof may_clean);
    memset(answers_used, 0, sizeof answers_used);
    one_open(&node, sizes, blocks, 0xe1);
    if (flags & 4)
        for (unsigned v = 0; v < ONE_VOLUMES; v++) {
            mp_command *c = one_command(MP_COMMAND_ALL_DIRTY);
            c->volume = v;
            mp_engine_post(node.engine, c);
            memset(was_dirty[v], source, sizeof was_dirty[v]);
        }
    one_grant(&node, source ? MP_GRANT_PEER : MP_GRANT_NONE);
    for (unsigned v = 0; v < ONE_VOLUMES; v++)
        client_fd[v] = source ? one_client(&node, v, false) : -1;
    attach();
    one_run(&node, idle);
    one_close(&node);
    for (unsigned i = 0; i < request_count; i++)
        free(requests[i].expected);
    return 0;
}
