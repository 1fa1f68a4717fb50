"""The far end: what it lets clients open, and that no client can stop another or the shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from farside import (
    FAR_COMMAND,
    LIMIT_S,
    MIRRORPAIR,
    Server,
    environment,
    fake_ssh,
    run_cli,
    running,
    serving,
    write_script,
)

from mirrorpair import _core, compare, resync
from mirrorpair.allow import Allowed, Anything
from mirrorpair.errors import LocalError, MirrorpairError, NotAllowedError, PeerError, RefusedError, UsageError
from mirrorpair.listener import LINES_PER_S, LineLimit, Listener
from mirrorpair.messages import Hello, Start, decode_failure, decode_welcome, encode

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeImage

SIZE = 300_001


def hello(
    path: object,
    *,
    role: str = "source",
    write: bool = False,
    size: int | None = None,
    create: bool = False,
    resize: bool = False,
) -> bytes:
    return encode(
        Hello(
            version="test",
            role="source" if role == "source" else "target",
            path=str(path),
            write=write,
            size=size,
            create=create,
            resize=resize,
        )
    )


def ask(server: Server, payload: bytes) -> tuple[int, bytes]:
    """What the server answers to a hello."""
    with server.connect() as connection:
        channel = _core.Channel(connection.fileno(), connection.fileno(), 7)
        channel.send(_core.FRAME_HELLO, payload, LIMIT_S)
        return channel.recv(LIMIT_S)


def refusal(server: Server, payload: bytes) -> tuple[int, str]:
    kind, answer = ask(server, payload)
    assert kind == _core.FRAME_ERROR
    failure = decode_failure(answer)
    return failure.code, failure.message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An allowed folder with an image, and things around it that are not allowed."""
    allowed = tmp_path / "img"
    (allowed / "sub").mkdir(parents=True)
    (tmp_path / "imgX").mkdir()
    for path in (allowed / "a.img", allowed / "sub" / "b.img", tmp_path / "imgX" / "c.img", tmp_path / "out.img"):
        path.write_bytes(os.urandom(SIZE))
    (allowed / "inside").symlink_to("sub/b.img")
    (allowed / "outside").symlink_to("../out.img")
    (allowed / "outside-absolute").symlink_to(tmp_path / "out.img")
    (allowed / "outside-missing").symlink_to("../missing.img")
    (allowed / "folder-out").symlink_to("../imgX")
    (allowed / "dangling").symlink_to("nothing-here")
    os.mkfifo(allowed / "fifo")
    return allowed


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving("--allow", folder) as server:
        yield server


# --- what is allowed


@pytest.mark.parametrize("name", ["a.img", "sub/b.img", "./a.img", "sub//b.img", "inside"])
def test_what_lies_beneath_an_allowed_folder_is_served(server: Server, folder: Path, name: str) -> None:
    kind, answer = ask(server, hello(f"{folder}/{name}"))
    assert kind == _core.FRAME_WELCOME
    assert decode_welcome(answer).size == SIZE


@pytest.mark.parametrize(
    "name",
    [
        "../out.img",
        "sub/../a.img",
        "../img/a.img",
        "..",
        "../imgX/c.img",
        "../missing.img",
        "outside",
        "outside-absolute",
        "outside-missing",
        "folder-out/c.img",
        "folder-out/missing",
        "/../out.img",
    ],
)
def test_what_leads_out_is_refused_with_one_and_the_same_text(server: Server, folder: Path, name: str) -> None:
    told = refusal(server, hello(f"{folder}/{name}"))
    assert told == refusal(server, hello("/etc/passwd"))
    assert told == refusal(server, hello("/no/such/thing"))
    assert told[0] == 14
    assert str(folder.parent) not in told[1]


@pytest.mark.parametrize("path", ["{}X/c.img", "{}X", "{}.img", "/", "/proc/self/mem", "/dev/null"])
def test_a_prefix_of_the_text_is_no_prefix_of_the_path(server: Server, folder: Path, path: str) -> None:
    assert refusal(server, hello(path.format(folder)))[0] == 14


@pytest.mark.parametrize(
    ("name", "code"), [("missing.img", 2), ("sub", 2), ("", 2), ("fifo", 2), ("a.img/x", 2), ("dangling", 2)]
)
def test_what_is_no_image_beneath_the_folder_is_told_as_it_is(
    server: Server, folder: Path, name: str, code: int
) -> None:
    assert refusal(server, hello(f"{folder}/{name}"))[0] == code


