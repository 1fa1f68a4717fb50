/* fuzz_journal.c - a volume's journal opened on a hostile file (M7): nothing breaks, no bit is overlooked, opening again is safe.
 *
 * Input: block size u8, blocks u16, length of the file in KiB less than whole u8, then for each of the four places of the ring
 * what stands there (see `make_record`), then the bitmap's words.
 */
#define _GNU_SOURCE
#include "actlog.h"
#include "digest.h"
#include "fuzz.h"
#include "journal.h"

#include <sys/mman.h>
#include <unistd.h>

#define RECORD 8192u
#define BITMAP 65536u
#define EXTENTS_MAX 2048u

typedef struct place {
    bool valid;
    uint64_t sequence;
    uint64_t extents[EXTENTS_MAX / 64]; /* as bits */
} place;

/* What the layout calls a valid record, read by another hand. */
static place read_record(const uint8_t *record, unsigned number, uint32_t extents)
{
    place p = {0};
    uint8_t copy[RECORD];
    memcpy(copy, record, RECORD);
    memset(copy + 24, 0, 16);
    mp_digest digest = mp_digest128(copy, RECORD, 0), said = mp_digest_load(record + 24);
    uint32_t count = 0;
    bool good = memcmp(record, "MPRACTLG", 8) == 0 && digest.low == said.low && digest.high == said.high;
    p.sequence = mp_load64(record + 8);
    for (unsigned i = 0; i < 1024; i++) {
        uint32_t named = mp_load32(record + 64 + 4 * i);
        count += named != 0;
        if (named > extents)
            good = false;
        else if (named)
            p.extents[(named - 1) / 64] |= 1ull << ((named - 1) % 64);
    }
    p.valid = good && count == mp_load32(record + 16) && p.sequence % 4 == number && p.sequence < INT64_MAX - 4;
    return p;
}

/* kind 0: nothing, 1: any bytes, else a record with a digest that holds and: sequence, how far its count lies, extents. */
static void make_record(fuzz_input *in, uint8_t *record, unsigned number)
{
    uint8_t kind = (uint8_t)fuzz_number(in, 1);
    memset(record, 0, RECORD);
    if (kind == 0)
        return;
    uint64_t sequence = kind & 64 ? fuzz_number(in, 8) : fuzz_number(in, 1) * 4 + number;
    unsigned named = (unsigned)fuzz_number(in, 1), lie = kind & 32 ? (unsigned)fuzz_number(in, 1) : 0;
    memcpy(record, "MPRACTLG", 8);
    mp_store64(record + 8, sequence);
    mp_store32(record + 16, named + lie);
    for (unsigned i = 0; i < named; i++) /* 0, a free place, too */
        mp_store32(record + 64 + 4 * ((i * 37) % 1024), (uint32_t)fuzz_number(in, kind & 16 ? 4 : 1));
    if (!(kind & 32)) {
        uint32_t count = 0;
        for (unsigned i = 0; i < 1024; i++)
            count += mp_load32(record + 64 + 4 * i) != 0;
        mp_store32(record + 16, count);
    }
    mp_digest_store(record + 24, mp_digest128(record, RECORD, 0));
    if (kind & 8)
        record[fuzz_number(in, 2) % RECORD] ^= 1; /* torn */
}

static void finish_all(mp_journal *j, uint64_t ticket)
{
    for (mp_job *job; !mp_journal_reached(j, ticket);) {
        FUZZ_NEED((job = mp_journal_job(j)) != NULL);
        job->run(job, NULL);
        FUZZ_NEED(mp_journal_finished(j, job) == 0);
    }
}

/* Opened once more, at some point: never fewer bits than there must be. That the log can be believed is promised only if the
 * ring was whole to begin with: beside places that no honest program left so, two unreadable ones are soon together. */
