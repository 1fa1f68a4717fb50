"""The witness as a process: killed at any point, failing and full disks, damaged and lost records, hostile clients,
many pairs. What every register must do is in test_register.py."""

from __future__ import annotations

import asyncio
import contextlib
import re
import select
import signal
import socket
from typing import TYPE_CHECKING

import msgspec
import pytest
from farside import LIMIT_S, run_cli
from pairfile import write_pair
from tracing import attached, fail, happened, kill
from witnessside import Witness, cas, record, with_client

from mirrorpair.address import TcpAddress
from mirrorpair.arbiter import MAX_REGISTER_BYTES, Incarnation, Register, Swap, Versioned
from mirrorpair.arbiter.recordfile import load
from mirrorpair.config import Witness as WitnessTable
from mirrorpair.errors import MirrorpairError, PeerError, PeerProtocolError, PeerTimeoutError, UnreachableError
from mirrorpair.witness import MAX_LINE, PREAMBLE, ReadRequest, decode_reply, decode_request, encode_line
from mirrorpair.witness.client import StaleRecordError, WitnessRegister
from mirrorpair.witness.server import WitnessServer
from mirrorpair.witness.store import MAX_PAIRS, Store

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

MESSAGE_READ = encode_line(ReadRequest(id=7, pair="shop"))


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    made = Witness(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.close()


def read(witness: Witness, pair: str = "shop", **options: object) -> Versioned:
    async def ask(client: WitnessRegister) -> Versioned:
        return await client.read()

    found: Versioned = with_client(witness, ask, pair=pair, **options)
    return found


def read_once_it_can(witness: Witness) -> Versioned:
    """The calls are counted for each thread: another one of the witness's may fail as well."""
    for _ in range(20):
        with contextlib.suppress(PeerError):
            return read(witness)
    raise AssertionError("the witness never reads again")


async def until_it_fails(client: WitnessRegister, first: int = 0) -> int:
    """Swap after swap; the last version that was ok."""
    version = first
    while True:
        try:
            swap = await client.cas(version, record(version + 1))
        except UnreachableError:
            return version
        if swap is Swap.UNKNOWN:
            return version
        assert swap is Swap.OK
        version += 1


# --- durable


@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("call", ["openat", "write", "fsync", "rename"])
def test_killed_at_any_call_it_has_every_swap_that_was_ok(witness: Witness, call: str, when: int) -> None:
    assert witness.process is not None
    trace = witness.folder / "strace"
    with attached(witness.process.pid, trace, kill(call, when)):
        done = with_client(witness, until_it_fails)
        witness.process.wait(LIMIT_S)
    witness.kill()
    assert happened(trace)
    witness.start()
    found = read(witness)
    assert found.version in (done, done + 1)
    assert found.register.epoch == found.version
    assert cas(witness, found.version, record(found.version + 1)) is Swap.OK
    assert not list(witness.records.glob("*.new"))


def test_nothing_is_told_that_is_not_durable(tmp_path: Path) -> None:
    """In the order of the calls: the file's fsync, the rename, the folder's fsync, the reply; after a start, whatever
    the cache holds is written again before it is told."""
    witness = Witness(tmp_path)
    log = tmp_path / "strace"
    try:
        for version in range(2):
            witness.start()
            assert witness.process is not None
            with attached(witness.process.pid, log, "trace=fsync,rename,renameat,renameat2,sendto"):
                if version:
                    assert read(witness).version == version
                assert cas(witness, version, record(version + 1)) is Swap.OK
            assert witness.terminate() == 0
            made = re.findall(r'(fsync|rename)\w*\(|(sendto)\(\d+, "\{\\"id\\"', log.read_text())
            assert [one or other for one, other in made] == ["fsync", "rename", "fsync", "sendto"] * (1 + version)
    finally:
        witness.close()


@pytest.mark.parametrize(
    ("rule", "happens"),
    [
        (fail("fsync", "EIO", 1), False),
        (fail("fsync", "EIO", 2), True),
        (fail("rename", "EIO", 1), False),
        (fail("openat", "ENOSPC", 1), False),
    ],
)
def test_a_write_that_failed_is_unknown_until_the_next_answer_and_then_for_good(
    witness: Witness, rule: str, happens: bool
) -> None:
    assert witness.process is not None
    with attached(witness.process.pid, witness.folder / "strace", rule):
        assert cas(witness, 0, record(1)) is Swap.UNKNOWN
        found = read_once_it_can(witness)
        assert found.version == int(happens)
    witness.kill()
    witness.start()
    assert read(witness) == found
    assert cas(witness, found.version, record(2)) is Swap.OK


def test_f10_without_space_nothing_changes_and_reads_go_on(witness: Witness) -> None:
    assert witness.process is not None
    assert cas(witness, 0, record(1)) is Swap.OK
    with attached(witness.process.pid, witness.folder / "strace", fail("write", "ENOSPC", "1+")):
        for _ in range(3):
            assert cas(witness, 1, record(2)) is Swap.UNKNOWN
            assert read(witness) == Versioned(version=1, register=record(1))
    assert cas(witness, 1, record(2)) is Swap.OK


# --- F17


def test_f17_a_damaged_record_is_neither_believed_nor_replaced_and_the_other_pairs_go_on(witness: Witness) -> None:
    assert cas(witness, 0, record(1)) is Swap.OK
    assert cas(witness, 0, record(1), pair="other") is Swap.OK
    witness.kill()
    path = witness.records / "shop.record"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40] + b"X" + whole[41:], whole + b"\n", b"\n\n\n"):
        path.write_bytes(damaged)
        witness.start()
        with pytest.raises(PeerError, match=r"shop\.record, the record of the pair's roles, is damaged") as caught:
            read(witness)
        assert caught.value.exit_code == 12
        assert cas(witness, 1, record(2)) is Swap.UNKNOWN
        assert read(witness, "other").version == 1
        witness.kill()
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    witness.start()
    assert read(witness).version == 1


