"""The NBD listeners, with real clients on real sockets: who gets in, who is turned away, what is left behind.

`Disk` stands behind `accept` where the C engine stands in a daemon: a plain reference that answers from memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import socket
import stat
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

import pytest

from mirrorpair.address import Address, TcpAddress, UnixAddress
from mirrorpair.errors import LocalError, RefusedError, UsageError
from mirrorpair.handshake import (
    GREETING,
    OPT_GO,
    OPT_LIST,
    REP_ACK,
    REP_ERR_TOO_BIG,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_SERVER,
    Export,
)
from mirrorpair.nbdclient import ExportRefusedError, NbdClient, NbdError, connect
from mirrorpair.nbdserver import NbdServer

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

MIB = 1024 * 1024
SIZE = 8 * MIB
EXPORTS = {"data": Export(size=SIZE), "logs": Export(size=2**63 - 1, read_only=True)}
REFUSAL = "beta is secondary: alpha is the primary of epoch 7, at 10.0.0.1"
PATIENCE_S = 30.0  # for what must come; nothing waits so long unless it failed

T = TypeVar("T")


class Disk:
    """Serves every client it is given from one piece of memory, each in a thread of its own."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.opened: list[tuple[str, bytes]] = []
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def accept(self, volume: str, sock: socket.socket, leftover: bytes) -> None:
        assert not sock.getblocking()
        if sock.family != socket.AF_UNIX:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sock.setblocking(True)
        self.opened.append((volume, leftover))
        self._sockets.append(sock)
        thread = threading.Thread(target=self._serve, args=(sock, leftover))
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _serve(self, sock: socket.socket, leftover: bytes) -> None:
        kept = bytearray(leftover)

        def take(count: int) -> bytes:
            while len(kept) < count:
                got = sock.recv(1 << 20)
                if not got:
                    raise EOFError
                kept.extend(got)
            taken = bytes(kept[:count])
            del kept[:count]
            return taken

        with sock, contextlib.suppress(EOFError, OSError):
            while True:
                magic, _, command, cookie, offset, length = struct.unpack(">IHHQQI", take(28))
                payload = take(length) if command == 1 else b""
                if magic != 0x25609513 or command == 2:
                    return
                data, error = b"", 0
                if offset + length > SIZE:
                    error = 22
                elif command == 0:
                    data = bytes(self.content[offset : offset + length])
                elif command == 1:
                    self.content[offset : offset + length] = payload
                elif command in (4, 6):
                    self.content[offset : offset + length] = bytes(length)
                sock.sendall(struct.pack(">IIQ", 0x67446698, error, cookie) + data)


class Running:
    """An NbdServer in an event loop of its own thread."""

    def __init__(self, addresses: Sequence[Address], accept: Callable[[str, socket.socket, bytes], None]) -> None:
        self.refusal: str | None = None
        self.clients = 0
        self.lines: list[str] = []
        self.addresses: list[Address] = []
        self.options: dict[str, Any] = {}
        self._wanted = addresses
        self._accept = accept
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.server = self.call(self._make())
            self.call(self.server.start())
        except BaseException:
            self._end()
            raise
        self.addresses = self.server.addresses
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self._end()

    def close(self) -> None:
        self.call(self.server.close())

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def negotiating(self) -> int:
        async def ask() -> int:
            return self.server.negotiating

        return self.call(ask())

    def settled(self, negotiating: int) -> None:
        """Waits until so many clients are negotiating."""

        async def until() -> None:
            while self.server.negotiating != negotiating:
                await asyncio.sleep(0.001)

        self.call(until())

    def said(self, words: str) -> str:
        """Waits for a line of the log that holds `words`."""

        async def until() -> str:
            while not (found := [line for line in self.lines if words in line]):
                await asyncio.sleep(0.001)
            return found[0]

        return self.call(until())

    async def _make(self) -> NbdServer:
        return NbdServer(
            self._wanted,
            EXPORTS,
            self._accept,
            refusal=lambda: self.refusal,
            clients=lambda: self.clients,
            log=self.lines.append,
            **self.options,
        )

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.nbd"


@pytest.fixture
def running(path: Path, disk: Disk) -> Iterator[Running]:
    """On a unix socket at `path` and on a free port."""
    with Running([UnixAddress(str(path)), TcpAddress("127.0.0.1", 0)], disk.accept) as server:
        yield server


