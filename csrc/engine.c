/* engine.c - see engine.h: the thread, what Python tells it, what it tells Python, and the round.
 *
 * A round follows each batch of events: requests that can start are started (which queues their frames), the link is sent,
 * then the local writes are done, then what came of it goes out (acks, answers). Sending first lets the peer work while the
 * local write runs; doing both once per batch makes one system call of many frames and many answers.
 */
#define _GNU_SOURCE
#include "client.h"
#include "disk.h"
#include "mend.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TICK ((uint64_t)100 * 1000000)
#define IDLE_TICK ((uint64_t)1000 * 1000000) /* nothing is in hand: time-outs of the link only */
#define IO_THREADS 4u
#define MEND_THREADS 2u

uint64_t mp_boot_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- events and commands --- */

static void publish(mp_engine *engine)
{
    mp_link *link = &engine->link;
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_volume *volume = &engine->volume[i];
        engine->published[i] = (mp_volume_status){.active_extents = mp_journal_active(&volume->journal), .clients = volume->clients, .in_flight = volume->flight.count,
                                                  .read_bytes = volume->read_bytes, .written_bytes = volume->written_bytes};
        mp_mend_status(volume, &engine->published[i]);
    }
    mp_link_status status = {.up = link->up, .session = link->chan.session, .bytes_in = link->chan.bytes_in, .bytes_out = link->chan.bytes_out, .ack_ns = link->ack_ns};
    uint64_t oldest = 0;
    for (const mp_request *r = engine->held_first; r && link->source; r = r->next_held)
        if (!r->peer_done) {
            status.unacked++;
            oldest = oldest ? mp_min(oldest, r->sent_ns) : r->sent_ns;
        }
    status.oldest_unacked_ns = oldest ? mp_now_ns() - oldest : 0;
    engine->link_published = status;
}

void mp_event_post(mp_engine *engine, mp_event_kind kind, uint64_t a, int64_t b, const char *format, ...)
{
    mp_event *event = calloc(1, sizeof *event);
    MP_ASSERT(event); /* a lost event would leave the control plane waiting for ever */
    event->kind = kind;
    event->a = a;
    event->b = b;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(event->text, sizeof event->text, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&engine->lock);
    publish(engine); /* whoever hears of it finds numbers that agree with it */
    bool told = kind != MP_EVENT_DISK_ERROR || engine->errors_waiting[a]++ < MP_ERRORS_KEPT;
    if (told) {
        *engine->events_last = event;
        engine->events_last = &event->next;
    } else {
        engine->errors_dropped++;
    }
    pthread_mutex_unlock(&engine->lock);
    if (!told) {
        free(event);
        return;
    }
    uint64_t one = 1;
    MP_ASSERT(write(engine->event_fd, &one, sizeof one) == sizeof one);
}

mp_event *mp_engine_take(mp_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    mp_event *event = engine->events;
    if (event && !(engine->events = event->next))
        engine->events_last = &engine->events;
    if (event && event->kind == MP_EVENT_DISK_ERROR && engine->errors_dropped) {
        size_t used = strlen(event->text);
        snprintf(event->text + used, sizeof event->text - used, " (and %u more)", engine->errors_dropped);
        engine->errors_dropped = 0;
    }
    if (!event) {
        memset(engine->errors_waiting, 0, sizeof engine->errors_waiting);
        uint64_t count;
        (void)!read(engine->event_fd, &count, sizeof count); /* drained under the lock: no wake-up is lost */
    }
    pthread_mutex_unlock(&engine->lock);
    return event;
}

mp_command *mp_command_new(mp_command_kind kind, uint32_t extra)
{
    mp_command *command = calloc(1, sizeof *command + extra);
    if (command) {
        command->kind = kind;
        command->fd = -1;
        command->extra_length = extra;
    }
    return command;
}

static void free_command(mp_command *command)
{
    if (command->fd >= 0)
        close(command->fd);
    if (command->kind == MP_COMMAND_ATTACH)
        mp_chan_close(&command->chan);
    free(command);
}

void mp_engine_post(mp_engine *engine, mp_command *command)
{
    pthread_mutex_lock(&engine->lock);
    command->next = NULL;
    *engine->mail_last = command;
    engine->mail_last = &command->next;
    pthread_mutex_unlock(&engine->lock);
    uint64_t one = 1;
    MP_ASSERT(write(engine->mail_fd, &one, sizeof one) == sizeof one);
}

void mp_engine_status(mp_engine *engine, uint32_t volume, mp_volume_status *status, mp_link_status *link)
{
    pthread_mutex_lock(&engine->lock);
    *status = engine->published[volume];
    *link = engine->link_published;
    pthread_mutex_unlock(&engine->lock);
}

