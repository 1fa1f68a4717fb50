"""Who is measured: floors, mirrorpair in each of its ways, and the tools people use today. Command lines, no more.

Rules:
- A subject turns a stage (two images, a server, flush or not) into a command line. It neither runs nor times it.
- Peers get their best documented options for this job, the ones a knowing user would choose; nothing is compressed or
  encrypted on either side.
- With `flush` every subject makes the target durable by its own option. Without, none does (see floors/nosync.c); a
  peer that cannot flush is left out of the groups that do.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bench.images import ALL, EQUAL, SCATTERED_4K, Pair, Pattern
from bench.workshop import CannotRun, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.server import Relay, Server

Kind = Literal["floor", "mirrorpair", "peer"]
Watch = Literal["", "wire", "memory", "python"]

# Drops the host that --rsh is given and runs the rest here: a pipe instead of ssh.
RSH = """sh -c 'shift; exec "$@"' rsh"""


@dataclass
class Stage:
    shop: Workshop
    pair: Pair
    flush: bool
    server: Server | None = None
    relay: Relay | None = None

    @property
    def a(self) -> str:
        return str(self.pair.source)

    @property
    def b(self) -> str:
        return str(self.pair.target)

    def remote(self, path: Path) -> str:
        if self.server is None:
            raise CannotRun("no server")
        return self.server.url(path, self.relay)


@dataclass(frozen=True)
class Subject:
    name: str
    kind: Kind
    argv: Callable[[Stage], list[str]]
    writes: bool = True
    """The target must equal the source afterwards. Else: the exit code must tell whether they are equal."""
    needs: tuple[str, ...] = ()
    server: bool = False
    scratch: bool = False
    """It writes a third image instead of the target."""
    watch: Watch = ""
    """Not timed: run once, for something else."""
    differs_status: int = 1
    only: Callable[[Pattern], bool] = field(default=lambda _: True)

    @property
    def slug(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-").replace("+", "and")

    def missing(self, shop: Workshop) -> str | None:
        """Why it cannot run here."""
        for program in self.needs:
            if shutil.which(program) is None:
                return f"{program} is not on PATH"
        if self.kind == "mirrorpair":
            try:
                shop.mirrorpair()
            except CannotRun as reason:
                return str(reason)
        return None

    def answer(self, stdout: str) -> dict[str, Any]:
        """What it says about itself: the last JSON object, if it speaks JSON."""
        if self.kind == "peer":
            return {}
        for line in reversed(stdout.splitlines()):
            if line.startswith("{"):
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict):
                    return found
        return {}


# --- floors ---------------------------------------------------------------------------------------------------------


def _floor(program: str, *options: str, with_list: bool = False) -> Callable[[Stage], list[str]]:
    def argv(stage: Stage) -> list[str]:
        more = [str(stage.pair.dirty_list)] if with_list else []
        return [stage.shop.program(program), stage.a, stage.b, *more, *options, *(["--sync"] if stage.flush else [])]

    return argv


def _partial(pattern: Pattern) -> bool:
    return 0 < pattern.share < 1


COMPARE = Subject("floor compare", "floor", _floor("compare"), writes=False, differs_status=0)
COMPARE_MAP = Subject("floor compare+write, mapped", "floor", _floor("compare", "--write=map"))
COMPARE_PWRITE = Subject("floor compare+write, pwrite", "floor", _floor("compare", "--write=pwrite"))
DIGEST_MAP = Subject("floor digest pass, mapped", "floor", _floor("digestpass", "--write=map"))
DIGEST_PWRITE = Subject("floor digest pass, pwrite", "floor", _floor("digestpass", "--write=pwrite"))
STREAM = Subject("floor stream TCP", "floor", _floor("stream", f"--chunk={1 << 20}"))
LIST_MAP = Subject("floor known list, mapped", "floor", _floor("dirtylist", "--over=map", with_list=True))
LIST_PWRITE = Subject("floor known list, pwrite", "floor", _floor("dirtylist", "--over=pwrite", with_list=True))
LIST_TCP = Subject("floor known list, TCP", "floor", _floor("dirtylist", "--over=tcp", with_list=True))
DIRECT = Subject("floor O_DIRECT compare", "floor", _floor("direct"), writes=False, differs_status=0)


# --- mirrorpair -----------------------------------------------------------------------------------------------------


def _resync(stage: Stage) -> list[str]:
    return [stage.shop.mirrorpair(), "resync", stage.a, stage.b, "--json"]


def _verify(stage: Stage) -> list[str]:
    return [stage.shop.mirrorpair(), "verify", stage.a, stage.b, "--json"]


def _pipe(stage: Stage) -> list[str]:
    return [stage.shop.mirrorpair(), "resync", stage.a, f"ssh://localhost{stage.b}", "--rsh", RSH, "--json"]


def _tcp(stage: Stage) -> list[str]:
    return [stage.shop.mirrorpair(), "resync", stage.a, stage.remote(stage.pair.target), "--json"]


def _tcp_pull(stage: Stage) -> list[str]:
    return [stage.shop.mirrorpair(), "resync", stage.remote(stage.pair.source), stage.b, "--json"]


def _create(stage: Stage) -> list[str]:
    return [stage.shop.mirrorpair(), "resync", stage.a, str(stage.pair.scratch), "--json"]


# The engine runs in a process of its own, so the CPU time of this one, during the call, is Python's share. What is
# loaded at the first call belongs to the start of a process, so a comparison goes before; its cost is told apart.
_API = """
import json, resource, sys, time
import mirrorpair
def cpu(who):
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime
calls = 0
def progress(_):
    global calls
    calls += 1
