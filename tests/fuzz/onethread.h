/* onethread.h - a whole engine in one thread, in an order that the input alone decides.
 *
 * The program is linked with --wrap for what makes threads, time and sleep (ONETHREAD_WRAPS in tests/native.py):
 *  - a pool's jobs run where `one_job` is called, any of those that real threads could have in hand;
 *  - the clock stands still until `one_pass` moves it;
 *  - where the engine's loop would sleep, `idle` is called instead: the fuzzer's next move. It ends with `one_stop`.
 * So a run is repeated exactly by its input, and every interleaving of jobs, frames, answers and time-outs can be found.
 */
#ifndef ONETHREAD_H
#define ONETHREAD_H

#include "engine.h"
#include "fuzz.h"

#define ONE_VOLUMES 2u

typedef struct one_node {
    int image[ONE_VOLUMES], meta[ONE_VOLUMES];
    uint64_t size[ONE_VOLUMES];
    uint32_t block[ONE_VOLUMES];
    mp_engine *engine;
    /* from its events */
    unsigned came, clients;     /* connections on all volumes: ever, and now */
    bool need;                  /* NEED_GENERATION */
    uint64_t lost;              /* the last session whose end was told, and why */
    char why[256];
    unsigned merged, mended;    /* volumes, as bits */
    uint64_t flushed;           /* the last token */
    int64_t flushed_error;
} one_node;

/* Empty metadata, images filled with `fill`; the engine is opened and not run yet. */
void one_open(one_node *node, const uint64_t *sizes, const uint32_t *blocks, uint8_t fill);
/* The loop, with `idle` wherever it would sleep; until one_stop. */
void one_run(one_node *node, void (*idle)(void));
void one_stop(one_node *node);
/* Looks for leaks of requests, buffers and ranges if nothing is left to do; frees all. */
void one_close(one_node *node);

unsigned one_jobs(void);          /* how many could run now */
void one_job(unsigned which);     /* runs one of them */
void one_pass(uint64_t ns);       /* time */
void one_events(one_node *node);  /* takes what the engine tells */
mp_command *one_command(mp_command_kind kind);
void one_grant(one_node *node, mp_grant_mode mode);
int one_client(one_node *node, unsigned volume, bool read_only); /* the client's end of a new connection, which does not block */
void one_read(one_node *node, unsigned volume, uint8_t *to); /* the whole image */
/* Whether all has come to rest: no request, job or client in hand. */
bool one_rests(const one_node *node);

#endif
