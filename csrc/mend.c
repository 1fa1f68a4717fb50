/* mend.c - the online resync of one volume: which blocks, in which order, and when a bit may go.
 *
 *   target -> source   BITS ... BITS_END       what the target knows to differ
 *   source -> target   MERGED (bytes u64)      the union is durable at the source; the target forgets its bits (R2)
 *   for every unit     DIGESTS ->  <- WANT  DATA ->  <- SETTLED     in doubt: an equal block costs its digest (R7)
 *                      BULK ->     <- SETTLED                       written only here: a dirty block is taken to differ
 *   source -> target   RESYNC_DONE             no bit is left, and a barrier has proved that all is durable
 *
 * Rules
 *  - R3 a bit goes only after a barrier that began after its unit was settled. Writes of clients go to the target as ordinary
 *    writes all the time, whether their block is in sync or not (R5: they leave its bit alone), so nothing is lost between.
 *  - R4 a unit that meets a write in flight is passed over and tried again; a write that meets a unit waits for it.
 *  - R9 the workers run at nice 19, and the units that are open, of all volumes together, are as many as pace.h allows.
 *  - What the source cannot read stays dirty; the rest goes on, and it is tried again now and then. The link is not to blame.
 *  - R6 an interrupted resync has lost nothing but the units on their way: the bits are the state.
 */
#include "mend.h"

#include <errno.h>

#define UNREADABLE_NS ((uint64_t)10 * 1000000000) /* until what the source cannot read is tried again */
#define SETTLED_BYTES ((uint64_t)64 << 20) /* after so much a barrier makes it durable */

mp_mend *mp_mend_new(mp_volume *volume)
{
    mp_mend *mend = calloc(1, sizeof *mend);
    if (!mend)
        return NULL;
    mend->volume = volume;
    for (uint32_t i = 0; i < MEND_UNITS; i++) {
        mend->unit[i].mend = mend;
        mend->unit[i].id = i;
        mend->unit[i].job.run = mp_mend_run;
    }
    return mend;
}

void mp_mend_free(mp_mend *mend) { free(mend); }

static void give_back(mp_mend *mend, uint8_t **buffer, uint64_t bytes)
{
    if (*buffer)
        mp_slab_put(&mend->volume->engine->slab, *buffer, bytes);
    *buffer = NULL;
}

void mp_mend_drop_all(mp_mend *mend)
{
    for (uint32_t i = 0; i < MEND_UNITS; i++) {
        mend_unit *u = &mend->unit[i];
        give_back(mend, &u->data, MP_BULK);
        give_back(mend, &u->payload, u->payload_bytes);
        give_back(mend, &u->held, u->held_bytes);
    }
}

static void close_unit(mend_unit *u)
{
    mp_mend *mend = u->mend;
    MP_ASSERT(u->open && u->work == WORK_NONE);
    give_back(mend, &u->data, MP_BULK);
    give_back(mend, &u->payload, u->payload_bytes);
    give_back(mend, &u->held, u->held_bytes);
    if (mend->source) {
        mend->volume->engine->open_units--;
        mp_flight_leave(&mend->volume->flight, u->place);
        mp_volume_look_again(mend->volume);
    }
    u->open = u->on_wire = false;
    mend->open_units--;
}

bool mp_mend_busy(const mp_volume *volume) { return volume->mend->jobs != 0; }

/* --- begin and end --- */

void mp_mend_attach(mp_volume *volume, mp_plan plan)
{
    mp_mend *mend = volume->mend;
    mp_link *link = &volume->engine->link;
    MP_ASSERT(mend->open_units == 0 && mend->jobs == 0);
    mend->source = link->source;
    mend->full = plan == MP_PLAN_FULL;
    mend->seed = link->chan.session;
    mend->state = MEND_BITS;
    mend->cursor = mend->word = mend->retry_ns = 0;
    mend->merged_bits = false;
    mend->settled_count = mend->settled_before = 0;
    mend->settled_bytes = 0;
    mend->total = mend->done = mend->skipped = mend->sent = 0;
    if (mend->source && mend->full)
        mp_journal_doubt(&volume->journal, 0, volume->size);
}

void mp_mend_link_lost(mp_volume *volume)
{
    mp_mend *mend = volume->mend;
    for (uint32_t i = 0; i < MEND_UNITS; i++) {
        mend_unit *u = &mend->unit[i];
        if (!u->open)
            continue;
        u->on_wire = false;
        u->dropped = u->work != WORK_NONE;
        if (!u->dropped)
            close_unit(u);
    }
    mend->bits_on_wire = false;
    give_back(mend, &mend->bits, MP_BITS_BYTES);
    mend->settled_count = mend->settled_before = 0;
    mend->settled_bytes = 0;
    mend->state = MEND_IDLE;
}

