/* session.c - see session.h. */
#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECOND ((uint64_t)1000000000)
#define TICK (20 * 1000000u)    /* also the granularity of a rate limit */
#define LINGER (2 * SECOND)     /* for the peer to read why we failed */
#define STANDSTILL 20           /* times the time-out: 4 MiB in the kernel's buffers at 10 KiB/s are 400 s without an answer */
#define LAST_WORD (10 * SECOND) /* for the peer to close after all was well */

void mp_session_send(mp_session *session, mp_outgoing *out) { mp_chan_queue(session->chan, out); }

static void watch(mp_session *session)
{
    unsigned in = session->input_paused || session->peer_gone ? 0 : MP_LOOP_READ;
    unsigned out = session->chan->first ? MP_LOOP_WRITE : 0;
    if (session->chan->fd_in == session->chan->fd_out) {
        mp_loop_change(&session->loop, session->chan->fd_in, in | out);
    } else {
        mp_loop_change(&session->loop, session->chan->fd_in, in);
        mp_loop_change(&session->loop, session->chan->fd_out, out);
    }
}

static void flush(mp_session *session)
{
    mp_chan *chan = session->chan;
    if (mp_chan_flush(chan) == MP_CHAN_ERROR) {
        /* The peer is gone, but it may have said why: what it sent is still read for a while. That ends in its ERROR, in
         * the end of the stream, or on_tick ends it. */
        chan->first = NULL;
        chan->last = &chan->first;
        if (!session->lost_ns)
            session->lost_ns = mp_now_ns() + LINGER;
        session->input_paused = false;
        if (session->closing)
            mp_loop_stop(&session->loop);
    }
    if (session->closing && !chan->first && session->closing_ns && !session->expect_eof)
        mp_loop_stop(&session->loop);
}

static uint32_t code_of(const mp_fault *fault)
{
    return fault->status == MP_CANCELLED ? 130 : fault->status == MP_PEER_SILENT ? 13 : 1;
}

static size_t put_json(char *to, size_t room, const char *text)
{
    size_t used = 0;
    for (; *text && used + 8 < room; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < 0x20 || c == '"' || c == '\\')
            used += (size_t)snprintf(to + used, room - used, "\\u%04x", c);
        else
            to[used++] = (char)c;
    }
    to[used] = 0;
    return used;
}

/* Says what went wrong to the peer. Frames that are queued but not begun are dropped, and with them their numbers. */
static void tell(mp_session *session, const mp_fault *fault)
{
    static const char *const side[] = {"", "source", "target"};
    mp_chan *chan = session->chan;
    char sentence[640], escaped[900];
    if (fault->status == MP_CANCELLED)
        snprintf(sentence, sizeof sentence, "interrupted");
    else
        snprintf(sentence, sizeof sentence, "%s%s%s%s%s", side[fault->side % 3], fault->side ? ": " : "", fault->text,
                 fault->error ? ": " : "", fault->error ? strerror(fault->error) : "");
    size_t used = strlen(sentence);
    if (fault->side) /* an image is to blame: say where */
        snprintf(sentence + used, sizeof sentence - used, " at offset %llu", (unsigned long long)fault->offset);
    put_json(escaped, sizeof escaped, sentence);
    int length = snprintf(session->error_text, sizeof session->error_text, "{\"code\":%u,\"message\":\"%s\"}", code_of(fault), escaped);
    mp_outgoing *begun = chan->first && chan->first->done ? chan->first : NULL;
    if (chan->first) {
        chan->sequence_out = chan->first->frame.sequence + (begun != NULL);
        chan->first = begun;
        chan->last = begun ? &begun->next : &chan->first;
        if (begun)
            begun->next = NULL;
    }
    session->error = (mp_outgoing){.frame = {.type = MP_FRAME_ERROR, .length = (uint32_t)length, .meta = (uint32_t)length}, .meta = session->error_text};
    mp_chan_queue(chan, &session->error);
}

void mp_session_fail(mp_session *session, const mp_fault *fault)
{
    mp_copy_fail(session->copy, fault);
    if (session->closing)
        return;
    session->closing = true;
    session->input_paused = false; /* what still comes is read and thrown away */
    session->expect_eof = true; /* until it hung up, it may not have read it */
    session->closing_ns = mp_now_ns() + LINGER;
    bool peer_knows = fault->status == MP_PEER_GONE || fault->status == MP_PEER_ERROR;
    if (peer_knows || session->peer_gone) {
        mp_loop_stop(&session->loop);
        return;
    }
    tell(session, fault);
    flush(session);
}

void mp_session_garbage(mp_session *session, const char *what)
{
    mp_fault fault = {.status = MP_PEER_GARBAGE};
    snprintf(fault.text, sizeof fault.text, "%s", what);
    mp_session_fail(session, &fault);
}