def test_f17_a_record_that_is_older_than_what_was_seen_is_not_believed(witness: Witness) -> None:
    for version in range(3):
        assert cas(witness, version, record(version + 1)) is Swap.OK
        if version == 1:
            old = (witness.records / "shop.record").read_bytes()

    async def lose_it(client: WitnessRegister) -> None:
        assert (await client.read()).version == 3
        witness.kill()
        (witness.records / "shop.record").write_bytes(old)
        witness.start()
        with pytest.raises(
            StaleRecordError, match="has version 2 of the record, of epoch 2; this node has seen version 3"
        ):
            await client.read()
        assert client.seen == (3, 3)
        witness.kill()
        (witness.records / "shop.record").unlink()
        witness.start()
        with pytest.raises(StaleRecordError):
            await client.read()

    with_client(witness, lose_it)
    with pytest.raises(StaleRecordError, match="restored from an older copy"):
        read(witness, seen=(1, 1))


def test_a_file_of_another_pair_says_nothing(witness: Witness) -> None:
    """Copied by hand: its owner is written in it."""
    assert cas(witness, 0, record(1)) is Swap.OK
    (witness.records / "other.record").write_bytes((witness.records / "shop.record").read_bytes())
    assert read(witness, "other").version == 0
    with pytest.raises(MirrorpairError):
        load(str(witness.folder), "shop")  # a folder is no record


# --- the way there


def test_a0_no_reply_is_unknown_and_a_late_one_is_nobodys(witness: Witness) -> None:
    """The swap that was on its way when the time was over may land; a later one on the version read decides."""
    assert witness.process is not None
    process = witness.process

    async def stalled(client: WitnessRegister) -> None:
        assert (await client.read()).version == 0
        process.send_signal(signal.SIGSTOP)
        assert await client.cas(0, record(1)) is Swap.UNKNOWN
        with pytest.raises(PeerTimeoutError, match=r"did not answer within 0\.2 s"):
            await client.read()
        process.send_signal(signal.SIGCONT)

    with_client(witness, stalled, reply_s=0.2)

    async def decide(client: WitnessRegister) -> None:
        found = await client.read()
        assert found.version in (0, 1)
        while (await client.cas(found.version, record(2))) is not Swap.OK:
            found = await client.read()
        assert (await client.read()).register == record(2)
        assert await client.cas(0, record(1)) is Swap.CONFLICT

    with_client(witness, decide)


