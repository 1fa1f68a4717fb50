"""Ends that die, disks that fail, images that shrink, and people who interrupt, at chosen system calls.

After each: whoever survives ends by itself, with an exit code and a sentence that say what happened, never with
"equals"; the source is as it was; nothing is left running; and the next run, undisturbed, makes the target equal.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import frames
import pytest
from farside import LIMIT_S, MIRRORPAIR, ROOT, Server, fake_ssh, serving, write_script
from relay import Damage, Relay, line
from tracing import (
    Marked,
    Stops,
    Watch,
    attached,
    command,
    fail,
    happened,
    kill,
    marked,
    marked_command,
    need_strace,
    stop,
    wait_until_gone,
    wait_until_unlocked,
)

from mirrorpair import _core, resync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import LoopDevice, Mount

KIB = 1024
MIB = KIB * KIB
PIECE = 4 * KIB
BLOCK = 64 * KIB
WINDOW = 8 * MIB
SESSION, SEED = 9, 4


@dataclass(frozen=True)
class Images:
    source: Path
    target: Path
    content: bytes

    def again(self, source: object = None, target: object = None, rsh: Path | None = None) -> None:
        """The second run. Everything is to be as if the first had never been."""
        assert self.source.read_bytes() == self.content, "the source was changed"
        wait_until_unlocked(self.target)
        resync(str(source or self.source), str(target or self.target), rsh=None if rsh is None else str(rsh))
        assert self.target.read_bytes() == self.content
        assert self.source.read_bytes() == self.content


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """Two windows: a hole of the source over data, then blocks that are equal, differ as a whole, in pieces, in the
    tail, are missing at the target, or are zero at the source. Six writes, five holes."""
    rng = random.Random(SEED)
    source = bytearray(WINDOW + 6 * BLOCK + 100)
    target = bytearray(source)
    target[40 * KIB : 44 * KIB] = rng.randbytes(PIECE)
    target[4 * MIB : 4 * MIB + 100] = rng.randbytes(100)
    for i in (0, 1, 2, 3, 5):
        at = WINDOW + i * BLOCK
        source[at : at + BLOCK] = target[at : at + BLOCK] = rng.randbytes(BLOCK)
    one, two, three, four, five = (WINDOW + i * BLOCK for i in range(1, 6))
    target[one : one + BLOCK] = rng.randbytes(BLOCK)
    for piece in (1, 5):
        target[two + piece * PIECE] ^= 1
    source[two + 9 * PIECE : two + 10 * PIECE] = bytes(PIECE)
    target[three : three + BLOCK] = bytes(BLOCK)
    target[four : four + PIECE] = target[four + 2 * PIECE : four + 3 * PIECE] = rng.randbytes(PIECE)
    target[five] ^= 1
    source[-100:], target[-100:] = rng.randbytes(100), rng.randbytes(100)
    made = Images(tmp_path / "source.img", tmp_path / "target.img", bytes(source))
    for path, image in ((made.source, source), (made.target, target)):
        with path.open("wb") as file:
            file.truncate(len(image))
            for offset in range(0, len(image), PIECE):
                page = image[offset : offset + PIECE]
                if any(page):
                    file.seek(offset)
                    file.write(page)
    return made


def told_clearly(code: int, out: str, err: str, *codes: int) -> None:
    assert code in codes, (code, out, err)
    sentences = [text for text in err.splitlines() if text.startswith("mirrorpair: ")]
    assert len(sentences) == 1, err
    assert "Traceback" not in err
    assert "internal error" not in err
    assert " equals " not in out


# --- a kill at every call of either engine: the helpers themselves, joined by a socket or by pipes


class End:
    """One end of a connection: the descriptors in and out, until an engine has taken them over."""

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self.fds = (fd_in, fd_out)
        self._open = {fd_in, fd_out}

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())


def joined(kind: str) -> tuple[End, End]:
    if kind == "socket":
        a, b = (sock.detach() for sock in socket.socketpair())
        return End(a, a), End(b, b)
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    return End(r1, w2), End(r2, w1)


class Engines:
    """Both ends of a copy, as they run behind the commands."""

    def __init__(self, source_fd: int, target_fd: int, size: int) -> None:
        self.fds = {"source": source_fd, "target": target_fd}
        self.started: dict[str, _core.Helper] = {}
        self._size = size

    def start(self, name: str, end: End) -> _core.Helper:
        begin = _core.Helper.source if name == "source" else _core.Helper.target
        channel = _core.Channel(*end.fds, SESSION)
        self.started[name] = begin(
            self.fds[name],
            channel,
            size=self._size,
            block_size=BLOCK,
            seed=SEED,
            write=True,
            threads=1,
            timeout=LIMIT_S,
        )
        end.close()  # it has its own
        return self.started[name]

    def end(self) -> dict[str, _core.Outcome]:
        for name, helper in self.started.items():
            assert any(helper.poll(1.0) for _ in range(int(LIMIT_S))), f"the {name} hangs"
        return {name: helper.outcome() for name, helper in self.started.items()}

    def close(self) -> None:
        for helper in self.started.values():
            helper.close()
        for fd in self.fds.values():
            os.close(fd)


CALLS = {
    ("target", "socket"): ("pwrite64", "fallocate", "fdatasync", "sendmsg", "recvfrom"),
    ("target", "pipe"): ("pwrite64", "writev", "read"),
    ("source", "socket"): ("sendmsg", "recvfrom"),
    ("source", "pipe"): ("writev", "read"),
}
ALLOWED = {_core.OUTCOME_OK, _core.OUTCOME_PEER_GONE, _core.OUTCOME_PEER_ERROR}


def kill_at(images: Images, log: Path, victim: str, kind: str, call: str, when: int) -> bool:
    """One run in which the victim dies at its N-th such call; False when it never made that many."""
    other = "target" if victim == "source" else "source"
    ends = joined(kind)
    source_fd, target_fd = os.open(images.source, os.O_RDONLY), os.open(images.target, os.O_RDWR)
    with (
        closing(Engines(source_fd, target_fd, len(images.content))) as engines,
        closing(ends[0]),
        closing(ends[1]),
    ):
        helper = engines.start(victim, ends[0])
        with attached(helper.pid, log, kill(call, when)):
            engines.start(other, ends[1])
            outcomes = engines.end()
    died, survivor = outcomes[victim], outcomes[other]
    where = (victim, kind, call, when, died, survivor)
    if not happened(log):
        assert died.status == survivor.status == _core.OUTCOME_OK, where
        assert images.target.read_bytes() == images.content
        return False
    assert died.status == _core.OUTCOME_KILLED, where
    assert died.errno == signal.SIGKILL, where
    assert survivor.status in ALLOWED, where
    if survivor.status == _core.OUTCOME_OK:  # then it had been told so, rightly
        assert images.target.read_bytes() == images.content, where
    return True


@pytest.mark.parametrize(("victim", "kind"), CALLS)
def test_an_engine_that_dies_at_any_call_of_its_leaves_work_that_can_be_finished(
    victim: str, kind: str, images: Images, tmp_path: Path
) -> None:
    need_strace()
    before = images.target.read_bytes()
    for call in CALLS[victim, kind]:
        when = 1
        while kill_at(images, tmp_path / "strace.log", victim, kind, call, when):
            images.again()
            images.target.write_bytes(before)
            # Reads and sends are many and alike: the first ones, then one in three.
            when += 1 if when < 4 or call in ("pwrite64", "fallocate", "fdatasync") else 3
        assert when > 1, f"{call} was never made"
        images.target.write_bytes(before)


# --- a kill behind the commands


@dataclass
class Way:
    """How the two sides are reached, and the process that is to suffer."""

    images: Images
    sides: tuple[str, str]
    options: list[str]
    prefix: list[str]
    server: Server | None
    folder: Path
    tracer: ExitStack

    def run(self) -> tuple[int, str, str]:
        with marked_command("resync", "--threads", "1", *self.options, *self.sides, prefix=self.prefix) as ran:
            result = ran.finish()
            wait_until_gone(ran.pids())  # a far end that the command started ends with it
        return result

    def again(self) -> None:
        self.tracer.close()
        if self.server is not None:
            wait_until_gone(helpers_of(self.server))
        self.images.again(*self.sides, rsh=fake_ssh(self.folder) if self.options else None)


def helpers_of(server: Server) -> set[int]:
    found: set[int] = set()
    for task in os.listdir(f"/proc/{server.process.pid}/task"):
        with open(f"/proc/{server.process.pid}/task/{task}/children", encoding="utf-8") as file:
            found |= {int(pid) for pid in file.read().split()}
    return found


@contextmanager
def way(images: Images, transport: str, direction: str, victim: str, log: Path, *rules: str) -> Iterator[Way]:
    """A command ready to run, with `rules` laid on its near or its far end."""
    folder = log.parent
    with ExitStack() as stack:
        tracer = stack.enter_context(ExitStack())
        prefix = command(log, *rules) if victim == "near" else []
        options: list[str] = []
        server = None
        url: Callable[[object], str] = str
        if transport == "tcp":
            server = stack.enter_context(serving("--allow", folder))
            url = server.url
            if victim == "far":
                tracer.enter_context(attached(server.process.pid, log, *rules))
        elif transport == "rsh":
            if victim == "far":
                words = " ".join(f"'{word}'" for word in command(log, *rules))
                python = " ".join(f"'{word}'" for word in MIRRORPAIR)
                script = write_script(
                    folder / "traced-ssh", f'shift 2\nexport PYTHONPATH="{ROOT}"\nexec {words} {python} "$@"'
                )
            else:
                script = fake_ssh(folder)
            options = ["--rsh", str(script)]
            url = ssh_url
        sides = (str(images.source), str(images.target))
        if transport != "local":
            sides = (sides[0], url(sides[1])) if direction == "push" else (url(sides[0]), sides[1])
        yield Way(images, sides, options, prefix, server, folder, tracer)


def ssh_url(path: object) -> str:
    return f"ssh://host{path}"


LOCAL = [
    ("pwrite64", 1),
    ("pwrite64", 2),
    ("pwrite64", 4),
    ("pwrite64", 6),
    ("fallocate", 1),
    ("fallocate", 3),
    ("fdatasync", 1),
]


@pytest.mark.parametrize(("call", "when"), LOCAL)
def test_a_local_resync_whose_helper_is_killed_is_finished_by_the_next(
    call: str, when: int, images: Images, tmp_path: Path
) -> None:
    with way(images, "local", "", "near", tmp_path / "strace.log", kill(call, when)) as the:
        code, out, err = the.run()
        assert happened(tmp_path / "strace.log")
        told_clearly(code, out, err, 1)
        assert "SIGKILL" in err
        the.again()


TARGET_END = [("pwrite64", 1), ("pwrite64", 4), ("fallocate", 2), ("fdatasync", 1), ("send", 3)]
SOURCE_END = [("send", 3), ("send", 4), ("receive", 4)]
NAMES = {
    "tcp": {"send": "sendmsg", "receive": "recvfrom"},
    "rsh": {"send": "writev", "receive": "read"},
}
REMOTE = [
    (transport, direction, victim, call, when)
    for transport in ("tcp", "rsh")
    for direction in ("push", "pull")
    for victim in ("near", "far")
    for call, when in (TARGET_END if (direction == "push") == (victim == "far") else SOURCE_END)
    if (transport, call) != ("rsh", "receive")  # a Python that starts reads more than that
    if transport == "tcp" or call == "send" or when == 1  # the rest of the way is the same
]


@pytest.mark.parametrize(("transport", "direction", "victim", "call", "when"), REMOTE)
def test_a_remote_resync_of_which_one_end_is_killed_is_finished_by_the_next(
    transport: str, direction: str, victim: str, call: str, when: int, images: Images, tmp_path: Path
) -> None:
    log = tmp_path / "strace.log"
    call = NAMES[transport].get(call, call)
    with way(images, transport, direction, victim, log, kill(call, when)) as the:
        code, out, err = the.run()
        assert happened(log)
        if code == 0 and call == "recvfrom":
            # How many receives bring the same frames is the kernel's affair: this one came behind the last word.
            assert images.target.read_bytes() == images.content
            return
        if code != -signal.SIGKILL:  # the command itself was the one
            told_clearly(code, out, err, 1, 11)
        if the.server is not None and the.server.process.poll() is None:
            said = the.server.err.wait_for(str(tmp_path)).string
            assert ": ok" not in said
            the.again()
        elif the.server is not None:
            images.again()
        else:
            the.again()


@pytest.mark.parametrize("transport", ["tcp", "rsh"])
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_command_that_is_killed_takes_its_helper_along_and_the_far_end_ends(
    transport: str, direction: str, slow: Images, tmp_path: Path
) -> None:
    with way(slow, transport, direction, "nobody", tmp_path / "log") as the, Watch(slow.target) as watch:
        with marked_command("resync", "--rate", "64KiB/s", *the.options, *the.sides) as ran:
            watch.wait()
            everybody = ran.pids() | (helpers_of(the.server) if the.server else set())
            assert len(everybody) >= 2
            ran.process.kill()
            wait_until_gone(everybody)
        if the.server is not None:
            assert ": ok" not in the.server.err.wait_for(str(tmp_path)).string
        the.again()


def test_a_server_that_is_killed_takes_its_helpers_along(slow: Images, tmp_path: Path) -> None:
    with way(slow, "tcp", "push", "nobody", tmp_path / "log") as the, Watch(slow.target) as watch:
        assert the.server is not None
        with marked_command("resync", "--rate", "64KiB/s", *the.sides) as ran:
            watch.wait()
            helpers = helpers_of(the.server)
            assert len(helpers) == 1
            the.server.process.kill()
            wait_until_gone(helpers)
            told_clearly(*ran.finish(), 1)
    slow.again()


# --- disks that fail


FAILURES = [
    (fail("pwrite64", "ENOSPC", 2), "No space left on device"),
    (fail("pwrite64", "EIO", 1), "Input/output error"),
    (fail("pwrite64", "EDQUOT", 3), "Disk quota exceeded"),
    (fail("fallocate", "EIO", 2), "Input/output error"),
    (fail("fallocate", "ENOSPC", 1), "No space left on device"),
    (fail("fdatasync", "EIO", 1), "Input/output error"),
    (fail("fdatasync", "ENOSPC", 1), "No space left on device"),
]


@pytest.mark.parametrize(
    ("victim", "rule", "words"),
    [
        (victim, *failure)
        for victim, failures in (("local", FAILURES), ("near", FAILURES[::3]), ("far", FAILURES[1::2]))
        for failure in failures
    ],
)
def test_a_disk_that_fails_is_named_and_never_glossed_over(
    victim: str, rule: str, words: str, images: Images, tmp_path: Path
) -> None:
    transport, direction = ("local", "") if victim == "local" else ("tcp", "pull" if victim == "near" else "push")
    end = "near" if victim == "local" else victim
    with way(images, transport, direction, end, tmp_path / "strace.log", rule) as the:
        code, out, err = the.run()
        told_clearly(code, out, err, 1)
        assert words in err
        assert images.target.name in err or "target" in err
        if the.server is not None:
            assert ": ok" not in the.server.err.wait_for(str(tmp_path)).string
    images.again()


def test_a_source_that_cannot_be_read_is_named(images: Images, tmp_path: Path) -> None:
    out_of_cache(images.source)
    log = tmp_path / "strace.log"
    with way(images, "tcp", "pull", "far", log, fail("pread64", "EIO", "1+")) as the:
        code, out, err = the.run()
        told_clearly(code, out, err, 1)
        assert "Input/output error" in err
        assert "source" in err
    images.again()


@pytest.mark.parametrize(
    "rule",
    [fail("fallocate", "EOPNOTSUPP", "1+"), fail("pwrite64", "EINTR", 2), fail("fallocate", "EINTR", 1)],
)
def test_what_a_disk_may_refuse_is_done_another_way(rule: str, images: Images, tmp_path: Path) -> None:
    with way(images, "local", "", "near", tmp_path / "strace.log", rule) as the:
        code, _, err = the.run()
        assert code == 0, err
    assert images.target.read_bytes() == images.content


@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_is_told_as_such_and_the_run_is_finished_when_there_is_room(
    kind: str,
    where: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    need_tool: Callable[[str], str],
) -> None:
    mount: Mount = request.getfixturevalue("mount")
    if kind == "ext4":
        loop: LoopDevice = request.getfixturevalue("loop_device")
        disk = tmp_path / "disk.img"
        with disk.open("wb") as file:
            file.truncate(24 * MIB)
        subprocess.run([need_tool("mkfs.ext4"), "-q", "-O", "^has_journal", str(disk)], check=True, capture_output=True)
        folder = mount(kind="ext4", device=loop(disk))
    else:
        folder = mount("size=20m")
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * MIB)
    source, target = tmp_path / "source.img", folder / "target.img"
    content = random.Random(SEED).randbytes(6 * MIB)
    source.write_bytes(content)
    images = Images(source, target, content)
    with ExitStack() as stack:
        side, server = str(target), None
        if where == "there":
            server = stack.enter_context(serving("--allow", folder))
            side = server.url(target)
        with marked_command("resync", source, side) as ran:
            code, out, err = ran.finish()
        told_clearly(code, out, err, 1)
        assert "No space left on device" in err
        filler.unlink()
        if server is not None:
            server.err.wait_for(str(folder))
        if target.exists():
            images.again(target=side)
        else:
            resync(source, side)
            assert target.read_bytes() == content


# --- images that shrink


def out_of_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def three_windows(tmp_path: Path, *, tail: int = 0) -> Images:
    """Windows full of data. All of it differs but a piece in each MiB, so that a window takes several writes."""
    size = 3 * WINDOW - tail
    block = random.Random(SEED).randbytes(64 * KIB)
    content = (block * (size // len(block) + 1))[:size]
    old = ((block[:PIECE] + b"\7" * (MIB - PIECE)) * (size // MIB + 1))[:size]
    images = Images(tmp_path / "source.img", tmp_path / "target.img", content)
    images.source.write_bytes(content)
    images.target.write_bytes(old)
    return images


def only_old_or_new(images: Images, old: bytes, cut: int) -> None:
    """What is gone from the source was not put into the target as zeros. Of the page that was cut in two nobody can
    tell while it is mapped."""
    now, new = images.target.read_bytes(), images.content
    invented = [
        at
        for at in range(0, len(new), PIECE)
        if now[at : at + PIECE] not in (old[at : at + PIECE], new[at : at + PIECE]) and at != cut // PIECE * PIECE
    ]
    assert invented == [], f"{len(invented)} pieces, the first at {invented[:3]}"


CUTS = {
    "within the window that is read": 4 * MIB,
    "within a page of it": 4 * MIB + 100,
    "between two windows": WINDOW,
    "within a later window": 2 * WINDOW + MIB,
    "within the last page": 3 * WINDOW - 3000,
    "to nothing": 0,
}


@pytest.mark.parametrize("cached", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_source_that_shrinks_while_it_is_read_is_named_and_never_taken_for_zeros(
    cut: str, cached: bool, tmp_path: Path
) -> None:
    images = three_windows(tmp_path, tail=100)
    old = images.target.read_bytes()
    if not cached:
        out_of_cache(images.source)
    with Stops() as stops:
        prefix = command(stops.log, stop("pwrite64", 1))
        with marked_command("resync", "--threads", "1", images.source, images.target, prefix=prefix) as ran:
            pid = stops.wait()  # the first MiB is written, the rest of the first window not yet read
            os.truncate(images.source, CUTS[cut])
            os.kill(pid, signal.SIGCONT)
            code, out, err = ran.finish()
    told_clearly(code, out, err, 1)
    assert str(images.source) in err
    only_old_or_new(images, old, CUTS[cut])
    images.source.write_bytes(images.content)
    images.again()


def test_a_target_that_shrinks_under_the_copy_is_an_error_too(tmp_path: Path) -> None:
    images = three_windows(tmp_path)
    with Stops() as stops:
        prefix = command(stops.log, stop("pwrite64", 1))
        with marked_command("resync", "--threads", "1", images.source, images.target, prefix=prefix) as ran:
            pid = stops.wait()
            os.truncate(images.target, 2 * MIB)
            os.kill(pid, signal.SIGCONT)
            code, out, err = ran.finish()
    told_clearly(code, out, err, 1)
    assert str(images.target) in err
    os.truncate(images.target, len(images.content))
    images.again()


@pytest.mark.parametrize("cached", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_source_that_shrinks_while_it_is_sent_is_named(direction: str, cached: bool, tmp_path: Path) -> None:
    """The line is held when the first windows have been read and the others not; then the source is cut."""
    size = 10 * WINDOW
    content = (random.Random(SEED).randbytes(4 * KIB) + bytes(MIB - 4 * KIB)) * (size // MIB)
    images = Images(tmp_path / "source.img", tmp_path / "target.img", content)
    images.source.write_bytes(content)
    with images.target.open("wb") as file:
        for _ in range(size // MIB):
            file.write(b"\7" * MIB)
    if not cached:
        out_of_cache(images.source)
    # The first WANT, after the hello and the start, or after the welcome, is not let through.
    hold = Damage("hold", 600 if direction == "pull" else 200, back=direction == "push")
    with serving("--allow", tmp_path) as server, line(server.port, hold) as wire:

        def url(path: Path) -> str:
            return f"tcp://127.0.0.1:{wire.port}{path}"

        sides = (images.source, url(images.target)) if direction == "push" else (url(images.source), images.target)
        with marked_command("resync", "--threads", "1", *sides) as ran:
            stream = wire.streams[hold.back]
            assert stream.reached.wait(LIMIT_S)
            os.truncate(images.source, 7 * WINDOW)
            stream.release.set()
            code, out, err = ran.finish()
        told_clearly(code, out, err, 1)
        assert str(images.source) in err or "source" in err
        server.err.wait_for(str(tmp_path))
    only_old_or_new(images, b"\7" * size, 7 * WINDOW)
    images.source.write_bytes(content)
    images.again()


def memory(content: bytes) -> int:
    fd = os.memfd_create("mirrorpair-test", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


@pytest.mark.parametrize("cached", [True, False], ids=["warm", "cold"])
def test_the_sending_engine_survives_a_window_that_shrinks_under_it(cached: bool, tmp_path: Path) -> None:
    """It has read as far ahead as it may. It is stopped in the next window, behind the question for holes, and that
    window is cut in its second half: the first half is enough for it to be mapped when it is cached."""
    size = 8 * WINDOW
    content = random.Random(SEED).randbytes(64 * KIB) * (size // (64 * KIB))
    source = tmp_path / "source.img"
    source.write_bytes(content)
    if not cached:
        out_of_cache(source)
    near, far = joined("socket")
    with (
        Stops() as stops,
        closing(Engines(os.open(source, os.O_RDONLY), memory(content), size)) as engines,
        closing(near),
        closing(far),
    ):
        helper = engines.start("source", near)
        assert select.select([far.fds[0]], [], [], LIMIT_S)[0]  # it is at work
        assert not helper.poll(0.5)
        with attached(helper.pid, stops.log, stop("lseek", 2)):
            engines.start("target", far)
            pid = stops.wait()
            os.truncate(source, 4 * WINDOW + 5 * MIB)
            os.kill(pid, signal.SIGCONT)
            outcomes = engines.end()
    outcome = outcomes["source"]
    assert outcome.status == _core.OUTCOME_SHRANK, outcome
    assert outcome.side == "source"
    assert 4 * WINDOW <= outcome.offset <= 5 * WINDOW
    assert outcomes["target"].status == _core.OUTCOME_PEER_ERROR, outcomes


def test_unasked_data_of_a_source_that_is_gone_does_not_become_zeros(tmp_path: Path) -> None:
    size = 8 * WINDOW
    source = tmp_path / "source.img"
    source.write_bytes(random.Random(SEED).randbytes(64 * KIB) * (size // (64 * KIB)))
    target_fd = memory(b"")
    os.ftruncate(target_fd, size)
    (near, first), (second, far) = socket.socketpair(), socket.socketpair()
    ends = [End(fd, fd) for fd in (near.detach(), far.detach())]
    with (
        Relay(first, second, Damage("hold", 6 * WINDOW)) as relay,
        closing(Engines(os.open(source, os.O_RDONLY), target_fd, size)) as engines,
        closing(ends[0]),
        closing(ends[1]),
    ):
        engines.start("source", ends[0])
        engines.start("target", ends[1])
        assert relay.forth.reached.wait(LIMIT_S)
        os.truncate(source, PIECE)
        relay.forth.release.set()
        outcomes = engines.end()
    assert frames.BULK in {frame.kind for frame in frames.parse(bytes(relay.forth.given))}
    assert outcomes["source"].status == _core.OUTCOME_SHRANK, outcomes
    assert outcomes["source"].side == "source"
    told = {_core.OUTCOME_PEER_GONE, _core.OUTCOME_PEER_ERROR, _core.OUTCOME_PEER_GARBAGE}
    assert outcomes["target"].status in told, outcomes


# --- people


@pytest.fixture
def slow(tmp_path: Path) -> Images:
    """Enough to write for a rate limit to make it last."""
    return three_windows(tmp_path)


def interrupted(ran: Marked, number: int = signal.SIGINT) -> None:
    everybody = ran.pids()
    ran.process.send_signal(number)
    code, out, err = ran.finish(15.0)
    told_clearly(code, "", err or out, 130)
    assert "interrupted" in err
    assert marked(ran.mark) == set()
    wait_until_gone(everybody)


@pytest.mark.parametrize(
    ("transport", "direction", "number"),
    [
        ("local", "", signal.SIGINT),
        ("local", "", signal.SIGTERM),
        ("rsh", "push", signal.SIGINT),
        ("tcp", "push", signal.SIGTERM),
        ("tcp", "pull", signal.SIGINT),
    ],
)
def test_an_interrupted_run_exits_130_soon_and_leaves_nothing_running(
    transport: str, direction: str, number: signal.Signals, slow: Images, tmp_path: Path
) -> None:
    with way(slow, transport, direction, "nobody", tmp_path / "log") as the, Watch(slow.target) as watch:
        with marked_command("resync", "--rate", "64KiB/s", *the.options, *the.sides) as ran:
            watch.wait()
            interrupted(ran, number)
        if the.server is not None:
            the.server.err.wait_for(str(tmp_path))
        the.again()


@pytest.mark.parametrize("back", [False, True])
def test_an_interrupt_is_heard_while_the_far_end_is_silent(back: bool, slow: Images, tmp_path: Path) -> None:
    with (
        serving("--allow", tmp_path) as server,
        line(server.port, Damage("stall", 1200 if not back else 250, back=back)) as wire,
    ):
        with marked_command("resync", slow.source, f"tcp://127.0.0.1:{wire.port}{slow.target}") as ran:
            assert wire.streams[back].reached.wait(LIMIT_S)
            interrupted(ran)
        wire.close()
        server.err.wait_for(str(tmp_path))
        slow.again()


def test_an_interrupted_run_says_in_json_what_it_did(slow: Images, tmp_path: Path) -> None:
    sides = (slow.source, slow.target)
    with Watch(slow.target) as watch, marked_command("resync", "--json", "--rate", "64KiB/s", *sides) as ran:
        watch.wait()
        ran.process.send_signal(signal.SIGINT)
        code, out, err = ran.finish(15.0)
    assert code == 130, (out, err)
    lines = [json.loads(text) for text in out.splitlines()]
    assert lines[-1]["type"] == "error"
    assert lines[-1]["code"] == 130
    assert lines[-2]["finished"] is False
    slow.again()