uint64_t mp_engine_dirty(const mp_engine *engine, uint32_t volume) { return mp_bitmap_count(&engine->volume[volume].journal.dirty); }

uint64_t mp_engine_stuck_ns(const mp_engine *engine)
{
    uint64_t now = mp_now_ns();
    return mp_max(mp_engine_busy_ns(engine), engine->pools ? mp_pool_oldest_ns(&engine->pool, now) : 0);
}

void mp_engine_hang_up(mp_engine *engine)
{
    pthread_mutex_lock(&engine->lock); /* the list changes with it held */
    for (const mp_client *c = engine->clients; c; c = c->next)
        shutdown(c->fd, SHUT_RDWR);
    pthread_mutex_unlock(&engine->lock);
}

uint64_t mp_engine_busy_ns(const mp_engine *engine)
{
    uint64_t since = atomic_load_explicit(&engine->loop.busy_since_ns, memory_order_relaxed), now = mp_now_ns();
    return since && now > since ? now - since : 0;
}

/* --- the grant --- */

void mp_volume_look_again(mp_volume *volume) { volume->look_again = true; }

static void all_look_again(mp_engine *engine)
{
    for (uint32_t i = 0; i < engine->volumes; i++)
        mp_volume_look_again(&engine->volume[i]);
}

bool mp_grant_holds(const mp_engine *engine, uint64_t boot_ns)
{
    return engine->grant.mode != MP_GRANT_NONE && boot_ns < engine->grant.serve_until_ns && !mp_link_draining(engine);
}

static void set_grant(mp_engine *engine, const mp_grant *grant)
{
    bool same = grant->mode == engine->grant.mode && grant->cover == engine->grant.cover && engine->granted;
    if (grant->mode != engine->grant.mode)
        engine->asked_generation = false;
    engine->grant = *grant;
    if (!engine->link.up && grant->mode == MP_GRANT_NONE)
        mp_request_abandon(engine);
    if (!engine->link.up && grant->mode == MP_GRANT_ALONE)
        mp_request_alone(engine);
    if (!engine->link.up && grant->mode == MP_GRANT_ALONE_FIRST && !engine->asked_generation) {
        const mp_request *held = engine->held_first;
        while (held && held->peer_done)
            held = held->next_held;
        if (held) {
            engine->asked_generation = true;
            mp_event_post(engine, MP_EVENT_NEED_GENERATION, 0, 0, "writes are held that the peer has not confirmed");
        }
    }
    mp_cover_changed(engine);
    if (!same) /* a mere renewal lets nobody start who could not before */
        all_look_again(engine);
    engine->granted = mp_grant_holds(engine, mp_boot_ns());
}

/* --- a clean stop --- */

static void run_save(mp_job *job, void *worker)
{
    mp_engine *engine = (mp_engine *)((char *)job - offsetof(mp_engine, save_job));
    (void)worker;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (!engine->save_error[i])
            engine->save_error[i] = mp_disk_sync(engine->volume[i].fd);
}

static int save_error(const mp_engine *engine)
{
    int error = 0;
    for (uint32_t i = 0; i < engine->volumes && !error; i++)
        error = engine->save_error[i];
    return error;
}

static void save_round(mp_engine *engine)
{
    if (!engine->saving)
        return;
    if (!engine->save_running) {
        for (uint32_t i = 0; i < engine->volumes; i++)
            if (engine->volume[i].flight.count || engine->volume[i].waiting.first || engine->barrier.running)
                return; /* somebody still writes */
        engine->save_running = true;
        for (uint32_t i = 0; i < engine->volumes; i++)
            engine->save_error[i] = engine->volume[i].sync_error;
        engine->save_job = (mp_job){.run = run_save};
        mp_pool_submit(&engine->pool, &engine->save_job);
        return;
    }
    if (engine->save_job.run) /* still running */
        return;
    int error = save_error(engine);
    for (uint32_t i = 0; i < engine->volumes && !error; i++) {
        mp_journal *journal = &engine->volume[i].journal;
        error = journal->error;
        if (!error && !mp_journal_reached(journal, engine->save_ticket[i]))
            return;
    }
    engine->saving = engine->save_running = false;
    mp_event_post(engine, MP_EVENT_SAVED, engine->save_token, error, "%s", error ? strerror(error) : "");
}

static void save_synced(mp_engine *engine)
{
    engine->save_job.run = NULL;
    for (uint32_t i = 0; i < engine->volumes && !save_error(engine); i++)
        engine->save_ticket[i] = mp_journal_empty(&engine->volume[i].journal);
}

