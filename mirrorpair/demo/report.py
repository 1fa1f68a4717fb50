"""What the demo tells while it runs, and what it found at its end.

Rules:
- A struct's fields are the JSON's; they are only ever added to. A figure that was not come to is None, never 0.
- `passed` is decided in one place: by there being no problem, and by every check having been made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from mirrorpair.control import Working

StepName = Literal[
    "init", "start", "begin", "write", "kill", "failover", "return", "resync", "failback", "verify", "cut", "freeze",
    "thaw",
]  # fmt: skip

SCHEMA = "mirrorpair.demo/1"


class StepLine(msgspec.Struct, frozen=True, kw_only=True, tag="step", tag_field="type"):
    """Something that has just happened. `seconds` since the demo began; `pids` the processes that then run."""

    schema: str = SCHEMA
    step: StepName
    message: str
    seconds: float
    acknowledged_writes: int
    pids: dict[str, int]


class ResultLine(msgspec.Struct, kw_only=True, tag="result", tag_field="type"):
    """The verdict and its figures. Writes are those of the whole run.

    `lost_writes`: acknowledged, and not there when read back. `wrong_reads`: while clients wrote, reads that gave what
    the block could not hold at that time. `longest_stall_s`: how long a client that had asked for a write went without
    any answer, failover and failback included, the negative control left out. `frozen_*` is the negative control:
    for so long the primary was watched without peer and witness, so many writes were sent to it in that time, so many
    of them it acknowledged before the witness was back (right is 0), and afterwards.
    """

    schema: str = SCHEMA
    op: str = "demo"
    passed: bool = False
    finished: bool = True
    problems: list[str]
    acknowledged_writes: int = 0
    unanswered_writes: int = 0
    lost_writes: int | None = None
    checked_bytes: int | None = None
    reads: int = 0
    wrong_reads: int = 0
    images_identical: bool | None = None
    unanswered_at_kill: int | None = None
    failover_s: float | None = None
    failover_stall_s: float | None = None
    longest_stall_s: float | None = None
    resync_bytes: int | None = None
    resync_skipped_bytes: int | None = None
    resync_sent_bytes: int | None = None
    resync_s: float | None = None
    failback_s: float | None = None
    failback_stall_s: float | None = None
    frozen_s: float | None = None
    frozen_reads_s: float | None = None
    frozen_writes: int | None = None
    frozen_acknowledged: int | None = None
    thawed_acknowledged: int | None = None
    seconds: float = 0.0
    folder: str | None = None

    def conclude(self) -> None:
        """Sets `passed`."""
        complete = (
            self.acknowledged_writes > 0
            and self.lost_writes == 0
            and self.images_identical is True
            and self.wrong_reads == 0
            and self.frozen_acknowledged == 0
            and bool(self.frozen_writes)
            and bool(self.thawed_acknowledged)
            and None not in (self.failover_s, self.resync_bytes, self.failback_s)
        )
        if not (complete or self.problems):
            self.problems.append("not every check was made")
        self.passed = complete and not self.problems


class Teller:
    """Who hears what happens; on its own it is the silent one."""

    def step(self, line: StepLine) -> None:
        pass

    def resync(self, working: Working) -> None:
        """Several times a second while a resync runs."""

    def resynced(self) -> None:
        """The last word of that resync."""
