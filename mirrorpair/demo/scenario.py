"""The demo's steps, in their order, and what each of them has to show.

    init, start, begin       alpha, which is preferred, becomes primary by itself; beta in sync; a witness
    write                    clients write through NBD; the journal has what was acknowledged
    kill, failover           SIGKILL of alpha while it writes; beta takes over by itself; all acknowledged is there
    write, return, resync    beta alone; alpha comes back, and gets what differs while clients write
    failback                 the role goes back to alpha, under writes
    verify                   every block through NBD against the journal; both images against each other
    cut, freeze, thaw        the negative control: without peer and witness alpha acknowledges nothing

Rules:
- A step waits for what it needs, not for a time; HANG_S is reached by a hang alone, and is a failure. So is a process
  or a client that ended by itself.
- A problem that leaves the pair usable is noted and the demo goes on: one run shows all that is wrong.
- Negative control: a write that was announced after the witness's and beta's processes were reaped can be on one node
  only. Whether one of those is acknowledged is therefore a question without a time in it. It is looked at for WATCH_S
  after alpha found out that it can ask nobody, so that one who goes on alone after all is seen doing it.
- The images are compared when no daemon has them open any more.
"""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from subprocess import SubprocessError
from typing import TYPE_CHECKING

from mirrorpair.control import Working
from mirrorpair.demo.journal import Journal, load
from mirrorpair.demo.processes import HANG_S, DemoError, Node, Stage
from mirrorpair.demo.readback import Wrong, lost, read_back
from mirrorpair.demo.report import ResultLine, StepLine, StepName, Teller
from mirrorpair.demo.writer import Clients
from mirrorpair.errors import Interrupted, MirrorpairError
from mirrorpair.offline import compare
from mirrorpair.rolewords import FAILED, REFUSED
from mirrorpair.status import holds
from mirrorpair.text import printable
from mirrorpair.units import format_percent, format_seconds, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mirrorpair.control import AdminClient
    from mirrorpair.demo.readback import Book
    from mirrorpair.status import Resync

LOOK_S = 0.02
PHASE_S = 5.0
"""A slow machine is not asked for all writes of a phase: after so long some are enough."""
SHOWN = 3


class Seen:
    """What was seen of a resync: from when to when, and the last of it."""

    def __init__(self) -> None:
        self.last: Resync | None = None
        self.began = self.ended = time.monotonic()

    def look(self, resync: Resync | None, now: float) -> None:
        if resync is not None and resync.total_bytes:
            self.began = now if self.last is None else self.began
            self.last = resync
        if resync is not None or self.last is None:
            self.ended = now

    def progress(self) -> int:
        return 0 if self.last is None else self.last.done_bytes


