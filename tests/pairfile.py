"""A configuration of a pair for tests: two nodes on unix sockets in one folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.config import Config, load

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_pair(
    folder: Path,
    volumes: Mapping[str, str] | None = None,
    images: Mapping[str, object] | None = None,
    *,
    state_dir: object = "state",
    resync_rate: str = "auto",
) -> Path:
    """`volumes`: sizes by name, by default one of 1 MiB. `images`: other paths than NODE-VOLUME.img, by that stem."""
    volumes = volumes or {"data": "1MiB"}
    lines = ["[pair]", 'name = "shop"', 'arbiter = "none"', "[resync]", f'rate = "{resync_rate}"']
    for volume, size in volumes.items():
        lines += [f"[volume.{volume}]", f'size = "{size}"']
    for node in ("alpha", "beta"):
        lines += [
            f"[node.{node}]",
            f'address = "unix:{node}.sock"',
            f'state-dir = "{state_dir}"',
            f'control = "{node}.control"',
            f'nbd = ["unix:{node}.nbd"]',
        ]
        for volume in volumes:
            stem = f"{node}-{volume}"
            lines.append(f'image.{volume} = "{(images or {}).get(stem, f"{stem}.img")}"')
    path = folder / "pair.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_pair(folder: Path) -> Config:
    return load(str(folder / "pair.toml"))
