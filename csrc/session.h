/* session.h - one end of a copy session: the connection, the event loop, time-outs, and how it ends.
 *
 * Rules
 *  - The loop thread moves bytes and hands out jobs; everything that reads an image or computes runs in the pool.
 *  - The end that fails tells the other why (ERROR) and gives it time to read that before the connection goes.
 *  - A peer that sends no byte for `timeout` is given up (MP_PEER_SILENT); a busy one sends PING, so a slow disk is not silence.
 *  - PING does not help for ever: a peer that takes no byte of what is queued, or sends nothing else while only it can go on,
 *    is given up after 20 x `timeout`. A rate limit makes long gaps; then the second is not judged.
 *  - Whoever receives can always go on receiving: memory for a payload never depends on something being sent first.
 *
 * Contract: the owner (copy_source.c, copy_target.c) fills `ops`; all call-backs run in the loop thread.
 */
#ifndef MP_SESSION_H
#define MP_SESSION_H

#include "copy.h"
#include "loop.h"

typedef struct mp_session mp_session;

typedef struct mp_session_ops {
    /* Memory for the payload of session->chan->frame; NULL: not now (call mp_session_resume later) or, after
     * mp_session_garbage, never. Not asked for frames without payload. */
    void *(*payload)(mp_session *session);
    void (*frame)(mp_session *session, const mp_frame *frame, void *payload); /* complete; digest not checked yet */
    void (*finished)(mp_session *session, mp_job *job);
    void (*pump)(mp_session *session); /* after every round: start what can be started */
    bool (*waits_rightly)(mp_session *session); /* it is not the peer's turn, or its turn may take long */
} mp_session_ops;

struct mp_session {
    mp_copy *copy;
    mp_chan *chan;
    mp_loop loop;
    const mp_session_ops *ops;
    void *owner;
    mp_outgoing ping, error; /* one of each at a time */
    bool ping_queued, input_paused, closing, expect_eof, peer_gone;
    char error_text[1024], peer_text[1024];
    uint64_t last_in_ns, last_out_ns, bytes_in_seen, bytes_out_seen, closing_ns;
    uint64_t last_frame_ns, queue_moved_ns; /* a frame other than PING came; the queue was empty or moved */
    uint64_t lost_ns; /* sending failed; until then the peer may still say why */
};

/* Runs the session to its end; the outcome is in copy->fault. */
void mp_session_run(mp_session *session, mp_copy *copy, const mp_session_ops *ops, void *owner);

void mp_session_send(mp_session *session, mp_outgoing *out);
void mp_session_resume(mp_session *session); /* memory for payloads is there again */
void mp_session_fail(mp_session *session, const mp_fault *fault);
void mp_session_garbage(mp_session *session, const char *what);
/* The work is done. `wait` : stay until the peer closes, so that what was sent last is surely read. */
void mp_session_end(mp_session *session, bool wait);

#endif