@pytest.mark.parametrize(
    "name", ["../made.img", "outside", "outside-missing", "folder-out/made.img", "folder-out/c.img"]
)
def test_nothing_is_written_or_made_outside(server: Server, folder: Path, tmp_path: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "out.img", tmp_path / "imgX" / "c.img")}
    asked = hello(f"{folder}/{name}", role="target", write=True, size=SIZE, create=True, resize=True)
    assert refusal(server, asked)[0] == 14
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["img", "imgX", "out.img"]
    assert [path.name for path in (tmp_path / "imgX").iterdir()] == ["c.img"]


def test_a_dangling_link_is_not_written_through(server: Server, folder: Path) -> None:
    asked = hello(f"{folder}/dangling", role="target", write=True, size=SIZE, create=True)
    assert refusal(server, asked)[0] in (2, 12)
    assert not (folder / "nothing-here").exists()


def test_an_allowed_file_is_served_and_its_neighbours_are_not(folder: Path) -> None:
    with serving("--allow", folder / "a.img") as server:
        assert ask(server, hello(folder / "a.img"))[0] == _core.FRAME_WELCOME
        for path in (folder / "inside", folder, folder / "sub" / "b.img", folder / "a.img" / "x"):
            assert refusal(server, hello(path))[0] == 14


def test_an_allowed_file_may_be_a_link_and_may_be_made_later(folder: Path, tmp_path: Path) -> None:
    with serving("--allow", folder / "outside", "--allow", tmp_path / "later.img") as server:
        assert ask(server, hello(folder / "outside"))[0] == _core.FRAME_WELCOME
        assert refusal(server, hello(tmp_path / "later.img"))[0] == 2
        result = resync(folder / "a.img", server.url(tmp_path / "later.img"))
        assert result.created
    assert (tmp_path / "later.img").read_bytes() == (folder / "a.img").read_bytes()


def test_a_link_put_in_an_allowed_files_place_is_not_followed(folder: Path) -> None:
    with serving("--allow", folder / "a.img") as server:
        (folder / "a.img").unlink()
        (folder / "a.img").symlink_to("sub/b.img")
        assert refusal(server, hello(folder / "a.img"))[0] in (2, 14)


def test_a_folder_that_was_moved_away_is_still_the_allowed_one(folder: Path, tmp_path: Path) -> None:
    with serving("--allow", folder) as server:
        folder.rename(tmp_path / "moved")
        (tmp_path / "imgX").rename(folder)  # another folder under the allowed name
        assert refusal(server, hello(folder / "c.img"))[0] == 2
        assert ask(server, hello(folder / "a.img"))[0] == _core.FRAME_WELCOME


def test_read_only_serves_reading_and_refuses_writing(folder: Path) -> None:
    with serving("--allow", folder, "--read-only") as server:
        before = (folder / "a.img").read_bytes()
        asked = hello(folder / "a.img", role="target", write=True, size=SIZE)
        code, text = refusal(server, asked)
        assert code == 14
        assert "read-only" in text
        assert refusal(server, hello("/etc/passwd", role="target", write=True, size=1)) == refusal(server, hello("/x"))
        assert compare(folder / "sub" / "b.img", server.url(folder / "a.img")).equal is False
        assert resync(folder / "sub" / "b.img", server.url(folder / "a.img"), dry_run=True).differing_bytes > 0
        with pytest.raises(NotAllowedError):
            resync(folder / "sub" / "b.img", server.url(folder / "a.img"))
        assert (folder / "a.img").read_bytes() == before


def test_allow_needs_an_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--allow"):
        Allowed([str(tmp_path / "no" / "such.img")])
    with pytest.raises(UsageError, match="--allow"):
        Allowed([""])


def test_the_opener_opens_nothing_but_what_was_granted(folder: Path) -> None:
    with Allowed([str(folder)]) as allowed:
        opener = allowed.grant(f"{folder}/a.img", write=False)
        os.close(opener(f"{folder}/a.img", os.O_RDONLY, 0))
        os.close(opener(str(folder), os.O_RDONLY | os.O_DIRECTORY, 0))
        for path, flags in (
            (f"{folder}/sub/b.img", os.O_RDONLY),
            (str(folder), os.O_RDONLY),
            ("/etc/passwd", os.O_RDONLY),
        ):
            with pytest.raises(NotAllowedError):
                opener(path, flags, 0)


