/* link.c - the replication session: frames to and from the peer's engine.
 *
 *   source -> target   WRITE (data; flags: volume and FUA, count: tag, offset), ZERO (meta: length u64), BARRIER (count: tag,
 *                      meta: writes since the last one u64), READ (count: tag, offset, meta: length u64), MERGED,
 *                      RESYNC_DONE, and the resync's DIGESTS, BULK, DATA
 *   target -> source   ACK (meta: tags u32), FLUSHED (count: tag), READ_DATA (count: tag; nothing: its disk failed), BITS (meta: first u64, count u64, ...), BITS_END, and the
 *                      resync's WANT, SETTLED
 *   both               PING, ERROR (JSON)
 *
 * Rules
 *  - W9, A5: chan.c has checked session and sequence; a frame of another epoch ends the session here.
 *  - Nothing that a peer says is used before it was checked: volume, range, tag, count.
 *  - A target's writes that still run when the session ends are waited for before a new one begins or anything is served: a
 *    delayed write of an old session never lands on a new one's (`applying` must be 0).
 *  - A peer from which nothing comes, or that leaves a write unconfirmed, for `timeout` is dropped, with what was measured.
 *
 * Acks are gathered over a round of the loop: one frame for all. The target answers when the write is in its page cache, or
 * on its disk for FUA.
 */
#define _GNU_SOURCE
#include "engine.h"

#include "disk.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <unistd.h>

#define VOLUME_MASK 0xffu
#define FLAG_FUA 0x100u
#define FLAG_NO_HOLE 0x200u
#define UNIT_PATIENCE 4u /* times the time-out */
#define FRAMES_AT_ONCE 64u
#define BYTES_AT_ONCE ((uint64_t)2 << 20)
#define ACKS_EAGER 64u /* so many are sent before the round is over */

static void on_link(void *argument, unsigned events);

/* --- sending --- */

static void watch(mp_engine *engine)
{
    mp_link *link = &engine->link;
    if (link->up)
        mp_loop_change(&engine->loop, link->chan.fd_in, (link->paused ? 0u : MP_LOOP_READ) | (link->chan.first ? MP_LOOP_WRITE : 0u));
}

static void write_sent(mp_outgoing *out)
{
    mp_request *r = (mp_request *)((char *)out - offsetof(mp_request, out));
    r->on_wire = false;
    mp_request_settle(r);
}

void mp_link_send_write(mp_request *r)
{
    mp_link *link = &r->engine->link;
    bool zero = r->op == MP_OP_ZERO;
    uint16_t flags = (uint16_t)(r->volume->index | (r->flags & MP_REQUEST_FUA ? FLAG_FUA : 0u) | (r->flags & MP_REQUEST_NO_HOLE ? FLAG_NO_HOLE : 0u));
    r->out = (mp_outgoing){.sent = write_sent, .data = zero ? NULL : r->buffer, .meta = zero ? r->meta : NULL,
                           .frame = {.type = zero ? MP_FRAME_ZERO : MP_FRAME_WRITE, .flags = flags, .count = (uint32_t)r->tag, .offset = r->at, .epoch = link->epoch}};
    if (zero) {
        mp_store64(r->meta, r->part);
        r->out.frame.meta = r->out.frame.length = 8;
    } else {
        r->out.frame.length = (uint32_t)r->part;
    }
    r->on_wire = true;
    r->peer_done = false;
    r->sent_ns = mp_now_ns();
    link->writes_since_barrier++;
    mp_chan_queue(&link->chan, &r->out);
}

static void read_sent(mp_outgoing *out) { ((mp_request *)((char *)out - offsetof(mp_request, out)))->on_wire = false; }

void mp_link_send_read(mp_request *r)
{
    mp_link *link = &r->engine->link;
    mp_store64(r->meta, r->length);
    r->out = (mp_outgoing){.sent = read_sent, .meta = r->meta,
                           .frame = {.type = MP_FRAME_READ, .flags = (uint16_t)r->volume->index, .count = (uint32_t)r->tag, .offset = r->offset, .epoch = link->epoch, .meta = 8, .length = 8}};
    r->on_wire = true;
    r->sent_ns = mp_now_ns();
    mp_chan_queue(&link->chan, &r->out);
}

