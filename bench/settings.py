"""What a run is told from outside.

| variable | meaning | default |
|---|---|---|
| MIRRORPAIR_BENCH_SIZE | size of each image; live volumes have at most 1 GiB, in resyncs 2 or 4 GiB | 4GiB |
| MIRRORPAIR_BENCH_ROUNDS | runs of each subject; slow ones get fewer, live ones at least 7, from 1 GiB on | 5 |
| MIRRORPAIR_BENCH_LIMIT | seconds after which a peer's run is cut off and reported as "> limit" | 45 |
| MIRRORPAIR_BENCH_COMMAND | the mirrorpair to measure | the one beside this Python, else on PATH |
| MIRRORPAIR_BENCH_RESULTS | folder for the results as JSON | bench/results |
| TMPDIR | where the images lie: at most three of them at once | the system's |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PIECE = 4 * KIB
BLOCK = 64 * KIB
SMALL = GIB
"""Below this size the goals, which are stated for 4 GiB, say little: the start of a process is most of what is seen."""

_UNITS = {"": 1, "B": 1, "K": KIB, "KIB": KIB, "M": MIB, "MIB": MIB, "G": GIB, "GIB": GIB, "T": TIB, "TIB": TIB}


def parse_size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 256MiB or 4GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def show_size(size: float) -> str:
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class Settings:
    size: int = 4 * GIB
    rounds: int = 5
    limit_s: float = 45.0
    """A peer may be slow; nothing else may take longer than `patience_s`."""
    patience_s: float = 600.0
    budget_s: float = 25.0
    """A peer stops being repeated when its runs of a group have taken this long together."""
    command: str | None = None
    results: Path | None = None

    def rounds_for(self, seconds: float) -> int:
        return max(1, min(self.rounds, int(self.budget_s / max(seconds, 1e-9))))

    @staticmethod
    def from_environment(environment: dict[str, str] | None = None) -> Settings:
        given = dict(os.environ) if environment is None else environment
        size = parse_size(given.get("MIRRORPAIR_BENCH_SIZE", "4GiB"))
        if size < 4 * MIB or size % MIB:
            raise ValueError("MIRRORPAIR_BENCH_SIZE must be a multiple of 1 MiB, and at least 4 MiB")
        results = given.get("MIRRORPAIR_BENCH_RESULTS")
        return Settings(
            size=size,
            rounds=max(1, int(given.get("MIRRORPAIR_BENCH_ROUNDS", "5"))),
            limit_s=float(given.get("MIRRORPAIR_BENCH_LIMIT", "45")),
            command=given.get("MIRRORPAIR_BENCH_COMMAND"),
            results=Path(results) if results else Path(__file__).parent / "results",
        )
