"""What this machine can do and how fast things start on it: the two groups that need no turns; and what it is."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.campaign import Group, Sample, Series
from bench.images import EQUAL, Pair
from bench.measure import idle_share, run
from bench.settings import GIB, show_size
from bench.workshop import CannotRun, Failed, Workshop

START_UP = "start-up"
LIMITS = "limits"
HELP, VERSION, BARE = "mirrorpair --help", "mirrorpair --version", "python -c pass"
_START_ROUNDS = 15


def measure_start_up(shop: Workshop) -> Group:
    group = Group(START_UP, "start-up of a process, files cached", 0)
    env = shop.environment(flush=True)
    try:
        command, python = shop.mirrorpair(), shop.python()
    except CannotRun as reason:
        command, python, absent = "", sys.executable, str(reason)
    else:
        absent = ""
    commands = {HELP: [command, "--help"], VERSION: [command, "--version"], BARE: [python, "-c", "pass"]}
    for name in commands:
        ours = name != BARE
        series = Series(name, "mirrorpair" if ours else "floor", "")
        group.series[name] = series
        if ours and absent:
            series.state, series.reason = "absent", absent
    for number in range(-1, _START_ROUNDS):
        for name, argv in commands.items():
            series = group.series[name]
            if series.state != "ok":
                continue
            result = run(argv, env=env, limit_s=30.0, cwd=shop.folder)
            if result.status != 0:
                series.state, series.reason = "failed", f"ended with {result.status}: {result.tail()}"
            elif number >= 0:  # the first one only fills the caches
                series.samples.append(Sample(result.seconds, cpu_s=result.user_s + result.system_s))
    return group


def measure_limits(shop: Workshop) -> Group:
    size = min(shop.settings.size, GIB)
    group = Group(LIMITS, "limits of this machine, page cache", size)
    pair = Pair.build(shop, EQUAL, size)
    try:
        pair.warm()
        group.facts = pair.facts | {"idle": idle_share(0.2)}
        result = run([shop.program("limits"), str(pair.source), str(pair.target)], cwd=shop.folder)
        if result.status != 0:
            raise Failed(f"floors/limits ended with {result.status}: {result.tail()}")
        for line in result.stdout.splitlines():
            told = json.loads(line)
            name = f"{told['name']}, {told['threads']} thread{'s' if told['threads'] > 1 else ''}"
            series = Series(name, "floor", "")
            series.samples.append(Sample(told["seconds"], told["seconds"], facts={"bytes": told["bytes"]}))
            group.series[name] = series
    finally:
        pair.remove()
    return group


def describe(shop: Workshop) -> dict[str, Any]:
    """What a reader needs to know to compare two runs. No host name, no path."""
    return {
        "processor": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": show_size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "kernel": platform.release(),
        "file system": _file_system(shop.folder),
        "free": show_size(shutil.disk_usage(shop.folder).free),
        "dirty limits": f"{_word('/proc/sys/vm/dirty_background_ratio')}/{_word('/proc/sys/vm/dirty_ratio')} %",
        "load": " ".join(f"{x:.2f}" for x in os.getloadavg()),
        "python": platform.python_version(),
        "size": show_size(shop.settings.size),
        "rounds": shop.settings.rounds,
        "tools": tool_versions(shop),
    }


def tool_versions(shop: Workshop) -> dict[str, str]:
    found = {}
    try:
        found["mirrorpair"] = _say([shop.mirrorpair(), "--version"])
    except CannotRun:
        found["mirrorpair"] = "absent"
    for program in (
        *("cmp", "dd", "cp", "rsync", "qemu-img", "nbdcopy", "nbdkit", "blocksync-fast", "bdsync"),
        *("fio", "qemu-nbd", "qemu-storage-daemon"),
    ):
        found[program] = _say([program, "--version"]) if shutil.which(program) else "absent"
    return found


def _say(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not say ({error})"
    lines = (done.stdout or done.stderr).splitlines()
    return lines[0].strip() if lines else "does not say"


def _first(path: str, key: str) -> str:
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return platform.machine()


def _word(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return "?"


def _file_system(folder: Path) -> str:
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return "unknown"
