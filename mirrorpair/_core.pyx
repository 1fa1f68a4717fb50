# cython: language_level=3, binding=True, embedsignature=True, autotestdict=False, auto_pickle=False
"""The C core's Python face. It holds no logic: buffers in, one C call without the GIL, plain values out.

Errors of this module: ValueError for arguments, ProtocolError for what a peer sent, OSError for the system, TimeoutError and
EOFError for the connection. What a copy run met is not raised but told by `Helper.outcome()`.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror

import os as _os
from collections import namedtuple as _namedtuple

cdef extern from "digest.h" nogil:
    ctypedef struct mp_digest:
        uint64_t low
        uint64_t high
    ctypedef mp_digest (*mp_digest_function)(const void *, size_t, uint64_t)
    ctypedef bint (*runs_function)()
    ctypedef struct mp_digest_kernel:
        const char *name
        mp_digest_function digest
        runs_function runs_here
    mp_digest mp_digest128(const void *, size_t, uint64_t)
    const mp_digest_kernel *mp_digest_kernels()
    bint mp_is_zero(const void *, size_t)
    void mp_digest_store(uint8_t *, mp_digest)

cdef extern from "bitmap.h" nogil:
    ctypedef struct mp_bitmap:
        uint64_t bits
    size_t mp_bitmap_bytes(uint64_t)
    void mp_bitmap_init(mp_bitmap *, void *, uint64_t)
    bint mp_bitmap_set(mp_bitmap *, uint64_t)
    bint mp_bitmap_clear(mp_bitmap *, uint64_t)
    bint mp_bitmap_test(const mp_bitmap *, uint64_t)
    void mp_bitmap_set_range(mp_bitmap *, uint64_t, uint64_t)
    uint64_t mp_bitmap_count(const mp_bitmap *)
    void mp_bitmap_merge(mp_bitmap *, const mp_bitmap *)
    bint mp_bitmap_next(const mp_bitmap *, uint64_t, uint64_t *, uint64_t *)

cdef extern from "frame.h" nogil:
    enum:
        MP_FRAME_HEADER
        MP_FRAME_LENGTH_MAX
        MP_FRAME_HELLO
        MP_FRAME_WELCOME
        MP_FRAME_START
        MP_FRAME_ERROR
    ctypedef struct mp_frame:
        uint16_t type
        uint16_t flags
        uint32_t length
        uint32_t meta
        uint32_t count
        uint64_t sequence
        uint64_t session
        uint64_t epoch
        uint64_t offset
        mp_digest digest

cdef extern from "chan.h" nogil:
    ctypedef enum mp_chan_result:
        MP_CHAN_AGAIN
        MP_CHAN_DONE
        MP_CHAN_EOF
        MP_CHAN_ERROR
        MP_CHAN_GARBAGE
    ctypedef struct mp_chan:
        int fd_in
        int fd_out
        uint8_t *input
        uint64_t session
        mp_frame frame
        int error
        const char *text
    bint mp_chan_init(mp_chan *, int, int, uint64_t)
    void mp_chan_close(mp_chan *)
    mp_chan_result mp_chan_send_wait(mp_chan *, uint16_t, const void *, uint32_t, int)
    mp_chan_result mp_chan_receive_wait(mp_chan *, void *, uint32_t, int)

cdef extern from "copy.h" nogil:
    ctypedef struct mp_progress:
        uint64_t total
        uint64_t done
        uint64_t skipped
        uint64_t sent
        uint64_t differing
        uint64_t differing_blocks
        uint64_t written
        uint64_t punched
        uint64_t wire_out
        uint64_t wire_in
        uint64_t changed_blocks
        uint64_t recheck_total
        uint64_t recheck_done
    ctypedef struct mp_fault:
        int32_t status
        int32_t error
        int32_t side
        uint64_t offset
        const char *text
    ctypedef struct mp_shared:
        mp_progress progress
        mp_fault fault
    ctypedef struct mp_copy:
        int source_fd
        int target_fd
        mp_chan *chan
        uint64_t size
        uint64_t seed
        uint64_t rate
        uint32_t block
        bint write
        bint recheck
        bint ranges
        unsigned threads
        uint64_t timeout_ns

cdef extern from "helper.h" nogil:
    enum:
        MP_LOCAL
        MP_SOURCE
        MP_TARGET
    ctypedef struct mp_helper:
        int pid
        int range_fd
        mp_shared *shared
    int mp_helper_start(mp_helper *, const mp_copy *, int)
    unsigned mp_helper_poll(mp_helper *, int)
    void mp_helper_cancel(mp_helper *)
    void mp_helper_close(mp_helper *, mp_fault *)

cdef enum:
    HANDSHAKE_MAX = 16384  # bytes of a handshake frame's payload

PROTOCOL = 1
FRAME_HELLO = MP_FRAME_HELLO
FRAME_WELCOME = MP_FRAME_WELCOME
FRAME_START = MP_FRAME_START
FRAME_ERROR = MP_FRAME_ERROR

OUTCOME_OK = 0
OUTCOME_CANCELLED = 1
OUTCOME_IO = 2
OUTCOME_SHRANK = 3
OUTCOME_PEER_GONE = 4
OUTCOME_PEER_GARBAGE = 5
OUTCOME_PEER_SILENT = 6
OUTCOME_PEER_ERROR = 7
OUTCOME_SOURCE_CHANGED = 8
OUTCOME_RECHECK = 9
OUTCOME_KILLED = 10
OUTCOME_INTERNAL = 11

BLOCK_SIZE_MIN = 4096
BLOCK_SIZE_MAX = 262144


class ProtocolError(ValueError):
    """The peer sent something that is not a frame of this protocol; the text says what was found."""


Progress = _namedtuple(
    "Progress",
    "total_bytes done_bytes skipped_bytes sent_bytes differing_bytes differing_blocks written_bytes punched_bytes "
    "wire_out_bytes wire_in_bytes changed_blocks recheck_total_bytes recheck_done_bytes",
    module=__name__,
)
Progress.__doc__ = "Counters of a copy run, as true as at the moment they were read. skipped_bytes: found equal."

Outcome = _namedtuple("Outcome", "status errno offset side text", module=__name__)
Outcome.__doc__ = "How a copy run ended: an OUTCOME_ number; errno (or signal), byte offset and side where they apply."


def kernels():
    """Names of the digest kernels that run on this processor, slowest (the plain reference) first."""
    cdef const mp_digest_kernel *kernel = mp_digest_kernels()
    names = []
    while kernel.name != NULL:
        if kernel.runs_here():
            names.append((<bytes>kernel.name).decode())
        kernel += 1
    return names


def digest128(data, uint64_t seed=0, kernel=None):
    """XXH3-128 of a buffer, 16 bytes (low word first, little-endian).

    `kernel` forces one of `kernels()`; ValueError if it is unknown or cannot run here.
    """
    cdef Py_buffer view
    cdef mp_digest digest
    cdef uint8_t out[16]
    cdef mp_digest_function function = mp_digest128
    cdef const mp_digest_kernel *each = mp_digest_kernels()
    if kernel is not None:
        wanted = kernel.encode()
        while each.name != NULL and not (<bytes>each.name == wanted and each.runs_here()):
            each += 1
        if each.name == NULL:
            raise ValueError(f"no digest kernel {kernel!r} on this processor (there are: {', '.join(kernels())})")
        function = each.digest
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            digest = function(view.buf, <size_t>view.len, seed)
    finally:
        PyBuffer_Release(&view)
    mp_digest_store(out, digest)
    return PyBytes_FromStringAndSize(<char *>out, 16)


def is_zero(data):
    """Whether every byte of the buffer is zero."""
    cdef Py_buffer view
    cdef bint zero
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            zero = mp_is_zero(view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return zero


@cython.final
cdef class Bitmap:
    """One bit per block, all clear at first. Bits are numbered from 0; ranges are half-open."""

    cdef mp_bitmap map
    cdef void *memory

    def __cinit__(self, uint64_t bits):
        if bits > <uint64_t>1 << 48:
            raise ValueError("a bitmap of that many bits")
        self.memory = calloc(1, mp_bitmap_bytes(bits) + 8)
        if self.memory == NULL:
            raise MemoryError()
        mp_bitmap_init(&self.map, self.memory, bits)

    def __dealloc__(self):
        free(self.memory)

    def __len__(self):
        return self.map.bits

    cdef uint64_t _bit(self, bit) except? 0xffffffffffffffff:
        if not 0 <= bit < self.map.bits:
            raise IndexError("bit out of range")
        return bit

    def set(self, bit):
        """Sets a bit; returns whether it was set before."""
        return mp_bitmap_set(&self.map, self._bit(bit))

    def clear(self, bit):
        """Clears a bit; returns whether it was set before."""
        return mp_bitmap_clear(&self.map, self._bit(bit))

    def __getitem__(self, bit):
        return mp_bitmap_test(&self.map, self._bit(bit))

    def set_range(self, first, last):
        """Sets the bits [first, last)."""
        if not 0 <= first <= last <= self.map.bits:
            raise IndexError("range out of the bitmap")
        mp_bitmap_set_range(&self.map, first, last)

    def count(self):
        """How many bits are set."""
        return mp_bitmap_count(&self.map)

    def merge(self, Bitmap other not None):
        """Sets every bit that is set in `other`, which must be as long."""
        if other.map.bits != self.map.bits:
            raise ValueError("bitmaps of different lengths")
        mp_bitmap_merge(&self.map, &other.map)

    def runs(self):
        """The runs of set bits, as a list of (first, last) half-open pairs in order."""
        cdef uint64_t first = 0, last = 0
        found = []
        while mp_bitmap_next(&self.map, last, &first, &last):
            found.append((first, last))
        return found


@cython.final
cdef class Channel:
    """One connection that carries frames. Sets the descriptors non-blocking; they stay the caller's to close.

    `session` 0 takes the session of the first frame received.
    """

    cdef mp_chan chan
    cdef uint8_t payload[HANDSHAKE_MAX]  # outlives a call: a payload that came half before a time-out goes on arriving

    def __cinit__(self, int fd_in, int fd_out, uint64_t session=0):
        if not mp_chan_init(&self.chan, fd_in, fd_out, session):
            raise OSError(9, "not an open descriptor")

    def __dealloc__(self):
        mp_chan_close(&self.chan)

    @property
    def session(self):
        return self.chan.session

    def send(self, uint16_t kind, bytes payload not None, double timeout):
        """Sends one handshake frame. TimeoutError after `timeout` seconds, ConnectionError if the peer is gone."""
        cdef const char *data = payload
        cdef uint32_t length = <uint32_t>len(payload)
        cdef int milliseconds = <int>(min(max(timeout, 0.0), 86400.0) * 1000)
        cdef mp_chan_result result
        if len(payload) > HANDSHAKE_MAX:
            raise ValueError(f"a handshake frame holds at most {HANDSHAKE_MAX} bytes")
        with nogil:
            result = mp_chan_send_wait(&self.chan, kind, data, length, milliseconds)
        self._raise(result)

    def recv(self, double timeout, uint32_t max_payload=16384):
        """Receives one handshake frame: (kind, payload). TimeoutError, EOFError, ConnectionError, ProtocolError."""
        cdef mp_chan_result result = MP_CHAN_AGAIN
        cdef uint32_t capacity = min(max_payload, <uint32_t>HANDSHAKE_MAX)
        cdef int left = <int>(min(max(timeout, 0.0), 86400.0) * 1000), part
        while True:  # in slices, so that Ctrl-C is heard
            part = min(left, 100)
            with nogil:
                result = mp_chan_receive_wait(&self.chan, self.payload, capacity, part)
            left -= part
            if result != MP_CHAN_AGAIN or left <= 0:
                break
            PyErr_CheckSignals()
        self._raise(result)
        return self.chan.frame.type, PyBytes_FromStringAndSize(<char *>self.payload, self.chan.frame.length)

    cdef _raise(self, mp_chan_result result):
        if result == MP_CHAN_AGAIN:
            raise TimeoutError("the peer did not answer in time")
        if result == MP_CHAN_EOF:
            raise EOFError("the peer closed the connection")
        if result == MP_CHAN_ERROR:
            raise OSError(self.chan.error, _os.strerror(self.chan.error))
        if result == MP_CHAN_GARBAGE:
            raise ProtocolError((<bytes>self.chan.text).decode("ascii", "replace"))


@cython.final
cdef class Helper:
    """One copy run, in a child process that runs only C. Made by `local`, `source` or `target`."""

    cdef mp_helper helper
    cdef mp_fault fault
    cdef bint closed
    cdef object last, ranges_found, rest, channel

    def __cinit__(self):
        self.helper.pid = -1
        self.closed = True
        self.ranges_found = []
        self.rest = b""

    def __dealloc__(self):
        if not self.closed:
            mp_helper_close(&self.helper, &self.fault)

    @staticmethod
    def local(int source_fd, int target_fd, *, uint64_t size, uint32_t block_size, bint write, bint recheck=False,
              uint64_t rate=0, unsigned threads=0, bint ranges=False):
        """Compares two images of this host and, with `write`, makes the target equal."""
        return _start(MP_LOCAL, source_fd, target_fd, None, size, block_size, 0, write, recheck, rate, threads, 0, ranges)

    @staticmethod
    def source(int fd, Channel channel not None, *, uint64_t size, uint32_t block_size, uint64_t seed, bint write,
               bint recheck=False, uint64_t rate=0, unsigned threads=0, double timeout=30.0, bint ranges=False):
        """The source is here, the target behind the channel, whose other end runs `target` with the same numbers."""
        return _start(MP_SOURCE, fd, -1, channel, size, block_size, seed, write, recheck, rate, threads, timeout, ranges)

    @staticmethod
    def target(int fd, Channel channel not None, *, uint64_t size, uint32_t block_size, uint64_t seed, bint write,
               bint recheck=False, uint64_t rate=0, unsigned threads=0, double timeout=30.0, bint ranges=False):
        """The target is here, the source behind the channel."""
        return _start(MP_TARGET, -1, fd, channel, size, block_size, seed, write, recheck, rate, threads, timeout, ranges)

    def poll(self, double timeout):
        """Waits up to `timeout` seconds; True once the run has ended. Collects ranges meanwhile."""
        cdef unsigned what
        cdef int milliseconds = <int>(min(max(timeout, 0.0), 3600.0) * 1000)
        if self.closed:
            return True
        with nogil:
            what = mp_helper_poll(&self.helper, milliseconds)
        if what & 2:
            self._read_ranges()
        if not what & 1:
            return False
        while self._read_ranges():
            pass
        self.last = self._progress()
        self.closed = True
        mp_helper_close(&self.helper, &self.fault)
        return True

    def _read_ranges(self):
        if self.helper.range_fd < 0:
            return False
        try:
            data = _os.read(self.helper.range_fd, 65536)
        except BlockingIOError:
            return False
        if not data:
            return False
        data = self.rest + data
        whole = len(data) - len(data) % 16
        self.rest = data[whole:]
        numbers = memoryview(data[:whole]).cast("Q")
        self.ranges_found.extend(zip(numbers[::2], numbers[1::2]))
        return True

    def _progress(self):
        cdef mp_progress *p = &self.helper.shared.progress
        sent = p.sent if self.channel is not None else p.written  # nothing travels between two images of one host
        return Progress(p.total, p.done, p.skipped, sent, p.differing, p.differing_blocks, p.written, p.punched,
                        p.wire_out, p.wire_in, p.changed_blocks, p.recheck_total, p.recheck_done)

    def progress(self):
        """The counters now, as a Progress."""
        return self.last if self.closed else self._progress()

    def take_ranges(self):
        """Differing (offset, length) pairs found since the last call, in order, adjacent ones merged. Bytes."""
        found, self.ranges_found = self.ranges_found, []
        return found

    def cancel(self):
        """Asks the run to stop; it makes durable what it wrote and ends with OUTCOME_CANCELLED."""
        if not self.closed:
            mp_helper_cancel(&self.helper)

    def outcome(self):
        """How it ended, as an Outcome. ValueError while it runs."""
        if not self.closed:
            raise ValueError("the run has not ended")
        side = ("", "source", "target")[self.fault.side]
        return Outcome(self.fault.status, self.fault.error, self.fault.offset, side,
                       (<bytes>self.fault.text).decode("utf-8", "replace"))

    @property
    def pid(self):
        """Process id of the helper, -1 once it was reaped."""
        return self.helper.pid

    def close(self):
        """Ends the run if it still goes on, and reaps the process. Idempotent."""
        if not self.closed:
            self.last = self._progress()
            self.closed = True
            mp_helper_close(&self.helper, &self.fault)


cdef _start(int arrangement, int source_fd, int target_fd, Channel channel, uint64_t size, uint32_t block_size,
            uint64_t seed, bint write, bint recheck, uint64_t rate, unsigned threads, double timeout, bint ranges):
    if block_size < BLOCK_SIZE_MIN or block_size > BLOCK_SIZE_MAX or block_size & (block_size - 1):
        raise ValueError("block_size is a power of two from 4096 to 262144")
    if size > <uint64_t>1 << 62:
        raise ValueError("size is too large")
    if arrangement != MP_LOCAL and not 0.001 <= timeout <= 86400:
        raise ValueError("timeout is 0.001 to 86400 seconds")
    cdef mp_copy copy
    memset(&copy, 0, sizeof(copy))
    copy.source_fd = source_fd
    copy.target_fd = target_fd
    copy.chan = &channel.chan if channel is not None else NULL
    copy.size = size
    copy.seed = seed
    copy.rate = rate
    copy.block = block_size
    copy.write = write
    copy.recheck = recheck and write
    copy.ranges = ranges
    copy.threads = threads
    copy.timeout_ns = <uint64_t>(timeout * 1e9)
    cdef Helper helper = Helper()
    cdef int error
    helper.channel = channel
    # With the GIL held: no other Python thread can be inside an allocator at the fork (helper.h). It takes a millisecond.
    error = mp_helper_start(&helper.helper, &copy, arrangement)
    if error:
        raise OSError(error, _os.strerror(error))
    helper.closed = False
    return helper


include "engine.pxi"
