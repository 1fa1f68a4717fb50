"""The far end: opens the image that the near end asks for and runs the other half of the engine. One session at a
time here.

    recv hello -> may it? -> open -> send welcome -> recv start -> engine        (near half: remote.py)

Rules:
- Nothing is opened before the hello was checked whole and the path granted; no byte is written, cut or added before
  start.
- A session ends in a `Served`, never in an exception: whatever a client does, the one after it is served.
- What went wrong before the engine runs is told to the client with its exit code; from then on the engine tells.
- A target that was made for a client that then left is removed again.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from mirrorpair import __version__, _core
from mirrorpair.drive import drive
from mirrorpair.errors import (
    ImageError,
    Interrupted,
    LocalError,
    MirrorpairError,
    PeerProtocolError,
    PeerTimeoutError,
    UsageError,
)
from mirrorpair.image import Image, open_source, open_target
from mirrorpair.messages import (
    PROTOCOL,
    Hello,
    Start,
    Welcome,
    choose_protocol,
    decode_hello,
    decode_start,
    encode,
    failure,
)
from mirrorpair.outcome import Scene, error_of
from mirrorpair.text import printable
from mirrorpair.transport import enlarge_pipe
from mirrorpair.units import format_seconds, format_size
from mirrorpair.unwritten import open_or_zeros, remove_created, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mirrorpair.allow import Access
    from mirrorpair.newfile import Opener

NEGOTIATE_S = 10.0  # hello to start over TCP; nothing in it waits for a person
NEGOTIATE_STDIO_S = 120.0  # over ssh the other side is one who could log in
TELL_S = 2.0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one session. `code` is 0, or the exit code of what went wrong; `text` is one line for the log."""

    code: int
    text: str


class _Left(Exception):  # noqa: N818 - no error: the near end found a reason not to start
    pass


class Session:
    """One client. `started` turns True when the engine runs, that is when the client has proved to be one."""

    def __init__(
        self,
        channel: _core.Channel,
        access: Access,
        *,
        negotiate_s: float = NEGOTIATE_S,
        stopping: Callable[[], bool] | None = None,
        stop_s: float = 30.0,
    ) -> None:
        self.started = False
        self._channel = channel
        self._access = access
        self._deadline = time.monotonic() + negotiate_s
        self._negotiate_s = negotiate_s
        self._stopping = stopping
        self._stop_s = stop_s
        self._subject = "no hello"
        self._written = False

    def run(self) -> Served:
        began = time.monotonic()
        try:
            done = self._serve()
        except _Left:
            return Served(code=0, text=f"{self._subject}: left before the start, nothing changed")
        except MirrorpairError as error:
            if not self.started:
                self._tell(error.exit_code, str(error))
            return Served(code=error.exit_code, text=f"{self._subject}: {printable(str(error), 600)}")
        except Exception as error:  # noqa: BLE001 - a bug must not stop the other sessions
            text = f"internal error: {type(error).__name__}: {error}"
            if not self.started:
                self._tell(1, text)
            return Served(code=1, text=f"{self._subject}: {printable(text, 600)}")
        return Served(code=0, text=f"{self._subject}: ok, {done}, {format_seconds(time.monotonic() - began)}")

    def _serve(self) -> str:
        hello = decode_hello(self._receive(_core.FRAME_HELLO, "hello"))
        action = "writes" if hello.role == "target" and hello.write else "reads"
        self._subject = f"{action} {printable(hello.path, 300)}"
        protocol = choose_protocol(PROTOCOL, hello.protocol)
        if protocol is None:
            raise PeerProtocolError(
                f"mirrorpair {__version__} here speaks protocol {PROTOCOL[0]} to {PROTOCOL[1]}, the other end "
                f"({printable(hello.version)}) {hello.protocol[0]} to {hello.protocol[1]}; "
                "install the same version on both hosts"
            )
        opener = self._access.grant(hello.path, write=action == "writes")
        before = size_of(hello.path, opener) if hello.resize else None
        with _open(hello, opener, before) as image:
            # A file is cut or grown only after the start: until then the near end may leave, and nothing is lost.
            size = image.size if action == "reads" or before is None or hello.size is None else hello.size
            try:
                welcome = Welcome(
                    protocol=protocol,
                    version=__version__,
                    size=size,
                    kind=image.kind,
                    created=image.created,
                    before=before,
                )
                self._send(_core.FRAME_WELCOME, encode(welcome), "welcome")
                try:
                    payload = self._receive(_core.FRAME_START, "start")
                except (EOFError, OSError):
                    raise _Left from None
                start = decode_start(payload)
                _check_start(start, hello, size)
                _resize(image, size)
                return self._engine(hello, start, image)
            except BaseException:
                if action == "writes" and image.created and not self._written:
                    remove_created(image, opener)
                raise

    def _engine(self, hello: Hello, start: Start, image: Image) -> str:
        begin = _core.Helper.source if hello.role == "source" else _core.Helper.target
        helper = begin(
            image.fd,
            self._channel,
            size=start.size,
            block_size=start.block_size,
            seed=start.seed,
            write=hello.write,
            recheck=start.recheck,
            rate=start.rate,
            threads=start.threads,
            timeout=start.timeout,
            ranges=not hello.write,
        )
        self.started = True
        self._written = True  # whatever ends drive() early has not been able to tell
        run = drive(helper, stopping=self._stopping, stop_s=self._stop_s)
        counters = run.counters
        self._written = counters.written_bytes + counters.punched_bytes > 0
        done = f"{format_size(counters.done_bytes)} compared, {format_size(counters.sent_bytes)} of payload"
        if run.outcome.status == _core.OUTCOME_CANCELLED or (
            run.interrupted and run.outcome.status != _core.OUTCOME_OK
        ):
            raise Interrupted(f"interrupted, {done}")
        here = printable(hello.path, 300)
        scene = Scene(
            source=here if hello.role == "source" else "the other end's image",
            target=here if hello.role == "target" else "the other end's image",
            peer="the other end",
            timeout=start.timeout,
            again="the other end's command can then be run again",
        )
        error = error_of(run.outcome, scene)
        if error is not None:
            raise error
        return done

    def _receive(self, wanted: int, name: str) -> bytes:
        try:
            kind, payload = self._channel.recv(self._left())
        except TimeoutError:
            raise PeerTimeoutError(f"no {name} within {self._negotiate_s:g} s") from None
        except _core.ProtocolError as error:
            raise PeerProtocolError(f"not a mirrorpair client: {printable(str(error), 300)}") from None
        except (EOFError, OSError):
            if wanted == _core.FRAME_HELLO:
                raise PeerProtocolError("closed before the hello") from None
            raise
        if kind == _core.FRAME_ERROR:
            raise _Left
        if kind != wanted:
            raise PeerProtocolError(f"a frame of kind {kind} came where a {name} belongs")
        return payload

    def _send(self, kind: int, payload: bytes, name: str) -> None:
        try:
            self._channel.send(kind, payload, self._left())
        except TimeoutError:
            raise PeerTimeoutError(f"the {name} was not taken within {self._negotiate_s:g} s") from None
        except OSError:
            raise _Left from None

    def _tell(self, code: int, message: str) -> None:
        with suppress(OSError, ValueError):
            self._channel.send(_core.FRAME_ERROR, encode(failure(code, message)), TELL_S)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


