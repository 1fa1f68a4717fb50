"""The register of a lone pair: two copies, swapped at the peer first, made one again when they meet (L0, A0, F17)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mirrorpair.arbiter import Register, Swap, Versioned, check_successor, decode, encode, newer
from mirrorpair.arbiter.lone import LoneRegister
from mirrorpair.errors import ImageError, PeerProtocolError, RefusedError

if TYPE_CHECKING:
    import random
    from pathlib import Path


def record(epoch: int, primary: str | None = "alpha", *in_sync: str) -> Register:
    return Register(epoch=epoch, primary=primary, in_sync=in_sync or (("alpha",) if primary is None else (primary,)))


def lone(folder: Path, name: str = "alpha", owner: str = "life-1") -> LoneRegister:
    return LoneRegister(str(folder / f"{name}.register"), owner)


def joined(one: LoneRegister, other: LoneRegister) -> None:
    """`one` asks `other`, as over a connection that works."""

    async def ask(version: int, new: Register) -> Swap:
        return other.receive(version, new)

    one.ask_peer = ask


def cas(register: LoneRegister, new: Register, version: int | None = None) -> Swap:
    return asyncio.run(register.cas(register.copy.version if version is None else version, new))


def test_a_register_that_was_never_written_is_empty(tmp_path: Path) -> None:
    assert lone(tmp_path).copy == Versioned(version=0, register=Register())


def test_what_was_swapped_is_there_after_a_restart(tmp_path: Path) -> None:
    register = lone(tmp_path)
    assert cas(register, record(1)) is Swap.OK
    assert cas(register, record(2)) is Swap.OK
    assert lone(tmp_path).copy == Versioned(version=2, register=record(2))


def test_a_swap_on_another_version_changes_nothing(tmp_path: Path) -> None:
    register = lone(tmp_path)
    assert cas(register, record(1)) is Swap.OK
    for version in (0, 2):
        assert cas(register, record(2), version) is Swap.CONFLICT
    assert lone(tmp_path).copy.register == record(1)


@pytest.mark.parametrize(
    "new",
    [
        record(4),
        record(5, "beta"),
        Register(epoch=6, primary="alpha", in_sync=("alpha",), pair_uuid="b"),
        Register(epoch=6, primary="alpha", in_sync=("alpha",)),
    ],
    ids=["epoch falls", "new primary, old epoch", "another pair", "no pair any more"],
)
def test_a4_what_may_not_follow_is_refused_everywhere(tmp_path: Path, new: Register) -> None:
    old = Register(epoch=5, primary="alpha", in_sync=("alpha",), pair_uuid="a")
    assert check_successor(old, new) is not None
    register = lone(tmp_path)
    assert cas(register, old) is Swap.OK
    assert cas(register, new) is Swap.CONFLICT
    assert register.receive(1, new) is Swap.CONFLICT
    assert register.copy.register == old


def test_l0_the_peer_has_it_first(tmp_path: Path) -> None:
    alpha, beta = lone(tmp_path), lone(tmp_path, "beta")
    joined(alpha, beta)
    assert cas(alpha, record(1)) is Swap.OK
    assert beta.copy == alpha.copy == lone(tmp_path, "beta").copy
    beta.receive(1, record(2, "beta"))
    assert cas(alpha, record(2)) is Swap.CONFLICT
    assert alpha.copy.register == record(1)


def test_a0_no_reply_is_unknown_and_the_next_swap_made_alone_is_the_newer_one(tmp_path: Path) -> None:
    alpha, beta = lone(tmp_path), lone(tmp_path, "beta")
    joined(alpha, beta)
    assert cas(alpha, record(1)) is Swap.OK
    both = record(1, "alpha", "alpha", "beta")

    async def lost(version: int, new: Register) -> Swap:
        assert beta.receive(version, new) is Swap.OK
        return Swap.UNKNOWN

    alpha.ask_peer = lost
    assert cas(alpha, both) is Swap.UNKNOWN
    assert alpha.copy.register == record(1)
    alpha.ask_peer = None
    assert cas(alpha, record(1)) is Swap.OK  # alone: beta is out again
    copies = alpha.copy, beta.copy
    assert beta.meet(copies[0])
    assert not alpha.meet(copies[1])
    assert alpha.copy == beta.copy
    assert alpha.copy.register.in_sync == ("alpha",)


def test_two_swaps_at_the_same_moment_cannot_both_succeed(tmp_path: Path) -> None:
    alpha, beta = lone(tmp_path), lone(tmp_path, "beta")

    async def scenario() -> list[Swap]:
        at_peer = asyncio.Event()

        async def ask_beta(version: int, new: Register) -> Swap:
            at_peer.set()
            await asyncio.sleep(0)
            return beta.receive(version, new)

        async def ask_alpha(version: int, new: Register) -> Swap:
            await at_peer.wait()
            return alpha.receive(version, new)

        alpha.ask_peer, beta.ask_peer = ask_beta, ask_alpha
        return list(await asyncio.gather(alpha.cas(0, record(1)), beta.cas(0, record(1, "beta"))))

    results = asyncio.run(scenario())
    assert results.count(Swap.OK) <= 1


def test_when_they_meet_both_have_the_same(tmp_path: Path, rng: random.Random) -> None:
    for number in range(40):
        alpha, beta = lone(tmp_path, f"alpha{number}"), lone(tmp_path, f"beta{number}")
        for register in (alpha, beta):
            for epoch in range(1, rng.randrange(2, 4)):
                cas(register, record(epoch, rng.choice(["alpha", "beta"]), "alpha", "beta"))
        copies = alpha.copy, beta.copy
        changed = [alpha.meet(copies[1]), beta.meet(copies[0])]
        assert alpha.copy == beta.copy
        assert alpha.copy in copies
        assert newer(*copies).register.epoch == alpha.copy.register.epoch
        assert changed.count(True) <= 1


def test_the_record_of_another_pair_is_refused(tmp_path: Path) -> None:
    register = lone(tmp_path)
    assert cas(register, Register(pair_uuid="a", epoch=1)) is Swap.OK
    with pytest.raises(RefusedError, match="another pair"):
        register.meet(Versioned(version=9, register=Register(pair_uuid="b", epoch=9)))


def test_what_an_earlier_node_of_this_name_left_says_nothing(tmp_path: Path) -> None:
    assert cas(lone(tmp_path), record(7)) is Swap.OK
    assert lone(tmp_path, owner="life-2").copy.version == 0
    assert lone(tmp_path).copy.register == record(7)


def test_f17_a_damaged_file_is_refused_and_never_made_anew(tmp_path: Path, rng: random.Random) -> None:
    assert cas(lone(tmp_path), record(7)) is Swap.OK
    path = tmp_path / "alpha.register"
    good = path.read_bytes()
    damaged = [good[:length] for length in range(len(good))]
    for _ in range(200):
        flipped = bytearray(good)
        flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for data in [*damaged, good + b"\n", b"\n" * 3, b"x" * 100000]:
        path.write_bytes(data)
        with pytest.raises(RefusedError, match="damaged"):
            lone(tmp_path)
        assert path.read_bytes() == data
    path.write_bytes(good)
    assert lone(tmp_path).copy.register == record(7)


def test_a_record_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path: Path) -> None:
    register = lone(tmp_path)
    assert cas(register, record(1)) is Swap.OK
    (tmp_path / "alpha.register.new").mkdir()
    with pytest.raises(ImageError, match="cannot write"):
        cas(register, record(2))
    assert register.copy.register == lone(tmp_path).copy.register == record(1)
    (tmp_path / "alpha.register.new").rmdir()
    assert cas(register, record(2)) is Swap.OK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"version":-1,"register":{}}',
        b'{"version":1,"register":{"epoch":-1}}',
        b'{"version":1,"register":{"primary":"alpha","in_sync":["beta"]}}',
        b'{"version":1,"register":{"in_sync":["beta","beta"]}}',
        b'{"version":1,"register":{"in_sync":["a","b","c"]}}',
        b'{"version":1,"register":{"format":2}}',
        b"[" * 100000,
        b'{"version":1,"register":{"mode":"' + b"x" * 100000 + b'"}}',
    ],
)
def test_what_is_no_record_is_an_error_of_the_peer(data: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="record"):
        decode(data)


def test_encoded_and_decoded_it_is_the_same() -> None:
    whole = Versioned(version=3, register=record(7, "alpha", "alpha", "beta"))
    assert decode(encode(whole)) == whole
