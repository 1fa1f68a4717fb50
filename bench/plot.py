"""Draws the results of one run: `python -m bench.plot RESULTS.json [PICTURE]`. Only this file needs matplotlib.

One panel a group, one bar a subject, on a logarithmic axis: the subjects differ by up to two hundred times.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

_COLOURS = {"floor": "#9a9a9a", "mirrorpair": "#1f6fb4", "peer": "#d98c3f"}


def draw(results: dict[str, Any], picture: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install matplotlib") from None
    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    panels = []
    for group in results["groups"]:
        bars = [x for x in group["series"] if x["seconds"] is not None and not x["watch"]]
        if bars and group["name"] != "limits":
            panels.append((group, bars))
    if not panels:
        raise SystemExit("there is nothing to draw in it")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = max(len(bars) for _, bars in panels) * 0.28 + 1.1
    figure, axes = plt.subplots(rows, columns, figsize=(7.5 * columns, height * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (group, bars) in zip(axes.flat, panels, strict=False):
        names = [x["name"] for x in bars]
        values = [x["seconds"] for x in bars]
        axis.barh(names, values, color=[_COLOURS[x["kind"]] for x in bars])
        axis.set_xscale("log")
        axis.set_xlim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 2)))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.invert_yaxis()
        axis.set_title(group["title"], fontsize=10)
        axis.set_xlabel(group["facts"].get("axis", "seconds, whole command, median"))
        axis.tick_params(labelsize=8)
        for index, bar in enumerate(bars):
            cut = "> " if bar["state"] == "cut" else ""
            axis.text(bar["seconds"] * 1.08, index, f"{cut}{bar['seconds']:.3g}", va="center", fontsize=7)
    about = results["about"]
    title = f"{about['size']} images, {about['processor']}, {about['cores']} cores, Linux {about['kernel']}"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print("usage: python -m bench.plot RESULTS.json [PICTURE]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    picture = Path(arguments[1]) if len(arguments) == 2 else source.with_suffix(".png")
    draw(json.loads(source.read_text(encoding="utf-8")), picture)
    print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