/* --- the thread --- */

static void obey(mp_engine *engine, mp_command *command)
{
    mp_engine_hurry(engine);
    switch (command->kind) {
    case MP_COMMAND_GRANT:
        set_grant(engine, &command->grant);
        break;
    case MP_COMMAND_CLIENT:
        mp_client_add(engine, command->fd, command->volume, command->flag, command->extra, command->extra_length);
        command->fd = -1;
        break;
    case MP_COMMAND_CLOSE_CLIENTS:
        mp_clients_close(engine, command->flag);
        break;
    case MP_COMMAND_PAUSE_CLIENTS:
        mp_clients_pause(engine, command->flag, command->token);
        break;
    case MP_COMMAND_ATTACH:
        mp_link_detach(engine, false, 0, "%s", "replaced");
        if (engine->attach)
            free_command(engine->attach);
        engine->attach = command; /* see on_round */
        return;
    case MP_COMMAND_DETACH:
        if (engine->attach)
            free_command(engine->attach);
        engine->attach = NULL;
        mp_link_detach(engine, false, 0, "%s", "asked for");
        break;
    case MP_COMMAND_BARRIER:
        mp_barrier_token(engine, command->token);
        break;
    case MP_COMMAND_SAVE:
        if (engine->saving) {
            mp_event_post(engine, MP_EVENT_SAVED, command->token, EBUSY, "%s", "it is being saved already");
            break;
        }
        engine->saving = true;
        engine->save_token = command->token;
        break;
    case MP_COMMAND_ALL_DIRTY:
        mp_journal_doubt(&engine->volume[command->volume].journal, 0, engine->volume[command->volume].size);
        (void)mp_journal_flush(&engine->volume[command->volume].journal);
        break;
    case MP_COMMAND_FORGIVE:
        mp_cover_forgive(engine);
        break;
    case MP_COMMAND_STOP:
        mp_loop_stop(&engine->loop);
        break;
    }
    free_command(command);
}

static void on_mail(void *argument, unsigned events)
{
    mp_engine *engine = argument;
    (void)events;
    uint64_t count;
    (void)!read(engine->mail_fd, &count, sizeof count);
    for (;;) {
        pthread_mutex_lock(&engine->lock);
        mp_command *command = engine->mail;
        if (command && !(engine->mail = command->next))
            engine->mail_last = &engine->mail;
        pthread_mutex_unlock(&engine->lock);
        if (!command)
            return;
        obey(engine, command);
    }
}

static bool journal_job(mp_engine *engine, mp_job *job)
{
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_volume *volume = &engine->volume[i];
        if (volume->journal_job != job)
            continue;
        volume->journal_job = NULL;
        int error = mp_journal_finished(&volume->journal, job);
        if (error)
            mp_event_post(engine, MP_EVENT_JOURNAL_ERROR, i, error, "metadata: %s", strerror(error));
        mp_volume_look_again(volume);
        return true;
    }
    return false;
}

static void on_pool(void *argument, unsigned events)
{
    mp_engine *engine = argument;
    (void)events;
    for (mp_job *job; (job = mp_pool_take(&engine->pool));) {
        if (job == &engine->barrier.job)
            mp_barrier_job_finished(engine);
        else if (job == &engine->link.barrier_job)
            mp_link_barrier_synced(engine);
        else if (job == &engine->save_job)
            save_synced(engine);
        else if (!journal_job(engine, job))
            mp_request_finished((mp_request *)job);
    }
}

static void on_mend_pool(void *argument, unsigned events)
{
    mp_engine *engine = argument;
    (void)events;
    for (mp_job *job; (job = mp_pool_take(&engine->mend_pool));)
        mp_mend_job_finished(job);
}

static bool anything_to_start(const mp_engine *engine)
{
    if (engine->local.first)
        return true;
    for (uint32_t i = 0; i < engine->volumes; i++)
        if (engine->volume[i].look_again && engine->volume[i].waiting.first)
            return true;
    return false;
}

