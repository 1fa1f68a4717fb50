"""The C journal (csrc/journal.h): rules M3-M8, W7, R2 and R3 on disks that are cut off, torn, damaged or made to fail.

Rules:
- The programs of tests/c are compiled here together with the journal's sources: plainly, and under sanitizers.
- `journal_model` compares random histories with a plain reference at every system call (M3); `journal_rules` and
  `journal_damage` check one rule at a time; `journal_threads` runs the jobs in a real pool.
- Each rule is also broken, in a copy of the source, and then a test must fail: so the model is known to bite.
- The layout of the file is checked with Python's own struct and xxhash, not with the code under test.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import xxhash
from native import NOT_SANITIZED, each_flavour

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent / "c"
SOURCES = HERE.parent.parent / "csrc"
COMMON = (
    "bitmap",
    "disk",
    "digest",
    "digest_scalar",
    "digest_baseline",
    "digest_avx2",
    "digest_avx512",
    "pool",
)
JOURNAL = ("actlog", "hot", "journal")
FLAGS = ("-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-UNDEBUG", "-pthread")
FLAVOURS = {"plain": (), "thread": ("-fsanitize=thread",), "address": ("-fsanitize=address,undefined",)}
NEVER_TRIED = 2  # exit code of a program whose run covered too little
# Scarce slots and small jobs, so that short histories meet every case; tearing as fine as such small records need.
SMALL = ("-DMP_JOURNAL_EXTENTS=8u", "-DMP_JOURNAL_JOB_PAGES=2u", "-DFAKE_SECTOR=16u")
FAKE_DISK = "-Wl,--wrap=pread,--wrap=pwrite,--wrap=fdatasync"
CHECKS = ("journal_rules", "journal_damage")
COUNTED = "-Wl,--wrap=malloc,--wrap=calloc"


def environment() -> dict[str, str]:
    """Without what a run of these tests under sanitizers adds for Python itself."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and "SAN_OPTIONS" not in name}


def call(*command: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=timeout, env=environment()
    )


