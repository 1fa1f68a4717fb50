"""A long way between two network namespaces: every packet takes so many milliseconds, in order, none is lost.

    python longline.py MILLISECONDS NAMESPACE NAMESPACE      says "ready" once there is a device `long` in both

Rules:
- A process of its own: whoever uses the line must not slow it down. It lives until it is killed, and the devices with
  it.
- Both ends are TUN devices, for which the kernel makes whole packets: segmented, and with their checksums.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_LONGEST = 65536
_CLONE_NEWNET = 0x40000000


def end_of_the_line(namespace: str) -> int:
    """This process stays in that namespace; the device is in it whoever holds the descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY)
    if libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(fd)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"long", _IFF_TUN | _IFF_NO_PI))
    return device


def carry(ends: tuple[int, int], delay_ns: int) -> None:
    way: deque[tuple[int, int, bytes]] = deque()
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    while True:
        left = (way[0][0] - time.monotonic_ns()) / 1e6 if way else None
        for end, _ in poll.poll(None if left is None else max(0.0, left)):
            packet = os.read(end, _LONGEST)
            way.append((time.monotonic_ns() + delay_ns, other[end], packet))
        while way and way[0][0] <= time.monotonic_ns():
            _, end, packet = way.popleft()
            try:
                os.write(end, packet)
            except OSError:  # the device is down at that end, or its queue full: as on any line
                continue


def main() -> None:
    milliseconds, *namespaces = sys.argv[1:]
    one, other = (end_of_the_line(namespace) for namespace in namespaces)
    print("ready", flush=True)
    carry((one, other), int(milliseconds) * 10**6)


if __name__ == "__main__":
    main()
