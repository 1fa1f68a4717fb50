/* store.h - writes what differs to the target image.
 *
 * Adjacent pieces of one kind become one write or one hole. A short run into a window that is mapped is a memory store:
 * measured with large page-cache folios, a random 4 KiB pwrite takes 32-37 us and a mapped store 0.5-0.8 us, because the
 * kernel walks the whole folio at each write. A store that faults (full file system, failed disk) is done again by pwrite,
 * which says why.
 *
 * Contract: one store per thread; data stays valid until the next mp_store_flush. Runs inside mp_guard_call.
 */
#ifndef MP_STORE_H
#define MP_STORE_H

#include "base.h"
#include "scan.h"

typedef struct mp_store {
    const mp_reader *target; /* a begun window, or NULL: pwrite only */
    const mp_image *image;
    uint64_t offset, length; /* the run being gathered */
    const uint8_t *data;     /* NULL: zeros */
    uint64_t written, punched; /* bytes since mp_store_begin */
} mp_store;

void mp_store_begin(mp_store *store, const mp_image *image, const mp_reader *target);
/* Adds bytes [offset, offset + length); data NULL: they become zeros (a hole where the image can). */
mp_status mp_store_add(mp_store *store, uint64_t offset, uint64_t length, const uint8_t *data, mp_fault *fault);
mp_status mp_store_flush(mp_store *store, mp_fault *fault);

/* Which pieces of two blocks differ; which pieces of one block are not zero. A mask has bit i for piece i. */
uint64_t mp_pieces_differ(const uint8_t *a, const uint8_t *b, uint64_t block_length);
uint64_t mp_pieces_nonzero(const uint8_t *a, uint64_t block_length);

#endif
