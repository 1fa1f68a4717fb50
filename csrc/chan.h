/* chan.h - one connection that carries frames, non-blocking.
 *
 * Python negotiates through it (blocking calls with a deadline), the copy engine then drives the same object from its event
 * loop: sequence numbers and left-over bytes never cross languages.
 *
 * Contract: one thread at a time. The descriptors belong to the caller; fd_in may equal fd_out. Small frames are read through
 * a buffer, a large payload goes straight into the memory the owner gave for it. The header's checks (magic, checksum,
 * length, session, sequence) are done here; the payload's digest is checked by mp_chan_check, by the owner or by a worker.
 */
#ifndef MP_CHAN_H
#define MP_CHAN_H

#include "base.h"
#include "frame.h"

#include <sys/uio.h>

#define MP_CHAN_INPUT (128u << 10)

/* A frame on its way out. meta and data stay untouched until sent() is called. */
typedef struct mp_outgoing {
    struct mp_outgoing *next;
    mp_frame frame;
    const void *meta, *data;
    mp_digest digest; /* of the payload; computed by mp_outgoing_seal in a worker, or when queued */
    bool sealed;
    void (*sent)(struct mp_outgoing *out); /* may free it */
    uint8_t header[MP_FRAME_HEADER];
    uint64_t done; /* bytes of header + payload that went */
} mp_outgoing;

typedef enum mp_chan_result {
    MP_CHAN_AGAIN = 0, /* nothing more now */
    MP_CHAN_FRAME,     /* a header is there: say where its payload goes (mp_chan_payload) */
    MP_CHAN_DONE,      /* the payload is complete */
    MP_CHAN_EOF,
    MP_CHAN_ERROR,     /* errno in chan->error */
    MP_CHAN_GARBAGE,   /* one sentence in chan->text */
} mp_chan_result;

typedef struct mp_chan {
    int fd_in, fd_out;
    bool is_socket_in, is_socket_out;
    bool emptied; /* the last recv got less than it had room for: the next one would only say AGAIN */
    uint64_t session; /* 0: taken from the first frame */
    uint64_t sequence_in, sequence_out;
    uint64_t bytes_in, bytes_out;
    uint8_t *input;
    uint32_t input_at, input_end;
    mp_frame frame; /* the one being received */
    bool in_frame;
    uint8_t *payload;
    uint32_t payload_got;
    mp_outgoing *first, **last;
    uint64_t queued_bytes;
    int error;
    char text[256];
} mp_chan;

bool mp_chan_init(mp_chan *chan, int fd_in, int fd_out, uint64_t session); /* false: out of memory or not a descriptor */
void mp_chan_close(mp_chan *chan);                                         /* frees the buffer; descriptors stay open */

/* Goes on receiving. After MP_CHAN_FRAME the owner looks at chan->frame and calls mp_chan_payload once (NULL only for a
 * frame without payload), now or later; calling mp_chan_receive before that returns MP_CHAN_FRAME again. */
mp_chan_result mp_chan_receive(mp_chan *chan);
void mp_chan_payload(mp_chan *chan, void *payload);
/* Whether the payload is what the header's digest says. */
bool mp_chan_check(const mp_frame *frame, const void *payload);

void mp_outgoing_seal(mp_outgoing *out, uint64_t session);
void mp_chan_queue(mp_chan *chan, mp_outgoing *out);
/* Sends what is queued as far as the kernel takes it: AGAIN (all gone, or it is full: look at chan->first), or ERROR. */
mp_chan_result mp_chan_flush(mp_chan *chan);

/* For the handshake: the same, waiting up to timeout_ms for the whole. */
mp_chan_result mp_chan_send_wait(mp_chan *chan, uint16_t type, const void *payload, uint32_t length, int timeout_ms);
/* Receives one frame whose payload is at most `capacity` bytes: MP_CHAN_DONE, EOF, ERROR, GARBAGE, or AGAIN = time-out. */
mp_chan_result mp_chan_receive_wait(mp_chan *chan, void *payload, uint32_t capacity, int timeout_ms);

#endif
