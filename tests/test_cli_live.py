"""The commands that talk to the daemon, as people and scripts call them: real processes, a real control socket."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from adminside import Daemon, daemon_at, resyncing, status, volume
from farside import LIMIT_S, MIRRORPAIR, environment, run_cli, running

from mirrorpair.chronicle import Chronicle, Entry
from mirrorpair.cli.live import ResultLine
from mirrorpair.cli.logs import JsonFormatter, PlainFormatter, RepeatFilter
from mirrorpair.cli.online import OnlineLine, PlanLine, Totals, plan_sentence
from mirrorpair.cli.statusview import render
from mirrorpair.cli.wait import CONDITIONS
from mirrorpair.control import ResyncPlan, Working
from mirrorpair.errors import RefusedError, SplitBrainError, UnreachableError, WrongRoleError
from mirrorpair.status import CONDITIONS as STATUS_CONDITIONS
from mirrorpair.status import Refusal, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIG = """
[pair]
name = "shop"
arbiter = "none"
[volume.data]
size = "10GiB"
[node.alpha]
address = "127.0.0.1:7790"
state-dir = "alpha"
control = "alpha.sock"
nbd = ["unix:alpha.nbd"]
image.data = "alpha.img"
[node.beta]
address = "127.0.0.1:7791"
state-dir = "beta"
control = "beta.sock"
nbd = ["unix:beta.nbd"]
image.data = "beta.img"
"""


def plan(**facts: Any) -> ResyncPlan:
    return ResyncPlan(
        **{
            "volume": "data",
            "amount": "bitmap",
            "source": "beta",
            "target": "alpha",
            "bytes": 1299234816,
            "rule": "H1",
            "reason": "alpha was away",
        }
        | facts
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "pair.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def daemon(tmp_path: Path, config: Path) -> Iterator[Daemon]:
    with daemon_at(tmp_path / "beta.sock", beat_s=0.01) as made:
        yield made


@pytest.fixture
def cli(config: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli("status")` asks beta."""
    return lambda *args, **options: run_cli("-c", config, "--node", "beta", *args, **options)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def calls(daemon: Daemon) -> list[str]:
    return [name for name, _ in daemon.node.calls if name != "status"]


# --- status


