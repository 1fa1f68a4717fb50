"""The sdist holds all that a build needs, the wheel all that a run needs, and a missing header is told in one
sentence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mirrorpair

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.xdist_group("packaging"),
    pytest.mark.not_sanitized("it builds the real packages, which are no sanitized ones"),
]

OLDEST_SETUPTOOLS = 77
HEADER_SENTENCE = (
    "error: xxhash.h is missing: install xxHash's header (Debian package libxxhash-dev), then build again."
)
TOP_LEVEL = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "mirrorpair", "csrc", "bench", "tests"}


@pytest.fixture(scope="module")
def tree(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as a checkout has them, so that no build touches the real ones."""
    for module in ("build", "Cython", "cffi"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < OLDEST_SETUPTOOLS:
        pytest.skip(f"setuptools is older than {OLDEST_SETUPTOOLS}")
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", ".pytest_cache", ".hypothesis", ".benchmarks", "results")
    for name in [*sorted(TOP_LEVEL), ".ci"]:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, copy / name, ignore=ignore)
        elif (repository / name).exists():
            shutil.copy2(repository / name, copy / name)
    return copy


def environment(**more: str) -> dict[str, str]:
    """Without what a run under sanitizers adds: the packages made here are always the real ones."""
    kept = {name: value for name, value in os.environ.items() if name not in {"MIRRORPAIR_SANITIZE", "LD_PRELOAD"}}
    return {**kept, **more}