static void small_sent(mp_outgoing *out) { ((mp_small_frame *)((char *)out - offsetof(mp_small_frame, out)))->busy = false; }

bool mp_link_small(mp_engine *engine, uint16_t type, uint16_t flags, uint32_t count, uint64_t offset, const void *meta, uint32_t length)
{
    mp_link *link = &engine->link;
    MP_ASSERT(length <= sizeof link->small[0].meta);
    for (unsigned i = 0; i < MP_SMALL_FRAMES; i++) {
        mp_small_frame *small = &link->small[i];
        if (small->busy)
            continue;
        small->busy = true;
        if (length)
            memcpy(small->meta, meta, length);
        small->out = (mp_outgoing){.sent = small_sent, .meta = small->meta,
                                   .frame = {.type = type, .flags = flags, .count = count, .offset = offset, .meta = length, .length = length, .epoch = link->epoch}};
        mp_chan_queue(&link->chan, &small->out);
        return true;
    }
    mp_link_detach(engine, true, 13, "the peer takes nothing: %u small frames wait for it", MP_SMALL_FRAMES);
    return false;
}

static void ack_sent(mp_outgoing *out) { ((mp_ack_frame *)((char *)out - offsetof(mp_ack_frame, out)))->busy = false; }

static void send_acks(mp_engine *engine)
{
    mp_link *link = &engine->link;
    for (unsigned i = 0; i < MP_ACK_FRAMES && link->ack_count; i++) {
        mp_ack_frame *frame = &link->ack_frame[i];
        if (frame->busy)
            continue;
        uint32_t count = link->ack_count < MP_ACKS ? link->ack_count : MP_ACKS;
        for (uint32_t k = 0; k < count; k++)
            mp_store32(frame->tags + 4 * k, link->acks[k]);
        link->ack_count -= count;
        memmove(link->acks, link->acks + count, link->ack_count * sizeof *link->acks);
        frame->busy = true;
        frame->out = (mp_outgoing){.sent = ack_sent, .meta = frame->tags, .frame = {.type = MP_FRAME_ACK, .meta = 4 * count, .length = 4 * count, .epoch = link->epoch}};
        mp_chan_queue(&link->chan, &frame->out);
    }
}

static void flush(mp_engine *engine)
{
    mp_link *link = &engine->link;
    if (link->up && link->chan.first && mp_chan_flush(&link->chan) == MP_CHAN_ERROR)
        mp_link_detach(engine, true, 1, "the connection failed: %s", strerror(link->chan.error));
}

/* --- the session's begin and end --- */

void mp_link_detach(mp_engine *engine, bool report, int code, const char *format, ...)
{
    mp_link *link = &engine->link;
    if (!link->up)
        return;
    link->up = false; /* first, so that nothing below comes here again */
    char text[224];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    mp_loop_remove(&engine->loop, link->chan.fd_in);
    shutdown(link->chan.fd_in, SHUT_RDWR);
    close(link->chan.fd_in);
    mp_chan_close(&link->chan);
    link->chan.first = NULL;
    link->chan.last = &link->chan.first;
    for (unsigned i = 0; i < MP_SMALL_FRAMES; i++)
        link->small[i].busy = false;
    for (unsigned i = 0; i < MP_ACK_FRAMES; i++)
        link->ack_frame[i].busy = false;
    link->ack_count = 0;
    link->barrier_waits = false;
    if (link->receiving) {
        mp_request_free(link->receiving);
        link->receiving = NULL;
    }
    if (link->taking && link->taking_bytes)
        mp_slab_put(&engine->slab, link->taking, link->taking_bytes);
    link->taking = NULL;
    if (report)
        mp_event_post(engine, MP_EVENT_LINK_LOST, link->chan.session, code, "%s", text);
    for (uint32_t i = 0; i < engine->volumes; i++)
        mp_mend_link_lost(&engine->volume[i]);
    mp_cover_link_lost(engine);
    if (link->source) {
        mp_request_link_lost(engine);
        mp_barrier_link_lost(engine);
    }
    if (engine->grant.mode == MP_GRANT_NONE)
        mp_request_abandon(engine);
}

