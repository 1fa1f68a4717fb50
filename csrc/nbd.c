/* nbd.c - see nbd.h. */
#include "nbd.h"

#include <errno.h>

#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u

static uint16_t big16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static uint32_t big32(const uint8_t *p) { return (uint32_t)big16(p) << 16 | big16(p + 2); }
static uint64_t big64(const uint8_t *p) { return (uint64_t)big32(p) << 32 | big32(p + 4); }

static void put_big32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (24 - 8 * i));
}

bool mp_nbd_parse(const uint8_t in[MP_NBD_REQUEST], mp_nbd_request *request)
{
    if (big32(in) != REQUEST_MAGIC)
        return false;
    *request = (mp_nbd_request){.flags = big16(in + 4), .type = big16(in + 6), .cookie = big64(in + 8), .offset = big64(in + 16), .length = big32(in + 24)};
    return true;
}

uint32_t mp_nbd_judge(const mp_nbd_request *request, uint64_t size, bool read_only)
{
    unsigned allowed = 0;
    switch (request->type) {
    case MP_NBD_READ:
        break;
    case MP_NBD_WRITE:
    case MP_NBD_TRIM:
        allowed = MP_NBD_FUA;
        break;
    case MP_NBD_WRITE_ZEROES:
        allowed = MP_NBD_FUA | MP_NBD_NO_HOLE;
        break;
    case MP_NBD_FLUSH: /* offset and length are reserved, and clients that fill them in are older than the rule */
        return request->flags ? MP_NBD_EINVAL : MP_NBD_OK;
    default:
        return MP_NBD_EINVAL;
    }
    bool writes = request->type != MP_NBD_READ;
    if (request->flags & ~allowed)
        return MP_NBD_EINVAL;
    if (writes && read_only)
        return MP_NBD_EPERM;
    bool carries = request->type == MP_NBD_READ || request->type == MP_NBD_WRITE;
    if (carries && request->length > MP_NBD_PAYLOAD_MAX)
        return MP_NBD_EOVERFLOW;
    if (request->length == 0)
        return MP_NBD_EINVAL; /* the protocol leaves it open; nothing behind this has to know an empty range */
    if (request->offset > size || request->length > size - request->offset)
        return writes ? MP_NBD_ENOSPC : MP_NBD_EINVAL;
    return MP_NBD_OK;
}

void mp_nbd_reply(uint8_t out[MP_NBD_REPLY], uint64_t cookie, uint32_t error)
{
    put_big32(out, REPLY_MAGIC);
    put_big32(out + 4, error);
    put_big32(out + 8, (uint32_t)(cookie >> 32));
    put_big32(out + 12, (uint32_t)cookie);
}

uint32_t mp_nbd_error_of(int error)
{
    switch (error) {
    case 0: return MP_NBD_OK;
    case EPERM:
    case EACCES:
    case EROFS: return MP_NBD_EPERM;
    case ENOMEM: return MP_NBD_ENOMEM;
    case EINVAL: return MP_NBD_EINVAL;
    case ENOSPC:
    case EDQUOT:
    case EFBIG: return MP_NBD_ENOSPC;
    case ESHUTDOWN: return MP_NBD_ESHUTDOWN;
    default: return MP_NBD_EIO;
    }
}
