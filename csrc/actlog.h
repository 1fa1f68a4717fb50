/* actlog.h - a record of the activity log: the whole table of hot extents, and which record of the ring counts after a crash.
 *
 * Layout, little-endian: magic "MPRACTLG" 8, sequence 8, count 4, zero 4, XXH3-128 16 (low half first, over the record with
 * these 16 bytes zero), zeros up to 64, then 1024 x 4: extent number + 1, or 0 for a free place; zeros up to 8192. A record
 * lies at place `sequence % 4` of the ring. `init` writes the empty record of sequence 0.
 *
 * Contract: pure, no system calls. What is read is hostile: everything is checked before it is believed.
 */
#ifndef MP_ACTLOG_H
#define MP_ACTLOG_H

#include "base.h"

#define MP_ACTLOG_TABLE 1024u  /* extents that a record has room for */
#define MP_ACTLOG_RECORD 8192u /* bytes; half is padding, which keeps records apart on any sector size */
#define MP_ACTLOG_PLACES 4u

typedef struct mp_actlog_place {
    bool valid, blank; /* blank: all bytes are zero */
    uint64_t sequence;
} mp_actlog_place;

void mp_actlog_begin(uint8_t *record); /* an empty table */
void mp_actlog_put(uint8_t *record, uint32_t index, uint32_t extent);
void mp_actlog_seal(uint8_t *record, uint64_t sequence); /* last of all; may be repeated with another sequence */

/* What lies at that place of a volume of so many extents. Zeroes the record's digest. */
mp_actlog_place mp_actlog_check(uint8_t *record, uint32_t place, uint32_t extents);
/* Of a record that was checked: whether that index holds an extent, and which. */
bool mp_actlog_get(const uint8_t *record, uint32_t index, uint32_t *extent);
/* The place of the record that counts, or MP_ACTLOG_PLACES if none can be believed (M7). */
uint32_t mp_actlog_newest(const mp_actlog_place places[MP_ACTLOG_PLACES]);

#endif
