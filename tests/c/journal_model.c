/* journal_model.c - M3 against a plain reference: two nodes, their caches, power cuts at every system call of the journal.
 *
 * Use: journal_model SEED COUNT STEPS. Runs the seeds SEED .. SEED + COUNT - 1; the first that fails is printed, exit code 1.
 *
 * The reference knows four versions of every block: what each node would read, and what it would still read after a power
 * cut. If the four are not all equal, the nodes may differ after a crash: then the block must be dirty in whatever the journal
 * reads back. That, and nothing about bits, is what is checked after each cut. The rest plays the engine by the rules of
 * journal.h: writes in flight, a link that comes and goes, barriers, resync, bits merged from the peer, clean stops.
 * It is compiled with MP_JOURNAL_EXTENTS = 8 and MP_JOURNAL_JOB_PAGES = 2, so that both are scarce, and FAKE_SECTOR = 16, so that
 * so small a table is torn as well.
 */
#include "actlog.h"
#include "fakedisk.h"
#include "journal.h"

#include <stdarg.h>

#define BLOCK 4096u
#define EXTENTS 2500u /* five pages of the bitmap */
#define BLOCKS (EXTENTS * 64ull - 13)
#define SIZE (BLOCKS * BLOCK - 777)
#define PLACES 24u
#define RUN 4u /* extents next to each other at each place */
#define OPS 10u
#define OP_BLOCKS (3 * 64 + 1)
#define MENDS 32u
#define MERGES 64u
#define LIVE 0u
#define TRIAL 1u

typedef struct version {
    uint32_t mine, mine_durable, peers, peers_durable;
    uint32_t mine_flushed, peers_flushed; /* what the running barrier's flush has seen */
    bool merged; /* the peer's bit, which it has given up */
} version;

typedef struct op {
    enum { NOTHING, WAITING, IN_FLIGHT } state;
    uint64_t offset, length, first, last;
    uint32_t version;
    bool to_peer, local_done, peer_done;
    bool equal[OP_BLOCKS];
} op;

static version model[BLOCKS];
static bool touched[EXTENTS];
static uint32_t place[PLACES];
static op ops[OPS];
static uint32_t order[OPS], in_order; /* the waiting ones, oldest first */
static struct { uint64_t block; int stage; } mends[MENDS];
static struct { uint64_t block, ticket; } merges[MERGES];
static unsigned mend_count, merge_count;
static struct { bool running, connected, void_, local, peer; uint32_t covers; } barrier;
static bool connected, draining, stopping;
static uint32_t last_version;
static mp_journal journal;
static mp_job *job;
static bool job_ran;
static int pending_cut; /* 1 + the cut that has happened inside the job */
static fake_disk cut_disk;
static uint64_t seed, rng, step;
static uint64_t checks, cuts, jobs, entered, cleared, emptied; /* so that a run that tests nothing is seen */

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("seed %llu, step %llu: ", (unsigned long long)seed, (unsigned long long)step);
    vprintf(format, arguments);
    printf("\nrepeat with: journal_model %llu 1\n", (unsigned long long)seed);
    va_end(arguments);
    fflush(stdout);
    _Exit(1);
}

static uint64_t pick(uint64_t limit) { return below(&rng, limit); }
static bool chance(uint64_t n) { return one_in(&rng, n); }

static bool may_differ(uint64_t b)
{
    const version *v = &model[b];
    return v->merged || v->mine != v->mine_durable || v->mine != v->peers || v->peers != v->peers_durable;
}

/* --- crashes --- */

static void open_on(mp_journal *j, unsigned number)
{
    mp_fault fault;
    if (mp_journal_open(j, fake_fd(number), SIZE, BLOCK, &fault))
        fail("open: %s", fault.text);
    if (j->lost_log)
        fail("M7: the log was lost although only one record can be torn");
}

static void check(const mp_journal *j)
{
    checks++;
    for (uint32_t e = 0; e < EXTENTS; e++) {
        uint64_t word = atomic_load(&j->dirty.words[e]);
        if (!touched[e]) {
            if (word)
                fail("extent %u is dirty although nobody ever wrote to it", e);
            continue;
        }
        for (uint64_t b = e * 64ull; b < mp_min(e * 64ull + 64, BLOCKS); b++)
            if (may_differ(b) && !(word >> (b % 64) & 1)) {
                const version *v = &model[b];
                fail("M3: block %llu is clean, but versions are %u (durable %u) here, %u (durable %u) at the peer%s", (unsigned long long)b,
                     v->mine, v->mine_durable, v->peers, v->peers_durable, v->merged ? ", and its bit was taken over" : "");
            }
    }
}

