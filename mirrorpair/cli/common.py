"""What all commands share: the common options, where output goes, and how an error becomes an exit code.

Rules:
- Common options work before and after the subcommand; the one that stands nearer to it wins, `-v` adds up.
- Data goes to stdout; progress, notes and errors to stderr. With --json an error is the last line on stdout instead:
  {"type":"error","code":,"message":}.
- Every way out has an exit code of the contract and one sentence; no traceback ever reaches a user.
- Nothing here imports rich, msgspec or the core: `mirrorpair --help` pays for click alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, shell_complete

from mirrorpair.errors import MirrorpairError
from mirrorpair.text import printable
from mirrorpair.units import parse_rate, parse_seconds, parse_size

PROGRAM = "mirrorpair"
COMPLETE = "_MIRRORPAIR_COMPLETE"
INTERRUPTED = 130

_F = TypeVar("_F", bound=Callable[..., Any])


class Settings:
    """The common options, and what a failure without a code of its own exits with (`verify` needs 1 for "they
    differ")."""

    def __init__(self) -> None:
        self.config: str | None = None
        self.node: str | None = None
        self.json = False
        self.quiet = False
        self.verbose = 0
        self.no_color = False
        self.failed = 1

    @property
    def color(self) -> bool:
        return not self.no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def common_options(command: _F) -> _F:
    """Adds the common options; their values end up in the Settings that `click.pass_obj` hands over."""
    for option in reversed(
        (
            click.option(
                "-c",
                "--config",
                metavar="FILE",
                envvar="MIRRORPAIR_CONFIG",
                type=click.Path(),
                expose_value=False,
                callback=_keep,
                help="The pair's configuration. Default: $MIRRORPAIR_CONFIG, else /etc/mirrorpair/pair.toml.",
            ),
            click.option(
                "--node",
                metavar="NAME",
                envvar="MIRRORPAIR_NODE",
                expose_value=False,
                callback=_keep,
                help="Which node of it this is. Default: $MIRRORPAIR_NODE, else the host name.",
            ),
            click.option(
                "--json",
                is_flag=True,
                expose_value=False,
                callback=_keep,
                help="JSON on stdout, one object a line; the last is the result or the error.",
            ),
            click.option(
                "-q",
                "--quiet",
                is_flag=True,
                expose_value=False,
                callback=_keep,
                help="Errors only; no progress, no summary.",
            ),
            click.option(
                "-v", "--verbose", count=True, expose_value=False, callback=_keep, help="Say more. Twice: still more."
            ),
            click.option(
                "--no-color",
                is_flag=True,
                expose_value=False,
                callback=_keep,
                help="No colours. NO_COLOR does the same.",
            ),
        )
    ):
        command = option(command)
    return command


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    settings = context.ensure_object(Settings)
    name = parameter.name
    assert name is not None
    if context.get_parameter_source(name) not in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        return
    if name == "verbose":
        settings.verbose += value
    elif name in ("config", "node") and getattr(settings, name) is not None:
        # The environment is looked at on both sides of the subcommand; it does not overrule what the line says.
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            setattr(settings, name, value)
    else:
        setattr(settings, name, value)


if TYPE_CHECKING:
    from mirrorpair.config import Config, Node

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # before click 8.4 it takes no argument


class _Parsed(_ParamType):
    """An option's text, parsed by a function of units.py whose ValueError is a sentence."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Image(_ParamType):
    """A path or a URL: completed as a file name, judged later by endpoint.py."""

    name = "image"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


SIZE = _Parsed("size", parse_size)
RATE = _Parsed("rate", parse_rate)
TIME = _Parsed("time", parse_seconds)
IMAGE = _Image()


def transfer_options(command: _F) -> _F:
    """The options that `resync` and `verify` have alike."""
    for option in reversed(
        (
            click.option(
                "--rsh",
                metavar="CMD",
                help="The command that reaches the host of an ssh:// image, in place of ssh: its words, then "
                "[user@]host mirrorpair serve --stdio. Example: --rsh 'ssh -p 2222 -i key'.",
            ),
            click.option(
                "--remote-command",
                metavar="CMD",
                help="What to run on the far host. Default: mirrorpair, as found on its PATH.",
            ),
            click.option(
                "--rate",
                type=RATE,
                metavar="RATE",
                default=0,
                help="The most payload per second: 200MiB/s, 1GB/s, or auto. Default: auto, no limit.",
            ),
            click.option(
                "--block-size",
                type=SIZE,
                metavar="SIZE",
                default=64 * 1024,
                help="What is compared at once and counted: a power of two from 4KiB to 256KiB. Default: 64KiB.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(0, 256),
                metavar="N",
                default=0,
                help="Threads that read each image. Default: 0, as many as pay.",
            ),
            click.option(
                "--timeout",
                type=TIME,
                metavar="TIME",
                default=30.0,
                help="How long the far end may be silent, and a TCP connect take: 100ms to 1h. Default: 30s.",
            ),
        )
    ):
        command = option(command)
    return command


def two_images(command: str, images: tuple[str, ...]) -> tuple[str, str]:
    if len(images) == 2:
        return images[0], images[1]
    if len(images) < 2:
        raise click.UsageError(
            f"the online form, `mirrorpair {command} [VOLUME]`, is not built yet; give two images: "
            f"mirrorpair {command} {'SOURCE TARGET' if command == 'resync' else 'A B'}"
        )
    raise click.UsageError(f"{len(images)} images were given; {command} takes two")


def load_config(settings: Settings) -> Config:
    """The pair's configuration; ConfigError."""
    from mirrorpair.config import DEFAULT_PATH, load

    return load(settings.config or DEFAULT_PATH)


def load_pair(settings: Settings) -> tuple[Config, Node]:
    """The pair's configuration and which of its nodes this is; ConfigError says what is wrong with either.

    Without a name given, it is the node with this host's name, or with its first label: a host may call itself
    alpha.example.org, and its node plainly alpha.
    """
    config = load_config(settings)
    name = settings.node
    if name is None:
        name = os.uname().nodename
        if all(node.name != name for node in config.nodes):
            name = name.partition(".")[0]
    return config, config.node(name)


def raise_interrupt_on_termination() -> None:
    """SIGTERM and SIGHUP end a command the way Ctrl-C does: what was done is told, exit code 130."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish
            signal.signal(number, signal.default_int_handler)


def show_warnings(settings: Settings) -> None:
    """What the package has to say by logging goes to stderr as the notes do."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mirrorpair: %(message)s"))
    logger = logging.getLogger("mirrorpair")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if settings.quiet else logging.INFO if settings.verbose else logging.WARNING)


