/* journal.h - what may differ from the peer, durably: activity log, dirty bitmap, writes not yet confirmed as flushed.
 *
 * Words: an extent is 64 blocks, one word of the bitmap. It is hot while a durable record of the activity log names it: after
 * a crash all its blocks are dirty. A page is 4096 bytes of the bitmap in the file, 512 extents. A slot is a hot extent's
 * place in the log. A block is unflushed while it was written and a barrier (both nodes have flushed) has not ended since.
 *
 * Rules
 *  - M3 A block that may differ from the peer's is dirty on disk, or in an extent that the record on disk names. Hence:
 *    M4 enter says yes only once such a record is durable; M5 an extent leaves the log only if nothing is in flight and every
 *    unflushed block is dirty, and its page goes to disk before the record; M6 other dirty bits stay in memory until a flush.
 *  - One job at a time: pages, fdatasync, record, fdatasync. It is one record however many extents enter and leave.
 *  - A record is the whole table and goes to the next of four places, so the one before it survives a torn write (M7). If
 *    more than that one is unreadable, or none can be read, `lost_log` is said and all bits are set.
 *  - After an open the old record stays as it is until the bits it stands for are durable; no extent is hot before that.
 *    So opening is idempotent. What only the page cache of a killed process may hold is not believed: bits that were read are
 *    written again before anybody relies on them, and two records are never on their way at once.
 *  - A failed write or fdatasync is never repeated: the journal stays failed. Hot extents stay hot, none is added.
 *
 * Contract: all functions belong to one owner thread; only job->run is called elsewhere, and it touches only what the job
 * copied. No allocation after open. Offsets and lengths are bytes inside the volume. The metadata file is the caller's and
 * as long as the layout asks for; what it holds is checked.
 */
#ifndef MP_JOURNAL_H
#define MP_JOURNAL_H

#include "base.h"
#include "bitmap.h"
#include "hot.h"
#include "pool.h"

#define MP_JOURNAL_LOG ((uint64_t)8192)     /* where the ring of records begins in the file */
#define MP_JOURNAL_BITMAP ((uint64_t)65536) /* where the bitmap begins */
#define MP_JOURNAL_PAGE 4096u
#define MP_JOURNAL_PAGE_EXTENTS (MP_JOURNAL_PAGE / 8)
#ifndef MP_JOURNAL_JOB_PAGES
#define MP_JOURNAL_JOB_PAGES 256u /* pages that one job carries: 1 MiB; a test may compile it smaller */
#endif
#define MP_JOURNAL_LENGTH_MAX ((uint64_t)32 << 20) /* bytes of one enter */
#define MP_JOURNAL_CLEARED 16384u /* blocks cleared after which their pages are written unasked: 1 GiB of 64 KiB blocks */

typedef struct mp_journal {
    mp_bitmap dirty; /* to be read by anybody, changed only by the functions below */
    mp_bitmap doubt; /* by extent: some of its bits stand for a doubt (a crash, a lost link, the peer's word, a full compare),
                      * not for a write that went only here, so most of it may be equal. In memory only, a hint: bits that were
                      * found at the open are all in doubt */
    bool lost_log;   /* the log could not be believed at open, so all bits were set (M7) */
    int error;       /* errno of the job that failed, for good; 0 */
    int fd;
    uint64_t size;
    uint32_t block;
    uint64_t pages;
    uint32_t extents;
    /* a page of the bitmap is changed (newer here than on disk or in the running job), due (changed, and the flush that has
     * begun waits for it), taken (in the job being made); due is part of changed */
    mp_bitmap changed, due, taken;
    uint64_t changed_count, due_count;
    uint64_t asked, begun, reached; /* flush tickets */
    uint64_t cleared;               /* blocks cleared since the last flush was asked for */
    bool recovering; /* bits that only the old record stands for are not durable yet: all pages before the next record */
    bool emptying;   /* likewise, and the next record is empty */
    bool ring_lost;  /* all four places are written at the next record */
    bool fresh; /* nothing was synced since the open */
    bool running;
    bool stuck;      /* the last look found no slot to evict, and nothing has happened since that could change it */
    bool barrier, unflushed, unflushed_before;
    uint64_t unflushed_bytes, unflushed_bytes_before;
    uint64_t sequence; /* of the last record */
    uint64_t looks;    /* how often slots were given out; the clock of mp_hot_node.kept */
    mp_hot *hot;
    struct mp_journal_work *work;
} mp_journal;

/* --- opening and closing --- */

