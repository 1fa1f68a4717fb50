"""The commands as people and scripts call them: grammar, exit codes, output, JSON, help, completion."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from farside import LIMIT_S, MIRRORPAIR, environment, fake_ssh, run_cli, running, serving, write_script

import mirrorpair
from mirrorpair.cli import COMMANDS, run
from mirrorpair.cli.progress import ProgressLine, ResyncLine, VerifyLine, sentence
from mirrorpair.report import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import LoopDevice, MakeImage

KIB = 1024
BIG = 40 << 20  # takes four seconds at the rate it is copied with


@pytest.fixture
def pair(make_image: MakeImage) -> tuple[Path, Path]:
    """Two images of 1 MiB that differ in two places: 4 KiB and 8 KiB."""
    base = {offset: bytes([offset >> 16 & 255 | 1]) * 65536 for offset in range(0, 1024 * KIB, 65536)}
    source = make_image("a.img", 1024 * KIB, {**base, 64 * KIB: b"A" * 4096, 512 * KIB: b"B" * 8192})
    target = make_image("b.img", 1024 * KIB, base)
    for offset, length in ((64 * KIB, 4096), (512 * KIB, 8192)):  # the rest of these blocks is equal
        with source.open("r+b") as file, target.open("rb") as other:
            other.seek(offset + length)
            file.seek(offset + length)
            file.write(other.read(65536 - length))
    return source, target


def lines_of(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


# --- grammar


def test_the_version() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"mirrorpair {mirrorpair.__version__}\n")


def test_the_console_script_is_the_same_command() -> None:
    script = shutil.which("mirrorpair", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("mirrorpair is not installed")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mirrorpair {mirrorpair.__version__}\n"


@pytest.mark.parametrize("arguments", [("--json", "resync"), ("resync", "--json"), ("-v", "--json", "resync", "-v")])
def test_common_options_work_before_and_after_the_subcommand(
    pair: tuple[Path, Path], arguments: tuple[str, ...]
) -> None:
    done = run_cli(*arguments, *pair)
    assert done.returncode == 0
    assert lines_of(done.stdout)[-1]["finished"] is True


def test_options_may_stand_between_and_behind_the_images(pair: tuple[Path, Path]) -> None:
    done = run_cli("resync", pair[0], "--dry-run", pair[1], "--json")
    assert lines_of(done.stdout)[-1]["dry_run"] is True


@pytest.mark.parametrize("count", [0, 1])
def test_the_online_form_of_verify_says_that_it_is_not_built_yet(count: int) -> None:
    done = run_cli("verify", *["data"][:count])
    assert done.returncode == 2
    assert "not built yet" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["resnyc", "a", "b"],
        ["resync", "a", "b", "c"],
        ["verify", "a", "b", "c"],
        ["resync", "a", "b", "--full"],
        ["verify", "a", "b", "--repair"],
        ["resync", "a", "b", "--rate", "fast"],
        ["resync", "a", "b", "--block-size", "3KiB"],
        ["resync", "a", "b", "--block-size", "512KiB"],
        ["resync", "a", "b", "--timeout", "never"],
        ["resync", "a", "b", "--timeout", "0"],
        ["resync", "a", "b", "--threads", "-1"],
        ["resync", "a", "b", "--threads", "1000"],
        ["resync", "ssh://a/x", "tcp://b:1/y"],
        ["resync", "http://a/x", "y"],
        ["resync", "", "y"],
        ["serve"],
        ["serve", "--stdio", "--listen", "127.0.0.1:0"],
        ["serve", "--listen", "127.0.0.1:0"],
        ["serve", "--listen", "nowhere", "--allow", "/tmp"],
        ["serve", "--stdio", "--insecure"],
        ["completion"],
        ["completion", "tcsh"],
        ["--no-such-option"],
    ],
)
def test_wrong_arguments_exit_2_without_a_traceback(tmp_path: Path, arguments: list[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    done = subprocess.run(
        [*MIRRORPAIR, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_misspelt_command_gets_a_suggestion() -> None:
    assert "did you mean resync?" in run_cli("resnyc").stderr


@pytest.mark.parametrize("place", [("--json", "resync", "a"), ("resync", "a", "--json"), ("--json", "nonsense")])
def test_a_usage_error_is_json_too(place: tuple[str, ...]) -> None:
    done = run_cli(*place)
    assert done.returncode == 2
    error = lines_of(done.stdout)[-1]
    assert (error["type"], error["code"]) == ("error", 2)
    assert done.stderr == ""


def test_yes_is_accepted_and_not_needed(pair: tuple[Path, Path]) -> None:
    assert run_cli("resync", "-y", *pair).returncode == 0


# --- what the commands do


def test_resync_makes_the_target_equal(pair: tuple[Path, Path]) -> None:
    source, target = pair
    assert run_cli("verify", source, target).returncode == 1
    done = run_cli("resync", source, target, "--verify")
    assert done.returncode == 0
    assert "12.0 KiB written" in done.stdout
    assert "read back" in done.stdout
    assert source.read_bytes() == target.read_bytes()
    done = run_cli("verify", source, target)
    assert done.returncode == 0
    assert done.stdout.startswith("equal: ")


def test_resync_json_lines(pair: tuple[Path, Path]) -> None:
    last = lines_of(run_cli("resync", *pair, "--json", "--verify").stdout)[-1]
    assert last["type"] == "progress"
    assert last["op"] == "resync"
    assert last["finished"] is True
    assert last["done_bytes"] == last["total_bytes"] == 1024 * KIB
    assert last["skipped_bytes"] == 1024 * KIB - 12 * KIB
    assert last["sent_bytes"] == last["written_bytes"] == last["differing_bytes"] == 12 * KIB
    assert last["differing_blocks"] == 2
    assert last["eta_s"] == 0
    assert last["seconds"] > 0
    assert last["verified"] is True


def test_dry_run_says_where_and_writes_nothing(pair: tuple[Path, Path]) -> None:
    source, target = pair
    before, stamp = target.read_bytes(), target.stat().st_mtime_ns
    done = run_cli("resync", "--dry-run", "--json", source, target)
    assert done.returncode == 0
    *differences, last = lines_of(done.stdout)
    assert differences == [
        {"type": "difference", "offset": 64 * KIB, "length": 4096},
        {"type": "difference", "offset": 512 * KIB, "length": 8192},
    ]
    assert last["dry_run"] is True
    assert last["written_bytes"] == 0
    assert last["differing_bytes"] == 12 * KIB
    people = run_cli("resync", "-n", source, target)
    assert people.returncode == 0
    assert "at 65536: 4096 bytes" in people.stdout
    assert (target.read_bytes(), target.stat().st_mtime_ns) == (before, stamp)


def test_verify_json_lists_differences(pair: tuple[Path, Path]) -> None:
    done = run_cli("verify", "--json", *pair)
    assert done.returncode == 1
    *differences, last = lines_of(done.stdout)
    assert [(d["offset"], d["length"]) for d in differences] == [(64 * KIB, 4096), (512 * KIB, 8192)]
    assert last["equal"] is False
    assert last["op"] == "verify"
    assert last["differing_blocks"] == 2


def test_block_size_is_what_blocks_are_counted_in(pair: tuple[Path, Path]) -> None:
    last = lines_of(run_cli("verify", "--json", "--block-size", "4KiB", *pair).stdout)[-1]
    assert last["differing_blocks"] == 3


def test_many_differences_are_shortened_for_people_only(tmp_path: Path, make_image: MakeImage) -> None:
    source = make_image("a.img", 1 << 20, dict.fromkeys(range(0, 1 << 20, 16384), b"x"))
    target = make_image("b.img", 1 << 20)
    short = run_cli("verify", source, target)
    assert short.stdout.count("bytes\n") == 20
    assert "and 44 more ranges" in short.stdout
    assert run_cli("verify", "-v", source, target).stdout.count("bytes\n") == 64
    assert run_cli("verify", "--json", source, target).stdout.count("difference") >= 64


def test_quiet_says_nothing_but_errors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_cli("-q", "verify", *pair)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = run_cli("resync", "-q", *pair)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_cli("-q", "verify", tmp_path / "missing", pair[0])
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_a_missing_target_is_made(pair: tuple[Path, Path], tmp_path: Path) -> None:
    new = tmp_path / "new.img"
    dry = run_cli("resync", "-n", pair[0], new)
    assert dry.returncode == 0
    assert "would be made" in dry.stdout
    assert not new.exists()
    last = lines_of(run_cli("resync", "--json", pair[0], new).stdout)[-1]
    assert last["created"] is True
    assert new.read_bytes() == pair[0].read_bytes()


# --- sizes


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097])
def test_odd_sizes_work(make_image: MakeImage, tmp_path: Path, size: int) -> None:
    source = make_image("a.img", size, {0: b"x" * size})
    assert run_cli("resync", source, tmp_path / "b.img").returncode == 0
    assert run_cli("verify", source, tmp_path / "b.img").returncode == 0
    assert (tmp_path / "b.img").read_bytes() == b"x" * size


@pytest.mark.parametrize(("ours", "theirs"), [(8192, 4096), (4096, 8192), (0, 5), (5, 0)])
def test_another_size_is_refused_unless_resize(make_image: MakeImage, ours: int, theirs: int) -> None:
    source = make_image("a.img", ours, {0: b"x" * ours})
    target = make_image("b.img", theirs, {0: b"y" * theirs})
    for extra in ([], ["-n"]):
        done = run_cli("resync", source, target, *extra)
        assert done.returncode == 12
        assert str(ours) in done.stderr
        assert str(theirs) in done.stderr
    assert target.read_bytes() == b"y" * theirs
    dry = lines_of(run_cli("resync", "-n", "--json", "--resize", source, target).stdout)
    assert dry[-1]["differing_bytes"] == ours
    assert dry[-1]["resized"] is True
    assert target.stat().st_size == theirs
    done = run_cli("resync", "--resize", source, target)
    assert done.returncode == 0
    assert f"was resized from {theirs} bytes to {ours} bytes" in done.stdout
    assert target.read_bytes() == source.read_bytes()


def test_a_far_target_is_resized_too(make_image: MakeImage, tmp_path: Path) -> None:
    source = make_image("a.img", 8192, {0: b"x" * 8192})
    target = make_image("b.img", 100_000, {0: b"y" * 100_000})
    arguments = ("resync", "--json", "--rsh", fake_ssh(tmp_path), source, f"ssh://host{target}")
    assert run_cli(*arguments).returncode == 12
    assert run_cli(*arguments, "-n").returncode == 12
    dry = lines_of(run_cli(*arguments, "-n", "--resize").stdout)[-1]
    assert (dry["resized"], dry["target_size"], target.stat().st_size) == (True, 100_000, 100_000)
    last = lines_of(run_cli(*arguments, "--resize").stdout)[-1]
    assert (last["resized"], last["target_size"], last["total_bytes"]) == (True, 100_000, 8192)
    assert target.read_bytes() == source.read_bytes()


def test_verify_of_unequal_sizes_exits_1_and_names_both(make_image: MakeImage) -> None:
    one, other = make_image("a.img", 8192, {0: b"x"}), make_image("b.img", 12289, {0: b"x"})
    done = run_cli("verify", one, other)
    assert done.returncode == 1
    assert "8192" in done.stdout
    assert "12289" in done.stdout
    last = lines_of(run_cli("verify", "--json", one, other).stdout)
    assert last[0] == {"type": "difference", "offset": 8192, "length": 4097}
    assert (last[-1]["equal"], last[-1]["a_size"], last[-1]["b_size"]) == (False, 8192, 12289)


def test_the_tail_of_a_larger_device_is_ignored_and_reported(make_image: MakeImage, loop_device: LoopDevice) -> None:
    source = make_image("a.img", 1 << 20, {5000: b"x" * 10_000})
    device = loop_device(make_image("disk.img", 2 << 20, {(1 << 20) + 7: b"tail"}))
    done = run_cli("resync", source, device, "--verify")
    assert done.returncode == 0, done.stderr
    assert "last 1048576 bytes (1.00 MiB) were left alone" in done.stdout
    done = run_cli("verify", source, device)
    assert done.returncode == 0
    assert "ignored" in done.stdout
    assert lines_of(run_cli("verify", "--json", device, source).stdout)[-1]["ignored_tail_bytes"] == 1 << 20
    with open(device, "rb") as file:
        file.seek((1 << 20) + 7)
        assert file.read(4) == b"tail"
    too_small = loop_device(make_image("small.img", 512 * KIB))
    for extra in ([], ["-n"]):
        assert run_cli("resync", source, too_small, *extra).returncode == 12


# --- bad input


def test_bad_input_has_the_contracts_exit_codes(tmp_path: Path, pair: tuple[Path, Path], closed_port: int) -> None:
    source, target = pair
    before = target.read_bytes()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    cases: list[tuple[object, object, int]] = [
        (tmp_path / "missing", target, 2),
        (tmp_path / "folder", target, 2),
        (tmp_path / "fifo", target, 2),
        ("/dev/full", target, 2),
        (source, tmp_path / "folder", 2),
        (source, tmp_path / "fifo", 2),
        (source, "/dev/full", 2),
        (source, source, 2),
        (source, tmp_path / "link", 2),
        (tmp_path / "hard", source, 2),
        (source, tmp_path / "no" / "folder.img", 2),
        (source, f"tcp://127.0.0.1:{closed_port}/x", 11),
        (source, "tcp://no-such-host.invalid:9/x", 11),
        (source, "ssh://-oProxyCommand=x/x", 2),
    ]
    for one, other, code in cases:
        for command in ("resync", "verify"):
            if command == "verify" and other == tmp_path / "no" / "folder.img":
                continue
            done = run_cli(command, one, other, "--json")
            assert done.returncode == code, (command, one, other, done.stderr, done.stdout)
            error = lines_of(done.stdout)[-1]
            assert (error["type"], error["code"]) == ("error", code)
            assert "Traceback" not in done.stderr
    assert target.read_bytes() == before


def test_an_unreadable_image_is_1_for_resync_and_3_for_verify(
    public_folder: Path,
    as_nobody: Callable[[], contextlib.AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret, other = public_folder / "secret.img", public_folder / "other.img"
    for path, mode in ((secret, 0o000), (other, 0o644)):
        path.write_bytes(b"x" * 100)
        path.chmod(mode)
    (
        import_module("mirrorpair.offline"),
        import_module("mirrorpair.cli.progress"),
    )  # nobody may not read this Python's library
    with as_nobody():
        assert run(["resync", str(secret), str(public_folder / "new.img")]) == 1
        assert run(["verify", str(secret), str(other)]) == 3
        assert run(["resync", str(other), str(secret)]) == 12
    assert "secret.img" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "code", "verify_code"),
    [
        ("exit 255", 11, 11),
        ("exit 127", 11, 11),
        ("echo hello world; cat >/dev/null", 1, 3),
        ("exec cat 3>&1 >/dev/null", 13, 13),
    ],
)
def test_a_bad_far_end_has_the_contracts_exit_codes(
    tmp_path: Path, pair: tuple[Path, Path], script: str, code: int, verify_code: int
) -> None:
    rsh = write_script(tmp_path / "rsh", script)
    arguments = ("--rsh", rsh, "--timeout", "500ms", pair[0], "ssh://host/b.img")
    assert run_cli("resync", *arguments).returncode == code
    assert run_cli("verify", *arguments).returncode == verify_code


def test_a_full_disk_is_1_and_says_what_to_do(tmpfs: Callable[..., Path], make_image: MakeImage) -> None:
    full = tmpfs("1m")
    source = make_image("a.img", 4 << 20, {offset: os.urandom(65536) for offset in range(0, 4 << 20, 65536)})
    done = run_cli("resync", source, full / "b.img")
    assert done.returncode == 1
    assert "no room" in done.stderr
    assert "make room" in done.stderr


def test_an_internal_error_is_a_sentence(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("boom\x1b[2J")

    monkeypatch.setattr("mirrorpair.offline.compare", broken)
    monkeypatch.setattr("signal.signal", lambda *_args: None)
    assert run(["verify", *map(str, pair)]) == 3
    told = capsys.readouterr().err
    assert "internal error: RuntimeError: boom\\x1b[2J" in told
    assert "Traceback" not in told


# --- far ends


def test_every_transport_and_direction(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = pair
    rsh = fake_ssh(tmp_path)
    with serving("--allow", tmp_path) as server:
        for number, (one, other, path) in enumerate(
            [
                (source, f"ssh://me@host:22{tmp_path}/t0", tmp_path / "t0"),
                (f"ssh://host{source}", tmp_path / "t1", tmp_path / "t1"),
                (source, server.url(tmp_path / "t2"), tmp_path / "t2"),
                (server.url(source), tmp_path / "t3", tmp_path / "t3"),
            ]
        ):
            done = run_cli("resync", "--verify", "--json", "--rsh", rsh, one, other)
            assert done.returncode == 0, (number, done.stderr, done.stdout)
            assert path.read_bytes() == source.read_bytes()
            last = lines_of(done.stdout)[-1]
            assert last["created"] is True
            assert last["written_bytes"] == 1024 * KIB
            assert run_cli("verify", "--rsh", rsh, one, other).returncode == 0
        with (tmp_path / "t0").open("r+b") as file:
            file.write(b"!")
        done = run_cli("verify", "--json", "--rsh", rsh, source, f"ssh://host{tmp_path}/t0")
        assert done.returncode == 1
        # Each second that it takes there is one of progress.
        found = [line for line in lines_of(done.stdout) if line["type"] != "progress"]
        assert found == [{"type": "difference", "offset": 0, "length": 4096}]
        done = run_cli("resync", "-n", "--json", "--rsh", rsh, f"ssh://host{source}", tmp_path / "t0")
        assert done.returncode == 0
        assert lines_of(done.stdout)[-1]["differing_bytes"] == 4096


def test_a_port_that_rsh_cannot_pass_on_is_mentioned(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_cli("verify", "--rsh", fake_ssh(tmp_path), pair[0], f"ssh://host:2222{pair[0]}")
    assert "2222" in done.stderr


# --- interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("far", ["local", "ssh"])
def test_an_interrupted_run_says_what_it_did_and_the_next_completes_it(
    tmp_path: Path, make_image: MakeImage, number: signal.Signals, far: str
) -> None:
    source = make_image("a.img", BIG, {offset: os.urandom(1 << 20) for offset in range(0, BIG, 1 << 20)})
    target = make_image("b.img", BIG)
    rsh = fake_ssh(tmp_path)
    place = target if far == "local" else f"ssh://host{target}"
    with running("resync", "--json", "--rate", "10MiB/s", "--rsh", rsh, source, place) as program:
        program.out.wait_for(r'"sent_bytes":\s*[1-9]')
        assert program.end(number) == 130
        *_, done, error = lines_of("\n".join(program.out.rest()))
        assert program.err.rest() == []
    assert (done["type"], done["finished"]) == ("progress", False)
    assert 0 < done["sent_bytes"] < BIG
    assert done["done_bytes"] < BIG
    assert (error["type"], error["code"]) == ("error", 130)
    assert target.read_bytes() != source.read_bytes()
    assert run_cli("resync", "--rsh", rsh, source, place).returncode == 0
    assert target.read_bytes() == source.read_bytes()


def test_an_interrupt_while_connecting_is_130(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    rsh = write_script(tmp_path / "rsh", "echo here >&2; exec cat 3>&1 >/dev/null")
    with running("resync", "--rsh", rsh, pair[0], "ssh://host/b.img") as program:
        program.err.wait_for("here")
        assert program.end(signal.SIGINT) == 130
        assert "interrupted: nothing was written" in program.err.rest()[-1]


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path, make_image: MakeImage) -> None:
    source = make_image("a.img", 64 << 20, dict.fromkeys(range(0, 64 << 20, 8192), b"x"))
    target = make_image("b.img", 64 << 20)
    command = [*MIRRORPAIR, "verify", "--json", str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait(LIMIT_S) == 3
    assert told == b""


def test_output_that_cannot_be_written_is_an_error(pair: tuple[Path, Path]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MIRRORPAIR, "verify", *map(str, pair)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment(),
        )
    assert done.returncode == 3
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


# --- progress


def test_a_terminal_gets_a_bar_that_leaves_nothing_on_stdout(tmp_path: Path, make_image: MakeImage) -> None:
    source = make_image("a.img", 1 << 20, {offset: os.urandom(65536) for offset in range(0, 1 << 20, 65536)})
    seen, done = _on_a_terminal("resync", "--rate", "1MiB/s", source, tmp_path / "b.img")
    assert done.returncode == 0
    assert "skipped (equal)" in seen
    assert "eta" in seen
    assert re.search(r"\d+\.\d %", seen)
    assert "\x1b" not in done.stdout
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h")  # the cursor is there again


@pytest.mark.parametrize(
    ("arguments", "environment"), [(["--no-color"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})]
)
def test_no_colour_when_it_is_not_wanted(
    tmp_path: Path, make_image: MakeImage, arguments: list[str], environment: dict[str, str]
) -> None:
    source = make_image("a.img", 1 << 20, {0: os.urandom(1 << 20)})
    seen, done = _on_a_terminal("resync", "--rate", "2MiB/s", *arguments, source, tmp_path / "b.img", **environment)
    assert done.returncode == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", seen)
    seen, done = _on_a_terminal("verify", *arguments, source, tmp_path / "missing", **environment)
    assert done.returncode == 2
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", seen)


def _on_a_terminal(*args: object, **options: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Runs with stderr a terminal; what the terminal saw, and the rest."""
    main, terminal = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="120")
    env.pop("NO_COLOR", None)
    try:
        process = subprocess.Popen(
            [*MIRRORPAIR, *map(str, args)], stdout=subprocess.PIPE, stderr=terminal, text=True, env=env | options
        )
    finally:
        os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
        while piece := os.read(main, 65536):
            seen += piece
    os.close(main)
    stdout, _ = process.communicate(timeout=LIMIT_S)
    return seen.decode(), subprocess.CompletedProcess(process.args, process.returncode, stdout)


