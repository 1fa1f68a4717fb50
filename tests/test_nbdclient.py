"""Our small NBD client: against nbdkit and qemu-nbd for what is right, against scripted servers for what is wrong."""

from __future__ import annotations

import contextlib
import errno
import pickle
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from mirrorpair.errors import (
    MirrorpairError,
    PeerProtocolError,
    PeerTimeoutError,
    UnreachableError,
    UsageError,
)
from mirrorpair.handshake import (
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPT_GO,
    REP_ACK,
    REP_ERR_POLICY,
    REP_ERR_UNKNOWN,
    REP_INFO,
    REPLY_MAGIC,
    Export,
    ServerHandshake,
)
from mirrorpair.nbdclient import (
    CMD_TRIM,
    MAX_ANSWERS,
    ExportRefusedError,
    NbdError,
    Target,
    connect,
    parse_target,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Serve = Callable[..., Path]

KIB = 1024
MIB = 1024 * KIB
SIZE = 64 * MIB
PATIENCE_S = 30.0

# Both servers take a listening socket over as systemd would give it to them: whoever connects, waits, without a guess.
ACTIVATED = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'


def activate(listener: socket.socket, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", ACTIVATED, "sh", *command], stdin=listener)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve("nbdkit", ...)` runs a server and returns the path of its socket."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> Path:
        path = tmp_path / f"server-{len(started)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            started.append(activate(listener, *command))
        return path

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
            process.wait(PATIENCE_S)


@pytest.fixture
def nbdkit(serve: Serve, need_tool: Callable[[str], str]) -> Callable[..., Path]:
    return lambda *options: serve(need_tool("nbdkit"), "-f", *options)


class Script:
    """`script(talk)` is a server that calls `talk(socket)` for its only client and then hangs up, when the client has
    read what was said to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads: list[threading.Thread] = []

    def __call__(self, talk: Callable[[socket.socket], object]) -> Path:
        path = self._folder / f"scripted-{len(self._threads)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_S)

        def run() -> None:
            with listener, listener.accept()[0] as sock, contextlib.suppress(OSError):
                sock.settimeout(PATIENCE_S)
                talk(sock)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()
        return path

    def end(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path)
    try:
        yield made
    finally:
        made.end()


def negotiate(sock: socket.socket) -> None:
    """The server's side, done right, of an export of SIZE bytes."""
    side = ServerHandshake({"data": Export(size=SIZE)})
    sock.sendall(GREETING)
    while not side.ended:
        for item in side.feed(sock.recv(4096)):
            if isinstance(item, bytes):
                sock.sendall(item)


def take(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        if not got:
            raise ConnectionResetError
        data += got
    return data


def request(sock: socket.socket) -> tuple[int, int, int, int, int]:
    """The next request: flags, type, cookie, offset, length."""
    magic, *rest = struct.unpack(">IHHQQI", take(sock, 28))
    assert magic == 0x25609513
    return tuple(rest)


def answer(cookie: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def option_reply(kind: int, data: bytes = b"", *, option: int = OPT_GO, magic: int = REPLY_MAGIC) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(data)) + data


EXPORT_REPLY = option_reply(REP_INFO, struct.pack(">HQH", INFO_EXPORT, SIZE, 1))


# Real servers.


def test_nbdkit_is_read_and_written(nbdkit: Callable[..., Path], rng: random.Random) -> None:
    with connect(nbdkit("memory", "64M")) as client:
        assert client.size == SIZE
        assert not client.read_only
        assert client.read(0, 10) == bytes(10)
        data = rng.randbytes(100_000)
        client.write(777, data)
        assert client.read(777, len(data)) == data
        client.write(800, b"now", fua=True)
        client.flush()
        client.trim(4096, 4096, fua=True)
        client.write_zeroes(8192, 4096, fua=True, no_hole=True)
        assert client.read(8192, 4096) == bytes(4096)
        assert client.read(790, 20) == data[13:23] + b"now" + data[26:33]
        assert client.in_flight == 0


def test_the_largest_request(nbdkit: Callable[..., Path], rng: random.Random) -> None:
    with connect(nbdkit("memory", "64M")) as client:
        data = memoryview(rng.randbytes(32 * MIB))
        client.write(MIB, data)
        assert client.read(MIB, 32 * MIB) == data


def test_requests_in_flight_agree_with_a_model(nbdkit: Callable[..., Path], rng: random.Random) -> None:
    model = bytearray(SIZE)
    with connect(nbdkit("memory", "64M")) as client:
        for _ in range(20):
            # Pieces that do not overlap: their order is the server's business.
            starts = sorted(rng.sample(range(0, MIB, 4096), 24))
            pieces = [(at, rng.randint(1, 4096)) for at in starts]
            expected = {at: bytes(model[at : at + length]) for at, length in pieces}
            window = []
            for at, length in pieces:
                kind = rng.choice(["read", "write", "zero"])
                if kind == "read":
                    window.append((client.start_read(at, length), expected[at]))
                    continue
                data = rng.randbytes(length) if kind == "write" else bytes(length)
                if kind == "write":
                    window.append((client.start_write(at, data, fua=rng.random() < 0.2), b""))
                else:
                    window.append((client.start_write_zeroes(at, length), b""))
                model[at : at + length] = data
            rng.shuffle(window)
            for pending, wanted in window:
                assert pending.wait() == wanted
                assert pending.done
            assert client.in_flight == 0
        assert client.read(0, MIB) == model[:MIB]


def test_neither_side_waits_for_the_other_to_read(nbdkit: Callable[..., Path], never_blocks: None) -> None:
    # 64 MiB of replies are asked for before 64 MiB are sent, both far more than a socket holds.
    with connect(nbdkit("--threads=1", "memory", "64M")) as client:
        data = b"\x5a" * MIB
        reads = [client.start_read(at, MIB) for at in range(0, SIZE, MIB)]
        writes = [client.start_write(at, data) for at in range(0, SIZE, MIB)]
        assert all(len(pending.wait()) == MIB for pending in reads)
        assert all(pending.wait() == b"" for pending in writes)


def test_errors_are_raised_and_spoil_nothing(nbdkit: Callable[..., Path]) -> None:
    path = nbdkit("--filter=error", "memory", "64M", "error-pwrite=ENOSPC", "error-pwrite-rate=1")
    with connect(path) as client:
        before = client.start_read(0, 4096)
        with pytest.raises(NbdError, match="write of 3 bytes at 4096 failed at the server: No space left") as raised:
            client.write(4096, b"abc")
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(NbdError, match="read of 1 bytes") as raised:
            client.read(SIZE, 1)
        assert raised.value.errno == errno.EINVAL
        assert before.wait() == bytes(4096)
        with pytest.raises(NbdError):
            client.start(77).wait()
        assert client.read(0, 1) == b"\0"
        copy = pickle.loads(pickle.dumps(raised.value))
        assert (str(copy), copy.errno) == (str(raised.value), errno.EINVAL)


def test_nbdkit_over_tcp_by_uri(nbdkit: Callable[..., Path], need_tool: Callable[[str], str]) -> None:
    """nbdkit is given a TCP socket in the same way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = activate(listener, need_tool("nbdkit"), "-f", "memory", "1M")
    try:
        for target in (f"nbd://127.0.0.1:{port}/", f"tcp:127.0.0.1:{port}"):
            with connect(target) as client:
                assert client.size == MIB
                assert client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_a_read_only_server(nbdkit: Callable[..., Path]) -> None:
    with connect(nbdkit("-r", "memory", "1M")) as client:
        assert client.read_only
        with pytest.raises(NbdError) as raised:
            client.write(0, b"x")
        assert raised.value.errno in (errno.EPERM, errno.EROFS)


def test_qemu_nbd_serves_a_named_export(
    serve: Serve, need_tool: Callable[[str], str], tmp_path: Path, rng: random.Random
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * MIB))
    options = ("-f", "raw", "-x", "data", "--persistent", "--shared=4", "--discard=unmap")
    path = serve(need_tool("qemu-nbd"), *options, str(image))
    data = rng.randbytes(MIB)
    with connect(path, "data") as client, connect(f"nbd+unix:///data?socket={path}") as second:
        assert client.size == 4 * MIB
        window = [client.start_write(at, data[at : at + 64 * KIB]) for at in range(0, MIB, 64 * KIB)]
        for pending in window:
            pending.wait()
        client.flush()
        assert second.read(0, MIB) == data
        second.write_zeroes(0, 4096, fua=True)
        second.trim(MIB, MIB)
    with pytest.raises(ExportRefusedError, match="refused export 'nothing'") as raised:
        connect(path, "nothing")
    assert raised.value.reply == REP_ERR_UNKNOWN
    assert image.read_bytes()[:MIB] == bytes(4096) + data[4096:]


# Scripted servers.


def test_replies_may_come_in_any_order_and_byte_by_byte(script: Script) -> None:
    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        asked = [request(sock) for _ in range(3)]
        said = b"".join(answer(cookie) + bytes([at]) * length for _, _, cookie, at, length in reversed(asked))
        for byte in said:
            sock.sendall(bytes([byte]))

    with connect(script(talk), "data") as client:
        window = [client.start_read(at, 100) for at in (1, 2, 3)]
        assert [pending.wait() for pending in window] == [b"\1" * 100, b"\2" * 100, b"\3" * 100]


def test_a_refused_export_says_why(script: Script) -> None:
    text = "beta is secondary: alpha is the primary\x1b[2J"

    def talk(sock: socket.socket) -> None:
        side = ServerHandshake({"data": Export(size=SIZE)}, text)
        sock.sendall(GREETING)
        for item in side.feed(take(sock, 4 + 16 + 4 + 4 + 4)):
            assert isinstance(item, bytes)
            sock.sendall(item)

    with pytest.raises(ExportRefusedError, match="alpha is the primary") as raised:
        connect(script(talk), "data")
    assert raised.value.reply == REP_ERR_POLICY
    assert "\x1b" not in str(raised.value)
    assert pickle.loads(pickle.dumps(raised.value)).reply == REP_ERR_POLICY


def test_block_sizes_are_what_the_server_says(script: Script) -> None:
    def talk(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        sizes = option_reply(REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 512, 65536, MIB))
        unknown = option_reply(REP_INFO, b"\0\x77whatever")
        sock.sendall(EXPORT_REPLY + unknown + sizes + option_reply(REP_ACK))
        take(sock, 4)

    with connect(script(talk), "data") as client:
        assert client.block_sizes == (512, 65536, MIB)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "hung up"),
        (GREETING[:-1], "hung up"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "not a newstyle NBD server"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(136), "not a newstyle NBD server"),
        (GREETING[:-2] + b"\0\0", "too old"),
        (GREETING, "hung up"),
        (GREETING + b"x" * 20, "not valid"),
        (GREETING + option_reply(REP_ACK), "not valid"),
        (GREETING + option_reply(REP_ACK, magic=1), "not valid"),
        (GREETING + option_reply(REP_INFO, b"\0"), "not valid"),
        (GREETING + option_reply(2, b"abc"), "not valid"),
        (GREETING + EXPORT_REPLY + option_reply(REP_ACK, option=3), "not valid"),
        (GREETING + struct.pack(">QIII", REPLY_MAGIC, OPT_GO, REP_INFO, 2**32 - 1), "not valid"),
        (GREETING + option_reply(REP_INFO, b"\0\x77") * (MAX_ANSWERS + 1), "without end"),
        (GREETING + EXPORT_REPLY[:-1], "hung up"),
    ],
    ids=range(15),
)
def test_what_is_no_nbd_server_is_told(script: Script, said: bytes, words: str) -> None:
    with pytest.raises(PeerProtocolError, match=words):
        connect(script(lambda sock: sock.sendall(said)), "data")


def test_a_server_that_says_nothing_is_given_up(script: Script) -> None:
    given_up = threading.Event()
    path = script(lambda _: given_up.wait(PATIENCE_S))
    with pytest.raises(PeerTimeoutError, match=r"no answer within 0\.05 s"):
        connect(path, "data", timeout=0.05)
    given_up.set()


def test_a_reply_that_does_not_come_is_waited_for_again(script: Script) -> None:
    asked = threading.Event()

    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        _, _, first, *_ = request(sock)
        assert asked.wait(PATIENCE_S)
        sock.sendall(answer(first))

    with connect(script(talk), "data") as client:
        held = client.start_write(0, b"abc")
        with pytest.raises(PeerTimeoutError, match=r"no answer to a write of 3 bytes at 0 within 0\.05 s"):
            held.wait(0.05)
        assert client.in_flight == 1
        asked.set()
        assert held.wait() == b""


def test_a_server_that_takes_nothing_is_given_up(script: Script) -> None:
    given_up = threading.Event()

    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        given_up.wait(PATIENCE_S)

    client = connect(script(talk), "data")
    client.timeout = 0.05
    with pytest.raises(PeerTimeoutError, match="took nothing"):
        client.write(0, bytes(32 * MIB))
    # Half a request is out, so nothing else can be said on this connection.
    with pytest.raises(PeerTimeoutError):
        client.flush()
    client.close()
    given_up.set()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "hung up with 2 requests unanswered"),
        (b"HTTP/1.1 400 Bad", "answers no request"),
        (answer(99), "answers no request"),
        (answer(0), "answers no request"),
        (struct.pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0), "answers no request"),
        (answer(1) + bytes(99), "hung up"),
    ],
    ids=["nothing", "http", "unknown cookie", "no cookie", "structured reply", "half of the data"],
)
def test_a_connection_that_is_lost_fails_every_request(script: Script, said: bytes, words: str) -> None:
    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        request(sock)
        request(sock)
        sock.sendall(said)

    with connect(script(talk), "data") as client:
        window = [client.start_read(0, 100), client.start_flush()]
        for pending in window:
            with pytest.raises(PeerProtocolError, match=words):
                pending.wait()
        with pytest.raises(PeerProtocolError, match=words):
            client.read(0, 1)
        assert client.in_flight == 0


def test_what_was_answered_before_a_hang_up_is_not_lost(script: Script, never_blocks: None) -> None:
    gone = threading.Event()

    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        _, _, cookie, *_ = request(sock)
        sock.sendall(answer(cookie))
        sock.close()
        gone.set()

    with connect(script(talk), "data") as client:
        answered = client.start_flush()
        gone.wait(PATIENCE_S)
        with pytest.raises(PeerProtocolError, match=r"lost|hung up"):
            client.write(0, bytes(MIB))
        assert answered.wait() == b""


def test_any_request_can_be_sent(script: Script) -> None:
    seen: list[tuple[int, ...]] = []

    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        for error in (errno.EINVAL, 0):
            seen.append(request(sock))
            sock.sendall(answer(seen[-1][2], error))

    with connect(script(talk), "data") as client:
        with pytest.raises(NbdError):
            client.start(65535, 2**64 - 1, 2**32 - 1, flags=65535).wait()
        client.start(CMD_TRIM, 1, 2).wait()
        for wrong in ((65536, 0, 0), (0, 2**64, 0), (0, -1, 0), (0, 0, 2**32)):
            with pytest.raises(ValueError, match="cannot hold"):
                client.start(*wrong)
    assert [(flags, kind, at, length) for flags, kind, _, at, length in seen] == [
        (65535, 65535, 2**64 - 1, 2**32 - 1),
        (0, CMD_TRIM, 1, 2),
    ]


@pytest.mark.parametrize("way", ["close", "hang_up"])
def test_leaving_is_said_or_not(script: Script, way: str) -> None:
    said: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        negotiate(sock)
        while got := sock.recv(4096):
            said.append(got)

    client = connect(script(talk), "data")
    getattr(client, way)()
    with pytest.raises(MirrorpairError, match="closed"):
        client.flush()
    client.close()
    script.end()
    expected = struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0) if way == "close" else b""
    assert b"".join(said) == expected


def test_nothing_leaks(script: Script, open_descriptors: Callable[[], set[int]], tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(PeerProtocolError):
        connect(script(lambda sock: sock.sendall(b"nothing that is NBD")))
    with pytest.raises(UnreachableError):
        connect(tmp_path / "nobody")
    with connect(script(negotiate), "data"):
        pass
    script.end()
    assert open_descriptors() == before


# Targets.


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("/run/a.nbd", Target(path="/run/a.nbd")),
        ("a.nbd", Target(path="a.nbd")),
        ("unix:/run/a.nbd", Target(path="/run/a.nbd")),
        ("tcp:10.0.0.1:10810", Target(host="10.0.0.1", port=10810)),
        ("tcp:[::1]:10810", Target(host="::1", port=10810)),
        ("nbd://host", Target(host="host", port=10809)),
        ("nbd://host/", Target(host="host", port=10809)),
        ("nbd://host:1/data", Target(host="host", port=1, export="data")),
        ("nbd://[::1]:10810/a%20b/c", Target(host="::1", port=10810, export="a b/c")),
        ("nbd+unix:///data?socket=/run/a.nbd", Target(path="/run/a.nbd", export="data")),
        ("nbd+unix:///?socket=/run/a%2fb", Target(path="/run/a/b")),
    ],
)
def test_a_target_is_understood(text: str, target: Target) -> None:
    assert parse_target(text) == target
    chosen = parse_target(text, "other")
    assert (chosen.path, chosen.host, chosen.port, chosen.export) == (target.path, target.host, target.port, "other")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "a\0b",
        "tcp:nothing",
        "tcp:host:99999",
        "http://host/",
        "nbds://host/data",
        "nbds+unix:///data?socket=/a",
        "nbd:///data",
        "nbd://host:port/",
        "nbd://[::1/",
        "nbd+unix:///data",
        "nbd+unix://host/data?socket=/a",
        "nbd+unix:///data?socket=/a&socket=/b",
    ],
)
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_target(text)


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "busy"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with pytest.raises(UnreachableError, match=r"no connection within 0\.05 s"):
            connect(path, timeout=0.05)

        def serve() -> None:
            for talk in (lambda _: None, negotiate):
                with listener.accept()[0] as sock:
                    talk(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        with connect(path, "data") as client:
            assert client.size == SIZE
        thread.join(PATIENCE_S)


def test_where_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"nobody: No such file.*does an NBD server run there"):
        connect(tmp_path / "nobody")
    with pytest.raises(UnreachableError, match="too long"):
        connect(tmp_path / ("n" * 200))
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="refused"):
            connect(f"nbd://127.0.0.1:{unheard.getsockname()[1]}/data")
    with pytest.raises(UnreachableError):
        connect("nbd://no-such-host.invalid/data")
