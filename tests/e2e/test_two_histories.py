"""Split brain and unrelated data between two real daemons, and dry runs of role changes.

Rules:
- Both sides refuse with exit code 20 and say what a person has to do; doing that ends it, with one node's data on both.
- Nothing is written by a refusal or a dry run: images, record and generation ids are the same bytes as before.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mirrorpair.metadata import Superblock, dump

if TYPE_CHECKING:
    from pair import Daemon, Pair

ADVICE = "on the other one save what is needed, stop the daemon, then `mirrorpair init --force`"


def split(pair: Pair) -> None:
    """alpha and beta have each answered a write that the other one has not."""
    pair.up()
    pair.alpha.kill()
    pair.beta.promote(accept_data_loss=True, force=True)
    with pair.beta.client() as client:
        client.write(0, b"b" * 4096, fua=True)
    pair.beta.kill()
    pair.alpha.start()
    pair.alpha.wait("primary")  # nobody has told it
    with pair.alpha.client() as client:
        client.write(0, b"a" * 4096, fua=True)
    pair.beta.start()


def unrelated(pair: Pair) -> None:
    """Each was made from data of its own."""
    for node in pair.nodes:
        node.image().write_bytes(node.name[:1].encode() * pair.size)
        node.init("--keep-data")
        node.start()


def kept(node: Daemon) -> tuple[bytes, bytes, object]:
    """What a refusal must not change."""
    folder = node.pair.folder / node.name / f"shop.{node.name}"
    found = dump(str(folder / "data.meta")).value
    assert isinstance(found, Superblock)
    record = (folder / "register").read_bytes() if (folder / "register").exists() else b""
    return node.image().read_bytes(), record, (found.ids, found.disk)


def refused(node: Daemon, *words: str) -> None:
    """By a command: 20, one line of error with the way out, nothing on stdout but plans."""
    done = node.command(*words, check=False)
    assert done.returncode == 20, (words, done.stdout, done.stderr, node.pair.logs())
    error = done.stderr.splitlines()[-1]
    assert error.startswith("mirrorpair: "), done.stderr
    assert ADVICE in error


@pytest.mark.parametrize("make", [split, unrelated])
def test_both_sides_refuse_and_the_advice_ends_it(pair: Pair, make: object) -> None:
    assert callable(make)
    make(pair)
    for node in pair.nodes:
        refused(node, "wait", "--for", "connected")
    before = {node.name: kept(node) for node in pair.nodes}
    kind = "split-brain" if make is split else "unrelated"
    for node in pair.nodes:
        for words in (
            ("wait", "--for", "synced"),
            ("resync", "-y"),
            ("resync", "data", "--full", "--wait", "-y"),
            ("resync", "data", "--dry-run"),
        ):
            refused(node, *words)
        plan, error = map(json.loads, node.command("resync", "-n", "--json", check=False).stdout.splitlines())
        assert (plan["amount"], plan["source"], plan["bytes"]) == (kind, None, 0)
        assert (error["type"], error["code"]) == ("error", 20)
        shown = node.command("status").stdout
        assert kind.replace("-", " ") in shown
        assert "init --force" in shown
        assert node.command("status", "--check", check=False).returncode == 2
    for node in pair.nodes:  # nobody is primary: who served would serve one of two histories
        refused(node, "promote")
        refused(node, "promote", "--dry-run")
    assert {node.name: kept(node) for node in pair.nodes} == before
    # alpha's data shall stay.
    pair.alpha.promote(accept_data_loss=True)
    assert pair.beta.stop() == 0
    pair.beta.init("--force")
    pair.beta.start()
    pair.synced()
    assert pair.alpha.status().role == "primary"
    for node in pair.nodes:
        assert node.stop() == 0
    pair.same_images()
    assert pair.alpha.image().read_bytes() == before["alpha"][0]


def test_dry_runs_of_role_changes_say_what_would_happen_and_change_nothing(pair: Pair) -> None:
    for node in pair.nodes:
        node.init()
        node.start()
    pair.alpha.wait("connected")
    pair.synced()

    def dry(node: Daemon, *words: str, code: int = 0) -> str:
        before = {one.name: (kept(one), one.status().epoch, one.status().role) for one in pair.nodes}
        done = node.command(*words, "--dry-run", check=False)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        assert {one.name: (kept(one), one.status().epoch, one.status().role) for one in pair.nodes} == before
        return done.stdout if code == 0 else done.stderr

    assert "alpha would become primary of epoch 1; it would answer writes that beta has too" in dry(
        pair.alpha, "promote"
    )
    assert "alpha is secondary already: nothing would be done" in dry(pair.alpha, "demote")
    pair.alpha.promote()
    pair.synced()
    with pair.alpha.client() as client:  # stays connected: nobody is drained
        client.write(0, b"d" * 4096)
        assert "durable on both nodes" in dry(pair.alpha, "demote")
        assert "alpha is primary already, of epoch 1: nothing would be done" in dry(pair.alpha, "promote")
        assert "alpha is primary of epoch 1" in dry(pair.beta, "promote", code=15)
        assert "alpha is primary of epoch 1" in dry(pair.beta, "promote", "--accept-data-loss", "--force", code=15)
        line = json.loads(pair.alpha.command("demote", "-n", "--json").stdout)
        assert (line["op"], line["dry_run"], line["role"], line["finished"]) == ("demote", True, "primary", True)
        assert client.read(0, 4096) == b"d" * 4096
    pair.beta.kill()
    pair.alpha.kill()
    pair.beta.start()
    assert "silent" in dry_alone(pair.beta, "promote", code=12)
    said = dry_alone(pair.beta, "promote", "--accept-data-loss", "--force")
    assert "beta would become primary of epoch 2; it would answer writes alone" in said
    assert "what only alpha has is given up" in said
    assert "what only alpha has is given up" in pair.beta.promote(accept_data_loss=True, force=True)
    assert pair.beta.status().epoch == 2


def dry_alone(node: Daemon, *words: str, code: int = 0) -> str:
    before = kept(node), node.status().epoch, node.status().role
    done = node.command(*words, "-n", check=False)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    assert (kept(node), node.status().epoch, node.status().role) == before
    return done.stdout if code == 0 else done.stderr