static fake_cut any_cut(void)
{
    static const fake_cut kinds[] = {FAKE_KILLED, FAKE_LOST, FAKE_ALL, FAKE_TORN, FAKE_TORN};
    return kinds[pick(5)];
}

/* What a crash at this moment would leave, opened aside; twice, as opening may not change it. */
static void try_crash(const fake_disk *disk)
{
    mp_journal other;
    fake_crash(fake_of(fake_fd(TRIAL)), disk, any_cut(), &rng);
    for (int again = 0; again < 2; again++) {
        open_on(&other, TRIAL);
        check(&other);
        mp_journal_close(&other);
    }
}

static void forget(void)
{
    memset(ops, 0, sizeof ops);
    memset(&barrier, 0, sizeof barrier);
    in_order = mend_count = merge_count = 0;
    connected = false;
}

/* The process or the host ends, perhaps the peer's too; what is left is opened. */
static void crash(const fake_disk *disk, fake_cut cut)
{
    if (job)
        mp_journal_finished(&journal, job);
    job = NULL;
    mp_journal_close(&journal);
    static fake_disk left;
    fake_crash(&left, disk, cut, &rng);
    fake_crash(fake_of(fake_fd(LIVE)), &left, FAKE_KILLED, &rng); /* a copy */
    bool peer_too = chance(4);
    for (uint32_t e = 0; e < EXTENTS; e++)
        for (uint64_t b = e * 64ull; touched[e] && b < mp_min(e * 64ull + 64, BLOCKS); b++) {
            version *v = &model[b];
            if (cut != FAKE_KILLED)
                v->mine = v->mine_durable = chance(2) ? v->mine : v->mine_durable;
            if (peer_too)
                v->peers = v->peers_durable = chance(2) ? v->peers : v->peers_durable;
        }
    forget();
    open_on(&journal, LIVE);
    check(&journal);
    cuts++;
}

/* --- the engine --- */

static bool in_flight(uint64_t first, uint64_t last)
{
    for (op *o = ops; o < ops + OPS; o++)
        if (o->state == IN_FLIGHT && o->first <= last && first <= o->last)
            return true;
    return false;
}

static void touch(uint64_t first, uint64_t last)
{
    for (uint64_t b = first; b <= last; b++)
        touched[b / 64] = true;
}

/* The next block, from b on, of an extent that anything ever happened to; or BLOCKS. */
static uint64_t next_touched(uint64_t b)
{
    while (b < BLOCKS && !touched[b / 64])
        b = (b / 64 + 1) * 64;
    return mp_min(b, BLOCKS);
}

static void new_op(void)
{
    op *o = ops;
    while (o < ops + OPS && o->state != NOTHING)
        o++;
    if (o == ops + OPS)
        return;
    uint64_t base = place[pick(PLACES)] * 64ull * BLOCK, length = 1 + pick(chance(4) ? 128 * BLOCK : 5 * BLOCK);
    uint64_t offset = base + pick(RUN * 64ull * BLOCK);
    if (chance(8)) /* whole blocks */
        offset = mp_down(offset, BLOCK), length = (length / BLOCK + 1) * BLOCK;
    offset = mp_min(offset, SIZE - 1);
    length = mp_min(length, SIZE - offset);
    *o = (op){.state = WAITING, .offset = offset, .length = length, .first = offset / BLOCK, .last = (offset + length - 1) / BLOCK};
    touch(o->first, o->last);
    order[in_order++] = (uint32_t)(o - ops);
}

static void drop_mend(unsigned i) { mends[i] = mends[--mend_count]; }

