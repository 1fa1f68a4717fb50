"""Runs a Spin model (tests/model/*.pml): spin makes C of it, the compiler a program, that looks at every state.

Rules:
- A search that was cut off, by depth, memory or time, is no result: `Found.complete`, or an error here.
- What bounds a search are the model's own numbers (-D): the same states each time, however busy the machine is.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER = Path(__file__).resolve().parent / "model"
LIMIT_S = 3600.0  # somebody hangs; it is not what ends a search
DEPTH = 200_000
MEMORY_MIB = 900
# What pan says when it did not look at everything.
CUT_OFF = ("max search depth too small", "out of memory", "Search not completed", "hash table full", "bit-state")


class Tools(NamedTuple):
    spin: str
    cc: str


class Found(NamedTuple):
    errors: int
    violated: bool
    """an assertion"""
    complete: bool
    states: int
    depth: int
    memory_mib: float
    output: str


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{output}")
    return output


def search(
    tools: Tools,
    folder: Path,
    model: str,
    defines: Iterable[str] = (),
    *,
    optimize: str = "-O1",
    memory_mib: int = MEMORY_MIB,
    depth: int = DEPTH,
) -> Found:
    """All states of the model, or as far as its first error. `folder`: for what is made on the way."""
    source = FOLDER / f"{model}.pml"
    preprocess = f"-P{tools.cc} -E -x c"
    run([tools.spin, preprocess, "-a", *(f"-D{one}" for one in defines), str(source)], folder)
    # SAFETY: assertions only, no cycles. MEMLIM: MiB.
    options = ["-DSAFETY", "-DNOFAIR", f"-DMEMLIM={memory_mib}"]
    run([tools.cc, optimize, "-w", *options, "-o", "pan", "pan.c"], folder)
    output = run([str(folder / "pan"), f"-m{depth}", "-w22"], folder)
    return Found(
        errors=int(_number(r"errors: (\d+)", output)),
        violated="assertion violated" in output,
        complete=not any(one in output for one in CUT_OFF),
        states=int(_number(r"(\d+) states, stored", output)),
        depth=int(_number(r"depth reached (\d+)", output)),
        memory_mib=_number(r"([\d.]+)\s+total actual memory usage", output),
        output=output,
    )


def _number(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in what the search says:\n{output}")
    return float(found[1])
