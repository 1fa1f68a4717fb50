"""What several test files need: loop devices, small file systems, images with known content.

Rules:
- Whatever a fixture makes in the kernel (mounts, loop devices) is taken down again, also when the test fails.
- A test that cannot run here skips and says why; CI runs as root with all tools, so there it runs.
- Tests run side by side (pytest-xdist), about two for each CPU: many wait for the disk or for another process. `-n 0`
  or the name of a single file runs them one after the other. What is dear to make is made once where its tests bear
  the same `xdist_group`.
- Under a sanitized Python (sanitized.py) a report fails the test during which it appears.
- A random test takes `rng`: its seed is in the report of a failure, and MIRRORPAIR_TEST_SEED=n repeats it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import hypothesis
import pytest
import sanitized

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

    from engineside import MakeNode

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# Programs started by tests run what is installed, not the source tree that happens to be the working folder.
os.environ["PYTHONSAFEPATH"] = "1"

# A shell without job control starts its background commands with SIGINT ignored, and everything they start inherits
# that: an interrupt would reach nobody, whoever runs these tests as `pytest &`.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
KIB = 1024
MIB = 1024 * KIB
NOBODY = 65534


# --- how the tests are run


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    if len(config.args) == 1 and not Path(config.args[0]).is_dir():
        return 0
    return min(2 * len(os.sched_getaffinity(0)), 8)


def worker_of(config: pytest.Config) -> str | None:
    workerinput: dict[str, str] = getattr(config, "workerinput", {})
    return workerinput.get("workerid")


def pytest_configure(config: pytest.Config) -> None:
    if sanitized.active() and (worker := worker_of(config)):
        sanitized.name_worker(worker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if sanitized.active() and (mark := item.get_closest_marker("not_sanitized")):
        pytest.skip(f"not under a sanitized Python: {mark.args[0]}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if sanitized.active() and (found := sanitized.take_reports(worker_of(item.config))):
            pytest.fail(f"sanitizers reported, while this test ran or one beside it:\n{found}", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was reported outside of tests, or by a worker that did not live to tell."""
    if sanitized.active() and worker_of(session.config) is None and (found := sanitized.take_reports("*")):
        print(f"\nsanitizers reported, outside of the tests:\n{found}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# --- what tests ask for


class LoopDevice(Protocol):
    def __call__(
        self, backing: Path | str, *, offset: int = 0, size: int = 0, read_only: bool = False, partitions: bool = False
    ) -> str: ...


class Mount(Protocol):
    def __call__(self, *options: str, kind: str = "tmpfs", device: str = "none") -> Path: ...


class MakeImage(Protocol):
    def __call__(self, name: str, size: int, pieces: dict[int, bytes] | None = None) -> Path: ...


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml; skips where the tests run without it."""
    if not (REPOSITORY / "pyproject.toml").exists():
        pytest.skip("the sources are not here")
    return REPOSITORY


@pytest.fixture
def need_tool() -> Callable[[str], str]:
    """`need_tool("mkfs.ext4")` is the tool's path, or skips the test."""

    def need(name: str) -> str:
        # Tools of the system's administrator are often left out of PATH.
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if found is None:
            pytest.skip(f"{name} is not installed")
        return found

    return need


@pytest.fixture
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """`make_image("a.img", size, {offset: bytes})`: a sparse file with these pieces of data in it."""

    def make(name: str, size: int, pieces: dict[int, bytes] | None = None) -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size)
            for offset, data in (pieces or {}).items():
                file.seek(offset)
                file.write(data)
        return path

    return make


