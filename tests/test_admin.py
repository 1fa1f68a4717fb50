"""The control socket: a real server on a real socket, honest clients, and all kinds of bad ones."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from adminside import LIMIT_S, Daemon, daemon_at, failure, resyncing, status, volume
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.admin import CAP, AdminServer
from mirrorpair.control import MAX_ANSWER, MAX_REQUEST, AdminClient, ResyncPlan, Working, decode_request
from mirrorpair.errors import (
    LocalError,
    MirrorpairError,
    NotAllowedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    RefusedError,
    UnreachableError,
)
from mirrorpair.status import Refusal, judge

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLAN = ResyncPlan(
    volume="data", amount="bitmap", source="beta", target="alpha", bytes=65536, rule="H1", reason="alpha was away"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "beta.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[Daemon]:
    with daemon_at(path) as made:
        yield made


@contextlib.contextmanager
def raw(daemon: Daemon) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(daemon.path)  # without a time-out: a full queue is waited for
        sock.settimeout(LIMIT_S)
        yield sock


def ask(sock: socket.socket, request: bytes) -> dict[str, Any]:
    sock.sendall(request)
    return next_answer(sock)


def next_answer(sock: socket.socket) -> dict[str, Any]:
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = sock.recv(1)
        assert piece, "hung up"
        line += piece
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Runs `call` beside the test; what it returned or raised is in the list when the thread is joined."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except MirrorpairError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


# --- what it is for


def test_every_operation_reaches_the_node_with_its_arguments(daemon: Daemon) -> None:
    daemon.node.plans = [PLAN]
    daemon.node.log.add(1.0, "role", "by hand", epoch=7)
    with daemon.client() as client:
        assert client.status() == judge(status())
        assert client.events() == daemon.node.log.since(0)
        assert client.events(since=1) == []
        assert client.plan_resync("data", full=True) == [PLAN]
        assert client.resync("data").message == "the resync is under way"
        assert client.demote(dry_run=True).message == "beta would become secondary"
        assert client.demote().status.role == "secondary"
        assert client.promote(dry_run=True).status.role == "secondary"
        done = client.promote(accept_data_loss=True, force=True)
        assert (done.message, done.status.epoch) == ("beta is primary of epoch 8", 8)
    calls = [call for call in daemon.node.calls if call[0] != "status"]
    assert calls == [
        ("events", {"since": 0}),
        ("events", {"since": 1}),
        ("plan_resync", {"volume": "data", "full": True}),
        ("resync", {"volume": "data", "full": False}),
        ("demote", {"dry_run": True}),
        ("demote", {"dry_run": False}),
        ("promote", {"accept_data_loss": False, "force": False, "dry_run": True}),
        ("promote", {"accept_data_loss": True, "force": True, "dry_run": False}),
    ]


def test_an_error_keeps_its_exit_code_and_sentence(daemon: Daemon) -> None:
    daemon.node.fails = {
        "demote": RefusedError("beta would lose data"),
        "promote": PeerError("both wrote", 20),
        "events": PeerError("ends with 0?", 0),
    }
    with daemon.client() as client:
        for call, expected in (
            (client.demote, (12, "beta would lose data")),
            (client.promote, (20, "both wrote")),
            (client.events, (1, "ends with 0?")),
            (lambda: client.plan_resync("nope"), (2, "there is no volume nope")),
        ):
            with pytest.raises(PeerError) as caught:
                call()
            assert failure(caught.value) == expected
        client.status()


def test_a_bug_in_the_node_is_an_error_and_not_the_end(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    daemon.node.fails = {"demote": ZeroDivisionError("oops\nline")}
    with daemon.client() as client:
        with pytest.raises(PeerError, match="internal error of the daemon: ZeroDivisionError") as caught:
            client.demote()
        assert caught.value.exit_code == 1
        client.status()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "\n" not in caplog.records[0].getMessage()


def test_requests_may_be_sent_ahead(daemon: Daemon) -> None:
    with raw(daemon) as sock:
        sock.sendall(b'{"op":"status"}\n{"op":"events"}\n{"op":"plan-resync"}\n')
        assert next_answer(sock)["ok"]["node"] == "beta"
        assert next_answer(sock) == {"ok": []}
        assert next_answer(sock) == {"ok": []}


def test_a_client_that_closed_its_sending_half_still_gets_its_answer(daemon: Daemon) -> None:
    with raw(daemon) as sock:
        sock.sendall(b'{"op":"status"}\n')
        sock.shutdown(socket.SHUT_WR)
        assert next_answer(sock)["ok"]["node"] == "beta"
        assert sock.recv(1) == b""


# --- waiting


def test_wait_returns_when_it_is_so(daemon: Daemon) -> None:
    with daemon.client() as client:
        thread, results = in_thread(lambda: client.wait_for("secondary"))
        daemon.until(lambda: ("wait_for", {"condition": "secondary", "volume": None}) in daemon.node.calls)
        daemon.change(status(role="secondary", serving="no"))
        thread.join(LIMIT_S)
    assert getattr(results[0], "message", None) == "beta is secondary"


def test_wait_ends_at_its_time_with_13_and_the_reason(daemon: Daemon) -> None:
    with daemon.client() as client:
        for timeout in (0.0, 0.01):
            with pytest.raises(PeerError, match=r"beta is not secondary after .* s: every write") as caught:
                client.wait_for("secondary", timeout=timeout)
            assert caught.value.exit_code == 13
        assert client.wait_for("primary", timeout=0.0).message == "beta is primary"


def test_waiting_in_vain_ends_with_20(path: Path) -> None:
    split = status(peer={"connected": False}, refusal=Refusal(kind="split-brain", reason="both wrote"))
    with daemon_at(path, split) as daemon, daemon.client() as client:
        with pytest.raises(PeerError, match="both wrote") as caught:
            client.wait_for("synced")
        assert caught.value.exit_code == 20


def test_a_client_that_leaves_ends_its_wait(daemon: Daemon) -> None:
    with raw(daemon) as sock:
        sock.sendall(b'{"op":"wait","condition":"secondary"}\n')
        daemon.until(lambda: bool(daemon.node.calls))
    daemon.until(lambda: daemon.node.cancelled == ["wait_for"])


@pytest.mark.parametrize(
    "request_line", [b'{"op":"promote"}\n', b'{"op":"demote"}\n', b'{"op":"resync","wait":true}\n']
)
def test_a_client_that_leaves_does_not_stop_what_changes_the_node(path: Path, request_line: bytes) -> None:
    import asyncio

    with daemon_at(path, beat_s=0.001) as daemon:

        async def hold() -> asyncio.Event:
            return asyncio.Event()

        daemon.node.hold = daemon.run(hold())
        with raw(daemon) as sock:
            sock.sendall(request_line)
            assert "progress" in next_answer(sock)  # it is at work
        with daemon.client() as client:  # the daemon has others to serve meanwhile
            client.status()
        daemon.loop.call_soon_threadsafe(daemon.node.hold.set)
        daemon.until(lambda: len(daemon.node.finished) == 1)
        assert daemon.node.cancelled == []


def test_a_long_operation_gives_signs_of_life(path: Path) -> None:
    import asyncio

    with daemon_at(path, beat_s=0.001) as daemon:

        async def hold() -> asyncio.Event:
            return asyncio.Event()

        daemon.node.hold = daemon.run(hold())
        with raw(daemon) as sock:
            sock.sendall(b'{"op":"promote"}\n')
            for _ in range(3):
                assert next_answer(sock)["progress"]["op"] == "promote"
            daemon.loop.call_soon_threadsafe(daemon.node.hold.set)
            answer = next_answer(sock)
            while "progress" in answer:
                answer = next_answer(sock)
        assert answer["ok"]["message"] == "beta is primary of epoch 8"


def test_a_watched_resync_tells_its_progress_until_the_end(path: Path) -> None:
    with daemon_at(path, beat_s=0.001) as daemon:
        daemon.node.on_resync = lambda node: setattr(node, "facts", resyncing())
        seen: list[Working] = []

        def progress(working: Working) -> None:
            seen.append(working)
            if len(seen) == 3:
                daemon.change(status())

        with daemon.client() as client:
            done = client.resync("data", wait=True, on_progress=progress)
        assert done.message == "data is in sync"
        assert seen[0].volumes == resyncing().volumes
        assert "failed over" in seen[0].reason


def test_a_resync_of_one_volume_does_not_wait_for_the_others(path: Path) -> None:
    facts = status(volumes=[volume(), volume("blobs", out_of_sync_bytes=1)])
    with daemon_at(path, facts) as daemon, daemon.client() as client:
        assert client.resync("data", wait=True).message == "data is in sync"


# --- bad clients


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"rubbish",
        b"null",
        b"[]",
        b"{}",
        b'{"op":"format-disk"}',
        b'{"op":7}',
        b'{"op":"status","colour":"blue"}',
        b'{"op":"promote","force":"yes"}',
        b'{"op":"promote","force":null}',
        b'{"op":"wait"}',
        b'{"op":"wait","condition":"rich"}',
        b'{"op":"wait","condition":"synced","timeout":-1}',
        b'{"op":"wait","condition":"synced","timeout":1e300}',
        b'{"op":"events","since":-1}',
        b'{"op":"events","since":99999999999999999999999}',
        b'{"op":"resync","volume":""}',
        b'{"op":"resync","volume":"' + b"x" * 256 + b'"}',
        b"\xff\xfe\x00",
        b"[" * 60000,
        b'{"op":"status"} {"op":"status"}',
    ],
)
def test_a_bad_request_is_answered_and_the_next_one_served(daemon: Daemon, line: bytes) -> None:
    with raw(daemon) as sock:
        answer = ask(sock, line + b"\n")
        assert answer["error"]["code"] == 2
        assert answer["error"]["message"].startswith("not a valid request: ")
        assert ask(sock, b'{"op":"status"}\n')["ok"]["node"] == "beta"


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_whatever_the_bytes_are_a_request_is_a_struct_or_a_value_error(line: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode_request(line)


def test_a_request_may_come_byte_by_byte(daemon: Daemon) -> None:
    with raw(daemon) as sock:
        for byte in b'{"op":"sta':
            sock.sendall(bytes([byte]))
        assert ask(sock, b'tus"}\n')["ok"]["node"] == "beta"


def test_a_request_is_at_most_64_kib(daemon: Daemon) -> None:
    with raw(daemon) as sock:
        padded = b'{"op":"status"' + b" " * (MAX_REQUEST - 17) + b"}"
        assert ask(sock, padded + b"\n")["ok"]["node"] == "beta"
    for line in (b" " * (MAX_REQUEST + 1) + b"\n", b"x" * (4 * MAX_REQUEST)):
        with raw(daemon) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(line)
            assert next_answer(sock)["error"]["code"] == 2
    with daemon.client() as client:
        client.status()


@pytest.mark.parametrize("sent", [b"", b'{"op":"sta', b'{"op":"status"}\n', b'{"op":"demote"}\n{"op":"promote"}\n{"op'])
def test_a_client_may_hang_up_anywhere(daemon: Daemon, sent: bytes) -> None:
    for _ in range(5):
        with raw(daemon) as sock:
            sock.sendall(sent)
    daemon.until(lambda: not daemon.server._clients)
    with daemon.client() as client:
        client.status()


def test_a_client_that_does_not_read_is_cut_off(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with daemon_at(path, slow_s=0.05) as daemon:
        for number in range(1000):
            daemon.node.log.add(float(number), "link", "x" * 2000, epoch=7)
        with raw(daemon) as sock:
            sock.sendall(b'{"op":"events"}\n' * 20)
            daemon.until(lambda: bool(daemon.node.calls) and not daemon.server._clients)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1 << 20):
                    pass  # the server hung up: this ends
    assert "took no answer" in caplog.text


def test_a_newcomer_takes_the_place_of_the_one_idle_longest(path: Path) -> None:
    with daemon_at(path, cap=3) as daemon, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(raw(daemon)) for _ in range(3))
        for sock in (first, second, third, first):  # then `second` is idle longest
            assert "ok" in ask(sock, b'{"op":"status"}\n')
        with daemon.client() as client:
            client.status()
        assert second.recv(1) == b""
        for sock in (first, third):
            assert "ok" in ask(sock, b'{"op":"status"}\n')


def test_when_all_are_at_work_a_newcomer_is_told(path: Path) -> None:
    with daemon_at(path, cap=2) as daemon, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(raw(daemon)).sendall(b'{"op":"wait","condition":"secondary"}\n')
        daemon.until(lambda: [call[0] for call in daemon.node.calls].count("wait_for") == 2)
        with daemon.client() as client, pytest.raises(PeerError, match="2 other commands") as caught:
            client.status()
        assert caught.value.exit_code == 11
        daemon.change(status(role="secondary", serving="no"))


def test_200_idle_clients_keep_nobody_out(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(raw(daemon))
        with daemon.client() as client:
            client.status()
        assert len(daemon.server._clients) <= CAP


def test_another_user_is_refused(public_folder: Path, root: None, as_nobody: Callable[[], Any]) -> None:
    with daemon_at(public_folder / "beta.sock") as daemon:
        with as_nobody(), pytest.raises(NotAllowedError, match="not open to this user"):
            daemon.client()
        os.chmod(daemon.path, 0o666)  # as if somebody had been careless
        with as_nobody(), daemon.client() as client, pytest.raises(PeerError, match="not user 65534") as caught:
            client.status()
        assert caught.value.exit_code == 14


# --- the socket and its lock


def test_the_socket_is_the_owner_s_alone_and_goes_with_the_server(path: Path) -> None:
    before = os.umask(0)
    try:
        with daemon_at(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert os.listdir(path.parent) == []


def test_a_second_daemon_is_refused_and_the_first_goes_on(path: Path) -> None:
    with daemon_at(path) as daemon:
        with pytest.raises(RefusedError, match="another daemon of this node runs") as caught, daemon_at(path):
            pass
        assert caught.value.exit_code == 12
        with daemon.client() as client:
            client.status()


def test_a_socket_that_somebody_else_answers_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(RefusedError, match="answers at"), daemon_at(path):
            pass
        assert path.is_socket()
    assert os.listdir(path.parent) == [path.name]


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(RefusedError, match="not a socket"), daemon_at(path):
        pass
    assert path.read_text() == "precious"


def test_what_a_killed_daemon_left_is_replaced(path: Path) -> None:
    program = (
        "import asyncio, sys\nfrom mirrorpair.admin import AdminServer\n"
        "async def main():\n    await AdminServer(sys.argv[1], None).start()\n    print('ready', flush=True)\n"
        "    await asyncio.Event().wait()\nasyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(RefusedError), daemon_at(path):
            pass
        process.send_signal(signal.SIGKILL)
    assert path.is_socket()
    with daemon_at(path) as daemon, daemon.client() as client:
        client.status()


def test_only_one_of_many_that_start_at_once_wins(path: Path) -> None:
    import asyncio

    async def start_all() -> list[object]:
        servers = [AdminServer(str(path), None) for _ in range(8)]  # type: ignore[arg-type]
        results = await asyncio.gather(*(server.start() for server in servers), return_exceptions=True)
        for server in servers:
            await server.close()
        return [type(result) for result in results]

    kinds = asyncio.run(start_all())
    assert kinds.count(type(None)) == 1
    assert kinds.count(RefusedError) == 7
    assert os.listdir(path.parent) == []


def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="longer than 107 bytes"), daemon_at(tmp_path / ("x" * 120)):
        pass
    with pytest.raises(LocalError, match="longer than 107 bytes"):
        AdminClient("/" + "x" * 120)
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="cannot be made: "), daemon_at(tmp_path / "file" / "c.sock"):
        pass


def test_nothing_stays_open(path: Path, open_descriptors: Callable[[], set[int]]) -> None:
    before = open_descriptors()
    with daemon_at(path) as daemon, daemon.client() as client, raw(daemon) as sock:
        client.status()
        sock.sendall(b"rubbish\n")
        with pytest.raises(RefusedError), daemon_at(path):
            pass
    assert open_descriptors() == before


# --- the client's side


def test_no_daemon_is_11(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="no daemon answers at"):
        AdminClient(str(tmp_path / "none.sock"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(UnreachableError, match="no daemon answers at"):
        AdminClient(str(tmp_path / "dead.sock"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError):
        AdminClient(str(tmp_path / "file"))


def test_a_daemon_that_ends_while_a_command_waits_is_11(daemon: Daemon) -> None:
    with daemon.client() as client:
        thread, results = in_thread(lambda: client.wait_for("secondary"))
        daemon.until(lambda: bool(daemon.node.calls))
        daemon.close_server()
        thread.join(LIMIT_S)
    assert isinstance(results[0], UnreachableError)
    assert "ended before it answered" in str(results[0])


@contextlib.contextmanager
def fake_daemon(path: Path, answer: bytes, *, then_close: bool = True) -> Iterator[str]:
    """Accepts one client and says `answer`, whatever is asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        done = threading.Event()

        def serve() -> None:
            with listener.accept()[0] as sock, contextlib.suppress(OSError):
                sock.sendall(answer)
                if not then_close:
                    done.wait(LIMIT_S)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            done.set()
            thread.join(LIMIT_S)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", UnreachableError),
        (b'{"ok":', UnreachableError),
        (b"rubbish\n", PeerProtocolError),
        (b"{}\n", PeerProtocolError),
        (b"[]\n", PeerProtocolError),
        (b'{"ok":{"pair":7}}\n', PeerProtocolError),
        (b'{"ok":null}\n', PeerProtocolError),
        (b'{"error":{"code":0,"message":"fine"}}\n', PeerProtocolError),
        (b'{"progress":{}}\n', PeerProtocolError),
        (b"\xff\n", PeerProtocolError),
        (b"x" * (MAX_ANSWER + (1 << 20)), PeerProtocolError),
    ],
)
def test_whatever_answers_a_command_gets_a_sentence(tmp_path: Path, answer: bytes, kind: type[MirrorpairError]) -> None:
    with fake_daemon(tmp_path / "c", answer) as path, AdminClient(path) as client, pytest.raises(kind):
        client.status()


