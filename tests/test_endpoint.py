"""Where an image is: paths and URLs, taken apart; nothing of a URL can become an option or shell."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.endpoint import (
    LocalEndpoint,
    SshEndpoint,
    TcpEndpoint,
    join_address,
    parse_address,
    parse_endpoint,
)
from mirrorpair.errors import UsageError


@pytest.mark.parametrize(
    "path",
    [
        "a.img",
        "/srv/a.img",
        "./ssh://x",
        "../a",
        "-n",
        "~",
        "host:/srv/a.img",
        "a b",
        "C:\\x",
        "//srv/x",
        "über",
        "a\udcff",
    ],
)
def test_what_has_no_scheme_is_a_path_here(path: str) -> None:
    endpoint = parse_endpoint(path)
    assert endpoint == LocalEndpoint(path)
    assert not endpoint.remote


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("ssh://host/srv/a.img", SshEndpoint("host", "/srv/a.img")),
        ("SSH://host/srv/a.img", SshEndpoint("host", "/srv/a.img")),
        ("ssh://root@host:2222/dev/vg0/data", SshEndpoint("host", "/dev/vg0/data", "root", 2222)),
        ("ssh://[::1]/a", SshEndpoint("::1", "/a")),
        ("ssh://me@[fe80::1%25eth0]:22/a", SshEndpoint("fe80::1%eth0", "/a", "me", 22)),
        ("ssh://a_b.example-1.org/a", SshEndpoint("a_b.example-1.org", "/a")),
        ("ssh://host/a%20b%2Fc%25", SshEndpoint("host", "/a b/c%")),
        ("ssh://host/%C3%BC", SshEndpoint("host", "/ü")),
        ("ssh://host/a?b#c@d:e", SshEndpoint("host", "/a?b#c@d:e")),
        ("ssh://host//etc", SshEndpoint("host", "//etc")),
        ("ssh://me%40corp@host/a", SshEndpoint("host", "/a", "me@corp")),
        ("ssh://me@corp@host/a", SshEndpoint("host", "/a", "me@corp")),
        ("tcp://10.0.0.2:7792/srv/a.img", TcpEndpoint("10.0.0.2", 7792, "/srv/a.img")),
        ("tcp://[::1]:1/a", TcpEndpoint("::1", 1, "/a")),
        ("tcp://localhost:65535/a%0Ab", TcpEndpoint("localhost", 65535, "/a\nb")),
    ],
)
def test_a_url_is_taken_apart_and_decoded_once(url: str, endpoint: SshEndpoint | TcpEndpoint) -> None:
    assert parse_endpoint(url) == endpoint
    assert endpoint.remote


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "empty path"),
        ("a\0b", "NUL"),
        ("http://host/a", "not known"),
        ("nbd+unix:///a", "not known"),
        ("ssh://", "missing"),
        ("ssh://host", "path of the image is missing"),
        ("ssh://host/", "path of the image is missing"),
        ("ssh:///a", "host is missing"),
        ("ssh://me@/a", "host is missing"),
        ("ssh://@host/a", "user before '@' is missing"),
        ("ssh://-oProxyCommand=x/a", "cannot start with '-'"),
        ("ssh://%2DoProxyCommand=x/a", "cannot start with '-'"),
        ("ssh://-l@host/a", "cannot start with '-'"),
        ("ssh://%2dl@host/a", "cannot start with '-'"),
        ("ssh://ho st/a", "characters"),
        ("ssh://$(id)/a", "characters"),
        ("ssh://`id`/a", "characters"),
        ("ssh://a%0Ab/a", "characters"),
        ("ssh://a;b/a", "characters"),
        ("ssh://a'b@host/a", "characters"),
        ("ssh://a%20b@host/a", "characters"),
        ("ssh://a$b@host/a", "characters"),
        ("ssh://me:secret@host/a", "password"),
        ("ssh://host:/a", "port"),
        ("ssh://host:0/a", "port"),
        ("ssh://host:65536/a", "port"),
        ("ssh://host:-1/a", "port"),
        ("ssh://host:\uff12\uff12/a", "port"),
        ("ssh://host:22x/a", "port"),
        ("ssh://::1/a", "brackets"),
        ("ssh://[::1/a", "IPv6"),
        ("ssh://[]/a", "IPv6"),
        ("ssh://[host]/a", "IPv6"),
        ("ssh://[-oX]/a", "IPv6"),
        ("ssh://[::1]x/a", "IPv6"),
        ("ssh://host/a%", "hexadecimal"),
        ("ssh://host/a%zz", "hexadecimal"),
        ("ssh://host/%00", "NUL"),
        ("ssh://host/%ff", "UTF-8"),
        ("ssh://host/" + "a" * 5000, "longer"),
        ("tcp://host/a", "port"),
        ("tcp://me@host:1/a", "no user"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse_endpoint(url)
    assert str(caught.value).isprintable()


def test_a_refused_password_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint("ssh://me:secret@host/a")
    assert "secret" not in str(caught.value)


def test_the_destination_is_the_one_word_that_ssh_takes() -> None:
    assert SshEndpoint("host", "/a").destination == "host"
    assert SshEndpoint("::1", "/a", "me", 22).destination == "me@::1"


HOSTS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True) | st.ip_addresses(v=6).map(str)
PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=50)
PORTS = st.integers(1, 65535)
USERS = st.from_regex(r"[a-z_][a-z0-9_.@-]{0,10}", fullmatch=True)


@given(HOSTS, PATHS, st.none() | USERS, st.none() | PORTS)
def test_an_ssh_endpoint_is_shown_as_a_url_that_names_it_again(
    host: str, path: str, user: str | None, port: int | None
) -> None:
    endpoint = SshEndpoint(host=host, path="/" + path, user=user, port=port)
    assert str(endpoint).isprintable()
    assert parse_endpoint(str(endpoint)) == endpoint


@given(HOSTS, PATHS, PORTS)
def test_a_tcp_endpoint_survives_percent_encoding(host: str, path: str, port: int) -> None:
    endpoint = TcpEndpoint(host=host, port=port, path="/" + path)
    assert parse_endpoint(f"tcp://{join_address(host, port)}/{quote(path, safe='')}") == endpoint
    assert parse_endpoint(str(endpoint)) == endpoint


@given(st.text(max_size=60) | st.text(max_size=60).map(lambda rest: "ssh://" + rest))
def test_any_text_is_an_endpoint_or_a_usage_error(text: str) -> None:
    try:
        endpoint = parse_endpoint(text)
    except UsageError as error:
        assert str(error).isprintable()  # noqa: PT017 - either way is right
        return
    if isinstance(endpoint, SshEndpoint):
        assert not endpoint.destination.startswith("-")
        assert not set(endpoint.host) & set(" \t\n'\"`$\\;&<>|(){}/@")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:7792", ("::1", 7792)),
        (":7792", ("", 7792)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_a_listening_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "7792", "host", "host:", "host:x", "::1:80", "[::1]", "-x:1", "a b:1", "host:65536"]
)
def test_what_is_no_listening_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_address(text)