static void on_round(void *argument)
{
    mp_engine *engine = argument;
    if (engine->attach && !engine->attach->flag)
        mp_request_abandon(engine); /* a target: the role of what is held is over, and what of it still runs here ends first */
    bool writing = engine->barrier.local[0] || engine->barrier.local[1];
    if (engine->attach && !mp_link_draining(engine) && (engine->attach->flag || !writing)) {
        mp_command *command = engine->attach;
        engine->attach = NULL;
        mp_link_attach(engine, command);
        free_command(command);
        all_look_again(engine);
    }
    if (engine->starved)
        all_look_again(engine);
    for (unsigned turn = 0; turn < 64; turn++) { /* an end lets another one begin; bounded, so that acks go out meanwhile */
        mp_request_round(engine);
        for (uint32_t i = 0; i < engine->volumes; i++)
            mp_mend_round(&engine->volume[i]);
        mp_barrier_round(engine);
        mp_link_round(engine);
        mp_request_do_local(engine);
        if (!anything_to_start(engine))
            break;
    }
    mp_link_round(engine);
    mp_clients_round(engine);
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_volume *volume = &engine->volume[i];
        if (!volume->journal_job && (volume->journal_job = mp_journal_job(&volume->journal)))
            mp_pool_submit(&engine->pool, volume->journal_job);
    }
    save_round(engine);
    /* What the last steps left to do must not wait for an event: a client's read may have submitted a request. */
    if (anything_to_start(engine) || engine->barrier.next.first || engine->link.chan.first) {
        mp_request_round(engine);
        mp_barrier_round(engine);
        mp_link_round(engine);
        mp_request_do_local(engine);
        mp_link_round(engine);
        mp_clients_round(engine);
    }
}

static bool idle(const mp_engine *engine)
{
    bool busy = engine->requests_busy || engine->held_first || engine->barrier.running || engine->saving || engine->attach;
    for (uint32_t i = 0; i < engine->volumes && !busy; i++) {
        mp_volume_status status = {0};
        mp_mend_status(&engine->volume[i], &status);
        busy = status.resync_active || mp_journal_has_unflushed(&engine->volume[i].journal) || engine->volume[i].journal_job;
    }
    return !busy;
}

void mp_engine_hurry(mp_engine *engine)
{
    if (engine->loop.tick_ns == TICK)
        return;
    engine->loop.tick_ns = TICK;
    engine->loop.next_tick_ns = mp_min(engine->loop.next_tick_ns, mp_now_ns() + TICK);
}

static void on_tick(void *argument, uint64_t now_ns)
{
    mp_engine *engine = argument;
    uint64_t patience = engine->link.up ? engine->link.timeout_ns / 8 : IDLE_TICK;
    engine->loop.tick_ns = idle(engine) ? mp_max(TICK, mp_min(patience, IDLE_TICK)) : TICK;
    engine->loop.next_tick_ns = now_ns + engine->loop.tick_ns;
    bool resyncing = false, losing = false;
    for (uint32_t i = 0; i < engine->volumes; i++)
        mp_mend_pace(&engine->volume[i], &resyncing, &losing);
    mp_pace_tick(&engine->pace, now_ns, resyncing, losing);
    mp_link_tick(engine, now_ns);
    mp_cover_tick(engine, now_ns);
    mp_barrier_tick(engine, now_ns);
    bool granted = mp_grant_holds(engine, mp_boot_ns());
    if (granted != engine->granted)
        all_look_again(engine);
    engine->granted = granted;
    pthread_mutex_lock(&engine->lock);
    publish(engine);
    pthread_mutex_unlock(&engine->lock);
}

static void *run(void *argument)
{
    mp_engine *engine = argument;
    MP_ASSERT(mp_loop_run(&engine->loop));
    return NULL;
}

mp_engine *mp_engine_open(const mp_engine_volume *volumes, uint32_t count, mp_fault *fault)
{
    MP_ASSERT(count && count <= MP_VOLUMES_MAX);
    *fault = (mp_fault){.status = MP_INTERNAL, .error = ENOMEM, .text = "the engine cannot start"};
    mp_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    pthread_mutex_init(&engine->lock, NULL);
    engine->mail_last = &engine->mail;
    engine->events_last = &engine->events;
    mp_slab_init(&engine->slab);
    mp_pace_init(&engine->pace, 0);
    mp_list_init(&engine->free_requests);
    mp_list_init(&engine->local);
    mp_list_init(&engine->doubted);
    mp_list_init(&engine->barrier.next);
    mp_list_init(&engine->barrier.flushing);
    engine->link.chan.last = &engine->link.chan.first;
    engine->mail_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->volume = calloc(count, sizeof *engine->volume);
    engine->published = calloc(count, sizeof *engine->published);
    engine->request = calloc(MP_REQUESTS_MAX, sizeof(mp_request *));
    bool good = mp_loop_init(&engine->loop) == MP_OK && engine->mail_fd >= 0 && engine->event_fd >= 0 && engine->volume && engine->published && engine->request;
    for (uint32_t i = 0; i < count && good; i++) {
        mp_volume *volume = &engine->volume[i];
        *volume = (mp_volume){.engine = engine, .index = i, .fd = volumes[i].fd, .size = volumes[i].size, .block = volumes[i].block, .unsynced = true};
        mp_flight_init(&volume->flight);
        mp_flight_init(&volume->reading);
        mp_list_init(&volume->waiting);
        good = (volume->mend = mp_mend_new(volume)) != NULL && mp_journal_open(&volume->journal, volumes[i].meta_fd, volume->size, volume->block, fault) == MP_OK;
        if (good)
            engine->volumes++;
        else
            mp_mend_free(volume->mend);
    }
    if (!good) {
        mp_engine_close(engine);
        return NULL;
    }
    publish(engine);
    return engine;
}