def test_status_is_the_view(daemon: Daemon, cli: Any) -> None:
    daemon.change(resyncing())
    done = cli("status", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == render(judge(resyncing()))


def test_status_on_an_output_that_knows_ascii_alone(daemon: Daemon, cli: Any) -> None:
    daemon.change(resyncing())
    done = cli("status", PYTHONIOENCODING="ascii")
    assert "=========>----" in done.stdout
    assert done.returncode == 0


def test_status_json_is_one_object(daemon: Daemon, cli: Any) -> None:
    done = cli("status", "--json")
    assert lines_of(done.stdout) == [json.loads(msgspec.json.encode(judge(status())))]


@pytest.mark.parametrize(
    ("facts", "code", "word"),
    [
        ({}, 0, "HEALTHY"),
        ({"volumes": [volume(out_of_sync_bytes=4096)]}, 1, "DEGRADED"),
        ({"serving": "held"}, 2, "CRITICAL"),
        ({"starting": True}, 3, "UNKNOWN"),
    ],
)
def test_check_exits_with_the_health(daemon: Daemon, cli: Any, facts: dict[str, Any], code: int, word: str) -> None:
    daemon.change(status(**facts))
    done = cli("status", "--check")
    assert done.returncode == code
    assert re.fullmatch(f"{word} - shop, beta: .+\n", done.stdout)
    done = cli("status", "--check", "--json")
    assert done.returncode == code
    assert lines_of(done.stdout)[0]["health"] == word.lower()


def test_check_of_what_cannot_be_asked_is_unknown(cli: Any, config: Path) -> None:
    assert cli("status", "--check").returncode == 3
    assert cli("status", "--check").stdout.startswith("UNKNOWN - no daemon answers at ")
    assert lines_of(cli("status", "--check", "--json").stdout)[0]["code"] == 11
    config.write_text("rubbish")
    assert cli("status", "--check").returncode == 3


def test_watch_shows_what_changes_until_it_is_interrupted(daemon: Daemon, config: Path) -> None:
    with running("-c", config, "--node", "beta", "status", "--watch", "100ms", "--json") as program:
        program.out.wait_for('"healthy"')
        daemon.change(status(serving="held"))
        program.out.wait_for('"critical"')
        assert program.end(signal.SIGINT) == 130
        assert program.err.rest() == []


def test_watch_ends_with_11_when_the_daemon_does(daemon: Daemon, config: Path) -> None:
    with running("-c", config, "--node", "beta", "status", "--watch", "0.1") as program:
        program.out.wait_for("HEALTHY")
        daemon.close_server()
        assert program.process.wait(LIMIT_S) == 11
        assert len(program.err.rest()) == 1


def test_watch_redraws_a_terminal_in_place(daemon: Daemon, config: Path) -> None:
    seen = _on_a_terminal(
        ["-c", config, "--node", "beta", "status", "--watch", "0.1"], until=b"HEALTHY.*\x1b\\[H.*HEALTHY"
    )
    assert "\x1b[K\r\n" in seen
    assert "\x1b[32m" in seen  # healthy is green
    seen = _on_a_terminal(["-c", config, "--node", "beta", "--no-color", "status", "--watch", "0.1"], until=b"HEALTHY")
    assert "\x1b[32m" not in seen


# --- no daemon, no configuration


COMMANDS = [
    ["status"],
    ["wait", "--for", "primary", "--timeout", "0"],
    ["promote"],
    ["demote"],
    ["events"],
    ["resync", "-y"],
    ["resync", "--dry-run"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_daemon_it_is_11_and_one_sentence(cli: Any, command: list[str]) -> None:
    done = cli(*command)
    assert done.returncode == 11
    assert re.fullmatch(r"mirrorpair: no daemon answers at \S+beta\.sock: .+\n", done.stderr)
    assert lines_of(cli(*command, "--json").stdout)[-1]["code"] == 11


@pytest.mark.parametrize("command", [*COMMANDS, ["run"], ["history"]], ids=" ".join)
def test_a_wrong_configuration_is_10(cli: Any, config: Path, command: list[str]) -> None:
    config.write_text(CONFIG + "colour = 1\n")
    done = cli(*command)
    assert done.returncode == 10
    assert "colour" in done.stderr
    config.unlink()
    assert cli(*command).returncode == 10


def test_which_node_this_is(daemon: Daemon, config: Path) -> None:
    assert run_cli("-c", config, "status", MIRRORPAIR_NODE="beta").returncode == 0
    assert run_cli("status", MIRRORPAIR_NODE="beta", MIRRORPAIR_CONFIG=str(config)).returncode == 0
    assert run_cli("-c", config, "status", "--node", "alpha", MIRRORPAIR_NODE="beta").returncode == 11
    assert run_cli("-c", config, "status", "--node", "gamma").returncode == 10


@pytest.mark.parametrize(
    "arguments",
    [
        ["wait"],
        ["wait", "--for", "money"],
        ["wait", "--for", "synced", "--timeout", "soon"],
        ["status", "--watch", "1", "--check"],
        ["status", "--watch", "0"],
        ["status", "extra"],
        ["promote", "--force"],
        ["events", "--since", "-1"],
        ["history", "--since", "-1"],
        ["resync"],
        ["resync", "data"],
        ["resync", "data", "--json"],
        ["resync", "-y", "a/b"],
        ["resync", "-y", ""],
        ["resync", "-y", "data", "--rate", "1MiB/s"],
        ["resync", "-y", "data", "--verify"],
        ["resync", "a.img", "b.img", "--full"],
        ["resync", "a.img", "b.img", "--wait"],
        ["resync", "-y", "nope"],
    ],
)
def test_wrong_usage_is_2_and_changes_nothing(daemon: Daemon, cli: Any, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" or "--json" in arguments
    assert set(calls(daemon)) <= {"plan_resync"}


def test_wait_knows_every_condition() -> None:
    assert sorted(CONDITIONS) == sorted(STATUS_CONDITIONS)


# --- wait, promote, demote, events


def test_wait(daemon: Daemon, cli: Any, config: Path) -> None:
    done = cli("wait", "--for", "primary")
    assert (done.returncode, done.stdout) == (0, "beta is primary\n")
    done = cli("wait", "--for", "secondary", "--timeout", "10ms")
    assert done.returncode == 13
    assert "beta is not secondary after" in done.stderr
    with running("-c", config, "--node", "beta", "wait", "--for", "secondary", "--json") as program:
        daemon.until(lambda: calls(daemon).count("wait_for") == 3)
        daemon.change(status(role="secondary", serving="no"))
        line = json.loads(program.out.wait_for("result")[0] and program.out.lines[-1])
        assert (line["op"], line["role"], line["finished"]) == ("wait", "secondary", True)
        assert program.process.wait(LIMIT_S) == 0


def test_wait_also_waits_for_the_daemon_that_is_being_started(tmp_path: Path, config: Path) -> None:
    with running("-c", config, "--node", "beta", "wait", "--for", "primary") as program:
        program.err.wait_for("no daemon answers yet")
        with daemon_at(tmp_path / "beta.sock", beat_s=0.01):
            assert program.process.wait(LIMIT_S) == 0


def test_a_daemon_that_dies_while_a_command_waits_is_11(daemon: Daemon, config: Path) -> None:
    with running("-c", config, "--node", "beta", "wait", "--for", "secondary") as program:
        daemon.until(lambda: "wait_for" in calls(daemon))
        daemon.close_server()
        assert program.process.wait(LIMIT_S) == 11
        (line,) = program.err.rest()
        assert "ended before it answered" in line


def test_an_interrupted_wait_is_130(daemon: Daemon, config: Path) -> None:
    with running("-c", config, "--node", "beta", "wait", "--for", "secondary") as program:
        daemon.until(lambda: "wait_for" in calls(daemon))
        assert program.end(signal.SIGTERM) == 130
    daemon.until(lambda: daemon.node.cancelled == ["wait_for"])


def test_wait_in_a_split_brain_is_20(daemon: Daemon, cli: Any) -> None:
    daemon.change(status(peer={"connected": False}, refusal=Refusal(kind="split-brain", reason="both wrote")))
    assert cli("wait", "--for", "synced").returncode == 20


def test_promote_and_demote(daemon: Daemon, cli: Any) -> None:
    assert cli("demote").stdout == "beta is secondary\n"
    done = cli("promote", "--accept-data-loss", "--force", "--json")
    assert done.returncode == 0
    (line,) = lines_of(done.stdout)
    assert line["schema"] == "mirrorpair.result/1"
    assert (line["op"], line["node"], line["role"], line["epoch"], line["in_sync"]) == (
        "promote",
        "beta",
        "primary",
        8,
        True,
    )
    assert daemon.node.calls[-2] == ("promote", {"accept_data_loss": True, "force": True, "dry_run": False})
    assert cli("-q", "promote").stdout == ""


@pytest.mark.parametrize("command", ["promote", "demote"])
def test_a_dry_run_of_a_role_change_says_what_it_would_do(daemon: Daemon, cli: Any, command: str) -> None:
    done = cli(command, "-n")
    assert (done.returncode, done.stdout.startswith("beta would become ")) == (0, True)
    (line,) = lines_of(cli(command, "--dry-run", "--json").stdout)
    assert (line["op"], line["dry_run"], line["finished"]) == (command, True, True)
    assert all(facts["dry_run"] for name, facts in daemon.node.calls if name == command)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError("alpha may have more"), 12),
        (WrongRoleError("alpha is primary"), 15),
        (SplitBrainError("both wrote"), 20),
        (UnreachableError("alpha is not there"), 11),
    ],
)
def test_what_the_node_refuses_is_the_exit_code(daemon: Daemon, cli: Any, error: Exception, code: int) -> None:
    daemon.node.fails = {"promote": error}
    done = cli("promote")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"mirrorpair: {error}\n")


