/* barrier.c - durable on both hosts: a client's FLUSH, and the barriers that the engine makes of its own.
 *
 * Rules: W5 (a FLUSH is answered when both are durable), M5 (one at least every second or 64 MiB while something is not
 * confirmed, and whenever the activity log or a resync waits for one), W6 in this form: the receiver answers a barrier when
 * everything in front of it is done and flushed, and checks how many writes that were. It does not hold back what comes
 * behind: in `sync` a client that depends on the order waits for its FLUSH, hence for both, before it goes on.
 *
 * One at a time. It covers every write submitted before it began: these are told by their parity, and fdatasync begins when
 * the last of them is done locally. Lost link: the local half counts for nothing (the barrier is void) and the FLUSHes wait
 * for the next one, which runs with a peer again or when the grant says "alone".
 */
#include "engine.h"

#include "disk.h"

#define SECOND ((uint64_t)1000000000)
#define BYTES_MAX ((uint64_t)64 << 20)

/* In a pool thread; the loop leaves `sync` and `volume_error` alone while it runs. */
static void run(mp_job *job, void *worker)
{
    mp_engine *engine = (mp_engine *)((char *)job - offsetof(mp_engine, barrier.job));
    (void)worker;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (engine->barrier.sync[i])
            engine->barrier.volume_error[i] = mp_disk_sync(engine->volume[i].fd);
}

void mp_barrier_flush(mp_request *r) { mp_list_put(&r->engine->barrier.next, r); }

void mp_barrier_token(mp_engine *engine, uint64_t token)
{
    mp_barrier *b = &engine->barrier;
    if (b->token_count == sizeof b->tokens / sizeof *b->tokens)
        mp_event_post(engine, MP_EVENT_FLUSHED, token, 11 /* EAGAIN */, "too many barriers were asked for at once");
    else
        b->tokens[b->token_count++] = token;
}

static void start_sync(mp_engine *engine)
{
    mp_barrier *b = &engine->barrier;
    if (!b->running || b->syncing || !b->local_pending || b->local[!b->parity])
        return;
    for (uint32_t i = 0; i < engine->volumes; i++) {
        b->volume_error[i] = engine->volume[i].sync_error;
        b->sync[i] = engine->volume[i].unsynced && !b->volume_error[i];
        engine->volume[i].unsynced = false;
    }
    b->syncing = true;
    b->job = (mp_job){.run = run};
    mp_pool_submit(&engine->pool, &b->job);
}

void mp_barrier_local_done(mp_engine *engine, uint8_t parity)
{
    MP_ASSERT(engine->barrier.local[parity] > 0);
    engine->barrier.local[parity]--;
    start_sync(engine);
}

/* Whether a FLUSH may be answered by a barrier that begins now: with the peer, or alone with its generation (G3). */
static bool flush_allowed(const mp_engine *engine)
{
    bool connected = engine->link.up && engine->link.source, alone = !engine->link.up && engine->grant.mode == MP_GRANT_ALONE;
    return (connected || alone) && mp_grant_holds(engine, mp_boot_ns());
}

static void begin(mp_engine *engine)
{
    mp_barrier *b = &engine->barrier;
    bool flushes = b->next.first && flush_allowed(engine);
    b->running = true;
    b->void_ = false;
    b->parity = !b->parity;
    b->tag++;
    b->began_ns = mp_now_ns();
    b->bytes_since = 0;
    b->local_pending = true;
    b->tokens_taken = b->token_count;
    mp_list_init(&b->flushing);
    if (flushes) {
        b->flushing = b->next;
        mp_list_init(&b->next);
    }
    b->connected = engine->link.up && engine->link.source;
    b->peer_pending = b->connected;
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_journal_barrier_begin(&engine->volume[i].journal);
        mp_mend_barrier_began(&engine->volume[i]);
    }
    if (b->connected) {
        uint8_t meta[8];
        mp_store64(meta, engine->link.writes_since_barrier);
        engine->link.writes_since_barrier = 0;
        (void)mp_link_small(engine, MP_FRAME_BARRIER, 0, (uint32_t)b->tag, 0, meta, sizeof meta); /* false: mp_barrier_link_lost was told */
    }
    start_sync(engine);
}

/* Each by its own volume's fdatasync: another volume's disk that fails is not this client's. With a void barrier they wait
 * for the next one, in front of those that wait for it already. */