static void submit(op *o)
{
    o->state = IN_FLIGHT;
    o->version = ++last_version;
    o->to_peer = connected;
    o->local_done = o->peer_done = false;
    for (uint64_t b = o->first; b <= o->last; b++)
        o->equal[b - o->first] = model[b].mine == model[b].peers;
    for (unsigned i = mend_count; i--;)
        if (o->first <= mends[i].block && mends[i].block <= o->last)
            drop_mend(i); /* R3: written to in between */
    if (connected)
        mp_journal_unflushed(&journal, o->offset, o->length);
    else
        mp_journal_set(&journal, o->offset, o->length);
    entered++;
}

static void try_enter(void)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < in_order; i++) {
        op *o = &ops[order[i]];
        bool behind = in_flight(o->first, o->last);
        for (uint32_t k = 0; k < left && !behind; k++)
            behind = ops[order[k]].first <= o->last && o->first <= ops[order[k]].last;
        if (!behind && mp_journal_enter(&journal, o->offset, o->length))
            submit(o);
        else
            order[left++] = order[i];
    }
    in_order = left;
}

static void at_peer(op *o, bool acked)
{
    if (!connected || !o->to_peer || o->peer_done)
        return;
    for (uint64_t b = o->first; b <= o->last; b++) { /* R5: a part of a stale block leaves it stale */
        bool whole = o->offset <= b * BLOCK && mp_min((b + 1) * BLOCK, SIZE) <= o->offset + o->length;
        model[b].peers = whole || o->equal[b - o->first] ? o->version : ++last_version;
    }
    o->peer_done = acked;
}

static void advance(op *o)
{
    if (o->state != IN_FLIGHT)
        return;
    if (!o->local_done && chance(2)) {
        for (uint64_t b = o->first; b <= o->last; b++)
            model[b].mine = o->version;
        o->local_done = true;
        if (chance(16)) /* a disk error, or so it says: the bits are set */
            mp_journal_set(&journal, o->offset, o->length);
    } else if (o->to_peer && !o->peer_done && connected) {
        at_peer(o, !chance(4));
    } else if (o->to_peer && !o->peer_done && chance(4)) { /* it goes on alone */
        mp_journal_set(&journal, o->offset, o->length);
        o->to_peer = false;
    }
    if (o->local_done && (o->peer_done || !o->to_peer)) {
        mp_journal_leave(&journal, o->offset, o->length);
        o->state = NOTHING;
        barrier.covers &= ~(1u << (o - ops));
    }
}

static void lose_link(void)
{
    if (!connected)
        return;
    connected = false;
    mend_count = 0;
    barrier.void_ |= barrier.connected;
    mp_journal_link_lost(&journal);
}

static void make_link(void)
{
    if (connected)
        return;
    if (chance(4))
        for (uint64_t b = next_touched(0); b < BLOCKS; b = next_touched(b + 1)) /* the peer had a power cut meanwhile */
            model[b].peers = model[b].peers_durable = chance(2) ? model[b].peers : model[b].peers_durable;
    connected = true;
    for (op *o = ops; o < ops + OPS; o++) /* A17 */
        if (o->state == IN_FLIGHT && o->to_peer && !o->peer_done)
            mp_journal_unflushed(&journal, o->offset, o->length);
}

static void begin_barrier(void)
{
    if (barrier.running)
        return;
    memset(&barrier, 0, sizeof barrier);
    barrier.running = true;
    barrier.connected = connected;
    for (op *o = ops; o < ops + OPS; o++)
        barrier.covers |= (uint32_t)(o->state == IN_FLIGHT) << (o - ops);
    for (unsigned i = 0; i < mend_count; i++)
        mends[i].stage = 1;
    mp_journal_barrier_begin(&journal);
}

static void advance_barrier(void)
{
    if (!barrier.running)
        return;
    if (barrier.void_ || chance(10)) { /* or a disk said no */
        barrier.running = false;
        mp_journal_barrier_end(&journal, false);
        return;
    }
    if (barrier.covers)
        return;
    if (!barrier.local) { /* the flush is sure of what was there when it began, and of no more */
        for (uint64_t b = next_touched(0); b < BLOCKS; b = next_touched(b + 1))
            model[b].mine_flushed = model[b].mine, model[b].peers_flushed = model[b].peers;
        barrier.local = true;
        return;
    }
    for (uint64_t b = next_touched(0); b < BLOCKS; b = next_touched(b + 1)) {
        model[b].mine_durable = model[b].mine_flushed;
        if (barrier.connected)
            model[b].peers_durable = model[b].peers_flushed;
    }
    barrier.running = false;
    mp_journal_barrier_end(&journal, true);
    for (unsigned i = mend_count; barrier.connected && i--;) {
        if (mends[i].stage != 1)
            continue;
        uint64_t b = mends[i].block;
        model[b].merged = false;
        if (may_differ(b))
            fail("the model is wrong about block %llu", (unsigned long long)b);
        mp_journal_clear(&journal, b, 1);
        cleared++;
        for (unsigned k = merge_count; k--;)
            if (merges[k].block == b)
                merges[k] = merges[--merge_count];
        drop_mend(i);
    }
}

