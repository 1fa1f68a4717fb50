"""Where an image is: a path here, or a URL that names a far end.

    PATH                              a file or block device on this host
    ssh://[user@]host[:port]/path     on a host that is reached by ssh
    tcp://host:port/path              on a host where `mirrorpair serve --listen` runs

Rules:
- Nothing from a URL can become an option or a piece of shell: a user or a host that starts with "-" or holds a space,
  a control character or a shell character is refused here (CVE-2017-1000117, CVE-2023-51385). The path never travels
  in an argv at all.
- User, host and path are percent-decoded, each once. Everything after the host is the path: "?" and "#" are ordinary
  characters of it, as in a file name.
- A word with "://" that is neither is refused, not taken for a file name: a target would be created under it. `./` in
  front makes it a file name.
"""

from __future__ import annotations

import re
from typing import ClassVar
from urllib.parse import quote, unquote_to_bytes

import msgspec

from mirrorpair.errors import UsageError
from mirrorpair.text import printable

MAX_PATH_BYTES = 4096

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"[\w.-]+")  # letters of any script: ssh's own configuration may call a host what it likes
_ADDRESS6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?")
_USER_FORBIDDEN = re.compile(r"""[\s"'`$\\;&<>|(){}\[\]*?!#~/:,]""")


class LocalEndpoint(msgspec.Struct, frozen=True):
    """A path on this host, absolute or relative."""

    path: str
    remote: ClassVar[bool] = False

    def __str__(self) -> str:
        return printable(self.path)


class SshEndpoint(msgspec.Struct, frozen=True):
    """An absolute path on a host reached by ssh; `host` has no brackets, `port` None leaves it to ssh."""

    host: str
    path: str
    user: str | None = None
    port: int | None = None
    remote: ClassVar[bool] = True

    @property
    def destination(self) -> str:
        """The word ssh is given: `[user@]host`."""
        return self.host if self.user is None else f"{self.user}@{self.host}"

    def __str__(self) -> str:
        user = "" if self.user is None else quote(self.user, safe="") + "@"
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{user}{_bracketed(self.host)}{port}{_shown_path(self.path)}"


class TcpEndpoint(msgspec.Struct, frozen=True):
    """An absolute path on a `mirrorpair serve --listen`; `host` has no brackets."""

    host: str
    port: int
    path: str
    remote: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"tcp://{join_address(self.host, self.port)}{_shown_path(self.path)}"


RemoteEndpoint = SshEndpoint | TcpEndpoint
Endpoint = LocalEndpoint | SshEndpoint | TcpEndpoint


def parse_endpoint(text: str) -> Endpoint:
    """What `text` names; raises UsageError, whose message holds the text and the reason."""
    if not text:
        raise UsageError(
            "an empty path names no image; give a file, a block device, ssh://host/path or tcp://host:port/path"
        )
    if "\0" in text:
        raise UsageError(f"a path cannot hold a NUL character: {printable(text)}")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalEndpoint(text)
    kind = scheme[1].lower()
    if kind not in ("ssh", "tcp"):
        raise _refuse(text, f"{kind}:// is not known here; use ssh://, tcp://, or ./ in front of a file of that name")
    authority, slash, raw_path = text[scheme.end() :].partition("/")
    if not slash or not raw_path:
        raise _refuse(text, "the path of the image is missing")
    path = "/" + _decode(text, raw_path)
    if len(path.encode("utf-8")) > MAX_PATH_BYTES:
        raise _refuse(text, f"the path is longer than {MAX_PATH_BYTES} bytes")
    userinfo, at, address = authority.rpartition("@")
    host, port = _split_address(text, address)
    if kind == "ssh":
        return SshEndpoint(host=host, path=path, user=_user(text, userinfo) if at else None, port=port)
    if at:
        raise _refuse(text, "tcp:// takes no user")
    if port is None:
        raise _refuse(text, "tcp:// needs the port of the server: tcp://host:port/path")
    return TcpEndpoint(host=host, port=port, path=path)


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` of a listener; the host may be empty (every address) and the port 0 (any free one)."""
    host, colon, port = text.rpartition(":")
    if not colon or not _is_port(port):
        raise UsageError(f"{printable(text)!r} is not an address; write HOST:PORT, an IPv6 address in brackets")
    if host.startswith("[") and host.endswith("]") and _ADDRESS6.fullmatch(host[1:-1]):
        return host[1:-1], int(port)
    if host and (not _HOST.fullmatch(host) or host.startswith("-")):
        raise UsageError(f"{printable(text)!r} is not an address; write HOST:PORT, an IPv6 address in brackets")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"{_bracketed(host)}:{port}"


def _split_address(text: str, address: str) -> tuple[str, int | None]:
    if address.startswith("["):
        inside, bracket, rest = address[1:].partition("]")
        host = _decode(text, inside)
        if not bracket or not _ADDRESS6.fullmatch(host) or (rest and not rest.startswith(":")):
            raise _refuse(text, "what stands in brackets is not an IPv6 address")
        port_text: str | None = rest[1:] if rest else None
    else:
        if address.count(":") > 1:
            raise _refuse(text, "an IPv6 address must stand in brackets: [::1]")
        raw_host, colon, after = address.partition(":")
        host = _decode(text, raw_host)
        port_text = after if colon else None
        if not host:
            raise _refuse(text, "the host is missing")
        if host.startswith("-"):
            raise _refuse(text, "a host cannot start with '-'")
        if not _HOST.fullmatch(host):
            raise _refuse(text, "the host holds characters that no host name has")
    if port_text is None:
        return host, None
    if not _is_port(port_text) or int(port_text) == 0:
        raise _refuse(text, "the port must be a number from 1 to 65535")
    return host, int(port_text)


def _user(text: str, userinfo: str) -> str:
    if ":" in userinfo:
        raise _refuse(
            text.replace(userinfo, "...", 1), "a password cannot be given in a URL; use ssh's own keys or agent"
        )
    user = _decode(text, userinfo)
    if not user:
        raise _refuse(text, "the user before '@' is missing")
    if user.startswith("-"):
        raise _refuse(text, "a user cannot start with '-'")
    if not user.isprintable() or _USER_FORBIDDEN.search(user):
        raise _refuse(text, "the user holds characters that no user name has")
    return user


def _decode(text: str, part: str) -> str:
    if _BAD_ESCAPE.search(part):
        raise _refuse(text, "a '%' must be followed by two hexadecimal digits (a '%' itself is written %25)")
    try:
        decoded = unquote_to_bytes(part).decode("utf-8")
    except ValueError:
        # The hello is JSON, hence UTF-8. A file whose name is not can be reached through a link that has a plain name.
        raise _refuse(text, "it is not UTF-8; give the image a plain name, for example by a symbolic link") from None
    if "\0" in decoded:
        raise _refuse(text, "a path cannot hold a NUL character")
    return decoded


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _shown_path(path: str) -> str:
    return "".join(quote(char, safe="") if char in "% " or not char.isprintable() else char for char in path)


def _refuse(text: str, reason: str) -> UsageError:
    return UsageError(f"{printable(text)}: {reason}")