def write_line(text: str) -> None:
    """One line of data."""
    sys.stdout.write(text + "\n")


def note(settings: Settings, text: str) -> None:
    """One line for people, on stderr."""
    if not settings.quiet:
        click.echo(f"mirrorpair: {text}", err=True)


def run_command(command: click.Command, args: list[str], settings: Settings) -> int:
    """Runs `command` and turns however it ends into an exit code, with its sentence told."""
    if instruction := os.environ.get(COMPLETE):
        return shell_complete(command, {}, PROGRAM, COMPLETE, instruction)
    try:
        # Not command.main(): it has its own idea of the exit code of a closed pipe.
        with command.make_context(PROGRAM, list(args), obj=settings) as context:
            result = command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        settings.json = settings.json or _asks_for_json(args)
        return _fail(settings, error.exit_code, error.format_message(), error)
    except MirrorpairError as error:
        code = error.exit_code
        return _fail(settings, settings.failed if code == 1 else code, str(error))
    except (KeyboardInterrupt, click.Abort):
        return _fail(settings, INTERRUPTED, "interrupted")
    except BrokenPipeError:
        # Whoever read our output has gone, and needs no message; the interpreter must not try to flush it again.
        _drop_stdout()
        return settings.failed
    except OSError as error:
        return _fail(
            settings, settings.failed, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        )
    except MemoryError:
        return _fail(settings, settings.failed, "out of memory")
    except Exception as error:  # noqa: BLE001 - the last resort: a sentence in place of a traceback
        return _fail(settings, settings.failed, f"internal error: {_origin(error)}; please report it")
    return result if isinstance(result, int) else 0


def exit_with(code: int) -> NoReturn:
    """Ends the process; output that can no longer be written must not become a traceback at the very end."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    sys.exit(code)


def _fail(settings: Settings, code: int, message: str, usage: click.ClickException | None = None) -> int:
    line = printable(message, 4000) if usage is None else message
    try:
        if settings.json:
            import json

            write_line(json.dumps({"type": "error", "code": code, "message": line}))
            sys.stdout.flush()
            return code
        if isinstance(usage, click.UsageError) and usage.ctx is not None and not settings.quiet:
            click.echo(f"{usage.ctx.get_usage()}\nTry '{usage.ctx.command_path} --help'.", err=True)
        label = (
            click.style("mirrorpair:", fg="red", bold=True) if settings.color and sys.stderr.isatty() else "mirrorpair:"
        )
        sys.stdout.flush()
        click.echo(f"{label} {line}", err=True)
    except OSError:
        _drop_stdout()
    return code


def _asks_for_json(args: list[str]) -> bool:
    """The wish of a line that could not be parsed."""
    return "--json" in (args[: args.index("--")] if "--" in args else args)


def _origin(error: Exception) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {printable(str(error), 300)}{place}"


def _drop_stdout() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
