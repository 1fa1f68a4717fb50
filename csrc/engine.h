/* engine.h - the data plane of one node: NBD clients, the replication link, resync. One loop thread, no Python in it.
 *
 * The rooms, each a .c file: engine.c (thread, commands, events, the round), request.c (one request from wait to answer),
 * serve.c and longread.c (a client's connection), link.c (frames to and from the peer), barrier.c (durable on both), mend.c
 * (resync), cover.c (this disk fails, the peer's does not).
 *
 * One write, source end: serve parses it -> request waits until the grant holds, nothing overlaps and the journal is hot ->
 * it holds its range, its frame is queued to the peer -> the whole batch is sent -> the local writes are done -> the peer's
 * ack comes -> the reply goes out. Target end: link takes the payload, checks it, writes, collects acks for the round.
 *
 * Rules
 *  - W1 one stream for all volumes, in the order of submission. W2, A6 overlapping requests are serialised before both
 *    submissions, so the target may finish in any order. W3 one buffer per payload, from the client's socket to the answer.
 *  - W4 (sync) an answer needs both ends; without a link it waits for the grant to say "alone" (G3).
 *  - M4 the extents are durable in the log first. W7 what the peer has not confirmed as flushed is dirty once the link is lost.
 *  - A10 the clock is read after the recv that delivered the request; a grant that ran out serves nothing.
 *  - Only the loop thread touches what is here, but for `mail`, `events` and `published`, which have the lock.
 */
#ifndef MP_ENGINE_H
#define MP_ENGINE_H

#include "base.h"
#include "chan.h"
#include "flight.h"
#include "journal.h"
#include "loop.h"
#include "nbd.h"
#include "pace.h"
#include "pool.h"
#include "slab.h"

#define MP_VOLUMES_MAX 64u
#define MP_ERRORS_KEPT 64u /* disk errors of a volume that are told before Python has read them all */
#define MP_REQUESTS_CHUNK 64u         /* allocated at a time */
#define MP_REQUESTS_MAX 32768u      /* in all; a client is not read while none is free */
#define MP_CHUNK ((uint64_t)16 << 20) /* a longer trim or zero is done in steps: its extents must fit the activity log */
#define MP_INLINE ((uint64_t)256 << 10) /* longer transfers go to the pool: a hand-over costs 40-60 us, 256 KiB as much */

typedef struct mp_engine mp_engine;
typedef struct mp_client mp_client;
typedef struct mp_volume mp_volume;
typedef struct mp_request mp_request;
typedef struct mp_mend mp_mend;

typedef enum mp_op { MP_OP_READ, MP_OP_WRITE, MP_OP_ZERO, MP_OP_FLUSH } mp_op;
enum mp_request_flag { MP_REQUEST_FUA = 1u, MP_REQUEST_NO_HOLE = 2u };

struct mp_request {
    mp_job job; /* first, so that a finished job is its request */
    mp_outgoing out;
    mp_engine *engine;
    mp_volume *volume;
    mp_client *client;  /* NULL: the peer's (apply), or nobody's any more */
    mp_request *next;   /* the one list it is in: waiting, to be done locally, flushing, to be answered */
    mp_request *previous_held, *next_held; /* writes that hold a range, oldest first */
    mp_op op;
    unsigned flags;
    bool apply; /* from the peer: answered by an ack */
    bool piece, last; /* of a long read; the last of its pieces */
    bool counted;     /* in engine.changes */
    uint64_t serial;  /* in the order they came; a piece has its read's */
    uint64_t cookie, offset, length;
    uint64_t at, part;  /* the step in hand: [at, at + part) */
    uint8_t *buffer;
    uint64_t buffer_bytes;
    uint64_t tag;       /* names it in the peer's acks: its index and how often that was used */
    uint64_t session;   /* of the link that it came from, if it is the peer's */
    uint64_t sent_ns;
    uint16_t place;     /* in volume->flight */
    uint8_t parity;     /* which barrier covers it */
    bool holds, local_done, peer_done, on_wire;
    bool abandoned; /* never to be answered well */
    bool elsewhere; /* a read that is on its way to the peer and back */
    int here;       /* the first error of this node's disk, while the peer may cover for it */
    bool placed; /* stands in the flight: from its first step to its end */
    int error;
    uint8_t meta[16], reply[MP_NBD_REPLY];
    uint8_t reply_bytes; /* a later piece has none */
    uint32_t reply_error;
};

typedef struct mp_list {
    mp_request *first, **last;
} mp_list;

