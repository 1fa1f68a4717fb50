"""The error tree: whose fault, which exit code."""

from __future__ import annotations

import pickle
import re

import pytest

from mirrorpair import errors
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
    SplitBrainError,
    UnreachableError,
    UsageError,
    WrongRoleError,
)

OURS: dict[type[MirrorpairError], int] = {
    UsageError: 2,
    ConfigError: 10,
    RefusedError: 12,
    WrongRoleError: 15,
    SplitBrainError: 20,
    ImageError: 1,
    Interrupted: 130,
}
THEIRS: dict[type[MirrorpairError], int] = {
    UnreachableError: 11,
    PeerTimeoutError: 13,
    NotAllowedError: 14,
    PeerProtocolError: 1,
}


def every_class() -> set[type[MirrorpairError]]:
    return {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, MirrorpairError)}


@pytest.mark.parametrize(("kind", "code"), [*OURS.items(), *THEIRS.items(), (MirrorpairError, 1)])
def test_each_class_has_the_exit_code_of_the_contract(kind: type[MirrorpairError], code: int) -> None:
    assert kind.exit_code == code
    assert kind("no").exit_code == code


def test_the_type_tells_whose_fault_it_is() -> None:
    for kind in OURS:
        assert issubclass(kind, LocalError)
        assert not issubclass(kind, RemoteError)
    for kind in (*THEIRS, PeerError):
        assert issubclass(kind, RemoteError)
        assert not issubclass(kind, LocalError)
    assert every_class() == {*OURS, *THEIRS, PeerError, LocalError, RemoteError, MirrorpairError}


def test_the_tree_drawn_on_top_of_the_file_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, tuple[str, str]] = {}
    branch: list[str] = []
    for lead, name, code in re.findall(r"^    ([ |`-]*)(\w+) +(\d+|\*)(?: |$)", errors.__doc__, re.MULTILINE):
        depth = len(lead) // 4
        branch = [*branch[:depth], name]
        drawn[name] = (branch[-2] if depth else "Exception", code)
    real = {
        kind.__name__: (kind.__mro__[1].__name__, "*" if kind is PeerError else str(kind.exit_code))
        for kind in every_class()
    }
    assert drawn == real


def test_an_error_is_its_sentence() -> None:
    assert str(RefusedError("b.img is locked")) == "b.img is locked"
    assert str(PeerError("no space", 1)) == "no space"
    assert str(Interrupted("interrupted", {"sent": 1})) == "interrupted"


def test_a_peer_error_exits_with_the_code_the_peer_gave() -> None:
    assert PeerError("refused there", 12).exit_code == 12


@pytest.mark.parametrize("code", [0, -1, 256, 2**40])
def test_a_peer_cannot_turn_a_failure_into_success(code: int) -> None:
    assert PeerError("failed", code).exit_code == 1


def test_an_interruption_carries_what_was_done() -> None:
    assert Interrupted("interrupted").result is None
    assert Interrupted("interrupted", [1, 2]).result == [1, 2]


@pytest.mark.parametrize(
    "error", [UsageError("a"), Interrupted("b", (1, 2)), PeerError("c", 12), PeerTimeoutError("d")], ids=repr
)
def test_errors_survive_pickling(error: MirrorpairError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