static void bits_sent(mp_outgoing *out)
{
    mp_mend *mend = (mp_mend *)((char *)out - offsetof(mp_mend, bits_out));
    mend->bits_on_wire = false;
}

/* Target: the next stretch of the bitmap that holds a bit, or the end. */
static void send_bits(mp_mend *mend)
{
    mp_volume *volume = mend->volume;
    mp_link *link = &volume->engine->link;
    if (mend->bits_on_wire)
        return;
    uint64_t first, last, words = mp_ceil_div(volume->journal.dirty.bits, 64);
    if (!mp_bitmap_next(&volume->journal.dirty, mp_min(mend->word * 64, volume->journal.dirty.bits), &first, &last)) {
        give_back(mend, &mend->bits, MP_BITS_BYTES);
        mend->state = MEND_RUNNING;
        mp_link_small(volume->engine, MP_FRAME_BITS_END, (uint16_t)volume->index, 0, 0, NULL, 0);
        return;
    }
    if (!mend->bits && !(mend->bits = mp_slab_get(&volume->engine->slab, MP_BITS_BYTES))) {
        volume->engine->starved = true;
        return;
    }
    mend->word = first / 64;
    uint32_t count = (uint32_t)mp_min(words - mend->word, MP_BITS_BYTES / 8);
    for (uint32_t i = 0; i < count; i++)
        mp_store64(mend->bits + 8 * i, atomic_load_explicit(&volume->journal.dirty.words[mend->word + i], memory_order_relaxed));
    mend->bits_on_wire = true;
    mend->bits_out = (mp_outgoing){.sent = bits_sent, .meta = mend->bits, .frame = {.type = MP_FRAME_BITS, .flags = (uint16_t)volume->index, .offset = mend->word, .meta = 8 * count, .length = 8 * count, .epoch = link->epoch}};
    mend->word += count;
    mp_chan_queue(&link->chan, &mend->bits_out);
}

static bool take_bits(mp_mend *mend, const mp_frame *frame, const uint8_t *payload)
{
    mp_volume *volume = mend->volume;
    mp_bitmap *dirty = &volume->journal.dirty;
    uint64_t words = mp_ceil_div(dirty->bits, 64), count = frame->meta / 8;
    if (!mend->source || mend->state != MEND_BITS || frame->meta % 8 || frame->meta != frame->length || frame->offset > words || count > words - frame->offset)
        return false;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t word = mp_load64(payload + 8 * i), first = (frame->offset + i) * 64;
        if (first + 64 > dirty->bits && word >> (dirty->bits - first))
            return false;
        while (word) { /* runs of bits, so that a full bitmap is not 64 calls a word */
            unsigned from = (unsigned)__builtin_ctzll(word);
            uint64_t rest = ~(word >> from);
            unsigned length = rest ? (unsigned)__builtin_ctzll(rest) : 64;
            uint64_t offset = (first + from) * volume->block;
            mp_journal_doubt(&volume->journal, offset, mp_min((uint64_t)length * volume->block, volume->size - offset));
            mend->merged_bits = true;
            word = from + length >= 64 ? 0 : word >> (from + length) << (from + length);
        }
    }
    return true;
}

static void begin_running(mp_mend *mend)
{
    mp_volume *volume = mend->volume;
    uint8_t meta[8];
    mend->total = mp_min(mp_bitmap_count(&volume->journal.dirty) * volume->block, volume->size);
    mp_store64(meta, mend->total);
    if (!mp_link_small(volume->engine, MP_FRAME_MERGED, (uint16_t)volume->index, 0, 0, meta, sizeof meta))
        return;
    mp_event_post(volume->engine, MP_EVENT_BITS_MERGED, volume->index, mend->merged_bits, "%016llx", (unsigned long long)mend->seed);
    mend->state = MEND_RUNNING;
}

static void finish(mp_mend *mend)
{
    mp_volume *volume = mend->volume;
    mp_journal_believe(&volume->journal);
    (void)mp_journal_flush(&volume->journal); /* cleared bits may stay on disk for a while, but why should they */
    if (mp_link_small(volume->engine, MP_FRAME_RESYNC_DONE, (uint16_t)volume->index, 0, 0, NULL, 0)) {
        mend->state = MEND_DONE;
        mp_event_post(volume->engine, MP_EVENT_RESYNC_DONE, volume->index, 0, "%s", "");
    }
}