/* Tells the peer why before the connection goes: a disk that fails there is not the network here. Best effort. */
static void fail(mp_engine *engine, const char *here, const char *there)
{
    mp_link *link = &engine->link;
    if (!link->up)
        return;
    char json[400];
    int length = snprintf(json, sizeof json, "{\"code\":1,\"message\":\"%s\"}", there);
    if (!link->chan.first) {
        link->error_out = (mp_outgoing){.meta = json, .frame = {.type = MP_FRAME_ERROR, .meta = (uint32_t)length, .length = (uint32_t)length}};
        mp_chan_queue(&link->chan, &link->error_out);
        (void)mp_chan_flush(&link->chan);
    }
    mp_link_detach(engine, true, 1, "%s", here);
}

void mp_link_fail(mp_engine *engine, const char *why) { fail(engine, why, why); }

void mp_link_fail_disk(mp_engine *engine, const char *what)
{
    char here[64], there[64];
    snprintf(here, sizeof here, "this node's disk failed: %s", what);
    snprintf(there, sizeof there, "my disk failed: %s", what);
    fail(engine, here, there);
}

void mp_link_attach(mp_engine *engine, mp_command *command)
{
    mp_link *link = &engine->link;
    MP_ASSERT(!link->up && !mp_link_draining(engine));
    memset(link, 0, offsetof(mp_link, ack_frame)); /* the frames' memory need not be cleared */
    link->parity = 0;
    link->applying[0] = link->applying[1] = 0;
    link->writes_since_barrier = 0;
    link->chan = command->chan;
    link->chan.fd_in = link->chan.fd_out = command->fd;
    if (!link->chan.first)
        link->chan.last = &link->chan.first;
    command->chan.input = NULL;
    command->fd = -1;
    link->source = command->flag;
    link->epoch = command->grant.epoch;
    link->timeout_ns = command->timeout_ns;
    link->last_in_ns = link->last_out_ns = mp_now_ns();
    int one = 1;
    (void)setsockopt(link->chan.fd_in, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* a unix socket has no such thing */
    if (!mp_loop_add(&engine->loop, link->chan.fd_in, MP_LOOP_READ, on_link, engine)) {
        close(link->chan.fd_in);
        mp_chan_close(&link->chan);
        mp_event_post(engine, MP_EVENT_LINK_LOST, link->chan.session, 1, "the connection cannot be watched: %s", strerror(errno));
        return;
    }
    link->up = true;
    if (link->source)
        mp_request_resend(engine);
    else
        mp_request_abandon(engine); /* W9: what an earlier role left unanswered must not go out on a later link */
    for (uint32_t i = 0; i < engine->volumes; i++)
        mp_mend_attach(&engine->volume[i], (mp_plan)command->plan[i]);
    /* bytes behind the handshake may be here already, and epoll does not know of them */
    if (link->up && link->chan.input_end != link->chan.input_at)
        on_link(engine, MP_LOOP_READ);
}

/* --- receiving --- */

static void garbage(mp_engine *engine, const char *what) { mp_link_fail(engine, what); }

static mp_volume *volume_of(mp_engine *engine, const mp_frame *frame)
{
    uint32_t index = frame->flags & VOLUME_MASK;
    return index < engine->volumes ? &engine->volume[index] : NULL;
}

static void answer_barrier(mp_engine *engine)
{
    mp_link *link = &engine->link;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (engine->volume[i].sync_error) {
            mp_link_fail_disk(engine, "flush");
            return;
        }
    mp_link_small(engine, MP_FRAME_FLUSHED, 0, (uint32_t)link->barrier_tag, 0, NULL, 0);
}

static void run_sync(mp_job *job, void *worker)
{
    mp_engine *engine = (mp_engine *)((char *)job - offsetof(mp_engine, link.barrier_job));
    (void)worker;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (!engine->link.barrier_error[i])
            engine->link.barrier_error[i] = mp_disk_sync(engine->volume[i].fd);
}

bool mp_link_draining(const mp_engine *engine)
{
    const mp_link *link = &engine->link;
    if (link->up)
        return false;
    bool draining = link->applying[0] || link->applying[1] || link->barrier_running;
    for (uint32_t i = 0; i < engine->volumes && !draining; i++)
        draining = mp_mend_busy(&engine->volume[i]);
    return draining;
}

void mp_link_barrier_synced(mp_engine *engine)
{
    mp_link *link = &engine->link;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (link->barrier_error[i] && !engine->volume[i].sync_error) {
            engine->volume[i].sync_error = link->barrier_error[i];
            mp_event_post(engine, MP_EVENT_DISK_ERROR, i, link->barrier_error[i], "flush: %s", strerror(link->barrier_error[i]));
        }
    engine->link.barrier_running = false;
    if (engine->link.up && engine->link.barrier_waits) {
        engine->link.barrier_waits = false;
        answer_barrier(engine);
    }
}

/* The writes in front of the barrier are done: now they are made durable. */
static void maybe_sync(mp_engine *engine)
{
    mp_link *link = &engine->link;
    if (!link->barrier_waits || link->barrier_running || link->applying[!link->parity])
        return;
    link->barrier_running = true;
    for (uint32_t i = 0; i < engine->volumes; i++)
        link->barrier_error[i] = engine->volume[i].sync_error;
    link->barrier_job = (mp_job){.run = run_sync};
    mp_pool_submit(&engine->pool, &link->barrier_job);
}

void mp_link_applied(mp_request *r)
{
    mp_engine *engine = r->engine;
    mp_link *link = &engine->link;
    bool ours = link->up && r->session == link->chan.session; /* of the session that runs now */
    MP_ASSERT(link->applying[r->parity] > 0);
    link->applying[r->parity]--;
    r->volume->unsynced = true;
    if (!r->error) {
        r->volume->written_bytes += r->part;
        if (ours)
            link->acks[link->ack_count++] = r->cookie;
    }
    int error = r->error;
    mp_request_free(r);
    if (error && ours) {
        mp_link_fail_disk(engine, "write");
        return;
    }
    if (ours) {
        if (link->ack_count == MP_ACKS * MP_ACK_FRAMES)
            send_acks(engine);
        if (link->up && link->ack_count == MP_ACKS * MP_ACK_FRAMES)
            mp_link_detach(engine, true, 13, "the peer takes no acknowledgements");
        maybe_sync(engine);
    }
}

static void apply(mp_engine *engine, mp_request *r)
{
    mp_link *link = &engine->link;
    link->receiving = NULL;
    link->writes_since_barrier++;
    r->parity = link->parity;
    link->applying[r->parity]++;
    if (r->op == MP_OP_WRITE && r->part <= MP_INLINE && !(r->flags & MP_REQUEST_FUA)) {
        mp_request_run(&r->job, NULL);
        mp_request_finished(r);
    } else {
        mp_pool_submit(&engine->pool, &r->job);
    }
}

/* Checks a WRITE or ZERO and makes its request. NULL: garbage (the link is down then) or, with `paused`, not now. */
static mp_request *receive_write(mp_engine *engine, const mp_frame *frame)
{
    mp_link *link = &engine->link;
    mp_volume *volume = volume_of(engine, frame);
    bool zero = frame->type == MP_FRAME_ZERO;
    if (link->source || !volume || frame->epoch != link->epoch) {
        garbage(engine, link->source ? "a write from the target" : !volume ? "a write to an unknown volume" : "a write of another epoch");
        return NULL;
    }
    if (zero ? frame->length != 8 || frame->meta != 8 : frame->meta || !frame->length) {
        garbage(engine, "a malformed write");
        return NULL;
    }
    mp_request *r = mp_request_new(engine);
    if (r)
        r->op = zero ? MP_OP_ZERO : MP_OP_WRITE; /* says whose budget the buffer is of */
    if (r && !zero && !mp_request_buffer(r, frame->length)) {
        mp_request_free(r);
        r = NULL;
    }
    if (!r) {
        link->paused = true;
        return NULL;
    }
    r->volume = volume;
    r->apply = true;
    r->flags = (frame->flags & FLAG_FUA ? MP_REQUEST_FUA : 0u) | (frame->flags & FLAG_NO_HOLE ? MP_REQUEST_NO_HOLE : 0u);
    r->cookie = frame->count;
    r->session = frame->session;
    r->at = r->offset = frame->offset;
    r->part = r->length = zero ? 0 : frame->length;
    return r;
}

static bool in_range(const mp_volume *volume, uint64_t offset, uint64_t length)
{
    return length && offset <= volume->size && length <= volume->size - offset;
}

/* Where the payload of the frame that begins goes; NULL: not now, or the link is down. */
static void *payload_for(mp_engine *engine, const mp_frame *frame)
{
    mp_link *link = &engine->link;
    switch (frame->type) {
    case MP_FRAME_WRITE:
    case MP_FRAME_ZERO: {
        mp_request *r = receive_write(engine, frame);
        if (r && frame->type == MP_FRAME_WRITE && !in_range(r->volume, r->at, r->part)) {
            mp_request_free(r);
            garbage(engine, "a write outside the volume");
            return NULL;
        }
        link->receiving = r;
        return !r ? NULL : r->op == MP_OP_ZERO ? r->meta : r->buffer;
    }
    case MP_FRAME_READ: {
        mp_volume *volume = volume_of(engine, frame);
        if (!link->source && volume && frame->epoch == link->epoch && frame->length == 8 && frame->meta == 8)
            return mp_cover_ask_buffer(engine, frame, volume);
        garbage(engine, "a malformed read");
        return NULL;
    }
    case MP_FRAME_READ_DATA: {
        void *buffer = mp_cover_answer_buffer(engine, frame);
        if (!buffer)
            garbage(engine, "an answer to a read that is not on its way");
        return buffer;
    }
    case MP_FRAME_WANT:
    case MP_FRAME_SETTLED:
    case MP_FRAME_BITS:
    case MP_FRAME_MERGED: {
        mp_volume *volume = volume_of(engine, frame);
        link->taking_bytes = 0; /* not of the slab */
        if (!volume)
            link->taking = NULL;
        else if (frame->type == MP_FRAME_WANT)
            link->taking = mp_mend_want_buffer(volume, frame);
        else if (frame->type == MP_FRAME_BITS)
            link->taking = frame->length <= sizeof link->bits ? link->bits : NULL;
        else
            link->taking = frame->length <= sizeof link->brief ? link->brief : NULL;
        if (!link->taking)
            garbage(engine, "a frame of the resync that makes no sense");
        return link->taking;
    }
    case MP_FRAME_DIGESTS:
    case MP_FRAME_BULK:
    case MP_FRAME_DATA:
        if (link->source || !volume_of(engine, frame)) {
            garbage(engine, "a frame of an unknown volume, or from the target");
            return NULL;
        }
        link->taking_bytes = frame->length;
        if (!(link->taking = mp_slab_get(&engine->slab, frame->length))) {
            engine->starved = true;
            link->paused = true;
        }
        return link->taking;
    default:
        if (frame->length > sizeof link->error_text - 1) {
            garbage(engine, "an oversized frame");
            return NULL;
        }
        return link->error_text;
    }
}

static void take_acks(mp_engine *engine, const mp_frame *frame, const uint8_t *tags)
{
    for (uint32_t at = 0; at + 4 <= frame->meta && engine->link.up; at += 4)
        mp_request_acked(engine, mp_load32(tags + at));
}

/* What the peer says is wrong, made safe to log: its "message", without parsing more of the JSON than that. */
static void peer_error(mp_engine *engine, const uint8_t *payload, uint32_t length)
{
    char text[200];
    uint32_t used = 0;
    for (uint32_t i = 0; i < length && used + 1 < sizeof text; i++)
        text[used++] = payload[i] >= 0x20 && payload[i] < 0x7f ? (char)payload[i] : '?';
    text[used] = 0;
    mp_link_detach(engine, true, 1, "the peer gave up: %s", text);
}

static void take_barrier(mp_engine *engine, const mp_frame *frame, const uint8_t *payload)
{
    mp_link *link = &engine->link;
    if (link->source || frame->meta != 8 || link->barrier_waits) {
        garbage(engine, "a barrier out of turn");
        return;
    }
    if (mp_load64(payload) != link->writes_since_barrier) {
        garbage(engine, "a barrier counts other writes than came (W6)");
        return;
    }
    link->writes_since_barrier = 0;
    link->parity = !link->parity;
    link->barrier_waits = true;
    link->barrier_tag = frame->count;
    maybe_sync(engine);
}

/* A frame is complete. */
static void take(mp_engine *engine, uint8_t *payload)
{
    mp_link *link = &engine->link;
    const mp_frame *frame = &link->chan.frame;
    if (frame->length && !mp_chan_check(frame, payload)) {
        garbage(engine, "a payload fails its digest");
        return;
    }
    if (frame->epoch != link->epoch && frame->type != MP_FRAME_ERROR) {
        garbage(engine, "a frame of another epoch (W9)");
        return;
    }
    void *taking = link->taking;
    mp_volume *volume = volume_of(engine, frame);
    link->taking = NULL;
    if (!taking)
        link->taking_bytes = 0;
    switch (frame->type) {
    case MP_FRAME_PING:
        break;
    case MP_FRAME_ERROR:
        peer_error(engine, payload, frame->length);
        break;
    case MP_FRAME_WRITE:
        if (link->receiving && link->receiving->op == MP_OP_WRITE)
            apply(engine, link->receiving);
        else
            garbage(engine, "a write without data");
        break;
    case MP_FRAME_ZERO: {
        mp_request *r = link->receiving;
        if (!r) {
            garbage(engine, "a trim without a length");
            break;
        }
        r->part = r->length = mp_load64(r->meta);
        if (in_range(r->volume, r->at, r->part) && r->part <= MP_CHUNK)
            apply(engine, r);
        else
            garbage(engine, "a trim outside the volume");
        break;
    }
    case MP_FRAME_BARRIER:
        take_barrier(engine, frame, payload);
        break;
    case MP_FRAME_READ:
        if (!mp_cover_asked(engine))
            garbage(engine, "a read outside the volume");
        break;
    case MP_FRAME_READ_DATA:
        if (!mp_cover_answered(engine, frame))
            garbage(engine, "an answer to a read that is not on its way");
        break;
    case MP_FRAME_FLUSHED:
        mp_barrier_acked(engine, frame->count);
        break;
    default:
        if (taking || frame->type == MP_FRAME_BITS_END || frame->type == MP_FRAME_MERGED || frame->type == MP_FRAME_RESYNC_DONE) {
            if (!volume)
                garbage(engine, "a frame of an unknown volume");
            else if (!mp_mend_frame(volume, frame, taking, link->taking_bytes != 0))
                garbage(engine, "a frame of the resync that makes no sense");
        } else {
            garbage(engine, "a frame of an unknown kind");
        }
    }
}

static void receive(mp_engine *engine)
{
    mp_link *link = &engine->link;
    mp_chan *chan = &link->chan;
    uint64_t begin = chan->bytes_in;
    link->more = false;
    for (unsigned frames = 0; link->up && !link->paused; frames++) {
        if (frames >= 2 * FRAMES_AT_ONCE || chan->bytes_in - begin >= BYTES_AT_ONCE) { /* acks and answers go out meanwhile */
            link->more = true;
            return;
        }
        mp_chan_result result = mp_chan_receive(chan);
        link->last_in_ns = chan->bytes_in != link->seen_in ? mp_now_ns() : link->last_in_ns;
        link->seen_in = chan->bytes_in;
        switch (result) {
        case MP_CHAN_AGAIN:
            return;
        case MP_CHAN_FRAME:
            if (chan->frame.type == MP_FRAME_ACK && link->source && chan->frame.length <= sizeof link->ack_frame[0].tags) {
                mp_chan_payload(chan, chan->frame.length ? link->ack_frame[0].tags : NULL);
                continue;
            }
            if (chan->frame.length) {
                void *payload = payload_for(engine, &chan->frame);
                if (!payload)
                    continue; /* paused, or down */
                mp_chan_payload(chan, payload);
            } else {
                mp_chan_payload(chan, NULL);
            }
            continue;
        case MP_CHAN_DONE:
            if (chan->frame.type == MP_FRAME_ACK && link->source) {
                if (!mp_chan_check(&chan->frame, link->ack_frame[0].tags))
                    garbage(engine, "a payload fails its digest");
                else
                    take_acks(engine, &chan->frame, link->ack_frame[0].tags);
            } else {
                take(engine, chan->payload);
            }
            if (link->up && link->ack_count >= ACKS_EAGER) {
                send_acks(engine);
                flush(engine);
            }
            continue;
        case MP_CHAN_EOF:
            mp_link_detach(engine, true, 1, "the peer closed the connection");
            return;
        case MP_CHAN_ERROR:
            mp_link_detach(engine, true, 1, "the connection failed: %s", strerror(chan->error));
            return;
        case MP_CHAN_GARBAGE:
            mp_link_detach(engine, true, 1, "the peer sent garbage: %s", chan->text);
            return;
        }
    }
}

static void on_link(void *argument, unsigned events)
{
    mp_engine *engine = argument;
    if (events & MP_LOOP_READ)
        receive(engine);
    flush(engine);
}

void mp_link_round(mp_engine *engine)
{
    mp_link *link = &engine->link;
    if (!link->up)
        return;
    if (link->paused || link->more) {
        link->paused = false;
        receive(engine);
    }
    if (!link->up)
        return;
    send_acks(engine);
    flush(engine);
    watch(engine);
    engine->loop.again |= link->up && link->more;
}

/* Resync threads run at nice 19: a busy host may let them wait for long. */
static bool a_unit_is_stuck(const mp_engine *engine, uint64_t now_ns)
{
    uint64_t patience = UNIT_PATIENCE * engine->link.timeout_ns;
    bool stuck = false;
    for (uint32_t i = 0; i < engine->volumes && now_ns > patience; i++)
        stuck |= mp_mend_stuck(&engine->volume[i], now_ns - patience);
    return stuck;
}

void mp_link_tick(mp_engine *engine, uint64_t now_ns)
{
    mp_link *link = &engine->link;
    if (!link->up)
        return;
    if (link->chan.bytes_out != link->seen_out) {
        link->seen_out = link->chan.bytes_out;
        link->last_out_ns = now_ns;
    }
    const mp_request *oldest = engine->held_first;
    while (oldest && oldest->peer_done)
        oldest = oldest->next_held;
    double usual_ms = (double)link->ack_ns / 1e6;
    if (now_ns - link->last_in_ns > link->timeout_ns)
        mp_link_detach(engine, true, 13, "the peer was silent for %.1f s (usual answer: %.2f ms)", (double)(now_ns - link->last_in_ns) / 1e9, usual_ms);
    else if (link->source && oldest && now_ns - oldest->sent_ns > link->timeout_ns)
        mp_link_detach(engine, true, 13, "the peer left a write unconfirmed for %.1f s (usual answer: %.2f ms)", (double)(now_ns - oldest->sent_ns) / 1e9, usual_ms);
    else if (link->source && engine->barrier.running && engine->barrier.peer_pending && now_ns - engine->barrier.began_ns > link->timeout_ns)
        mp_link_detach(engine, true, 13, "the peer left a barrier unanswered for %.1f s (usual answer to a write: %.2f ms)", (double)(now_ns - engine->barrier.began_ns) / 1e9, usual_ms);
    else if (link->source && a_unit_is_stuck(engine, now_ns))
        mp_link_detach(engine, true, 13, "the peer left a part of the resync unanswered for %.1f s", (double)(UNIT_PATIENCE * link->timeout_ns) / 1e9);
    else if (now_ns - link->last_out_ns > link->timeout_ns / 4 && !link->chan.first)
        mp_link_small(engine, MP_FRAME_PING, 0, 0, 0, NULL, 0);
}
