/* guard.h - turns the SIGBUS of a mapped image into a return value.
 *
 * A mapped page that has no backing any more (the file shrank, the disk failed, the file system is full under a store)
 * raises SIGBUS in the thread that touches it. mp_guard_install() puts a handler for the whole process, so it is called
 * only in the helper process, where no Python runs and nobody else's handler can be displaced.
 *
 * A guarded body must not hold a lock or own an allocation at a point where it touches mapped memory: it is left by
 * siglongjmp. Guards nest; the innermost catches.
 */
#ifndef MP_GUARD_H
#define MP_GUARD_H

#include "base.h"

void mp_guard_install(void);

/* Runs body(argument). True if it returned, false if it hit SIGBUS: *address is then what it touched. */
bool mp_guard_call(void (*body)(void *), void *argument, const void **address);

#endif
