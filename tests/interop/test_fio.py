"""fio's nbd engine at a mirrored pair: it verifies what it wrote by checksums of its own."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from pair import MIB
from realclients import needs, tool

if TYPE_CHECKING:
    from pathlib import Path

    from mirror import Mirror


@needs("fio")
def test_fio_verifies_several_jobs_at_once(mirror: Mirror, tmp_path: Path) -> None:
    engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout.split()
    if "nbd" not in engines:
        pytest.skip("this fio has no nbd engine")
    words = ["--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-64k", "--size=6M", "--iodepth=16", "--verify=crc32c"]
    words += ["--verify_fatal=1", "--do_verify=1", "--fsync=64", "--output-format=json", "--group_reporting=0"]
    jobs = []
    for index, uri in enumerate([*mirror.uris(mirror.alpha, "data"), *mirror.uris(mirror.alpha, "logs")]):
        # Each has its own part: fio knows only what the job itself wrote. Two on each volume, one of them over TCP.
        jobs += [f"--name=j{index}", f"--uri={uri}", f"--offset={index % 2 * 8}M", f"--randseed={index}"]
        jobs += ["--bs_unaligned=1"] if index == 3 else []
    said = tool("fio", *words, *jobs, f"--aux-path={tmp_path}")
    report = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert [job["error"] for job in report["jobs"]] == [0] * 4
    for job in report["jobs"]:
        assert job["write"]["io_bytes"] >= 4 * MIB
        assert job["read"]["io_bytes"] == job["write"]["io_bytes"]
    mirror.finish()
