/* flight_model.c - csrc/flight.h against a plain list (W2): overlaps, handles that stay valid, the whole table in use.
 *
 * Use: flight_model SEED STEPS. One thread, as the contract says.
 */
#include "fakedisk.h"
#include "flight.h"

typedef struct entry {
    bool used;
    uint64_t begin, end;
} entry;

static mp_flight flight;
static entry model[MP_FLIGHT_MAX]; /* by handle */
static uint32_t count;

static void need(bool holds, const char *what, uint64_t step)
{
    if (!holds) {
        printf("step %llu: %s\n", (unsigned long long)step, what);
        exit(1);
    }
}

static bool overlaps(uint64_t offset, uint64_t length)
{
    for (uint32_t i = 0; i < MP_FLIGHT_MAX; i++)
        if (model[i].used && model[i].begin < offset + length && offset < model[i].end)
            return true;
    return false;
}

int main(int argc, char **argv)
{
    uint64_t rng = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, steps = argc > 2 ? strtoull(argv[2], NULL, 0) : 20000, hits = 0, full = 0;
    mp_flight_init(&flight);
    for (uint64_t step = 0; step < steps; step++) {
        bool growing = step / 6000 % 2 == 0; /* up to a full table and down again */
        uint64_t room = (uint64_t)1 << (14 + below(&rng, 40)), offset = below(&rng, room), length = 1 + below(&rng, 64);
        if (one_in(&rng, 16))
            offset = INT64_MAX - below(&rng, 128); /* the far end of the largest volume */
        bool found = mp_flight_overlaps(&flight, offset, length);
        need(found == overlaps(offset, length), "an overlap is overlooked, or invented", step);
        hits += found;
        need(mp_flight_full(&flight) == (count == MP_FLIGHT_MAX) && flight.count == count, "the count is wrong", step);
        if (!mp_flight_full(&flight) && below(&rng, 8) < (growing ? 7u : 1u)) {
            uint16_t handle = mp_flight_enter(&flight, offset, length);
            need(handle < MP_FLIGHT_MAX && !model[handle].used, "a handle is given twice", step);
            model[handle] = (entry){true, offset, offset + length};
            count++;
        } else if (count) {
            uint16_t handle = (uint16_t)below(&rng, MP_FLIGHT_MAX);
            while (!model[handle].used)
                handle = (uint16_t)((handle + 1) % MP_FLIGHT_MAX);
            mp_flight_leave(&flight, handle);
            model[handle].used = false;
            count--;
        }
        full += mp_flight_full(&flight);
    }
    for (uint32_t i = 0; i < MP_FLIGHT_MAX; i++)
        if (model[i].used)
            mp_flight_leave(&flight, (uint16_t)i);
    need(flight.count == 0, "something is left", steps);
    for (uint32_t i = 0; i < MP_FLIGHT_MAX; i++) /* every handle is free again */
        need(!mp_flight_full(&flight) && mp_flight_enter(&flight, i, 1) < MP_FLIGHT_MAX, "no room", i);
    printf("%llu overlaps, full %llu times\n", (unsigned long long)hits, (unsigned long long)full);
    return hits && (full || steps < 20000) ? 0 : 2;
}
