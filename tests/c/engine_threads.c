/* engine_threads.c - two whole engines joined by a socket, NBD clients in threads of their own, and a life of accidents.
 *
 * Use: engine_threads FOLDER SEED STEPS. Two volumes per node; four clients (player.h) play on the primary all the time,
 * while this thread cuts the link, detaches it, kills and reopens either node, grants "alone", attaches again (now and then
 * in the middle of a resync) and lets the nodes change roles. Meant for the thread sanitizer and the address sanitizer; but
 * what it checks is true without them:
 *  - no confirmed write is lost, no read sees what was never there (player.c);
 *  - whenever all is in sync, both images are equal byte by byte and equal to what the clients know, and no bit is left;
 *  - nobody waits for ever, and nothing is reported that did not happen.
 */
#define _GNU_SOURCE
#include "actlog.h"
#include "engine.h"
#include "fakedisk.h"
#include "player.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define VOLUMES 2u
#define PLAYERS 4u
#define PATIENCE_MS 120000
#define FOR_EVER INT64_MAX

typedef struct node {
    const char *name;
    int image[VOLUMES], meta[VOLUMES];
    mp_engine *engine;
    bool lost, need, flushed;    /* since they were last cleared */
    unsigned merged, mended;     /* volumes, since the last attach */
    unsigned clients[VOLUMES], came[VOLUMES], given[VOLUMES];
    uint64_t token;
} node;

static const struct { uint64_t size; uint32_t block; } volumes[VOLUMES] = {{(5u << 20) + 777, 4096}, {(40u << 20) + 4096 + 1, 65536}};
static node nodes[2] = {{.name = "a"}, {.name = "b"}};
static node *primary = &nodes[0], *secondary = &nodes[1];
static player players[PLAYERS];
static uint64_t session, epoch, rng;
static int near_end = -1, far_end = -1; /* duplicates of the link's ends */
static unsigned count_cut, count_alone, count_killed, count_swapped, count_synced;

/* --- the nodes --- */

static int make_file(const char *folder, const char *name, uint64_t size)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
        die("%s: %s", path, strerror(errno));
    return fd;
}

static void make_node(node *n, const char *folder)
{
    for (unsigned v = 0; v < VOLUMES; v++) {
        char name[32];
        snprintf(name, sizeof name, "%s.%u.img", n->name, v);
        n->image[v] = make_file(folder, name, volumes[v].size);
        uint64_t blocks = mp_ceil_div(volumes[v].size, volumes[v].block), bitmap = mp_ceil_div(blocks, 64) * 8;
        snprintf(name, sizeof name, "%s.%u.meta", n->name, v);
        n->meta[v] = make_file(folder, name, MP_JOURNAL_BITMAP + mp_ceil_div(bitmap, MP_JOURNAL_PAGE) * MP_JOURNAL_PAGE);
        uint8_t record[MP_ACTLOG_RECORD];
        mp_actlog_begin(record);
        mp_actlog_seal(record, 0);
        if (pwrite(n->meta[v], record, sizeof record, (off_t)MP_JOURNAL_LOG) != sizeof record)
            die("metadata: %s", strerror(errno));
    }
}

static void open_node(node *n)
{
    mp_engine_volume given[VOLUMES];
    mp_fault fault;
    for (unsigned v = 0; v < VOLUMES; v++)
        given[v] = (mp_engine_volume){n->image[v], n->meta[v], volumes[v].size, volumes[v].block};
    n->lost = n->need = false;
    n->merged = n->mended = 0;
    memset(n->clients, 0, sizeof n->clients);
    memset(n->came, 0, sizeof n->came);
    memset(n->given, 0, sizeof n->given);
    if (!(n->engine = mp_engine_open(given, VOLUMES, &fault)))
        die("node %s does not open: %s", n->name, fault.text);
    int error = mp_engine_start(n->engine);
    if (error)
        die("node %s does not start: %s", n->name, strerror(error));
}

static mp_command *command(mp_command_kind kind)
{
    mp_command *made = mp_command_new(kind, 0);
    if (!made)
        die("out of memory");
    return made;
}

