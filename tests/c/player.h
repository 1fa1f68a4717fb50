/* player.h - a thread that is an NBD client of an engine, and knows what its part of the volume must hold.
 *
 * Rules
 *  - It has several requests in flight, of any offset and length inside its own part; parts of players adjoin inside blocks.
 *  - Every answer is checked: a read against the model as it was when the read was sent (W2: requests of one connection take
 *    effect in the order they came), every other one for success.
 *  - A connection may end only where the program said so (`kills`) or where the player itself hung up. What was in flight
 *    then may have happened or not, in any part; all other bytes must be as they were. The player gets its next connection from
 *    `player_connect`, once nothing of the last one is left in the engine, reads its whole part, and goes on from there.
 *
 * Contract: one thread per player; the program talks to it through `lock` and the flags.
 */
#ifndef PLAYER_H
#define PLAYER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define PLAYER_DEPTH 8u

typedef struct player_flight {
    bool busy;
    uint16_t kind;
    uint64_t offset, length; /* offset inside the part */
    uint8_t *expected;       /* of a read */
} player_flight;

typedef struct player {
    pthread_t thread;
    unsigned number, volume;
    uint64_t base, length; /* the part, bytes */
    uint64_t random, cookie;
    uint8_t *model;
    int fd;
    uint64_t answered_here; /* over this connection */
    player_flight flight[PLAYER_DEPTH];
    uint64_t hung_up, cut_off; /* how often */
    /* shared with the program */
    bool wants;  /* a connection; under the lock. The program sets it before the start */
    bool left;   /* it has ended; under the lock */
    int given;   /* or -1; under the lock */
    unsigned given_at; /* `kills` then */
} player;

typedef struct player_stage {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int progress_fd;            /* an eventfd: one for each answer, and for each wish */
    atomic_bool stop;           /* finish what is in flight and leave */
    atomic_uint kills;          /* grows before each: connections that were given before may end */
    atomic_uint_fast64_t answers;
} player_stage;

extern player_stage stage;

void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2))); /* says why, exit code 1 */
/* number, volume, base, length, random and wants are set; `model`: what the part holds, taken over, or NULL for zeros. */
void player_start(player *p, uint8_t *model);
void player_join(player *p);

#endif
