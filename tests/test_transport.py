"""The way to a far end: the argv of ssh, every way it can fail, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from farside import FAR_COMMAND, LIMIT_S, alive, children, fake_ssh, held_port, peer, run_cli, write_script

from mirrorpair import _core, transport
from mirrorpair.endpoint import SshEndpoint, TcpEndpoint
from mirrorpair.errors import (
    MirrorpairError,
    NotAllowedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    UnreachableError,
    UsageError,
)
from mirrorpair.messages import Failure, Hello, Welcome, decode_hello, encode
from mirrorpair.remote import FarImage, open_far
from mirrorpair.transport import PIPE_BYTES, CommandConnection, connect, remote_argv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import MakeImage

HOST = SshEndpoint(host="host", path="/srv/a.img")


@pytest.fixture(autouse=True)
def nothing_left_behind(open_descriptors: Callable[[], set[int]]) -> Iterator[None]:
    """Each test of this file leaves no child, no zombie and no descriptor."""
    before, fds = children(), open_descriptors()
    yield
    assert children() == before
    assert open_descriptors() == fds


def open_by(rsh: str, *, timeout: float = 20.0) -> FarImage:
    return open_far(
        HOST,
        "source",
        write=False,
        size=None,
        create=False,
        resize=False,
        timeout=timeout,
        rsh=rsh,
        remote_command=None,
    )


def open_at(port: int, *, size: int | None = None, timeout: float = 20.0) -> FarImage:
    return open_far(
        TcpEndpoint(host="127.0.0.1", port=port, path="/srv/a.img"),
        "source" if size is None else "target",
        write=size is not None,
        size=size,
        create=False,
        resize=False,
        timeout=timeout,
        rsh=None,
        remote_command=None,
    )


@pytest.mark.parametrize(
    ("endpoint", "rsh", "remote_command", "argv"),
    [
        (HOST, None, None, ["ssh", "--", "host", "mirrorpair", "serve", "--stdio"]),
        (
            SshEndpoint(host="::1", path="/a", user="me", port=2222),
            None,
            None,
            ["ssh", "-p", "2222", "--", "me@::1", "mirrorpair", "serve", "--stdio"],
        ),
        (HOST, None, "/opt/bin/mirrorpair", ["ssh", "--", "host", "/opt/bin/mirrorpair", "serve", "--stdio"]),
        (HOST, "my ssh -i 'a key'", None, ["my", "ssh", "-i", "a key", "host", "mirrorpair", "serve", "--stdio"]),
        (
            SshEndpoint(host="host", path="/a", user="me"),
            "nsenter -t 1",
            "mp",
            ["nsenter", "-t", "1", "me@host", "mp", "serve", "--stdio"],
        ),
    ],
)
def test_the_command_is_exactly_that_of_the_contract(
    endpoint: SshEndpoint, rsh: str | None, remote_command: str | None, argv: list[str]
) -> None:
    assert remote_argv(endpoint, rsh=rsh, remote_command=remote_command) == argv


def test_the_path_is_never_in_the_command() -> None:
    assert not any("$(id)" in word for word in remote_argv(SshEndpoint(host="host", path="/$(id)")))


@pytest.mark.parametrize(
    ("rsh", "remote_command"), [("", None), ("  ", None), ("'open", None), (None, ""), (None, " ")]
)
def test_a_command_that_is_no_command_is_a_usage_error(rsh: str | None, remote_command: str | None) -> None:
    with pytest.raises(UsageError):
        remote_argv(HOST, rsh=rsh, remote_command=remote_command)


def test_a_port_that_rsh_cannot_be_told_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert remote_argv(SshEndpoint(host="host", path="/a", port=7), rsh="my-ssh")[0] == "my-ssh"
    assert "not passed on" in caplog.text


# --- TCP


def test_a_closed_port_is_unreachable(closed_port: int) -> None:
    with pytest.raises(UnreachableError, match="refused") as caught:
        open_at(closed_port)
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".example", ".."])
def test_an_unknown_host_is_unreachable(host: str) -> None:
    with pytest.raises(UnreachableError, match=r"unknown host|cannot connect"):
        connect(TcpEndpoint(host=host, port=9, path="/a"), session=1, timeout=5)


def test_a_host_that_does_not_answer_is_unreachable_in_time() -> None:
    # A listener whose queue is full takes no further connection: the kernel drops the attempt in silence.
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(listener.getsockname())
        with pytest.raises(UnreachableError, match=r"no connection within 0\.3 s"):
            open_at(listener.getsockname()[1], timeout=0.3)


def test_a_server_that_hangs_up_at_once_died() -> None:
    with peer(lambda _channel, _socket: None) as port, pytest.raises(PeerProtocolError, match="closed the connection"):
        open_at(port)


def test_a_server_that_says_nothing_is_silent() -> None:
    def talk(channel: _core.Channel, _socket: socket.socket) -> None:
        channel.recv(20)
        with contextlib.suppress(EOFError):
            channel.recv(20)

    with peer(talk) as port, pytest.raises(PeerTimeoutError, match=r"no answer within 0\.3 s"):
        open_at(port, timeout=0.3)


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x1b[2J\x07" * 20,
        bytes(200),
        b"MPR1" + bytes(100),
    ],
)
def test_another_service_is_garbage_and_its_words_are_shown_harmlessly(garbage: bytes) -> None:
    def talk(_channel: _core.Channel, connection: socket.socket) -> None:
        connection.settimeout(20)  # the channel made it non-blocking
        connection.sendall(garbage)
        while connection.recv(65536):
            pass

    with peer(talk) as port, pytest.raises(PeerProtocolError, match="does not speak") as caught:
        open_at(port)
    assert str(caught.value).isprintable()
    if garbage.startswith(b"SSH"):
        assert "SSH-2.0-OpenSSH_9.2" in str(caught.value)


def answer(kind: int, payload: bytes) -> Callable[[_core.Channel, socket.socket], None]:
    def talk(channel: _core.Channel, _socket: socket.socket) -> None:
        assert channel.recv(20)[0] == _core.FRAME_HELLO
        channel.send(kind, payload, 20)
        with contextlib.suppress(EOFError, ConnectionError):
            channel.recv(20)

    return talk


@pytest.mark.parametrize(
    ("told", "kind", "code"),
    [
        (12, PeerError, 12),
        (2, PeerError, 2),
        (1, PeerError, 1),
        (14, NotAllowedError, 14),
        (130, PeerError, 1),
        (77, PeerError, 1),
    ],
)
def test_a_far_ends_refusal_keeps_its_code_if_the_contract_knows_it(
    told: int, kind: type[MirrorpairError], code: int
) -> None:
    talk = answer(_core.FRAME_ERROR, encode(Failure(code=told, message="no\x1b[2J")))
    with peer(talk) as port, pytest.raises(kind, match=r"no\\x1b") as caught:
        open_at(port)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("kind", "payload", "reason"),
    [
        (_core.FRAME_START, b"{}", "frame of kind"),
        (_core.FRAME_WELCOME, b"{}", "not valid"),
        (_core.FRAME_ERROR, b"oops", "not valid"),
        (_core.FRAME_ERROR, b'{"code":0,"message":"fine"}', "not valid"),
        (_core.FRAME_WELCOME, encode(Welcome(protocol=9, version="9", size=1, kind="file")), "same version"),
    ],
)
def test_a_wrong_answer_is_a_protocol_error(kind: int, payload: bytes, reason: str) -> None:
    with peer(answer(kind, payload)) as port, pytest.raises(PeerProtocolError, match=reason):
        open_at(port)


@pytest.mark.parametrize(
    ("kind", "size", "good"),
    [("file", 4096, True), ("file", 4095, False), ("file", 8192, False), ("device", 8192, True), ("device", 1, False)],
)
def test_a_target_of_another_size_is_not_trusted(kind: str, size: int, good: bool) -> None:
    welcome = Welcome(protocol=1, version="0.1.0", size=size, kind="file" if kind == "file" else "device")
    with peer(answer(_core.FRAME_WELCOME, encode(welcome))) as port:
        if good:
            open_at(port, size=4096).close()
        else:
            with pytest.raises(PeerProtocolError, match="opened a target of"):
                open_at(port, size=4096)


def test_the_hello_says_what_was_asked() -> None:
    heard: list[Hello] = []

    def talk(channel: _core.Channel, _socket: socket.socket) -> None:
        heard.append(decode_hello(channel.recv(20)[1]))
        channel.send(_core.FRAME_WELCOME, encode(Welcome(protocol=1, version="x", size=7, kind="file")), 20)
        with contextlib.suppress(EOFError):
            channel.recv(20)

    with peer(talk) as port, open_at(port) as far:
        assert (far.size, far.kind) == (7, "file")
    assert (heard[0].path, heard[0].role, heard[0].write, heard[0].size) == ("/srv/a.img", "source", False, None)


# --- commands in ssh's place


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'ssh: connect to host: No route' >&2; exit 255", "status 255: ssh: connect to host: No route"),
        ("echo 'sh: mirrorpair: not found' >&2; exit 127", "127: sh: mirrorpair: not found; is mirrorpair installed"),
        ("exit 0", "status 0"),
        ("printf hi; exit 3", "status 3"),
        ("kill -9 $$", "SIGKILL"),
        (r"printf 'red \033[31m\n' >&2; exit 1", r"red \\x1b\[31m"),
    ],
)
def test_a_command_that_ends_before_it_spoke_is_unreachable(tmp_path: Path, script: str, reason: str) -> None:
    with pytest.raises(UnreachableError, match=reason) as caught:
        open_by(str(write_script(tmp_path / "rsh", script)))
    assert str(caught.value).isprintable()


def test_a_command_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match="cannot start /nowhere/ssh: No such file"):
        open_by("/nowhere/ssh")


def test_a_login_script_that_prints_is_named_as_the_cause(tmp_path: Path) -> None:
    script = write_script(tmp_path / "rsh", "echo Welcome to host; cat >/dev/null")
    with pytest.raises(PeerProtocolError, match=r"Welcome to host.*login script"):
        open_by(str(script))


def test_what_the_command_says_on_stderr_reaches_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = write_script(tmp_path / "rsh", "echo one >&2; echo two >&2; exit 255")
    with pytest.raises(UnreachableError, match="one / two"):
        open_by(str(script))
    assert capfd.readouterr().err == "one\ntwo\n"


def test_a_silent_command_is_given_up_and_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = write_script(tmp_path / "rsh", f"echo $$ > {pid_file}; exec cat 3>&1 >/dev/null")
    with pytest.raises(PeerTimeoutError):
        open_by(str(script), timeout=0.5)
    assert not alive(int(pid_file.read_text()))


def test_a_command_that_ignores_everything_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "EXIT_GRACE_S", 0.1)
    monkeypatch.setattr(transport, "TERM_GRACE_S", 0.1)
    program = (
        "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'!'); "
        "signal.sigwait([signal.SIGUSR1])"
    )
    with CommandConnection("far", [sys.executable, "-c", program], 1) as connection:
        said = connection._from_far
        assert select.select([said], [], [], LIMIT_S)[0]
        assert os.read(said.fileno(), 2) == b"!"  # from here on SIGTERM does nothing to it
        pid = connection.pid
    assert not alive(pid)


def test_a_background_process_that_holds_stderr_open_delays_nothing(tmp_path: Path) -> None:
    # As ssh's ControlPersist master does.
    pid_file = tmp_path / "pid"
    script = write_script(tmp_path / "rsh", f"sleep 600 >/dev/null </dev/null &\necho $! > {pid_file}\nexit 255")
    try:
        with pytest.raises(UnreachableError, match="status 255"):
            open_by(str(script))
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_pipes_to_a_command_are_enlarged() -> None:
    connection = CommandConnection("far", ["cat"], 1)
    try:
        process = connection._process
        assert process.stdin is not None
        assert process.stdout is not None
        most = max(PIPE_BYTES // 4, min(PIPE_BYTES, int(Path("/proc/sys/fs/pipe-max-size").read_text())))
        for pipe in (process.stdin, process.stdout):
            assert fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) in (PIPE_BYTES // 4, most)
    finally:
        connection.close()


def test_a_far_end_through_a_script_opens_the_image(tmp_path: Path, make_image: MakeImage) -> None:
    image = make_image("a.img", 12345)
    endpoint = SshEndpoint(host="host", path=str(image))
    with open_far(
        endpoint,
        "source",
        write=False,
        size=None,
        create=False,
        resize=False,
        timeout=20,
        rsh=str(fake_ssh(tmp_path)),
        remote_command=None,
    ) as far:
        assert far.size == 12345


def test_a_local_start_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transport, "enlarge_pipe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_by(str(write_script(tmp_path / "rsh", "cat >/dev/null")))


# --- a real sshd

SSHD_LOG = "sshd.log"
OWN_RUN = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
OWN_RUN += ('mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec "$0" "$@"',)


@pytest.fixture
def sshd(tmp_path: Path, need_tool: Callable[[str], str]) -> Iterator[Path]:
    """A real sshd of our own on loopback; yields a folder with an `ssh` that reaches it as host `loop`, by the default
    command line."""
    server, keygen, client = need_tool("sshd"), need_tool("ssh-keygen"), need_tool("ssh")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    folder = tmp_path / "bin"
    folder.mkdir()
    # sshd gives a login the account's own PATH: the far mirrorpair is named in full.
    write_script(folder / "far-mirrorpair", FAR_COMMAND)
    with contextlib.ExitStack() as stack:
        port, process = _start_sshd(server, tmp_path)
        stack.callback(process.wait)
        stack.callback(process.kill)
        (tmp_path / "client").write_text(
            f"Host loop\n HostName 127.0.0.1\n Port {port}\n IdentityFile {tmp_path}/user\n IdentitiesOnly yes\n"
            f" StrictHostKeyChecking no\n UserKnownHostsFile {tmp_path}/known\n LogLevel ERROR\n BatchMode yes\n"
        )
        write_script(folder / "ssh", f'exec {client} -F {tmp_path}/client "$@"')
        yield folder


def _start_sshd(server: str, folder: Path) -> tuple[int, subprocess.Popen[bytes]]:
    with held_port() as port:
        (folder / "config").write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
            f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
            f"PrintMotd no\nLogLevel VERBOSE\n"
        )
        command = [server, "-D", "-e", "-f", str(folder / "config")]
        if os.geteuid() == 0:
            # As root it wants an empty /run/sshd, which the service's start script makes: here in a /run of its own.
            command = [*OWN_RUN, *command]
        with (folder / SSHD_LOG).open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        while process.poll() is None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 10):
                return port, process
    pytest.skip(f"sshd does not run here: {(folder / SSHD_LOG).read_text()}")


def test_a_resync_through_a_real_sshd(tmp_path: Path, sshd: Path, make_image: MakeImage) -> None:
    source = make_image("a.img", 300_000, {0: b"abc", 200_000: b"x" * 10_000})
    path = f"{sshd}{os.pathsep}{os.environ['PATH']}"
    remote = f"ssh://loop{tmp_path}/b.img"
    done = run_cli("resync", source, remote, "--remote-command", sshd / "far-mirrorpair", PATH=path)
    assert done.returncode == 0, done.stderr + (tmp_path / SSHD_LOG).read_text()
    assert (tmp_path / "b.img").read_bytes() == source.read_bytes()
    back = run_cli("resync", remote, tmp_path / "c.img", "--remote-command", sshd / "far-mirrorpair", PATH=path)
    assert back.returncode == 0, back.stderr + (tmp_path / SSHD_LOG).read_text()
    assert (tmp_path / "c.img").read_bytes() == source.read_bytes()


def test_a_missing_far_command_through_a_real_sshd(tmp_path: Path, sshd: Path, make_image: MakeImage) -> None:
    path = f"{sshd}{os.pathsep}{os.environ['PATH']}"
    done = run_cli(
        "verify", make_image("a.img", 4096), f"ssh://loop{tmp_path}/b", "--remote-command", "no-mp", PATH=path
    )
    assert done.returncode == 11
    assert "--remote-command" in done.stderr