static void grant(node *n, mp_grant_mode mode)
{
    mp_command *c = command(MP_COMMAND_GRANT);
    c->grant = (mp_grant){epoch, (uint64_t)FOR_EVER, mode, mode == MP_GRANT_PEER ? MP_COVER_READS | MP_COVER_HOLD : 0};
    mp_engine_post(n->engine, c);
}

/* --- events --- */

static void take_events(node *n)
{
    for (mp_event *e; (e = mp_engine_take(n->engine)); free(e))
        switch (e->kind) {
        case MP_EVENT_LINK_LOST:
            if (e->a == session) {
                n->lost = true;
                if (near_end >= 0 && strstr(e->text, "garbage"))
                    die("node %s: %s", n->name, e->text);
            }
            break;
        case MP_EVENT_NEED_GENERATION: n->need = true; break;
        case MP_EVENT_BITS_MERGED: n->merged |= 1u << e->a; break;
        case MP_EVENT_RESYNC_DONE: n->mended |= 1u << e->a; break;
        case MP_EVENT_CLIENT:
            n->came[e->a] += strcmp(e->text, "came") == 0;
            n->clients[e->a] = (unsigned)e->b;
            break;
        case MP_EVENT_FLUSHED:
            if (e->b)
                die("node %s: a barrier failed: %s", n->name, strerror((int)e->b));
            n->flushed = n->flushed || e->a == n->token;
            break;
        case MP_EVENT_CLIENTS_CLOSED:
        case MP_EVENT_CLIENTS_QUIET:
        case MP_EVENT_SAVED: break;
        case MP_EVENT_DISK_ERROR:
        case MP_EVENT_JOURNAL_ERROR: die("node %s: event %d: %s", n->name, e->kind, e->text);
        }
}

/* Connections for those who wish one: one at a time, and only once nothing of an earlier one is left on the volume. */
static void serve_wishes(void)
{
    pthread_mutex_lock(&stage.lock);
    for (unsigned v = 0; v < VOLUMES; v++) {
        unsigned alive = 0;
        player *first = NULL;
        for (unsigned i = 0; i < PLAYERS; i++)
            if (players[i].volume == v) {
                if (players[i].wants)
                    first = first ? first : &players[i];
                else
                    alive += !players[i].left;
            }
        if (!first || primary->came[v] != primary->given[v] || primary->clients[v] != alive)
            continue;
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
            die("socketpair: %s", strerror(errno));
        mp_command *c = command(MP_COMMAND_CLIENT);
        c->fd = ends[1];
        c->volume = v;
        primary->given[v]++;
        mp_engine_post(primary->engine, c);
        first->wants = false;
        first->given = ends[0];
        first->given_at = atomic_load(&stage.kills);
        pthread_cond_broadcast(&stage.changed);
    }
    pthread_mutex_unlock(&stage.lock);
}

static void look(void)
{
    struct pollfd watched[3] = {{nodes[0].engine->event_fd, POLLIN, 0}, {nodes[1].engine->event_fd, POLLIN, 0}, {stage.progress_fd, POLLIN, 0}};
    int found = poll(watched, 3, PATIENCE_MS);
    if (found == 0)
        die("nothing happens any more");
    uint64_t count;
    (void)!read(stage.progress_fd, &count, sizeof count);
    for (unsigned i = 0; i < 2; i++) {
        mp_volume_status status;
        mp_link_status link;
        take_events(&nodes[i]);
        mp_engine_status(nodes[i].engine, i, &status, &link);
        (void)mp_engine_dirty(nodes[i].engine, i);
        (void)mp_engine_busy_ns(nodes[i].engine);
    }
    serve_wishes();
}

static void wait_answers(uint64_t more)
{
    uint64_t until = atomic_load(&stage.answers) + more;
    while (atomic_load(&stage.answers) < until)
        look();
}

static void pause_clients(node *n, bool pause)
{
    mp_command *c = command(MP_COMMAND_PAUSE_CLIENTS);
    c->flag = pause;
    mp_engine_post(n->engine, c);
}

/* Its clients are paused meanwhile, and have to go on afterwards. */
static void fence(node *n)
{
    mp_command *c = command(MP_COMMAND_BARRIER);
    pause_clients(n, true);
    n->flushed = false;
    c->token = ++n->token;
    mp_engine_post(n->engine, c);
    while (!n->flushed)
        look();
    pause_clients(n, false);
}