static void mend(void)
{
    uint64_t b, last, start = (place[pick(PLACES)] + pick(RUN)) * 64ull;
    if (!connected || mend_count == MENDS || start >= BLOCKS || !mp_bitmap_next(&journal.dirty, start, &b, &last))
        return;
    for (unsigned i = 0; i < mend_count; i++)
        if (mends[i].block == b)
            return;
    if (in_flight(b, b))
        return;
    touch(b, b);
    model[b].peers = model[b].mine;
    mends[mend_count].block = b;
    mends[mend_count++].stage = 0;
}

static void merge_from_peer(void)
{
    static uint64_t lately[4]; /* a peer that did not hear of the end says the same again */
    uint64_t b = mp_min((place[pick(PLACES)] + pick(RUN)) * 64ull + pick(64), BLOCKS - 1);
    if (step > 100 && chance(2))
        b = lately[pick(4)];
    lately[pick(4)] = b;
    if (merge_count == MERGES)
        return;
    for (unsigned i = 0; i < mend_count; i++)
        if (mends[i].block == b)
            return; /* bits come before the resync begins */
    touch(b, b);
    mp_journal_set(&journal, b * BLOCK, 1);
    merges[merge_count].block = b;
    merges[merge_count++].ticket = mp_journal_flush(&journal);
}

static void look_at_merges(void)
{
    for (unsigned i = merge_count; i--;)
        if (mp_journal_reached(&journal, merges[i].ticket)) {
            model[merges[i].block].merged = true; /* R2: now the peer gives its own up */
            merges[i] = merges[--merge_count];
        }
}

static void make_job(void)
{
    if (job)
        return;
    job = mp_journal_job(&journal);
    job_ran = false;
    jobs += job != NULL;
}

static void run_job(void)
{
    if (!job || job_ran)
        return;
    job->run(job, NULL);
    job_ran = true;
    if (pending_cut) {
        fake_cut cut = (fake_cut)(pending_cut - 1);
        pending_cut = 0;
        crash(&cut_disk, cut);
    }
}

static void finish_job(void)
{
    if (!job || !job_ran)
        return;
    mp_job *finished = job;
    job = NULL;
    if (mp_journal_finished(&journal, finished))
        fail("the job failed");
    look_at_merges();
}

static void stop(void)
{
    if (chance(2))
        lose_link();
    for (op *o = ops; o < ops + OPS; o++)
        while (o->state == IN_FLIGHT)
            advance(o);
    if (barrier.running)
        mp_journal_barrier_end(&journal, false);
    forget();
    for (uint64_t b = next_touched(0); b < BLOCKS; b = next_touched(b + 1))
        model[b].mine_durable = model[b].mine;
    uint64_t ticket = mp_journal_empty(&journal);
    if (mp_journal_enter(&journal, 0, 1))
        fail("a write was let in during a clean stop");
    for (int rounds = 0; !mp_journal_reached(&journal, ticket); rounds++) {
        if (rounds > 10)
            fail("a clean stop does not end");
        uint64_t before = cuts;
        make_job();
        run_job();
        finish_job();
        if (cuts != before)
            return;
    }
    uint64_t dirty = mp_bitmap_count(&journal.dirty);
    if (mp_journal_active(&journal))
        fail("extents are left after a clean stop");
    crash(fake_of(fake_fd(LIVE)), FAKE_LOST);
    if (mp_bitmap_count(&journal.dirty) != dirty)
        fail("M6: %llu blocks were dirty at a clean stop, %llu are", (unsigned long long)dirty, (unsigned long long)mp_bitmap_count(&journal.dirty));
    emptied++;
}

