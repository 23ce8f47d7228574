# SPDX-License-Identifier: Apache-2.0
"""Links without Ethernet between namespaces, as WireGuard and PPP are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import threading
from collections.abc import Iterator

from tests.support.lab.netns import Namespace

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def tun(namespace: Namespace, *addresses: str, device: str = "tun0") -> int:
    """A tun device: packets without any link header. Returns the descriptor that is its other end."""
    with namespace.entered():
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    namespace.ip("link", "set", device, "up")
    for address in addresses:
        namespace.ip("addr", "add", f"{address}/24", "dev", device)
    return fd


@contextlib.contextmanager
def wire(one: int, other: int) -> Iterator[None]:
    """What one end sends, the other gets."""
    stop_read, stop_write = os.pipe()

    def run() -> None:
        while True:
            ready, _, _ = select.select([one, other, stop_read], [], [])
            if stop_read in ready:
                return
            for fd in ready:
                with contextlib.suppress(OSError):
                    os.write(other if fd == one else one, os.read(fd, 65536))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(stop_write, b"x")
        thread.join()
        for fd in (one, other, stop_read, stop_write):
            os.close(fd)
