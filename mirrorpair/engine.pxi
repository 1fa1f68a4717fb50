# The data plane's Python face: one C thread that serves NBD clients and replicates (csrc/engine.h). Part of _core.pyx.
#
# Rule: every method only posts a command or reads published numbers; none waits for the engine's thread but `stop`.

from libc.string cimport memcpy

cdef extern from "engine.h" nogil:
    enum:
        MP_VOLUMES_MAX
        MP_GRANT_NONE
        MP_GRANT_PEER
        MP_GRANT_ALONE_FIRST
        MP_GRANT_ALONE
        MP_PLAN_NONE
        MP_PLAN_BITMAP
        MP_PLAN_FULL
        MP_COMMAND_GRANT
        MP_COMMAND_CLIENT
        MP_COMMAND_CLOSE_CLIENTS
        MP_COMMAND_PAUSE_CLIENTS
        MP_COMMAND_ATTACH
        MP_COMMAND_DETACH
        MP_COMMAND_BARRIER
        MP_COMMAND_SAVE
        MP_COMMAND_ALL_DIRTY
        MP_COMMAND_FORGIVE
        MP_COVER_READS
        MP_COVER_HOLD
    ctypedef struct mp_engine:
        int event_fd
        uint32_t volumes
    ctypedef struct mp_engine_volume:
        int fd
        int meta_fd
        uint64_t size
        uint32_t block
    ctypedef struct mp_grant:
        uint64_t epoch
        uint64_t serve_until_ns
        int mode
        unsigned cover
    ctypedef struct mp_command:
        mp_grant grant
        int fd
        uint32_t volume
        bint flag
        uint64_t token
        uint64_t timeout_ns
        uint8_t plan[64]
        mp_chan chan
        uint8_t extra[1]
    ctypedef struct mp_event:
        int kind
        uint64_t a
        int64_t b
        const char *text
    ctypedef struct mp_volume_status:
        uint64_t active_extents
        uint64_t clients
        uint64_t in_flight
        uint64_t read_bytes
        uint64_t written_bytes
        bint resync_active
        uint64_t resync_total
        uint64_t resync_done
        uint64_t resync_skipped
        uint64_t resync_sent
    ctypedef struct mp_link_status:
        bint up
        uint64_t session
        uint64_t bytes_in
        uint64_t bytes_out
        uint64_t unacked
        uint64_t oldest_unacked_ns
        uint64_t ack_ns
    mp_engine *mp_engine_open(const mp_engine_volume *, uint32_t, mp_fault *)
    void mp_engine_set_rate(mp_engine *, uint64_t)
    int mp_engine_start(mp_engine *)
    void mp_engine_close(mp_engine *)
    mp_command *mp_command_new(int, uint32_t)
    void mp_engine_post(mp_engine *, mp_command *)
    mp_event *mp_engine_take(mp_engine *)
    void mp_engine_status(mp_engine *, uint32_t, mp_volume_status *, mp_link_status *)
    uint64_t mp_engine_dirty(const mp_engine *, uint32_t)
    uint64_t mp_engine_stuck_ns(const mp_engine *)
    void mp_engine_hang_up(mp_engine *)

GRANT_NONE = MP_GRANT_NONE
GRANT_PEER = MP_GRANT_PEER
GRANT_ALONE_FIRST = MP_GRANT_ALONE_FIRST
GRANT_ALONE = MP_GRANT_ALONE
COVER_READS = MP_COVER_READS
COVER_HOLD = MP_COVER_HOLD
PLAN_NONE = MP_PLAN_NONE
PLAN_BITMAP = MP_PLAN_BITMAP
PLAN_FULL = MP_PLAN_FULL
NO_LIMIT = 2**63 - 1

cdef tuple EVENT_NAMES = (
    "link-lost", "need-generation", "clients-closed", "client", "disk-error", "journal-error", "clients-quiet", "bits-merged",
    "resync-done", "flushed", "saved",
)

VolumeStatus = _namedtuple(
    "VolumeStatus",
    "dirty_blocks active_extents clients in_flight read_bytes written_bytes resync_active resync_total resync_done "
    "resync_skipped resync_sent",
    module=__name__,
)
VolumeStatus.__doc__ = "One volume's numbers; resync_ in bytes. dirty_blocks is counted at the call, the others within 0.1 s."

LinkStatus = _namedtuple("LinkStatus", "up session bytes_in bytes_out unacked oldest_unacked_s ack_s", module=__name__)
LinkStatus.__doc__ = "The replication link's numbers; ack_s is the smoothed time from sending a write to its ack."