/* --- source: units --- */

static void submit(mend_unit *u, unit_work work)
{
    u->work = work;
    u->mend->jobs++;
    mp_pool_submit(&u->mend->volume->engine->mend_pool, &u->job);
}

static mend_unit *free_unit(mp_mend *mend)
{
    for (uint32_t i = 0; i < MEND_UNITS; i++)
        if (!mend->unit[i].open)
            return &mend->unit[i];
    return NULL;
}

static void open_units(mp_mend *mend)
{
    mp_volume *volume = mend->volume;
    mp_engine *engine = volume->engine;
    uint64_t first, last, most = MP_BULK / volume->block;
    while (mp_pace_may_open(&engine->pace, engine->open_units) && mend->settled_count + mend->open_units < MEND_SETTLED && !mp_flight_full(&volume->flight)
           && mp_bitmap_next(&volume->journal.dirty, mend->cursor, &first, &last)) {
        last = mp_min(last, first + most);
        uint64_t offset = first * volume->block, length = mp_min((last - first) * volume->block, volume->size - offset);
        if (mp_flight_overlaps(&volume->flight, offset, length)) {
            mend->cursor = last;
            continue;
        }
        mend_unit *u = free_unit(mend);
        u->data = mp_slab_get(&engine->slab, MP_BULK);
        if (!u->data) {
            engine->starved = true;
            return;
        }
        mend->cursor = last;
        u->open = true;
        u->dropped = false;
        u->sent = 0;
        u->shape = (mp_unit_shape){offset, length, volume->block};
        u->place = mp_flight_enter(&volume->flight, offset, length);
        mend->open_units++;
        engine->open_units++;
        u->compares = mp_journal_doubted(&volume->journal, offset, length);
        submit(u, u->compares ? WORK_DIGEST : WORK_READ);
    }
}

static void unit_sent(mp_outgoing *out) { ((mend_unit *)((char *)out - offsetof(mend_unit, out)))->on_wire = false; }

static void send_unit(mend_unit *u)
{
    mp_link *link = &u->mend->volume->engine->link;
    u->out.frame.flags = (uint16_t)u->mend->volume->index;
    u->out.frame.epoch = link->epoch;
    u->out.sent = unit_sent;
    u->on_wire = true;
    u->since_ns = mp_now_ns();
    mp_chan_queue(&link->chan, &u->out);
    if (u->mend->source)
        mp_pace_sent(&u->mend->volume->engine->pace, MP_FRAME_HEADER + u->out.frame.length);
}

bool mp_mend_stuck(const mp_volume *volume, uint64_t since_ns)
{
    const mp_mend *mend = volume->mend;
    bool stuck = false;
    for (uint32_t i = 0; i < MEND_UNITS && mend->source; i++)
        stuck |= mend->unit[i].open && mend->unit[i].work == WORK_NONE && mend->unit[i].since_ns < since_ns;
    return stuck;
}

void *mp_mend_want_buffer(mp_volume *volume, const mp_frame *frame)
{
    mend_unit *u = frame->count < MEND_UNITS ? &volume->mend->unit[frame->count] : NULL;
    bool good = u && volume->mend->source && u->open && u->work == WORK_NONE && frame->length <= sizeof u->want;
    return good ? u->want : NULL;
}

static bool take_settled(mp_mend *mend, mend_unit *u, const mp_frame *frame, const uint8_t *payload)
{
    if (!mend->source || frame->meta != MEND_SETTLED_META || frame->length != frame->meta || u->on_wire)
        return false;
    uint64_t equal = mp_load64(payload), changed = mp_load64(payload + 8) + mp_load64(payload + 16);
    if (equal > u->shape.length || changed > u->shape.length || equal + changed != u->shape.length)
        return false;
    mend->done += u->shape.length;
    mend->skipped += equal;
    mend->sent += u->sent;
    mend->settled[mend->settled_count].first = u->shape.offset / u->shape.block;
    mend->settled[mend->settled_count++].count = mp_shape_blocks(&u->shape);
    mend->settled_bytes += u->shape.length;
    close_unit(u);
    return true;
}

void mp_mend_barrier_began(mp_volume *volume) { volume->mend->settled_before = volume->mend->settled_count; }

void mp_mend_durable(mp_volume *volume)
{
    mp_mend *mend = volume->mend;
    unsigned durable = mend->settled_before;
    if (!mend->source || !durable)
        return;
    for (unsigned i = 0; i < durable; i++)
        mp_journal_clear(&volume->journal, mend->settled[i].first, mend->settled[i].count);
    mend->settled_count -= durable;
    memmove(mend->settled, mend->settled + durable, mend->settled_count * sizeof *mend->settled);
    mend->settled_before = 0;
    mend->settled_bytes = 0;
    for (unsigned i = 0; i < mend->settled_count; i++)
        mend->settled_bytes += mend->settled[i].count * volume->block;
}

