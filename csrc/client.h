/* client.h - what serve.c (the connection) and longread.c (reads in pieces) share: one NBD client after its negotiation. */
#ifndef MP_CLIENT_H
#define MP_CLIENT_H

#include "engine.h"

#define MP_CLIENT_INPUT (64u << 10)

struct mp_client {
    mp_client *next, **self;
    mp_client *next_touched;
    bool touched;
    mp_engine *engine;
    mp_volume *volume;
    int fd;
    bool read_only, closing, dead, again; /* closing: no more is read; dead: no more is sent; again: unread bytes are here */
    uint32_t input_at, input_end;
    mp_request *receiving; /* a WRITE whose payload is coming */
    uint64_t got;
    uint64_t drain; /* bytes of a refused payload still to come */
    mp_request *refused; /* the WRITE that they belong to: answered behind them */
    uint32_t in_hand;     /* requests read and not yet answered into `answers`, and pieces on their way */
    uint64_t outstanding; /* payload bytes of writes not yet answered and sent */
    uint64_t reads;       /* what its reads hold of the slab */
    uint32_t requests;    /* in hand, and answers not yet sent */
    mp_list answers;
    uint64_t sent;        /* bytes of the first answer that went */
    uint64_t moved_ns;    /* when a byte of an answer or of a payload last moved, or the first was due */
    /* long reads that have not stood in `answers` to their end, oldest first; what follows is the first one's */
    mp_list whole;
    uint64_t asked, put;  /* of its bytes: those whose pieces were started; those that stand in `answers`, or were sent */
    uint32_t pieces;      /* on their way */
    bool opened;          /* its header stands in `answers`: nothing else may come in front of its last piece */
    mp_list ready;        /* pieces that were read, in any order */
    mp_list later;        /* answers to others, meanwhile */
    uint8_t input[MP_CLIENT_INPUT];
};

/* --- serve.c --- */
void mp_client_touch(mp_client *client); /* the round looks at it */
void mp_client_drop(mp_client *client);  /* nothing more is exchanged with it; what is in hand ends without it */
void mp_client_put(mp_client *client, mp_request *answer); /* behind those that are to be sent */

/* --- longread.c --- */
/* Whether it may hold so much more for reads. False: not before it has taken some, or, with `starved`, others have. */
bool mp_client_may_read(mp_client *client, uint64_t length);
void mp_long_init(mp_client *client);
void mp_long_begin(mp_request *read); /* it was judged, and has no buffer */
void mp_long_arrived(mp_request *piece); /* read, or it failed */
void mp_long_pump(mp_client *client); /* starts pieces and puts what has come into `answers`; may drop the client */
void mp_long_drop(mp_client *client);

#endif
