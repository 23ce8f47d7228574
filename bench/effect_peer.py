# SPDX-License-Identifier: Apache-2.0
"""Both ends for measuring how soon a change shows: `serve NAME ADDRESS PORT` says its name to whoever connects, `watch
ADDRESS PORT` connects again and again, until its input ends, and prints when it began to connect and who answered."""

from __future__ import annotations

import select
import socket
import sys
import time


def serve(name: str, address: str, port: int) -> None:
    with socket.create_server((address, port), backlog=1024) as server:
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            with client:
                client.send(name.encode())


def watch(address: str, port: int) -> None:
    seen: list[str] = []
    print("ready", flush=True)
    while not seen or not select.select([sys.stdin], [], [], 0)[0]:
        began = time.monotonic()
        try:
            with socket.create_connection((address, port), 5.0) as server:
                name = server.recv(64).decode()
        except OSError as error:
            name = f"error:{error.errno}"
        seen.append(f"{began:.6f} {name or 'error:closed'}")
    print("\n".join(seen), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        watch(sys.argv[2], int(sys.argv[3]))
