"""The server's negotiation: every answer byte by byte, every limit, and nothing a client sends makes it raise or hoard.

The lessons of other NBD servers that are about negotiation are tests here; those about sockets are in test_nbdserver.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mirrorpair import handshake
from mirrorpair.handshake import (
    FIXED_NEWSTYLE,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INFO_NAME,
    MAX_DRAIN,
    MAX_INFOS,
    MAX_NAME,
    MAX_OPTION,
    MAX_OPTIONS,
    NO_ZEROES,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_ERROR,
    REP_INFO,
    REP_SERVER,
    REPLY_HEADER,
    REPLY_MAGIC,
    Abort,
    Event,
    Export,
    Go,
    ServerHandshake,
)

if TYPE_CHECKING:
    import random

LARGEST = 2**63 - 1
EXPORTS = {"data": Export(size=10 << 30), "logs": Export(size=LARGEST, read_only=True)}
REFUSAL = "beta is secondary of epoch 7: alpha serves this volume, at 10.0.0.1"

Reply = tuple[int, int, bytes]  # option, type, data


def flags(value: int = FIXED_NEWSTYLE | NO_ZEROES) -> bytes:
    return struct.pack(">I", value)


def option(kind: int, payload: bytes = b"", *, length: int | None = None, magic: bytes = b"IHAVEOPT") -> bytes:
    return magic + struct.pack(">II", kind, len(payload) if length is None else length) + payload


def info(name: str | bytes, kinds: list[int] | None = None, *, kind: int = OPT_INFO) -> bytes:
    encoded = name.encode() if isinstance(name, str) else name
    wanted = kinds or []
    payload = struct.pack(">I", len(encoded)) + encoded + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    return option(kind, payload)


def go(name: str | bytes, kinds: list[int] | None = None) -> bytes:
    return info(name, kinds, kind=OPT_GO)


def server(refusal: str | None = None) -> ServerHandshake:
    return ServerHandshake(EXPORTS, refusal)


def talk(sent: bytes, *, refusal: str | None = None, piece: int = 0) -> tuple[bytes, Event | None]:
    """Everything that a server answered to `sent`, fed in pieces of so many bytes, and the event; what comes behind an
    event is not fed, as a listener would not."""
    side = server(refusal)
    said = b""
    for at in range(0, len(sent), piece or len(sent)):
        for item in side.feed(sent[at : at + (piece or len(sent))]):
            if not isinstance(item, bytes):
                return said, item
            said += item
    return said, None


def replies(said: bytes) -> list[Reply]:
    found = []
    while said:
        magic, kind, reply, length = REPLY_HEADER.unpack_from(said)
        assert magic == REPLY_MAGIC
        assert len(said) >= REPLY_HEADER.size + length
        found.append((kind, reply, said[REPLY_HEADER.size : REPLY_HEADER.size + length]))
        said = said[REPLY_HEADER.size + length :]
    return found


def answers(*sent: bytes, refusal: str | None = None) -> list[Reply]:
    said, event = talk(flags() + b"".join(sent), refusal=refusal)
    assert event is None
    return replies(said)


def fault(sent: bytes, *, refusal: str | None = None) -> str:
    """The reason with which the server hung up, having said nothing."""
    said, event = talk(sent, refusal=refusal)
    assert said == b""
    assert isinstance(event, Abort)
    assert event.fault
    return event.reason


def test_the_greeting_offers_fixed_newstyle_without_padding() -> None:
    assert GREETING == b"NBDMAGICIHAVEOPT\x00\x03"


def test_list_names_every_export() -> None:
    named = [(OPT_LIST, REP_SERVER, struct.pack(">I", 4) + name) for name in (b"data", b"logs")]
    assert answers(option(OPT_LIST)) == [*named, (OPT_LIST, REP_ACK, b"")]


def test_list_with_data_is_invalid() -> None:
    [(kind, reply, _)] = answers(option(OPT_LIST, b"x"))
    assert (kind, reply) == (OPT_LIST, REP_ERR_INVALID)


def test_info_tells_size_and_flags_and_what_was_asked_for() -> None:
    assert answers(info("data", [INFO_BLOCK_SIZE, INFO_NAME, 999])) == [
        (OPT_INFO, REP_INFO, struct.pack(">HQH", INFO_EXPORT, 10 << 30, 0b1_0110_1101)),
        (OPT_INFO, REP_INFO, struct.pack(">H", INFO_NAME) + b"data"),
        (OPT_INFO, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, 4096, 32 << 20)),
        (OPT_INFO, REP_ACK, b""),
    ]


def test_a_read_only_export_of_the_largest_size() -> None:
    assert answers(info("logs")) == [
        (OPT_INFO, REP_INFO, struct.pack(">HQH", INFO_EXPORT, LARGEST, 0b1_0000_1111)),
        (OPT_INFO, REP_ACK, b""),
    ]


def test_multi_conn_is_said_only_where_it_holds() -> None:
    assert Export(size=1).flags & handshake.CAN_MULTI_CONN
    assert not Export(size=1, multi_conn=False).flags & handshake.CAN_MULTI_CONN


@pytest.mark.parametrize("size", [-1, 2**63])
def test_an_export_no_disk_can_have_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Export(size=size)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * (MAX_NAME + 1), "\udcff"])
def test_an_export_whose_name_cannot_be_sent_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"export|surrogates"):
        ServerHandshake({name: Export(size=1)})


def test_go_begins_the_transmission_with_what_came_behind_it() -> None:
    said, event = talk(flags() + option(OPT_LIST) + go("data") + b"request")
    assert replies(said)[-2:] == [
        (OPT_GO, REP_INFO, struct.pack(">HQH", INFO_EXPORT, 10 << 30, 0b1_0110_1101)),
        (OPT_GO, REP_ACK, b""),
    ]
    assert event == Go("data", b"request")


@pytest.mark.parametrize(("said_no_zeroes", "padding"), [(NO_ZEROES, 0), (0, 124)])
def test_export_name_begins_the_transmission(said_no_zeroes: int, padding: int) -> None:
    # Without the flag for fixed newstyle too: it is the one option that all clients may use.
    for fixed in (0, FIXED_NEWSTYLE):
        said, event = talk(flags(fixed | said_no_zeroes) + option(OPT_EXPORT_NAME, b"data") + b"more")
        assert said == struct.pack(">QH", 10 << 30, 0b1_0110_1101) + bytes(padding)
        assert event == Go("data", b"more")


def test_abort_is_acknowledged_and_is_no_fault() -> None:
    said, event = talk(flags() + option(OPT_ABORT))
    assert replies(said) == [(OPT_ABORT, REP_ACK, b"")]
    assert isinstance(event, Abort)
    assert not event.fault


@pytest.mark.parametrize("kind", [OPT_INFO, OPT_GO])
def test_an_unknown_export_is_refused_and_the_client_may_ask_again(kind: int) -> None:
    got = answers(info("nothing\x1b[2J", kind=kind), info("data"))
    assert [reply for _, reply, _ in got] == [REP_ERR_UNKNOWN, REP_INFO, REP_ACK]
    assert b"nothing" in got[0][2]
    assert b"\x1b" not in got[0][2]


@pytest.mark.parametrize("kind", [OPT_INFO, OPT_GO])
def test_a_node_that_is_not_primary_refuses_and_names_the_primary(kind: int) -> None:
    assert answers(info("data", kind=kind), refusal=REFUSAL) == [(kind, REP_ERR_POLICY, REFUSAL.encode())]
    [(_, reply, _)] = answers(info("other", kind=kind), refusal=REFUSAL)
    assert reply == REP_ERR_UNKNOWN
    assert len(answers(option(OPT_LIST), refusal=REFUSAL)) == 3


def test_a_node_that_is_not_primary_hangs_up_on_export_name() -> None:
    assert REFUSAL in fault(flags() + option(OPT_EXPORT_NAME, b"data"), refusal=REFUSAL)
    assert "no volume 'other'" in fault(flags() + option(OPT_EXPORT_NAME, b"other"))
    assert "UTF-8" in fault(flags() + option(OPT_EXPORT_NAME, b"\xff"))


def test_a_node_may_become_primary_while_a_client_negotiates() -> None:
    side = server(REFUSAL)
    [refused] = side.feed(flags() + go("data"))
    assert isinstance(refused, bytes)
    assert not side.ended
    side.refusal = None
    assert side.feed(go("data"))[-1] == Go("data", b"")


def test_the_empty_name_is_the_only_export() -> None:
    alone = ServerHandshake({"data": Export(size=1)})
    said = alone.feed(flags() + go("", [INFO_NAME]))
    assert struct.pack(">H", INFO_NAME) + b"data" in b"".join(item for item in said if isinstance(item, bytes))
    assert said[-1] == Go("data", b"")
    [(_, reply, _)] = answers(info(""))
    assert reply == REP_ERR_UNKNOWN


@pytest.mark.parametrize(
    "kind", [OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, 0, 4, 11, 77, 2**32 - 1]
)
@pytest.mark.parametrize("payload", [b"", b"p" * 100_000])
def test_what_is_not_built_is_unsupported_and_the_client_stays_in_step(kind: int, payload: bytes) -> None:
    got = answers(option(kind, payload), info("data"))
    assert [(kind, reply) for kind, reply, _ in got] == [
        (kind, REP_ERR_UNSUP),
        (OPT_INFO, REP_INFO),
        (OPT_INFO, REP_ACK),
    ]


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"", REP_ERR_INVALID),
        (b"\0\0\0\0\0", REP_ERR_INVALID),
        (struct.pack(">I", 5) + b"data\0\0", REP_ERR_INVALID),
        (struct.pack(">I", MAX_NAME) + b"data\0\0", REP_ERR_INVALID),
        (struct.pack(">I", MAX_NAME + 1) + b"x" * (MAX_NAME + 1) + b"\0\0", REP_ERR_TOO_BIG),
        (struct.pack(">I", 2**32 - 1) + b"data\0\0", REP_ERR_TOO_BIG),
        (struct.pack(">I", 4) + b"data\0\1", REP_ERR_INVALID),
        (struct.pack(">I", 4) + b"data\0\0\0\0", REP_ERR_INVALID),
        (struct.pack(">I", 4) + b"data\xff\xff\0\0", REP_ERR_INVALID),
        (struct.pack(">I", 4) + b"\xff\xfe\xfd\xfc\0\0", REP_ERR_INVALID),
        (bytes(MAX_OPTION + 1), REP_ERR_TOO_BIG),
        (bytes(MAX_DRAIN), REP_ERR_TOO_BIG),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("kind", [OPT_INFO, OPT_GO])
def test_lengths_are_checked_before_anything_else(kind: int, payload: bytes, error: int) -> None:
    # CVE-2022-26495, CVE-2022-26496, CVE-2017-15118
    got = answers(option(kind, payload), info("data"))
    assert [reply for _, reply, _ in got] == [error, REP_INFO, REP_ACK]
    assert got[0][2].decode().isprintable()


def test_the_longest_name_and_the_most_questions_that_are_allowed() -> None:
    name = "n" * MAX_NAME
    side = ServerHandshake({name: Export(size=5)})
    said = side.feed(flags() + go(name, [INFO_NAME] * MAX_INFOS))
    assert side.ended
    assert said[-1] == Go(name, b"")


@pytest.mark.parametrize("length", [MAX_DRAIN + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("kind", [OPT_GO, OPT_EXPORT_NAME, OPT_LIST, OPT_STARTTLS, 99])
def test_an_absurd_length_ends_it_at_once(kind: int, length: int) -> None:
    assert str(length) in fault(flags() + option(kind, length=length))


def test_a_refused_payload_is_never_kept() -> None:
    # CVE-2020-10761 and its kin: the buffer is bounded, whatever is announced and in whatever pieces it comes.
    side = server()
    side.feed(flags() + option(OPT_STRUCTURED_REPLY, length=MAX_DRAIN))
    for _ in range(MAX_DRAIN // 4096 - 1):
        assert side.feed(bytes(4096)) == []
        assert side.held_bytes == 0
    assert side.feed(bytes(4095)) == []
    [answer] = side.feed(b"\0")
    assert isinstance(answer, bytes)
    assert replies(answer)[0][1] == REP_ERR_UNSUP


def test_an_option_is_kept_up_to_its_limit() -> None:
    side = server()
    side.feed(flags() + option(OPT_GO, bytes(MAX_OPTION - 1), length=MAX_OPTION))
    assert side.held_bytes == MAX_OPTION - 1


def test_an_export_name_that_is_too_long_is_hung_up_on() -> None:
    assert str(MAX_NAME + 1) in fault(flags() + option(OPT_EXPORT_NAME, bytes(MAX_NAME + 1)))


@pytest.mark.parametrize("value", [4, 1 << 31, 2**32 - 1])
def test_handshake_flags_that_nobody_offered(value: int) -> None:
    assert "flags" in fault(flags(value | FIXED_NEWSTYLE))


def test_without_fixed_newstyle_only_export_name_is_allowed() -> None:
    assert "fixed newstyle" in fault(flags(NO_ZEROES) + go("data"))


def test_what_is_no_option_ends_it() -> None:
    assert "no NBD option" in fault(flags() + b"GET / HTTP/1.1\r\n")
    assert "no NBD option" in fault(flags() + option(OPT_LIST, magic=b"IHAVEOPU"))


def test_options_are_counted() -> None:
    side = server()
    asked = 0
    while not side.ended:
        out = side.feed(flags() * (asked == 0) + info("data"))
        asked += 1
    assert asked == MAX_OPTIONS + 1
    assert isinstance(out[-1], Abort)


def test_nothing_is_fed_behind_the_end() -> None:
    side = server()
    side.feed(flags() + option(OPT_ABORT))
    with pytest.raises(RuntimeError):
        side.feed(b"")


def test_a_text_that_is_too_long_still_fits_a_string() -> None:
    [(_, _, text)] = answers(info("data"), refusal="\N{GREEK SMALL LETTER ALPHA}" * 5000)
    assert len(text) <= MAX_NAME
    assert text.decode().endswith("...")


CONVERSATIONS = [
    flags() + option(OPT_LIST) + info("data", [3]) + go("data", [1, 3]) + b"a request of some bytes",
    flags(0) + option(OPT_EXPORT_NAME, b"logs") + b"tail",
    flags() + option(OPT_STRUCTURED_REPLY) + option(OPT_SET_META_CONTEXT, b"x" * 37) + info("none") + option(OPT_ABORT),
    flags() + option(99, bytes(2000)) + option(OPT_LIST, bytes(3)) + option(OPT_GO, bytes(5)) + go("logs"),
    flags() + option(OPT_GO, bytes(MAX_OPTION + 7)) + option(OPT_EXPORT_NAME, b"nobody"),
]


@pytest.mark.parametrize("sent", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 16, 17, 4096])
def test_the_size_of_the_pieces_makes_no_difference(sent: bytes, piece: int) -> None:
    said, event = talk(sent)
    said_in_pieces, event_in_pieces = talk(sent, piece=piece)
    assert said_in_pieces == said
    if isinstance(event, Go):
        # A listener hands on what it read; the rest is still in the socket.
        assert isinstance(event_in_pieces, Go)
        assert event_in_pieces.export == event.export
        assert event.leftover.startswith(event_in_pieces.leftover)
    else:
        assert event_in_pieces == event


WORDS = st.one_of(
    st.binary(max_size=64),
    st.builds(
        option,
        st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2**32 - 1]),
        st.binary(max_size=40),
        length=st.none()
        | st.integers(0, 80)
        | st.sampled_from([MAX_NAME + 1, MAX_OPTION + 1, MAX_DRAIN + 1, 2**32 - 1]),
    ),
    st.builds(
        info,
        st.sampled_from([b"", b"data", b"logs", b"\xff", b"d" * 5000]) | st.binary(max_size=10),
        st.lists(st.integers(0, 65535), max_size=5),
        kind=st.sampled_from([OPT_INFO, OPT_GO]),
    ),
)


@given(st.sampled_from([flags(), flags(0), flags(7)]), st.lists(WORDS, max_size=8), st.lists(st.integers(1, 300)))
@example(b"", [], [])
def test_rubbish_is_harmless(first: bytes, words: list[bytes], cuts: list[int]) -> None:
    sent = first + b"".join(words)
    side, whole = server(), server()
    said: list[bytes | Event] = []
    at = 0
    for cut in [*cuts, len(sent)]:
        if at >= len(sent) or side.ended:
            break
        said += side.feed(sent[at : at + cut])
        assert side.held_bytes <= MAX_OPTION
        at += cut
    events = [item for item in said if not isinstance(item, bytes)]
    assert len(events) == side.ended
    assert said[-1:] == events or not events
    expected = whole.feed(sent)
    assert b"".join(item for item in said if isinstance(item, bytes)) == b"".join(
        item for item in expected if isinstance(item, bytes)
    )
    assert whole.ended == side.ended
    if events and isinstance(events[0], Abort):
        assert events == expected[-1:]


def test_bits_flipped_in_a_good_conversation_are_harmless(rng: random.Random) -> None:
    for _ in range(300):
        spoiled = bytearray(rng.choice(CONVERSATIONS))
        for _ in range(rng.randint(1, 5)):
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        said, _ = talk(bytes(spoiled), piece=rng.choice([1, 5, 0]))
        if said[:8] == struct.pack(">Q", REPLY_MAGIC):
            assert all(reply & REP_ERROR or reply in (REP_ACK, REP_SERVER, REP_INFO) for _, reply, _ in replies(said))