/* --- the link --- */

static void attach_one(node *n, int fd, bool source, mp_plan plan)
{
    mp_command *c = command(MP_COMMAND_ATTACH);
    if (!mp_chan_init(&c->chan, fd, fd, session))
        die("no channel");
    c->fd = fd;
    c->flag = source;
    c->grant.epoch = epoch;
    c->timeout_ns = (uint64_t)PATIENCE_MS * 1000000u;
    for (unsigned v = 0; v < VOLUMES; v++)
        c->plan[v] = (uint8_t)plan;
    n->lost = false;
    n->merged = n->mended = 0;
    mp_engine_post(n->engine, c);
}

static void attach(void)
{
    int ends[2];
    mp_plan plan = one_in(&rng, 5) ? MP_PLAN_FULL : MP_PLAN_BITMAP;
    session++;
    epoch++;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0 || (near_end = fcntl(ends[0], F_DUPFD_CLOEXEC, 0)) < 0 || (far_end = fcntl(ends[1], F_DUPFD_CLOEXEC, 0)) < 0)
        die("socketpair: %s", strerror(errno));
    if (one_in(&rng, 2))
        grant(primary, MP_GRANT_PEER);
    attach_one(secondary, ends[1], false, plan);
    attach_one(primary, ends[0], true, plan);
    grant(primary, MP_GRANT_PEER);
    grant(secondary, MP_GRANT_NONE);
}

static void let_go(void)
{
    close(near_end);
    close(far_end);
    near_end = far_end = -1;
}

/* The session has ended at both, and no event of it can follow. */
static void cut(void)
{
    unsigned how = (unsigned)below(&rng, 3);
    count_cut++;
    if (how == 0) {
        shutdown(near_end, SHUT_RDWR);
        while (!primary->lost || !secondary->lost)
            look();
    } else {
        mp_engine_post((how == 1 ? primary : secondary)->engine, command(MP_COMMAND_DETACH));
        while (!(how == 1 ? secondary : primary)->lost)
            look();
    }
    let_go();
}

static void kill_node(node *n)
{
    node *other = n == primary ? secondary : primary;
    count_killed++;
    if (n == primary)
        atomic_fetch_add(&stage.kills, 1);
    if (near_end >= 0)
        other->lost = false;
    mp_engine_close(n->engine);
    if (near_end >= 0)
        shutdown(near_end, SHUT_RDWR); /* a process that is gone has no socket open; what it had not attached yet, ours would keep */
    open_node(n);
    grant(n, MP_GRANT_NONE);
    while (near_end >= 0 && !other->lost)
        look();
    if (near_end >= 0)
        let_go();
}

/* --- what must hold --- */

static void read_at(int fd, uint8_t *to, uint64_t length, uint64_t offset)
{
    while (length) {
        ssize_t got = pread(fd, to, length, (off_t)offset);
        if (got <= 0)
            die("an image cannot be read");
        to += got;
        offset += (uint64_t)got;
        length -= (uint64_t)got;
    }
}

static void compare_images(void)
{
    for (unsigned v = 0; v < VOLUMES; v++) {
        uint64_t size = volumes[v].size;
        uint8_t *mine = malloc(size), *theirs = malloc(size);
        read_at(primary->image[v], mine, size, 0);
        read_at(secondary->image[v], theirs, size, 0);
        for (uint64_t i = 0; i < size; i++)
            if (mine[i] != theirs[i])
                die("volume %u: byte %llu is %02x at the primary (%s) and %02x at the secondary", v, (unsigned long long)i, mine[i], primary->name, theirs[i]);
        for (unsigned i = 0; i < PLAYERS; i++) {
            const player *p = &players[i];
            if (p->volume == v && memcmp(mine + p->base, p->model, p->length) != 0)
                die("volume %u is not what player %u wrote", v, i);
        }
        if (mp_engine_dirty(primary->engine, v) || mp_engine_dirty(secondary->engine, v))
            die("volume %u: bits are left: %llu and %llu", v, (unsigned long long)mp_engine_dirty(primary->engine, v), (unsigned long long)mp_engine_dirty(secondary->engine, v));
        free(mine);
        free(theirs);
    }
}