def test_a_daemon_that_says_nothing_is_13(tmp_path: Path) -> None:
    with (
        fake_daemon(tmp_path / "c", b"", then_close=False) as path,
        AdminClient(path, patience_s=0.05) as client,
        pytest.raises(PeerTimeoutError, match=r"said nothing for 0\.05 s"),
    ):
        client.status()


def test_a_daemon_that_accepts_nobody_is_13(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:  # until the queue is full
                filler = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                filler.setblocking(False)
                filler.connect(path)
        with pytest.raises(PeerTimeoutError):
            AdminClient(path, patience_s=0.05)


def test_an_answer_may_come_in_pieces(tmp_path: Path, rng: random.Random) -> None:
    text = msgspec.json.encode({"ok": judge(resyncing())}) + b"\n"
    left, right = socket.socketpair()
    with left, right:
        client = AdminClient.__new__(AdminClient)
        client._path, client._patience_s, client._received, client._socket = "", LIMIT_S, bytearray(), left

        def send() -> None:
            rest = text
            while rest:
                piece = rng.randrange(1, 50)
                right.sendall(rest[:piece])
                rest = rest[piece:]

        thread = threading.Thread(target=send)
        thread.start()
        assert client.status() == judge(resyncing())
        thread.join(LIMIT_S)
