"""The handshake's words: what is encoded comes back; whatever else arrives is refused by the one declared error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.errors import PeerProtocolError
from mirrorpair.messages import (
    MAX_IMAGE_BYTES,
    MAX_PAYLOAD,
    MAX_SEED,
    Failure,
    Hello,
    Start,
    Welcome,
    choose_protocol,
    decode_failure,
    decode_hello,
    decode_start,
    decode_welcome,
    encode,
    failure,
    is_block_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = st.integers(0, MAX_IMAGE_BYTES)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PATHS = TEXT.filter(lambda text: "\0" not in text).map(lambda text: "/" + text)
VERSIONS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)

HELLOS = st.builds(
    Hello,
    protocol=st.tuples(st.integers(1, 100), st.integers(100, 65535)),
    version=VERSIONS,
    features=st.lists(VERSIONS, max_size=5),
    role=st.sampled_from(["source", "target"]),
    path=PATHS,
    write=st.booleans(),
    size=SIZES,
    create=st.booleans(),
    resize=st.booleans(),
)
WELCOMES = st.builds(
    Welcome,
    protocol=st.integers(1, 65535),
    version=VERSIONS,
    size=SIZES,
    kind=st.sampled_from(["file", "device"]),
    created=st.booleans(),
    before=st.none() | SIZES,
)
STARTS = st.builds(
    Start,
    size=SIZES,
    block_size=st.sampled_from([4096 << power for power in range(7)]),
    seed=st.integers(0, MAX_SEED),
    recheck=st.booleans(),
    rate=SIZES,
    timeout=st.floats(0.1, 3600),
    threads=st.integers(0, 256),
)
FAILURES = st.builds(Failure, code=st.integers(1, 255), message=TEXT)

HELLO: dict[str, Any] = {
    "magic": "mirrorpair",
    "protocol": [1, 1],
    "version": "0.1.0",
    "features": [],
    "role": "target",
    "path": "/srv/a.img",
    "write": True,
    "size": 4096,
    "create": True,
    "resize": False,
}
WELCOME: dict[str, Any] = {
    "protocol": 1,
    "version": "0.1.0",
    "size": 4096,
    "kind": "file",
    "created": False,
    "before": None,
}
START: dict[str, Any] = {
    "size": 4096,
    "block_size": 65536,
    "seed": 7,
    "recheck": False,
    "rate": 0,
    "timeout": 30,
    "threads": 0,
}
DECODERS: dict[str, Callable[[bytes], object]] = {
    "hello": decode_hello,
    "welcome": decode_welcome,
    "start": decode_start,
    "failure": decode_failure,
}


@given(HELLOS)
def test_a_hello_comes_back_as_it_was(hello: Hello) -> None:
    assert decode_hello(encode(hello)) == hello


@given(WELCOMES)
def test_a_welcome_comes_back_as_it_was(welcome: Welcome) -> None:
    assert decode_welcome(encode(welcome)) == welcome


@given(STARTS)
def test_a_start_comes_back_as_it_was(start: Start) -> None:
    assert decode_start(encode(start)) == start


@given(FAILURES)
def test_a_failure_comes_back_as_it_was(told: Failure) -> None:
    assert decode_failure(encode(told)) == told


def test_the_words_on_the_wire_are_those_of_the_contract() -> None:
    hello = Hello(version="0.1.0", role="target", path="/srv/a.img", write=True, size=4096, create=True)
    assert json.loads(encode(hello)) == HELLO
    welcome = Welcome(protocol=1, version="0.1.0", size=4096, kind="file")
    assert json.loads(encode(welcome)) == WELCOME
    assert json.loads(encode(Start(size=4096, block_size=65536, seed=7, timeout=30.0))) == START
    assert json.loads(encode(failure(12, "no"))) == {"code": 12, "message": "no"}


@pytest.mark.parametrize("name", DECODERS)
@given(payload=st.binary(max_size=200))
def test_garbage_raises_nothing_but_the_declared_error(name: str, payload: bytes) -> None:
    with pytest.raises(PeerProtocolError) as caught:
        DECODERS[name](payload)
    assert str(caught.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(("name", "whole"), [("hello", HELLO), ("welcome", WELCOME), ("start", START)])
@given(data=st.data())
def test_one_wrong_value_among_right_ones_is_refused_or_valid(
    name: str, whole: dict[str, Any], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(whole)))
    payload = json.dumps({**whole, key: data.draw(JSON)}).encode()
    try:
        message = DECODERS[name](payload)
    except PeerProtocolError:
        return
    assert isinstance(message, Hello | Welcome | Start)
    assert DECODERS[name](encode(message)) == message


@pytest.mark.parametrize(("name", "whole"), [("hello", HELLO), ("welcome", WELCOME), ("start", START)])
def test_every_proper_prefix_is_refused(name: str, whole: dict[str, Any]) -> None:
    payload = json.dumps(whole).encode()
    DECODERS[name](payload)
    for length in range(len(payload)):
        with pytest.raises(PeerProtocolError):
            DECODERS[name](payload[:length])


@pytest.mark.parametrize(
    ("name", "whole", "wrong"),
    [
        ("hello", HELLO, {"magic": "other"}),
        ("hello", HELLO, {"protocol": [2, 1]}),
        ("hello", HELLO, {"protocol": [0, 1]}),
        ("hello", HELLO, {"protocol": [1]}),
        ("hello", HELLO, {"role": "witness"}),
        ("hello", HELLO, {"path": "relative"}),
        ("hello", HELLO, {"path": ""}),
        ("hello", HELLO, {"path": "/a\0b"}),
        ("hello", HELLO, {"path": "/" + "a" * 4096}),
        ("hello", HELLO, {"path": "/" + "ü" * 2048}),
        ("hello", HELLO, {"size": -1}),
        ("hello", HELLO, {"size": 2**63}),
        ("hello", HELLO, {"size": 4096.5}),
        ("hello", HELLO, {"size": "4096"}),
        ("hello", HELLO, {"size": None}),
        ("hello", HELLO, {"write": 1}),
        ("hello", HELLO, {"features": ["x"] * 65}),
        ("hello", HELLO, {"version": "v" * 65}),
        ("welcome", WELCOME, {"kind": "folder"}),
        ("welcome", WELCOME, {"size": -1}),
        ("welcome", WELCOME, {"size": 10**30}),
        ("welcome", WELCOME, {"protocol": 0}),
        ("welcome", WELCOME, {"before": -1}),
        ("start", START, {"size": -1}),
        ("start", START, {"block_size": 0}),
        ("start", START, {"block_size": 2048}),
        ("start", START, {"block_size": 12288}),
        ("start", START, {"block_size": 524288}),
        ("start", START, {"seed": -1}),
        ("start", START, {"seed": 2**64}),
        ("start", START, {"rate": -1}),
        ("start", START, {"timeout": 0}),
        ("start", START, {"timeout": 1e308}),
        ("start", START, {"threads": -1}),
        ("start", START, {"threads": 10**6}),
    ],
)
def test_a_value_out_of_its_range_is_refused(name: str, whole: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(PeerProtocolError, match="not valid"):
        DECODERS[name](json.dumps({**whole, **wrong}).encode())


@pytest.mark.parametrize("code", [0, -1, 256, 1.5, None, "1"])
def test_a_failure_can_never_mean_success(code: object) -> None:
    with pytest.raises(PeerProtocolError):
        decode_failure(json.dumps({"code": code, "message": "x"}).encode())
    if isinstance(code, int):
        assert failure(code, "x").code == 1


def test_unknown_keys_are_skipped() -> None:
    newer = {**HELLO, "compression": {"kinds": ["zstd"]}, "x": [[[]]]}
    assert decode_hello(json.dumps(newer).encode()) == decode_hello(json.dumps(HELLO).encode())


def test_deep_nesting_in_an_unknown_key_is_refused_not_a_crash() -> None:
    payload = json.dumps(HELLO).encode()[:-1] + b',"x":' + b"[" * 8000 + b"]" * 8000 + b"}"
    with pytest.raises(PeerProtocolError):
        decode_hello(payload)
    payload = json.dumps(HELLO).encode()[:-1] + b',"x":' + b"[" * 15000
    with pytest.raises(PeerProtocolError):
        decode_hello(payload)


def test_a_payload_that_no_frame_holds_is_refused_on_both_sides() -> None:
    with pytest.raises(PeerProtocolError, match="more than"):
        decode_hello(b" " * (MAX_PAYLOAD + 1))
    hello = Hello(version="0.1.0", role="source", path="/" + "\1" * 4000, write=False)
    with pytest.raises(ValueError, match="does not fit"):
        encode(hello)


@given(st.integers(), st.text(max_size=3000))
def test_every_failure_that_is_told_fits_and_is_one_line(code: int, message: str) -> None:
    told = decode_failure(encode(failure(code, message)))
    assert told.message.isprintable()


def test_a_long_failure_of_wide_characters_still_fits() -> None:
    assert len(encode(failure(1, "\U0001f600" * 5000))) <= MAX_PAYLOAD
    assert len(encode(failure(1, '"\\' * 5000))) <= MAX_PAYLOAD


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((1, 1), (2, 3), None), ((3, 4), (1, 2), None), ((1, 9), (4, 4), 4)],
)
def test_the_newest_protocol_that_both_speak_is_chosen(
    ours: tuple[int, int], theirs: tuple[int, int], chosen: int | None
) -> None:
    assert choose_protocol(ours, theirs) == choose_protocol(theirs, ours) == chosen


def test_block_sizes_are_powers_of_two_from_4_to_256_kib() -> None:
    legal = [4096, 8192, 16384, 32768, 65536, 131072, 262144]
    assert [size for size in range(0, 600_000, 512) if is_block_size(size)] == legal
    assert not is_block_size(-4096)
