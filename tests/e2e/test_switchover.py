"""Planned changes of roles: real daemons, a real witness, clients that write meanwhile.

Nothing is lost, no write fails, nothing is resynced; and what stops them.
"""

from __future__ import annotations

import json
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from model import BLOCK, Model, finish, serve
from pair import HANG_S
from test_failover import record, until

from mirrorpair.errors import MirrorpairError
from mirrorpair.nbdclient import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from pair import Daemon, Pair


PATIENT: dict[str, Any] = {"arbiter": "witness", "promise": "6s", "suspect_after": 40}
"""a busy machine is no reason to lose each other: then a switchover would rightly be refused"""


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(**PATIENT)


class Writer(threading.Thread):
    """Writes block after block of its own part of the volume, to whichever node serves, until it is told to end. A
    request that is not answered may have been done or not: it is made again before the next one, so that the part
    holds what `content` says."""

    def __init__(self, pair: Pair, at: int, blocks: int) -> None:
        super().__init__()
        self.pair, self.at, self.blocks = pair, at, blocks
        self.content = bytearray(blocks * 4096)
        self.written = 0
        self.refusals: list[str] = []
        self.failed: list[BaseException] = []
        self._end = threading.Event()
        self._more = threading.Condition()

    def run(self) -> None:
        try:
            turn = 0
            while not self._end.is_set():
                turn = self._session(turn)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.failed.append(error)

    def _session(self, turn: int) -> int:
        node = self.pair.nodes[turn % 2]
        try:
            with connect(str(node.path("nbd")), "data") as client:
                while not self._end.is_set():
                    place = (self.written % self.blocks) * 4096
                    data = (self.written + 1).to_bytes(8, "big") * 512
                    client.write(self.at + place, data)
                    self.content[place : place + 4096] = data
                    with self._more:
                        self.written += 1
                        self._more.notify_all()
        except (MirrorpairError, OSError) as error:
            self.refusals.append(str(error))
            self._end.wait(0.005)  # the other node's turn
        return turn + 1

    def wait_for(self, more: int) -> None:
        with self._more:
            goal = self.written + more
            assert self._more.wait_for(lambda: self.written >= goal, HANG_S), (self.refusals[-3:], self.pair.logs())

    def end(self) -> None:
        self._end.set()
        self.join(HANG_S)
        assert not self.is_alive()
        assert not self.failed, self.failed

    def check(self, node: Daemon) -> None:
        with node.client() as client:
            assert client.read(self.at, len(self.content)) == bytes(self.content)


def sources(pair: Pair) -> list[str]:
    """What the two nodes found to do at each data link."""
    return [line.split(" debug: ")[-1] for line in pair.logs().splitlines() if " volume data: " in line]


def test_under_writes_to_and_fro_nothing_is_lost_and_no_write_fails(pair: Pair) -> None:
    pair.up()
    writers = [Writer(pair, number * 256 * 4096, 200) for number in range(4)]
    for writer in writers:
        writer.start()
    try:
        for name, other in (("beta", "alpha"), ("alpha", "beta"), ("beta", "beta")):
            for writer in writers:
                writer.wait_for(20)
            asked = pair.alpha if other == "alpha" else pair.beta
            done = asked.command("switchover", "--to", name)
            assert done.stdout.startswith(f"{name} is primary, of epoch "), done.stdout
            pair.synced()
        for writer in writers:
            writer.wait_for(20)
    finally:
        for writer in writers:
            writer.end()
    assert record(pair).primary == "beta"
    assert record(pair).in_sync == ("alpha", "beta")
    for writer in writers:
        writer.check(pair.beta)
        # Not one of them was told of an error: their connections ended, or were refused with a reason.
        assert not any("error" in text.lower() for text in writer.refusals), writer.refusals
    assert not any(" full from " in line for line in sources(pair))
    with pair.beta.client() as client:
        client.flush()
    for node in pair.nodes:
        assert node.stop() == 0, pair.logs()
    pair.same_images()