static void use(mp_journal *j, int fd, uint64_t size, uint32_t block, bool whole)
{
    mp_fault fault;
    uint64_t blocks = j->dirty.bits, words = (blocks + 63) / 64, *before = malloc(words * 8);
    mp_journal again;
    for (unsigned tries = 0; !mp_journal_enter(j, size - 1, 1); tries++) { /* M4: a record is written first */
        mp_job *job = mp_journal_job(j);
        FUZZ_NEED(job && tries < 100);
        job->run(job, NULL);
        FUZZ_NEED(mp_journal_finished(j, job) == 0);
    }
    FUZZ_NEED(mp_journal_open(&again, fd, size, block, &fault) == MP_OK && mp_bitmap_test(&again.dirty, blocks - 1)); /* as after a crash now */
    FUZZ_NEED(!whole || !again.lost_log);
    for (uint64_t i = 0; i < words; i++)
        FUZZ_NEED((j->dirty.words[i] & ~again.dirty.words[i]) == 0);
    mp_journal_close(&again);
    mp_journal_leave(j, size - 1, 1);
    finish_all(j, mp_journal_empty(j));
    for (uint64_t i = 0; i < words; i++)
        before[i] = j->dirty.words[i];
    FUZZ_NEED(mp_journal_open(&again, fd, size, block, &fault) == MP_OK && (!whole || !again.lost_log));
    for (uint64_t i = 0; i < words; i++)
        FUZZ_NEED(again.lost_log ? (before[i] & ~again.dirty.words[i]) == 0 : again.dirty.words[i] == before[i]);
    mp_journal_close(&again);
    free(before);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    fuzz_input in = {data, data + length};
    uint32_t block = 4096u << (fuzz_number(&in, 1) % 7);
    uint64_t blocks = 1 + fuzz_number(&in, 2), words = (blocks + 63) / 64, size = blocks * block - fuzz_number(&in, 1) % block;
    uint64_t missing = fuzz_number(&in, 1), whole = BITMAP + (words * 8 + 4095) / 4096 * 4096;
    uint8_t *file = calloc(1, whole);
    place places[4];
    for (unsigned k = 0; k < 4; k++) {
        make_record(&in, file + RECORD * (k + 1), k);
        places[k] = read_record(file + RECORD * (k + 1), k, (uint32_t)words);
    }
    if (fuzz_left(&in))
        fuzz_bytes(&in, file + BITMAP, mp_min(fuzz_left(&in), whole - BITMAP));
    uint64_t there = missing > 250 ? whole - mp_min(whole, (missing - 250) * 1024) : whole;
    int fd = memfd_create("meta", MFD_CLOEXEC);
    FUZZ_NEED(fd >= 0 && pwrite(fd, file, there, 0) == (ssize_t)there);
    mp_journal j;
    mp_fault fault = {0};
    mp_status status = mp_journal_open(&j, fd, size, block, &fault);
    FUZZ_NEED((status == MP_OK) == (there == whole) && (status == MP_OK || fault.text[0]));
    if (status == MP_OK) {
        unsigned newest = 4;
        for (unsigned k = 0; k < 4; k++)
            if (places[k].valid && (newest == 4 || places[k].sequence > places[newest].sequence))
                newest = k;
        FUZZ_NEED(newest < 4 || j.lost_log);
        for (uint64_t i = 0; i < words; i++) { /* the bitmap, and what the log names; all of it if the log is lost */
            uint64_t real = i + 1 < words || blocks % 64 == 0 ? ~0ull : (1ull << blocks % 64) - 1;
            bool hot = j.lost_log || (places[newest].extents[i / 64] >> (i % 64) & 1);
            FUZZ_NEED(j.dirty.words[i] == (hot ? real : mp_load64(file + BITMAP + 8 * i) & real));
        }
        bool readable = true;
        for (unsigned k = 0; k < 4; k++)
            readable = readable && places[k].valid;
        FUZZ_NEED(!readable || !j.lost_log);
        use(&j, fd, size, block, readable);
        mp_journal_close(&j);
    }
    close(fd);
    free(file);
    return 0;
}