static inline void mp_list_init(mp_list *list) { list->first = NULL; list->last = &list->first; }
static inline void mp_list_put(mp_list *list, mp_request *r) { r->next = NULL; *list->last = r; list->last = &r->next; }
static inline mp_request *mp_list_take(mp_list *list)
{
    mp_request *r = list->first;
    if (r && !(list->first = r->next))
        list->last = &list->first;
    return r;
}

struct mp_volume {
    mp_engine *engine;
    uint32_t index;
    int fd;
    uint64_t size;
    uint32_t block;
    mp_journal journal;
    mp_flight flight;  /* writes, and blocks under resync */
    mp_flight reading; /* reads in the pool: a write that came later must not be seen by them (W2) */
    mp_list waiting; /* in the order they came */
    bool look_again; /* something ended: a waiting request may be able to start */
    mp_job *journal_job; /* the one that runs */
    bool unsynced;   /* written since the last fdatasync of a barrier */
    uint32_t clients;
    uint64_t read_bytes, written_bytes;
    int sync_error;  /* an fdatasync failed: what was lost is told once, so no later one is believed */
    mp_mend *mend;
};

typedef enum mp_grant_mode { MP_GRANT_NONE, MP_GRANT_PEER, MP_GRANT_ALONE_FIRST, MP_GRANT_ALONE } mp_grant_mode;

enum mp_cover { MP_COVER_READS = 1u, MP_COVER_HOLD = 2u }; /* see cover.c */
typedef enum mp_cover_verdict { MP_COVER_DONE, MP_COVER_WAIT, MP_COVER_HERE } mp_cover_verdict;

typedef struct mp_grant {
    uint64_t epoch, serve_until_ns; /* CLOCK_BOOTTIME */
    mp_grant_mode mode;
    unsigned cover;
} mp_grant;

typedef enum mp_event_kind {
    MP_EVENT_LINK_LOST, MP_EVENT_NEED_GENERATION, MP_EVENT_CLIENTS_CLOSED, MP_EVENT_CLIENT, MP_EVENT_DISK_ERROR,
    MP_EVENT_JOURNAL_ERROR, MP_EVENT_CLIENTS_QUIET, MP_EVENT_BITS_MERGED, MP_EVENT_RESYNC_DONE, MP_EVENT_FLUSHED, MP_EVENT_SAVED,
} mp_event_kind;

typedef struct mp_event {
    struct mp_event *next;
    mp_event_kind kind;
    uint64_t a;
    int64_t b;
    char text[256];
} mp_event;

typedef enum mp_command_kind {
    MP_COMMAND_GRANT, MP_COMMAND_CLIENT, MP_COMMAND_CLOSE_CLIENTS, MP_COMMAND_PAUSE_CLIENTS, MP_COMMAND_ATTACH, MP_COMMAND_DETACH,
    MP_COMMAND_BARRIER, MP_COMMAND_SAVE, MP_COMMAND_ALL_DIRTY, MP_COMMAND_FORGIVE, MP_COMMAND_STOP,
} mp_command_kind;

typedef enum mp_plan { MP_PLAN_NONE, MP_PLAN_BITMAP, MP_PLAN_FULL } mp_plan;

typedef struct mp_command {
    struct mp_command *next;
    mp_command_kind kind;
    mp_grant grant;
    int fd;
    uint32_t volume;
    bool flag;      /* CLIENT: read only; CLOSE_CLIENTS: gracefully; PAUSE_CLIENTS: pause, not resume; ATTACH: the source end */
    uint64_t token; /* BARRIER, SAVE, PAUSE_CLIENTS */
    uint64_t timeout_ns;
    uint8_t plan[MP_VOLUMES_MAX];
    mp_chan chan;   /* ATTACH: taken over with its sequence numbers and buffer */
    uint32_t extra_length; /* CLIENT: bytes that came after its negotiation */
    uint8_t extra[];
} mp_command;

typedef struct mp_volume_status {
    uint64_t active_extents, clients, in_flight, read_bytes, written_bytes;
    bool resync_active;
    uint64_t resync_total, resync_done, resync_skipped, resync_sent;
} mp_volume_status;

typedef struct mp_link_status {
    bool up;
    uint64_t session, bytes_in, bytes_out, unacked, oldest_unacked_ns, ack_ns; /* ack_ns: smoothed time from send to ack */
} mp_link_status;

#define MP_ACKS 500u /* tags in one ACK frame */
#define MP_ACK_FRAMES 8u

typedef struct mp_ack_frame {
    mp_outgoing out;
    bool busy;
    uint8_t tags[MP_ACKS * 8];
} mp_ack_frame;

