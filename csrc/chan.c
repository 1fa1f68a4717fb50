/* chan.c - see chan.h. */
#define _GNU_SOURCE
#include "chan.h"

#include "loop.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define BATCH 16 /* frames per writev */

static bool is_socket(int fd)
{
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISSOCK(status.st_mode);
}

bool mp_chan_init(mp_chan *chan, int fd_in, int fd_out, uint64_t session)
{
    memset(chan, 0, sizeof *chan);
    *chan = (mp_chan){.fd_in = fd_in, .fd_out = fd_out, .session = session};
    chan->last = &chan->first;
    chan->is_socket_in = is_socket(fd_in);
    chan->is_socket_out = is_socket(fd_out);
    /* Sockets are asked per call (MSG_DONTWAIT); a pipe has no such flag. */
    int fds[2] = {fd_in, fd_out};
    for (int i = 0; i < 2; i++) {
        int flags = fcntl(fds[i], F_GETFL);
        if (flags < 0 || fcntl(fds[i], F_SETFL, flags | O_NONBLOCK) < 0)
            return false;
    }
    chan->input = malloc(MP_CHAN_INPUT);
    return chan->input != NULL;
}

void mp_chan_close(mp_chan *chan)
{
    free(chan->input);
    chan->input = NULL;
}

static mp_chan_result garbage(mp_chan *chan, const char *what)
{
    snprintf(chan->text, sizeof chan->text, "%s", what);
    return MP_CHAN_GARBAGE;
}

/* The first bytes of something that is not our protocol, made safe to show: mostly a login banner or an error text. */
static mp_chan_result not_ours(mp_chan *chan, const uint8_t *bytes, size_t length)
{
    size_t used = (size_t)snprintf(chan->text, sizeof chan->text, "not a mirrorpair frame: \"");
    for (size_t i = 0; i < length && i < 60 && used + 8 < sizeof chan->text; i++)
        used += (size_t)snprintf(chan->text + used, sizeof chan->text - used,
                                 isprint(bytes[i]) && bytes[i] != '"' && bytes[i] != '\\' ? "%c" : "\\x%02x", bytes[i]);
    snprintf(chan->text + used, sizeof chan->text - used, "\"");
    return MP_CHAN_GARBAGE;
}

/* One read into `at`: DONE with the bytes got, or AGAIN, EOF, ERROR. */
static mp_chan_result read_some(mp_chan *chan, void *at, size_t length, size_t *got)
{
    if (chan->emptied) { /* whoever waits for more is told by poll or epoll, also of the end */
        chan->emptied = false;
        return MP_CHAN_AGAIN;
    }
    for (;;) {
        ssize_t part = chan->is_socket_in ? recv(chan->fd_in, at, length, MSG_DONTWAIT) : read(chan->fd_in, at, length);
        if (part > 0) {
            *got = (size_t)part;
            chan->emptied = chan->is_socket_in && (size_t)part < length;
            chan->bytes_in += (uint64_t)part;
            return MP_CHAN_DONE;
        }
        if (part == 0)
            return MP_CHAN_EOF;
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK)
            return MP_CHAN_AGAIN;
        chan->error = errno;
        return MP_CHAN_ERROR;
    }
}

static mp_chan_result take_header(mp_chan *chan)
{
    mp_frame_fault fault = mp_frame_decode(chan->input + chan->input_at, &chan->frame);
    if (fault == MP_FRAME_BAD_MAGIC)
        return not_ours(chan, chan->input + chan->input_at, chan->input_end - chan->input_at);
    if (fault == MP_FRAME_BAD_CHECKSUM)
        return garbage(chan, "a frame header fails its checksum");
    if (fault == MP_FRAME_BAD_LENGTH)
        return garbage(chan, "a frame states an impossible length");
    if (chan->frame.sequence != chan->sequence_in)
        return garbage(chan, "a frame was lost, repeated or reordered");
    if (!chan->session)
        chan->session = chan->frame.session;
    if (chan->frame.session != chan->session)
        return garbage(chan, "a frame of another session");
    chan->input_at += MP_FRAME_HEADER;
    chan->sequence_in++;
    chan->in_frame = true;
    chan->payload = NULL;
    chan->payload_got = 0;
    return MP_CHAN_FRAME;
}