static void clean_stop(void)
{
    stopping = true; /* nothing else happens meanwhile */
    stop();
    stopping = false;
}

static void owner_step(void) /* what may also happen while a job runs */
{
    switch (pick(16)) {
    case 0: case 1: case 2: new_op(); break;
    case 3: case 4: case 5: try_enter(); break;
    case 6: if (chance(8)) lose_link(); break;
    case 7: if (chance(4)) make_link(); break;
    case 8: if (chance(3) || mp_journal_wants_barrier(&journal)) begin_barrier(); break;
    case 9: advance_barrier(); break;
    case 10: case 11: mend(); break;
    case 12: if (chance(8)) merge_from_peer(); break;
    default: advance(&ops[pick(OPS)]); break;
    }
}

static void hook(fake_disk *disk)
{
    if (disk != fake_of(fake_fd(LIVE)))
        return;
    try_crash(disk);
    for (uint64_t n = stopping ? 0 : pick(4); n--;)
        owner_step();
    if (!draining && chance(60)) {
        fake_cut cut = any_cut();
        pending_cut = 1 + (int)cut;
        fake_crash(&cut_disk, disk, FAKE_KILLED, &rng);
        disk->dead = true;
    }
}

/* Everything that waits gets on: slots come back, the first in line is not passed by for ever. */
static void drain(void)
{
    draining = true;
    make_link();
    for (int round = 0;; round++) {
        bool busy = in_order > 0;
        for (op *o = ops; o < ops + OPS; o++)
            busy |= o->state != NOTHING;
        if (!busy)
            break;
        if (round > 2000)
            fail("M5: writes wait for slots for ever (%u wait, wants a barrier: %d)", in_order, mp_journal_wants_barrier(&journal));
        try_enter();
        for (op *o = ops; o < ops + OPS; o++)
            advance(o);
        run_job();
        finish_job();
        make_job();
        if (mp_journal_wants_barrier(&journal))
            begin_barrier();
        advance_barrier();
    }
    run_job();
    finish_job();
}

static void run_seed(uint64_t steps)
{
    rng = seed;
    memset(model, 0, sizeof model);
    memset(touched, 0, sizeof touched);
    draining = false;
    job = NULL;
    forget();
    fake_disk *disk = fake_of(fake_fd(LIVE));
    fake_make(disk, MP_JOURNAL_BITMAP + mp_ceil_div(EXTENTS, MP_JOURNAL_PAGE_EXTENTS) * MP_JOURNAL_PAGE);
    mp_actlog_begin(disk->now + MP_JOURNAL_LOG);
    mp_actlog_seal(disk->now + MP_JOURNAL_LOG, 0);
    memcpy(disk->durable, disk->now, disk->size);
    for (uint32_t i = 0; i < PLACES; i++)
        place[i] = i == 0 ? 0 : i == 1 ? EXTENTS - RUN : (uint32_t)pick(EXTENTS - RUN);
    open_on(&journal, LIVE);
    fake_hook = hook;
    for (step = 0; step < steps; step++) {
        switch (pick(24)) {
        case 0: case 1: make_job(); break;
        case 2: case 3: run_job(); break;
        case 4: case 5: finish_job(); break;
        case 6: if (chance(400)) crash(disk, any_cut()); break;
        case 7: if (chance(60)) clean_stop(); break;
        default: owner_step(); break;
        }
    }
    drain();
    try_crash(disk);
    fake_hook = NULL;
    mp_journal_close(&journal);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, count = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    uint64_t steps = argc > 3 ? strtoull(argv[3], NULL, 0) : 4000;
    for (seed = first; seed < first + count; seed++)
        run_seed(steps);
    printf("%llu crashes looked at, %llu real ones, %llu jobs, %llu writes, %llu blocks mended, %llu clean stops\n", (unsigned long long)checks,
           (unsigned long long)cuts, (unsigned long long)jobs, (unsigned long long)entered, (unsigned long long)cleared, (unsigned long long)emptied);
    for (unsigned i = 0; i < FAKE_DISKS; i++)
        fake_free(fake_of(fake_fd(i)));
    fake_free(&cut_disk);
    if (!checks || !cuts || !jobs || !entered || !cleared || !emptied) {
        printf("something was never tried: more seeds or steps\n");
        return 2;
    }
    return 0;
}