def build(*arguments: str, folder: Path) -> None:
    """`python -m build`, without a network: with the setuptools, Cython and cffi that are installed here."""
    command = [sys.executable, "-W", "default", "-m", "build", "--no-isolation", *arguments, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build("--sdist", "--outdir", str(folder), folder=tree)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build("--wheel", "--outdir", str(folder), folder=unpacked)
    (made,) = folder.iterdir()
    return made


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


def test_the_version_is_said_once_and_the_same_everywhere(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mirrorpair.__version__ == project["version"]


def test_the_top_level_is_as_agreed(repository: Path) -> None:
    tracked = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in tracked.stdout.split("\0") if name}
    assert {top for top in tops if not top.startswith(".")} <= TOP_LEVEL


def test_the_sdist_is_named_as_the_project(sdist: Path) -> None:
    assert sdist.name == f"mirrorpair-{mirrorpair.__version__}.tar.gz"


def test_every_source_is_in_the_sdist(tree: Path, unpacked: Path) -> None:
    wanted = {
        path.relative_to(tree)
        for folder in ("csrc", "mirrorpair", "tests", "bench", ".ci")
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    wanted |= {Path(name) for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE")}
    there = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in wanted if path.suffix in {".h", ".c", ".pyx", ".pxd", ".cdef"}} != set()
    assert wanted - there == set()


def test_the_sdist_carries_no_generated_c_and_nothing_compiled(unpacked: Path) -> None:
    files = [path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix in {".so", ".o", ".pyc"} or "build" in path.parts] == []
    assert [path for path in files if path.suffix == ".c" and path.parts[0] == "mirrorpair"] == []


def test_the_archive_does_not_tell_who_made_it(sdist: Path) -> None:
    home = str(Path.home()).encode()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is not None and len(home) > 1 and member.name.endswith(("PKG-INFO", "SOURCES.txt", "setup.cfg")):
                assert home not in file.read()


@pytest.mark.slow
def test_the_wheel_from_the_sdist_fits_every_python_from_3_11(wheel: Path) -> None:
    assert re.fullmatch(rf"mirrorpair-{re.escape(mirrorpair.__version__)}-cp311-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Tag: cp311-abi3-" in archive.read(about).decode()


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_needs_and_no_source_of_the_core(tree: Path, wheel: Path) -> None:
    there = names(wheel)
    modules = {str(path.relative_to(tree)) for path in (tree / "mirrorpair").rglob("*.py*") if path.suffix != ".pyx"}
    assert modules | {"mirrorpair/py.typed", "mirrorpair/_core.abi3.so", "mirrorpair/_linux.abi3.so"} <= there
    assert {name.split("/")[0] for name in there if ".dist-info/" not in name} == {"mirrorpair"}
    assert [name for name in there if name.endswith((".c", ".h", ".pyx", ".pxd"))] == []


@pytest.mark.slow
def test_the_wheel_says_its_licence_its_needs_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(about["METADATA"]).decode()
        assert "License-Expression: Apache-2.0" in metadata
        assert "Requires-Python: >=3.11" in metadata
        needs = re.findall(r"^Requires-Dist: ([\w-]+)(?![^\n]*extra)", metadata, re.MULTILINE)
        assert sorted(needs) == ["cffi", "click", "msgspec", "rich"]
        assert "mirrorpair = mirrorpair.cli:main" in archive.read(about["entry_points.txt"]).decode()
        assert "licenses/LICENSE" in about


@pytest.mark.slow
def test_the_compiled_modules_ask_the_system_for_nothing_but_libc(
    wheel: Path, tmp_path: Path, need_tool: Callable[[str], str]
) -> None:
    readelf = need_tool("readelf")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("mirrorpair/_core.abi3.so", "mirrorpair/_linux.abi3.so"):
            library = archive.extract(name, tmp_path)
            shown = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
            needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", shown)
            assert {re.split(r"[-.]", lib)[0] for lib in needed} <= {"libc", "libpthread", "ld"}
            symbols = subprocess.run([readelf, "-W", "--dyn-syms", library], capture_output=True, text=True, check=True)
            # -fvisibility=hidden: nothing of ours can meet another library's symbols in one process.
            defined = re.findall(r"(?:GLOBAL|WEAK) +DEFAULT +\d+ (\S+)", symbols.stdout)
            assert defined == [f"PyInit_{Path(name).name.split('.')[0]}"]


@pytest.mark.slow
def test_the_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    script = (
        "import mirrorpair, mirrorpair._core, mirrorpair.linux as l; print(mirrorpair.__file__); l.clock_boottime_ns()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(target)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))


# A missing header


@pytest.fixture
def without_header(tmp_path: Path, need_tool: Callable[[str], str]) -> str:
    """CPPFLAGS for a compiler that finds every system header but xxhash.h."""
    shown = subprocess.run(
        [need_tool("cc"), "-E", "-v", "-x", "c", "-"], input="", capture_output=True, text=True, check=True
    ).stderr
    start, end = "#include <...> search starts here:\n", "End of search list."
    folders = [line.strip() for line in shown.split(start)[1].split(end)[0].splitlines()]
    flags = ["-nostdinc"]
    for number, folder in enumerate(folders):
        shadow = tmp_path / f"include-{number}"
        shadow.mkdir()
        for entry in Path(folder).iterdir():
            if entry.name not in {"xxhash.h", "xxh3.h"}:
                (shadow / entry.name).symlink_to(entry)
        flags += ["-isystem", str(shadow)]
    return " ".join(flags)


def sentence_alone(output: str) -> None:
    lines = [line.strip() for line in output.splitlines()]
    assert lines.count(HEADER_SENTENCE) == 1
    assert "Traceback" not in output
    assert [line for line in lines if "fatal error" in line] == []


def test_a_missing_header_stops_the_build_with_one_sentence(tree: Path, without_header: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "build/missing"],
        cwd=tree,
        env=environment(CPPFLAGS=without_header),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    sentence_alone(done.stdout + done.stderr)
    assert done.stderr.strip().splitlines()[-1] == HEADER_SENTENCE


def test_a_missing_header_is_told_under_pip_too(tree: Path, without_header: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "wheels"), str(tree)],
        env=environment(CPPFLAGS=without_header),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    sentence_alone(done.stdout + done.stderr)


def test_a_missing_compiler_is_not_mistaken_for_a_missing_header(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "build/no-compiler"],
        cwd=tree,
        env=environment(CC="no-such-compiler"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr
    assert "xxhash.h is missing" not in done.stderr
    assert "Traceback" not in done.stderr


def test_sanitizers_reach_every_call_of_the_compiler(tree: Path, tmp_path: Path) -> None:
    log, compiler = tmp_path / "log", tmp_path / "cc"
    compiler.write_text(
        f"""#!/bin/sh
echo "$@" >> '{log}'
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
    )
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force", "--build-temp", "build/sanitized"]
    subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")],
        cwd=tree,
        env=environment(CC=str(compiler), LDSHARED=f"{compiler} -shared", MIRRORPAIR_SANITIZE="address"),
        check=True,
        capture_output=True,
    )
    calls = [line.split() for line in log.read_text().splitlines()]
    compiling = [call for call in calls if "-c" in call]
    linking = [call for call in calls if "-shared" in call]
    assert len(compiling) == len(list((tree / "csrc").glob("*.c"))) + 2
    assert len(linking) == 2
    for call in compiling:
        assert {"-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-std=c11", "-fvisibility=hidden"} <= set(call)
        # The last one counts, and Python's own flags come first.
        assert [flag for flag in call if flag.startswith("-O")][-1] == "-O1"
        assert [flag for flag in call if flag in ("-fwrapv", "-fno-wrapv")][-1] == "-fno-wrapv"
        assert [flag for flag in call if flag in ("-DNDEBUG", "-UNDEBUG")][-1] == "-UNDEBUG"
    assert all("-fsanitize=address" in call for call in linking)
