"""`mirrorpair demo`: once as it is, and then with something wrong, which it has to find.

What is wrong is put in by a subclass of the demo in a process of its own, which runs the real command around it: the
product has no switch for that. The demos with a fault leave out the failover, as far as it is not about that, and are
measured by one without a fault that passes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest
from farside import MIRRORPAIR, environment, run_cli

from mirrorpair.demo.journal import load
from mirrorpair.demo.report import ResultLine, StepLine

HANG_S = 500.0

DRIVER = """
import sys
from mirrorpair.cli import main
from mirrorpair.demo import scenario
from mirrorpair.demo.journal import BLOCK, load

class Short(scenario.Demo):
    size = 32 << 20
    phase_writes = 600
    few_writes = 100
    watch_s = 2.0

    def skip(self):
        pass

    def skip_failover(self):
        self.result.failover_s = self.result.failback_s = 0.0
        self.result.resync_bytes = 0

    kill_the_primary = skip_failover
    check_after_failover = write_alone = bring_back = fail_back = skip

def damage(image, block):
    with image.open("r+b") as file:
        file.seek(block * BLOCK + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))

def a_written_block(demo):
    demo.journal.flush()
    ledger = load(demo.stage.journal)
    return next(at for at, least in enumerate(ledger.bounds(0, demo.size // BLOCK).least) if least)

{fault}
scenario.Demo = Faulty
sys.argv = ["mirrorpair", "demo", "--json"]
main()
"""


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def run_faulty(fault: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER.replace("{fault}", textwrap.dedent(fault))],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = lines_of(done.stdout)
    assert lines[-1]["finished"] is True, (lines, done.stderr)
    return done.returncode, lines[-1]


def until_nobody_is_about(folder: Path) -> None:
    """What watched a process that was killed may need a moment to notice it."""
    tick = threading.Event()
    deadline = time.monotonic() + HANG_S
    while left := processes_about(folder):
        assert time.monotonic() < deadline, left
        tick.wait(0.05)


def processes_about(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in words and path.parent.name != str(os.getpid()):
            found.append(words.replace(b"\0", b" ").decode())
    return found


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    """A folder whose name is too long for the sockets, too."""
    out = tmp_path / ("long" * 25)
    done = run_cli("demo", "--json", "--out", out, timeout=HANG_S)
    lines = lines_of(done.stdout)
    result = lines[-1]
    assert done.returncode == 0, (result, done.stderr)
    assert done.stderr == ""
    steps = [line for line in lines if line["type"] == "step"]
    assert " ".join(line["step"] for line in steps) == (
        "init start begin write kill failover verify write return resync failback verify verify "
        "start cut freeze thaw verify"
    )
    assert (result["type"], result["op"], result["passed"], result["finished"]) == ("result", "demo", True, True)
    assert (result["problems"], result["lost_writes"], result["wrong_reads"]) == ([], 0, 0)
    assert (result["images_identical"], result["frozen_acknowledged"]) == (True, 0)
    assert min(result["acknowledged_writes"], result["reads"], result["frozen_writes"]) > 0
    assert [name for name, value in result.items() if value is None] == []
    assert result["failover_stall_s"] > result["failover_s"] / 2  # nobody served anybody meanwhile
    assert result["resync_bytes"] > 0
    assert set(steps[0]) == {"type", *StepLine.__struct_fields__}
    assert set(result) == {"type", *ResultLine.__struct_fields__}
    pids = {step["step"]: step["pids"] for step in reversed(steps)}
    assert set(pids["start"]) == {"alpha", "beta", "witness"}
    assert set(pids["kill"]) == {"beta", "witness"}
    assert pids["resync"]["alpha"] != pids["start"]["alpha"]

    assert sorted(path.name for path in out.iterdir()) == ["journal", "logs"]
    ledger = load(out / "journal")
    assert (ledger.acknowledged, ledger.unanswered) == (result["acknowledged_writes"], result["unanswered_writes"])
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["alpha.log", "beta.log", "witness.log"]
    until_nobody_is_about(out)


def test_without_a_fault_the_short_one_passes() -> None:
    code, result = run_faulty(
        """
        class Faulty(Short):
            pass
        """
    )
    assert (code, result["passed"], result["problems"]) == (0, True, [])
    assert result["frozen_writes"] > 0
    assert result["folder"] is None


def test_a_block_that_is_damaged_on_both_nodes_is_a_lost_write() -> None:
    """The images are identical, which is not enough."""
    code, result = run_faulty(
        """
        class Faulty(Short):
            def read_back(self):
                self.block = a_written_block(self)
                for node in self.stage.nodes:
                    damage(node.image, self.block)
                super().read_back()

            def compare_images(self):
                super().compare_images()
                for node in self.stage.nodes:
                    damage(node.image, self.block)  # as it was
        """
    )
    assert (code, result["passed"], result["lost_writes"], result["images_identical"]) == (1, False, 1, True)
    assert len(result["problems"]) == 1
    assert "holds what nobody wrote" in result["problems"][0]


def test_an_acknowledged_write_that_was_never_made_is_a_lost_one() -> None:
    code, result = run_faulty(
        """
        class Faulty(Short):
            def read_back(self):
                number = self.journal.start(a_written_block(self), 1)
                self.journal.acknowledge(number)
                super().read_back()

            def negative_control(self):
                self.result.frozen_writes = self.result.thawed_acknowledged = 1
                self.result.frozen_acknowledged = 0
        """
    )
    assert (code, result["passed"], result["lost_writes"], result["images_identical"]) == (1, False, 1, True)
    assert len(result["problems"]) == 1
    assert "acknowledged write" in result["problems"][0]


def test_a_write_that_landed_where_nobody_wrote_is_found() -> None:
    code, result = run_faulty(
        """
        class Faulty(Short):
            def read_back(self):
                self.journal.flush()
                last = load(self.stage.journal).bounds(0, self.size // BLOCK).last
                self.block = last.index(0)
                for node in self.stage.nodes:
                    damage(node.image, self.block)
                super().read_back()

            def compare_images(self):
                super().compare_images()
                for node in self.stage.nodes:
                    damage(node.image, self.block)
        """
    )
    assert (code, result["passed"], result["lost_writes"]) == (1, False, 0)
    assert "no acknowledged write, but it holds what nobody wrote" in result["problems"][0]


def test_images_that_differ_are_found() -> None:
    code, result = run_faulty(
        """
        class Faulty(Short):
            def compare_images(self):
                block = a_written_block(self)
                damage(self.stage.beta.image, block)
                super().compare_images()
                damage(self.stage.beta.image, block)
        """
    )
    assert (code, result["passed"], result["lost_writes"], result["images_identical"]) == (1, False, 0, False)
    assert len(result["problems"]) == 1
    assert "the images differ" in result["problems"][0]


def test_a_primary_that_goes_on_in_the_negative_control_is_found() -> None:
    """With a witness there it may go on, and does: so the control sees it if it happens."""
    code, result = run_faulty(
        """
        class Faulty(Short):
            def cut(self):
                witness, self.stage.witness.kill = self.stage.witness.kill, lambda: None
                super().cut()
                self.stage.witness.kill = witness

            def thaw(self):
                self.stage.witness.kill()
                super().thaw()
        """
    )
    assert (code, result["passed"], result["lost_writes"]) == (1, False, 0)
    assert result["frozen_acknowledged"] > 0
    assert "could ask neither beta nor the witness" in result["problems"][0]


def test_a_daemon_that_ends_by_itself_is_a_failure_with_its_last_words() -> None:
    code, result = run_faulty(
        """
        import os, signal

        class Faulty(Short):
            def write(self):
                os.kill(self.stage.pids()["witness"], signal.SIGTERM)
                self.phase_writes = 1 << 40
                super().write()
        """
    )
    assert (code, result["passed"], result["lost_writes"], result["images_identical"]) == (1, False, None, None)
    assert "witness ended by itself with 0" in result["problems"][0]


def until_step(stream: IO[str], step: str) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line)
        if step in line.split():
            return lines
    raise AssertionError(f"it ended without {step}: {lines}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_and_removes_everything(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*MIRRORPAIR, "demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(tmp_path)),
    ) as demo:
        assert demo.stderr is not None
        assert demo.stdout is not None
        try:
            until_step(demo.stderr, "kill")
            (folder,) = tmp_path.iterdir()
            assert processes_about(folder) != []
            demo.send_signal(number)
            told = demo.stderr.read()
            assert demo.wait(HANG_S) == 130
        finally:
            demo.terminate()  # so that it puts away what it made
            demo.wait(HANG_S)
        assert told.splitlines()[-1] == "mirrorpair: interrupted"
        assert demo.stdout.read() == ""
    assert list(tmp_path.iterdir()) == []
    until_nobody_is_about(folder)


def test_kept_is_everything_and_it_is_said_where(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [*MIRRORPAIR, "demo", "--out", str(out), "--keep"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as demo:
        assert demo.stderr is not None
        try:
            until_step(demo.stderr, "begin")
            demo.send_signal(signal.SIGINT)
            told = demo.stderr.read()
            assert demo.wait(HANG_S) == 130
        finally:
            demo.terminate()
            demo.wait(HANG_S)
    assert f"mirrorpair: everything: {out}" in told.splitlines()
    assert {"alpha.img", "beta.img", "pair.toml", "journal", "logs", "alpha", "beta"} <= {
        path.name for path in out.iterdir()
    }
    until_nobody_is_about(out)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = run_cli("demo", "--out", tmp_path)
    assert (done.returncode, done.stdout) == (12, "")
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
