"""The daemon's side of the control socket, and NodeApi: what the node has to offer behind it.

Rules:
- Every request is validated at this edge, once (`control.decode_request`).
- A client can only spoil its own connection: rubbish, silence, a request cut in half, one that reads slowly or hangs
  up in the middle. At most CAP connections; a newcomer takes the place of the one that has been idle longest.
- Who connects must be the daemon's own user or root (SO_PEERCRED), beside the socket's mode 0600.
- One daemon per socket: whoever holds the lock file beside it. A socket that a dead daemon left is replaced; one that
  somebody answers is not.
- A client that leaves ends its `wait` and the watching of its `resync`, never a promote, demote or resync itself.
- A client hears something every BEAT_S, so that a hung daemon is told from a long operation.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import msgspec

from mirrorpair.control import (
    BEAT_S,
    MAX_REQUEST,
    MAX_SOCKET_PATH,
    DemoteRequest,
    Done,
    EventsRequest,
    ExplainRequest,
    Failure,
    PauseRequest,
    PlanRequest,
    PromoteRequest,
    Request,
    ResyncRequest,
    StatusRequest,
    SwitchoverRequest,
    WaitRequest,
    Working,
    decode_request,
)
from mirrorpair.control import AdminClient as AdminClient
from mirrorpair.control import ResyncPlan as ResyncPlan
from mirrorpair.errors import LocalError, MirrorpairError, PeerTimeoutError, RefusedError
from mirrorpair.status import Condition, Event, Status, holds, volumes_of
from mirrorpair.text import printable
from mirrorpair.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from mirrorpair.explain import Explanation

_LOG = logging.getLogger("mirrorpair.admin")
_ENCODER = msgspec.json.Encoder()

WATCH_S = 0.25  # the beat while a resync is watched, so that its bar moves
CAP = 64
BACKLOG = 64
SLOW_S = 10.0  # a client that takes no answer for this long is cut off


class NodeApi(Protocol):
    """The node's side. All are called on the event loop's thread and may run at the same time as each other; the node
    puts them in order where that matters. Each raises a MirrorpairError whose exit code and sentence the command ends
    with: 1 another change of roles is under way, 2 unknown volume, 11 the peer is not connected where it must be, 12
    would lose data, 13 the peer does not answer, 15 the other node is primary, 20 split brain or unrelated data.
    Whatever else is raised is logged and reported as an internal error, exit code 1."""

    async def status(self) -> Status:
        """The facts of this moment, judged (`status.judge`). Quick: it is called several times a second."""

    async def promote(self, *, accept_data_loss: bool, force: bool, dry_run: bool) -> str:
        """Makes this node primary, or raises; returns when clients are served, with one sentence that says what was
        done and what was given up. It has no effect, and says so, on a node that is primary. `dry_run`: changes
        nothing, says what would be done, and raises what would be raised."""

    async def demote(self, *, dry_run: bool) -> str:
        """Makes this node secondary: clients drained, everything durable on both. One sentence. `dry_run` as above."""

    async def switchover(self, to: str | None, *, dry_run: bool) -> str:
        """Makes `to` (None: the node that is not) primary in the place of the other one, without a loss and without a
        resync; returns when it serves. No effect, and says so, if it is primary. One sentence. `dry_run` as above."""

    async def explain(self) -> Explanation:
        """Which rule allows or forbids that this node becomes primary, now."""

    async def pause(self, *, paused: bool) -> str:
        """A19: forbids, or allows again, changes of the primary that nobody asked for. One sentence."""

    async def plan_resync(self, volume: str | None, *, full: bool) -> list[ResyncPlan]:
        """What `resync` would do, per volume (None: all, in the configuration's order). Changes nothing. A split
        brain is a plan with that amount, no error. While a resync runs the plan says what it still has to do."""

    async def resync(self, volume: str | None, *, full: bool) -> str:
        """Connects to the peer now, without waiting for a back-off's end (H3), and resyncs what differs; `full`
        compares everything even if nothing is known to differ. Returns once the resync is under way or known not to
        be needed, so that `status` shows it: not "synced" before it is done. One sentence."""

    async def wait_for(self, condition: Condition, volume: str | None = None) -> None:
        """Returns when `status.holds(status, condition, volume)`; raises, exit code 20, when `status.hopeless`. May
        be cancelled at any moment."""

    async def events(self, since: int) -> list[Event]:
        """Those after `since` (`status.EventLog.since`)."""


# --- the daemon's side


class AdminServer:
    """Serves `node` at the unix socket `path` between start() and close(), in the running event loop."""

    def __init__(
        self, path: str, node: NodeApi, *, beat_s: float = BEAT_S, slow_s: float = SLOW_S, cap: int = CAP
    ) -> None:
        self._path = path
        self._node = node
        self._beat_s = beat_s
        self._slow_s = slow_s
        self._cap = cap
        self._uid = os.geteuid()
        self._place: _Place | None = None
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._changes: set[asyncio.Task[str]] = set()
        self._turns = 0

    async def start(self) -> None:
        """Binds and listens. RefusedError (12): another daemon of this node runs, or the path is taken by something
        else; LocalError (1): it cannot be made."""
        place = _Place(self._path)
        try:
            self._server = await asyncio.start_unix_server(
                self._arrived, sock=place.socket, limit=MAX_REQUEST, backlog=BACKLOG
            )
        except BaseException:
            place.close()
            raise
        self._place = place

    async def close(self) -> None:
        """Hangs up on everyone, cancels what was under way for them and removes the socket."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = [*self._clients, *self._changes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._place is not None:
            self._place.close()
            self._place = None

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # With no buffer above the kernel's, drain() returns when an answer has been taken from us.
        writer.transport.set_write_buffer_limits(high=0)
        refusal = self._refuses(writer)
        if refusal is not None:
            writer.write(_line({"error": refusal}))
            writer.close()
            return
        client = _Client(reader, writer, self._slow_s, self._turn())
        task = asyncio.get_running_loop().create_task(self._serve(client))
        self._clients[task] = client
        task.add_done_callback(self._left)

    def _turn(self) -> int:
        self._turns += 1
        return self._turns

    def _left(self, task: asyncio.Task[None]) -> None:
        client = self._clients.pop(task, None)
        if client is not None:
            client.close()
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a control connection ended by an internal error: %s", _told(error))

    def _refuses(self, writer: asyncio.StreamWriter) -> Failure | None:
        """Why this newcomer is not served. When all places are taken, an idle client is sent away for it."""
        uid = _uid_of(writer.get_extra_info("socket"))
        if uid not in (0, self._uid):
            _LOG.warning("user %d was refused at the control socket", uid)
            return _failure(14, f"only root and the daemon's own user, {self._uid}, may control it, not user {uid}")
        if len(self._clients) < self._cap:
            return None
        idle = [task for task, client in self._clients.items() if not client.busy]
        if not idle:
            return _failure(11, f"the daemon is at work for {self._cap} other commands; try again later")
        longest = min(idle, key=lambda task: self._clients[task].turn)
        longest.cancel()
        self._clients.pop(longest).close()
        return None

    async def _serve(self, client: _Client) -> None:
        try:
            while (line := await client.next_line()) is not None:
                client.busy = True
                await self._answer(client, line)
                client.busy, client.turn = False, self._turn()
        except _TooLongError:
            with suppress(OSError):
                await client.send(_line({"error": _failure(2, f"a request is at most {MAX_REQUEST} bytes long")}))
        except TimeoutError:
            _LOG.warning("a control client that took no answer for %g s was cut off", self._slow_s)
        except OSError:
            pass  # it left

    async def _answer(self, client: _Client, line: bytes) -> None:
        try:
            request = decode_request(line)
        except ValueError as error:
            await client.send(_line({"error": _failure(2, str(error))}))
            return
        operation = asyncio.get_running_loop().create_task(self._outcome(request))
        try:
            await self._accompany(client, request, operation)
            await client.send(operation.result())
        finally:
            operation.cancel()

    async def _accompany(self, client: _Client, request: Request, operation: asyncio.Task[bytes]) -> None:
        """Returns when the operation is over; OSError when the client left before."""
        clock = asyncio.get_running_loop().time
        started = clock()
        watches = isinstance(request, ResyncRequest) and request.wait
        patient = not watches and not isinstance(request, WaitRequest)
        beat_s = min(WATCH_S, self._beat_s) if watches else self._beat_s
        while not await client.done_within(operation, beat_s, patient=patient):
            working = Working(op=str(request.__struct_config__.tag), seconds=clock() - started)
            if isinstance(request, ResyncRequest) and request.wait:
                working = await self._watched(working, request.volume)
            await client.send(_line({"progress": working}))

    async def _watched(self, working: Working, volume: str | None) -> Working:
        try:
            status = await self._node.status()
        except Exception as error:  # noqa: BLE001 - progress is a courtesy; the operation itself tells what fails
            _LOG.error("the status of a resync cannot be had: %s", _told(error))
            return working
        return msgspec.structs.replace(working, volumes=volumes_of(status, volume), reason=status.reason)

    async def _outcome(self, request: Request) -> bytes:
        """The last line of the answer, whatever happens."""
        try:
            return _line({"ok": await self._perform(request)})
        except MirrorpairError as error:
            return _line({"error": _failure(error.exit_code, str(error))})
        except Exception as error:  # noqa: BLE001 - a bug in one operation must not take the daemon along
            _LOG.error("internal error in %s: %s", request.__struct_config__.tag, _told(error))
            return _line({"error": _failure(1, f"internal error of the daemon: {_told(error)}; please report it")})

    async def _perform(self, request: Request) -> object:
        node = self._node
        message = ""
        match request:
            case StatusRequest():
                return await node.status()
            case ExplainRequest():
                return await node.explain()
            case EventsRequest():
                return await node.events(request.since)
            case PlanRequest():
                return await node.plan_resync(request.volume, full=request.full)
            case PromoteRequest():
                message = await self._change(
                    node.promote(
                        accept_data_loss=request.accept_data_loss, force=request.force, dry_run=request.dry_run
                    )
                )
            case DemoteRequest():
                message = await self._change(node.demote(dry_run=request.dry_run))
            case SwitchoverRequest():
                message = await self._change(node.switchover(request.to, dry_run=request.dry_run))
            case PauseRequest():
                message = await self._change(node.pause(paused=request.paused))
            case ResyncRequest():
                message = await self._change(node.resync(request.volume, full=request.full))
                if request.wait:
                    await node.wait_for("synced", request.volume)
                    message = f"{request.volume or 'every volume'} is in sync"
            case WaitRequest():
                message = await self._wait(request)
        return Done(message=message, status=await node.status())

    async def _change(self, call: Coroutine[object, object, str]) -> str:
        """Runs what changes the node; it is finished even if its client leaves."""
        task = asyncio.get_running_loop().create_task(call)
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: asyncio.Task[str]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have gone: it counts as told

    async def _wait(self, request: WaitRequest) -> str:
        node, condition = self._node, request.condition
        timeout = asyncio.timeout(request.timeout)
        try:
            async with timeout:
                await node.wait_for(condition)
        except TimeoutError:
            if not timeout.expired():
                raise
        status = await node.status()
        if timeout.expired() and not holds(status, condition):
            after = format_seconds(request.timeout or 0.0)
            raise PeerTimeoutError(f"{status.node} is not {condition} after {after}: {status.reason}")
        return f"{status.node} is {condition}"


class _TooLongError(Exception):
    pass


class _Client:
    """One connection. While an operation runs, the next line is read ahead, which is how a hang-up is noticed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slow_s: float, turn: int) -> None:
        self._reader = reader
        self._writer = writer
        self._slow_s = slow_s
        self._ahead: asyncio.Task[bytes] | None = None
        self.turn = turn
        self.busy = False

    async def next_line(self) -> bytes | None:
        """None at the end of the stream; a request that was cut off is no request."""
        ahead = self._read_ahead()
        try:
            line = await ahead
        except ValueError:  # how StreamReader says that its limit was passed
            raise _TooLongError from None
        finally:
            self._ahead = None
        return line if line.endswith(b"\n") else None

    async def done_within(self, operation: asyncio.Task[bytes], seconds: float, *, patient: bool) -> bool:
        """Waits so long for the operation. ConnectionResetError when the client has closed its end meanwhile, unless
        `patient`: one that has only closed its sending half still wants the answer."""
        ahead = self._read_ahead()
        watched: set[asyncio.Task[bytes]] = {operation} if ahead.done() else {operation, ahead}
        await asyncio.wait(watched, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if operation.done():
            return True
        if not patient and ahead.done() and ahead.exception() is None and not ahead.result().endswith(b"\n"):
            raise ConnectionResetError
        return False

    async def send(self, line: bytes) -> None:
        """Returns when the kernel has taken it all. OSError: the client left; TimeoutError: it does not read."""
        self._writer.write(line)
        async with asyncio.timeout(self._slow_s):
            await self._writer.drain()

    def close(self) -> None:
        if self._ahead is not None and not self._ahead.cancel() and not self._ahead.cancelled():
            self._ahead.exception()  # of a request that nobody will look at any more
        self._writer.transport.abort()

    def _read_ahead(self) -> asyncio.Task[bytes]:
        if self._ahead is None:
            self._ahead = asyncio.get_running_loop().create_task(self._reader.readline())
        return self._ahead


class _Place:
    """The bound socket, and the lock that says whose it is.

    The lock file is what excludes a second daemon: between "the socket is dead" and "bind" another one could come. It
    is removed at the end, so a lock counts only while its name still leads to the locked file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise LocalError(f"the control socket's path is longer than {MAX_SOCKET_PATH} bytes: {path}")
        try:
            os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
            self._lock = _lock(f"{path}.lock")
        except OSError as error:
            raise LocalError(f"the control socket {path} cannot be made: {error.strerror}") from error
        try:
            self.socket = self._bind()
        except OSError as error:
            self._unlock()
            raise LocalError(f"the control socket {path} cannot be made: {error.strerror}") from error
        except BaseException:
            self._unlock()
            raise
        self._made = _identity(path)

    def close(self) -> None:
        """Removes the socket, if it is still ours, and gives the place up."""
        self.socket.close()
        if _identity(self._path) == self._made:
            with suppress(OSError):
                os.unlink(self._path)
        self._unlock()

    def _bind(self) -> socket.socket:
        self._clear()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The file takes its mode from the socket: at no moment may anyone else connect.
            os.fchmod(made.fileno(), 0o600)
            made.bind(self._path)
            made.setblocking(False)
        except BaseException:
            made.close()
            raise
        return made

    def _clear(self) -> None:
        """Removes a socket that nobody listens at; refuses everything else that may be there."""
        try:
            mode = os.lstat(self._path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise RefusedError(f"{self._path} exists and is not a socket: it is left alone")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(self._path) not in (errno.ECONNREFUSED, errno.ENOENT):
                raise RefusedError(f"another daemon of this node runs: it answers at {self._path}")
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    def _unlock(self) -> None:
        with suppress(OSError):
            os.unlink(f"{self._path}.lock")
        os.close(self._lock)


def _lock(path: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(fd)
            if _identity(path) == (held.st_dev, held.st_ino):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise RefusedError(f"another daemon of this node runs: it holds {path}") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _uid_of(sock: socket.socket) -> int:
    """The effective user of whoever connected, as the kernel recorded it then."""
    form = "3i"  # struct ucred: pid, uid, gid
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    return int(struct.unpack(form, credentials)[1])


def _told(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {printable(str(error), 300)}{place}"


def _failure(code: int, message: str) -> Failure:
    return Failure(code=code if 1 <= code <= 255 else 1, message=printable(message, 2000))


def _line(answer: dict[str, object]) -> bytes:
    return _ENCODER.encode(answer) + b"\n"
