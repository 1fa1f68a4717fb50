"""Run by the system's Python, which has libnbd's module: `libnbd_client.py WHAT URI [URI ...]`.

Rules:
- It uses nothing but the standard library and `nbd`; it ends with exit code 0 and the word "good", or a traceback.
- What the server must refuse is sent with libnbd's own checks off.
"""

import errno
import os
import sys

import nbd

MIB = 1 << 20
PAYLOAD_MAX = 32 * MIB


def connect(uri, *, strict=True):
    handle = nbd.NBD()
    if not strict:
        handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def buffer_of(data):
    return nbd.Buffer.from_bytearray(bytearray(data))


def fails_with(numbers, call, *arguments):
    what = f"{call.__name__}{[one for one in arguments if isinstance(one, int)]}"
    try:
        call(*arguments)
    except nbd.Error as error:
        if error.errnum not in numbers:
            raise AssertionError(f"{what}: {error}") from error
    else:
        raise AssertionError(f"{what} was not refused")


def settle(handle, cookies):
    """All of them are answered, without an error."""
    while cookies:
        handle.poll(-1)
        cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]


def multi_conn(*uris):
    """What one connection was answered, every other one reads; a FLUSH on one covers all. The last content: byte i of
    each 64 KiB piece is the piece's number."""
    handles = [connect(uri) for uri in uris for _ in range(4)]
    assert all(handle.can_multi_conn() for handle in handles)
    for index in range(64):
        writer, reader = handles[index % len(handles)], handles[(index + 3) % len(handles)]
        data = bytes([index]) * 65536
        writer.pwrite(data, index * 65536)
        assert reader.pread(65536, index * 65536) == data
    handles[5].flush()
    # All at once, on all of them.
    cookies = [[] for _ in handles]
    for index in range(64, 128):
        data = buffer_of(bytes([index]) * 65536)
        cookies[index % len(handles)].append(handles[index % len(handles)].aio_pwrite(data, index * 65536))
    for handle, its in zip(handles, cookies, strict=True):
        settle(handle, its)
    handles[0].flush()
    for index in range(128):
        assert handles[index % 7].pread(65536, index * 65536) == bytes([index]) * 65536
    for handle in handles:
        handle.shutdown()


def flags(uri, *_):
    """FUA, trim, zero, no-hole; leaves 4 MiB of 0x77, with zeroes from 1 MiB - 1 to 3 MiB and a 1 at the end."""
    handle = connect(uri)
    assert (handle.can_fua(), handle.can_trim(), handle.can_zero(), handle.can_flush()) == (True, True, True, True)
    fua = nbd.CMD_FLAG_FUA
    handle.pwrite(b"\x77" * 4 * MIB, 0, fua)
    handle.trim(MIB, MIB, fua)
    handle.zero(2 * MIB + 1, MIB - 1, fua)
    handle.zero(5, 2 * MIB + 1, fua | nbd.CMD_FLAG_NO_HOLE)
    assert handle.pread(MIB, 0) == b"\x77" * (MIB - 1) + b"\0"
    assert handle.pread(2 * MIB, MIB) == bytes(2 * MIB)
    handle.pwrite(b"\x01", 4 * MIB - 1, fua)
    assert handle.pread(2, 4 * MIB - 2) == b"\x77\x01"
    handle.shutdown()


def bad_requests(uri, *_):
    """Each is refused, the connection goes on, nothing changes. Leaves "good" before zeroes."""
    handle = connect(uri, strict=False)
    size = handle.get_size()
    handle.pwrite(b"good", 0)
    past = {errno.ENOSPC, errno.EINVAL}
    fails_with({errno.EINVAL}, handle.pread, 4096, size)
    fails_with({errno.EINVAL}, handle.pread, 4096, size - 4095)
    fails_with({errno.EINVAL}, handle.pread, 1, (1 << 63) - 1)
    for at in (size, size - 4095, (1 << 63) - 1, (1 << 64) - 2):
        fails_with(past, handle.pwrite, bytes(4096), at)
        fails_with(past, handle.trim, 4096, at)
        fails_with(past, handle.zero, 4096, at)
    too_large = {errno.EOVERFLOW, errno.EINVAL, errno.ENOMEM}
    fails_with(too_large, handle.pread, PAYLOAD_MAX + 1, 0)
    fails_with(too_large, handle.pwrite, bytes(PAYLOAD_MAX + 1), 0)
    assert handle.pread(4, 0) == b"good"  # the refused payload was drained, the connection is in step
    fails_with({errno.EINVAL}, handle.pread, 0, 0)
    fails_with({errno.EINVAL}, handle.pread, 512, 0, nbd.CMD_FLAG_FUA)
    fails_with({errno.EINVAL, errno.ENOTSUP}, handle.cache, 4096, 0)
    fails_with({errno.EINVAL, errno.ENOTSUP}, handle.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    fails_with({errno.EINVAL}, handle.pwrite, b"x" * 512, 0, 1 << 9)
    assert handle.pread(4, 0) == b"good"
    # The largest that is allowed, in both directions.
    handle.pwrite(b"\x2a" * PAYLOAD_MAX, 0)
    assert handle.pread(PAYLOAD_MAX, 0) == b"\x2a" * PAYLOAD_MAX
    handle.zero(size, 0)
    handle.pwrite(b"good", 0)
    handle.shutdown()


def hang_up(*uris):
    """Ends at once, with many writes and reads unanswered on every connection."""
    handles = [connect(uri) for uri in uris for _ in range(4)]
    for handle in handles:
        for index in range(64):
            handle.aio_pwrite(buffer_of(b"\x99" * 65536), index * 65536)
            handle.aio_pread(nbd.Buffer(MIB), index * 65536)
    print("good", flush=True)
    os._exit(0)


if __name__ == "__main__":
    {one.__name__: one for one in (multi_conn, flags, bad_requests, hang_up)}[sys.argv[1]](*sys.argv[2:])
    print("good")
