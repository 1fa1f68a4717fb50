"""One run of fio's nbd engine: its command line, and what it says.

Rules:
- Every server meets the same command line but for the address.
- `seconds` of a sample is the time per request, 1 / IOPS; percentiles are of the whole latency (submission and
  completion), as a client feels it.
- A write "with flush" is one write and one NBD_CMD_FLUSH (fio's engine never sets FUA): its p50 and p99 are the sum of
  both, its time per request holds both.
- Pinned: fio and every thread of the server on one core, so that no wake-up crosses cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from bench.campaign import Sample
from bench.measure import end_group, idle_share, run
from bench.settings import KIB, MIB
from bench.workshop import Failed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.workshop import Workshop


@dataclass(frozen=True)
class Workload:
    title: str
    mode: str
    block: int
    depth: int
    flush: bool = False
    pinned: bool = False

    @property
    def reads(self) -> bool:
        return "read" in self.mode


WRITE_1 = Workload("4k write, depth 1", "randwrite", 4 * KIB, 1)
WRITE_1_PINNED = Workload("4k write, depth 1, pinned", "randwrite", 4 * KIB, 1, pinned=True)
WRITE_32 = Workload("4k write, depth 32", "randwrite", 4 * KIB, 32)
WRITE_BIG = Workload("1 MiB write, depth 8", "write", MIB, 8)
READ_1 = Workload("4k read, depth 1", "randread", 4 * KIB, 1)
READ_32 = Workload("4k read, depth 32", "randread", 4 * KIB, 32)
WRITE_FLUSH = Workload("4k write + flush, depth 1", "randwrite", 4 * KIB, 1, flush=True)
WORKLOADS = (WRITE_1, WRITE_1_PINNED, WRITE_32, WRITE_BIG, READ_1, READ_32, WRITE_FLUSH)
FILL = Workload("fill", "write", MIB, 8)


def command(uri: str, workload: Workload, size: int) -> list[str]:
    """Without the end of the run, which the caller gives."""
    return [
        "fio",
        "--name=live",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={workload.mode}",
        f"--bs={workload.block}",
        f"--size={size}",
        f"--iodepth={workload.depth}",
        *(["--fsync=1"] if workload.flush else []),
        "--norandommap=1",
        "--invalidate=0",
        "--clocksource=clock_gettime",
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        "--percentile_list=50:99",
        "--output-format=json",
    ]


def measured(
    shop: Workshop, uri: str, workload: Workload, size: int, seconds: float, pids: Iterable[int] = ()
) -> Sample:
    """`pids`: the server's processes, for a pinned workload. Raises `Failed`."""
    idle = idle_share(0.02)
    end = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    with pinned(pids) if workload.pinned else contextlib.nullcontext():
        job, cpu_s = _run(shop, [*command(uri, workload, size), *end], seconds + 60.0)
    told = job["read" if workload.reads else "write"]
    if not told["total_ios"]:
        raise Failed(f"fio made no request in {seconds:g} s")
    latencies = [told["lat_ns"]["percentile"]]
    if workload.flush:
        latencies.append(job["sync"]["lat_ns"]["percentile"])
    facts = {
        "iops": told["iops"],
        "bytes_per_s": told["bw_bytes"],
        "p50_us": sum(one["50.000000"] for one in latencies) / 1e3,
        "p99_us": sum(one["99.000000"] for one in latencies) / 1e3,
        "requests": told["total_ios"],
    }
    return Sample(1 / told["iops"], cpu_s=cpu_s, idle_before=idle, facts=facts)


def fill(shop: Workshop, uri: str, size: int) -> None:
    """Every byte written once, in order, with other bytes than any time before."""
    _run(shop, [*command(uri, FILL, size), "--randrepeat=0", "--refill_buffers=1"], 600.0)


class Running:
    """fio in the background, with a log of every request. A context manager: it ends with it."""

    def __init__(self, shop: Workshop, uri: str, workload: Workload, size: int) -> None:
        self._log = shop.folder / "fio-log"
        argv = [*command(uri, workload, size), "--time_based", "--runtime=3600s"]
        argv += [f"--write_lat_log={self._log}", "--log_unix_epoch=1"]
        self._process = subprocess.Popen(
            argv,
            env=shop.environment(flush=True),
            cwd=shop.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        end_group(self._process.pid)
        for path in self._log.parent.glob(f"{self._log.name}_*.log"):
            path.unlink()

    def check(self) -> None:
        """`Failed` when it has ended."""
        if self._process.poll() is not None:
            raise Failed(f"fio ended with {self._process.returncode} while a resync ran")

    def stop(self) -> list[tuple[float, float]]:
        """(seconds since 1970, latency in seconds) of every request."""
        self.check()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60.0)
        except subprocess.TimeoutExpired:
            raise Failed("fio did not end within 60 s of SIGINT") from None
        rows = []
        path = self._log.with_name(f"{self._log.name}_lat.1.log")
        for line in path.read_text(encoding="ascii").splitlines():
            at, took, *_ = line.split(",")
            rows.append((int(at) / 1e3, int(took) / 1e9))
        return rows


def _run(shop: Workshop, argv: list[str], limit_s: float) -> tuple[dict[str, Any], float]:
    result = run(argv, env=shop.environment(flush=True), limit_s=limit_s, cwd=shop.folder)
    if result.cut:
        raise Failed(f"fio did not end within {limit_s:.0f} s")
    start = result.stdout.find("{")
    if result.status != 0 or start < 0:
        raise Failed(f"fio ended with {result.status}: {result.tail()}")
    job = json.loads(result.stdout[start:])["jobs"][0]
    if job["error"]:
        raise Failed(f"fio met the error {os.strerror(job['error'])}: {result.tail()}")
    return job, result.user_s + result.system_s


@contextlib.contextmanager
def pinned(pids: Iterable[int]) -> Iterator[None]:
    """These processes, and what this thread starts, on one core."""
    before = os.sched_getaffinity(0)
    one = {max(before)}
    tasks = [task for pid in pids for task in _tasks(pid)]
    try:
        for task in (0, *tasks):
            _set_affinity(task, one)
        yield
    finally:
        for task in (0, *tasks, *(task for pid in pids for task in _tasks(pid))):
            _set_affinity(task, before)


def _tasks(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _set_affinity(task: int, cores: set[int]) -> None:
    with contextlib.suppress(ProcessLookupError):  # a thread that has ended since
        os.sched_setaffinity(task, cores)
