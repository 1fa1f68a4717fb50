"""What a node costs while it has nothing to do: memory and opening by size, wake-ups and CPU when idle.

Rules:
- A node of a huge volume is one that `init` made: a sparse image, metadata of full size. It runs without its peer.
- Memory is what belongs to the process (the proportional share of anonymous and shared pages), beside the kernel's
  RSS, which also counts pages of files, such as the libraries that every Python maps.
- Opening runs from the start of the process until its control socket says that it has finished starting.
- Wake-ups are the voluntary context switches of all threads; CPU time is the scheduler's, in nanoseconds.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.campaign import Group, Sample
from bench.daemons import SERVED, LivePair, Node, need_client
from bench.live import LivePlan, Scale, guarded, start
from bench.measure import idle_share, memory_bytes
from bench.settings import MIB, TIB, show_size
from bench.workshop import Failed, Workshop

if TYPE_CHECKING:
    from collections.abc import Callable

COST = "cost"
SMALL_SIZE = 16 * MIB
SIZES = (SMALL_SIZE, TIB, 8 * TIB)
INTERVAL_S = 0.25
PRIMARY, SECONDARY, LONELY = "idle primary, connected", "idle secondary, connected", "idle node, no peer"
_WINDOW_S = 5.0


def opening(size: int) -> str:
    return f"mirrorpair opens {show_size(size)}"


def _measure(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    shop.mirrorpair()
    need_client()
    group = Group(plan.name, plan.title, SMALL_SIZE)
    for name in plan.subjects:
        start(group, name, "mirrorpair")
        if name in (PRIMARY, SECONDARY, LONELY):
            group.series[name].watch = "idle"
    scale = Scale.of(shop.settings)
    window_s = _WINDOW_S if scale.rounds > 2 else 10 * scale.seconds
    group.facts = {"rounds": scale.rounds, "window_s": window_s, "axis": "seconds, median"}
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], Sample]] = {}
        for size in SIZES:
            pair = stack.enter_context(LivePair(shop, size))
            try:
                pair.alpha.init()
            except Failed as error:
                series = group.series[opening(size)]
                series.state = "absent" if "too large" in str(error).lower() else "failed"
                series.reason = str(error)
                continue
            steps[opening(size)] = lambda node=pair.alpha: _open(node)
        for _number in range(scale.rounds):
            for name, step in steps.items():
                guarded(group.series[name], step)
    with LivePair(shop, SMALL_SIZE, heartbeat=f'interval = "{INTERVAL_S * 1000:.0f}ms"') as pair:
        pair.up(SERVED)
        nodes = {PRIMARY: pair.alpha, SECONDARY: pair.beta}
        for _number in range(min(3, scale.rounds)):
            for name, sample in _idle(nodes, window_s).items():
                group.series[name].samples.append(sample)
        pair.beta.stop()
        group.series[LONELY].samples.append(_idle({LONELY: pair.alpha}, window_s)[LONELY])
    return group


def _open(node: Node) -> Sample:
    idle = idle_share(0.02)
    before = time.perf_counter()
    node.start()
    try:
        node.until_up()
        seconds = time.perf_counter() - before
        facts = {"memory_bytes": memory_bytes(node.pid), "rss_bytes": _rss(node.pid)}
    finally:
        node.kill()
    return Sample(seconds, idle_before=idle, facts=facts)


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"process {pid} has no VmRSS")


def _idle(nodes: dict[str, Node], window_s: float) -> dict[str, Sample]:
    """All of them in the same window."""
    share = idle_share(0.02)
    before = {name: _used(node.pid) for name, node in nodes.items()}
    began = time.perf_counter()
    time.sleep(window_s)  # the window itself
    passed = time.perf_counter() - began
    found = {}
    for name, node in nodes.items():
        switches, cpu_ns = (b - a for a, b in zip(before[name], _used(node.pid), strict=True))
        facts = {"wakeups_per_s": switches / passed, "cpu_percent": cpu_ns / 1e7 / passed}
        found[name] = Sample(passed, cpu_s=cpu_ns / 1e9, idle_before=share, facts=facts)
    return found


def _used(pid: int) -> tuple[int, int]:
    """(voluntary context switches, nanoseconds of CPU) of all threads."""
    switches = cpu_ns = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        folder = Path(f"/proc/{pid}/task/{task}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            for line in (folder / "status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    switches += int(line.split()[1])
            cpu_ns += int((folder / "schedstat").read_text(encoding="ascii").split()[0])
    return switches, cpu_ns


COST_PLAN = LivePlan(
    COST,
    "what an idle node costs, and opening by size",
    (*map(opening, SIZES), PRIMARY, SECONDARY, LONELY),
    _measure,
)