/* Reads bitmap and log. MP_OK; MP_IO (errno or 0, byte offset, text) if the file cannot be read or is too short; MP_INTERNAL
 * without memory; then nothing is left behind. Writes nothing, but mp_journal_job has something to do after a crash. Takes
 * 2 MiB per TiB of 64 KiB blocks, 32 KiB per TiB and 1.2 MiB. `block` is MP_BLOCK_MIN to MP_BLOCK_MAX. */
mp_status mp_journal_open(mp_journal *journal, int meta_fd, uint64_t size, uint32_t block, mp_fault *fault);
void mp_journal_close(mp_journal *journal); /* no job runs */

/* --- one write, trim or zero --- */

/* Before it is submitted anywhere. True: all its extents are hot and have one more in flight. False: not yet, they were
 * asked for; call again, in the same order as before, after a job finished, a barrier ended or a write left, and before
 * mp_journal_job: extents that came meanwhile are kept that long. All or nothing. length: 1 to MP_JOURNAL_LENGTH_MAX. */
bool mp_journal_enter(mp_journal *journal, uint64_t offset, uint64_t length);
/* It goes to both nodes: between enter and leave, before it is submitted. */
void mp_journal_unflushed(mp_journal *journal, uint64_t offset, uint64_t length);
/* All blocks it touches are dirty (M8). For a write that goes only here, or failed here: before leave. In an extent that is
 * not hot the bits are durable only when a flush is. */
void mp_journal_set(mp_journal *journal, uint64_t offset, uint64_t length);
/* The same, and nobody knows whether they really differ. */
void mp_journal_doubt(mp_journal *journal, uint64_t offset, uint64_t length);
bool mp_journal_doubted(const mp_journal *journal, uint64_t offset, uint64_t length); /* some extent of it is in doubt */
void mp_journal_believe(mp_journal *journal); /* no bit is left that stands for a doubt */
/* It has ended everywhere, or it never will and its blocks are set. */
void mp_journal_leave(mp_journal *journal, uint64_t offset, uint64_t length);

/* --- confirmed by both --- */

/* Whole blocks are clean again (R3): they are equal and durable on both nodes, that is, a barrier that began after the last
 * write to them has ended well, and none is on its way; or (R2) the peer has taken the bits over durably. On disk the bits go
 * at some later flush: at the latest MP_JOURNAL_CLEARED blocks on. */
void mp_journal_clear(mp_journal *journal, uint64_t first_block, uint64_t blocks);
/* One at a time. It covers what was unflushed when it began: end it well (ok) only if all these writes have ended and both
 * nodes flushed afterwards. Alone, the local half is enough: bits stand for the other. */
void mp_journal_barrier_begin(mp_journal *journal);
void mp_journal_barrier_end(mp_journal *journal, bool ok);
/* Somebody waits for slots, and some are held only by unflushed writes (M5). False while a barrier runs. */
bool mp_journal_wants_barrier(const mp_journal *journal);
/* Something was written and no barrier has ended since. */
static inline bool mp_journal_has_unflushed(const mp_journal *journal) { return journal->unflushed || journal->unflushed_before; }
/* Bytes given to mp_journal_unflushed that no barrier covers yet, not even the running one. */
static inline uint64_t mp_journal_unflushed_bytes(const mp_journal *journal) { return journal->unflushed_bytes; }
/* W7: what is unflushed becomes dirty. */
void mp_journal_link_lost(mp_journal *journal);

/* --- to disk --- */

/* The job to be run once in another thread and then given to mp_journal_finished, or NULL: nothing to write, one runs
 * already, or the journal has failed. */
mp_job *mp_journal_job(mp_journal *journal);
int mp_journal_finished(mp_journal *journal, mp_job *job); /* 0 or an errno: the journal has failed */
/* The bits as they are now shall be durable, by one job or several. Returns a ticket; ask mp_journal_reached at once (there
 * may be nothing to do) and after each job. */
uint64_t mp_journal_flush(mp_journal *journal);
/* For a clean stop, after the image's fdatasync: likewise, and then an empty log. What is unflushed becomes dirty. Nothing
 * is in flight, and no enter succeeds before the ticket is reached. */
uint64_t mp_journal_empty(mp_journal *journal);
static inline bool mp_journal_reached(const mp_journal *journal, uint64_t ticket) { return journal->reached >= ticket; }

uint32_t mp_journal_active(const mp_journal *journal); /* extents that are hot, or will be when the running job has ended */

#endif