def test_a_client_finds_a_witness_that_was_started_anew(witness: Witness) -> None:
    async def scenario(client: WitnessRegister) -> None:
        assert await client.cas(0, record(1)) is Swap.OK
        witness.kill()
        for _ in range(2):
            with pytest.raises(UnreachableError, match=r"the witness at unix:.* cannot be reached|hung up"):
                await client.read()
        with pytest.raises(UnreachableError, match="cannot be reached"):
            await client.cas(1, record(2))
        witness.start()
        assert await client.cas(1, record(2)) is Swap.OK
        assert (await client.read()).version == 2

    with_client(witness, scenario)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"rubbish\n", PeerProtocolError),
        (b'{"id":1}\n', PeerProtocolError),
        (b'{"id":2}\n', PeerProtocolError),
        (b'{"id":2,"record":{"version":-1,"register":{}}}\n', PeerProtocolError),
        (b'{"id":2,"swap":"ok"}\n', PeerProtocolError),
        (b'{"id":2,"code":12,"message":"no\\u001b[31m"}\n', PeerError),
        (b"x" * (MAX_LINE + 10) + b"\n", PeerProtocolError),
        (b'{"id":2', UnreachableError),
        (b"", UnreachableError),
    ],
    ids=["rubbish", "another id", "nothing in it", "cannot be", "a swap", "refused", "endless", "cut", "hangs up"],
)
def test_whatever_sits_at_the_address_a_client_raises_what_it_says(
    tmp_path: Path, answer: bytes, error: type[MirrorpairError]
) -> None:
    """And a swap is "unknown", since something took it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(PREAMBLE)) == PREAMBLE
        await reader.readline()
        writer.write(answer)
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = TcpAddress(*server.sockets[0].getsockname()[:2])
        async with server:
            client = WitnessRegister(address, "shop", reply_s=LIMIT_S)
            with pytest.raises(error) as caught:
                await client.read()
            assert "\x1b" not in str(caught.value)
            other = WitnessRegister(address, "shop", reply_s=LIMIT_S)
            swap = await other.cas(0, record(1))
            assert swap is (Swap.OK if answer == b'{"id":2,"swap":"ok"}\n' else Swap.UNKNOWN)
            for one in (client, other):
                await one.close()

    asyncio.run(run())


# --- hostile clients


def connected(witness: Witness) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(LIMIT_S)
    sock.connect(str(witness.folder / "witness.sock"))
    return sock


def hung_up(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: witness\r\n\r\n",
        PREAMBLE[:-1] + b"X" + MESSAGE_READ,
        PREAMBLE + b"rubbish\n",
        PREAMBLE + b"\n",
        PREAMBLE + b"\xff\xfe\n",
        PREAMBLE + b"[" * 100_000 + b"\n",
        PREAMBLE + b'{"op":"drop","id":1,"pair":"shop"}\n',
        PREAMBLE + b'{"op":"read","id":1,"pair":"shop","more":1}\n',
        PREAMBLE + b'{"op":"read","id":1,"pair":"../shop"}\n',
        PREAMBLE + b'{"op":"read","id":1,"pair":""}\n',
        PREAMBLE + b'{"op":"cas","id":1,"pair":"shop","version":0,"register":{"primary":"a","in_sync":[]}}\n',
        PREAMBLE + b'{"op":"cas","id":1,"pair":"shop","version":-1,"register":{}}\n',
        PREAMBLE + b"x" * (MAX_LINE + 10),
    ],
    ids=range(13),
)
def test_rubbish_costs_its_sender_the_connection_and_nobody_else_anything(witness: Witness, said: bytes) -> None:
    with connected(witness) as stranger, connected(witness) as other:
        other.sendall(PREAMBLE + MESSAGE_READ[:5])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stranger.sendall(said)
        assert hung_up(stranger)
        other.sendall(MESSAGE_READ[5:])
        reply = decode_reply(other.makefile("rb").readline())
        assert (reply.id, reply.record) == (7, Versioned())
    assert cas(witness, 0, record(1)) is Swap.OK
    assert [path.name for path in witness.records.iterdir() if path.suffix == ".record"] == ["shop.record"]


def test_a_newcomer_takes_the_place_of_the_one_that_is_idle_longest(tmp_path: Path) -> None:
    async def run() -> None:
        witness = Witness(tmp_path)
        server = WitnessServer(WitnessTable(address=witness.address, state_dir=str(witness.records)), cap=3)
        await server.start()
        clients = [witness.client() for _ in range(3)]
        try:
            for client in clients:
                await client.read()
            await clients[0].read()
            newcomer = witness.client()
            assert (await newcomer.read()).version == 0
            gone = clients[1]._streams
            assert gone is not None
            with contextlib.suppress(ConnectionResetError):
                assert await gone[0].read() == b""
            for client in (clients[0], clients[2], newcomer):
                assert (await client.read()).version == 0
            await newcomer.close()
        finally:
            for client in clients:
                await client.close()
            await server.close()

    asyncio.run(run())


def test_one_that_reads_no_replies_asks_nothing_more(witness: Witness) -> None:
    """What it sends stays with it: no memory is spent here on replies that nobody takes."""
    assert cas(witness, 0, Register(epoch=1, role_changes=tuple(range(64)))) is Swap.OK
    with connected(witness) as sock:
        sock.sendall(PREAMBLE)
        sock.setblocking(False)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while poll.poll(500):  # it takes no more for so long
            with contextlib.suppress(BlockingIOError):
                sock.send(MESSAGE_READ * 1000)
        assert read(witness).version == 1


def test_every_decoder_takes_any_bytes(rng: random.Random) -> None:
    for _ in range(3000):
        data = bytearray(MESSAGE_READ if rng.random() < 0.7 else rng.randbytes(rng.randrange(60)))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        for decode in (decode_request, decode_reply):
            with contextlib.suppress(PeerProtocolError):
                decode(bytes(data))


# --- many pairs


def test_a_thousand_pairs_at_once(witness: Witness) -> None:
    async def one(number: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            alpha, beta = (witness.client(f"pair-{number}") for _ in range(2))
            assert await alpha.cas(0, record(1)) is Swap.OK
            assert await beta.cas(0, record(1, primary="beta")) is Swap.CONFLICT
            assert (await beta.read()).register == record(1)
            await alpha.close()
            await beta.close()

    async def run() -> None:
        gate = asyncio.Semaphore(50)
        await asyncio.gather(*(one(number, gate) for number in range(1000)))

    asyncio.run(run())
    assert len(list(witness.records.glob("*.record"))) == 1000
    assert witness.terminate() == 0


def test_names_that_are_only_asked_for_take_up_no_place(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(str(tmp_path / "records"))
        try:
            for number in range(MAX_PAIRS + 1):
                assert (await store.read(f"invented-{number}")).version == 0
            swaps = await asyncio.gather(*(store.cas("shop", 0, record(1)) for _ in range(20)), store.read("shop"))
            assert swaps.count(Swap.OK) == 1
            assert (await store.read("shop")).version == 1
        finally:
            await store.close()

    asyncio.run(run())


def test_a_record_of_the_greatest_size_travels_and_a_longer_one_is_refused(witness: Witness) -> None:
    most = Register(
        epoch=2**62,
        primary="a" * 255,
        in_sync=("a" * 255, "b" * 255),
        members={name * 255: Incarnation(id="e" * 64, n=2**62) for name in ("a", "b")},
        mode="",
    )
    room = MAX_REGISTER_BYTES - len(msgspec.json.encode(most))
    most = msgspec.structs.replace(most, mode="m" * room)
    assert cas(witness, 0, most) is Swap.OK
    assert cas(witness, 1, msgspec.structs.replace(most, mode="m" * (room + 1))) is Swap.CONFLICT
    witness.kill()
    witness.start()
    assert read(witness) == Versioned(version=1, register=most)


# --- the command


def test_a_second_witness_is_refused_and_the_first_goes_on(witness: Witness) -> None:
    done = run_cli("-c", witness.config, "witness")
    assert (done.returncode, done.stdout) == (12, "")
    assert "another witness uses the folder" in done.stderr
    text = witness.config.read_text()
    witness.config.write_text(text.replace('state-dir = "records"', 'state-dir = "elsewhere"'))
    done = run_cli("-c", witness.config, "witness")
    assert done.returncode == 12
    assert "already: is another witness running?" in done.stderr
    assert read(witness).version == 0


def test_it_stops_by_sigterm_says_what_changed_and_leaves_no_socket(witness: Witness) -> None:
    assert cas(witness, 0, record(3, "alpha", "beta")) is Swap.OK
    assert witness.terminate() == 0
    assert "pair shop: epoch 3, primary alpha, in sync alpha, beta (version 1)" in witness.log.read_text()
    assert not (witness.folder / "witness.sock").exists()


def test_without_a_witness_in_the_configuration_it_is_10(tmp_path: Path) -> None:
    done = run_cli("-c", write_pair(tmp_path), "witness")
    assert done.returncode == 10
    assert "witness: found no such table" in done.stderr


@pytest.mark.parametrize("place", ["file", "unwritable"])
def test_a_folder_that_cannot_be_used_is_1(tmp_path: Path, place: str) -> None:
    witness = Witness(tmp_path)
    if place == "file":
        witness.records.write_bytes(b"")
    else:
        witness.config.write_text(witness.config.read_text().replace('"records"', '"/proc/records"'))
    done = run_cli("-c", witness.config, "witness")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mirrorpair: cannot use the folder")
    assert not (tmp_path / "witness.sock").exists()