@cython.final
cdef class Engine:
    """The data plane of one node: NBD clients, the replication link, resync, in a C thread of its own.

    `volumes`: for each (image_fd, size in bytes, meta_fd, block_size in bytes); the descriptors stay the caller's and must
    outlive the engine. Opening reads the journals: after a crash the blocks of the active extents are dirty. OSError if
    a metadata file cannot be read. `resync_rate`: bytes a second that a resync may send, 0: as much as clients allow (R9).
    """

    cdef mp_engine *engine
    cdef list kept

    def __cinit__(self, volumes, *, uint64_t resync_rate=0):
        cdef mp_engine_volume given[64]
        cdef mp_fault fault
        cdef uint32_t count = 0
        self.kept = list(volumes)
        if not 1 <= len(self.kept) <= MP_VOLUMES_MAX:
            raise ValueError(f"1 to {MP_VOLUMES_MAX} volumes")
        for image_fd, size, meta_fd, block_size in self.kept:
            if size < 1 or size > 2**62:
                raise ValueError("a volume's size is 1 byte to 4 EiB")
            if block_size < BLOCK_SIZE_MIN or block_size > BLOCK_SIZE_MAX or block_size & (block_size - 1):
                raise ValueError("block_size is a power of two from 4096 to 262144")
            given[count].fd = image_fd
            given[count].size = size
            given[count].meta_fd = meta_fd
            given[count].block = block_size
            count += 1
        memset(&fault, 0, sizeof(fault))
        with nogil:
            self.engine = mp_engine_open(given, count, &fault)
        if self.engine == NULL:
            text = (<bytes>fault.text).decode("utf-8", "replace")
            raise OSError(fault.error or 5, f"metadata: {text}")
        mp_engine_set_rate(self.engine, resync_rate)

    def __dealloc__(self):
        if self.engine != NULL:
            with nogil:
                mp_engine_close(self.engine)

    cdef mp_engine *_open(self) except NULL:
        if self.engine == NULL:
            raise ValueError("the engine was stopped")
        return self.engine

    cdef uint32_t _volume(self, volume) except? 0xffffffff:
        if not 0 <= volume < self._open().volumes:
            raise IndexError("no such volume")
        return volume

    cdef mp_command *_command(self, int kind, uint32_t extra=0) except NULL:
        self._open()
        cdef mp_command *command = mp_command_new(kind, extra)
        if command == NULL:
            raise MemoryError()
        return command

    def start(self):
        """Starts the thread. Nothing is served before a grant was set."""
        cdef int error = mp_engine_start(self._open())
        if error:
            raise OSError(error, _os.strerror(error))

    def stop(self):
        """Ends the thread and drops clients and link at once, as a kill would; what is durable stays so. Idempotent."""
        cdef mp_engine *engine = self.engine
        self.engine = NULL
        if engine != NULL:
            with nogil:
                mp_engine_close(engine)

    @property
    def event_fd(self):
        """Readable while events wait."""
        return self._open().event_fd

    def take_events(self):
        """The events since the last call, oldest first: (kind, a, b, text)."""
        cdef mp_event *event
        found = []
        if self.engine == NULL:
            return found
        while True:
            event = mp_engine_take(self.engine)
            if event == NULL:
                return found
            found.append((EVENT_NAMES[event.kind], event.a, event.b, (<bytes>event.text).decode("utf-8", "replace")))
            free(event)

    def set_grant(self, uint64_t epoch, uint64_t serve_until_ns, int mode, unsigned cover=0):
        """What may be answered: a GRANT_ number, until `serve_until_ns` on CLOCK_BOOTTIME (NO_LIMIT: for ever).
        `cover`: COVER_ bits; what this node's disk cannot do is asked of the peer, or waits for `forgive`."""
        if not MP_GRANT_NONE <= mode <= MP_GRANT_ALONE:
            raise ValueError("no such grant")
        cdef mp_command *command = self._command(MP_COMMAND_GRANT)
        command.grant.epoch = epoch
        command.grant.serve_until_ns = serve_until_ns
        command.grant.mode = mode
        command.grant.cover = cover
        mp_engine_post(self.engine, command)

    def add_client(self, int fd, volume, *, bytes leftover=b"", bint read_only=False):
        """Serves an NBD client from here on. The descriptor is duplicated; `leftover` came after its negotiation."""
        cdef uint32_t index = self._volume(volume)
        if len(leftover) > 65536:
            raise ValueError("more left-over bytes than a connection buffers")
        own = _os.dup(fd)
        _os.set_blocking(own, False)
        cdef mp_command *command = self._command(MP_COMMAND_CLIENT, <uint32_t>len(leftover))
        command.fd = own
        command.volume = index
        command.flag = read_only
        memcpy(command.extra, <const char *>leftover, len(leftover))
        mp_engine_post(self.engine, command)

    def close_clients(self, *, bint graceful):
        """Hangs up on all clients; gracefully: what was read is finished and answered first. "clients-closed" follows."""
        cdef mp_command *command = self._command(MP_COMMAND_CLOSE_CLIENTS)
        command.flag = graceful
        mp_engine_post(self.engine, command)

    def pause_clients(self, uint64_t token):
        """Nothing more is read from the clients, whose connections stay; what was read goes on to its answer.
        "clients-quiet" with the token follows once no write, trim, zero or flush of theirs is in hand."""
        cdef mp_command *command = self._command(MP_COMMAND_PAUSE_CLIENTS)
        command.flag = True
        command.token = token
        mp_engine_post(self.engine, command)

    def resume_clients(self):
        """They are read again."""
        mp_engine_post(self.engine, self._command(MP_COMMAND_PAUSE_CLIENTS))

    def forgive(self):
        """The peer has the role (A14): what it has and this node's disk lacks is answered well."""
        mp_engine_post(self.engine, self._command(MP_COMMAND_FORGIVE))

    def hang_up(self):
        """Ends the clients' connections at once, although the thread hangs."""
        mp_engine_hang_up(self._open())

    def attach_link(self, Channel channel not None, *, uint64_t epoch, bint source, plans, double timeout):
        """Begins a session on a channel whose handshake is done; the channel is of no use afterwards. One PLAN_ number per
        volume, the same at both ends. `timeout`: seconds of silence, or of an unconfirmed write, after which it ends."""
        cdef list wanted = list(plans)
        if len(wanted) != self._open().volumes or not all(MP_PLAN_NONE <= plan <= MP_PLAN_FULL for plan in wanted):
            raise ValueError("one plan per volume")
        if channel.chan.input == NULL or channel.chan.fd_in != channel.chan.fd_out:
            raise ValueError("not a socket channel, or one that was attached before")
        if not 0.01 <= timeout <= 86400:
            raise ValueError("timeout is 0.01 to 86400 seconds")
        own = _os.dup(channel.chan.fd_in)
        cdef mp_command *command = self._command(MP_COMMAND_ATTACH)
        command.fd = own
        command.flag = source
        command.grant.epoch = epoch
        command.timeout_ns = <uint64_t>(timeout * 1e9)
        for index, plan in enumerate(wanted):
            command.plan[index] = plan
        command.chan = channel.chan
        channel.chan.input = NULL
        mp_engine_post(self.engine, command)

    def detach_link(self):
        """Ends the session; no "link-lost" follows."""
        mp_engine_post(self.engine, self._command(MP_COMMAND_DETACH))

    def barrier(self, uint64_t token):
        """Makes all that was written so far durable, at the peer too if there is one: "flushed" follows."""
        cdef mp_command *command = self._command(MP_COMMAND_BARRIER)
        command.token = token
        mp_engine_post(self.engine, command)

    def save(self, uint64_t token):
        """For a clean stop, without clients and link: image, bitmap and an empty activity log durable; "saved" follows."""
        cdef mp_command *command = self._command(MP_COMMAND_SAVE)
        command.token = token
        mp_engine_post(self.engine, command)

    def set_all_dirty(self, volume):
        """Every block may differ from the peer's."""
        cdef uint32_t index = self._volume(volume)
        cdef mp_command *command = self._command(MP_COMMAND_ALL_DIRTY)
        command.volume = index
        mp_engine_post(self.engine, command)

    def volume_status(self, volume):
        """A VolumeStatus."""
        cdef uint32_t index = self._volume(volume)
        cdef mp_volume_status v
        cdef mp_link_status link
        cdef uint64_t dirty
        with nogil:
            mp_engine_status(self.engine, index, &v, &link)
            dirty = mp_engine_dirty(self.engine, index)
        return VolumeStatus(dirty, v.active_extents, v.clients, v.in_flight, v.read_bytes, v.written_bytes,
                            bool(v.resync_active), v.resync_total, v.resync_done, v.resync_skipped, v.resync_sent)

    def link_status(self):
        """A LinkStatus."""
        cdef mp_volume_status v
        cdef mp_link_status link
        mp_engine_status(self._open(), 0, &v, &link)
        return LinkStatus(bool(link.up), link.session, link.bytes_in, link.bytes_out, link.unacked,
                          link.oldest_unacked_ns / 1e9, link.ack_ns / 1e9)

    @property
    def stuck_s(self):
        """For how long the oldest disk operation has been running: seconds of a slow or hung disk."""
        return mp_engine_stuck_ns(self._open()) / 1e9