typedef struct mp_small_frame { /* a frame without data, sent now and then */
    mp_outgoing out;
    bool busy;
    uint8_t meta[64];
} mp_small_frame;

#define MP_BITS_BYTES 131072u /* of the bitmap in one BITS frame */
#define MP_SMALL_FRAMES 256u /* a SETTLED for every unit of several volumes */

typedef struct mp_link {
    bool up, source, paused;
    mp_chan chan;
    uint64_t epoch, timeout_ns, last_in_ns, last_out_ns, seen_in, seen_out, ack_ns;
    mp_request *receiving; /* target: the write whose payload is coming */
    void *taking;          /* mend or bits: where the payload in hand goes */
    uint64_t taking_bytes;
    uint64_t acks[MP_ACKS * MP_ACK_FRAMES];
    uint32_t ack_count;
    mp_ack_frame ack_frame[MP_ACK_FRAMES];
    mp_small_frame small[MP_SMALL_FRAMES];
    uint64_t writes_since_barrier; /* both ends count (W6) */
    /* target: applied writes still in the pool, by the parity of the barrier that covers them; the barrier that waits */
    uint32_t applying[2];
    uint8_t parity;
    bool barrier_waits, barrier_running;
    uint64_t barrier_tag;
    mp_job barrier_job;
    int barrier_error[MP_VOLUMES_MAX]; /* as mp_barrier.volume_error */
    bool more; /* it was left in the middle of what had come */
    uint8_t bits[MP_BITS_BYTES], brief[64]; /* where BITS, SETTLED and MERGED go: a source must never wait for a buffer,
                                             * or the acks behind it, which give buffers back, would wait with it */
    char error_text[512];
    mp_outgoing error_out;
} mp_link;

typedef struct mp_barrier { /* source end, or alone: one at a time */
    bool running, connected, syncing, peer_pending, local_pending, void_;
    bool sync[MP_VOLUMES_MAX]; /* which volumes the job flushes */
    int volume_error[MP_VOLUMES_MAX]; /* of each: known before it began (then it is not tried again), or found by the job */
    uint8_t parity;
    uint32_t local[2]; /* writes submitted and not done locally, by parity */
    uint64_t tag, began_ns, ended_ns, bytes_since;
    mp_list flushing, next; /* FLUSH requests that this one answers, and those that came later */
    uint64_t tokens[64];
    uint32_t token_count, tokens_taken; /* the first `tokens_taken` belong to the running one */
    mp_job job;
} mp_barrier;

struct mp_engine {
    pthread_t thread;
    bool started, pools, mend_pools;
    void *mend_workers;
    mp_loop loop;
    mp_pool pool, mend_pool;
    mp_slab slab;
    mp_volume *volume;
    uint32_t volumes;
    mp_pace pace;
    uint32_t open_units; /* of the resync, at its source, of all volumes */
    mp_grant grant;
    bool asked_generation, granted; /* granted: it held when last looked at, and nothing was put off since because it did not */
    mp_link link;
    mp_barrier barrier;
    mp_client *clients, *touched; /* all; those that the round has to look at */
    uint32_t client_count;
    bool closing_clients, clients_paused;
    bool tell_quiet;      /* paused, and that no change is in hand was not told yet */
    uint64_t quiet_token;
    uint32_t changes;     /* requests of clients that are not reads: submitted and not answered */
    mp_request **request; /* by index */
    uint32_t requests, requests_busy;
    mp_list free_requests;
    uint64_t serial; /* of the last request that was submitted */
    mp_list local;        /* submitted, to be done locally at the end of the round */
    mp_list doubted;      /* done, but for this node's disk: cover.c */
    uint32_t reads_elsewhere; /* on their way to the peer and back */
    bool disk_slow;
    mp_request *held_first, *held_last; /* every write that holds a range, oldest first */
    uint64_t before[MP_REQUESTS_MAX], before_end[MP_REQUESTS_MAX]; /* scratch: ranges that still wait, in order */
    bool starved;         /* somebody did not get a request or a buffer: look again when one comes back */
    bool saving, save_running;
    uint64_t save_ticket[MP_VOLUMES_MAX];
    mp_command *attach;   /* waits until the last session's writes are done */
    uint64_t save_token;
    mp_job save_job;
    int save_error[MP_VOLUMES_MAX]; /* as mp_barrier.volume_error */
    /* shared with Python's thread */
    pthread_mutex_t lock;
    int mail_fd, event_fd;
    mp_command *mail, **mail_last;
    mp_event *events, **events_last;
    uint32_t errors_waiting[MP_VOLUMES_MAX], errors_dropped; /* disk errors since the events were all taken; not told, since those wait */
    mp_volume_status *published;
    mp_link_status link_published;
};