def test_without_allow_stdio_serves_what_the_account_may() -> None:
    assert Anything().grant("/etc/passwd", write=True) is None
    with pytest.raises(NotAllowedError):
        Anything(read_only=True).grant("/etc/passwd", write=True)


# --- sessions


def test_both_directions_and_a_comparison(server: Server, folder: Path, tmp_path: Path) -> None:
    made = resync(folder / "a.img", server.url(folder / "new.img"))
    assert (made.created, made.written_bytes) == (True, SIZE)
    assert (folder / "new.img").read_bytes() == (folder / "a.img").read_bytes()
    fetched = resync(server.url(folder / "sub" / "b.img"), tmp_path / "out.img")
    assert fetched.differing_bytes > 0
    assert (tmp_path / "out.img").read_bytes() == (folder / "sub" / "b.img").read_bytes()
    assert compare(tmp_path / "out.img", server.url(folder / "sub" / "b.img")).equal
    result = compare(server.url(folder / "a.img"), folder / "sub" / "b.img")
    assert result.equal is False
    assert result.ranges == [(0, SIZE)]


def test_a_client_that_leaves_before_the_start_has_made_nothing(server: Server, folder: Path) -> None:
    asked = hello(folder / "new.img", role="target", write=True, size=SIZE, create=True)
    kind, answer = ask(server, asked)
    assert kind == _core.FRAME_WELCOME
    assert decode_welcome(answer).created
    server.err.wait_for("left before the start")
    assert not (folder / "new.img").exists()


def test_a_client_that_leaves_before_the_start_has_cut_nothing(server: Server, folder: Path) -> None:
    before = (folder / "a.img").read_bytes()
    asked = hello(folder / "a.img", role="target", write=True, size=10, resize=True)
    kind, answer = ask(server, asked)
    assert kind == _core.FRAME_WELCOME
    assert (decode_welcome(answer).size, decode_welcome(answer).before) == (10, SIZE)
    server.err.wait_for("left before the start")
    assert (folder / "a.img").read_bytes() == before


def test_a_resize_that_is_not_possible_is_told(server: Server, folder: Path) -> None:
    too_large = 2**63 - 1  # more than any file system's largest file
    with server.connect() as connection:
        channel = _core.Channel(connection.fileno(), connection.fileno(), 7)
        asked = hello(folder / "a.img", role="target", write=True, size=too_large, resize=True)
        channel.send(_core.FRAME_HELLO, asked, LIMIT_S)
        kind, _ = channel.recv(LIMIT_S)
        if kind == _core.FRAME_WELCOME:
            start = Start(size=too_large, block_size=65536, seed=1, timeout=5.0)
            channel.send(_core.FRAME_START, encode(start), LIMIT_S)
            kind, answer = channel.recv(LIMIT_S)
            assert decode_failure(answer).code == 1
        assert kind == _core.FRAME_ERROR
    assert (folder / "a.img").stat().st_size == SIZE


def test_a_dry_run_makes_nothing_there(server: Server, folder: Path) -> None:
    result = resync(folder / "a.img", server.url(folder / "new.img"), dry_run=True)
    assert result.created
    assert result.differing_bytes == SIZE
    assert not (folder / "new.img").exists()


def test_a_target_that_another_session_holds_is_refused(server: Server, folder: Path) -> None:
    asked = hello(folder / "a.img", role="target", write=True, size=SIZE)
    with server.connect() as connection:
        channel = _core.Channel(connection.fileno(), connection.fileno(), 7)
        channel.send(_core.FRAME_HELLO, asked, LIMIT_S)
        assert channel.recv(LIMIT_S)[0] == _core.FRAME_WELCOME
        assert refusal(server, asked)[0] == 12


@pytest.mark.parametrize(
    ("size", "options", "code"), [(SIZE - 1, {}, 12), (SIZE + 1, {"create": True}, 12), (SIZE, {}, None)]
)
def test_a_target_of_another_size_is_refused(
    server: Server, folder: Path, size: int, options: dict[str, bool], code: int | None
) -> None:
    kind, answer = ask(server, hello(folder / "a.img", role="target", write=True, size=size, **options))
    assert (decode_failure(answer).code if kind == _core.FRAME_ERROR else None) == code