void mp_engine_set_rate(mp_engine *engine, uint64_t rate) { mp_pace_init(&engine->pace, rate); }

int mp_engine_start(mp_engine *engine)
{
    static const uint8_t none;
    if (engine->mend_workers)
        return EALREADY; /* also if the first try failed: it is closed then, not started again */
    mend_worker *workers = aligned_alloc(_Alignof(mend_worker), MEND_THREADS * sizeof *workers);
    engine->mend_workers = workers;
    if (!workers)
        return ENOMEM;
    for (unsigned i = 0; i < MEND_THREADS; i++)
        workers[i].nice = false;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are Python's: no thread of ours may be interrupted by one */
    bool good = (engine->pools = mp_pool_start(&engine->pool, IO_THREADS, (void *)(uintptr_t)&none, 0) == MP_OK)
                && (engine->mend_pools = mp_pool_start(&engine->mend_pool, MEND_THREADS, workers, sizeof *workers) == MP_OK)
                && mp_loop_add(&engine->loop, engine->mail_fd, MP_LOOP_READ, on_mail, engine)
                && mp_loop_add(&engine->loop, mp_pool_fd(&engine->pool), MP_LOOP_READ, on_pool, engine)
                && mp_loop_add(&engine->loop, mp_pool_fd(&engine->mend_pool), MP_LOOP_READ, on_mend_pool, engine);
    mp_loop_every(&engine->loop, TICK, on_tick, engine);
    engine->loop.round = on_round;
    engine->loop.round_argument = engine;
    good = good && pthread_create(&engine->thread, NULL, run, engine) == 0;
    engine->started = good;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return good ? 0 : EAGAIN;
}

/* After the threads have ended nothing is in order and nothing needs to be: as after a kill. Only memory and descriptors. */
static void forget_all(mp_engine *engine)
{
    mp_link_detach(engine, false, 0, "%s", "stopped");
    mp_clients_close(engine, false);
    mp_engine_free_clients(engine);
    for (uint32_t i = 0; i < engine->requests; i++)
        mp_request_drop_buffer(engine->request[i]);
}

void mp_engine_close(mp_engine *engine)
{
    if (engine->started) {
        mp_command *stop = mp_command_new(MP_COMMAND_STOP, 0);
        MP_ASSERT(stop);
        mp_engine_post(engine, stop);
        pthread_join(engine->thread, NULL);
    }
    if (engine->pools)
        mp_pool_stop(&engine->pool);
    if (engine->mend_pools)
        mp_pool_stop(&engine->mend_pool);
    if (engine->started)
        forget_all(engine);
    for (mp_command *next, *command = engine->mail; command; command = next) {
        next = command->next;
        free_command(command);
    }
    if (engine->attach)
        free_command(engine->attach);
    for (mp_event *event; (event = mp_engine_take(engine));)
        free(event);
    for (uint32_t i = 0; i < engine->volumes; i++) {
        mp_mend_drop_all(engine->volume[i].mend);
        mp_mend_free(engine->volume[i].mend);
        if (engine->volume[i].journal_job) /* it ended with the pool, or never began: its result is of no use any more */
            (void)mp_journal_finished(&engine->volume[i].journal, engine->volume[i].journal_job);
        mp_journal_close(&engine->volume[i].journal);
    }
    mp_slab_close(&engine->slab);
    for (uint32_t i = 0; i < engine->requests; i += MP_REQUESTS_CHUNK)
        free(engine->request[i]);
    mp_loop_close(&engine->loop);
    if (engine->mail_fd >= 0)
        close(engine->mail_fd);
    if (engine->event_fd >= 0)
        close(engine->event_fd);
    pthread_mutex_destroy(&engine->lock);
    free(engine->mend_workers);
    free(engine->volume);
    free(engine->published);
    free(engine->request);
    free(engine);
}
