/* nbd_oracle.h - what may be answered to an NBD request, written from the protocol (doc/proto.md) and not from nbd.c. */
#ifndef NBD_ORACLE_H
#define NBD_ORACLE_H

#include "fuzz.h"

#define NBD_READ 0u
#define NBD_WRITE 1u
#define NBD_DISCONNECT 2u
#define NBD_FLUSH 3u
#define NBD_TRIM 4u
#define NBD_ZEROES 6u

static inline uint64_t nbd_big(const uint8_t *at, unsigned bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | *at++;
    return value;
}

static inline void nbd_put(uint8_t *at, unsigned bytes, uint64_t value)
{
    while (bytes--) {
        at[bytes] = (uint8_t)value;
        value >>= 8;
    }
}

/* Of the request's 28 bytes. All that is wrong with it, as a set: which of them is named is the server's choice. */
static inline bool nbd_may_say(uint32_t error, const uint8_t *raw, uint64_t size, bool read_only)
{
    enum { UNKNOWN, READ, CHANGE, FLUSH };
    static const struct { unsigned kind, flags; bool payload; } commands[] = {
        [NBD_READ] = {READ, 0, true},
        [NBD_WRITE] = {CHANGE, 1, true}, /* FUA */
        [NBD_FLUSH] = {FLUSH, 0, false},
        [NBD_TRIM] = {CHANGE, 1, false}, /* FUA */
        [NBD_ZEROES] = {CHANGE, 1 | 2, false}, /* FUA, NO_HOLE */
    };
    uint64_t flags = nbd_big(raw + 4, 2), type = nbd_big(raw + 6, 2), length = nbd_big(raw + 24, 4);
    unsigned __int128 end = (unsigned __int128)nbd_big(raw + 16, 8) + length;
    bool known = type < sizeof commands / sizeof *commands;
    unsigned kind = known ? commands[type].kind : (unsigned)UNKNOWN, allowed = known ? commands[type].flags : 0;
    bool wrong_flags = (flags & ~(uint64_t)allowed) != 0, unknown = kind == UNKNOWN, ranged = kind == READ || kind == CHANGE;
    bool forbidden = kind == CHANGE && read_only, too_long = ranged && commands[type].payload && length > (32u << 20), empty = ranged && !length, outside = ranged && end > size;
    switch (error) {
    case 0: return !wrong_flags && !unknown && !forbidden && !too_long && !empty && !outside;
    case 1: return forbidden;                                                   /* EPERM */
    case 22: return unknown || wrong_flags || empty || (outside && kind == READ); /* EINVAL */
    case 28: return outside && kind == CHANGE;                                  /* ENOSPC */
    case 75: return too_long;                                                   /* EOVERFLOW */
    default: return false;
    }
}

#endif