def test_another_version_is_told_so(server: Server, folder: Path) -> None:
    asked = encode(Hello(version="9.9", protocol=(2, 5), role="source", path=f"{folder}/a.img", write=False))
    code, text = refusal(server, asked)
    assert code == 1
    assert "same version" in text


@pytest.mark.parametrize(
    "start",
    [
        Start(size=SIZE + 1, block_size=65536, seed=1, timeout=5.0),
        Start(size=SIZE - 1, block_size=65536, seed=1, timeout=5.0),
    ],
)
def test_a_start_that_does_not_fit_the_hello_is_refused(server: Server, folder: Path, start: Start) -> None:
    before = (folder / "a.img").read_bytes()
    with server.connect() as connection:
        channel = _core.Channel(connection.fileno(), connection.fileno(), 7)
        channel.send(_core.FRAME_HELLO, hello(folder / "a.img", role="target", write=True, size=SIZE), LIMIT_S)
        assert channel.recv(LIMIT_S)[0] == _core.FRAME_WELCOME
        channel.send(_core.FRAME_START, encode(start), LIMIT_S)
        kind, answer = channel.recv(LIMIT_S)
    assert kind == _core.FRAME_ERROR
    assert decode_failure(answer).code == 1
    assert (folder / "a.img").read_bytes() == before


def test_a_session_is_one_line_in_the_log(server: Server, folder: Path) -> None:
    compare(folder / "a.img", server.url(folder / "a.img"))
    line = server.err.wait_for("127.0.0.1").string
    assert "reads" in line
    assert str(folder / "a.img") in line
    assert "ok" in line


def test_a_path_cannot_forge_log_lines(server: Server, folder: Path) -> None:
    refusal(server, hello(f"{folder}/x\n2026-01-01 forged"))
    assert "\\x0a2026-01-01 forged" in server.err.wait_for("forged").string


# --- clients that misbehave


def good(server: Server, folder: Path) -> None:
    assert compare(folder / "a.img", server.url(folder / "a.img"), timeout=10).equal


def test_more_than_a_hundred_idle_connections_keep_nobody_out(server: Server, folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(130):
            stack.enter_context(server.connect())
        good(server, folder)
        good(server, folder)
    good(server, folder)


def test_idle_connections_are_closed_at_the_deadline(folder: Path) -> None:
    lines: list[str] = []
    with (
        Allowed([str(folder)]) as access,
        Listener("127.0.0.1", 0, access, log=lines.append, negotiate_s=0.2) as listener,
        _served(listener),
        socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2])), LIMIT_S) as sock,
    ):
        sock.settimeout(LIMIT_S)
        while sock.recv(65536):  # it says why, then closes
            pass
    assert any("no hello within" in line for line in lines)


@contextlib.contextmanager
def _served(listener: Listener) -> Iterator[None]:
    import threading

    thread = threading.Thread(target=listener.serve)
    thread.start()
    try:
        yield
    finally:
        listener.stop()
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_at_the_cap_a_newcomer_is_told_when_all_are_at_work(folder: Path) -> None:
    """The first session works (slowly, by its rate); with a cap of one the second is sent away."""
    lines: list[str] = []
    with (
        Allowed([str(folder)]) as access,
        Listener("127.0.0.1", 0, access, log=lines.append, cap=1) as listener,
        _served(listener),
        running(
            "resync",
            "--json",
            "--rate",
            "50KiB/s",
            f"tcp://{listener.address}{folder}/a.img",
            folder / "slow.img",
        ) as slow,
    ):
        slow.out.wait_for('"progress"')
        with pytest.raises(PeerError, match="busy") as caught:
            compare(folder / "a.img", f"tcp://{listener.address}{folder}/a.img", timeout=10)
        assert caught.value.exit_code == 11
        assert slow.end(signal.SIGINT) == 130


