"""The pair's configuration: one TOML file, the same on both hosts and the witness, as typed and validated structs.

Rules:
- Validated once, here, as a whole; behind `load` every value is used freely. Every key of the contract is parsed, also
  those whose feature another build brings: a file that is right today stays right.
- Every error is a ConfigError (exit 10) of one sentence: file, key path, what was found, what was expected.
- Never in clear by accident: a TCP address beyond loopback needs `insecure = true` as long as TLS is not built, and a
  [tls] table is refused, not ignored.
- Sizes are bytes, rates bytes per second, times seconds (float). Paths are absolute and normalised, relative ones
  counted from the file's folder. Nothing on the disk is looked at: the file also describes other hosts.
- Volumes and nodes are sorted by name, so that both hosts number them alike whatever order their files have.
- No two things share a path or a listening address: everything of one node, and of both where the file shows that they
  run on one machine (both addresses are loopback or unix, or have the same host).
"""

from __future__ import annotations

import ipaddress
import posixpath
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

import msgspec

from mirrorpair.address import (
    MAX_PATH_BYTES,
    MAX_UNIX_PATH_BYTES,
    Address,
    TcpAddress,
    UnixAddress,
    parse_dialled,
    parse_listener,
    parse_tcp,
    resolve,
    resolve_socket,
)
from mirrorpair.errors import ConfigError, UsageError
from mirrorpair.messages import MAX_BLOCK, MIN_BLOCK
from mirrorpair.text import printable
from mirrorpair.tomltable import (
    FLAG,
    Kind,
    Table,
    choice,
    dotted,
    either,
    matching,
    parse_toml,
    seconds,
    shown,
    text,
    whole_number,
)
from mirrorpair.units import format_seconds, parse_rate, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_PATH = "/etc/mirrorpair/pair.toml"

MAX_FILE_BYTES = 1 << 20
MAX_VOLUMES = 64
SECTOR = 512  # block devices are made of whole ones, so a volume is too
EXTENT_BLOCKS = 64
MAX_EXTENTS = 2**32 - 2  # the activity log holds extent numbers, plus one, in 32 bits
MIN_RATE = 64 * 1024

CLOCK_MARGIN = 0.2
"""seconds: what the drift of the clocks and delta (A10) may take off a promise, for sizing it"""

Mode = Literal["sync", "semi-sync", "async"]
Arbiter = Literal["witness", "etcd", "none"]
Survivor = Literal["primary", "secondary"]


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """A beat every `interval` seconds, a promise of `promise` seconds in each reply, suspicion after `suspect_after`
    missed beats."""

    interval: float = 0.25
    promise: float = 3.0
    suspect_after: int = 4


PROFILES = {
    "default": Heartbeat(),
    "fast": Heartbeat(interval=0.1, promise=1.0),
    "wan": Heartbeat(interval=1.0, promise=10.0),
}


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is also the NBD export's; `size` and `block_size` in bytes."""

    name: str
    size: int
    block_size: int = 64 * 1024


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One host. `images` has one path for each volume; `folder` is where its node file and metadata lie."""

    name: str
    address: Address
    heartbeat_addresses: tuple[Address, ...] = ()
    state_dir: str
    folder: str
    control: str
    nbd: tuple[Address, ...]
    http: TcpAddress | None = None
    nbd_forward: bool = False
    vip: str | None = None
    vip_interface: str | None = None
    images: dict[str, str]

    @property
    def node_file(self) -> str:
        return f"{self.folder}/node"

    @property
    def record_file(self) -> str:
        """The lone pair's copy of the register."""
        return f"{self.folder}/register"

    @property
    def history_file(self) -> str:
        return f"{self.folder}/history"

    def meta_path(self, volume: str) -> str:
        """The metadata file of this volume on this node."""
        return f"{self.folder}/{volume}.meta"


class Witness(msgspec.Struct, frozen=True, kw_only=True):
    address: Address
    state_dir: str


