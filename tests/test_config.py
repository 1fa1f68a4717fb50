"""The pair's configuration: what is right is read as it is meant, and each wrong thing is told by file, key path, what
was found and what was expected."""

from __future__ import annotations

import os
import posixpath
import string
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mirrorpair import config as config_module
from mirrorpair.address import TcpAddress, UnixAddress
from mirrorpair.config import MAX_EXTENTS, MAX_FILE_BYTES, Config, Heartbeat, Volume, load, parse
from mirrorpair.errors import ConfigError, UsageError
from mirrorpair.tomltable import dotted
from mirrorpair.units import parse_size

if TYPE_CHECKING:
    from pathlib import Path

FILE = "/etc/mirrorpair/pair.toml"

WHOLE = """
[pair]
name = "shop"
mode = "sync"
arbiter = "witness"
prefer = "alpha"
failback = "auto"
failback-delay = "10min"
max-role-changes-per-hour = 5
reads = "confirm"
insecure = true

[heartbeat]
interval = "200ms"
promise = "4s"
suspect-after = 5

[resync]
rate = "200MiB/s"

[volume.data]
size = "10GiB"
block-size = "128KiB"

[volume.blobs]
size = "1TiB"

[node.beta]
address = "10.0.0.2:7790"
state-dir = "/var/lib/mirrorpair"
control = "/run/mirrorpair/beta.sock"
nbd = ["unix:/run/mirrorpair/beta.nbd"]
image.data = "/srv/data.img"
image.blobs = "/srv/blobs.img"

[node.alpha]
address = "10.0.0.1:7790"
heartbeat-address = ["192.168.7.1:7790", "[fd00::1]:7790"]
state-dir = "state"
control = "run/alpha.sock"
nbd = ["unix:/run/mirrorpair/alpha.nbd", "tcp:127.0.0.1:10809"]
http = "127.0.0.1:7792"
nbd-forward = true
vip = "10.0.0.100/24"
vip-interface = "eth0"
image.data = "../../srv/./data.img"
image.blobs = "/dev/vg0/blobs"

[witness]
address = "10.0.0.9:7791"
state-dir = "/var/lib/mirrorpair-witness"

[etcd]
endpoints = ["https://10.0.0.9:2379", "https://etcd2:2379/"]
prefix = "/pairs/"
user = "mirrorpair"
password-file = "secret"
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"

[hooks]
dir = "hooks.d"
fence-peer = "/etc/mirrorpair/fence"
"""

SMALL: dict[str, Any] = {
    "pair": {"name": "shop", "arbiter": "none"},
    "volume": {"data": {"size": "1GiB"}},
    "node": {
        name: {
            "address": f"127.0.0.1:{port}",
            "state-dir": "/var/lib/mirrorpair",
            "control": f"/run/{name}.sock",
            "nbd": [f"unix:/run/{name}.nbd"],
            "image": {"data": f"/srv/{name}.img"},
        }
        for name, port in (("alpha", 7790), ("beta", 7791))
    },
}
NO_VALUE = object()