def test_garbage_clients_do_not_stop_a_good_one(server: Server, folder: Path, rng: random.Random) -> None:
    frames = [hello(folder / "a.img"), b"{}", b"", b"[" * 15000, b"\xff" * 100]
    for turn in range(120):
        with server.connect() as connection, contextlib.suppress(OSError):
            kind = turn % 4
            if kind == 0:
                connection.sendall(rng.randbytes(rng.randrange(1, 5000)))
            elif kind == 1:
                channel = _core.Channel(connection.fileno(), connection.fileno(), rng.getrandbits(63) + 1)
                channel.send(rng.randrange(0, 40), rng.choice(frames), LIMIT_S)
            elif kind == 2:
                connection.sendall(b"MPR1" + rng.randbytes(rng.randrange(0, 200)))
            else:
                channel = _core.Channel(connection.fileno(), connection.fileno(), 7)
                channel.send(_core.FRAME_HELLO, frames[0], LIMIT_S)
                channel.recv(LIMIT_S)
                start = Start(size=SIZE, block_size=4096, seed=1, timeout=5.0)
                channel.send(_core.FRAME_START, encode(start), LIMIT_S)
                connection.setblocking(True)
                connection.sendall(rng.randbytes(rng.randrange(0, 3000)))
            if rng.random() < 0.5:  # a reset instead of an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if turn % 40 == 0:
            good(server, folder)
    good(server, folder)
    assert server.process.poll() is None


def test_a_flood_of_bad_clients_does_not_flood_the_log() -> None:
    now = [0.0]
    lines: list[str] = []
    limit = LineLimit(lines.append, clock=lambda: now[0])
    for number in range(1000):
        limit.line(f"bad {number}")
    assert len(lines) == LINES_PER_S
    now[0] = 1.5
    limit.line("good")
    assert lines[-2:] == [f"{1000 - LINES_PER_S} more lines like these", "good"]
    limit.flush()
    assert lines[-1] == "good"


def test_sigterm_ends_it_promptly_with_sessions_open(folder: Path) -> None:
    with serving("--allow", folder) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(server.connect())
        waiting = stack.enter_context(server.connect())
        channel = _core.Channel(waiting.fileno(), waiting.fileno(), 7)
        channel.send(_core.FRAME_HELLO, hello(folder / "a.img"), LIMIT_S)
        assert channel.recv(LIMIT_S)[0] == _core.FRAME_WELCOME
        slow = stack.enter_context(
            running("resync", "--json", "--rate", "4KiB/s", server.url(folder / "a.img"), folder / "slow.img")
        )
        slow.out.wait_for('"progress"')
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0  # all of it would take longer
        assert slow.process.wait(LIMIT_S) == 1
        assert json.loads(slow.out.rest()[-1])["code"] == 1
    # What the interrupted session began, the next one completes.
    with serving("--allow", folder) as server:
        resync(server.url(folder / "a.img"), folder / "slow.img")
    assert (folder / "slow.img").read_bytes() == (folder / "a.img").read_bytes()


def test_sigint_ends_it_with_0_too(server: Server) -> None:
    assert server.end(signal.SIGINT) == 0
    assert server.err.rest() == []


# --- where it listens


@pytest.mark.parametrize("address", ["0.0.0.0:0", ":0", "[::]:0"])
def test_beyond_loopback_it_refuses_without_insecure(tmp_path: Path, address: str) -> None:
    done = run_cli("serve", "--listen", address, "--allow", tmp_path)
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert "ssh://" in done.stderr
    assert done.stdout == ""


def test_insecure_listens_everywhere(tmp_path: Path) -> None:
    with running("serve", "--listen", "0.0.0.0:0", "--insecure", "--allow", tmp_path) as program:
        program.out.wait_for(r"^listening 0\.0\.0\.0:[1-9]\d*$")
        assert program.end() == 0