static void answer_flushes(mp_engine *engine)
{
    mp_barrier *b = &engine->barrier;
    mp_list later = b->next;
    mp_list_init(&b->next);
    for (mp_request *r; (r = mp_list_take(&b->flushing));) {
        int error = r->volume->sync_error;
        bool covered = error && mp_cover_holds(engine);
        if (b->void_ && (!error || covered) && !mp_client_gone(r)) {
            mp_list_put(&b->next, r);
        } else if (b->void_ && (!error || covered)) {
            mp_client_lost(r);
        } else if (covered && b->connected) {
            r->here = error;
            mp_cover_doubt(r);
        } else {
            r->reply_error = mp_nbd_error_of(error);
            mp_client_answer(r);
        }
    }
    mp_list_init(&b->flushing);
    if (later.first) {
        *b->next.last = later.first;
        b->next.last = later.last;
    }
}

static void end(mp_engine *engine)
{
    mp_barrier *b = &engine->barrier;
    int any_error = 0;
    b->running = b->syncing = false;
    b->ended_ns = mp_now_ns();
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_volume *volume = &engine->volume[i];
        if (b->volume_error[i] && !volume->sync_error) {
            volume->sync_error = b->volume_error[i];
            mp_event_post(engine, MP_EVENT_DISK_ERROR, i, volume->sync_error, "flush: %s", strerror(volume->sync_error));
        }
        bool good = !volume->sync_error && !b->void_; /* it may have come while the job ran: a FUA write that failed */
        any_error = any_error ? any_error : volume->sync_error;
        mp_journal_barrier_end(&volume->journal, good);
        if (good && b->connected)
            mp_mend_durable(volume);
        mp_volume_look_again(volume);
    }
    answer_flushes(engine);
    for (uint32_t i = 0; i < b->tokens_taken; i++)
        mp_event_post(engine, MP_EVENT_FLUSHED, b->tokens[i], any_error, "%s", b->void_ ? "here only: the link was lost meanwhile" : "");
    b->token_count -= b->tokens_taken;
    memmove(b->tokens, b->tokens + b->tokens_taken, b->token_count * sizeof *b->tokens);
    b->tokens_taken = 0;
}

static void maybe_end(mp_engine *engine)
{
    if (engine->barrier.running && !engine->barrier.local_pending && !engine->barrier.peer_pending)
        end(engine);
}

void mp_barrier_job_finished(mp_engine *engine)
{
    engine->barrier.local_pending = engine->barrier.syncing = false;
    maybe_end(engine);
}

void mp_barrier_acked(mp_engine *engine, uint64_t tag)
{
    mp_barrier *b = &engine->barrier;
    if (!b->running || !b->peer_pending || (uint32_t)b->tag != tag) {
        mp_link_detach(engine, true, 1, "the peer confirmed a barrier that is not on its way");
        return;
    }
    b->peer_pending = false;
    maybe_end(engine);
}

void mp_barrier_link_lost(mp_engine *engine)
{
    mp_barrier *b = &engine->barrier;
    if (!b->running || !b->connected)
        return;
    b->void_ = true; /* also when the peer had answered: nobody knows any more what it keeps */
    b->peer_pending = false;
    maybe_end(engine);
}

/* A reason to run one although no client asked. */
static bool wanted(const mp_engine *engine)
{
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (mp_journal_wants_barrier(&engine->volume[i].journal) || mp_mend_wants_barrier(&engine->volume[i]))
            return true;
    return engine->barrier.bytes_since >= BYTES_MAX;
}

void mp_barrier_round(mp_engine *engine)
{
    mp_barrier *b = &engine->barrier;
    if (b->running || mp_link_draining(engine)) /* W8: what an ended session brought is done first */
        return;
    bool connected = engine->link.up && engine->link.source, alone = !engine->link.up && engine->grant.mode == MP_GRANT_ALONE;
    if (b->next.first && !connected && engine->grant.mode == MP_GRANT_ALONE_FIRST && !engine->link.up && !engine->asked_generation) {
        engine->asked_generation = true; /* a FLUSH says "on both": alone it needs the generation like a write (G3) */
        mp_event_post(engine, MP_EVENT_NEED_GENERATION, 0, 0, "a flush is the first one without the peer");
    }
    if ((b->next.first && flush_allowed(engine)) || b->token_count || ((connected || alone) && wanted(engine)))
        begin(engine);
}

void mp_barrier_tick(mp_engine *engine, uint64_t now_ns)
{
    mp_barrier *b = &engine->barrier;
    if (b->running || !engine->link.up || !engine->link.source || now_ns - b->ended_ns < SECOND)
        return;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (mp_journal_has_unflushed(&engine->volume[i].journal)) {
            begin(engine);
            return;
        }
}