def test_events(daemon: Daemon, cli: Any) -> None:
    daemon.node.log.add(0.0, "role", "by hand", epoch=7, old="secondary", new="primary")
    daemon.node.log.add(1.0, "link", "heartbeat lost for 3.0 s", epoch=7, old="connected", new="silent")
    done = cli("events", "--since", "1")
    assert done.stdout == "2  1970-01-01 00:00:01Z  link  -  connected -> silent  heartbeat lost for 3.0 s\n"
    found = lines_of(cli("events", "--json").stdout)
    assert [event["seq"] for event in found] == [1, 2]
    assert {event["schema"] for event in found} == {"mirrorpair.event/1"}
    assert cli("events", "--since", "2").stdout == ""


def test_history_needs_no_daemon(cli: Any, tmp_path: Path) -> None:
    assert (done := cli("history")).returncode == 0
    assert done.stdout == done.stderr == ""
    folder = tmp_path / "beta" / "shop.beta"
    folder.mkdir(parents=True)
    Chronicle(str(folder / "history")).append(
        [
            Entry(seq=1, time_s=0.0, node="beta", epoch=7, kind="role", old="secondary", new="primary", reason="asked"),
            Entry(seq=2, time_s=1.0, node="beta", epoch=7, kind="disk", volume="data", new="failed", reason="EIO"),
        ]
    )
    assert cli("history").stdout.splitlines() == [
        "1  1970-01-01 00:00:00Z  epoch 7  role       secondary -> primary  asked",
        "2  1970-01-01 00:00:01Z  epoch 7  disk data  failed                EIO",
    ]
    found = lines_of(cli("history", "--json", "--since", "1").stdout)
    assert [(one["schema"], one["seq"], one["from"], one["to"]) for one in found] == [
        ("mirrorpair.history/1", 2, None, "failed")
    ]
    with (folder / "history").open("ab") as file:
        file.write(b"rubbish\n")
    done = cli("history")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    assert "1 damaged lines are passed over" in done.stderr
    (folder / "history").unlink()
    (folder / "history").mkdir()
    assert cli("history").returncode == 1


