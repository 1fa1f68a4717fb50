"""Makes a virtual environment's Python one that brings the runtimes of ASan and UBSan, and reads what they reported.

    MIRRORPAIR_SANITIZE=address,undefined VENV/bin/pip install '.[test]'
    VENV/bin/python tests/sanitized.py        # VENV/bin/python is another one from then on
    VENV/bin/pytest

Rules:
- The environment's folder says it all, no variable: where it has REPORTS, its Python is a sanitized one.
- A report is counted once. Processes started by a test name the worker that runs it; one that was only forked, or sits
  behind sshd, does not, so its report fails the test that ends next.
- What cannot be built or would check nothing is an error here, never a run without sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPORTS = Path(sys.prefix) / "sanitizer-reports"
ANY = "report"  # what sanitized_python.c calls the reports of a process that nothing was told
EXTENSIONS = ("mirrorpair._core", "mirrorpair._linux")
# Defined by the runtimes, wanted by what was compiled with -fsanitize.
WITNESSES = (b"__asan_init", b"__ubsan_handle")


def active() -> bool:
    return REPORTS.is_dir()


def name_worker(worker: str) -> None:
    """From now on the reports of programs that this process starts bear this name."""
    os.environ["MIRRORPAIR_REPORTS"] = str(REPORTS / worker)


def take_reports(worker: str | None = None) -> str:
    """What this worker's processes (`*`: all workers') have reported, or nameless ones, and nobody has taken; empty is
    good."""
    found = []
    for name in (worker, ANY) if worker else (ANY,):
        for path in sorted(REPORTS.glob(f"{name}.[0-9]*")):
            if path.name.startswith("taken-"):
                continue
            taken = path.with_name(f"taken-{path.name}")
            try:
                path.rename(taken)
            except FileNotFoundError:
                continue  # by another worker
            found.append(f"{taken}:\n{taken.read_text(errors='backslashreplace')}")
    return "\n".join(found)


# --- building it


def libpython() -> list[str]:
    """What the linker needs so that a program is this Python."""
    known = sysconfig.get_config_vars()
    shared = Path(known["LIBDIR"], f"libpython{known['LDVERSION']}.so")
    if shared.exists():
        return [f"-L{shared.parent}", f"-Wl,-rpath,{shared.parent}", f"-lpython{known['LDVERSION']}"]
    for folder in (known["LIBPL"], known["LIBDIR"]):
        static = Path(folder, f"libpython{known['LDVERSION']}.a")
        if static.exists():
            needs = [word for name in ("MODLIBS", "LIBS", "SYSLIBS") for word in (known.get(name) or "").split()]
            return ["-no-pie", "-Wl,--whole-archive", str(static), "-Wl,--no-whole-archive", *needs]
    sys.exit(
        f"{sys.base_prefix}: Python {known['LDVERSION']} has neither {shared} nor a libpython{known['LDVERSION']}.a; "
        "without one of them no program can be linked that is this Python (Debian: package python3-dev)"
    )


def compile_python(target: Path) -> None:
    compiler = os.environ.get("CC", "gcc")  # setup.py's default is what Python was built with: gcc on Debian
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        program = Path(folder, "python.o")
        for command in (
            [
                "-O1",
                "-Wall",
                "-fno-omit-frame-pointer",
                f"-I{include}",
                f'-DREPORTS="{REPORTS / ANY}"',
                "-c",
                HERE / "c" / "sanitized_python.c",
            ],
            ["-fsanitize=address,undefined", "-rdynamic", program, *libpython(), "-lm"],
        ):
            output = program if "-c" in command else target
            done = subprocess.run([compiler, *command, "-o", output], check=False)
            if done.returncode:
                sys.exit(f"{compiler} cannot build a Python with the runtimes of ASan and UBSan")


def need_sanitized_extensions() -> None:
    for name in EXTENSIONS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            sys.exit(f"{name} is not installed here")
        content = Path(spec.origin).read_bytes()
        if missing := [symbol.decode() for symbol in WITNESSES if symbol not in content]:
            sys.exit(f"{spec.origin} was built without sanitizers: it does not use {', '.join(missing)}")


def main() -> None:
    if sys.prefix == sys.base_prefix:
        sys.exit("only the Python of a virtual environment can be replaced")
    need_sanitized_extensions()
    binaries = Path(sys.prefix, "bin")
    version = ".".join(map(str, sys.version_info[:2]))
    target = binaries / f"python{version}"
    made = binaries / f"python{version}.new"
    compile_python(made)
    made.rename(target)
    for name in ("python", "python3"):
        link = binaries / f"{name}.new"
        link.symlink_to(target.name)
        link.rename(binaries / name)
    REPORTS.mkdir(exist_ok=True)
    REPORTS.chmod(0o1777)  # some tests run as nobody
    for old in REPORTS.iterdir():
        old.unlink()
    told = [target, "-P", "-c", "import mirrorpair._core, mirrorpair._linux, sys; print(sys.prefix)"]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    if done.stdout.strip() != sys.prefix:
        sys.exit(f"{target} does not work:\n{done.stdout}{done.stderr}{take_reports()}")


if __name__ == "__main__":
    main()