typedef struct mp_engine_volume { /* what mp_engine_open is given */
    int fd, meta_fd;
    uint64_t size;
    uint32_t block;
} mp_engine_volume;

/* --- engine.c: for Python (any thread) --- */
mp_engine *mp_engine_open(const mp_engine_volume *volumes, uint32_t count, mp_fault *fault); /* opens the journals */
void mp_engine_set_rate(mp_engine *engine, uint64_t rate); /* of the resync, bytes a second, 0: as clients allow; before the start */
int mp_engine_start(mp_engine *engine); /* 0 or errno */
void mp_engine_close(mp_engine *engine); /* stops the thread if it runs, frees all */
mp_command *mp_command_new(mp_command_kind kind, uint32_t extra);
void mp_engine_post(mp_engine *engine, mp_command *command); /* takes it over */
mp_event *mp_engine_take(mp_engine *engine); /* the oldest event, to be freed by the caller, or NULL */
void mp_engine_status(mp_engine *engine, uint32_t volume, mp_volume_status *status, mp_link_status *link);

uint64_t mp_engine_dirty(const mp_engine *engine, uint32_t volume); /* blocks that may differ, counted now; any thread */
uint64_t mp_engine_busy_ns(const mp_engine *engine); /* how long the loop has been in one round; 0: it sleeps; any thread */
uint64_t mp_engine_stuck_ns(const mp_engine *engine); /* the age of the oldest disk operation, the loop's own included; any thread */
void mp_engine_hang_up(mp_engine *engine); /* ends the clients' connections although the loop hangs; any thread */

/* --- engine.c: for the other rooms (loop thread) --- */
void mp_event_post(mp_engine *engine, mp_event_kind kind, uint64_t a, int64_t b, const char *format, ...) __attribute__((format(printf, 5, 6)));
bool mp_grant_holds(const mp_engine *engine, uint64_t boot_ns);
uint64_t mp_boot_ns(void);
void mp_volume_look_again(mp_volume *volume);
void mp_engine_hurry(mp_engine *engine); /* something begins: the tick of an idle engine is too slow for it */

/* --- request.c --- */
mp_request *mp_request_new(mp_engine *engine); /* NULL: none free; `starved` is set */
void mp_request_free(mp_request *request);
bool mp_request_buffer(mp_request *request, uint64_t length); /* false: not now; `starved` is set. A read's: one piece at most */
void mp_request_drop_buffer(mp_request *request);
void mp_request_submit(mp_request *request);  /* read, parsed and judged: from here on it ends in an answer */
void mp_request_round(mp_engine *engine);     /* starts what can be started */
void mp_request_do_local(mp_engine *engine);  /* the batch's local part */
void mp_request_finished(mp_request *request);/* its pool job is done */
void mp_request_acked(mp_engine *engine, uint64_t tag);
void mp_request_settle(mp_request *request);  /* looks whether all that the answer needs is there */
void mp_request_resend(mp_engine *engine);    /* A17: the held ones go out again on a new link */
void mp_request_link_lost(mp_engine *engine);
void mp_request_alone(mp_engine *engine);     /* the grant now lets the held ones end without the peer */
void mp_request_abandon(mp_engine *engine);   /* the role is gone: what is held or waits is never answered well, never sent again */
void mp_request_forget(mp_client *client, mp_volume *volume); /* its client is gone: what has not begun never will */
void mp_request_run(mp_job *job, void *worker);
void mp_request_end(mp_request *request);     /* leaves its range and is answered */
void mp_request_wait(mp_request *request);    /* waits in its place in the order */

/* --- serve.c --- */
void mp_client_add(mp_engine *engine, int fd, uint32_t volume, bool read_only, const uint8_t *extra, uint32_t length);
void mp_client_answer(mp_request *request); /* it is done: error or data; takes it over */
bool mp_client_gone(const mp_request *request); /* nobody is there to be answered */
void mp_client_lost(mp_request *request);   /* it never began and its client is gone; takes it over */
void mp_clients_close(mp_engine *engine, bool graceful);
void mp_clients_pause(mp_engine *engine, bool pause, uint64_t token); /* paused: nothing is read from them, what was read goes on */
void mp_engine_free_clients(mp_engine *engine); /* the loop has ended */
void mp_clients_round(mp_engine *engine);   /* sends answers, goes on reading where it had to stop */
void mp_clients_send(mp_engine *engine);    /* what is to be answered, as far as it can be sent now */