# --- resync


def test_a_dry_run_shows_direction_reason_and_amount_and_changes_nothing(daemon: Daemon, cli: Any) -> None:
    daemon.node.plans = [plan(), plan(volume="blobs", amount="none", source=None, target=None, bytes=0, reason="equal")]
    done = cli("resync", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "data: beta -> alpha, what is marked as differing (1.21 GiB): alpha was away (H1)",
        "blobs: nothing to do: equal (H1)",
    ]
    first, second, last = lines_of(cli("resync", "-n", "--full", "--json").stdout)
    assert (first["type"], first["source"], first["target"], first["amount"]) == ("plan", "beta", "alpha", "bitmap")
    assert second["amount"] == "none"
    assert (last["type"], last["dry_run"], last["finished"]) == ("result", True, True)
    assert calls(daemon) == ["plan_resync", "plan_resync"]


def test_everything_is_compared_when_so_planned() -> None:
    assert "everything is compared" in plan_sentence(plan(amount="full"))


@pytest.mark.parametrize("extra", [["-n"], ["-y"]])
@pytest.mark.parametrize(("amount", "code"), [("split-brain", 20), ("unrelated", 20), ("refuse", 12)])
def test_what_must_not_be_resynced_is_shown_and_refused(
    daemon: Daemon, cli: Any, amount: str, code: int, extra: list[str]
) -> None:
    daemon.node.plans = [plan(amount="none"), plan(amount=amount, source=None, target=None, reason="alpha and beta")]
    done = cli("resync", "data", *extra)
    assert done.returncode == code
    assert "alpha and beta" in done.stderr
    assert ("data: nothing to do" in done.stdout) == (extra == ["-n"])
    assert calls(daemon) == ["plan_resync"]