class Demo:
    """One run. What a class attribute says may be less in a test."""

    size = 256 << 20
    profile = "default"
    writers = 4
    depth = 16
    per_second = 4000.0
    slowly = 1000.0
    phase_writes = 5000
    few_writes = 500
    watch_s = 3.0

    def __init__(self, stage: Stage, teller: Teller) -> None:
        self.stage = stage
        self.teller = teller
        self.result = ResultLine(problems=[])
        self.journal = Journal(stage.journal, secrets.randbits(62), self.size)
        self.clients: Clients
        self._began = time.monotonic()

    def run(self) -> ResultLine:
        """The verdict. Only interrupts get out of it, and what is wrong with this program itself."""
        try:
            with self.journal:
                self.set_up()
                with self.serving_clients():
                    self.write()
                    self.kill_the_primary()
                    self.check_after_failover()
                    self.write_alone()
                    self.bring_back()
                    self.fail_back()
                    self.stop_writing()
                self.read_back()
                self.compare_images()
                self.negative_control()
        except Interrupted:
            raise KeyboardInterrupt from None
        except (DemoError, MirrorpairError, OSError, SubprocessError) as error:
            self.problem(str(error))
        return self.conclude()

    def conclude(self) -> ResultLine:
        result = self.result
        result.acknowledged_writes = self.journal.acknowledged
        result.unanswered_writes = self.journal.unanswered
        result.seconds = time.monotonic() - self._began
        result.conclude()
        return result

    # --- the steps

    def set_up(self) -> None:
        stage = self.stage
        where = printable(str(stage.folder)) if stage.kept else "a temporary folder"
        for node in stage.nodes:
            node.init()
        self.tell("init", f"alpha and beta, {format_size(self.size)} each, sparse, in {where}")
        for process in stage.processes:
            process.launch()
        for process in stage.processes:
            process.until_ready()
        shown = ", ".join(f"{name} (pid {pid})" for name, pid in stage.pids().items())
        self.tell("start", f"{shown}: real processes, joined by unix sockets")
        stage.alpha.wait("primary")
        self._both_synced()
        self.tell("begin", f"{self._who(stage.alpha)}, since it is preferred; alpha and beta are in sync")

    @contextmanager
    def serving_clients(self) -> Iterator[None]:
        """`self.clients` are at work. When this is cut short the daemons go first, so that no client waits for them."""
        paths = [node.nbd for node in self.stage.nodes]
        self.clients = Clients(paths, self.journal, writers=self.writers, depth=self.depth, per_second=self.per_second)
        with self.clients:
            try:
                yield
            except BaseException:
                self.stage.end()
                raise

    def write(self) -> None:
        self.tell(
            "write",
            f"{self.writers} clients write through NBD, up to {self.depth} requests in flight each; "
            "what is acknowledged is in the journal",
        )
        self._write_on(self.phase_writes)

    def kill_the_primary(self) -> None:
        """Returns when beta serves."""
        stage, result = self.stage, self.result
        with stage.beta.admin() as beta:
            self.clients.pace(None)
            self._write_on(self.few_writes)
            self.clients.longest_stall_s(forget=True)
            pid = stage.alpha.pid
            killed = time.monotonic()
            stage.alpha.kill()
            last = self.journal.mark()
            self.tell("kill", f"kill -9 of alpha (pid {pid}) while it writes: {self._count()} acknowledged until now")
            epoch = beta.wait_for("primary", timeout=HANG_S).status.epoch
            result.failover_s = time.monotonic() - killed
        self._until(lambda: self.journal.since_mark()[1] >= self.few_writes, "clients are served again")
        self.clients.pace(self.per_second)
        result.failover_stall_s = result.longest_stall_s = self.clients.longest_stall_s(forget=True)
        result.unanswered_at_kill = self.journal.unanswered_until(last)
        self.tell(
            "failover",
            f"beta is primary of epoch {epoch} by itself, {format_seconds(result.failover_s)} after the kill; "
            f"longest client stall {format_seconds(result.failover_stall_s)}; "
            f"{result.unanswered_at_kill} writes were in flight and never answered",
        )

    def check_after_failover(self) -> None:
        """Beside the writers, which go slowly: hardly anything is overwritten before it was looked at."""
        acknowledged = self._count()
        self.clients.pace(self.slowly)
        if not self._judge(self.stage.beta, self.journal):
            self.tell("verify", f"read back from beta while clients write: {acknowledged} acknowledged, none lost")
        self.clients.pace(self.per_second)

    def write_alone(self) -> None:
        before = self.journal.acknowledged
        self._write_on(self.phase_writes)
        self.tell("write", f"{self.journal.acknowledged - before:,} more acknowledged by beta alone")

    def bring_back(self) -> None:
        stage, result = self.stage, self.result
        with stage.beta.admin() as beta:
            behind = beta.status().volumes[0].out_of_sync_bytes
            if not behind:
                raise DemoError("beta has written alone, and says that alpha lacks nothing")
            stage.alpha.start()
            self.tell(
                "return",
                f"alpha (pid {stage.alpha.pid}) is started again; beta has marked {format_size(behind)} for it",
            )
            self.clients.pace(self.slowly)
            seen = Seen()
            try:
                self._until(lambda: self._resynced(beta, seen), "alpha is in sync again", seen.progress)
            finally:
                self.teller.resynced()
            self.clients.pace(self.per_second)
        stage.alpha.wait("synced")
        result.resync_s = seen.ended - seen.began
        result.resync_bytes, skipped = behind, ""
        if (last := seen.last) is not None:
            result.resync_bytes, result.resync_skipped_bytes = last.total_bytes, last.skipped_bytes
            result.resync_sent_bytes = last.sent_bytes
            skipped = (
                f"{format_percent(last.skipped_bytes, last.skipped_bytes + last.sent_bytes)} skipped (equal), "
                f"{format_size(last.sent_bytes)} sent, "
            )
        self.tell(
            "resync",
            f"beta -> alpha: {format_size(result.resync_bytes)} in {format_seconds(result.resync_s)}, {skipped}"
            "while clients write",
        )

    def _resynced(self, beta: AdminClient, seen: Seen) -> bool:
        status = beta.status()
        seen.look(status.volumes[0].resync, time.monotonic())
        seconds = time.monotonic() - seen.began
        self.teller.resync(Working(op="resync", seconds=seconds, volumes=status.volumes, reason=status.reason))
        return holds(status, "synced")

    def fail_back(self) -> None:
        stage, result = self.stage, self.result
        self.clients.pace(None)
        self._write_on(self.few_writes)
        self._note_stall()
        self.journal.mark()
        began = time.monotonic()
        self.hand_over(stage.alpha)
        result.failback_s = time.monotonic() - began
        self._until(lambda: self.journal.since_mark()[1] >= self.few_writes, "clients are served again")
        self.clients.pace(self.per_second)
        result.failback_stall_s = self._note_stall()
        self.tell(
            "failback",
            f"switchover under writes: {self._who(stage.alpha)} again after {format_seconds(result.failback_s)}; "
            f"longest client stall {format_seconds(result.failback_stall_s)}",
        )
        self._write_on(self.phase_writes)

    def hand_over(self, to: Node) -> None:
        """The planned change of the primary; either node may be asked. On a busy machine the two may have lost each
        other for a moment: then it is refused, and asked for again once they are in sync."""
        began = time.monotonic()
        while True:
            try:
                with to.admin() as daemon:
                    daemon.switchover(to=to.name)
                break
            except MirrorpairError as error:
                if error.exit_code not in (FAILED, REFUSED) or time.monotonic() - began >= HANG_S:
                    raise
            self._both_synced()
        to.wait("primary")

    def stop_writing(self) -> None:
        self._note_stall()
        late = self.clients.leave()
        if late:
            self.problem(f"{', '.join(late)} waited for an answer for {HANG_S:.0f} s and more")
        self._take_over_findings()

    def read_back(self) -> None:
        """Every block through NBD, by the journal as it is in the file."""
        self._both_synced()
        self.journal.flush()
        ledger = load(self.stage.journal)
        primary = self._primary()
        wrong = self._judge(primary, ledger)
        self.result.lost_writes = len(lost(wrong))
        self.result.checked_bytes = self.size
        self.tell(
            "verify",
            f"read back from {primary.name}: {len(lost(wrong)):,} of {ledger.acknowledged:,} acknowledged writes lost",
        )

    def compare_images(self) -> None:
        stage = self.stage
        stage.beta.stop()
        stage.alpha.stop()
        found = compare(str(stage.alpha.image), str(stage.beta.image))
        self.result.images_identical = found.equal
        if not found.equal:
            offset, length = found.ranges[0]
            self.problem(f"the images differ in {format_size(found.differing_bytes)}, first {length} bytes at {offset}")
        same = "identical" if found.equal else "not identical"
        self.tell("verify", f"both daemons stopped; alpha.img and beta.img, {format_size(found.size)}: {same}")

    def negative_control(self) -> None:
        stage = self.stage
        for node in stage.nodes:
            node.launch()
        for node in stage.nodes:
            node.until_ready()
        stage.alpha.wait("primary")
        self._both_synced()
        self.tell("start", f"both are started again; {self._who(stage.alpha)}, beta in sync")
        with self.serving_clients():
            self._write_on(self.few_writes)
            self.cut()
            self.freeze()
            self.thaw()
            late = self.clients.leave()
            if late:
                self.problem(f"{', '.join(late)} waited for an answer for {HANG_S:.0f} s and more")
            self._take_over_findings()
        self.journal.flush()
        gone = lost(self._judge(stage.alpha, load(stage.journal)))
        self.result.lost_writes = (self.result.lost_writes or 0) + len(gone)
        if not gone:
            self.tell("verify", f"read back from alpha: all {self._count()} acknowledged writes are there")

    def cut(self) -> None:
        """The witness first: beta's sentinel proves its death at once, and alpha, which could still ask, would rightly
        go on alone."""
        pids = self.stage.pids()
        self.stage.witness.kill()
        self.stage.beta.kill()
        self.journal.mark()
        self.tell(
            "cut",
            f"negative control: kill -9 of the witness (pid {pids['witness']}) and of beta (pid {pids['beta']}), "
            "while clients write to alpha",
        )

    def freeze(self) -> None:
        """Alpha may neither go on alone nor ask anybody: what is sent to it from now on may not be acknowledged."""
        result, alpha = self.result, self.stage.alpha
        cut = time.monotonic()
        self.clients.deepen(
            2 * self.depth
        )  # those that wait since before the cut must not keep new ones from going out
        self._until(lambda: self.journal.since_mark()[0] >= self.writers, "clients ask for writes")
        self._until(lambda: self._is_frozen(alpha) or self.journal.since_mark()[1] > 0, "alpha holds writes")
        watched = time.monotonic()
        self._until(
            lambda: self.journal.since_mark()[1] > 0 or time.monotonic() - watched >= self.watch_s, "time goes by"
        )
        result.frozen_writes, result.frozen_acknowledged = self.journal.since_mark()
        result.frozen_s = time.monotonic() - cut
        result.frozen_reads_s = max(0.0, self.clients.reader.last_s - cut)
        if result.frozen_acknowledged:
            self.problem(
                f"alpha acknowledged {result.frozen_acknowledged} writes although it could ask neither beta nor the "
                "witness: beta may have taken over without them"
            )
        self.tell(
            "freeze",
            f"for {format_seconds(result.frozen_s)} alpha acknowledged {result.frozen_acknowledged} of the "
            f"{result.frozen_writes} writes that were sent to it; "
            f"it answered reads for {format_seconds(result.frozen_reads_s)} of that",
        )

    def thaw(self) -> None:
        stage, result = self.stage, self.result
        before = self.journal.since_mark()[1]
        stage.witness.start()
        self._until(lambda: self.journal.since_mark()[1] - before >= self.few_writes, "alpha goes on")
        result.thawed_acknowledged = self.journal.since_mark()[1] - before
        self.tell(
            "thaw",
            f"the witness (pid {stage.witness.pid}) is back and takes beta out of the set: alpha goes on alone, "
            f"{result.thawed_acknowledged:,} writes acknowledged",
        )

    # --- what they share

    def tell(self, step: StepName, message: str) -> None:
        self.teller.step(
            StepLine(
                step=step,
                message=message,
                seconds=time.monotonic() - self._began,
                acknowledged_writes=self.journal.acknowledged,
                pids=self.stage.pids(),
            )
        )

    def problem(self, sentence: str) -> None:
        self.result.problems.append(printable(sentence, 1000))

    def _judge(self, node: Node, book: Book) -> list[Wrong]:
        with node.connect() as client:
            wrong = read_back(client, book)
        for one in wrong[:SHOWN]:
            self.problem(f"read back from {node.name}: {one}")
        if len(wrong) > SHOWN:
            self.problem(f"and {len(wrong) - SHOWN:,} more blocks of {node.name} are wrong")
        return wrong

    def _take_over_findings(self) -> None:
        """What the clients have seen by themselves."""
        self.result.problems += [printable(problem, 1000) for problem in self.clients.problems]
        reader = self.clients.reader
        self.result.reads += reader.reads
        self.result.wrong_reads += len(reader.wrong)
        for one in reader.wrong[:SHOWN]:
            self.problem(f"read while clients wrote: {one}")

    def _note_stall(self) -> float:
        """The longest stall since the last look, which is forgotten."""
        stall = self.clients.longest_stall_s(forget=True)
        self.result.longest_stall_s = max(stall, self.result.longest_stall_s or 0.0)
        return stall

    def _write_on(self, count: int) -> None:
        """Until so many more are acknowledged; on a slow machine a tenth of them after PHASE_S."""
        before, began = self.journal.acknowledged, time.monotonic()

        def enough() -> bool:
            done = self.journal.acknowledged - before
            return done >= count or (done * 10 >= count and time.monotonic() - began >= PHASE_S)

        self._until(enough, f"{count} writes are acknowledged", lambda: self.journal.acknowledged)

    def _until(self, holds_now: Callable[[], bool], what: str, sign: Callable[[], object] = lambda: None) -> None:
        """Looks again and again. DemoError when a process or a client ends by itself, or HANG_S are over in which
        `sign` did not change."""
        last, since = sign(), time.monotonic()
        while not holds_now():
            self.stage.check()
            if (ended := self.clients.ended()) is not None:
                raise DemoError(ended)
            now = sign()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > HANG_S:
                raise DemoError(f"{HANG_S:.0f} s have not been enough for this: {what}")
            time.sleep(LOOK_S)

    def _both_synced(self) -> None:
        for node in self.stage.nodes:
            node.wait("synced")

    def _primary(self) -> Node:
        found = next((node for node in self.stage.nodes if node.status().role == "primary"), None)
        if found is None:
            raise DemoError("nobody is primary although nobody was stopped")
        return found

    def _who(self, node: Node) -> str:
        status = node.status()
        return f"{node.name} is {status.role} of epoch {status.epoch}"

    def _is_frozen(self, node: Node) -> bool:
        """It has missed its peer, has wanted to go on alone, and nobody could be asked."""
        with node.admin() as daemon:
            status, events = daemon.status(), daemon.events()
        wanted = any(event.kind == "link" and event.new == "shrinking" for event in events)
        return wanted and status.serving == "held" and not status.arbiter.reachable and not status.peer.connected

    def _count(self) -> str:
        return f"{self.journal.acknowledged:,}"
