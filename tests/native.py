"""C programs of the tests, compiled together with the core's own sources, plainly or under sanitizers.

Rules:
- The sources are compiled once for each flavour in a run; a warning in a source of ours fails the test.
- What this machine lacks (the compiler, a sanitizer's runtime) skips with its name; it is found out by a program that does
  nothing.
- A program's random seed is an argument, so that a failure can be repeated; none depends on speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
INCLUDES = (SOURCES, HERE / "c", HERE / "fuzz")
FLAGS = ("-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-UNDEBUG", "-pthread", "-fno-omit-frame-pointer")
UNDEFINED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
LIMIT_S = 600


class Flavour(NamedTuple):
    compiler: str
    flags: tuple[str, ...] = ()
    main: str = "int main(void) { return 0; }"


PLAIN = Flavour("gcc")
THREAD = Flavour("gcc", ("-fsanitize=thread",))
ADDRESS = Flavour("gcc", UNDEFINED)
FUZZER = Flavour(
    "clang",
    (*UNDEFINED, "-fsanitize=fuzzer"),
    "int LLVMFuzzerTestOneInput(const char *d, long n) { return (void)d, (void)n, 0; }",
)
FLAVOURS = {"plain": PLAIN, "thread": THREAD, "address": ADDRESS}


def environment() -> dict[str, str]:
    """Without what a run of these tests under sanitizers adds for Python itself."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and "SAN_OPTIONS" not in name}


def call(*command: object, cwd: Path | None = None, timeout: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
        timeout=timeout,
        env=environment(),
        cwd=cwd,
    )


class Program(NamedTuple):
    path: Path
    prefix: tuple[str, ...]

    def __call__(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return call(*self.prefix, self.path, *arguments, cwd=cwd)

    def passes(self, *arguments: object, cwd: Path | None = None) -> str:
        done = self(*arguments, cwd=cwd)
        words = " ".join(str(argument) for argument in arguments)
        assert done.returncode == 0, (
            f"{self.path.name} {words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout


class Native:
    """Compiles in one folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefixes: dict[Flavour, tuple[str, ...]] = {}
        self.objects: dict[tuple[Path, Flavour], Path] = {}
        self.programs: dict[tuple[tuple[Path, ...], Flavour], Program] = {}

    def prefix(self, flavour: Flavour) -> tuple[str, ...]:
        """What a program of that flavour is started with; skips where it cannot be built or started."""
        if flavour not in self.prefixes:
            if shutil.which(flavour.compiler) is None:
                pytest.skip(f"{flavour.compiler} is not installed")
            folder = Path(tempfile.mkdtemp(prefix="probe-", dir=self.folder))
            source, target = folder / "probe.c", folder / "probe"
            source.write_text(flavour.main + "\n")
            if call(flavour.compiler, *FLAGS, *flavour.flags, source, "-o", target).returncode:
                pytest.skip(f"{flavour.compiler} has no runtime for {' '.join(flavour.flags)} here")
            # Some kernels place mappings where an older thread sanitizer does not expect them.
            tries: list[tuple[str, ...]] = [(), *([(setarch, "-R")] if (setarch := shutil.which("setarch")) else [])]
            once = ("-runs=1",) if flavour == FUZZER else ()
            working = [prefix for prefix in tries if call(*prefix, target, *once).returncode == 0]
            if not working:
                pytest.skip(f"programs with {' '.join(flavour.flags)} do not start here")
            self.prefixes[flavour] = working[0]
        return self.prefixes[flavour]

    def compile(self, source: Path, flavour: Flavour) -> Path:
        if (source, flavour) not in self.objects:
            target = self.folder / f"{len(self.objects)}-{source.stem}.o"
            includes = [f"-I{folder}" for folder in INCLUDES]
            done = call(flavour.compiler, *FLAGS, *flavour.flags, *includes, "-c", source, "-o", target)
            assert done.returncode == 0, done.stderr
            assert "warning:" not in done.stderr, done.stderr
            self.objects[source, flavour] = target
        return self.objects[source, flavour]

    def program(self, flavour: Flavour, *sources: Path) -> Program:
        """These sources and the whole core; the first one names it."""
        if (sources, flavour) not in self.programs:
            prefix = self.prefix(flavour)
            objects = [self.compile(source, flavour) for source in (*sources, *sorted(SOURCES.glob("*.c")))]
            target = Path(tempfile.mkdtemp(prefix="program-", dir=self.folder), sources[0].stem)
            done = call(flavour.compiler, *FLAGS, *flavour.flags, *objects, "-o", target)
            assert done.returncode == 0, done.stderr
            self.programs[sources, flavour] = Program(target, prefix)
        return self.programs[sources, flavour]
