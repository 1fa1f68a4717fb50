# Types of the C core's Python face; the texts stand in _core.pyx.

from collections.abc import Iterable
from typing import Final, NamedTuple, Self, final

from typing_extensions import Buffer

PROTOCOL: Final = 1
FRAME_HELLO: int
FRAME_WELCOME: int
FRAME_START: int
FRAME_ERROR: int
OUTCOME_OK: int
OUTCOME_CANCELLED: int
OUTCOME_IO: int
OUTCOME_SHRANK: int
OUTCOME_PEER_GONE: int
OUTCOME_PEER_GARBAGE: int
OUTCOME_PEER_SILENT: int
OUTCOME_PEER_ERROR: int
OUTCOME_SOURCE_CHANGED: int
OUTCOME_RECHECK: int
OUTCOME_KILLED: int
OUTCOME_INTERNAL: int
BLOCK_SIZE_MIN: int
BLOCK_SIZE_MAX: int

class ProtocolError(ValueError): ...

class Progress(NamedTuple):
    total_bytes: int
    done_bytes: int
    skipped_bytes: int
    sent_bytes: int
    differing_bytes: int
    differing_blocks: int
    written_bytes: int
    punched_bytes: int
    wire_out_bytes: int
    wire_in_bytes: int
    changed_blocks: int
    recheck_total_bytes: int
    recheck_done_bytes: int

class Outcome(NamedTuple):
    status: int
    errno: int
    offset: int
    side: str
    text: str

def kernels() -> list[str]: ...
def digest128(data: Buffer, seed: int = 0, kernel: str | None = None) -> bytes: ...
def is_zero(data: Buffer) -> bool: ...

@final
class Bitmap:
    def __new__(cls, bits: int) -> Self: ...
    def __len__(self) -> int: ...
    def __getitem__(self, bit: int, /) -> bool: ...
    def set(self, bit: int) -> bool: ...
    def clear(self, bit: int) -> bool: ...
    def set_range(self, first: int, last: int) -> None: ...
    def count(self) -> int: ...
    def merge(self, other: Bitmap) -> None: ...
    def runs(self) -> list[tuple[int, int]]: ...

@final
class Channel:
    def __new__(cls, fd_in: int, fd_out: int, session: int = 0) -> Self: ...
    @property
    def session(self) -> int: ...
    def send(self, kind: int, payload: bytes, timeout: float) -> None: ...
    def recv(self, timeout: float, max_payload: int = 16384) -> tuple[int, bytes]: ...

@final
class Helper:
    @staticmethod
    def local(
        source_fd: int,
        target_fd: int,
        *,
        size: int,
        block_size: int,
        write: bool,
        recheck: bool = False,
        rate: int = 0,
        threads: int = 0,
        ranges: bool = False,
    ) -> Helper: ...
    @staticmethod
    def source(
        fd: int,
        channel: Channel,
        *,
        size: int,
        block_size: int,
        seed: int,
        write: bool,
        recheck: bool = False,
        rate: int = 0,
        threads: int = 0,
        timeout: float = 30.0,
        ranges: bool = False,
    ) -> Helper: ...
    @staticmethod
    def target(
        fd: int,
        channel: Channel,
        *,
        size: int,
        block_size: int,
        seed: int,
        write: bool,
        recheck: bool = False,
        rate: int = 0,
        threads: int = 0,
        timeout: float = 30.0,
        ranges: bool = False,
    ) -> Helper: ...
    @property
    def pid(self) -> int: ...
    def poll(self, timeout: float) -> bool: ...
    def progress(self) -> Progress: ...
    def take_ranges(self) -> list[tuple[int, int]]: ...
    def cancel(self) -> None: ...
    def outcome(self) -> Outcome: ...
    def close(self) -> None: ...

GRANT_NONE: int
GRANT_PEER: int
GRANT_ALONE_FIRST: int
GRANT_ALONE: int
COVER_READS: int
COVER_HOLD: int
PLAN_NONE: int
PLAN_BITMAP: int
PLAN_FULL: int
NO_LIMIT: int

class VolumeStatus(NamedTuple):
    dirty_blocks: int
    active_extents: int
    clients: int
    in_flight: int
    read_bytes: int
    written_bytes: int
    resync_active: bool
    resync_total: int
    resync_done: int
    resync_skipped: int
    resync_sent: int

class LinkStatus(NamedTuple):
    up: bool
    session: int
    bytes_in: int
    bytes_out: int
    unacked: int
    oldest_unacked_s: float
    ack_s: float

@final
class Engine:
    def __new__(cls, volumes: Iterable[tuple[int, int, int, int]], *, resync_rate: int = 0) -> Self: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def event_fd(self) -> int: ...
    def take_events(self) -> list[tuple[str, int, int, str]]: ...
    def set_grant(self, epoch: int, serve_until_ns: int, mode: int, cover: int = 0) -> None: ...
    def add_client(self, fd: int, volume: int, *, leftover: bytes = b"", read_only: bool = False) -> None: ...
    def close_clients(self, *, graceful: bool) -> None: ...
    def pause_clients(self, token: int) -> None: ...
    def resume_clients(self) -> None: ...
    def forgive(self) -> None: ...
    def hang_up(self) -> None: ...
    def attach_link(
        self, channel: Channel, *, epoch: int, source: bool, plans: Iterable[int], timeout: float
    ) -> None: ...
    def detach_link(self) -> None: ...
    def barrier(self, token: int) -> None: ...
    def save(self, token: int) -> None: ...
    def set_all_dirty(self, volume: int) -> None: ...
    def volume_status(self, volume: int) -> VolumeStatus: ...
    def link_status(self) -> LinkStatus: ...
    @property
    def stuck_s(self) -> float: ...