def test_ipv6_is_shown_in_brackets(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with running("serve", "--listen", "[::1]:0", "--allow", tmp_path) as program:
        port = int(program.out.wait_for(r"^listening \[::1\]:(\d+)$")[1])
        image = tmp_path / "a.img"
        image.write_bytes(b"x" * 5000)
        assert compare(image, f"tcp://[::1]:{port}{image}").equal


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with serving("--allow", tmp_path) as server:
        done = run_cli("serve", "--listen", f"127.0.0.1:{server.port}", "--allow", tmp_path)
    assert done.returncode == 1
    assert "in use" in done.stderr


def test_a_listener_in_a_program_says_what_is_wrong(tmp_path: Path) -> None:
    with Allowed([str(tmp_path)]) as access:
        with pytest.raises(UsageError, match="unknown host"):
            Listener("no-such-host.invalid", 0, access, log=print)
        with pytest.raises((LocalError, UsageError)):
            Listener("192.0.2.1", 0, access, log=print, insecure=True)


# --- --stdio


def test_stdio_needs_a_peer_not_a_person() -> None:
    main, terminal = os.openpty()
    try:
        done = subprocess.run(
            [*MIRRORPAIR, "serve", "--stdio"],
            stdin=terminal,
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
    finally:
        os.close(main)
        os.close(terminal)
    assert done.returncode == 2
    assert "frames" in done.stderr


def test_stray_prints_do_not_corrupt_a_session(tmp_path: Path, make_image: MakeImage) -> None:
    """A library that prints at the wrong moment: here, whenever an image is opened."""
    program = (
        "import os, sys, mirrorpair.serve as serve, mirrorpair.cli as cli\n"
        "opened = serve.open_source\n"
        "def noisy(*a, **k):\n"
        "    print('stray', flush=True); os.write(1, b'raw'); os.system('echo child')\n"
        "    return opened(*a, **k)\n"
        "serve.open_source = noisy\n"
        "cli.main()\n"
    )
    (tmp_path / "noisy.py").write_text(program, encoding="utf-8")
    script = write_script(
        tmp_path / "rsh", FAR_COMMAND.replace("exec", "shift 2\nexec").replace("-m mirrorpair", f"{tmp_path}/noisy.py")
    )
    image = make_image("a.img", 100_000, {0: b"data"})
    done = run_cli("verify", image, f"ssh://host{make_image('b.img', 100_000, {0: b'data'})}", "--rsh", script)
    assert done.returncode == 0, done.stderr
    assert "stray" in done.stderr
    assert "child" in done.stderr


def test_stdio_can_be_restricted_like_a_listener(folder: Path, tmp_path: Path) -> None:
    script = write_script(tmp_path / "rsh", f'set -- serve --stdio --read-only --allow "{folder}"\n{FAR_COMMAND}')
    assert compare(folder / "a.img", f"ssh://host{folder}/a.img", rsh=str(script)).equal
    with pytest.raises(NotAllowedError):
        compare(folder / "a.img", f"ssh://host{tmp_path}/out.img", rsh=str(script))
    with pytest.raises(NotAllowedError):
        resync(folder / "a.img", f"ssh://host{folder}/a.img", rsh=str(script))


def test_stdio_leaves_its_descriptors_as_they_were(tmp_path: Path, make_image: MakeImage) -> None:
    """A shell that goes on after us must not find its standard output non-blocking."""
    inner = fake_ssh(tmp_path)
    program = "import os,sys; sys.stderr.write(f'blocking {os.get_blocking(0)} {os.get_blocking(1)}')"
    script = write_script(tmp_path / "outer", f'{inner} "$@"\n"{sys.executable}" -c "{program}"')
    image = make_image("a.img", 5000)
    done = run_cli("verify", image, f"ssh://host{make_image('b.img', 5000)}", "--rsh", script)
    assert done.returncode == 0
    assert "blocking True True" in done.stderr


def test_a_far_end_whose_near_end_dies_ends_too(folder: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = write_script(tmp_path / "rsh", f"echo $$ > {pid_file}\nshift 2\n{FAR_COMMAND}")
    arguments = ("resync", "--json", "--rate", "20KiB/s", "--rsh", script, f"ssh://host{folder}/a.img", tmp_path / "x")
    with running(*arguments) as near:
        near.out.wait_for('"progress"')
        near.process.kill()
        near.process.wait(LIMIT_S)
        far = int(pid_file.read_text())
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(far)
            import select

            ready, _, _ = select.select([fd], [], [], LIMIT_S)
            os.close(fd)
            assert ready


def test_errors_of_the_far_end_keep_their_code_here(server: Server, folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[object, object, type[MirrorpairError], int]] = [
        (server.url(folder / "missing"), tmp_path / "t", PeerError, 2),
        (server.url("/etc/passwd"), tmp_path / "t", NotAllowedError, 14),
        (folder / "a.img", server.url(tmp_path / "out.img"), NotAllowedError, 14),
        (folder / "a.img", server.url(folder / "no" / "folder"), PeerError, 2),
        (server.url(folder / "a.img"), tmp_path / "no" / "t", UsageError, 2),
    ]
    for source, target, kind, code in cases:
        with pytest.raises(kind) as caught:
            resync(str(source), str(target))
        assert caught.value.exit_code == code
    assert not (tmp_path / "t").exists()
    (tmp_path / "small").write_bytes(b"x")
    with pytest.raises(RefusedError):
        resync(server.url(folder / "a.img"), tmp_path / "small")
    assert (tmp_path / "small").read_bytes() == b"x"