/* --- longread.c --- */
bool mp_long_reads_first(const mp_request *write); /* its own client's long read in front of it has not come so far */

/* --- link.c --- */
void mp_link_attach(mp_engine *engine, mp_command *command);
void mp_link_detach(mp_engine *engine, bool report, int code, const char *format, ...) __attribute__((format(printf, 4, 5)));
void mp_link_send_write(mp_request *request);
void mp_link_send_read(mp_request *request);
bool mp_link_small(mp_engine *engine, uint16_t type, uint16_t flags, uint32_t count, uint64_t offset, const void *meta, uint32_t length);
void mp_link_applied(mp_request *request);
void mp_link_barrier_synced(mp_engine *engine);
bool mp_link_draining(const mp_engine *engine); /* writes of an ended session still run */
void mp_link_fail(mp_engine *engine, const char *why); /* tells the peer, then ends the session */
void mp_link_fail_disk(mp_engine *engine, const char *what); /* the same: it was this node's disk */
void mp_link_round(mp_engine *engine); /* acks and what is queued */
void mp_link_tick(mp_engine *engine, uint64_t now_ns);

/* --- barrier.c --- */
void mp_barrier_flush(mp_request *request); /* a client's FLUSH */
void mp_barrier_token(mp_engine *engine, uint64_t token);
void mp_barrier_local_done(mp_engine *engine, uint8_t parity);
void mp_barrier_round(mp_engine *engine);
void mp_barrier_tick(mp_engine *engine, uint64_t now_ns);
void mp_barrier_acked(mp_engine *engine, uint64_t tag);
void mp_barrier_link_lost(mp_engine *engine);
void mp_barrier_job_finished(mp_engine *engine);

/* --- cover.c --- */
bool mp_cover_holds(const mp_engine *engine); /* an error of this disk is nobody's answer yet */
bool mp_cover_slow(const mp_engine *engine);  /* the disk hangs, and the peer can be asked instead */
mp_cover_verdict mp_cover_read(mp_request *read); /* DONE: taken over; HERE: to be read here */
void mp_cover_doubt(mp_request *request);     /* `here` says what this disk failed with; all else is done; takes it over */
void mp_cover_changed(mp_engine *engine);     /* the grant */
void mp_cover_forgive(mp_engine *engine);     /* A14: the peer has the role */
void mp_cover_abandon(mp_engine *engine);     /* nobody waits for it any more */
void mp_cover_tick(mp_engine *engine, uint64_t now_ns);
void mp_cover_link_lost(mp_engine *engine);
void *mp_cover_ask_buffer(mp_engine *engine, const mp_frame *frame, mp_volume *volume); /* NULL: not now */
bool mp_cover_asked(mp_engine *engine);       /* false: garbage */
void mp_cover_served(mp_request *read);       /* by this disk, for the peer */
void *mp_cover_answer_buffer(mp_engine *engine, const mp_frame *frame); /* NULL: garbage */
bool mp_cover_answered(mp_engine *engine, const mp_frame *frame);       /* false: garbage */

/* --- mend.c --- */
mp_mend *mp_mend_new(mp_volume *volume);
void mp_mend_free(mp_mend *mend);
void mp_mend_drop_all(mp_mend *mend); /* the threads have ended: buffers only */
void mp_mend_attach(mp_volume *volume, mp_plan plan);
void mp_mend_link_lost(mp_volume *volume);
void mp_mend_round(mp_volume *volume);
/* Takes the frame and, if it is of the slab, its payload over; false: garbage. */
bool mp_mend_frame(mp_volume *volume, const mp_frame *frame, void *payload, bool of_slab);
void mp_mend_job_finished(mp_job *job);
bool mp_mend_busy(const mp_volume *volume); /* jobs run: no other session may begin */
void mp_mend_barrier_began(mp_volume *volume);
void mp_mend_durable(mp_volume *volume); /* that barrier ended well, with the peer */
void mp_mend_spoil(mp_volume *volume); /* a local write failed: what is settled proves nothing any more */
bool mp_mend_wants_barrier(const mp_volume *volume);
void *mp_mend_want_buffer(mp_volume *volume, const mp_frame *frame); /* where the target's WANT goes; NULL: garbage */
bool mp_mend_stuck(const mp_volume *volume, uint64_t since_ns); /* a unit was sent before that and is not settled */
void mp_mend_pace(const mp_volume *volume, bool *resyncing, bool *losing); /* R9: sets what is so at this volume's source */
void mp_mend_status(const mp_volume *volume, mp_volume_status *status);

#endif