void mp_session_end(mp_session *session, bool wait)
{
    if (session->closing)
        return;
    session->closing = true;
    session->input_paused = false;
    session->expect_eof = wait;
    session->closing_ns = mp_now_ns() + LAST_WORD;
    flush(session);
}

void mp_session_resume(mp_session *session) { session->input_paused = false; }

static void peer_left(mp_session *session, const char *why)
{
    session->peer_gone = true;
    if (session->closing)
        mp_loop_stop(&session->loop);
    else {
        mp_fault fault = {.status = MP_PEER_GONE};
        snprintf(fault.text, sizeof fault.text, "%s", why);
        mp_session_fail(session, &fault);
    }
}

/* Takes the frames that every session has; false: it is one of the copy's. */
static bool common_frame(mp_session *session, const mp_frame *frame)
{
    if (frame->type == MP_FRAME_PING)
        return true;
    session->last_frame_ns = mp_now_ns();
    if (frame->type != MP_FRAME_ERROR)
        return false;
    mp_fault fault = {.status = MP_PEER_ERROR};
    if (!mp_chan_check(frame, session->peer_text)) {
        mp_session_garbage(session, "an error frame fails its digest");
        return true;
    }
    snprintf(fault.text, sizeof fault.text, "%.*s", (int)frame->length, session->peer_text);
    mp_session_fail(session, &fault);
    return true;
}

static void *common_payload(mp_session *session, bool *pause)
{
    const mp_frame *frame = &session->chan->frame;
    *pause = false;
    if (frame->type == MP_FRAME_PING || frame->type == MP_FRAME_ERROR) {
        if (frame->length < sizeof session->peer_text)
            return session->peer_text;
        mp_session_garbage(session, "an error frame is too long");
        return NULL;
    }
    void *payload = session->ops->payload(session);
    *pause = !payload && !session->closing;
    return payload;
}

static void receive(mp_session *session)
{
    mp_chan *chan = session->chan;
    void *payload = NULL;
    /* After a failure of ours the rest is read and thrown away: unread bytes would make the kernel reset the connection,
     * and the peer lose our ERROR. */
    while (session->closing && !session->peer_gone) {
        char sink[65536];
        ssize_t got = chan->is_socket_in ? recv(chan->fd_in, sink, sizeof sink, MSG_DONTWAIT) : read(chan->fd_in, sink, sizeof sink);
        if (got > 0 || (got < 0 && errno == EINTR))
            continue;
        if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
            peer_left(session, "");
        return;
    }
    while (!session->closing) { /* to the last byte: what stays in the channel's own buffer raises no event */
        switch (mp_chan_receive(chan)) {
        case MP_CHAN_AGAIN:
            return;
        case MP_CHAN_FRAME:
            if (chan->frame.length) {
                bool pause;
                payload = common_payload(session, &pause);
                if (!payload) {
                    session->input_paused = pause;
                    return;
                }
                mp_chan_payload(chan, payload);
            }
            break;
        case MP_CHAN_DONE: {
            mp_frame frame = chan->frame;
            if (!common_frame(session, &frame))
                session->ops->frame(session, &frame, frame.length ? chan->payload : NULL);
            break;
        }
        case MP_CHAN_EOF:
            peer_left(session, "the peer closed the connection");
            return;
        case MP_CHAN_ERROR: {
            char why[128];
            snprintf(why, sizeof why, "the connection failed: %s", strerror(chan->error));
            peer_left(session, why);
            return;
        }
        case MP_CHAN_GARBAGE:
            mp_session_garbage(session, chan->text);
            return;
        }
    }
}

static void after_round(mp_session *session)
{
    uint64_t before;
    do { /* what a frame that went out frees is used at once */
        before = session->chan->bytes_out;
        if (!session->closing)
            session->ops->pump(session);
        flush(session);
    } while (!session->closing && session->chan->bytes_out != before);
    mp_progress *progress = &session->copy->shared->progress;
    if (session->chan->bytes_in != session->bytes_in_seen) {
        session->bytes_in_seen = session->chan->bytes_in;
        session->last_in_ns = mp_now_ns();
        atomic_store(&progress->wire_in, session->bytes_in_seen);
    }
    if (session->chan->bytes_out != session->bytes_out_seen) {
        session->bytes_out_seen = session->chan->bytes_out;
        session->last_out_ns = session->queue_moved_ns = mp_now_ns();
        atomic_store(&progress->wire_out, session->bytes_out_seen);
    }
    watch(session);
}

static void on_connection(void *argument, unsigned events)
{
    mp_session *session = argument;
    if (events & MP_LOOP_READ && !session->input_paused)
        receive(session);
    after_round(session);
}