mp_chan_result mp_chan_receive(mp_chan *chan)
{
    for (;;) {
        uint32_t buffered = chan->input_end - chan->input_at;
        if (chan->in_frame) {
            uint32_t missing = chan->frame.length - chan->payload_got;
            if (chan->frame.length && !chan->payload)
                return MP_CHAN_FRAME;
            if (buffered && missing) {
                uint32_t part = buffered < missing ? buffered : missing;
                memcpy(chan->payload + chan->payload_got, chan->input + chan->input_at, part);
                chan->input_at += part;
                chan->payload_got += part;
                missing -= part;
            }
            if (!missing) {
                chan->in_frame = false;
                return MP_CHAN_DONE;
            }
            if (missing >= MP_CHAN_INPUT / 2) { /* large: past the buffer */
                size_t got;
                mp_chan_result result = read_some(chan, chan->payload + chan->payload_got, missing, &got);
                if (result != MP_CHAN_DONE)
                    return result;
                chan->payload_got += (uint32_t)got;
                continue;
            }
        } else if (buffered >= MP_FRAME_HEADER) {
            return take_header(chan);
        }
        buffered = chan->input_end - chan->input_at;
        if (buffered)
            memmove(chan->input, chan->input + chan->input_at, buffered);
        chan->input_at = 0;
        chan->input_end = buffered;
        size_t got;
        mp_chan_result result = read_some(chan, chan->input + buffered, MP_CHAN_INPUT - buffered, &got);
        if (result == MP_CHAN_EOF && buffered && !chan->in_frame && buffered >= 4 && mp_load32(chan->input) != MP_FRAME_MAGIC)
            return not_ours(chan, chan->input, buffered);
        if (result != MP_CHAN_DONE)
            return result;
        chan->input_end += (uint32_t)got;
        /* Something that is not ours is told by its first four bytes; it may never send eighty. */
        if (!chan->in_frame && chan->input_end >= 4 && mp_load32(chan->input) != MP_FRAME_MAGIC)
            return not_ours(chan, chan->input, chan->input_end);
    }
}

void mp_chan_payload(mp_chan *chan, void *payload)
{
    MP_ASSERT(chan->in_frame && !chan->payload && (payload || !chan->frame.length));
    chan->payload = payload;
}

bool mp_chan_check(const mp_frame *frame, const void *payload)
{
    const uint8_t *at = payload;
    return mp_digest_equal(frame->digest, mp_frame_digest(frame->session, at, frame->meta, at ? at + frame->meta : NULL,
                                                          frame->length - frame->meta));
}

void mp_outgoing_seal(mp_outgoing *out, uint64_t session)
{
    out->digest = mp_frame_digest(session, out->meta, out->frame.meta, out->data, out->frame.length - out->frame.meta);
    out->sealed = true;
}

void mp_chan_queue(mp_chan *chan, mp_outgoing *out)
{
    if (!out->sealed)
        mp_outgoing_seal(out, chan->session);
    out->frame.session = chan->session;
    out->frame.sequence = chan->sequence_out++;
    out->frame.digest = out->digest;
    out->sealed = false; /* the digest is used up: the next payload of the same object needs its own */
    mp_frame_encode(&out->frame, out->header);
    out->done = 0;
    out->next = NULL;
    *chan->last = out;
    chan->last = &out->next;
    chan->queued_bytes += MP_FRAME_HEADER + out->frame.length;
}

static int gather(const mp_outgoing *out, struct iovec *vector)
{
    struct iovec parts[3] = {
        {(void *)(uintptr_t)out->header, MP_FRAME_HEADER},
        {(void *)(uintptr_t)out->meta, out->frame.meta},
        {(void *)(uintptr_t)out->data, out->frame.length - out->frame.meta},
    };
    uint64_t skip = out->done;
    int count = 0;
    for (int i = 0; i < 3; i++) {
        if (skip >= parts[i].iov_len) {
            skip -= parts[i].iov_len;
            continue;
        }
        vector[count++] = (struct iovec){(char *)parts[i].iov_base + skip, parts[i].iov_len - skip};
        skip = 0;
    }
    return count;
}

