/* flight.c - see flight.h. */
#include "flight.h"

void mp_flight_init(mp_flight *flight)
{
    flight->count = 0;
    for (uint32_t i = 0; i < MP_FLIGHT_MAX; i++)
        flight->place_of[i] = flight->index_of[i] = (uint16_t)i;
}

bool mp_flight_overlaps(const mp_flight *flight, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    unsigned hit = 0;
    for (uint32_t i = 0; i < flight->count; i++) /* without a branch, so that it becomes vector code */
        hit |= (unsigned)(flight->begin[i] < end) & (unsigned)(offset < flight->end[i]);
    return hit;
}

uint16_t mp_flight_enter(mp_flight *flight, uint64_t offset, uint64_t length)
{
    MP_ASSERT(flight->count < MP_FLIGHT_MAX);
    uint32_t index = flight->count++;
    flight->begin[index] = offset;
    flight->end[index] = offset + length;
    return flight->place_of[index]; /* the handles behind `count` are the free ones */
}

void mp_flight_leave(mp_flight *flight, uint16_t handle)
{
    uint32_t index = flight->index_of[handle], last = --flight->count;
    MP_ASSERT(index <= last && flight->place_of[index] == handle);
    uint16_t moved = flight->place_of[last];
    flight->begin[index] = flight->begin[last];
    flight->end[index] = flight->end[last];
    flight->place_of[index] = moved;
    flight->index_of[moved] = (uint16_t)index;
    flight->place_of[last] = handle;
    flight->index_of[handle] = (uint16_t)last;
}
