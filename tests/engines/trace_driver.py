# SPDX-License-Identifier: Apache-2.0
"""Makes six connections under a trace, the last one reset by the client, and prints the trace's rows as JSON lines."""

from __future__ import annotations

import json
import socket
import struct
import threading

from mesh.trace.connections import ConnectionTrace, Row

EVENTS = 12  # six opened, five closed, one reset


def read(connection: socket.socket, size: int) -> None:
    while size:
        chunk = connection.recv(size)
        if not chunk:
            raise SystemExit("the connection ended early")
        size -= len(chunk)


def serve(listener: socket.socket) -> None:
    for _ in range(5):
        connection, _ = listener.accept()
        read(connection, 1000)
        connection.sendall(bytes(5000))
        connection.recv(1)
        connection.close()
    connection, _ = listener.accept()
    read(connection, 1000)
    try:
        connection.recv(1)
    except ConnectionResetError:
        connection.close()


def call(port: int) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(bytes(1000))
            read(client, 5000)
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(bytes(1000))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    target = {"backend": "b1", "name": "web.1", "address": "127.0.0.1", "port": port}
    state = {"services": [{"name": "web", "frontends": [{"frontend": "[*]:80/tcp", "targets": [target]}]}]}
    wanted: list[Row] = []
    threads = [threading.Thread(target=serve, args=(listener,)), threading.Thread(target=call, args=(port,))]
    started = False

    def read_state() -> dict[str, object]:
        nonlocal started
        if started and not threads[1].ident:  # the second look: everything is attached by now
            for thread in threads:
                thread.start()
        started = True
        return state  # type: ignore[return-value]

    trace = ConnectionTrace(read_state, lambda row: row.backend == "web.1")
    for row in trace.rows(150):
        wanted.append(row)
        if len(wanted) == EVENTS:
            break
    for thread in threads:
        thread.join()
    for row in wanted:
        print(json.dumps(row.as_dict()))


if __name__ == "__main__":
    main()