def test_resync_starts_and_returns(daemon: Daemon, cli: Any) -> None:
    daemon.node.plans = [plan()]
    done = cli("resync", "data", "-y", "--full")
    assert (done.returncode, done.stdout) == (0, "the resync is under way\n")
    assert "mirrorpair: data: beta -> alpha" in done.stderr
    assert ("resync", {"volume": "data", "full": True}) in daemon.node.calls


def test_resync_waits_with_progress(daemon: Daemon, config: Path) -> None:
    daemon.node.plans = [plan()]
    daemon.node.on_resync = lambda node: setattr(node, "facts", resyncing())
    with running("-c", config, "--node", "beta", "resync", "data", "-y", "--wait", "--json") as program:
        line = json.loads(program.out.wait_for('"progress"') and program.out.lines[-1])
        assert line["done_bytes"] == 2899102924
        assert line["finished"] is False
        daemon.change(status())
        assert program.process.wait(LIMIT_S) == 0
        last = json.loads(program.out.rest()[-1])
        assert (last["type"], last["in_sync"], last["finished"]) == ("result", True, True)
        assert "skipped (equal)" in last["message"]


def test_who_stops_looking_does_not_stop_the_resync(daemon: Daemon, config: Path) -> None:
    daemon.node.plans = [plan()]
    daemon.node.on_resync = lambda node: setattr(node, "facts", resyncing())
    with running("-c", config, "--node", "beta", "resync", "data", "-y", "--wait") as program:
        daemon.until(lambda: "wait_for" in calls(daemon))
        assert program.end(signal.SIGINT) == 130
        assert "goes on" in program.err.rest()[-1]
    daemon.until(lambda: daemon.node.cancelled == ["wait_for"])
    assert daemon.node.finished == ["resync"]


@pytest.mark.parametrize(("answer", "code", "resynced"), [(b"y\n", 0, True), (b"n\n", 1, False)])
def test_a_terminal_is_asked(daemon: Daemon, config: Path, answer: bytes, code: int, resynced: bool) -> None:
    daemon.node.plans = [plan()]
    main, terminal = pty.openpty()
    command = [*MIRRORPAIR, "-c", str(config), "--node", "beta", "resync", "data"]
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=environment()
    ) as process:
        os.close(terminal)
        seen = _read_until(main, rb"alpha\?.*: ")
        assert b"beta -> alpha" in seen
        os.write(main, answer)
        with contextlib.suppress(OSError):
            while os.read(main, 65536):
                pass
        assert process.wait(LIMIT_S) == code
    os.close(main)
    assert ("resync" in calls(daemon)) == resynced


def test_a_bar_on_a_terminal(daemon: Daemon, config: Path) -> None:
    daemon.node.plans = [plan()]
    daemon.node.on_resync = lambda node: setattr(node, "facts", resyncing())
    seen = _on_a_terminal(
        ["-c", config, "--node", "beta", "resync", "data", "--wait", "-y"], until=rb"69\.2 %.*skipped \(equal\)"
    )
    assert "212 MiB/s" in seen
    assert "eta 0:0" in seen


def test_the_lines_are_those_of_the_contract() -> None:
    fields = {"op", "done_bytes", "total_bytes", "skipped_bytes", "sent_bytes", "rate", "eta_s", "finished"}
    assert fields <= set(OnlineLine.__struct_fields__)
    assert set(ResyncPlan.__struct_fields__) <= set(PlanLine.__struct_fields__)
    assert "finished" in ResultLine.__struct_fields__


