/* helper.h - runs the copy engine in a child process of its own.
 *
 * Why a process: mapped scanning is the fastest way to read a warm image (scan.h), and a mapped page that loses its backing
 * raises SIGBUS. The handler for that must not be put into somebody else's Python. The child is forked, never runs Python,
 * never returns into it, and holds only the descriptors it needs. It costs about a millisecond.
 *
 * The child starts threads and allocates, although the parent may have had other threads at the fork. glibc makes its malloc
 * safe for that; another allocator may not (ASan's: its lock was held at the fork, and the child hung). So the caller sees
 * to it that none of its threads allocates during mp_helper_start: _core.pyx calls it with the GIL held.
 *
 * Contract: the parent keeps its descriptors and closes them; it polls, and reaps through mp_helper_close, which also ends
 * a child that still runs. If the parent dies the child is killed by the kernel (PR_SET_PDEATHSIG).
 */
#ifndef MP_HELPER_H
#define MP_HELPER_H

#include "base.h"
#include "copy.h"

typedef struct mp_helper {
    int pid, pid_fd, range_fd, cancel_fd;
    mp_shared *shared;
} mp_helper;

typedef enum mp_arrangement { MP_LOCAL, MP_SOURCE, MP_TARGET } mp_arrangement;

/* 0, or an errno. `copy` is a filled-in configuration; range_fd, cancel_fd and shared are set here. */
int mp_helper_start(mp_helper *helper, const mp_copy *copy, mp_arrangement arrangement);

/* Waits up to timeout_ms: bit 0: it has ended, bit 1: ranges can be read from range_fd. */
unsigned mp_helper_poll(mp_helper *helper, int timeout_ms);
void mp_helper_cancel(mp_helper *helper);
/* Ends and reaps the child; the outcome stays readable in *fault. Idempotent. */
void mp_helper_close(mp_helper *helper, mp_fault *fault);

#endif
