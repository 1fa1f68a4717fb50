/* actlog.c - see actlog.h. */
#include "actlog.h"

#include "digest.h"

#define AT_SEQUENCE 8
#define AT_COUNT 16
#define AT_DIGEST 24
#define AT_TABLE 64
#define SEQUENCE_MAX (UINT64_MAX / 2) /* no honest file gets there */

static const char MAGIC[8] = "MPRACTLG";

static mp_digest digest_of(uint8_t *record)
{
    memset(record + AT_DIGEST, 0, 16);
    return mp_digest128(record, MP_ACTLOG_RECORD, 0);
}

void mp_actlog_begin(uint8_t *record)
{
    memset(record, 0, MP_ACTLOG_RECORD);
    memcpy(record, MAGIC, sizeof MAGIC);
}

void mp_actlog_put(uint8_t *record, uint32_t index, uint32_t extent)
{
    MP_ASSERT(index < MP_ACTLOG_TABLE && extent < UINT32_MAX && !mp_load32(record + AT_TABLE + 4 * index));
    mp_store32(record + AT_TABLE + 4 * index, extent + 1);
    mp_store32(record + AT_COUNT, mp_load32(record + AT_COUNT) + 1);
}

void mp_actlog_seal(uint8_t *record, uint64_t sequence)
{
    MP_ASSERT(sequence <= SEQUENCE_MAX);
    mp_store64(record + AT_SEQUENCE, sequence);
    mp_digest_store(record + AT_DIGEST, digest_of(record));
}

bool mp_actlog_get(const uint8_t *record, uint32_t index, uint32_t *extent)
{
    uint32_t stored = mp_load32(record + AT_TABLE + 4 * index);
    *extent = stored - 1;
    return stored != 0;
}

mp_actlog_place mp_actlog_check(uint8_t *record, uint32_t place, uint32_t extents)
{
    mp_actlog_place bad = {.blank = mp_is_zero(record, MP_ACTLOG_RECORD)};
    mp_digest said = mp_digest_load(record + AT_DIGEST);
    if (memcmp(record, MAGIC, sizeof MAGIC) || !mp_digest_equal(digest_of(record), said))
        return bad;
    uint64_t sequence = mp_load64(record + AT_SEQUENCE);
    if (sequence >= SEQUENCE_MAX - MP_ACTLOG_PLACES || sequence % MP_ACTLOG_PLACES != place)
        return bad;
    uint32_t count = 0, extent;
    for (uint32_t i = 0; i < MP_ACTLOG_TABLE; i++)
        if (mp_actlog_get(record, i, &extent)) {
            count++;
            if (extent >= extents)
                return bad;
        }
    if (count != mp_load32(record + AT_COUNT))
        return bad;
    return (mp_actlog_place){.valid = true, .sequence = sequence};
}

uint32_t mp_actlog_newest(const mp_actlog_place places[MP_ACTLOG_PLACES])
{
    uint32_t newest = MP_ACTLOG_PLACES;
    for (uint32_t k = 0; k < MP_ACTLOG_PLACES; k++)
        if (places[k].valid && (newest == MP_ACTLOG_PLACES || places[k].sequence > places[newest].sequence))
            newest = k;
    if (newest == MP_ACTLOG_PLACES)
        return newest;
    /* The place behind it may hold a record that was torn: nothing was written under that one. If the place behind the torn
     * one is unreadable too, there may have been a whole record in one of them, and writes under it. */
    for (uint32_t ahead = 1; ahead <= 2; ahead++) {
        uint32_t k = (newest + ahead) % MP_ACTLOG_PLACES;
        bool never_written = places[k].blank && places[newest].sequence < MP_ACTLOG_PLACES && k > newest;
        if (places[k].valid || never_written)
            return newest;
    }
    return MP_ACTLOG_PLACES;
}