mirrorpair.compare(sys.argv[1], sys.argv[2])
loading = cpu(resource.RUSAGE_SELF)
own, engine, start = cpu(resource.RUSAGE_SELF), cpu(resource.RUSAGE_CHILDREN), time.monotonic()
result = mirrorpair.resync(sys.argv[1], sys.argv[2], progress=progress)
print(json.dumps({"seconds": time.monotonic() - start, "python_cpu_s": cpu(resource.RUSAGE_SELF) - own,
    "engine_cpu_s": cpu(resource.RUSAGE_CHILDREN) - engine, "progress_calls": calls, "loading_cpu_s": loading,
    "finished": True}))
"""


def _api(stage: Stage) -> list[str]:
    return [stage.shop.python(), "-c", _API, stage.a, stage.b]


VERIFY = Subject("mirrorpair verify", "mirrorpair", _verify, writes=False)
LOCAL = Subject("mirrorpair local", "mirrorpair", _resync)
PIPE = Subject("mirrorpair pipe", "mirrorpair", _pipe)
TCP = Subject("mirrorpair TCP", "mirrorpair", _tcp, server=True)
TCP_PULL = Subject("mirrorpair TCP pull", "mirrorpair", _tcp_pull, server=True)
CREATE = Subject("mirrorpair to a new file", "mirrorpair", _create, scratch=True)
API = Subject("mirrorpair API", "mirrorpair", _api, watch="python")
WIRE = Subject("mirrorpair TCP, relayed", "mirrorpair", _tcp, server=True, watch="wire")
MEMORY_LOCAL = Subject("mirrorpair local, watched", "mirrorpair", _resync, watch="memory")
MEMORY_PIPE = Subject("mirrorpair pipe, watched", "mirrorpair", _pipe, watch="memory")
MEMORY_TCP = Subject("mirrorpair TCP, watched", "mirrorpair", _tcp, server=True, watch="memory")


# --- peers ----------------------------------------------------------------------------------------------------------


def _cmp(stage: Stage) -> list[str]:
    return ["cmp", "--silent", stage.a, stage.b]


def _dd(stage: Stage) -> list[str]:
    conversion = "notrunc,fdatasync" if stage.flush else "notrunc"
    return ["dd", f"if={stage.a}", f"of={stage.b}", "bs=1M", f"conv={conversion}", "status=none"]


def _cp(stage: Stage) -> list[str]:
    return ["cp", "--sparse=never", "--reflink=never", stage.a, str(stage.pair.scratch)]


def _cp_sparse(stage: Stage) -> list[str]:
    return ["cp", "--sparse=auto", "--reflink=never", stage.a, str(stage.pair.scratch)]


def _rsync(stage: Stage) -> list[str]:
    flush = ["--fsync"] if stage.flush else []
    return ["rsync", "--inplace", "--no-whole-file", "--ignore-times", *flush, stage.a, stage.b]


def _qemu_compare(stage: Stage) -> list[str]:
    return ["qemu-img", "compare", "-f", "raw", "-F", "raw", stage.a, stage.b]


def _qemu_convert(stage: Stage) -> list[str]:
    cache = ["-t", "writeback"] if stage.flush else []
    return ["qemu-img", "convert", "-n", "-W", "-m16", *cache, "-f", "raw", "-O", "raw", stage.a, stage.b]


def _nbdcopy(stage: Stage) -> list[str]:
    flush = ["--flush"] if stage.flush else []
    return ["nbdcopy", *flush, "--", "[", "nbdkit", "file", stage.a, "]", "[", "nbdkit", "file", stage.b, "]"]


def _blocksync_fast(stage: Stage) -> list[str]:
    return ["blocksync-fast", "--silent", "-s", stage.a, "-d", stage.b]


def _blocksync_fast_mmap(stage: Stage) -> list[str]:
    return [*_blocksync_fast(stage), "--mmap"]


def _bdsync(stage: Stage) -> list[str]:
    a, b = shlex.quote(stage.a), shlex.quote(stage.b)
    # The patch is piped, not kept: a patch file of the full size would be one image too many.
    return ["sh", "-c", f"bdsync 'bdsync --server' {a} {b} | bdsync --patch={b}"]


CMP = Subject("cmp", "peer", _cmp, writes=False, needs=("cmp",), only=lambda p: p is EQUAL)
DD = Subject("dd", "peer", _dd, needs=("dd",))
CP = Subject("cp", "peer", _cp, needs=("cp",), scratch=True, only=lambda p: p in (EQUAL, ALL))
CP_SPARSE = Subject("cp to a new file", "peer", _cp_sparse, needs=("cp",), scratch=True)
RSYNC = Subject("rsync", "peer", _rsync, needs=("rsync",))
QEMU_COMPARE = Subject(
    "qemu-img compare", "peer", _qemu_compare, writes=False, needs=("qemu-img",), only=lambda p: p is EQUAL
)
QEMU_CONVERT = Subject("qemu-img convert", "peer", _qemu_convert, needs=("qemu-img",))
NBDCOPY = Subject("nbdcopy", "peer", _nbdcopy, needs=("nbdcopy", "nbdkit"))
BLOCKSYNC = Subject("blocksync-fast", "peer", _blocksync_fast, needs=("blocksync-fast",))
BLOCKSYNC_MMAP = Subject("blocksync-fast --mmap", "peer", _blocksync_fast_mmap, needs=("blocksync-fast",))
BDSYNC = Subject("bdsync", "peer", _bdsync, needs=("bdsync",))

PEERS = (CMP, DD, CP, RSYNC, QEMU_COMPARE, QEMU_CONVERT, NBDCOPY, BLOCKSYNC, BLOCKSYNC_MMAP, BDSYNC)


def warm_subjects(pattern: Pattern) -> tuple[Subject, ...]:
    """In the order of the table: floors, mirrorpair, peers, then what is watched once."""
    if pattern is EQUAL:
        floors: tuple[Subject, ...] = (COMPARE, DIGEST_MAP)
    elif pattern is ALL:
        floors = (COMPARE_PWRITE, STREAM)
    else:
        floors = (COMPARE_MAP, COMPARE_PWRITE, DIGEST_MAP, DIGEST_PWRITE, LIST_MAP, LIST_PWRITE, LIST_TCP)
    ours: tuple[Subject, ...] = (LOCAL, PIPE, TCP)
    if pattern is EQUAL:
        ours = (VERIFY, *ours)
    if pattern is SCATTERED_4K:
        ours = (VERIFY, *ours, TCP_PULL)
    watched: tuple[Subject, ...] = (WIRE,)
    if pattern in (EQUAL, SCATTERED_4K):
        watched += (API,)
    if pattern in (SCATTERED_4K, ALL):
        watched += (MEMORY_LOCAL, MEMORY_PIPE, MEMORY_TCP)
    return (*floors, *ours, *(peer for peer in PEERS if peer.only(pattern)), *watched)
