"""How long clients are without a server when the primary's daemon is killed, and what its sentinel costs.

Rules:
- A run is from just before `kill -9` to the first write that the standby acknowledged, as a client meets it: it dials,
  is refused while the standby is secondary, dials again a millisecond later. fsyncs are real, and are most of the time.
- Roles go to and fro: who was killed is started again and brought in sync, then it is the other one's turn. A sentinel
  has its connection before the kill. None of that is timed.
- Beside it stands the same without a proof, the sentinel killed first: then the promise is waited for.
- Every run begins with a write that was acknowledged by who is killed, and ends with its bytes read from the other one.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import TYPE_CHECKING

from bench.campaign import Group, Sample
from bench.daemons import SERVED, LivePair, Node, need_client, sentinels
from bench.live import LivePlan, Scale, guarded, start
from bench.measure import idle_share, memory_bytes
from bench.settings import MIB
from bench.workshop import Failed, Workshop

if TYPE_CHECKING:
    from bench.campaign import Series

FAILOVER = "failover"
PROVEN, SILENT = "mirrorpair, death proven by the sentinel", "mirrorpair, silence"
SIZE = 64 * MIB
PROMISE_S = 3.0
_RUNS = 30
_SILENT_RUNS = 3
_RETRY_S = 0.001
_LIMIT_S = 60.0


def _measure(shop: Workshop, plan: LivePlan, _: set[str] | None) -> Group:
    shop.mirrorpair()
    need_client()
    group = Group(plan.name, plan.title, SIZE)
    for name in plan.subjects:
        start(group, name, "mirrorpair")
    small = Scale.of(shop.settings).rounds == 1
    runs = {PROVEN: 2 if small else _RUNS, SILENT: 1 if small else _SILENT_RUNS}
    group.facts = {"rounds": runs[PROVEN], "axis": "seconds, median", "heartbeat": f"promise {PROMISE_S:g} s"}
    with LivePair(shop, SIZE, heartbeat=f'promise = "{PROMISE_S:g}s"', witness=True) as pair:
        pair.up(SERVED)
        roles = [pair.alpha, pair.beta]
        for name, count in runs.items():
            for number in range(count):
                guarded(group.series[name], lambda number=number, name=name: _once(pair, roles, number, name == PROVEN))
                if group.series[name].state != "ok":
                    return group
        pair.finish()
    return group


def _once(pair: LivePair, roles: list[Node], number: int, proven: bool) -> Sample:
    primary, other = roles
    pair.synced()
    sentinel = _connected(primary)
    mark = number.to_bytes(4, "big") * 1024
    with primary.client() as client:
        client.write(0, mark, fua=True)
    idle = idle_share(0.02)
    facts = {"memory_bytes": memory_bytes(sentinel)}
    if not proven:
        primary.signal(signal.SIGSTOP)  # or it would start another one
        os.kill(sentinel, signal.SIGKILL)
    before = time.perf_counter()
    primary.signal(signal.SIGKILL)
    _write(other, before + _LIMIT_S)
    seconds = time.perf_counter() - before
    with other.client() as client:
        if bytes(client.read(0, len(mark))) != mark:
            raise Failed(f"{other.name} took over without what {primary.name} had acknowledged")
    primary.kill()
    primary.start()
    primary.until_up()
    roles.reverse()
    return Sample(seconds, idle_before=idle, facts=facts)


def _connected(node: Node) -> int:
    """The sentinel's process number, once it has said that it reaches the peer."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        told = node.log.read_text(encoding="utf-8", errors="replace").rpartition("the sentinel of this node runs")[2]
        found = sentinels(node.pid)
        if found and "the sentinel of this node is connected" in told:
            return found[0]
        time.sleep(0.01)
    raise Failed(f"{node.name} has no sentinel that reaches its peer: {node.tail()}")


def _write(node: Node, deadline: float) -> None:
    from mirrorpair.errors import MirrorpairError

    while True:
        try:
            with node.client() as client:
                client.write(SERVED, b"x" * SERVED)
            return
        except MirrorpairError as error:
            if time.perf_counter() > deadline:
                raise Failed(f"{node.name} did not take over: {error}; its log ends: {node.tail()}") from error
        time.sleep(_RETRY_S)


def rows(group: Group) -> tuple[list[str], list[list[str]]]:
    """The distribution, as a table's head and rows; milliseconds."""
    head = ["kill -9 to the first acknowledged write", "min", "p50", "p90", "max", "n", "sentinel MiB"]
    return head, [_row(series) for series in group.series.values()]


def _row(series: Series) -> list[str]:
    found = sorted(sample.seconds * 1000 for sample in series.samples)
    if not found:
        return [series.name, series.state, "", "", "", "", ""]
    spread = found[0], statistics.median(found), found[min(len(found) - 1, round(0.9 * len(found)))], found[-1]
    memory = statistics.median(sample.facts["memory_bytes"] for sample in series.samples) / MIB
    return [series.name, *(f"{value:,.0f} ms" for value in spread), str(len(found)), f"{memory:.1f}"]


PLAN = LivePlan(FAILOVER, "the primary's daemon is killed, with a witness", (PROVEN, SILENT), _measure)