def test_it_is_asked_of_either_node_and_says_what_it_does(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    told = pair.alpha.command("switchover", "--dry-run", "--json").stdout
    assert json.loads(told)["message"].startswith("beta would become primary")
    assert pair.beta.command("switchover", "-n").stdout.startswith("beta would become primary")
    assert record(pair).primary == "alpha"
    assert pair.beta.command("switchover", "--to", "alpha").stdout.startswith("alpha is primary already")
    assert pair.alpha.command("switchover", "--to", "alpha").stdout.startswith("alpha is primary already")
    line = json.loads(pair.alpha.command("switchover", "--json").stdout)
    assert (line["op"], line["role"], line["node"]) == ("switchover", "secondary", "alpha")
    serve(pair.beta, model)
    pair.synced()
    line = json.loads(pair.alpha.command("switchover", "--json").stdout)
    assert (line["role"], line["node"]) == ("primary", "alpha")
    serve(pair.alpha, model)
    finish(pair, model)


def test_what_forbids_it_is_told(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    done = pair.alpha.command("switchover", "--to", "gamma", check=False)
    assert (done.returncode, "no node of this pair" in done.stderr) == (2, True)
    done = pair.alpha.command("failback", check=False)
    assert (done.returncode, "pair.prefer" in done.stderr) == (12, True)
    pair.beta.kill()
    with pair.alpha.client() as client:
        model.write(client, 1)  # once it is answered, beta is out
    for words in (("switchover",), ("switchover", "-n")):
        done = pair.alpha.command(*words, check=False)
        assert (done.returncode, "beta" in done.stderr) == (12, True), done.stderr
    pair.beta.start()
    pair.synced()
    pair.witness.kill()
    done = pair.beta.command("switchover", check=False)
    assert (done.returncode, "witness" in done.stderr) == (11, True), done.stderr
    serve(pair.alpha, model)  # its clients go on
    pair.witness.start()
    finish(pair, model)


def test_a_lone_pair_has_no_switchover(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    pair.up()
    for words in (("switchover",), ("switchover", "--to", "alpha"), ("pause",), ("resume",)):
        done = pair.alpha.command(*words, check=False)
        assert (done.returncode, 'arbiter = "none"' in done.stderr) == (12, True), done.stderr


def test_a_silent_witness_changes_nothing_and_the_clients_go_on(pair: Pair, model: Model) -> None:
    """It is frozen, and answers no read: nothing was sent that could happen later."""
    pair.up()
    with pair.alpha.client() as client:
        model.write(client, 5)
        assert pair.witness.process is not None
        pair.witness.process.send_signal(signal.SIGSTOP)
        try:
            done = pair.beta.command("switchover", check=False)
            assert (done.returncode, "witness" in done.stderr) == (13, True), done.stderr
            model.write(client, 5)  # on the same connection: it was paused, not ended
        finally:
            pair.witness.process.send_signal(signal.SIGCONT)
    until(pair.beta, lambda: pair.beta.command("switchover", check=False).returncode == 0)
    serve(pair.beta, model)
    finish(pair, model)


def test_service_goes_back_to_the_preferred_node_by_itself(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(**PATIENT, options='prefer = "alpha"\nfailback = "auto"\nfailback-delay = "500ms"')
    pair.up()
    with pair.alpha.client() as client:
        client.write(0, b"1" * BLOCK)
    pair.alpha.kill()
    pair.beta.wait("primary")
    with pair.beta.client() as client:
        client.write(BLOCK, b"2" * BLOCK)
    pair.alpha.start()
    pair.alpha.wait("primary")
    pair.synced()
    assert "alpha is preferred and has been in sync for long enough" in pair.beta.log()
    with pair.alpha.client() as client:
        assert client.read(0, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
    assert pair.beta.command("failback").stdout.startswith("alpha is primary already")


def test_f16_too_many_changes_latch_the_failback_until_a_person_says_resume(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(
        **PATIENT,
        options='prefer = "alpha"\nfailback = "auto"\nfailback-delay = "0s"\nmax-role-changes-per-hour = 1',
    )
    pair.up()
    pair.alpha.kill()
    pair.beta.wait("primary")
    pair.alpha.start()
    pair.synced()
    assert record(pair).latched
    until(pair.beta, lambda: pair.beta.status().summary == "failback is latched")
    assert pair.beta.command("status", "--check", check=False).returncode == 1
    assert pair.beta.status().role == "primary"
    pair.beta.kill()  # a dead primary is replaced all the same
    pair.alpha.wait("primary")
    pair.beta.start()
    pair.synced()
    pair.alpha.command("switchover")  # a person may
    pair.synced()
    assert pair.beta.status().role == "primary"
    assert "failover and failback happen by themselves" in pair.alpha.command("resume").stdout
    pair.alpha.wait("primary")


def test_explain_names_the_rule_that_stands_in_the_way(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(**PATIENT | {"promise": "60s"})
    pair.up()
    told = pair.alpha.command("explain").stdout
    assert told.startswith("alpha is primary already")
    told = json.loads(pair.beta.command("explain", "--json").stdout)
    assert (told["schema"], told["promotable"], told["by_itself"]) == ("mirrorpair.explain/1", False, True)
    assert [one["rule"] for one in told["findings"] if not one["allows"]] == ["A4 one primary", "A11"]
    pair.beta.command("pause")
    pair.alpha.freeze()
    pair.beta.wait("secondary")
    until(pair.beta, lambda: "  no  A19 pause" in pair.beta.command("explain").stdout)
    until(pair.beta, lambda: "  ok  A4 one primary" in pair.beta.command("explain").stdout)
    told = pair.beta.command("explain").stdout
    assert told.startswith("beta would not become primary: beta has promised alpha not to take over for another ")
    assert "  ok  A3 in sync      beta has every acknowledged write: in sync are alpha and beta" in told
    pair.alpha.signal(signal.SIGCONT)


def test_a19_a_paused_pair_changes_its_primary_only_when_a_person_asks(pair: Pair, model: Model) -> None:
    pair.up()
    serve(pair.alpha, model)
    assert "is paused" in pair.beta.command("pause").stdout
    until(pair.alpha, lambda: pair.alpha.status().paused)
    assert "PAUSED" in pair.alpha.command("status", check=False).stdout.upper()
    pair.alpha.kill()
    until(pair.beta, lambda: "did not become primary: the pair is paused" in pair.beta.log())
    assert record(pair).primary == "alpha"
    pair.alpha.start()
    pair.alpha.wait("primary")  # its own role it takes back
    pair.synced()
    assert pair.beta.command("switchover").stdout.startswith("beta is primary")
    pair.synced()
    serve(pair.beta, model)
    pair.beta.kill()
    until(pair.alpha, lambda: "did not become primary: the pair is paused" in pair.alpha.log())
    pair.alpha.command("resume")
    pair.alpha.wait("primary")
    serve(pair.alpha, model)
    pair.beta.start()
    finish(pair, model)
