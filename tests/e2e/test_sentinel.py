"""Proof of death: real daemons, their sentinels, a real witness, real kills (A11).

The promise is ten minutes here, so whoever takes over in time does so by a proof and nothing else; where silence alone
has to do, it is short. A lone pair (arbiter = "none") has no sentinel yet: L1 is not built.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from model import finish, serve
from test_failover import record, until

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
    process = pair.alpha.process
    assert process is not None
    pair.alpha.signal(signal.SIGABRT)
    pair.beta.wait("primary")
    assert process.wait() == -signal.SIGABRT
    pair.alpha.process = None
    serve(pair.beta, model)
    pair.alpha.start()
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
