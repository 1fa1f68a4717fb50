"""The walls between the modules, checked in the source.

Rules:
- A module imports only from rows above its own. Modules of one row do not know each other; a folder (`cli/`) is one
  module.
- The pure rows decide and never act: they import none of IMPURE, and stand above everything that does. That is what
  lets a simulator drive exactly the code that runs in production.
- Every module has a row: a new one is entered below, which is the moment to ask where it belongs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mirrorpair"
IMPURE = {"time", "os", "socket", "asyncio", "threading", "random"}

PURE_ROWS = [
    ["errors"],
    ["text", "units"],
    ["endpoint", "handshake", "history", "liveness", "messages", "proofs", "report", "rolewords", "tomltable"],
    ["rolesteps", "status", "swaprules"],
    ["takeover"],
    ["handoff", "rolecommands"],
    ["abdication"],
    ["roles"],
    ["foresee"],
    ["explain"],
]
ROWS = [
    *PURE_ROWS,
    ["_core", "_linux"],
    ["interrupts", "jsontypes", "linux", "sentinel", "service"],
    ["address", "arbiter", "blockstack", "chronicle", "control", "identity", "newfile", "twofold"],
    ["config", "metadata", "successor"],
    ["admin", "drive", "image", "outcome", "transport"],
    ["nodecheck", "peermessages", "peersocket", "remote", "unbuilt", "unwritten", "volumes"],
    ["peerbeat"],
    ["allow", "nbdclient", "newnode", "pairing", "peercontrol", "peerdata", "peersentinel", "sides", "witness"],
    ["peerpath"],
    ["datalink", "offline", "peerlink", "serve"],
    ["listener", "noderegister", "nodesentinel", "nodeview"],
    ["nodecore"],
    ["nodepeer"],
    ["nbdserver", "nodeadmin"],
    ["node"],
    ["demo"],
    ["cli"],
    ["__main__", "testing"],  # the simulation is for tests, the project's and a user's: nothing of the product knows it
]
ROW_OF = {module: row for row, modules in enumerate(ROWS) for module in modules}
# The package itself: what it imports is loaded when it is first used, and all may read `__version__` from it.
FRONT = "__init__"


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def sources() -> list[Path]:
    return sorted(path for pattern in ("*.py", "*.pyx") for path in PACKAGE.rglob(pattern))


def python_sources() -> list[Path]:
    return [path for path in sources() if path.suffix == ".py"]


def imports(source: str, package: str = "mirrorpair") -> set[str]:
    """Every import in the source, full names with dots, also those inside functions and under TYPE_CHECKING. From
    `from a import b` comes `a.b`, since `b` may be a module. `package` is what relative imports count from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{parent}.{base}".rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def package_of(path: Path) -> str:
    return ".".join(["mirrorpair", *path.relative_to(PACKAGE).parts[:-1]])


def own_imports(source: str, package: str = "mirrorpair") -> set[str]:
    """The modules of mirrorpair that the source imports; names of the package itself (`__version__`) are none."""
    parts = (name.split(".") for name in imports(source, package))
    return {part[1] for part in parts if part[0] == "mirrorpair" and len(part) > 1 and part[1] in ROW_OF}


def wrong_imports(module: str, source: str, package: str = "mirrorpair") -> set[str]:
    return {name for name in own_imports(source, package) - {module} if ROW_OF[name] >= ROW_OF[module]}


def test_every_module_has_a_row() -> None:
    assert {module_of(path) for path in sources()} - {FRONT} <= set(ROW_OF)


def test_every_row_names_modules_that_exist() -> None:
    generated = {"_core", "_linux"}
    assert set(ROW_OF) - generated <= {module_of(path) for path in sources()}


@pytest.mark.parametrize("path", python_sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rows_above_its_own(path: Path) -> None:
    if module_of(path) != FRONT:
        assert wrong_imports(module_of(path), path.read_text(encoding="utf-8"), package_of(path)) == set()


def test_the_package_loads_nothing_of_its_own_at_once() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert own_imports(ast.unparse(ast.Module(body=list(at_once), type_ignores=[]))) == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "testing").glob("*.py")), ids=lambda path: path.name)
def test_the_simulation_has_no_chance_but_its_seed(path: Path) -> None:
    """A campaign has processes, and asks for the CPUs; dice are `random.Random(seed)` and nothing else of `random`."""
    source = path.read_text(encoding="utf-8")
    allowed = {"random"} | ({"os"} if path.name == "campaign.py" else set())
    assert {name.split(".")[0] for name in imports(source)} & IMPURE <= allowed
    assert set(re.findall(r"\brandom\.(\w+)", source)) <= {"Random"} | {"random"}
    assert not re.search(r"(?<!rng\.)(?<!dice\.)\brandom\.random\(", source)


@pytest.mark.parametrize("module", [module for row in PURE_ROWS for module in row])
def test_a_pure_module_looks_at_no_clock_file_or_socket(module: str) -> None:
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in imports(source)} & IMPURE == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time", {"time"}),
        ("import os.path as p", {"os.path"}),
        ("from os import path", {"os.path"}),
        ("def f():\n    from socket import socket", {"socket.socket"}),
        ("from . import image", {"mirrorpair.cli.image"}),
        ("from ..image import Image", {"mirrorpair.image.Image"}),
        ("from .. import image", {"mirrorpair.image"}),
    ],
)
def test_no_way_of_importing_is_overlooked(source: str, found: set[str]) -> None:
    assert imports(source, "mirrorpair.cli") == found


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("linux", "from mirrorpair.image import Image", {"image"}),
        ("linux", "from mirrorpair import image, errors", {"image"}),
        ("linux", "import mirrorpair.offline", {"offline"}),
        ("endpoint", "def f():\n    from mirrorpair import linux", {"linux"}),
        ("endpoint", "from mirrorpair.messages import Hello", {"messages"}),
        ("image", "from mirrorpair.linux import punch", set()),
        ("serve", "from mirrorpair import __version__", set()),
        ("cli", "from mirrorpair.cli.common import fail", set()),
    ],
)
def test_an_import_against_the_layers_is_found(module: str, source: str, wrong: set[str]) -> None:
    assert wrong_imports(module, source) == wrong