void mp_mend_spoil(mp_volume *volume)
{
    volume->mend->settled_count = volume->mend->settled_before = 0;
    volume->mend->settled_bytes = 0;
}

/* All that is left waits for a barrier only. */
static bool only_barrier_missing(const mp_mend *mend)
{
    uint64_t first, last;
    return mend->settled_count && !mend->open_units && !mp_bitmap_next(&mend->volume->journal.dirty, mend->cursor, &first, &last);
}

bool mp_mend_wants_barrier(const mp_volume *volume)
{
    const mp_mend *mend = volume->mend;
    return mend->source && mend->state == MEND_RUNNING
           && (mend->settled_bytes >= SETTLED_BYTES || mend->settled_count >= MEND_SETTLED / 2 || only_barrier_missing(mend));
}

/* --- target: units --- */

/* A frame that opens a unit here: its place is free and its range inside the volume. */
static bool open_at_target(mp_mend *mend, mend_unit *u, const mp_frame *frame, uint8_t *payload)
{
    mp_volume *volume = mend->volume;
    mp_bulk bulk;
    bool digests = frame->type == MP_FRAME_DIGESTS;
    if (mend->source || u->open || mend->state != MEND_RUNNING)
        return false;
    if (digests ? !mp_digests_decode(&u->digests, frame, payload, volume->block) : !mp_bulk_decode(&bulk, frame, payload, volume->block))
        return false;
    u->shape = digests ? u->digests.shape : bulk.shape;
    if (u->shape.length > MP_BULK || u->shape.offset % volume->block || u->shape.offset > volume->size || u->shape.length > volume->size - u->shape.offset)
        return false;
    u->open = true;
    u->dropped = false;
    u->equal = u->written = u->punched = 0;
    mend->open_units++;
    return true;
}

static void settle(mend_unit *u)
{
    mp_volume *volume = u->mend->volume;
    uint8_t meta[MEND_SETTLED_META];
    mp_store64(meta, u->shape.length - u->written - u->punched);
    mp_store64(meta + 8, u->written);
    mp_store64(meta + 16, u->punched);
    u->mend->done += u->shape.length;
    u->mend->skipped += u->shape.length - u->written - u->punched;
    u->mend->sent += u->written;
    volume->unsynced = true;
    uint32_t id = u->id;
    close_unit(u);
    mp_link_small(volume->engine, MP_FRAME_SETTLED, (uint16_t)volume->index, id, 0, meta, sizeof meta);
}

/* --- frames and jobs --- */

static bool take_unit_frame(mp_mend *mend, const mp_frame *frame, uint8_t **payload)
{
    if (frame->count >= MEND_UNITS)
        return false;
    mend_unit *u = &mend->unit[frame->count];
    unit_work work;
    if (frame->type == MP_FRAME_SETTLED)
        return u->open && u->work == WORK_NONE && take_settled(mend, u, frame, *payload);
    if (frame->type == MP_FRAME_DIGESTS || frame->type == MP_FRAME_BULK) {
        if (!open_at_target(mend, u, frame, *payload))
            return false;
        work = frame->type == MP_FRAME_DIGESTS ? WORK_COMPARE : WORK_STORE;
    } else if (frame->type == MP_FRAME_WANT) {
        work = WORK_ANSWER;
        if (!mend->source || !u->open || u->on_wire || !u->compares || frame->length != frame->meta)
            return false;
    } else {
        work = WORK_MERGE;
        if (mend->source || !u->open || !u->held)
            return false;
    }
    if (u->work != WORK_NONE || (work == WORK_MERGE && u->on_wire))
        return false;
    if (work == WORK_COMPARE) {
        u->held = *payload;
        u->held_bytes = frame->length;
    } else if (work != WORK_ANSWER) {
        u->payload = *payload;
        u->payload_bytes = frame->length;
    }
    *payload = NULL;
    u->frame = *frame;
    submit(u, work);
    return true;
}