def serve_stdio(access: Access, *, stopping: Callable[[], bool] | None = None) -> Served:
    """One session on this process's standard input and output.

    The two move out of the way first: what any library prints afterwards goes to stderr, not between the frames.
    """
    if os.isatty(0) or os.isatty(1):
        raise UsageError(
            "serve --stdio speaks frames, not text: `mirrorpair resync` starts it through ssh; "
            "for a server use --listen"
        )
    try:
        fd_in = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        fd_out = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as error:
        raise LocalError(f"serve --stdio needs an open standard input and output: {error.strerror}") from error
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    enlarge_pipe(fd_in)
    enlarge_pipe(fd_out)
    # The descriptions may be shared with a shell that goes on after us, and O_NONBLOCK belongs to the description.
    flags = [(fd, fcntl.fcntl(fd, fcntl.F_GETFL)) for fd in (fd_in, fd_out)]
    try:
        return Session(_core.Channel(fd_in, fd_out), access, negotiate_s=NEGOTIATE_STDIO_S, stopping=stopping).run()
    finally:
        for fd, flag in flags:
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETFL, flag)
            os.close(fd)


def _open(hello: Hello, opener: Opener | None, before: int | None) -> Image:
    if hello.role == "source":
        return open_source(hello.path, opener=opener)
    if hello.write:
        assert hello.size is not None
        size = hello.size if before is None else before
        return open_target(hello.path, size=size, create=hello.create, opener=opener)
    if hello.create:
        assert hello.size is not None
        return open_or_zeros(hello.path, hello.size, opener)
    return open_source(hello.path, opener=opener)


def _resize(image: Image, size: int) -> None:
    if image.size == size:
        return
    try:
        os.ftruncate(image.fd, size)
    except OSError as error:
        raise ImageError(f"{printable(image.path)} cannot be made {size} bytes long: {error.strerror}") from error
    image.size = size


def _check_start(start: Start, hello: Hello, size: int) -> None:
    if start.size > size:
        raise PeerProtocolError(f"asked to work on {start.size} bytes of an image of {size}")
    if hello.role == "target" and hello.write and start.size != hello.size:
        raise PeerProtocolError(f"asked to write {start.size} bytes after a hello for {hello.size}")
