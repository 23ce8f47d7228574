# SPDX-License-Identifier: Apache-2.0
"""What a socket without blocking says of its other end."""

from __future__ import annotations

import socket


def closed(sock: socket.socket) -> bool:
    """Whether the other end has closed or reset it, and has said nothing that is still to be read."""
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
