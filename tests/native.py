"""C programs of the tests, compiled together with the core's own sources, plainly or under sanitizers.

Rules:
- The sources are compiled once for each flavour in a run; a warning in a source of ours fails the test.
- What this machine lacks (the compiler, a sanitizer's runtime) skips with its name; a program that does nothing finds
  it out.
- A program's random seed is an argument, so that a failure can be repeated; none depends on speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

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


THREAD = Flavour("gcc", ("-fsanitize=thread",))
ADDRESS = Flavour("gcc", UNDEFINED)
FUZZER = Flavour(
    "clang",
    (*UNDEFINED, "-fsanitize=fuzzer"),
    "int LLVMFuzzerTestOneInput(const char *d, long n) { return (void)d, (void)n, 0; }",
)
# The sources switch the instruction set by a pragma of GCC's; clang is told by its flags.
CLANG_FLAGS = {
    "digest_avx2.c": ("-mavx2", "-Wno-unknown-pragmas"),
    "digest_avx512.c": ("-mavx512f", "-Wno-unknown-pragmas"),
}
# What tests/fuzz/onethread.c stands in for.
ONETHREAD_WRAPS = tuple(
    f"-Wl,--wrap={name}"
    for name in (
        "pthread_create",
        "pthread_join",
        "clock_gettime",
        "epoll_wait",
        "mp_pool_start",
        "mp_pool_stop",
        "mp_pool_submit",
        "mp_pool_take",
    )
)
FLAVOURS = {"thread": THREAD, "address": ADDRESS}
# For a module's pytestmark: these programs bring their sanitizers, Python only starts them.
NOT_SANITIZED = pytest.mark.not_sanitized(
    "its programs bring their own sanitizers, and no other code of ours runs in it"
)


def each_flavour(group: str, flavours: Iterable[str] = tuple(FLAVOURS)) -> list[object]:
    """For parametrize: the tests of one flavour share what is compiled, hence a worker."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"{group}-{name}")) for name in flavours]


def environment() -> dict[str, str]:
    """Without what a run of these tests under sanitizers adds for Python itself. A program ends with its first race:
    one that goes on with a queue that was spoilt by it may wait for ever."""
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and "SAN_OPTIONS" not in name}
    return plain | {"TSAN_OPTIONS": "halt_on_error=1"}


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
        self.programs: dict[tuple[tuple[tuple[Path, ...], Path | None], Flavour], Program] = {}

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
        target = Path(tempfile.mkdtemp(prefix="object-", dir=self.folder), f"{source.stem}.o")
        includes = [f"-I{folder}" for folder in INCLUDES]
        more = CLANG_FLAGS.get(source.name, ()) if flavour.compiler == "clang" else ()
        done = call(flavour.compiler, *FLAGS, *flavour.flags, *more, *includes, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        assert "warning:" not in done.stderr, done.stderr
        return target

    def compile_all(self, sources: tuple[Path, ...], flavour: Flavour) -> list[Path]:
        missing = [source for source in sources if (source, flavour) not in self.objects]
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            made = threads.map(lambda source: self.compile(source, flavour), missing)
            for source, target in zip(missing, made, strict=True):
                self.objects[source, flavour] = target
        return [self.objects[source, flavour] for source in sources]

    def program(
        self, flavour: Flavour, *sources: Path, link: tuple[str, ...] = (), changed: Path | None = None
    ) -> Program:
        """These sources and the whole core; the first one names it. `link`: flags for the linker; `changed` stands in
        for the core's source of that name."""
        key = (sources, changed)
        if (key, flavour) not in self.programs:
            prefix = self.prefix(flavour)
            core = [changed if changed and path.name == changed.name else path for path in sorted(SOURCES.glob("*.c"))]
            objects = self.compile_all((*sources, *core), flavour)
            target = Path(tempfile.mkdtemp(prefix="program-", dir=self.folder), sources[0].stem)
            done = call(flavour.compiler, *FLAGS, *flavour.flags, *link, *objects, "-o", target)
            assert done.returncode == 0, done.stderr
            self.programs[key, flavour] = Program(target, prefix)
        return self.programs[key, flavour]