class Etcd(msgspec.Struct, frozen=True, kw_only=True):
    """`endpoints` without a trailing slash; `user` and `password_file`, `cert` and `key` come in pairs."""

    endpoints: tuple[str, ...]
    prefix: str = "/mirrorpair/"
    user: str | None = None
    password_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class Hooks(msgspec.Struct, frozen=True, kw_only=True):
    dir: str | None = None
    fence_peer: str | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file. `rate` 0 is "auto"; `survivor` counts only with `arbiter` "none"."""

    path: str
    name: str
    mode: Mode = "sync"
    arbiter: Arbiter = "witness"
    survivor: Survivor = "primary"
    prefer: str | None = None
    failback: Literal["manual", "auto"] = "manual"
    failback_delay: float = 300.0
    max_role_changes_per_hour: int = 3
    reads: Literal["validity", "confirm"] = "validity"
    insecure: bool = False
    heartbeat: Heartbeat = Heartbeat()
    rate: int = 0
    volumes: tuple[Volume, ...]
    nodes: tuple[Node, Node]
    witness: Witness | None = None
    etcd: Etcd | None = None
    hooks: Hooks = Hooks()

    def node(self, name: str) -> Node:
        """The node of this name; ConfigError when there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = either([node.name for node in self.nodes], quoted=False)
        raise ConfigError(
            f"{printable(self.path)}: node.{printable(name, 80)}: missing; expected this node to be {names} "
            "(--node NAME or $MIRRORPAIR_NODE says which)"
        )

    def peer_of(self, name: str) -> Node:
        """The other node."""
        self.node(name)
        first, second = self.nodes
        return second if first.name == name else first

    def volume(self, name: str) -> Volume:
        """The volume of this name; UsageError when there is none, since only a command line names volumes."""
        for volume in self.volumes:
            if volume.name == name:
                return volume
        names = either([volume.name for volume in self.volumes], quoted=False)
        raise UsageError(f"the pair {self.name} has no volume {printable(name, 80)!r}; it has {names}")


