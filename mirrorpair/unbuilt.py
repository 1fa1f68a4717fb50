"""What the configuration may ask for and this version cannot do yet. Pure.

Rule: the whole file is validated by config.py, so that one file serves all versions; but a daemon never starts as if it
did what it does not. A key leaves this list with the commit that builds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrorpair.errors import ConfigError
from mirrorpair.text import printable

if TYPE_CHECKING:
    from mirrorpair.config import Config


def unbuilt(config: Config, name: str) -> list[tuple[str, str]]:
    """(key, what is possible) for everything that node `name` is asked for in vain."""
    me = config.node(name)
    node = f"node.{name}"
    asked = (
        (config.mode != "sync", "pair.mode", '"sync"'),
        (config.arbiter == "etcd", "pair.arbiter", '"witness", or "none": roles by hand'),
        (
            config.failback != "manual" and config.arbiter == "none",
            "pair.failback",
            '"manual", since nobody fails over by itself with arbiter = "none"',
        ),
        (config.reads != "validity", "pair.reads", '"validity"'),
        (me.http is not None, f"{node}.http", "to leave it out"),
        (me.nbd_forward, f"{node}.nbd-forward", "false"),
        (me.vip is not None, f"{node}.vip", "to leave it out"),
        (config.hooks.dir is not None, "hooks.dir", "to leave it out"),
        (config.hooks.fence_peer is not None, "hooks.fence-peer", "to leave it out"),
    )
    return [(key, possible) for wanted, key, possible in asked if wanted]


def refuse_unbuilt(config: Config, name: str) -> None:
    """ConfigError that names the first such key."""
    for key, possible in unbuilt(config, name):
        raise ConfigError(f"{printable(config.path)}: {key}: this version cannot do that yet; possible is {possible}")