static void wait_in_sync(void)
{
    unsigned all = (1u << VOLUMES) - 1;
    while (primary->mended != all || secondary->mended != all) {
        if (primary->lost || secondary->lost)
            die("the link was lost by itself");
        look();
    }
    if (primary->merged != all || secondary->merged != all)
        die("in sync, but bits were never merged");
    count_synced++;
}

static void start_players(void)
{
    atomic_store(&stage.stop, false);
    for (unsigned i = 0; i < PLAYERS; i++) {
        player *p = &players[i];
        unsigned v = i % VOLUMES;
        uint64_t half = volumes[v].size / 2 + 333;
        uint8_t *model = p->model;
        *p = (player){.number = i, .volume = v, .random = next_random(&rng), .base = i / VOLUMES ? half : 0, .length = i / VOLUMES ? volumes[v].size - half : half};
        p->wants = true; /* in its stead, so that nobody counts it as alive before it has begun */
        player_start(p, model);
    }
}

/* Everybody finishes, all becomes equal, and now and then the nodes change roles. */
static void interval(void)
{
    if (near_end < 0)
        attach();
    atomic_store(&stage.stop, true);
    bool left = false;
    while (!left) {
        look();
        pthread_mutex_lock(&stage.lock);
        left = true;
        for (unsigned i = 0; i < PLAYERS; i++)
            left = left && players[i].left;
        pthread_mutex_unlock(&stage.lock);
    }
    for (unsigned i = 0; i < PLAYERS; i++)
        player_join(&players[i]);
    while (primary->came[0] != primary->given[0] || primary->came[1] != primary->given[1] || primary->clients[0] || primary->clients[1])
        look();
    wait_in_sync();
    fence(primary);
    compare_images();
    cut();
    if (one_in(&rng, 2)) {
        node *swap = primary;
        primary = secondary;
        secondary = swap;
        count_swapped++;
    }
    fence(primary); /* nothing of the old session can follow */
    fence(secondary);
}

static void step(void)
{
    if (near_end < 0)
        attach();
    if (one_in(&rng, 3))
        wait_in_sync();
    wait_answers(1 + below(&rng, 200));
    uint64_t what = below(&rng, 6);
    if (what == 0)
        kill_node(primary);
    else if (what == 1)
        kill_node(secondary);
    else
        cut();
    if (one_in(&rng, 2)) {
        count_alone++;
        primary->need = false;
        epoch++;
        grant(primary, MP_GRANT_ALONE_FIRST);
        while (!primary->need)
            look();
        grant(primary, MP_GRANT_ALONE);
        wait_answers(1 + below(&rng, 300));
        if (one_in(&rng, 4)) {
            kill_node(primary);
            grant(primary, MP_GRANT_ALONE);
            wait_answers(1 + below(&rng, 100));
        }
        if (one_in(&rng, 4)) {
            grant(primary, MP_GRANT_NONE);
            fence(primary);
        }
    }
    if (one_in(&rng, 2)) { /* or a session may still end while the next one begins */
        fence(primary);
        fence(secondary);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        die("use: engine_threads FOLDER SEED STEPS");
    rng = strtoull(argv[2], NULL, 0);
    uint64_t steps = strtoull(argv[3], NULL, 0);
    stage.progress_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (unsigned i = 0; i < 2; i++) {
        make_node(&nodes[i], argv[1]);
        open_node(&nodes[i]);
    }
    while (steps) {
        start_players();
        uint64_t part = mp_min(steps, 1 + below(&rng, 8));
        for (uint64_t i = 0; i < part; i++)
            step();
        steps -= part;
        interval();
    }
    for (unsigned i = 0; i < 2; i++) {
        mp_engine_close(nodes[i].engine);
        for (unsigned v = 0; v < VOLUMES; v++) {
            close(nodes[i].image[v]);
            close(nodes[i].meta[v]);
        }
    }
    for (unsigned i = 0; i < PLAYERS; i++)
        free(players[i].model);
    close(stage.progress_fd);
    printf("%llu answers, %u cuts, %u times alone, %u kills, %u in sync, %u changes of role\n", (unsigned long long)atomic_load(&stage.answers), count_cut, count_alone, count_killed,
           count_synced, count_swapped);
    return 0;
}
