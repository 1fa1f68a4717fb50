"""Three hosts of this machine's own: the network namespaces alpha, beta and witness, joined by veth and a bridge, and
what can go wrong between them.

    alpha 10.23.0.1 --- [alpha] switch [beta] --- 10.23.0.2 beta
                             [witness] --- 10.23.0.3 witness

Rules:
- The namespaces have no names: they are held by descriptors of this process, so nothing is left behind however it
  ends, and no two runs get in each other's way. Nothing of them can reach the host's own network.
- A fault is a rule of nftables in the switch, in one direction of one pair of ports: both ends go on believing that
  their link is up, and neither gets an error. `unplug` is the other kind: the carrier goes.
- A change of the rules is one transaction; what each dropped is counted, so that a test knows that its fault was real.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mirrorpair.address import TcpAddress

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 60.0
HOSTS = {"alpha": "10.23.0.1", "beta": "10.23.0.2", "witness": "10.23.0.3"}
PORT = 7790
ADDRESSES = {name: TcpAddress(host, PORT) for name, host in HOSTS.items()}
BOTH_WAYS = (("alpha", "beta"), ("beta", "alpha"))

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def run(words: list[str], text: str = "") -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{text}{done.stdout}{done.stderr}"
    return done.stdout


class Namespace:
    """A new one. What runs in it is ended by `close`, which also lets it go."""

    def __init__(self) -> None:
        self._fd = _in_a_thread(_unshared)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.prefix = ("nsenter", f"--net={self.path}", "--")
        """words in front of a command that is to run in it; its process number stays the same"""

    def ip(self, *lines: str) -> None:
        run([*self.prefix, "ip", "-batch", "-"], "\n".join(lines) + "\n")

    def processes(self) -> list[int]:
        """Who is in it."""
        mine = os.fstat(self._fd)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.stat(entry / "ns/net"), mine):
                        found.append(int(entry.name))
        return found

    def close(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(self._fd)


def _unshared() -> int:
    if _LIBC.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_a_thread(work: Callable[[], int]) -> int:
    """A thread has a namespace of its own as long as it lives; nobody else changes."""
    results: list[int | OSError] = []

    def call() -> None:
        try:
            results.append(work())
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if isinstance(results[0], OSError):
        raise results[0]
    return results[0]


class Network:
    """A context manager; `hosts` by their names."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._rules: list[tuple[str, str, int]] = []
        with contextlib.ExitStack() as stack:
            self.switch = self._new(stack)
            self.hosts = {name: self._new(stack) for name in HOSTS}
            self._join()
            self._stack = stack.pop_all()

    @staticmethod
    def _new(stack: contextlib.ExitStack) -> Namespace:
        made = Namespace()
        stack.callback(made.close)
        return made

    def _join(self) -> None:
        self.switch.ip(
            "link add switch type bridge",
            *(f"link add {name} type veth peer name wire netns {host.path}" for name, host in self.hosts.items()),
            *(f"link set {name} master switch up" for name in self.hosts),
            "link set switch up",
        )
        for name, host in self.hosts.items():
            host.ip("link set lo up", f"addr add {HOSTS[name]}/24 dev wire", "link set wire up")
        run([*self.switch.prefix, "nft", "-f", "-"], _TABLE)

    # --- faults

    def drop(self, source: str, sink: str, percent: int = 100) -> None:
        """What goes from one port to the other; of `percent` below 100 as chance will have it."""
        self._rules.append((source, sink, percent))
        self._apply()

    def cut(self, one: str, other: str) -> None:
        """Both directions."""
        self._rules += [(one, other, 100), (other, one, 100)]
        self._apply()

    def isolate(self, name: str) -> None:
        for other in HOSTS.keys() - {name}:
            self.cut(name, other)

    def mend(self, *names: str) -> int:
        """What was between these, or between anybody, is as it was; how many frames all the rules dropped."""
        dropped = self.dropped()
        self._rules = [rule for rule in self._rules if names and not {rule[0], rule[1]} <= {*names}]
        self._apply()
        return dropped

    def _apply(self) -> None:
        text = "flush chain bridge faults wires\n"
        for source, sink, percent in self._rules:
            chance = f"numgen random mod 100 < {percent} " if percent < 100 else ""
            text += f'add rule bridge faults wires iifname "{source}" oifname "{sink}" {chance}counter drop\n'
        run([*self.switch.prefix, "nft", "-f", "-"], text)

    def dropped(self) -> int:
        """Since the last change of the rules."""
        told = json.loads(run([*self.switch.prefix, "nft", "--json", "list", "table", "bridge", "faults"]))
        return sum(
            expression["counter"]["packets"]
            for item in told["nftables"]
            for expression in item.get("rule", {}).get("expr", [])
            if "counter" in expression
        )

    def unplug(self, name: str) -> None:
        """The cable of this host: it loses the carrier."""
        self.switch.ip(f"link set {name} down")

    def plug(self, name: str) -> None:
        self.switch.ip(f"link set {name} up")

    def delay(self, milliseconds: int) -> None:
        """From now on what alpha and beta say to each other takes a way that is so long, in each direction."""
        ends = {name: self.hosts[name] for name in ("alpha", "beta")}
        line = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("longline.py")), str(milliseconds)]
            + [end.path for end in ends.values()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(_end, line)
        assert line.stdout is not None
        said = line.stdout.readline()
        assert said == "ready\n", said + line.stdout.read()
        for name, other in BOTH_WAYS:
            ends[name].ip("link set long up", f"route add {HOSTS[other]}/32 dev long src {HOSTS[name]}")

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_TABLE = """\
table bridge faults {
    chain wires {
        type filter hook forward priority 0; policy accept;
    }
}
"""


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
