"""The folder a run works in: compiled floors, images, launchers. It removes everything again.

Rules:
- The floors are compiled when they are needed, with the machine's own `cc -O3`: a benchmark must not measure an old
  build.
- At most three images of the full size exist at once; a run that does not have that room does not start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.settings import MIB, Settings, show_size

_SOURCES = Path(__file__).parent / "floors"
_FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-pthread")


class CannotRun(Exception):  # noqa: N818 - not an error: the reason a benchmark is skipped
    """Something that a subject needs is not here."""


class Failed(Exception):  # noqa: N818
    """A subject ended otherwise than it should, or left a wrong result."""


@dataclass
class Workshop:
    settings: Settings
    folder: Path
    _built: dict[str, Path | str] = field(default_factory=dict)

    @staticmethod
    def open(settings: Settings, folder: Path | None = None) -> Workshop:
        base = folder or Path(tempfile.mkdtemp(prefix="mirrorpair-bench-"))
        (base / "bin").mkdir(parents=True, exist_ok=True)
        (base / "images").mkdir(exist_ok=True)
        free = shutil.disk_usage(base).free
        needed = 3 * settings.size + 64 * MIB
        if free < needed:
            shutil.rmtree(base, ignore_errors=True)
            raise CannotRun(
                f"{show_size(free)} free in the temporary folder, {show_size(needed)} needed for three images of "
                f"{show_size(settings.size)}: set TMPDIR or MIRRORPAIR_BENCH_SIZE"
            )
        return Workshop(settings, base)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def images(self) -> Path:
        return self.folder / "images"

    # --- what is compiled here ---------------------------------------------------------------------------------------

    def program(self, name: str) -> str:
        """Path of the compiled floors/NAME.c."""
        return self._compile(name, self.folder / "bin" / name, ())

    def nosync(self) -> str:
        """Path of the library that leaves flushes out, see floors/nosync.c."""
        return self._compile("nosync", self.folder / "bin" / "nosync.so", ("-shared", "-fPIC"))

    def _compile(self, name: str, output: Path, more: tuple[str, ...]) -> str:
        built = self._built.get(name)
        if built is None:
            built = self._try_to_compile(name, output, more)
            self._built[name] = built
        if isinstance(built, str):
            raise CannotRun(built)
        return str(built)

    @staticmethod
    def _try_to_compile(name: str, output: Path, more: tuple[str, ...]) -> Path | str:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            return "no C compiler (cc) on PATH: the floors cannot be built"
        argv = [compiler, *_FLAGS, *more, str(_SOURCES / f"{name}.c"), "-o", str(output)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return output
        if "xxhash.h" in done.stderr:
            return f"floors/{name}.c needs xxhash.h (Debian: libxxhash-dev)"
        raise Failed(f"floors/{name}.c does not compile:\n{done.stderr}")

    def image_tool(self, verb: str, *arguments: object) -> list[dict[str, Any]]:
        """Runs `image VERB ...`; its JSON lines."""
        argv = [self.program("image"), verb, *map(str, arguments)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"image {verb} failed: {done.stderr.strip()}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    # --- mirrorpair --------------------------------------------------------------------------------------------------

    def mirrorpair(self) -> str:
        """Path of one executable called `mirrorpair`: the far end is started by that name."""
        found = self._built.get("mirrorpair")
        if found is None:
            found = self._find_mirrorpair()
            self._built["mirrorpair"] = found
        return str(found)

    def _find_mirrorpair(self) -> Path:
        given = self.settings.command
        here = str(Path(sys.executable).parent)
        path = given or shutil.which("mirrorpair", path=os.pathsep.join([here, os.environ.get("PATH", os.defpath)]))
        if path is None:
            raise CannotRun("no mirrorpair command beside this Python or on PATH: install the project first")
        if shutil.which(path) is None:
            raise CannotRun(f"MIRRORPAIR_BENCH_COMMAND is not an executable: {path}")
        executable = Path(shutil.which(path) or path).absolute()
        if executable.name == "mirrorpair":
            return executable
        link = self.folder / "bin" / "mirrorpair"
        link.write_text(f'#!/bin/sh\nexec "{executable}" "$@"\n', encoding="utf-8")
        link.chmod(0o755)
        return link

    def python(self) -> str:
        """The interpreter that mirrorpair's own script names: the API is measured under it."""
        with open(self.mirrorpair(), "rb") as file:
            first = file.readline(512).decode(errors="replace")
        if first.startswith("#!") and "python" in first:
            return first[2:].split()[0]
        return sys.executable

    def environment(self, *, flush: bool) -> dict[str, str]:
        """The same environment for every subject."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_", "LD_PRELOAD", "PYTHONPATH"))}
        env["LC_ALL"] = "C"
        env["PATH"] = os.pathsep.join([str(self.folder / "bin"), env.get("PATH", os.defpath)])
        with contextlib.suppress(CannotRun):  # floors and peers can be measured without it
            env["PATH"] = os.pathsep.join([str(Path(self.mirrorpair()).parent), env["PATH"]])
        if not flush:
            env["LD_PRELOAD"] = self.nosync()
        return env
