"""libnbd at a mirrored pair, through the system's Python: many connections, every flag, and what must be refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mirror import SIZE
from pair import MIB
from realclients import ENVIRONMENT, tool

if TYPE_CHECKING:
    from mirror import Mirror

PYTHON = "/usr/bin/python3"
SCRIPT = Path(__file__).with_name("libnbd_client.py")


def _lacks_libnbd() -> bool:
    try:
        subprocess.run([PYTHON, "-c", "import nbd"], capture_output=True, env=ENVIRONMENT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return True
    return False


pytestmark = pytest.mark.skipif(_lacks_libnbd(), reason="python3-libnbd is not installed")


def run(what: str, *uris: str) -> None:
    assert tool(PYTHON, SCRIPT, what, *uris).endswith("good\n")


def test_many_connections_see_each_others_writes(mirror: Mirror) -> None:
    run("multi_conn", *mirror.uris(mirror.alpha))
    content = b"".join(bytes([index]) * 65536 for index in range(128))
    mirror.finish(data=content + bytes(SIZE - len(content)))


def test_fua_trim_and_zero(mirror: Mirror) -> None:
    content = b"\x77" * (MIB - 1) + bytes(2 * MIB + 1) + b"\x77" * (MIB - 1) + b"\x01" + bytes(SIZE - 4 * MIB)
    run("flags", mirror.unix(mirror.alpha, "data"))
    run("flags", mirror.tcp(mirror.alpha, "logs"))
    mirror.finish(data=content, logs=content)


def test_bad_requests_are_refused_and_change_nothing(mirror: Mirror) -> None:
    run("bad_requests", mirror.unix(mirror.alpha, "data"))
    run("bad_requests", mirror.tcp(mirror.alpha, "logs"))
    content = b"good" + bytes(SIZE - 4)
    mirror.finish(data=content, logs=content)


def test_a_client_that_hangs_up_with_replies_pending_hurts_nobody(mirror: Mirror) -> None:
    with mirror.alpha.client() as other:
        other.write(8 * MIB, b"stays" * 1000)
        for _ in range(3):
            run("hang_up", *mirror.uris(mirror.alpha))
            assert other.read(8 * MIB, 5000) == b"stays" * 1000
    run("flags", mirror.tcp(mirror.alpha, "logs"))
    mirror.finish()