@pytest.fixture
def loop_device(root: None, need_tool: Callable[[str], str]) -> Iterator[LoopDevice]:
    """Attaches files or devices to loop devices; the last one is detached first."""
    losetup = need_tool("losetup")
    attached: list[str] = []

    def attach(
        backing: Path | str, *, offset: int = 0, size: int = 0, read_only: bool = False, partitions: bool = False
    ) -> str:
        options = [*(["--read-only"] if read_only else []), *(["--partscan"] if partitions else [])]
        options += [f"--offset={offset}"] if offset else []
        options += [f"--sizelimit={size}"] if size else []
        for _ in range(100):  # another one may take the device that was found, or free it at this moment
            made = subprocess.run(
                [losetup, "--find", "--show", *options, str(backing)], capture_output=True, text=True, check=False
            )
            if not made.returncode:
                break
        else:
            pytest.skip(f"no loop device can be had: {made.stderr.strip()}")
        attached.append(made.stdout.strip())
        return attached[-1]

    try:
        yield attach
    finally:
        failed = [device for device in reversed(attached) if not _detached(losetup, device)]
        assert not failed, f"still attached: {failed}"


def _detached(losetup: str, device: str) -> bool:
    if subprocess.run([losetup, "--detach", device], capture_output=True, check=False).returncode == 0:
        return True
    return not Path("/sys/block", Path(device).name, "loop").exists()  # the test did it itself


@pytest.fixture
def mount(root: None, need_tool: Callable[[str], str], tmp_path: Path) -> Iterator[Mount]:
    """`mount("size=1m")` is a folder with a tmpfs; `kind="ext4", device=loop` mounts another file system."""
    tool, untool = need_tool("mount"), need_tool("umount")
    mounted: list[Path] = []

    def attach(*options: str, kind: str = "tmpfs", device: str = "none") -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        command = [tool, "-t", kind, *(["-o", ",".join(options)] if options else []), device, str(folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"{kind} cannot be mounted: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        yield attach
    finally:
        failed = [folder for folder in reversed(mounted) if not _unmounted(untool, folder)]
        assert not failed, f"still in use, now detached: {failed}"


def _unmounted(untool: str, folder: Path) -> bool:
    if subprocess.run([untool, str(folder)], capture_output=True, check=False).returncode == 0:
        return True
    subprocess.run([untool, "--lazy", str(folder)], capture_output=True, check=False)
    return False


@pytest.fixture
def tmpfs(mount: Mount) -> Callable[..., Path]:
    """`tmpfs("1m")` is a folder of a file system of that size, `tmpfs("1m", "nr_inodes=2")` with further options."""

    def make(size: str = "1m", *options: str) -> Path:
        return mount(f"size={size}", *options)

    return make


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="mirrorpair-test-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def as_nobody() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with as_nobody():` runs without root's rights, for which every file is readable and writable."""

    @contextlib.contextmanager
    def switch() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        groups, group = os.getgroups(), os.getegid()
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(group)
            os.setgroups(groups)

    return switch


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    """`make_node("a", SIZE, ...)`: an engine with its images (engineside.py), killed at the end of the test."""
    from engineside import BLOCK, Node

    made: list[Node] = []

    def make(name: str, *sizes: int, block: int = BLOCK, resync_rate: int = 0) -> Node:
        made.append(Node(tmp_path, name, sizes or (16 * MIB,), block, resync_rate))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this host that nobody listens on."""
    from farside import held_port

    with held_port() as port:
        yield port


@pytest.fixture
def rng() -> random.Random:
    """Random numbers whose seed is told: pytest shows what a failed test printed."""
    seed = int(os.environ.get("MIRRORPAIR_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"repeat with MIRRORPAIR_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def never_blocks() -> Iterator[None]:
    """Fails a test that hangs in a system call, instead of hanging with it."""

    def ring(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise AssertionError("blocked for 30 s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def open_descriptors() -> Callable[[], set[int]]:
    """The descriptors that this process has open, to tell that none leaked."""
    return lambda: {int(name) for name in os.listdir("/proc/self/fd")} - {_listing()}


def _listing() -> int:
    """The number that reading /proc/self/fd itself takes: the lowest free one."""
    fd = os.open("/proc/self", os.O_RDONLY)
    os.close(fd)
    return fd
