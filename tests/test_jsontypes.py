"""Decoders beside threads: msgspec's own first look at a type crashed one process in four whose threads took it at the
same moment."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from adminside import status

from mirrorpair.metadata import NODE, NodeFile
from mirrorpair.twofold import pack

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(__file__).resolve().parent.parent / "mirrorpair"
LIMIT_S = 60.0

# Threads that take turns often, and each of them is the first one of its process to decode this.
TOGETHER = """
import sys, threading
{imports}
sys.setswitchinterval(1e-6)
data, start = sys.stdin.buffer.read(), threading.Barrier(8)
def read():
    start.wait()
    {decode}
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def node_file() -> bytes:
    return pack(NODE, 2, NodeFile(pair="shop", node="alpha", incarnation_id="ab" * 16))


@pytest.mark.parametrize(
    ("data", "imports", "decode"),
    [
        (
            lambda: msgspec.json.encode(status()),
            "from mirrorpair.jsontypes import decoder; from mirrorpair.status import Status",
            "decoder(Status).decode(data)",
        ),
        (
            node_file,
            "from mirrorpair.metadata import NODE; from mirrorpair.twofold import parse",
            "assert parse(NODE, 0, data).state == 'good'",
        ),
        (
            lambda: b'{"code":12,"kind":"refused","message":"no"}',
            "from mirrorpair.peermessages import Stop, decode_frame",
            "decode_frame(Stop, data)",
        ),
    ],
    ids=["status", "node file", "frame"],
)
def test_several_threads_may_be_the_first_at_once(data: Callable[[], bytes], imports: str, decode: str) -> None:
    for _ in range(15):
        done = subprocess.run(
            [sys.executable, "-c", TOGETHER.format(imports=imports, decode=decode)],
            input=data(),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")


def test_every_decoder_is_made_at_import_or_by_the_one_that_is_safe() -> None:
    """Inside a function nobody makes a decoder, nor lets msgspec make one."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "jsontypes.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for call in {node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)}:
            name = ast.unparse(call.func)
            makes_one = name.endswith((".Decoder", "msgspec.convert"))
            lets_make_one = name == "msgspec.json.decode" and call.keywords
            assert not makes_one, f"{path.name}:{call.lineno}: {ast.unparse(call)}"
            assert not lets_make_one, f"{path.name}:{call.lineno}: {ast.unparse(call)}"
