/* flight.h - which ranges of one volume are being written now, and which requests wait.
 *
 * Rules: W2, A6. Writes, trims, zeroes and blocks under resync hold their range until all members have them; a request
 * that overlaps one that holds, or one that waits in front of it, waits. Reads only wait; but one that has to go to the
 * disk stands in a flight of its own, for which the writes behind it wait.
 *
 * Contract: pure, no system calls, one thread. Ranges are [offset, offset + length) in bytes. A place is an index that
 * stays valid until it is left. The search is a walk through two dense arrays: 16 bytes per range, about 0.3 ns each, so
 * that even MP_FLIGHT_MAX of them cost less than the system calls of one request.
 */
#ifndef MP_FLIGHT_H
#define MP_FLIGHT_H

#include "base.h"

#define MP_FLIGHT_MAX 4096u

typedef struct mp_flight {
    uint64_t begin[MP_FLIGHT_MAX], end[MP_FLIGHT_MAX];
    uint16_t place_of[MP_FLIGHT_MAX]; /* dense index -> handle */
    uint16_t index_of[MP_FLIGHT_MAX]; /* handle -> dense index */
    uint32_t count;
} mp_flight;

void mp_flight_init(mp_flight *flight);
static inline bool mp_flight_full(const mp_flight *flight) { return flight->count == MP_FLIGHT_MAX; }
bool mp_flight_overlaps(const mp_flight *flight, uint64_t offset, uint64_t length);
uint16_t mp_flight_enter(mp_flight *flight, uint64_t offset, uint64_t length); /* there must be room */
void mp_flight_leave(mp_flight *flight, uint16_t handle);

#endif
