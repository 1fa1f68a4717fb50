"""A longer campaign: the models of this folder with larger bounds than CI has time for.

    python tests/model/campaign.py                       # all of them, 6 GiB at the most
    python tests/model/campaign.py --memory 2000 power   # MiB; one model

Needs spin and gcc. Each line is a complete search: the model, its bounds, states, seconds; the exit code is 1 if an
assertion failed, or a search was cut off for want of memory. Trails are kept in the folder that is then named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import promela

BOUNDS = {
    "lease": ({},),
    "frames": ({"C": 2}, {"E": 4}, {"L": 1}),
    "replies": ({"L": 2}, {"C": 2}, {"W": 2}),
    "power": ({"W": 2, "C": 1}, {"L": 1, "C": 1}, {"E": 4}),
    "blank": ({"C": 2}, {"W": 2}),
    "handoff": ({"L": 2}, {"W": 2}, {"C": 2}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="the Spin models with larger bounds")
    parser.add_argument("model", nargs="*", choices=[*BOUNDS, []], help="only these")
    parser.add_argument("--memory", type=int, default=6000, metavar="MIB", help="for one search (default: %(default)s)")
    options = parser.parse_args()
    spin, cc = shutil.which("spin"), shutil.which("gcc") or shutil.which("cc")
    if spin is None or cc is None:
        parser.error("spin or gcc is not installed")
    failed = False
    for model in options.model or BOUNDS:
        for bounds in BOUNDS[model]:
            defines = [f"{name}={value}" for name, value in bounds.items()]
            folder = Path(tempfile.mkdtemp(prefix="mirrorpair-model-"))
            begun = time.monotonic()
            found = promela.search(
                promela.Tools(spin, cc), folder, model, defines, optimize="-O2", memory_mib=options.memory
            )
            good = found.complete and not found.errors
            what = "complete, right" if good else f"see {folder}" if found.errors else "cut off"
            words = " ".join(defines) or "-"
            seconds = time.monotonic() - begun
            print(f"{model:8} {words:8} {found.states:>12,} states {seconds:7.1f} s  {what}", flush=True)
            if not found.errors:
                shutil.rmtree(folder)
            failed = failed or not good
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