mp_chan_result mp_chan_flush(mp_chan *chan)
{
    while (chan->first) {
        struct iovec vector[BATCH * 3];
        int parts = 0, frames = 0;
        for (mp_outgoing *out = chan->first; out && frames < BATCH; out = out->next, frames++)
            parts += gather(out, vector + parts);
        ssize_t sent;
        if (chan->is_socket_out) {
            struct msghdr message = {.msg_iov = vector, .msg_iovlen = (size_t)parts};
            sent = sendmsg(chan->fd_out, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        } else {
            sent = writev(chan->fd_out, vector, parts);
        }
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                return MP_CHAN_AGAIN;
            chan->error = errno;
            return MP_CHAN_ERROR;
        }
        chan->bytes_out += (uint64_t)sent;
        chan->queued_bytes -= (uint64_t)sent;
        while (chan->first) {
            mp_outgoing *out = chan->first;
            uint64_t left = MP_FRAME_HEADER + out->frame.length - out->done;
            if ((uint64_t)sent < left) {
                out->done += (uint64_t)sent;
                break;
            }
            sent -= (ssize_t)left;
            if (!(chan->first = out->next))
                chan->last = &chan->first;
            if (out->sent)
                out->sent(out);
        }
    }
    return MP_CHAN_AGAIN;
}

/* Waits for the descriptor: true if it is ready, false at the deadline. */
static bool wait_for(int fd, short events, uint64_t deadline_ns)
{
    for (;;) {
        uint64_t now = mp_now_ns();
        struct pollfd entry = {.fd = fd, .events = events};
        int timeout = now >= deadline_ns ? 0 : (int)mp_min((deadline_ns - now + 999999u) / 1000000u, 1u << 30);
        int count = poll(&entry, 1, timeout);
        if (count > 0)
            return true;
        if (count == 0 && mp_now_ns() >= deadline_ns)
            return false;
        if (count < 0 && errno != EINTR)
            return true; /* the call on the descriptor itself will say what is wrong */
    }
}

mp_chan_result mp_chan_send_wait(mp_chan *chan, uint16_t type, const void *payload, uint32_t length, int timeout_ms)
{
    uint64_t deadline = mp_now_ns() + (uint64_t)timeout_ms * 1000000u;
    mp_outgoing out = {.frame = {.type = type, .length = length, .meta = length}, .meta = payload};
    mp_chan_queue(chan, &out);
    for (;;) {
        mp_chan_result result = mp_chan_flush(chan);
        if (result == MP_CHAN_AGAIN && !chan->first)
            return MP_CHAN_DONE;
        if (result != MP_CHAN_AGAIN || !wait_for(chan->fd_out, POLLOUT, deadline)) {
            chan->first = NULL; /* `out` goes away; after half a frame the connection is of no use anyway */
            chan->last = &chan->first;
            return result;
        }
    }
}

mp_chan_result mp_chan_receive_wait(mp_chan *chan, void *payload, uint32_t capacity, int timeout_ms)
{
    uint64_t deadline = mp_now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        mp_chan_result result = mp_chan_receive(chan);
        if (result == MP_CHAN_FRAME) {
            if (chan->frame.length > capacity || chan->frame.meta != chan->frame.length)
                return garbage(chan, "a handshake frame is too large");
            mp_chan_payload(chan, payload);
            if (chan->frame.length)
                continue;
            chan->in_frame = false;
            result = MP_CHAN_DONE;
        }
        if (result == MP_CHAN_DONE && !mp_chan_check(&chan->frame, payload))
            return garbage(chan, "a frame's payload fails its digest");
        if (result != MP_CHAN_AGAIN)
            return result;
        if (!wait_for(chan->fd_in, POLLIN, deadline))
            return MP_CHAN_AGAIN;
    }
}