class Program(NamedTuple):
    path: Path
    prefix: tuple[str, ...]

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return call(*self.prefix, self.path, *(str(argument) for argument in arguments))

    def passes(self, *arguments: object) -> str:
        done = self(*arguments)
        assert done.returncode == 0, (
            f"{self.path.name} {arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout


class Builder:
    """Compiles in one folder: what stays the same only once for each flavour."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefixes: dict[str, tuple[str, ...]] = {}
        self.objects: dict[tuple[str, ...], Path] = {}
        self.programs: dict[tuple[str, str], Program] = {}

    def compile(self, source: Path, *flags: str) -> Path:
        key = (str(source), *flags)
        if key not in self.objects:
            target = self.folder / f"{len(self.objects)}-{source.stem}.o"
            done = call("gcc", *FLAGS, *flags, f"-I{SOURCES}", f"-I{HERE}", "-c", source, "-o", target)
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr or source.parent not in {SOURCES, HERE}, done.stderr
            self.objects[key] = target
        return self.objects[key]

    def prefix(self, flavour: str) -> tuple[str, ...]:
        """What a program of that flavour is started with; skips where the sanitizer does not run."""
        if flavour not in self.prefixes:
            source, target = self.folder / f"probe-{flavour}.c", self.folder / f"probe-{flavour}"
            source.write_text("int main(void) { return 0; }\n")
            if call("gcc", *FLAGS, *FLAVOURS[flavour], source, "-o", target).returncode:
                pytest.skip(f"gcc has no {flavour} sanitizer here")
            # Some kernels place mappings where an older thread sanitizer does not expect them.
            tries: list[tuple[str, ...]] = [(), *([(setarch, "-R")] if (setarch := shutil.which("setarch")) else [])]
            working = [prefix for prefix in tries if call(*prefix, target).returncode == 0]
            if not working:
                pytest.skip(f"programs under the {flavour} sanitizer do not start here")
            self.prefixes[flavour] = working[0]
        return self.prefixes[flavour]

    def link(self, name: str, flavour: str, changed: dict[str, Path]) -> Program:
        prefix, sanitize = self.prefix(flavour), FLAVOURS[flavour]
        small = SMALL if name == "journal_model" else ()
        wraps = [] if name == "journal_threads" else [FAKE_DISK, *([COUNTED] if name in CHECKS else [])]
        mine = [HERE / f"{name}.c", *([HERE / "fakedisk.c"] if wraps else [])]
        mine += [changed.get(part, SOURCES / f"{part}.c") for part in JOURNAL]
        objects = [self.compile(source, *sanitize, *small) for source in mine]
        objects += [self.compile(SOURCES / f"{part}.c", *sanitize) for part in COMMON]
        target = Path(tempfile.mkdtemp(prefix=f"{flavour}-", dir=self.folder), name)
        done = call("gcc", *FLAGS, *sanitize, *wraps, *objects, "-o", target)
        assert done.returncode == 0, done.stderr
        return Program(target, prefix)

    def program(self, name: str, flavour: str = "plain") -> Program:
        if (name, flavour) not in self.programs:
            self.programs[name, flavour] = self.link(name, flavour, {})
        return self.programs[name, flavour]

    def broken(self, name: str, part: str, old: str, new: str) -> Program:
        text = (SOURCES / f"{part}.c").read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{part}.c holds this {text.count(old)} times: {old}"
        folder = Path(tempfile.mkdtemp(prefix="broken-", dir=self.folder))
        (folder / f"{part}.c").write_text(text.replace(old, new), encoding="utf-8")
        return self.link(name, "plain", {part: folder / f"{part}.c"})


@pytest.fixture(scope="module")
def builder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    return Builder(tmp_path_factory.mktemp("journal"))


@pytest.mark.parametrize("flavour", each_flavour("journal", FLAVOURS))
@NOT_SANITIZED
def test_m3_whatever_may_differ_is_dirty_after_every_crash(builder: Builder, rng: random.Random, flavour: str) -> None:
    first, count = rng.getrandbits(40), 30 if flavour == "plain" else 6
    print(builder.program("journal_model", flavour).passes(first, count, 4000))


@pytest.mark.parametrize("flavour", each_flavour("journal", FLAVOURS))
@pytest.mark.parametrize("name", CHECKS)
@NOT_SANITIZED
def test_the_rules_one_by_one(builder: Builder, name: str, flavour: str) -> None:
    program = builder.program(name, flavour)
    checks = program.passes("list").split()
    assert checks
    failed = {check: done.stdout + done.stderr for check in checks if (done := program(check)).returncode}
    assert failed == {}


@pytest.mark.xdist_group("journal-plain")
@NOT_SANITIZED
def test_every_rule_of_the_journal_has_a_check(builder: Builder) -> None:
    checks = [check for name in CHECKS for check in builder.program(name).passes("list").split()]
    assert {check[:2] for check in checks} >= {"m4", "m5", "m6", "m7", "m8", "r2", "r3", "w7"}


@pytest.mark.parametrize("flavour", each_flavour("journal", FLAVOURS))
@NOT_SANITIZED
def test_jobs_in_a_pool_touch_only_what_is_theirs(builder: Builder, rng: random.Random, flavour: str) -> None:
    builder.program("journal_threads", flavour).passes(rng.getrandbits(40), 4000)


# --- rules that are broken in a copy of the source: (part, what stands there, what it becomes) ---

BREAKS_THE_MODEL = {
    "M4: the record is not synced": ("journal", "    return mp_disk_sync(w->fd);\n}", "    return 0;\n}"),
    "M4: hot before the record is durable": (
        "journal",
        "t->nodes[i].state == MP_HOT_IN;",
        "t->nodes[i].state != MP_HOT_WISHED;",
    ),
    "M4: pages and record share one fdatasync": (
        "journal",
        "return w->page_count || w->syncs_first ? mp_disk_sync(w->fd) : 0;",
        "return 0;",
    ),
    "M5: evicted although not flushed": ("journal", "if (n->in_flight || !covered(j, n) ||", "if (n->in_flight ||"),
    "M5: evicted without its page": (
        "journal",
        " || !take_page(j, n->extent / MP_JOURNAL_PAGE_EXTENTS, EVICTION_PAGES))",
        ")",
    ),
    "M5: a failed barrier confirms": ("journal", "n->current |= ok ? 0 : n->before;", ""),
    "M5: a barrier confirms what came after it began": ("journal", "        n->before |= n->current;\n", ""),
    "M5: what one waiter still needs is taken by another": (
        "journal",
        "return n->kept && n->kept + 1 >= j->looks;",
        "(void)j; (void)n; return false;",
    ),
    "M6: a clean stop forgets what is not flushed": (
        "journal",
        "    mp_journal_link_lost(j);\n    j->emptying",
        "    j->emptying",
    ),
    "M6: a clean stop empties the log before all pages are written": (
        "journal",
        "        logs = j->changed_count == 0;",
        "        logs = true;",
    ),
    "M7: a torn record is believed": (
        "actlog",
        "mp_digest_equal(digest_of(record), said)",
        "mp_digest_equal(said, said)",
    ),
    "M7: an old record is believed": (
        "actlog",
        "places[k].sequence > places[newest].sequence",
        "places[k].sequence < places[newest].sequence",
    ),
    "M7: no torn record is tolerated": ("actlog", "ahead <= 2", "ahead <= 1"),
    "M7: every record goes to the same place": (
        "journal",
        "sequence % MP_ACTLOG_PLACES * MP_ACTLOG_RECORD",
        "0 * sequence",
    ),
    "M7: the log goes on before the old one is replayed": (
        "journal",
        "j->recovering || j->emptying, logs",
        "j->emptying, logs",
    ),
    "M8: only the first block of a write is set": (
        "journal",
        "return (range){first, last,",
        "last = length < j->block ? first : last;\n    return (range){first, last,",
    ),
    "R2: a flush is reached after its first job": (
        "journal",
        "if (!j->due_count && !j->emptying)",
        "if (!j->emptying)",
    ),
    "W7: what a running barrier covers is forgotten": (
        "journal",
        "t->nodes[i].current | t->nodes[i].before);",
        "t->nodes[i].current);",
    ),
    "W7: what no barrier covers is forgotten": (
        "journal",
        "t->nodes[i].current | t->nodes[i].before);",
        "t->nodes[i].before);",
    ),
}


@pytest.mark.parametrize("rule", BREAKS_THE_MODEL)
@pytest.mark.xdist_group("journal-broken")
@NOT_SANITIZED
def test_m3_the_model_finds_a_broken_rule(builder: Builder, rule: str) -> None:
    done = builder.broken("journal_model", *BREAKS_THE_MODEL[rule])(1, 200, 4000)
    assert done.returncode not in {0, NEVER_TRIED}, done.stdout
    print(done.stdout, done.stderr)


BREAKS_A_CHECK = {
    "m5_the_least_recently_used_extent_goes": ("hot", "if (hot->newest != slot) {", "if (false) {"),
    "m5_a_page_that_is_durable_is_not_written_again": (
        "journal",
        "if ((word(j, extent) & mask) == mask)",
        "if (!mask)",
    ),
    "m7_two_unreadable_records_set_all_bits": ("actlog", "ahead <= 2", "ahead <= 3"),
    "m7_a_lost_log_is_whole_again_once_all_bits_are_durable": ("journal", "j->ring_lost ? MP_ACTLOG_PLACES : 1", "1"),
    "m7_two_records_are_never_on_their_way_at_once": ("journal", "w->page_count || w->syncs_first", "w->page_count"),
    "r2_bits_of_a_killed_process_s_page_cache_are_written_again": (
        "journal",
        "if (!mp_is_zero(memory + page * MP_JOURNAL_PAGE, MP_JOURNAL_PAGE))",
        "if (false)",
    ),
    "r3_cleared_bits_go_to_disk_by_themselves_after_a_while": (
        "journal",
        "if (j->cleared >= MP_JOURNAL_CLEARED)",
        "if (false)",
    ),
    "a_failed_call_is_final_and_never_repeated": ("journal", "if ((j->error = w->error))", "if (w->error)"),
    "a_hostile_file_is_not_believed": ("actlog", "if (extent >= extents)", "if (extent > extents)"),
}


@pytest.mark.parametrize("check", BREAKS_A_CHECK)
@pytest.mark.xdist_group("journal-broken")
@NOT_SANITIZED
def test_a_check_finds_its_broken_rule(builder: Builder, check: str) -> None:
    name = next(name for name in CHECKS if check in builder.program(name).passes("list").split())
    assert builder.broken(name, *BREAKS_A_CHECK[check])(check).returncode not in {0, NEVER_TRIED}


# --- the layout, by another hand ---

RING, RECORD, PLACES, TABLE, BITMAP = 8192, 8192, 4, 1024, 65536
BLOCK = 65536
BLOCKS = 3 * 512 * 64 + 100  # four pages


def make_record(sequence: int, extents: list[int]) -> bytes:
    table = [extent + 1 for extent in extents] + [0] * (TABLE - len(extents))
    text = struct.pack(f"<8sQII16x24x{TABLE}I", b"MPRACTLG", sequence, len(extents), 0, *table).ljust(RECORD, b"\0")
    digest = xxhash.xxh3_128(text).intdigest().to_bytes(16, "little")
    return text[:24] + digest + text[40:]


def make_file(path: Path, records: dict[int, bytes], words: dict[int, int]) -> Path:
    file = bytearray(BITMAP + 4 * 4096)
    for place, record in records.items():
        file[RING + place * RECORD : RING + (place + 1) * RECORD] = record
    for index, word in words.items():
        struct.pack_into("<Q", file, BITMAP + 8 * index, word)
    path.write_bytes(file)
    return path


@pytest.fixture
def use(builder: Builder) -> Callable[..., tuple[bool, list[str]]]:
    """`use(path, offset, length)` opens the file as a volume's journal, then writes there alone. What it found."""

    def run(path: Path, offset: int, length: int) -> tuple[bool, list[str]]:
        out = builder.program("journal_damage").passes("file", path, BLOCKS * BLOCK - 5, BLOCK, offset, length)
        lost, dirty = out.strip().split(" dirty=")
        return lost == "lost=1", [run for run in dirty.split(",") if run]

    return run


@pytest.mark.xdist_group("journal-plain")
@NOT_SANITIZED
def test_the_file_is_read_as_the_layout_says(tmp_path: Path, use: Callable[..., tuple[bool, list[str]]]) -> None:
    records = {3: make_record(7, [5]), 0: make_record(8, [2, 1536, 1537]), 1: make_record(5, [9])}
    path = make_file(tmp_path / "meta", records, {0: 1, 600: 1 << 63})
    expected = ["0-1", "128-192", "38463-38464", f"98304-{BLOCKS}"]  # extent 1537 is short
    assert use(path, 0, 1) == (False, expected)


@pytest.mark.xdist_group("journal-plain")
@NOT_SANITIZED
def test_the_file_is_written_as_the_layout_says(tmp_path: Path, use: Callable[..., tuple[bool, list[str]]]) -> None:
    path = make_file(tmp_path / "meta", {0: make_record(0, [])}, {})
    assert use(path, 70 * BLOCK - 1, 2) == (False, [])
    file = path.read_bytes()
    assert len(file) == BITMAP + 4 * 4096
    assert file[:RING] == bytes(RING)
    assert file[RING : RING + RECORD] == make_record(0, [])
    assert file[RING + RECORD : RING + 2 * RECORD] == make_record(1, [1])
    assert file[RING + 2 * RECORD : BITMAP] == bytes(BITMAP - RING - 2 * RECORD)
    assert file[BITMAP:] == bytes(8) + struct.pack("<Q", 0b11 << 5) + bytes(4 * 4096 - 16)
    assert use(path, 0, 1) == (False, ["64-128"])  # a crash: the whole extent


@pytest.mark.xdist_group("journal-plain")
@NOT_SANITIZED
def test_m7_a_file_without_any_record_is_all_dirty(tmp_path: Path, use: Callable[..., tuple[bool, list[str]]]) -> None:
    path = make_file(tmp_path / "meta", {}, {})
    assert use(path, 0, 1) == (True, [f"0-{BLOCKS}"])
    assert use(path, 0, 1) == (False, [f"0-{BLOCKS}"])