static void on_jobs(void *argument, unsigned events)
{
    (void)events;
    mp_session *session = argument;
    for (mp_job *job; (job = mp_pool_take(&session->copy->pool));)
        session->ops->finished(session, job);
    if (!session->input_paused && !session->closing)
        receive(session); /* a payload may have waited for what these jobs held */
    after_round(session);
}

static void on_cancel(void *argument, unsigned events)
{
    (void)events;
    mp_session *session = argument;
    uint64_t count;
    (void)!read(session->copy->cancel_fd, &count, sizeof count);
    if (mp_copy_cancelled(session->copy))
        mp_session_fail(session, &(mp_fault){.status = MP_CANCELLED});
    after_round(session);
}

static void ping_sent(mp_outgoing *out)
{
    mp_session *session = (mp_session *)((char *)out - offsetof(mp_session, ping));
    session->ping_queued = false;
}

static void on_tick(void *argument, uint64_t now)
{
    mp_session *session = argument;
    uint64_t timeout = session->copy->timeout_ns;
    if (!session->closing && !session->input_paused) { /* this thread may have been held up: look before judging */
        uint64_t seen = session->chan->bytes_in;
        receive(session);
        if (session->chan->bytes_in != seen)
            session->last_in_ns = now;
    }
    if (!session->closing && session->lost_ns && now >= session->lost_ns)
        peer_left(session, "the connection takes no more data");
    if (session->closing) {
        if (now >= session->closing_ns)
            mp_loop_stop(&session->loop);
    } else if (session->input_paused) {
        session->last_in_ns = now; /* we are the ones who do not read */
    } else if (now - session->last_in_ns > timeout) {
        mp_fault fault = {.status = MP_PEER_SILENT};
        snprintf(fault.text, sizeof fault.text, "no byte from the peer for %.1f s", (double)(now - session->last_in_ns) / 1e9);
        mp_session_fail(session, &fault);
    }
    if (!session->chan->first)
        session->queue_moved_ns = now;
    bool arriving = session->chan->in_frame && session->chan->frame.type != MP_FRAME_PING; /* silence is judged above */
    if (session->copy->rate || session->input_paused || arriving || session->ops->waits_rightly(session))
        session->last_frame_ns = now;
    bool takes_nothing = now - mp_min(now, session->queue_moved_ns) > STANDSTILL * timeout;
    if (!session->closing && (takes_nothing || now - mp_min(now, session->last_frame_ns) > STANDSTILL * timeout)) {
        mp_fault fault = {.status = MP_PEER_SILENT};
        snprintf(fault.text, sizeof fault.text, "the peer lives but %s for %.1f s", takes_nothing ? "takes no data" : "does not go on",
                 (double)(STANDSTILL * timeout) / 1e9);
        mp_session_fail(session, &fault);
    }
    if (!session->closing && !session->ping_queued && !session->chan->first && now - session->last_out_ns > mp_min(timeout / 4, 5 * SECOND)) {
        session->ping_queued = true;
        session->ping = (mp_outgoing){.frame = {.type = MP_FRAME_PING}, .sent = ping_sent};
        mp_session_send(session, &session->ping);
    }
    after_round(session);
}

void mp_session_run(mp_session *session, mp_copy *copy, const mp_session_ops *ops, void *owner)
{
    memset(session, 0, sizeof *session);
    session->copy = copy;
    session->chan = copy->chan;
    session->ops = ops;
    session->owner = owner;
    session->last_in_ns = session->last_out_ns = session->last_frame_ns = session->queue_moved_ns = mp_now_ns();
    bool good = mp_loop_init(&session->loop) == MP_OK;
    mp_loop *loop = &session->loop;
    good = good && mp_loop_add(loop, copy->chan->fd_in, MP_LOOP_READ, on_connection, session);
    if (copy->chan->fd_out != copy->chan->fd_in)
        good = good && mp_loop_add(loop, copy->chan->fd_out, MP_LOOP_WRITE, on_connection, session);
    good = good && mp_loop_add(loop, mp_pool_fd(&copy->pool), MP_LOOP_READ, on_jobs, session);
    good = good && mp_loop_add(loop, copy->cancel_fd, MP_LOOP_READ, on_cancel, session);
    if (!good) {
        mp_copy_fail(copy, &(mp_fault){.status = MP_INTERNAL, .error = errno, .text = "the connection cannot be watched"});
    } else {
        mp_loop_every(loop, TICK, on_tick, session);
        receive(session); /* bytes that arrived with the handshake lie in the buffer: no event will tell */
        after_round(session);
        if (!mp_loop_run(loop))
            mp_copy_fail(copy, &(mp_fault){.status = MP_INTERNAL, .error = errno, .text = "epoll"});
    }
    mp_loop_close(loop);
}
