"""Proof of death: real daemons, their sentinels, a real witness, real kills (A11).

The promise is ten minutes here, so whoever takes over in time does so by a proof and nothing else; where silence alone
has to do, it is short. A lone pair (arbiter = "none") has no sentinel yet: L1 is not built.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from model import BLOCK, finish, serve
from pair import HANG_S
from test_failover import record, until

from mirrorpair.errors import MirrorpairError

if TYPE_CHECKING:
    from collections.abc import Callable

    from model import Model
    from pair import Daemon, Pair

LONG = "600s"
PROVEN = "says its sentinel"


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(arbiter="witness", promise=LONG)


def proven(death: Daemon, witness: Daemon) -> bool:
    """Whether the death of this one was proven to that one; in brackets may stand how it ended."""
    text = witness.log()
    return f"the daemon of {death.name} has ended" in text and PROVEN in text


def gone(pid: int) -> bool:
    """Not even a remnant of it is left."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def the_primary(pair: Pair) -> Daemon:
    (primary,) = [node for node in pair.nodes if node.status().role == "primary"]
    return primary


def test_a_killed_primary_is_replaced_by_the_proof_of_its_death(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    pair.alpha.kill()
    pair.beta.wait("primary")
    assert proven(pair.alpha, pair.beta)
    serve(pair.beta, model)
    assert (record(pair).primary, record(pair).in_sync) == ("beta", ("beta",))
    pair.alpha.sentinels_end()
    pair.alpha.start()
    pair.synced()
    assert pair.alpha.status().role == "secondary"
    finish(pair, model)


def test_it_goes_to_and_fro_and_no_earlier_proof_is_taken_for_a_later_one(pair: Pair, model: Model) -> None:
    pair.up()
    primary, other = pair.alpha, pair.beta
    for turn in range(1, 5):
        serve(primary, model, 5)
        primary.kill()
        other.wait("primary")
        assert record(pair).epoch == turn + 1
        serve(other, model, 5)
        primary.start()
        pair.synced()
        primary, other = other, primary
    finish(pair, model)


def test_a_daemon_that_crashes_is_dead_as_well(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    pair.alpha.kill(signal.SIGABRT)
    pair.beta.wait("primary")
    assert proven(pair.alpha, pair.beta)
    serve(pair.beta, model)
    pair.alpha.start()
    finish(pair, model)


def test_a_daemon_that_ends_by_itself_and_not_gracefully_is_dead_as_well(pair: Pair, model: Model) -> None:
    """Its metadata cannot be written any more, so nothing follows from what it learns."""
    pair.up()
    serve(pair.alpha, model)
    pid = pair.beta.process.pid if pair.beta.process is not None else 0
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
    code = pair.beta.until_it_ends(lambda: pair.alpha.promote(accept_data_loss=True))  # a new epoch to be learned
    assert code not in (0, -signal.SIGKILL)
    until(pair.alpha, lambda: proven(pair.beta, pair.alpha))
    serve(pair.alpha, model)
    assert record(pair).in_sync == ("alpha",)
    pair.beta.start()
    finish(pair, model)


class Writer(threading.Thread):
    """Writes blocks of ever higher numbers into a place of its own, one at a time, until it is hung up on."""

    def __init__(self, node: Daemon, place: int, first: int) -> None:
        super().__init__()
        self._node, self._place = node, place
        self.asked = self.acknowledged = first
        self.busy = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(MirrorpairError), self._node.client() as client:
            while True:
                self.asked = self.acknowledged + 1
                client.write(self._place * BLOCK, number(self.asked))
                self.acknowledged = self.asked
                if self.acknowledged % 20 == 0:
                    self.busy.set()


def number(value: int) -> bytes:
    return value.to_bytes(8, "big") * (BLOCK // 8)


def test_w8_what_is_on_its_way_when_the_primary_dies_is_there_or_not_and_never_comes_later(
    pair: Pair, model: Model
) -> None:
    """Kills in the middle of writes: what was acknowledged is there, and what was not is one or the other, for good."""
    pair.up()
    primary, other = pair.alpha, pair.beta
    held = [0] * 6
    for _ in range(3):
        writers = [Writer(primary, place, value) for place, value in enumerate(held)]
        for writer in writers:
            writer.start()
        for writer in writers:
            assert writer.busy.wait(HANG_S)
        primary.kill()
        for writer in writers:
            writer.join(HANG_S)
        other.wait("primary")
        with other.client() as client:
            for place, writer in enumerate(writers):
                data = bytes(client.read(place * BLOCK, BLOCK))
                held[place] = int.from_bytes(data[:8], "big")
                assert held[place] in (writer.acknowledged, writer.asked)
                for at in range(0, BLOCK, 8):  # of a write that was not acknowledged any part may be there
                    assert int.from_bytes(data[at : at + 8], "big") in (writer.acknowledged, writer.asked)
                model.data[place * BLOCK : (place + 1) * BLOCK] = data
            model.check(client)
        primary.start()
        pair.synced()
        with other.client() as client:
            model.check(client)
        primary, other = other, primary
    finish(pair, model)


def test_a_killed_secondary_is_not_waited_for(make_pair: Callable[..., Pair], model: Model) -> None:
    """Silence alone would be waited for longer than any client here does."""
    pair = make_pair(arbiter="witness", promise=LONG, interval="2s", suspect_after=100)
    pair.up()
    serve(pair.alpha, model)
    pair.beta.kill()
    serve(pair.alpha, model)
    assert proven(pair.beta, pair.alpha)
    assert (record(pair).primary, record(pair).in_sync) == ("alpha", ("alpha",))
    pair.beta.start()
    finish(pair, model)


@pytest.mark.parametrize("which", ["alpha", "beta"])
def test_a_killed_node_that_is_started_at_once_finds_no_lock_and_no_port_taken(
    pair: Pair, model: Model, which: str
) -> None:
    """Of a primary: it takes its role back, or the other one was quicker."""
    pair.up()
    serve(pair.alpha, model)
    node = pair.alpha if which == "alpha" else pair.beta
    for _ in range(3):
        node.kill()
        node.start()
        pair.synced()
        serve(the_primary(pair), model, 5)
    finish(pair, model)


def test_a_sentinel_that_speaks_late_ends_nothing_of_the_next_process(pair: Pair, model: Model) -> None:
    """alpha's first sentinel stands still while alpha is killed, started, and primary again."""
    pair.up()
    first = pair.alpha.sentinel()
    until(pair.alpha, lambda: "sentinel of this node is connected" in pair.alpha.log())
    os.kill(first, signal.SIGSTOP)
    pair.alpha.kill()
    pair.alpha.start()
    pair.alpha.wait("primary")
    pair.synced()
    serve(pair.alpha, model)
    epoch = record(pair).epoch
    assert pair.alpha.sentinel() != first
    os.kill(first, signal.SIGCONT)
    pair.alpha.sentinels_end()
    serve(pair.alpha, model)
    assert PROVEN not in pair.beta.log()
    assert (record(pair).primary, record(pair).epoch) == ("alpha", epoch)
    pair.alpha.kill()
    pair.beta.wait("primary")
    serve(pair.beta, model)
    pair.alpha.start()
    finish(pair, model)


def test_a_killed_sentinel_changes_nothing_and_the_next_ones_proof_counts(pair: Pair, model: Model) -> None:
    pair.up()
    first = pair.alpha.sentinel()
    os.kill(first, signal.SIGKILL)
    until(pair.alpha, lambda: pair.alpha.sentinels() not in ([], [first]))
    assert gone(first)
    serve(pair.alpha, model)
    assert pair.alpha.log().count("the sentinel of this node ended (signal 9)") == 1
    assert (record(pair).primary, record(pair).epoch) == ("alpha", 1)
    assert PROVEN not in pair.beta.log()
    pair.alpha.kill()
    pair.beta.wait("primary")
    serve(pair.beta, model)
    pair.alpha.start()
    finish(pair, model)


def test_both_killed_is_silence_and_the_promise_is_waited_for(make_pair: Callable[..., Pair], model: Model) -> None:
    pair = make_pair(arbiter="witness")
    pair.up()
    serve(pair.alpha, model)
    sentinel = pair.alpha.sentinel()
    pair.alpha.freeze()  # or it would start another one in between
    os.kill(sentinel, signal.SIGKILL)
    pair.alpha.kill()
    pair.beta.wait("primary")
    assert PROVEN not in pair.beta.log()
    serve(pair.beta, model)
    pair.alpha.start()
    finish(pair, model)


def test_a_stopped_daemon_is_not_dead(pair: Pair, model: Model) -> None:
    """It is silent, which ends nothing while the promise runs. Once it is killed, it is."""
    pair.up()
    serve(pair.alpha, model)
    sentinel = pair.alpha.sentinel()
    pair.alpha.freeze()
    until(pair.beta, lambda: "alpha was silent for" in pair.beta.log())
    assert pair.alpha.sentinels() == [sentinel]
    assert pair.beta.status().role == "secondary"
    assert PROVEN not in pair.beta.log()
    pair.alpha.kill()
    pair.beta.wait("primary")
    assert proven(pair.alpha, pair.beta)
    serve(pair.beta, model)
    pair.alpha.start()
    finish(pair, model)


def test_a_graceful_stop_says_nothing_and_leaves_nothing_behind(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    sentinels = [node.sentinel() for node in pair.nodes]
    for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal or systemd sends them to all
        for sentinel in sentinels:
            os.kill(sentinel, number)
    serve(pair.alpha, model)
    assert [node.sentinel() for node in pair.nodes] == sentinels
    finish(pair, model)
    assert all(gone(sentinel) for sentinel in sentinels)
    assert PROVEN not in pair.logs()


def test_one_that_cannot_start_leaves_no_sentinel(pair: Pair) -> None:
    pair.up()
    second = pair.alpha.command("run", check=False)
    assert second.returncode == 12
    started = second.stderr.rpartition("the sentinel of this node runs, process ")[2].split()[0]
    assert gone(int(started))
    assert record(pair).epoch == 1
    assert pair.alpha.status().role == "primary"


def test_a_lone_pair_has_none(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    pair.up()
    assert [node.sentinels() for node in pair.nodes] == [[], []]