def quoted(value: object) -> str:
    """A TOML value, also of tables, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {quoted(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(quoted(inner) for inner in value) + "]"
    return str(value)


def changed(*changes: tuple[str, object], base: dict[str, Any] = SMALL) -> bytes:
    """SMALL as TOML, with values put in or (NO_VALUE) taken out; keys are separated by slashes."""

    def copied(value: Any) -> Any:
        return {key: copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    tree = copied(base)
    for path, value in changes:
        *folders, last = path.split("/")
        table = tree
        for key in folders:
            table = table.setdefault(key, {})
        if value is NO_VALUE:
            del table[last]
        else:
            table[last] = value
    return "\n".join(f"{quoted(key)} = {quoted(value)}" for key, value in tree.items()).encode()


def read(*changes: tuple[str, object]) -> Config:
    return parse(changed(*changes), FILE)


def refused(*changes: tuple[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*changes)
    message = str(caught.value)
    assert message.startswith(f"{FILE}: ")
    assert message.isprintable()
    assert caught.value.exit_code == 10
    return message.removeprefix(f"{FILE}: ")


# --- what is right


def test_every_key_of_the_contract_is_read() -> None:
    config = parse(WHOLE.encode(), FILE)
    assert (config.path, config.name, config.mode, config.arbiter) == (FILE, "shop", "sync", "witness")
    assert (config.prefer, config.failback, config.failback_delay) == ("alpha", "auto", 600.0)
    assert (config.max_role_changes_per_hour, config.reads, config.insecure) == (5, "confirm", True)
    assert config.heartbeat == Heartbeat(interval=0.2, promise=4.0, suspect_after=5)
    assert config.rate == 200 << 20
    assert config.volume("data") == Volume(name="data", size=10 << 30, block_size=128 << 10)
    assert config.volume("blobs") == Volume(name="blobs", size=1 << 40, block_size=64 << 10)
    alpha = config.node("alpha")
    assert alpha.address == TcpAddress("10.0.0.1", 7790)
    assert alpha.heartbeat_addresses == (TcpAddress("192.168.7.1", 7790), TcpAddress("fd00::1", 7790))
    assert alpha.nbd == (UnixAddress("/run/mirrorpair/alpha.nbd"), TcpAddress("127.0.0.1", 10809))
    assert (alpha.http, alpha.nbd_forward) == (TcpAddress("127.0.0.1", 7792), True)
    assert (alpha.vip, alpha.vip_interface) == ("10.0.0.100/24", "eth0")
    assert config.witness is not None
    assert config.witness.address == TcpAddress("10.0.0.9", 7791)
    assert config.witness.state_dir == "/var/lib/mirrorpair-witness"
    assert config.etcd is not None
    assert config.etcd.endpoints == ("https://10.0.0.9:2379", "https://etcd2:2379")
    assert (config.etcd.prefix, config.etcd.user) == ("/pairs/", "mirrorpair")
    assert config.hooks.fence_peer == "/etc/mirrorpair/fence"


def test_relative_paths_count_from_the_folder_of_the_file() -> None:
    config = parse(WHOLE.encode(), FILE)
    alpha = config.node("alpha")
    assert alpha.state_dir == "/etc/mirrorpair/state"
    assert alpha.control == "/etc/mirrorpair/run/alpha.sock"
    assert alpha.images == {"data": "/srv/data.img", "blobs": "/dev/vg0/blobs"}
    assert config.hooks.dir == "/etc/mirrorpair/hooks.d"
    assert config.etcd is not None
    names = (config.etcd.password_file, config.etcd.ca, config.etcd.cert, config.etcd.key)
    assert names == tuple(f"/etc/mirrorpair/{name}" for name in ("secret", "ca.pem", "cert.pem", "key.pem"))


def test_a_small_file_has_the_defaults_of_the_contract() -> None:
    config = read(("pair/arbiter", NO_VALUE), ("witness", {"address": "unix:/run/w", "state-dir": "/var/w"}))
    assert (config.mode, config.arbiter, config.survivor) == ("sync", "witness", "primary")
    assert (config.prefer, config.failback, config.failback_delay) == (None, "manual", 300.0)
    assert (config.max_role_changes_per_hour, config.reads, config.insecure) == (3, "validity", False)
    assert config.heartbeat == Heartbeat(interval=0.25, promise=3.0, suspect_after=4)
    assert config.rate == 0
    assert config.volume("data").block_size == 64 << 10
    node = config.node("beta")
    assert (node.heartbeat_addresses, node.http, node.nbd_forward, node.vip, node.vip_interface) == (
        (),
        None,
        False,
        None,
        None,
    )


def test_both_hosts_number_volumes_and_nodes_alike_whatever_the_order_in_the_file() -> None:
    config = parse(WHOLE.encode(), FILE)
    assert [volume.name for volume in config.volumes] == ["blobs", "data"]
    assert [node.name for node in config.nodes] == ["alpha", "beta"]


def test_the_files_of_a_node_lie_in_a_folder_of_the_pair_and_the_node() -> None:
    node = read().node("beta")
    assert node.folder == "/var/lib/mirrorpair/shop.beta"
    assert node.node_file == "/var/lib/mirrorpair/shop.beta/node"
    assert node.meta_path("data") == "/var/lib/mirrorpair/shop.beta/data.meta"


def test_a_node_knows_its_peer() -> None:
    config = read()
    assert config.peer_of("alpha") is config.node("beta")
    assert config.peer_of("beta") is config.node("alpha")


@pytest.mark.parametrize("name", ["gamma", "", "Alpha", "\x1b[31m"])
def test_a_name_that_is_no_node_is_told_with_the_ones_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="alpha or beta") as caught:
        read().node(name)
    assert str(caught.value).isprintable()
    with pytest.raises(ConfigError):
        read().peer_of(name)


def test_a_volume_that_is_not_there_is_a_wrong_command_line() -> None:
    with pytest.raises(UsageError, match="it has data"):
        read().volume("dat")


@pytest.mark.parametrize(
    ("profile", "beat"),
    [
        ("default", Heartbeat(interval=0.25, promise=3.0, suspect_after=4)),
        ("fast", Heartbeat(interval=0.1, promise=1.0, suspect_after=4)),
        ("wan", Heartbeat(interval=1.0, promise=10.0, suspect_after=4)),
    ],
)
def test_a_profile_stands_for_the_three_values(profile: str, beat: Heartbeat) -> None:
    assert read(("heartbeat/profile", profile)).heartbeat == beat


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/alpha", UnixAddress("/run/alpha")),
        ("unix:alpha", UnixAddress("/etc/mirrorpair/alpha")),
        ("localhost:7000", TcpAddress("localhost", 7000)),
        ("[::1]:7000", TcpAddress("::1", 7000)),
        ("127.3.2.1:7000", TcpAddress("127.3.2.1", 7000)),
    ],
)
def test_addresses_that_never_leave_the_host_need_no_word_about_it(text: str, address: object) -> None:
    assert read(("node/alpha/address", text)).node("alpha").address == address


@pytest.mark.parametrize("name", ["a", "alpha.example.org", "A-1_b", "9", "x" * 64])
def test_a_node_may_have_a_host_name(name: str) -> None:
    node = {**SMALL["node"]["alpha"], "control": "/run/other.sock"}
    config = read(("node/alpha", NO_VALUE), (f"node/{name}", node))
    assert config.node(name).folder == f"/var/lib/mirrorpair/shop.{name}"


def test_hosts_apart_may_use_the_same_paths_and_ports() -> None:
    same = {"control": "/run/m.sock", "nbd": ["tcp:127.0.0.1:10809", "unix:/run/m.nbd"], "image": {"data": "/srv/i"}}
    changes = [(f"node/{node}/{key}", value) for node in ("alpha", "beta") for key, value in same.items()]
    hosts = [("node/alpha/address", "10.0.0.1:7790"), ("node/beta/address", "10.0.0.2:7790")]
    config = read(*changes, *hosts, ("pair/insecure", True))
    assert config.node("alpha").images == config.node("beta").images


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:2379", "http://[::1]:2379", "https://10.0.0.9:2379"])
def test_an_etcd_here_or_with_tls_is_no_clear_text(endpoint: str) -> None:
    config = read(("pair/arbiter", "etcd"), ("etcd/endpoints", [endpoint]))
    assert config.etcd is not None
    assert (config.etcd.endpoints, config.etcd.prefix, config.etcd.user) == ((endpoint,), "/mirrorpair/", None)


# --- what is wrong: the key path, what was found, what was expected

LONG_SOCKET = "/run/" + "x" * 103

WRONG: list[tuple[str, object, str]] = [
    # (key, value, a piece of what is said)
    ("pear", {}, "pear: unknown key; did you mean pair?"),
    ("quux", 1, "quux: unknown key; expected"),
    ("pair", NO_VALUE, "pair: missing; expected a table [pair]"),
    ("pair", 3, "pair: found the number 3, expected a table"),
    ("pair", [], "pair: found an empty list, expected a table"),
    ("pair/name", NO_VALUE, "pair.name: missing; expected"),
    ("pair/name", 7, "pair.name: found the number 7, expected"),
    ("pair/name", "", 'pair.name: found "", expected'),
    ("pair/name", "a.b", 'pair.name: found "a.b", expected'),
    ("pair/name", "../x", 'pair.name: found "../x", expected'),
    ("pair/name", "x" * 64, "pair.name: found"),
    ("pair/name", "\x1b[2J", "\\x1b"),
    ("pair/Mode", "sync", "pair.Mode: unknown key; did you mean mode?"),
    ("pair/failback_delay", "1s", "pair.failback_delay: unknown key; did you mean failback-delay?"),
    ("pair/mode", "snyc", 'pair.mode: found "snyc", expected "sync", "semi-sync" or "async"; did you mean sync?'),
    ("pair/mode", True, "pair.mode: found true, expected"),
    ("pair/arbiter", "witnes", "did you mean witness?"),
    ("pair/arbiter", "raft", 'pair.arbiter: found "raft", expected "witness", "etcd" or "none"'),
    ("pair/arbiter", "witness", "witness: missing; expected a table [witness]"),
    ("pair/arbiter", "etcd", "etcd: missing; expected a table [etcd]"),
    ("pair/survivor", "both", "pair.survivor"),
    (
        "pair/prefer",
        "alhpa",
        'pair.prefer: found "alhpa", expected one of the nodes, "alpha" or "beta"; did you mean alpha?',
    ),
    ("pair/failback", "auto", "pair.failback"),
    ("pair/failback", "always", "pair.failback"),
    ("pair/failback-delay", 300, "pair.failback-delay: found the number 300, expected a time from 0ms to 7d"),
    ("pair/failback-delay", "8d", "pair.failback-delay"),
    ("pair/failback-delay", "-1s", "pair.failback-delay"),
    ("pair/max-role-changes-per-hour", -1, "expected a whole number from 0 to 1000"),
    ("pair/max-role-changes-per-hour", 1.5, "found the number 1.5, expected a whole number"),
    ("pair/max-role-changes-per-hour", True, "found true, expected a whole number"),
    ("pair/reads", "any", "pair.reads"),
    ("pair/insecure", "yes", 'pair.insecure: found "yes", expected true or false'),
    ("pair/insecure", 1, "pair.insecure: found the number 1, expected true or false"),
    ("heartbeat/intervall", "1s", "heartbeat.intervall: unknown key; did you mean interval?"),
    ("heartbeat/interval", "fast", "heartbeat.interval"),
    ("heartbeat/interval", "1ms", "heartbeat.interval"),
    ("heartbeat/interval", "2min", "heartbeat.interval"),
    ("heartbeat/promise", "11min", "heartbeat.promise"),
    ("heartbeat/promise", "1s", "heartbeat.promise"),  # shorter than four beats and what clocks may be off
    (
        "heartbeat/interval",
        "1s",
        "heartbeat.promise (3.00 s) to be at least interval x suspect-after + 200 ms = 4.20 s",
    ),
    ("heartbeat/suspect-after", 1, "heartbeat.suspect-after"),
    ("heartbeat/suspect-after", "4", "heartbeat.suspect-after"),
    ("heartbeat/profile", "slow", 'heartbeat.profile: found "slow", expected "default", "fast" or "wan"'),
    ("heartbeat", {"profile": "fast", "interval": "1s"}, "heartbeat.interval"),
    ("resync/rate", 5, "resync.rate"),
    ("resync/rate", "fast", "resync.rate"),
    ("resync/rate", "none", "resync.rate"),
    ("resync/rate", "0", "resync.rate"),
    ("resync/rate", "1KiB/s", "resync.rate"),
    ("resync/rate", "atuo", "did you mean auto?"),
    ("volume", NO_VALUE, "volume: missing; expected a table [volume]"),
    ("volume", {}, "volume: found a table, expected 1 to 64 volumes"),
    ("volume", {f"v{n}": {"size": "1MiB"} for n in range(65)}, "volume: found a table, expected 1 to 64 volumes"),
    ("volume/data", "1GiB", 'volume.data: found "1GiB", expected a table'),
    ("volume/..", {"size": "1GiB"}, 'volume: found the name "..", expected'),
    ("volume/a b", {"size": "1GiB"}, "volume: found the name"),
    ("volume/data/size", NO_VALUE, "volume.data.size: missing; expected"),
    ("volume/data/size", 1 << 30, "volume.data.size: found the number 1073741824, expected a size"),
    ("volume/data/size", "0", "volume.data.size"),
    ("volume/data/size", "2KiB", "volume.data.size"),
    ("volume/data/size", "4097", "volume.data.size"),
    ("volume/data/size", "10 GB!", "volume.data.size"),
    ("volume/data/size", "7EiB", "volume.data.size"),
    ("volume/data/block-size", "3KiB", "volume.data.block-size"),
    ("volume/data/block-size", "48KiB", "volume.data.block-size"),
    ("volume/data/block-size", "512KiB", "volume.data.block-size"),
    ("volume/data/blocksize", "64KiB", "volume.data.blocksize: unknown key; did you mean block-size?"),
    ("node", NO_VALUE, "node: missing; expected a table [node]"),
    ("node", {}, "node: found 0 nodes, expected two"),
    ("node/beta", NO_VALUE, "node: found 1 nodes (alpha), expected two"),
    ("node/gamma", SMALL["node"]["alpha"], "node: found 3 nodes (alpha, beta, gamma), expected two"),
    ("node/a\tb", {}, "node: found the name"),
    ("node/alpha/addres", "10.0.0.1:1", "node.alpha.addres: unknown key; did you mean address?"),
    ("node/alpha/address", NO_VALUE, "node.alpha.address: missing; expected"),
    ("node/alpha/address", "", "node.alpha.address"),
    ("node/alpha/address", "127.0.0.1", "node.alpha.address"),
    ("node/alpha/address", "127.0.0.1:0", "node.alpha.address"),
    ("node/alpha/address", "127.0.0.1:65536", "node.alpha.address"),
    ("node/alpha/address", ":7790", "node.alpha.address"),
    ("node/alpha/address", "0.0.0.0:7790", "node.alpha.address"),
    ("node/alpha/address", "[::]:7790", "node.alpha.address"),
    ("node/alpha/address", "::1:7790", "node.alpha.address"),
    ("node/alpha/address", "tcp:127.0.0.1:7790", "node.alpha.address"),
    ("node/alpha/address", "-oProxyCommand:1", "node.alpha.address"),
    ("node/alpha/address", "unix:", "node.alpha.address"),
    ("node/alpha/address", f"unix:{LONG_SOCKET}", "node.alpha.address"),
    ("node/alpha/address", ["127.0.0.1:7790"], "node.alpha.address: found a list of 1, expected"),
    ("node/alpha/address", "10.0.0.1:7790", 'node.alpha.address: found "10.0.0.1:7790", expected a loopback address'),
    ("node/alpha/address", "alpha.example.org:7790", "expected a loopback address"),
    ("node/alpha/heartbeat-address", "127.0.0.1:1", "node.alpha.heartbeat-address: found"),
    ("node/alpha/heartbeat-address", ["127.0.0.1:0"], "node.alpha.heartbeat-address[0]: found"),
    ("node/alpha/heartbeat-address", ["192.168.7.1:1"], "node.alpha.heartbeat-address[0]: found"),
    ("node/alpha/state-dir", NO_VALUE, "node.alpha.state-dir: missing"),
    ("node/alpha/state-dir", "", "node.alpha.state-dir"),
    ("node/alpha/state-dir", "a\0b", "node.alpha.state-dir"),
    ("node/alpha/state-dir", "x" * 5000, "node.alpha.state-dir"),
    ("node/alpha/control", NO_VALUE, "node.alpha.control: missing"),
    ("node/alpha/control", LONG_SOCKET, "at most 107 bytes"),
    ("node/alpha/control", False, "node.alpha.control"),
    ("node/alpha/nbd", NO_VALUE, "node.alpha.nbd: missing"),
    ("node/alpha/nbd", [], "node.alpha.nbd: found an empty list, expected a list with at least one"),
    ("node/alpha/nbd", "unix:/x", "node.alpha.nbd"),
    ("node/alpha/nbd", ["/run/a.nbd"], "node.alpha.nbd[0]"),
    ("node/alpha/nbd", ["127.0.0.1:10809"], "node.alpha.nbd[0]"),
    ("node/alpha/nbd", ["unix:/a", "tcp:127.0.0.1:0"], "node.alpha.nbd[1]"),
    ("node/alpha/nbd", ["unix:/a", 3], "node.alpha.nbd[1]: found the number 3"),
    ("node/alpha/nbd", ["tcp:0.0.0.0:10809"], "node.alpha.nbd[0]"),
    ("node/alpha/nbd", ["tcp:10.0.0.1:10809"], "expected a loopback address"),
    ("node/alpha/nbd", [f"unix:/run/{n}" for n in range(65)], "node.alpha.nbd: found a list of 65"),
    ("node/alpha/http", "7792", "node.alpha.http"),
    ("node/alpha/http", "unix:/x", "node.alpha.http"),
    ("node/alpha/http", "10.0.0.1:80", "expected a loopback address"),
    ("node/alpha/nbd-forward", "no", "node.alpha.nbd-forward"),
    ("node/alpha/vip", "10.0.0.100/24", "node.alpha.vip-interface: missing"),
    ("node/alpha/vip-interface", "eth0", "node.alpha.vip: missing"),
    ("node/alpha/image", NO_VALUE, "node.alpha.image: missing"),
    ("node/alpha/image", "/srv/a.img", 'node.alpha.image: found "/srv/a.img", expected a table'),
    ("node/alpha/image", {}, "node.alpha.image.data: missing"),
    ("node/alpha/image/data", "", "node.alpha.image.data"),
    ("node/alpha/image/date", "/srv/b.img", "node.alpha.image.date: unknown key; did you mean data?"),
    ("witness", {"address": "127.0.0.1:1"}, "witness.state-dir: missing"),
    ("witness", {"state-dir": "/var/w"}, "witness.address: missing"),
    ("witness", {"address": "127.0.0.1:0", "state-dir": "/var/w"}, "witness.address"),
    ("witness", {"address": "10.0.0.9:1", "state-dir": "/var/w"}, "expected a loopback address"),
    ("witness", {"adress": "127.0.0.1:1", "state-dir": "/var/w"}, "did you mean address?"),
    ("etcd", {}, "etcd.endpoints: missing"),
    ("etcd/endpoints", [], "etcd.endpoints"),
    ("etcd/endpoints", ["10.0.0.9:2379"], "etcd.endpoints[0]"),
    ("etcd/endpoints", ["https://10.0.0.9"], "etcd.endpoints[0]"),
    ("etcd/endpoints", ["https://10.0.0.9:2379/v3"], "etcd.endpoints[0]"),
    ("etcd/endpoints", ["https://me:secret@10.0.0.9:2379"], "etcd.endpoints[0]"),
    ("etcd/endpoints", ["https://[::1:2379"], "etcd.endpoints[0]"),
    ("etcd/endpoints", ["http://10.0.0.9:2379"], "expected a loopback address"),
    ("etcd", {"endpoints": ["https://e:1"], "prefix": "x"}, "etcd.prefix"),
    ("etcd", {"endpoints": ["https://e:1"], "user": "u"}, "etcd.password-file: missing"),
    ("etcd", {"endpoints": ["https://e:1"], "password-file": "p"}, "etcd.user: missing"),
    ("etcd", {"endpoints": ["https://e:1"], "cert": "c"}, "etcd.key: missing"),
    ("etcd", {"endpoints": ["https://e:1"], "key": "k"}, "etcd.cert: missing"),
    ("hooks/dirs", "x", "hooks.dirs: unknown key; did you mean dir?"),
    ("hooks/dir", 3, "hooks.dir"),
    ("hooks/fence-peer", "", "hooks.fence-peer"),
    ("tls", {"dir": "/etc/mirrorpair/tls"}, "TLS is not built yet"),
    ("tls", {}, "TLS is not built yet"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG, ids=[f"{n}-{key}" for n, (key, _, _) in enumerate(WRONG)])
def test_each_wrong_thing_is_told_with_its_key_path(key: str, value: object, said: str) -> None:
    message = refused((key, value))
    assert said in message
    assert "found" in message or "missing" in message or "unknown key" in message
    assert "expected" in message or "did you mean" in message
    assert len(message) < 500


def test_a_survivor_is_declared_for_a_lone_pair_only() -> None:
    assert read(("pair/survivor", "secondary")).survivor == "secondary"
    witness = ("witness", {"address": "127.0.0.1:1", "state-dir": "/var/w"})
    assert "pair.survivor" in refused(("pair/survivor", "secondary"), ("pair/arbiter", "witness"), witness)


@pytest.mark.parametrize("vip", ["10.0.0.100", "10.0.0.0.1/24", "eth0", "10.0.0.1/33", 1, "a/b"])
def test_a_virtual_address_needs_its_prefix_length(vip: object) -> None:
    assert "node.alpha.vip:" in refused(("node/alpha/vip", vip), ("node/alpha/vip-interface", "eth0"))


@pytest.mark.parametrize("interface", ["", "..", "a/b", "x" * 16, "a b", 0])
def test_the_interface_of_a_virtual_address_has_a_name_that_can_be_one(interface: object) -> None:
    said = refused(("node/alpha/vip", "10.0.0.1/24"), ("node/alpha/vip-interface", interface))
    assert "node.alpha.vip-interface" in said


def test_a_tls_table_is_refused_even_when_clear_text_was_allowed() -> None:
    assert "TLS is not built yet" in refused(("tls", {"dir": "x"}), ("pair/insecure", True))


def test_clear_text_beyond_the_host_needs_a_word() -> None:
    changes = (("node/alpha/address", "10.0.0.1:7790"), ("node/beta/address", "10.0.0.2:7790"))
    assert "pair.insecure = true allows that" in refused(*changes)
    assert read(*changes, ("pair/insecure", True)).insecure


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("node/alpha/image/data", "/run/alpha.sock", "node.alpha.control"),
        ("node/alpha/image/data", "/var/lib/mirrorpair/shop.alpha/data.meta", "the metadata of data"),
        ("node/alpha/image/data", "/var/lib/mirrorpair/x/../shop.alpha/node", "its node file"),
        ("node/alpha/image/data", "/var/lib/mirrorpair/shop.alpha", "its node file"),
        ("node/alpha/image/data", "/", "node.alpha.nbd[0]"),
        ("node/alpha/image/data", "pair.toml", "the configuration itself"),
        ("node/alpha/image/data", "/run", "node.alpha.nbd[0]"),
        ("node/alpha/control", "/run/alpha.nbd", "node.alpha.nbd[0]"),
        ("node/alpha/control", "//run//./alpha.nbd", "node.alpha.nbd[0]"),
        ("node/alpha/nbd", ["unix:/run/x", "unix:/run/x"], "node.alpha.nbd[0]"),
        ("node/alpha/nbd", ["tcp:127.0.0.1:7790"], "node.alpha.address"),
        ("node/alpha/nbd", ["tcp:localhost:7790"], "node.alpha.address"),
        ("node/alpha/nbd", ["tcp:[::1]:1", "tcp:[0:0::1]:1"], "node.alpha.nbd[0]"),
        ("node/alpha/http", "127.0.0.1:7790", "node.alpha.address"),
        ("node/alpha/heartbeat-address", ["127.0.0.1:7790"], "node.alpha.address"),
        # both on loopback: one machine
        ("node/beta/address", "127.0.0.1:7790", "node.alpha.address"),
        ("node/beta/address", "unix:/run/alpha.nbd", "node.alpha.nbd[0]"),
        ("node/beta/image/data", "/srv/alpha.img", "node.alpha.image.data"),
        ("node/beta/control", "/run/alpha.sock", "node.alpha.control"),
        ("node/beta/nbd", ["unix:/run/alpha.nbd"], "node.alpha.nbd[0]"),
        ("witness", {"address": "127.0.0.1:7790", "state-dir": "/w"}, "node.alpha.address"),
    ],
)
def test_no_two_things_share_a_path_or_an_address(key: str, value: object, other: str) -> None:
    message = refused((key, value))
    assert "expected another than that of" in message
    assert other in message


def test_a_wildcard_takes_the_port_of_every_address() -> None:
    change = ("node/alpha/nbd", ["tcp:0.0.0.0:7790"])
    assert "expected another than that of node.alpha.address" in refused(change, ("pair/insecure", True))


@pytest.mark.parametrize("beta", ["10.0.0.1:7790", "10.0.0.1:7791"])
def test_two_nodes_of_one_host_are_seen_as_such(beta: str) -> None:
    shared = [("node/alpha/control", "/run/m.sock"), ("node/beta/control", "/run/m.sock"), ("pair/insecure", True)]
    refused(("node/alpha/address", "10.0.0.1:7790"), ("node/beta/address", beta), *shared)


def test_hosts_apart_cannot_have_one_dialled_address() -> None:
    changes = (
        ("pair/insecure", True),
        ("node/alpha/address", "10.0.0.1:7790"),
        ("node/beta/address", "10.0.0.2:7790"),
        ("node/beta/heartbeat-address", ["10.0.0.1:7790"]),
    )
    assert "node.alpha.address" in refused(*changes)


def test_several_volumes_need_an_image_each_on_both_nodes() -> None:
    more = ("volume/logs", {"size": "1MiB"})
    assert "node.alpha.image.logs: missing" in refused(more)
    images = [(f"node/{node}/image/logs", f"/srv/{node}-logs.img") for node in ("alpha", "beta")]
    assert [volume.name for volume in read(more, *images).volumes] == ["data", "logs"]
    same = ("node/alpha/image/logs", "/srv/alpha.img")
    assert "node.alpha.image.data" in refused(more, *images, same)


def test_a_volume_has_no_more_extents_than_the_activity_log_can_name() -> None:
    largest = MAX_EXTENTS * 64 * 4096
    small_blocks = ("volume/data/block-size", "4KiB")
    assert read(small_blocks, ("volume/data/size", str(largest))).volume("data").size == largest
    assert "volume.data.size" in refused(small_blocks, ("volume/data/size", str(largest + 512)))


# --- the file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[pair", "not valid TOML"),
        (b"a = 1\na = 2", "not valid TOML"),
        (b"[pair]\nname = 'x'\n\xff", "line 3: found byte 0xff, expected UTF-8"),
        (b"a = " + b"[" * 5000, "TOML"),
        (b"a = " + b"9" * 5000, "TOML"),
        (b"", "pair: missing"),
        (b"a = 1979-05-27", "a: unknown key"),
        (b"pair = 1979-05-27", "pair: found the time 1979-05-27, expected a table"),
        (b"\0", "not valid TOML"),
    ],
)
def test_what_is_no_configuration_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(content, FILE)
    assert said in str(caught.value)
    assert str(caught.value).startswith(FILE)
    assert str(caught.value).isprintable()


def test_a_file_is_read_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pair.toml").write_bytes(changed(("node/alpha/image/data", "data.img")))
    monkeypatch.chdir(tmp_path)
    config = load("pair.toml")
    assert config.path == str(tmp_path / "pair.toml")
    assert config.node("alpha").images["data"] == str(tmp_path / "data.img")


def test_a_file_that_is_missing_is_told_with_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*-c FILE or \$MIRRORPAIR_CONFIG"):
        load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("path", ["", "a\0b", "/dev/null/x", "/"])
def test_a_path_that_cannot_be_read_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError):
        load(path)


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(ConfigError, match=f"more than {MAX_FILE_BYTES} bytes"):
        load("/dev/zero")


def test_a_file_that_may_not_be_read_is_a_config_error(public_folder: Path, as_nobody: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = public_folder / "pair.toml"
    path.write_bytes(changed())
    path.chmod(0o600)
    with as_nobody(), pytest.raises(ConfigError, match="Permission denied"):
        load(str(path))


# --- properties

KEY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=12)
VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(0, 1e6), st.text(max_size=40)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEY_TEXT, inner, max_size=3)),
    max_leaves=6,
)


def paths_of(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += paths_of(value, f"{prefix}{key}/")
    return found


def said_about(*changes: tuple[str, object]) -> str:
    """Why the file was refused; nothing when it was read."""
    try:
        read(*changes)
    except ConfigError as error:
        return str(error)
    return ""


@settings(deadline=None)
@given(path=st.sampled_from(paths_of(SMALL)), value=VALUES)
def test_whatever_stands_for_a_value_it_is_read_or_told_in_one_sentence(path: str, value: object) -> None:
    said = said_about((path, value))
    if said:
        assert said.startswith(f"{FILE}: ")
        assert said.isprintable()
        assert len(said) < 1000


@settings(deadline=None)
@given(path=st.sampled_from(["pair", "heartbeat", "resync", "volume/data", "node/alpha", "hooks"]), key=KEY_TEXT)
def test_no_unknown_key_is_ever_ignored(path: str, key: str) -> None:
    known = {"pair": config_module._PAIR_KEYS, "heartbeat": config_module._HEARTBEAT_KEYS}.get(
        path, (*config_module._NODE_KEYS, "size", "block-size", "rate", "dir", "fence-peer")
    )
    assume(key not in known)
    assert "unknown key" in refused((f"{path}/{key}", 1))


@settings(deadline=None)
@given(content=st.binary(max_size=300))
def test_no_bytes_make_anything_but_a_config_error(content: bytes) -> None:
    with pytest.raises(ConfigError):
        parse(content, FILE)


@settings(deadline=None)
@given(missing=st.sampled_from([path for path in paths_of(SMALL) if path != "pair/arbiter"]))
def test_every_value_of_the_smallest_file_is_needed(missing: str) -> None:
    assert missing.split("/")[0] in refused((missing, NO_VALUE))


@settings(deadline=None)
@given(
    size=st.integers(8, 2**31).map(lambda sectors: sectors * 512),
    block_size=st.sampled_from(["4KiB", "8KiB", "64KiB", "256KiB"]),
    interval_ms=st.integers(10, 1000),
    suspect_after=st.integers(2, 10),
    spare_ms=st.integers(200, 5000),
)
def test_what_is_written_is_what_is_read(
    size: int, block_size: str, interval_ms: int, suspect_after: int, spare_ms: int
) -> None:
    promise_ms = interval_ms * suspect_after + spare_ms + 1
    config = read(
        ("volume/data", {"size": str(size), "block-size": block_size}),
        (
            "heartbeat",
            {"interval": f"{interval_ms}ms", "promise": f"{promise_ms}ms", "suspect-after": suspect_after},
        ),
    )
    assert config.volumes == (Volume(name="data", size=size, block_size=parse_size(block_size)),)
    assert config.heartbeat == Heartbeat(
        interval=interval_ms / 1000, promise=promise_ms / 1000, suspect_after=suspect_after
    )


PATHS = st.text(string.ascii_letters + "./ü ", min_size=1, max_size=30)


@settings(deadline=None)
@given(path=PATHS)
def test_a_path_is_absolute_and_in_its_shortest_form(path: str) -> None:
    change = ("node/alpha/image/data", path)
    if said := said_about(change):
        assert "expected another than that of" in said  # such as "/"
        return
    found = read(change).node("alpha").images["data"]
    assert found == "/" + posixpath.normpath(posixpath.join(posixpath.dirname(FILE), path)).lstrip("/")


@settings(deadline=None)
@given(keys=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_a_key_path_is_always_one_harmless_line(keys: list[str]) -> None:
    assert dotted(keys).isprintable()