def load(path: str) -> Config:
    """Reads and validates the file; ConfigError says what is wrong with it, also when it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{printable(path)}: found no such file, expected the pair's configuration (-c FILE or $MIRRORPAIR_CONFIG "
            "says where it is)"
        ) from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a valid path"
        raise ConfigError(f"{printable(path)}: cannot read the configuration: {reason}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{printable(path)}: found more than {MAX_FILE_BYTES} bytes, expected a configuration in TOML"
        )
    return parse(content, posixpath.abspath(path))


def parse(content: bytes, path: str) -> Config:
    """The file's content as a Config; `path` is the file's own, absolute."""
    assert posixpath.isabs(path)
    base = posixpath.dirname(path)
    root = Table(path, (), parse_toml(content, path), _ROOT_KEYS)
    if "tls" in root:
        raise ConfigError(
            f"{printable(path)}: tls: found a [tls] table, expected none: TLS is not built yet, and this pair will not "
            "run in clear instead; remove [tls] and keep to loopback, or say pair.insecure = true"
        )
    pair = root.table("pair", _PAIR_KEYS, required=True)
    name = pair.need("name", _PAIR_NAME)
    insecure = pair.get("insecure", FLAG, False)
    volumes = _volumes(root)
    nodes = _nodes(root, base, name, [volume.name for volume in volumes])
    arbiter = cast(Arbiter, pair.get("arbiter", choice("witness", "etcd", "none"), "witness"))
    config = Config(
        path=path,
        name=name,
        mode=cast(Mode, pair.get("mode", choice("sync", "semi-sync", "async"), "sync")),
        arbiter=arbiter,
        survivor=_survivor(pair, arbiter),
        prefer=_prefer(pair, [node.name for node in nodes]),
        failback=_failback(pair),
        failback_delay=pair.get("failback-delay", seconds(0.0, 7 * 86400.0), 300.0),
        max_role_changes_per_hour=pair.get("max-role-changes-per-hour", whole_number(0, 1000), 3),
        reads=cast(Literal["validity", "confirm"], pair.get("reads", choice("validity", "confirm"), "validity")),
        insecure=insecure,
        heartbeat=_heartbeat(root.table("heartbeat", _HEARTBEAT_KEYS)),
        rate=root.table("resync", {"rate"}).get("rate", _RATE, 0),
        volumes=volumes,
        nodes=nodes,
        witness=_witness(root, base, required=arbiter == "witness"),
        etcd=_etcd(root, base, required=arbiter == "etcd"),
        hooks=_hooks(root, base),
    )
    _check_clear_text(config)
    _check_overlaps(config)
    return config


# --- the tables

_ROOT_KEYS = ("pair", "heartbeat", "resync", "volume", "node", "witness", "etcd", "tls", "hooks")
_PAIR_KEYS = (
    "name",
    "mode",
    "arbiter",
    "survivor",
    "prefer",
    "failback",
    "failback-delay",
    "max-role-changes-per-hour",
    "reads",
    "insecure",
)
_HEARTBEAT_KEYS = ("interval", "promise", "suspect-after", "profile")
_NODE_KEYS = (
    "address",
    "heartbeat-address",
    "state-dir",
    "control",
    "nbd",
    "http",
    "nbd-forward",
    "vip",
    "vip-interface",
    "image",
)
_ETCD_KEYS = ("endpoints", "prefix", "user", "password-file", "ca", "cert", "key")


def _survivor(pair: Table, arbiter: Arbiter) -> Survivor:
    survivor = cast(Survivor, pair.get("survivor", choice("primary", "secondary"), "primary"))
    if "survivor" in pair and arbiter != "none":
        raise pair.error("survivor", f'it only with pair.arbiter = "none", which is "{arbiter}"')
    return survivor


def _prefer(pair: Table, nodes: list[str]) -> str | None:
    prefer = pair.get("prefer", _NAME, None)
    if prefer is not None and prefer not in nodes:
        raise pair.error("prefer", f"one of the nodes, {either(nodes)}", nodes)
    return prefer


def _failback(pair: Table) -> Literal["manual", "auto"]:
    failback = cast(Literal["manual", "auto"], pair.get("failback", choice("manual", "auto"), "manual"))
    if failback == "auto" and "prefer" not in pair:
        raise pair.error("failback", '"manual", since pair.prefer does not say which node to go back to')
    return failback


def _heartbeat(table: Table) -> Heartbeat:
    profile = table.get("profile", choice(*PROFILES), None)
    if profile is not None:
        for key in ("interval", "promise", "suspect-after"):
            if key in table:
                raise table.error(key, "either heartbeat.profile or the three values themselves, not both")
        return PROFILES[profile]
    default = Heartbeat()
    beat = Heartbeat(
        interval=table.get("interval", seconds(0.01, 60.0), default.interval),
        promise=table.get("promise", seconds(0.1, 600.0), default.promise),
        suspect_after=table.get("suspect-after", whole_number(2, 100), default.suspect_after),
    )
    least = beat.interval * beat.suspect_after + CLOCK_MARGIN
    if beat.promise < least:
        # The promise is renewed by each beat: one that ends before the peer is even suspected stops reads for nothing.
        key = next((key for key in ("promise", "interval", "suspect-after") if key in table), "promise")
        raise table.error(
            key,
            f"heartbeat.promise ({format_seconds(beat.promise)}) to be at least interval x suspect-after + 200 ms = "
            f"{format_seconds(least)}",
        )
    return beat


def _volumes(root: Table) -> tuple[Volume, ...]:
    table = root.table("volume", None, required=True)
    if not 1 <= len(table.values) <= MAX_VOLUMES:
        raise root.error("volume", f"1 to {MAX_VOLUMES} volumes, each a table [volume.NAME]")
    volumes = []
    for name in table:
        _check_name(table, name)
        one = table.table(name, ("size", "block-size"))
        block_size = one.get("block-size", _BLOCK_SIZE, 64 * 1024)
        size = one.need("size", _SIZE)
        largest = MAX_EXTENTS * EXTENT_BLOCKS * block_size
        if size > largest:
            raise one.error("size", f"at most {largest} bytes with this block-size")
        volumes.append(Volume(name=name, size=size, block_size=block_size))
    return tuple(sorted(volumes, key=lambda volume: volume.name))


def _nodes(root: Table, base: str, pair: str, volumes: list[str]) -> tuple[Node, Node]:
    table = root.table("node", None, required=True)
    for name in table:
        _check_name(table, name)
    if len(table.values) != 2:
        names = f" ({', '.join(sorted(table))})" if table.values else ""
        raise ConfigError(
            f"{printable(root.file)}: node: found {len(table.values)} nodes{names}, expected two, "
            "[node.NAME] for each host"
        )
    first, second = (_node(table.table(name, _NODE_KEYS), base, pair, name, volumes) for name in sorted(table))
    return first, second


def _node(table: Table, base: str, pair: str, name: str, volumes: list[str]) -> Node:
    state_dir = table.need("state-dir", _path(base))
    vip, interface = table.get("vip", _VIP, None), table.get("vip-interface", _INTERFACE, None)
    if (vip is None) != (interface is None):
        raise table.error("vip" if vip is None else "vip-interface", "vip and vip-interface together, or neither")
    images = table.table("image", volumes, required=True)
    return Node(
        name=name,
        address=table.need("address", _dialled(base)),
        heartbeat_addresses=table.items("heartbeat-address", _dialled(base), required=False),
        state_dir=state_dir,
        folder=posixpath.join(state_dir, f"{pair}.{name}"),
        control=table.need("control", _socket(base)),
        nbd=table.items("nbd", _listener(base), required=True),
        http=table.get("http", _TCP, None),
        nbd_forward=table.get("nbd-forward", FLAG, False),
        vip=vip,
        vip_interface=interface,
        images={volume: images.need(volume, _path(base)) for volume in volumes},
    )


def _witness(root: Table, base: str, *, required: bool) -> Witness | None:
    table = root.table("witness", ("address", "state-dir"), required=required)
    if "witness" not in root:
        return None
    return Witness(address=table.need("address", _dialled(base)), state_dir=table.need("state-dir", _path(base)))


def _etcd(root: Table, base: str, *, required: bool) -> Etcd | None:
    table = root.table("etcd", _ETCD_KEYS, required=required)
    if "etcd" not in root:
        return None
    for one, other in (("user", "password-file"), ("cert", "key")):
        if (one in table) != (other in table):
            raise table.error(other if one in table else one, f"etcd.{one} and etcd.{other} together, or neither")
    return Etcd(
        endpoints=table.items("endpoints", _ENDPOINT, required=True),
        prefix=table.get("prefix", _PREFIX, "/mirrorpair/"),
        user=table.get("user", _WORD, None),
        password_file=table.get("password-file", _path(base), None),
        ca=table.get("ca", _path(base), None),
        cert=table.get("cert", _path(base), None),
        key=table.get("key", _path(base), None),
    )


def _hooks(root: Table, base: str) -> Hooks:
    table = root.table("hooks", ("dir", "fence-peer"))
    return Hooks(dir=table.get("dir", _path(base), None), fence_peer=table.get("fence-peer", _path(base), None))


def _check_name(table: Table, name: str) -> None:
    try:
        _NAME.parse(name)
    except ValueError:
        raise ConfigError(
            f"{printable(table.file)}: {dotted(table.at)}: found the name {shown(name)}, expected {_NAME.expected}"
        ) from None


# --- kinds of values


def _volume_size(value: str) -> int:
    size = parse_size(value)
    if size < MIN_BLOCK or size % SECTOR:
        raise ValueError("too small, or not made of sectors")
    return size


def _block_size(value: str) -> int:
    size = parse_size(value)
    if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
        raise ValueError("no power of two in the range")
    return size


def _rate(value: str) -> int:
    if value == "auto":
        return 0
    rate = parse_rate(value)
    if rate < MIN_RATE:
        raise ValueError("too slow to end, or another word for auto")
    return rate


def _vip(value: str) -> str:
    if "/" not in value:
        raise ValueError("a prefix length is missing")
    return str(ipaddress.ip_interface(value))


def _endpoint(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("not an address")
    address = parse_tcp(parts.netloc)  # a user or a password is no part of a host, so it is refused
    return f"{parts.scheme}://{address}"


def _path(base: str) -> Kind[str]:
    return text(lambda value: resolve(value, base), f"a path of at most {MAX_PATH_BYTES} bytes")


def _socket(base: str) -> Kind[str]:
    return text(
        lambda value: resolve_socket(value, base),
        f"a path of at most {MAX_UNIX_PATH_BYTES} bytes, since it is a socket's",
    )


def _dialled(base: str) -> Kind[Address]:
    return text(lambda value: parse_dialled(value, base), f"HOST:PORT that can be dialled, or {_UNIX}")


def _listener(base: str) -> Kind[Address]:
    return text(lambda value: parse_listener(value, base), f"tcp:HOST:PORT, or {_UNIX}")


_UNIX = f"unix:PATH of at most {MAX_UNIX_PATH_BYTES} bytes"
_TCP = text(parse_tcp, "HOST:PORT, an IPv6 address in brackets, the port not 0")
_SIZE = text(_volume_size, f'a size of at least 4KiB in whole sectors of {SECTOR} bytes, such as "10GiB"')
_BLOCK_SIZE = text(_block_size, 'a power of two from 4KiB to 256KiB, such as "64KiB"')
_RATE = text(_rate, '"auto", or a rate of at least 64KiB/s, such as "200MiB/s"', ("auto",))
_VIP = text(_vip, 'an address with its prefix length, such as "10.0.0.100/24"')
_ENDPOINT = text(_endpoint, '"https://HOST:PORT" or "http://HOST:PORT"')
# A pair's name has no dot: `<pair>.<node>` then names one pair and one node only. A node may have a full host name.
_PAIR_NAME = matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", "1 to 63 letters, digits, '-' and '_', the first no sign")
_NAME = matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "1 to 64 letters, digits, '-', '_' and '.', the first no sign")
_WORD = matching(r"\S(.{0,254}\S)?", "a text of 1 to 256 characters")
_PREFIX = matching(r"/([!-~]{0,200}/)?", 'a key prefix that begins and ends with "/", such as "/mirrorpair/"')
_INTERFACE = matching(r"(?!\.{1,2}$)[^\s/:]{1,15}", 'the name of a network interface, such as "eth0"')


# --- what spans tables


class _Use(msgspec.Struct, frozen=True):
    """A path that is made or a TCP address that is listened on. `dialled`: by the peer, so it means the same host
    wherever it is read."""

    at: str
    what: str | TcpAddress
    dialled: bool = False


def _listened(at: str, address: Address, *, dialled: bool = False) -> _Use:
    return _Use(at, address.path if isinstance(address, UnixAddress) else address, dialled)


def _uses(config: Config, node: Node) -> Iterator[_Use]:
    at = dotted(("node", node.name))
    yield _listened(f"{at}.address", node.address, dialled=True)
    for index, address in enumerate(node.heartbeat_addresses):
        yield _listened(f"{at}.heartbeat-address[{index}]", address, dialled=True)
    for index, address in enumerate(node.nbd):
        yield _listened(f"{at}.nbd[{index}]", address)
    if node.http is not None:
        yield _Use(f"{at}.http", node.http)
    yield _Use(f"{at}.control", node.control)
    for volume in config.volumes:
        yield _Use(f"{at}.image.{dotted((volume.name,))}", node.images[volume.name])
    # What `init` makes in the folder; other things may lie beside them.
    yield _Use(f"{at}.state-dir (its node file)", node.node_file)
    yield _Use(f"{at}.state-dir (its history)", node.history_file)
    for volume in config.volumes:
        yield _Use(f"{at}.state-dir (the metadata of {volume.name})", node.meta_path(volume.name))


def _common_uses(config: Config) -> Iterator[_Use]:
    yield _Use("the configuration itself", config.path)
    if config.witness is not None:
        yield _listened("witness.address", config.witness.address, dialled=True)


def _check_clear_text(config: Config) -> None:
    if config.insecure:
        return
    listened = [*_uses(config, config.nodes[0]), *_uses(config, config.nodes[1]), *_common_uses(config)]
    in_clear = [
        (use.at, str(use.what)) for use in listened if isinstance(use.what, TcpAddress) and not use.what.loopback
    ]
    for index, endpoint in enumerate(config.etcd.endpoints if config.etcd else ()):
        if endpoint.startswith("http://") and not parse_tcp(endpoint.removeprefix("http://")).loopback:
            in_clear.append((f"etcd.endpoints[{index}]", endpoint))
    for at, found in in_clear:
        raise ConfigError(
            f"{printable(config.path)}: {at}: found {shown(found)}, expected a loopback address: what goes beyond this "
            "host would be in clear, for TLS is not built yet; pair.insecure = true allows that"
        )


def _check_overlaps(config: Config) -> None:
    one, other = config.nodes
    first, second, common = list(_uses(config, one)), list(_uses(config, other)), list(_common_uses(config))
    if _on_one_machine(one.address, other.address):
        _check_distinct(config, [*first, *second, *common])
        return
    # The same path on two hosts is two things; only what is dialled is one thing wherever it is dialled from.
    _check_distinct(config, [*first, *common])
    _check_distinct(config, [*second, *common])
    _check_distinct(config, [use for use in (*first, *second, *common) if use.dialled])


def _on_one_machine(one: Address, other: Address) -> bool:
    if isinstance(one, TcpAddress) and isinstance(other, TcpAddress) and one.canonical_host == other.canonical_host:
        return True
    return one.loopback and other.loopback


def _check_distinct(config: Config, uses: list[_Use]) -> None:
    for index, later in enumerate(uses):
        for earlier in uses[:index]:
            if _clash(earlier.what, later.what):
                raise ConfigError(
                    f"{printable(config.path)}: {later.at}: found {shown(str(later.what))}, expected another than that "
                    f"of {earlier.at}, which is {shown(str(earlier.what))}"
                )


def _clash(one: str | TcpAddress, other: str | TcpAddress) -> bool:
    if isinstance(one, TcpAddress):
        return isinstance(other, TcpAddress) and one.collides(other)
    if isinstance(other, TcpAddress):
        return False
    # A file cannot lie in a file; and a folder that was made for the one is in the other's way.
    return one == other or _lies_in(one, other) or _lies_in(other, one)


def _lies_in(inner: str, outer: str) -> bool:
    return inner.startswith(f"{outer.rstrip('/')}/")