def test_without_a_terminal_there_is_no_animation(pair: tuple[Path, Path]) -> None:
    done = run_cli("resync", *pair)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_progress_lines_are_calm(tmp_path: Path, make_image: MakeImage) -> None:
    source = make_image("a.img", 1 << 20, {0: os.urandom(1 << 20)})
    done = run_cli("resync", "--json", "--rate", "400KiB/s", source, tmp_path / "b.img")
    found = lines_of(done.stdout)
    assert 2 <= len(found) <= 5
    assert [line["finished"] for line in found] == [False] * (len(found) - 1) + [True]
    assert [line["done_bytes"] for line in found] == sorted(line["done_bytes"] for line in found)
    assert all(line["schema"] == "mirrorpair.progress/1" for line in found)


def test_json_lines_are_those_of_the_contract() -> None:
    fields = {"type", "op", "done_bytes", "total_bytes", "skipped_bytes", "sent_bytes", "rate", "eta_s", "finished"}
    for struct in (ProgressLine, ResyncLine, VerifyLine):
        names = {field.encode_name for field in msgspec.structs.fields(struct)} | {"type"}
        assert fields <= names
    for struct in (ResyncLine, VerifyLine):
        assert {"differing_blocks", "seconds"} <= {field.encode_name for field in msgspec.structs.fields(struct)}


