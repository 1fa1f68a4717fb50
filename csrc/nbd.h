/* nbd.h - NBD's transmission phase: requests parsed and judged, simple replies made. Source of every number: NBD's
 * doc/proto.md. All of it is big-endian on the wire.
 *
 *   request  magic u32  flags u16  type u16  cookie u64  offset u64  length u32          reply  magic u32  error u32  cookie u64
 *
 * Rule: mp_nbd_judge is the only place where a request is checked; behind it range, flags and length are relied upon.
 * Contract: pure, no system calls.
 */
#ifndef MP_NBD_H
#define MP_NBD_H

#include "base.h"

#define MP_NBD_REQUEST 28u
#define MP_NBD_REPLY 16u
#define MP_NBD_PAYLOAD_MAX ((uint32_t)32 << 20) /* of READ and WRITE */

enum mp_nbd_command {
    MP_NBD_READ = 0,
    MP_NBD_WRITE = 1,
    MP_NBD_DISCONNECT = 2,
    MP_NBD_FLUSH = 3,
    MP_NBD_TRIM = 4,
    MP_NBD_CACHE = 5,
    MP_NBD_WRITE_ZEROES = 6,
};

enum mp_nbd_flag {
    MP_NBD_FUA = 1u << 0,
    MP_NBD_NO_HOLE = 1u << 1,
    MP_NBD_FAST_ZERO = 1u << 4,
};

enum mp_nbd_error { /* the protocol's own numbers, whatever the host's are */
    MP_NBD_OK = 0,
    MP_NBD_EPERM = 1,
    MP_NBD_EIO = 5,
    MP_NBD_ENOMEM = 12,
    MP_NBD_EINVAL = 22,
    MP_NBD_ENOSPC = 28,
    MP_NBD_EOVERFLOW = 75,
    MP_NBD_ENOTSUP = 95,
    MP_NBD_ESHUTDOWN = 108,
};

typedef struct mp_nbd_request {
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} mp_nbd_request;

bool mp_nbd_parse(const uint8_t in[MP_NBD_REQUEST], mp_nbd_request *request); /* false: not a request at all */
/* What is wrong with it, or MP_NBD_OK. A refused WRITE is still followed by its payload. */
uint32_t mp_nbd_judge(const mp_nbd_request *request, uint64_t size, bool read_only);
void mp_nbd_reply(uint8_t out[MP_NBD_REPLY], uint64_t cookie, uint32_t error);
uint32_t mp_nbd_error_of(int error); /* an errno of this host in the protocol's numbers */

#endif
