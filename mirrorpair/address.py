"""Where a daemon listens and its peer dials: a TCP address or a unix socket, as a configuration writes them.

    10.0.0.1:7790   [fd00::1]:7790   alpha.example.org:7790        TCP
    unix:/run/mirrorpair/alpha.sock                                a unix socket; relative paths have a base

Rules:
- A port is a number from 1 to 65535: what is written in a file must be the same tomorrow, so never 0.
- Parsing raises ValueError; the caller knows which key it was and says what was expected.
- Pure: no name is resolved. Of names only `localhost` counts as loopback, so another name of 127.0.0.1 is judged too
  strictly, never too mildly.
"""

from __future__ import annotations

import ipaddress
import posixpath
from typing import ClassVar, Literal

import msgspec

from mirrorpair.endpoint import join_address, parse_address
from mirrorpair.errors import UsageError
from mirrorpair.text import printable

MAX_UNIX_PATH_BYTES = 107  # sun_path, without the NUL that ends it
MAX_PATH_BYTES = 4095
_ANY = ("0.0.0.0", "::")


class TcpAddress(msgspec.Struct, frozen=True):
    """`host` is a name or an address without brackets."""

    host: str
    port: int
    kind: ClassVar[Literal["tcp"]] = "tcp"

    @property
    def loopback(self) -> bool:
        """Whether no other host can reach it."""
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def wildcard(self) -> bool:
        """Whether it means every address of a host: right to listen on, wrong to dial."""
        return self.canonical_host in _ANY

    @property
    def canonical_host(self) -> str:
        """The host in one spelling, for comparing."""
        host = self.host.lower()
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            return "127.0.0.1" if host == "localhost" else host

    def collides(self, other: TcpAddress) -> bool:
        """Whether both cannot be listened on by one host."""
        if self.port != other.port:
            return False
        return self.canonical_host == other.canonical_host or self.wildcard or other.wildcard

    def __str__(self) -> str:
        return join_address(self.host, self.port)


class UnixAddress(msgspec.Struct, frozen=True):
    """`path` is absolute and fits a socket address."""

    path: str
    kind: ClassVar[Literal["unix"]] = "unix"
    loopback: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"unix:{printable(self.path)}"


Address = TcpAddress | UnixAddress


def parse_tcp(text: str) -> TcpAddress:
    """`HOST:PORT`, an IPv6 address in brackets."""
    try:
        host, port = parse_address(text)
    except UsageError as error:
        raise ValueError(str(error)) from None
    if not host or not port:
        raise ValueError("an address needs a host, and a port that is not 0")
    return TcpAddress(host, port)


def parse_dialled(text: str, base: str) -> Address:
    """`HOST:PORT` or `unix:PATH` that another host or process connects to."""
    if text.startswith("unix:"):
        return UnixAddress(resolve_socket(text.removeprefix("unix:"), base))
    address = parse_tcp(text)
    if address.wildcard:
        raise ValueError("nobody can dial every address of a host")
    return address


def parse_listener(text: str, base: str) -> Address:
    """`tcp:HOST:PORT` or `unix:PATH`."""
    if text.startswith("unix:"):
        return UnixAddress(resolve_socket(text.removeprefix("unix:"), base))
    if not text.startswith("tcp:"):
        raise ValueError("neither unix: nor tcp:")
    return parse_tcp(text.removeprefix("tcp:"))


def resolve(path: str, base: str) -> str:
    """`path` absolute and without `.`, `..` and doubled slashes; a relative one counts from the folder `base`."""
    if not path or "\0" in path:
        raise ValueError("not a path")
    # POSIX lets exactly two leading slashes mean something else; on Linux they are one.
    whole = "/" + posixpath.normpath(posixpath.join(base, path)).lstrip("/")
    if len(whole.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        raise ValueError("too long")
    return whole


def resolve_socket(path: str, base: str) -> str:
    """As `resolve`, and short enough to be bound."""
    whole = resolve(path, base)
    if len(whole.encode("utf-8", "surrogateescape")) > MAX_UNIX_PATH_BYTES:
        raise ValueError("too long for a socket")
    return whole
