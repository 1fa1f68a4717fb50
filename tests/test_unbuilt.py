"""A daemon refuses what it cannot do yet, before it has opened anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pairfile import read_pair, write_pair

from mirrorpair.errors import ConfigError
from mirrorpair.node import run
from mirrorpair.unbuilt import unbuilt

if TYPE_CHECKING:
    from pathlib import Path

PAIR = '[pair]\nname = "shop"\n'
ALPHA = "[node.alpha]\n"

ASKED = {
    "pair.mode": (PAIR, PAIR + 'mode = "async"\n'),
    "pair.arbiter": ('arbiter = "none"', 'arbiter = "etcd"'),
    "pair.failback": (PAIR, PAIR + 'prefer = "alpha"\nfailback = "auto"\n'),
    "pair.reads": (PAIR, PAIR + 'reads = "confirm"\n'),
    "node.alpha.http": (ALPHA, ALPHA + 'http = "127.0.0.1:7998"\n'),
    "node.alpha.nbd-forward": (ALPHA, ALPHA + "nbd-forward = true\n"),
    "node.alpha.vip": (ALPHA, ALPHA + 'vip = "10.0.0.100/24"\nvip-interface = "eth0"\n'),
    "hooks.dir": (PAIR, '[hooks]\ndir = "hooks.d"\n' + PAIR),
    "hooks.fence-peer": (PAIR, '[hooks]\nfence-peer = "fence"\n' + PAIR),
}


def test_what_is_built_is_not_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    assert unbuilt(read_pair(tmp_path), "alpha") == []


@pytest.mark.parametrize("key", ASKED)
def test_a_daemon_does_not_start_as_if_it_did_what_it_cannot(tmp_path: Path, key: str) -> None:
    path = write_pair(tmp_path)
    old, new = ASKED[key]
    text = path.read_text(encoding="utf-8")
    assert old in text
    text = text.replace(old, new, 1)
    if key == "pair.arbiter":
        text += '[etcd]\nendpoints = ["http://127.0.0.1:2379"]\n'
    path.write_text(text, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        run(read_pair(tmp_path), "alpha")
    assert f": {key}: this version cannot do that yet" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
