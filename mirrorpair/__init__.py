"""mirrorpair: a data volume on two hosts, and the fast way to make two disk images equal.

    import mirrorpair as mp
    mp.compare("a.img", "b.img").ranges              # [(offset, length), ...] in bytes
    mp.resync("a.img", "ssh://host/srv/a.img")       # only what differs travels

Rule: importing the package costs next to nothing. A name below is loaded when it is first used (PEP 562), so that
`mirrorpair --help` starts at once and a program that only wants an error class does not load the C core.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mirrorpair.errors import (
        ConfigError,
        ImageError,
        Interrupted,
        LocalError,
        MirrorpairError,
        NotAllowedError,
        PeerError,
        PeerProtocolError,
        PeerTimeoutError,
        RefusedError,
        RemoteError,
        UnreachableError,
        UsageError,
    )
    from mirrorpair.offline import compare, resync, verify
    from mirrorpair.report import CompareResult, Progress, ResyncResult

_HOME = {
    "compare": "offline",
    "resync": "offline",
    "verify": "offline",
    "CompareResult": "report",
    "Progress": "report",
    "ResyncResult": "report",
    "ConfigError": "errors",
    "ImageError": "errors",
    "Interrupted": "errors",
    "LocalError": "errors",
    "MirrorpairError": "errors",
    "NotAllowedError": "errors",
    "PeerError": "errors",
    "PeerProtocolError": "errors",
    "PeerTimeoutError": "errors",
    "RefusedError": "errors",
    "RemoteError": "errors",
    "UnreachableError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "CompareResult",
    "ConfigError",
    "ImageError",
    "Interrupted",
    "LocalError",
    "MirrorpairError",
    "NotAllowedError",
    "PeerError",
    "PeerProtocolError",
    "PeerTimeoutError",
    "Progress",
    "RefusedError",
    "RemoteError",
    "ResyncResult",
    "UnreachableError",
    "UsageError",
    "__version__",
    "compare",
    "resync",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
