"""The Spin models of the arbitration (tests/model): every state of them is right, and each weakened rule is found.

What each one is about, and its rules and invariants, stands in its file; pair.pml is what five of them have in common.
Measured on two busy cores:

| model    | states  | CPU   | memory  | bounds                                                       |
|----------|---------|-------|---------|--------------------------------------------------------------|
| lease    | 78 k    | 0.3 s | 40 MiB  | none: durations run out                                      |
| frames   | 797 k   | 4.6 s | 130 MiB | 2 writes, 1 crash, epochs to 3                               |
| replies  | 832 k   | 3.2 s | 130 MiB | 1 write, 1 crash, epochs to 4, 1 unknown outcome             |
| power    | 1,106 k | 7.1 s | 160 MiB | 1 write, 2 crashes, epochs to 3                              |
| blank    | 995 k   | 4.4 s | 150 MiB | 1 write, 1 crash, epochs to 3, 1 unknown outcome             |
| handover | 1,227 k | 5 s   | 180 MiB | 1 write, 1 crash, epochs to 4, 1 unknown outcome             |
| handoff  | 828 k   | 3.9 s | 130 MiB | 1 write, 1 crash, epochs to 3, 1 unknown outcome             |

A longer campaign, with larger bounds: tests/model/campaign.py.
"""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, NamedTuple

import promela
import pytest
from promela import Tools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.not_sanitized("Spin's programs are no code of ours")


class Model(NamedTuple):
    states: int
    """it has at least so many: fewer, and something in it does not happen any more"""
    weak: tuple[str, ...]
    """the rules that can be weakened"""
    reach: tuple[str, ...] = ()
    """what it must come to, as a write is answered"""


MODELS = {
    "lease": Model(70_000, ("A10_RATE", "A10_RECEIVED", "A10_EARLY", "A11_RATE", "A11_START", "A11_SHORTER")),
    "frames": Model(
        700_000,
        ("A1", "A2", "A3", "A4_CRASHED", "A5_SESSION", "A5_EPOCH", "A6", "A10", "A11_PROMISE", "A11_START", "R1"),
    ),
    "replies": Model(700_000, ("A0", "A2", "A13_FLOOR", "A13_PROMISE"), ("UNKNOWN",)),
    "power": Model(1_000_000, ("A4_BOOT", "A7", "A16"), ("BACK",)),
    "blank": Model(900_000, ("A8", "A8_LIFE"), ("BLANK",)),
    "handoff": Model(750_000, ("H_SERVES", "H_READ", "H_ACCEPT", "H_MEMBER"), ("HANDED",)),
    "handover": Model(1_100_000, ("H_SERVES", "H_READ")),
}
SHALLOW = 150
"""steps: deep enough for each weakened rule"""


@pytest.fixture
def tools(need_tool: Callable[[str], str]) -> Tools:
    spin = need_tool("spin")
    return Tools(spin, shutil.which("gcc") or need_tool("cc"))


@pytest.mark.parametrize("model", MODELS)
def test_every_state_is_right(tools: Tools, tmp_path: Path, model: str) -> None:
    found = promela.search(tools, tmp_path, model)
    assert found.errors == 0, found.output
    assert found.complete, found.output
    assert found.states >= MODELS[model].states, found.output


@pytest.mark.parametrize(("model", "rule"), [(name, rule) for name, model in MODELS.items() for rule in model.weak])
def test_it_bites_when_a_rule_is_weakened(tools: Tools, tmp_path: Path, model: str, rule: str) -> None:
    depth = promela.DEPTH if model == "lease" else SHALLOW
    found = promela.search(tools, tmp_path, model, [f"WEAK_{rule}"], optimize="-O0", depth=depth)
    assert found.errors, found.output
    assert found.violated, found.output


@pytest.mark.parametrize(("model", "what"), [(name, what) for name, model in MODELS.items() for what in model.reach])
def test_it_goes_so_far(tools: Tools, tmp_path: Path, model: str, what: str) -> None:
    found = promela.search(tools, tmp_path, model, [f"REACH_{what}"], optimize="-O0")
    assert found.violated, found.output


def test_each_rule_that_a_model_can_weaken_is_weakened_here() -> None:
    there = {
        path.stem: set(re.findall(r"^#ifn?def WEAK_(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
        for path in promela.FOLDER.glob("*.pml")
    }
    assert there.pop("lease") == set(MODELS["lease"].weak)
    assert there.pop("pair") == {rule for name, model in MODELS.items() if name != "lease" for rule in model.weak}
    assert not any(there.values())


def test_a_search_that_is_cut_off_is_not_complete(tools: Tools, tmp_path: Path) -> None:
    found = promela.search(tools, tmp_path, "lease", optimize="-O0", depth=100)
    assert found.errors == 0
    assert not found.complete