def test_r11_volumes_that_are_done_stay_counted() -> None:
    both = [msgspec.structs.replace(resyncing().volumes[0], name=name) for name in ("a", "b")]  # each 69.2 % of 3.9 GiB
    totals = Totals()
    assert totals.update(Working(op="resync", seconds=0.0, volumes=[volume("a"), volume("b")])) is None
    assert totals.summary(1.0) == ""
    first = totals.update(Working(op="resync", seconds=1.0, volumes=both))
    second = totals.update(Working(op="resync", seconds=2.0, volumes=[volume("a"), both[1]]))
    last = totals.update(Working(op="resync", seconds=3.0, volumes=[volume("a"), volume("b")]))
    assert first is not None
    assert second is not None
    assert last is not None
    assert first.total_bytes == second.total_bytes == last.total_bytes == 2 * 4187593113
    assert first.done_bytes < second.done_bytes < last.done_bytes == last.total_bytes
    assert (last.rate, last.eta_s) == (0.0, 0.0)


# --- the daemon's log


def record(message: str, *arguments: object, created: float = 1.5, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("mirrorpair.x", logging.INFO, "f", 1, message, arguments, None)
    made.created = created
    made.__dict__.update(more)
    return made


def test_a_log_line_is_one_line() -> None:
    nasty = record("the peer said %s", "a\n2026 forged \x1b[31m")
    assert PlainFormatter().format(nasty) == ("1970-01-01T00:00:01.500Z the peer said a\\x0a2026 forged \\x1b[31m")
    assert json.loads(JsonFormatter().format(nasty))["message"] == "the peer said a\\x0a2026 forged \\x1b[31m"


def test_a_json_log_line_has_the_event_and_cannot_be_overwritten_by_it() -> None:
    line = json.loads(JsonFormatter().format(record("m", event={"kind": "role", "message": "other", "seq": 3})))
    assert (line["kind"], line["seq"], line["message"], line["type"]) == ("role", 3, "m", "log")


def test_no_message_is_repeated_more_than_a_few_times_a_second() -> None:
    repeat = RepeatFilter()
    shown = [record("connection from %s", number, created=5.0 + number / 1000) for number in range(500)]
    assert sum(bool(repeat.filter(one)) for one in shown) == 5
    assert repeat.filter(record("something else", created=5.5))
    later = record("connection from %s", 500, created=6.0)
    assert repeat.filter(later)
    assert PlainFormatter().format(later).endswith("connection from 500 (495 more like it were left out)")


def test_messages_that_are_nothing_but_their_value_are_counted_one_by_one() -> None:
    """The sentences of the role decisions: none may be left out because there were others."""
    repeat = RepeatFilter()
    records = [logging.LogRecord("mirrorpair", logging.INFO, "", 0, "%s", (f"step {n}",), None) for n in range(50)]
    for record in records:
        record.created = 1000.0
    assert all(repeat.filter(record) for record in records)


# --- a terminal


def _read_until(fd: int, pattern: bytes) -> bytes:
    seen = b""
    while not re.search(pattern, seen, re.DOTALL):
        assert select.select([fd], [], [], LIMIT_S)[0], seen
        piece = os.read(fd, 65536)
        assert piece, seen
        seen += piece
    return seen


def _on_a_terminal(args: list[object], *, until: bytes) -> str:
    """Runs with stdout and stderr a terminal until the pattern was seen on it, then interrupts."""
    main, terminal = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="140", PYTHONIOENCODING="utf-8")
    env.pop("NO_COLOR", None)
    with subprocess.Popen(
        [*MIRRORPAIR, *map(str, args)], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=env
    ) as process:
        os.close(terminal)
        try:
            seen = _read_until(main, until)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
                while piece := os.read(main, 65536):
                    seen += piece
            assert process.wait(LIMIT_S) == 130
        finally:
            process.kill()
            os.close(main)
    return seen.decode()
