/* store.c - see store.h. */
#include "store.h"

#include "disk.h"
#include "wire.h"

#include <errno.h>

void mp_store_begin(mp_store *store, const mp_image *image, _Atomic uint64_t *total_written, _Atomic uint64_t *total_punched)
{
    *store = (mp_store){.image = image, .total_written = total_written, .total_punched = total_punched};
}

mp_status mp_store_flush(mp_store *store, mp_fault *fault)
{
    uint64_t offset = store->offset, length = store->length;
    if (!length)
        return MP_OK;
    store->length = 0;
    if (!store->data) {
        int error = mp_disk_zero(store->image->fd, offset, length);
        if (error)
            return mp_fault_io(fault, error, store->image->side, offset, "punch a hole");
        store->punched += length;
        atomic_fetch_add(store->total_punched, length);
        return MP_OK;
    }
    int error = mp_disk_write(store->image->fd, store->data, length, offset);
    if (error == EFAULT) { /* the data is itself a mapping, whose file went away under it */
        *fault = (mp_fault){.status = MP_SHRANK, .side = MP_SIDE_SOURCE, .offset = offset, .text = "the image shrank or failed while it was read"};
        return MP_SHRANK;
    }
    if (error)
        return mp_fault_io(fault, error, store->image->side, offset, "write");
    store->written += length;
    atomic_fetch_add(store->total_written, length);
    return MP_OK;
}

mp_status mp_store_add(mp_store *store, uint64_t offset, uint64_t length, const uint8_t *data, mp_fault *fault)
{
    MP_ASSERT(offset + length <= store->image->size);
    if (store->length && store->offset + store->length == offset
        && (data ? store->data && store->data + store->length == data : !store->data)) {
        store->length += length;
        return MP_OK;
    }
    mp_status status = mp_store_flush(store, fault);
    if (status)
        return status;
    store->offset = offset;
    store->length = length;
    store->data = data;
    return MP_OK;
}

uint64_t mp_pieces_differ(const uint8_t *a, const uint8_t *b, uint64_t block_length)
{
    if (memcmp(a, b, block_length) == 0)
        return 0;
    uint64_t mask = 0;
    for (uint32_t i = 0; i * MP_PIECE < block_length; i++)
        if (memcmp(a + i * MP_PIECE, b + i * MP_PIECE, mp_piece_length(block_length, i)))
            mask |= 1ull << i;
    return mask;
}

uint64_t mp_pieces_nonzero(const uint8_t *a, uint64_t block_length)
{
    uint64_t mask = 0;
    for (uint32_t i = 0; i * MP_PIECE < block_length; i++)
        if (!mp_is_zero(a + i * MP_PIECE, mp_piece_length(block_length, i)))
            mask |= 1ull << i;
    return mask;
}