static bool take_frame(mp_mend *mend, const mp_frame *frame, uint8_t **payload)
{
    mp_volume *volume = mend->volume;
    switch (frame->type) {
    case MP_FRAME_BITS:
        return take_bits(mend, frame, *payload);
    case MP_FRAME_BITS_END:
        if (!mend->source || mend->state != MEND_BITS)
            return false;
        mend->state = MEND_MERGING;
        mend->ticket = mend->merged_bits || mend->full ? mp_journal_flush(&volume->journal) : 0;
        return true;
    case MP_FRAME_MERGED:
        if (mend->source || mend->state != MEND_RUNNING || frame->meta != 8 || frame->length != 8)
            return false;
        mend->total = mp_min(mp_load64(*payload), volume->size);
        mp_journal_clear(&volume->journal, 0, volume->journal.dirty.bits);
        mp_journal_believe(&volume->journal);
        (void)mp_journal_flush(&volume->journal);
        mp_event_post(volume->engine, MP_EVENT_BITS_MERGED, volume->index, 0, "%016llx", (unsigned long long)mend->seed);
        return true;
    case MP_FRAME_RESYNC_DONE:
        if (mend->source || mend->state != MEND_RUNNING || mend->open_units)
            return false;
        mend->state = MEND_DONE;
        mp_event_post(volume->engine, MP_EVENT_RESYNC_DONE, volume->index, 0, "%s", "");
        return true;
    default:
        return take_unit_frame(mend, frame, payload);
    }
}

bool mp_mend_frame(mp_volume *volume, const mp_frame *frame, void *payload, bool of_slab)
{
    uint8_t *bytes = payload;
    bool good = take_frame(volume->mend, frame, &bytes);
    if (bytes && of_slab)
        mp_slab_put(&volume->engine->slab, bytes, frame->length);
    return good;
}

void mp_mend_job_finished(mp_job *job)
{
    mend_unit *u = (mend_unit *)job;
    mp_mend *mend = u->mend;
    mp_engine *engine = mend->volume->engine;
    unit_work work = u->work;
    u->work = WORK_NONE;
    mend->jobs--;
    if (u->error)
        mp_event_post(engine, MP_EVENT_DISK_ERROR, mend->volume->index, u->error > 0 ? u->error : EIO, "resync at offset %llu: %s",
                      (unsigned long long)u->shape.offset, u->error > 0 ? strerror(u->error) : "the image ends there");
    if (u->dropped) {
        close_unit(u);
        return;
    }
    if (u->garbage) {
        mp_link_fail(engine, u->garbage);
        return;
    }
    if (u->error && (work == WORK_DIGEST || work == WORK_READ)) { /* the target has not heard of this unit yet */
        mend->retry_ns = mp_now_ns() + UNREADABLE_NS;
        close_unit(u);
        return;
    }
    if (u->error) { /* failing the link drops the units, this one's buffers with them */
        mp_link_fail_disk(engine, "resync");
        return;
    }
    if (work == WORK_STORE || work == WORK_MERGE)
        give_back(mend, &u->payload, u->payload_bytes);
    if (work == WORK_COMPARE || work == WORK_MERGE || work == WORK_STORE) {
        if (u->wants)
            send_unit(u);
        else
            settle(u);
    } else {
        send_unit(u);
    }
}

void mp_mend_round(mp_volume *volume)
{
    mp_mend *mend = volume->mend;
    if (!volume->engine->link.up || mend->state == MEND_IDLE || mend->state == MEND_DONE)
        return;
    if (!mend->source) {
        if (mend->state == MEND_BITS)
            send_bits(mend);
        return;
    }
    if (mend->state == MEND_MERGING && mp_journal_reached(&volume->journal, mend->ticket))
        begin_running(mend);
    if (mend->state != MEND_RUNNING)
        return;
    open_units(mend);
    if (mend->open_units || mend->settled_count)
        return;
    if (mp_bitmap_count(&volume->journal.dirty) == 0) {
        finish(mend);
    } else if (mend->cursor && mp_now_ns() >= mend->retry_ns) { /* what was passed over, or became dirty behind the cursor */
        mend->cursor = 0;
        open_units(mend);
    }
}

void mp_mend_pace(const mp_volume *volume, bool *resyncing, bool *losing)
{
    const mp_mend *mend = volume->mend;
    bool active = mend->source && mend->state == MEND_RUNNING;
    *resyncing |= active;
    *losing |= active && mend->done > mend->total;
}

void mp_mend_status(const mp_volume *volume, mp_volume_status *status)
{
    const mp_mend *mend = volume->mend;
    status->resync_active = mend->state == MEND_BITS || mend->state == MEND_MERGING || mend->state == MEND_RUNNING;
    status->resync_total = mp_max(mend->total, mend->done);
    status->resync_done = mend->done;
    status->resync_skipped = mend->skipped;
    status->resync_sent = mend->sent;
}
