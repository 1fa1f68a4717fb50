"""What the commands that talk to the node's daemon share: the way to it, and the result's line.

Rules:
- The configuration says where the daemon listens; nothing else of it is needed, so a command works whatever the
  daemon is doing.
- A command's last JSON line is a ResultLine, whose fields are only ever added to.
- A daemon that is not there, or ends while a command waits for it, is exit code 11 and one sentence.
"""

from __future__ import annotations

import time

import msgspec

from mirrorpair.cli.common import Settings, load_pair, note, write_line
from mirrorpair.control import AdminClient
from mirrorpair.errors import UnreachableError
from mirrorpair.status import Health, Role, Status, holds
from mirrorpair.text import printable


class ResultLine(msgspec.Struct, frozen=True, kw_only=True, tag="result", tag_field="type"):
    """How a command ended, and what the node is then. `in_sync`: no block of any volume may differ."""

    schema: str = "mirrorpair.result/1"
    op: str
    node: str
    message: str
    role: Role
    epoch: int
    health: Health
    in_sync: bool
    dry_run: bool = False
    finished: bool = True


def connect(settings: Settings) -> AdminClient:
    """A connection to this node's daemon, to be used in a `with`."""
    return AdminClient(load_pair(settings)[1].control)


def connect_within(settings: Settings, patience: float) -> AdminClient:
    """As `connect`, but a daemon that is just being started may take `patience` seconds to answer."""
    control, deadline, told = load_pair(settings)[1].control, time.monotonic() + patience, False
    while True:
        try:
            return AdminClient(control)
        except UnreachableError:
            if time.monotonic() >= deadline:
                raise
        if not told:
            note(settings, f"no daemon answers yet at {printable(control)}: waiting for it")
            told = True
        time.sleep(0.05)  # nothing tells of a socket that is about to be made, but looking again


def show_result(settings: Settings, op: str, message: str, status: Status, *, dry_run: bool = False) -> None:
    if settings.json:
        line = ResultLine(
            op=op,
            node=status.node,
            message=message,
            role=status.role,
            epoch=status.epoch,
            health=status.health,
            in_sync=holds(status, "synced"),
            dry_run=dry_run,
        )
        write_line(msgspec.json.encode(line).decode())
    elif not settings.quiet:
        write_line(printable(message))