def uri(address: Address, export: str = "data") -> str:
    if isinstance(address, UnixAddress):
        return f"nbd+unix:///{export}?socket={address.path}"
    return f"nbd://{address}/{export}"


def dial(address: Address) -> socket.socket:
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.path)  # with a time-out it would not wait for room in the queue
        sock.settimeout(PATIENCE_S)
        return sock
    return socket.create_connection((address.host, address.port), PATIENCE_S)


def greeted(address: Address) -> socket.socket:
    sock = dial(address)
    assert take(sock, len(GREETING)) == GREETING
    return sock


def take(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        assert got, "hung up"
        data += got
    return data


def reply(sock: socket.socket) -> tuple[int, bytes]:
    """The next reply to an option: its kind and data."""
    header = take(sock, 20)
    return int.from_bytes(header[12:16], "big"), take(sock, int.from_bytes(header[16:], "big"))


def opened(sock: socket.socket) -> None:
    """Takes the answer to a GO that asked for nothing more: size and flags, then the acknowledgement."""
    assert [reply(sock)[0] for _ in range(2)] == [REP_INFO, REP_ACK]


def hung_up(sock: socket.socket) -> bool:
    """Waits for the end of the connection; what comes before it is dropped."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def option(kind: int, payload: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", kind, len(payload)) + payload


def go(name: bytes) -> bytes:
    return option(OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")


FLAGS = struct.pack(">I", 3)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def serves(address: Address) -> bool:
    with connect(uri(address), timeout=PATIENCE_S) as client:
        return client.size == SIZE


# Real clients.


@pytest.mark.parametrize("way", [0, 1], ids=["unix", "tcp"])
def test_nbdinfo_shows_the_export(running: Running, need_tool: Callable[[str], str], way: int) -> None:
    done = run(need_tool("nbdinfo"), "--json", uri(running.addresses[way]))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    [export] = said["exports"]
    assert said["protocol"] == "newstyle-fixed"
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is False
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert export[ability] is True
    assert [export[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MIB]


def test_nbdinfo_shows_an_export_of_the_largest_size(running: Running, need_tool: Callable[[str], str]) -> None:
    done = run(need_tool("nbdinfo"), "--size", uri(running.addresses[0], "logs"))
    assert done.stdout == f"{2**63 - 1}\n", done.stderr
    assert run(need_tool("nbdinfo"), "--is", "readonly", uri(running.addresses[0], "logs")).returncode == 0


def test_nbdinfo_lists_every_export(running: Running, need_tool: Callable[[str], str]) -> None:
    done = run(need_tool("nbdinfo"), "--list", "--json", uri(running.addresses[0], ""))
    assert done.returncode == 0, done.stderr
    assert [export["export-name"] for export in json.loads(done.stdout)["exports"]] == ["data", "logs"]


@pytest.mark.parametrize("way", [0, 1], ids=["unix", "tcp"])
def test_qemu_img_and_qemu_io_use_it(running: Running, need_tool: Callable[[str], str], way: int, disk: Disk) -> None:
    where = uri(running.addresses[way])
    shown = run(need_tool("qemu-img"), "info", "--output=json", "-f", "raw", where)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["virtual-size"] == SIZE
    commands = ("-c", "write -P 0xab 4096 1M", "-c", "flush", "-c", "read -P 0xab 4096 1M", "-c", "write -z 8192 4096")
    done = run(need_tool("qemu-io"), "-f", "raw", "-t", "none", *commands, where)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert disk.content[4096:8192] == b"\xab" * 4096
    assert disk.content[8192:12288] == bytes(4096)


def test_nbdcopy_writes_and_reads_it(
    running: Running, need_tool: Callable[[str], str], tmp_path: Path, disk: Disk, rng: random.Random
) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.write_bytes(rng.randbytes(SIZE))
    for arguments in ((str(source), uri(running.addresses[0])), (uri(running.addresses[1]), str(copied))):
        done = run(need_tool("nbdcopy"), *arguments)
        assert done.returncode == 0, done.stderr
    assert disk.content == source.read_bytes()
    assert copied.read_bytes() == source.read_bytes()


def test_a_secondary_tells_real_clients_who_is_primary(running: Running, need_tool: Callable[[str], str]) -> None:
    running.refusal = REFUSAL
    # libnbd 1.14 keeps the server's text for those who ask for its debug output.
    done = run("env", "LIBNBD_DEBUG=1", need_tool("nbdinfo"), uri(running.addresses[0]))
    assert done.returncode != 0
    assert REFUSAL in done.stderr
    done = run(need_tool("qemu-img"), "info", uri(running.addresses[1]))
    assert done.returncode != 0
    assert REFUSAL in done.stderr
    with pytest.raises(ExportRefusedError, match="alpha is the primary"):
        connect(uri(running.addresses[0]))
    # Only that request was refused: the names may be seen, and a promotion needs no new connection.
    with greeted(running.addresses[0]) as sock:
        sock.sendall(FLAGS + option(OPT_LIST))
        assert [reply(sock)[1] for _ in range(3)] == [b"\0\0\0\4data", b"\0\0\0\4logs", b""]
        running.refusal = None
        sock.sendall(go(b"data"))
        opened(sock)


# Who gets in.


def test_what_comes_behind_go_is_handed_on(running: Running, disk: Disk) -> None:
    request = struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 100, 5) + b"hello"
    with greeted(running.addresses[1]) as sock:
        sock.sendall(FLAGS + go(b"data") + request)
        opened(sock)
        assert take(sock, 16) == struct.pack(">IIQ", 0x67446698, 0, 7)
    assert disk.opened == [("data", request)]
    assert disk.content[100:105] == b"hello"


def test_a_client_may_send_byte_by_byte(running: Running, disk: Disk) -> None:
    with greeted(running.addresses[1]) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in FLAGS + option(99, b"abc") + go(b"data"):
            sock.sendall(bytes([byte]))
        assert reply(sock)[0] == REP_ERR_UNSUP
        opened(sock)
    running.said("opens data")
    assert disk.opened == [("data", b"")]


def test_one_line_says_who_opened_what(running: Running) -> None:
    assert serves(running.addresses[0])
    assert f"pid {os.getpid()} (uid {os.geteuid()})" in running.said("opens data")


def test_a_role_lost_while_the_answer_was_sent_is_noticed(path: Path, disk: Disk) -> None:
    asked = 0

    class Fickle(Running):
        async def _make(self) -> NbdServer:
            def refusal() -> str | None:
                nonlocal asked
                asked += 1
                return None if asked == 1 else REFUSAL

            return NbdServer([UnixAddress(str(path))], EXPORTS, disk.accept, refusal=refusal, log=self.lines.append)

    with Fickle([], disk.accept) as running, greeted(running.addresses[0]) as sock:
        sock.sendall(FLAGS + go(b"data"))
        assert hung_up(sock)
        assert REFUSAL in running.said("turned away")
    assert disk.opened == []


def test_the_cap_of_clients_is_told(running: Running) -> None:
    running.clients = 1024
    with pytest.raises(ExportRefusedError, match="1024 clients already"):
        connect(uri(running.addresses[0]))
    running.clients = 1023
    assert serves(running.addresses[0])


# Bad clients.


@pytest.mark.parametrize("way", [0, 1], ids=["unix", "tcp"])
def test_idle_clients_stop_nobody(running: Running, way: int) -> None:
    idle = [greeted(running.addresses[way]) for _ in range(2)]
    assert serves(running.addresses[way])
    running.close()
    assert all(hung_up(sock) for sock in idle)
    for sock in idle:
        sock.close()


def test_two_hundred_idle_clients_cannot_keep_a_real_one_out(running: Running) -> None:
    # CVE-2024-7409
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(dial(running.addresses[0])) for _ in range(200)]
        assert serves(running.addresses[0])
        assert all(hung_up(sock) for sock in idle[:100])
        assert running.negotiating() <= 100
        running.said("room was needed")


def test_a_client_that_stalls_is_hung_up_on(path: Path, disk: Disk) -> None:
    running = Running([UnixAddress(str(path))], disk.accept)
    running.options["deadline_s"] = 0.3
    with running, dial(UnixAddress(str(path))) as silent, greeted(UnixAddress(str(path))) as half:
        with contextlib.suppress(ConnectionError):  # on a busy machine its time may be over already
            half.sendall(FLAGS + go(b"data")[:-1])
        assert hung_up(silent)
        assert hung_up(half)
        assert "0.3 s" in running.said("chose no volume")
        # One that goes on talking gets no longer.
        with greeted(UnixAddress(str(path))) as chatty:
            with contextlib.suppress(ConnectionError):
                chatty.sendall(FLAGS + b"IHAVEOPT" + struct.pack(">II", 99, MIB))
                for _ in range(MIB - 1):
                    chatty.sendall(b".")
            assert hung_up(chatty)
    assert len([line for line in running.lines if "chose no volume" in line]) == 3
    assert disk.opened == []


def test_a_client_that_reads_nothing_stops_nobody(running: Running) -> None:
    with greeted(running.addresses[0]) as slow:
        slow.sendall(FLAGS)
        slow.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                slow.send(option(OPT_LIST) * 64)
        assert serves(running.addresses[0])
        running.close()


def test_rubbish_stops_nobody(running: Running, rng: random.Random) -> None:
    good = FLAGS + option(OPT_LIST) + option(99, bytes(50)) + go(b"data")
    for _ in range(150):
        spoiled = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        sent = rng.choice([rng.randbytes(rng.randint(0, 5000)), bytes(spoiled), good[: rng.randrange(len(good))]])
        with dial(rng.choice(running.addresses)) as sock, contextlib.suppress(ConnectionError):
            if rng.random() < 0.3:  # an end by RST, with answers still to come
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(sent)
    for address in running.addresses:
        assert serves(address)
    running.settled(0)


def test_a_refused_payload_is_drained_and_the_client_stays_in_step(running: Running) -> None:
    with greeted(running.addresses[0]) as sock:
        sock.sendall(FLAGS + option(OPT_GO, bytes(MIB)) + option(OPT_LIST))
        assert [reply(sock)[0] for _ in range(4)] == [REP_ERR_TOO_BIG, REP_SERVER, REP_SERVER, REP_ACK]


def test_an_accept_that_fails_costs_one_client(path: Path) -> None:
    def accept(_volume: str, _sock: socket.socket, _leftover: bytes) -> None:
        raise LocalError("no slot for another client")

    with Running([UnixAddress(str(path))], accept) as running:
        for _ in range(2):
            with greeted(running.addresses[0]) as sock:
                sock.sendall(FLAGS + go(b"data"))
                assert hung_up(sock)
        running.said("no slot for another client")


def test_no_descriptor_left_is_waited_out(running: Running) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack, dial(running.addresses[0]) as first:
        take(first, len(GREETING))
        fillers: list[int] = []
        stack.callback(lambda: [os.close(fd) for fd in fillers])
        fillers.append(os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[0] + 20, before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(fillers[0]))
        os.close(fillers.pop())
        with dial(running.addresses[0]) as sock:
            running.said("cannot accept: Too many open files")
            # It gave up the oldest that was still negotiating, and that is the room the newcomer gets.
            assert hung_up(first)
            assert take(sock, len(GREETING)) == GREETING


def test_nothing_leaks(path: Path, disk: Disk, open_descriptors: Callable[[], set[int]]) -> None:
    before = open_descriptors()
    with Running([UnixAddress(str(path)), TcpAddress("127.0.0.1", 0)], disk.accept) as running:
        for address in running.addresses:
            assert serves(address)
            with greeted(address):
                pass
        idle = [dial(address) for address in running.addresses]
    for sock in idle:
        assert hung_up(sock)
        sock.close()
    disk.close()
    assert open_descriptors() == before


# Addresses.


def test_a_unix_socket_is_for_its_owner_alone_and_gone_at_the_end(path: Path, disk: Disk) -> None:
    before = os.umask(0)
    try:
        with Running([UnixAddress(str(path))], disk.accept) as running:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert [found.name for found in path.parent.iterdir()] == [path.name]
            running.close()
            assert list(path.parent.iterdir()) == []
            running.close()
    finally:
        os.umask(before)


def test_the_longest_path_of_a_socket(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / ("n" * (107 - len(str(tmp_path)) - 1))
    assert len(str(path)) == 107
    with Running([UnixAddress(str(path))], disk.accept) as running:
        assert serves(running.addresses[0])
    assert list(tmp_path.iterdir()) == []


def test_a_socket_of_a_dead_daemon_is_replaced(path: Path, disk: Disk) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    with Running([UnixAddress(str(path))], disk.accept) as running:
        assert serves(running.addresses[0])
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("queue", [8, 0])
def test_a_socket_of_a_living_daemon_is_refused(path: Path, disk: Disk, queue: int) -> None:
    with socket.socket(socket.AF_UNIX) as living, socket.socket(socket.AF_UNIX) as waiting:
        living.bind(str(path))
        living.listen(queue)
        waiting.connect(str(path))  # with a queue of 0 it is full now
        identity = path.stat().st_ino
        with pytest.raises(RefusedError, match=r"a\.nbd: a living process listens there"):
            Running([UnixAddress(str(path))], disk.accept).__enter__()
        assert path.stat().st_ino == identity
        assert len(list(path.parent.iterdir())) == 1


def test_a_folder_that_somebody_keeps_locked_is_told(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrorpair.nbdserver.LOCK_S", 0.05)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_SH)
        with pytest.raises(RefusedError, match="lock of the folder"):
            Running([UnixAddress(str(path))], disk.accept).__enter__()
    finally:
        os.close(folder)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_is_no_socket_is_not_touched(path: Path, disk: Disk) -> None:
    path.write_text("precious")
    with pytest.raises(RefusedError, match="no socket"):
        Running([UnixAddress(str(path))], disk.accept).__enter__()
    assert path.read_text() == "precious"
    path.rename(path.with_name("other"))
    path.symlink_to("other")
    with pytest.raises(RefusedError, match="no socket"):
        Running([UnixAddress(str(path))], disk.accept).__enter__()


def test_a_folder_that_is_missing_is_named(tmp_path: Path, disk: Disk) -> None:
    with pytest.raises(LocalError, match=r"gone: No such file"):
        Running([UnixAddress(str(tmp_path / "gone" / "a.nbd"))], disk.accept).__enter__()


def test_a_socket_that_is_not_ours_any_more_is_left_alone(path: Path, disk: Disk) -> None:
    with Running([UnixAddress(str(path))], disk.accept):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_of_daemons_that_start_at_once_one_wins(path: Path, disk: Disk) -> None:
    # Over a dead daemon's file too: that is where two could each remove the other's new one.
    for stale in (False, True) * 5:
        if stale:
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        together = threading.Barrier(4)
        winners: list[NbdServer] = []
        refused: list[RefusedError] = []

        async def start(
            together: threading.Barrier = together,
            winners: list[NbdServer] = winners,
            refused: list[RefusedError] = refused,
        ) -> None:
            server = NbdServer([UnixAddress(str(path))], EXPORTS, disk.accept, log=print)
            together.wait(PATIENCE_S)
            try:
                await server.start()
                winners.append(server)
            except RefusedError as error:
                refused.append(error)
            together.wait(PATIENCE_S)
            if server in winners:
                with dial(UnixAddress(str(path))):
                    pass
            await server.close()

        threads = [threading.Thread(target=lambda: asyncio.run(start())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert (len(winners), len(refused)) == (1, 3)
        assert list(path.parent.iterdir()) == []


def test_a_port_in_use_is_refused_and_named(disk: Disk, path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RefusedError, match=rf"nbd 127\.0\.0\.1:{port}: port {port} is in use"):
            Running([UnixAddress(str(path)), TcpAddress("127.0.0.1", port)], disk.accept).__enter__()
    assert list(path.parent.iterdir()) == []  # all addresses or none


def test_addresses_that_cannot_be_had(disk: Disk) -> None:
    with pytest.raises(LocalError, match=r"192\.0\.2\.1"):
        Running([TcpAddress("192.0.2.1", 10809)], disk.accept).__enter__()
    with pytest.raises(UsageError, match="unknown host"):
        Running([TcpAddress("no such host", 10809)], disk.accept).__enter__()


def test_our_own_client_and_errors_of_requests(running: Running, rng: random.Random) -> None:
    data = rng.randbytes(MIB)
    with connect(uri(running.addresses[1])) as client:
        assert isinstance(client, NbdClient)
        client.write(12345, data, fua=True)
        assert client.read(12345, MIB) == data
        with pytest.raises(NbdError):
            client.read(SIZE, 1)
        client.flush()
