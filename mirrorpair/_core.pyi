# Types of the C core's Python face; the texts stand in _core.pyx.

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