def test_the_sentence_of_progress() -> None:
    progress = Progress(
        total_bytes=4187593113,
        done_bytes=2899102924,
        skipped_bytes=1780049195,
        sent_bytes=1,
        differing_bytes=1,
        written_bytes=1,
        recheck_total_bytes=0,
        recheck_done_bytes=0,
        rate=212 * 1048576.0,
        eta_s=5.8,
        seconds=13.0,
    )
    assert sentence(progress) == "69.2 %  2.70/3.90 GiB  212 MiB/s  eta 0:06  61.3 % skipped (equal)"


# --- help, completion, cost


def test_the_overview_lists_every_command_with_its_own_line() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line.split()[0])}", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_like_a_manual_page(command: str) -> None:
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: mirrorpair {command} ")
    for part in ("Options:", "Examples:", "Exit codes:"):
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert run_cli(command, "-h").stdout == done.stdout


def test_the_overview_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom mirrorpair.cli import run\nassert run(['--help']) == 0\n"
        "heavy = {'rich', 'msgspec', 'mirrorpair._core', 'mirrorpair._linux', 'cffi', '_cffi_backend', 'asyncio',"
        " 'subprocess', 'socket', 'mirrorpair.offline'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=environment())


def test_importing_the_package_loads_nothing_of_it() -> None:
    program = (
        "import sys, mirrorpair\nassert 'msgspec' not in sys.modules\n"
        "assert [name for name in sys.modules if name.startswith('mirrorpair.')] == []\n"
        "assert mirrorpair.UsageError.exit_code == 2\n"
        "assert 'mirrorpair._core' not in sys.modules\n"
        "assert callable(mirrorpair.resync) and callable(mirrorpair.compare)\n"
        "assert set(mirrorpair.__all__) <= set(dir(mirrorpair))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_every_public_name_can_be_had_and_no_other() -> None:
    for name in mirrorpair.__all__:
        assert getattr(mirrorpair, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mirrorpair.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --no-files")]
)
def test_completion_scripts(shell: str, word: str) -> None:
    done = run_cli("completion", shell)
    assert done.returncode == 0
    assert word in done.stdout
    assert "_MIRRORPAIR_COMPLETE" in done.stdout
    tool = shutil.which(shell)
    if tool is not None:
        subprocess.run([tool, "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "last", "expected"),
    [
        ("mirrorpair res", "1", "plain,resync"),
        ("mirrorpair resync --dry", "2", "plain,--dry-run"),
        ("mirrorpair verify /et", "2", "file,/et"),
    ],
)
def test_completion_answers(words: str, last: str, expected: str) -> None:
    done = run_cli(_MIRRORPAIR_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=last)
    assert expected in done.stdout.splitlines()
