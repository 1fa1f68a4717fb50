"""`mirrorpair serve --listen HOST:PORT --allow PATH` and `mirrorpair serve --stdio`."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from mirrorpair.cli.common import (
    INTERRUPTED,
    Settings,
    common_options,
    note,
    raise_interrupt_on_termination,
    write_line,
)

if TYPE_CHECKING:
    from mirrorpair.allow import Allowed, Anything


@click.command(
    name="serve",
    options_metavar="[OPTIONS]",
    epilog="""\b
Examples:
  mirrorpair serve --listen 127.0.0.1:7792 --allow /srv/images
  mirrorpair serve --listen 10.0.0.2:7792 --insecure --read-only --allow /dev/vg0/data
  In ~/.ssh/authorized_keys, for a key that may only fetch images:
    restrict,command="mirrorpair serve --stdio --read-only --allow /srv/images" ssh-ed25519 ...

\b
Exit codes:
  0    stopped by SIGTERM or SIGINT; with --stdio: the session went well
  1    failed: the address cannot be bound; with --stdio: the session failed
  2    usage
  12, 13, 14, 130  with --stdio: how the session ended, as in `mirrorpair resync --help`""",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Serve over TCP until SIGTERM. Prints `listening HOST:PORT` when ready; port 0 takes any free one.",
)
@click.option("--stdio", is_flag=True, help="One session on stdin and stdout. This is what ssh:// images run there.")
@click.option(
    "--allow",
    metavar="PATH",
    multiple=True,
    type=click.Path(),
    help="A file, or a folder with all beneath it, that clients may open. Repeatable. --listen serves nothing else; "
    "--stdio without it serves what the account may open.",
)
@click.option("--read-only", is_flag=True, help="Clients may read and verify, not write.")
@click.option(
    "--insecure", is_flag=True, help="Listen beyond loopback, in clear and open to everyone who reaches the port."
)
@common_options
@click.pass_obj
def command(
    settings: Settings,
    listen: str | None,
    stdio: bool,
    allow: tuple[str, ...],
    read_only: bool,
    insecure: bool,
) -> int:
    """Be the far end of a resync or verify.

    With --listen, many clients at a time, each of which sees only what --allow names; a path outside, by `..` or by a
    link, is refused. Each session is one line on stderr. Beyond loopback it needs --insecure, for nothing is
    encrypted and nobody logs in: ssh://host/path is the safe way between hosts, and needs no server.
    """
    if stdio == (listen is not None):
        raise click.UsageError("give either --listen HOST:PORT or --stdio")
    if stdio:
        if insecure:
            raise click.UsageError("--insecure belongs to --listen")
        return _stdio(settings, list(allow), read_only=read_only)
    assert listen is not None
    if not allow:
        raise click.UsageError("--listen needs --allow PATH: the files or folders that clients may open")
    return _listen(settings, listen, list(allow), read_only=read_only, insecure=insecure)


def _stdio(settings: Settings, allow: list[str], *, read_only: bool) -> int:
    raise_interrupt_on_termination()

    from mirrorpair.allow import Allowed, Anything
    from mirrorpair.serve import serve_stdio

    # An error is the near end's to tell, which it does; here it would be told twice on the same terminal.
    settings.json = False
    with ExitStack() as stack:
        access: Allowed | Anything = Anything(read_only=read_only)
        if allow:
            access = stack.enter_context(Allowed(allow, read_only=read_only))
        try:
            served = serve_stdio(access)
        except KeyboardInterrupt:  # a Ctrl-C reaches both ends of a local --rsh; the near one tells it
            return INTERRUPTED
    if settings.verbose:
        note(settings, served.text)
    return served.code


def _listen(settings: Settings, address: str, allow: list[str], *, read_only: bool, insecure: bool) -> int:
    from datetime import UTC, datetime

    from mirrorpair.allow import Allowed
    from mirrorpair.endpoint import parse_address
    from mirrorpair.listener import Listener

    def log(line: str) -> None:
        if not settings.quiet:
            sys.stderr.write(f"{datetime.now(UTC).strftime('%Y-%m-%dT%H:%M:%SZ')} {line}\n")
            sys.stderr.flush()

    host, port = parse_address(address)
    with (
        Allowed(allow, read_only=read_only) as access,
        Listener(host, port, access, insecure=insecure, log=log) as listener,
    ):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: listener.stop())
        if settings.json:
            import json

            write_line(json.dumps({"type": "listening", "address": listener.address}))
        else:
            write_line(f"listening {listener.address}")
        sys.stdout.flush()
        listener.serve()
    return 0
