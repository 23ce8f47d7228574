# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Final

from mesh._maglev import SlotTable

RETRIES_MOST: Final[int]

# begun, ended, opened, closed, retried, failed by cause, bytes in, bytes out, packets in, packets out,
# connect times by bucket, nanoseconds spent connecting
Counts = tuple[int, int, int, int, int, tuple[int, ...], int, int, int, int, tuple[int, ...], int]

class Pair:
    def read(self) -> Counts: ...

class Front:
    def read(self) -> Counts: ...
    def handed(self) -> Counts: ...

def read_columns(things: tuple[Pair, ...] | tuple[Front, ...], rows: tuple[int, ...] | None = None) -> bytearray: ...

class Engine:
    def __init__(
        self,
        *,
        threads: int,
        retries: int,
        connect_timeout: float,
        idle_timeout: float,
        udp_idle_timeout: float,
        udp_sessions: int,
        connections: int,
        pipes: int,
        ports: tuple[int, int],
    ) -> None: ...
    def close(self) -> None: ...
    def put_backend(self, owner: int, address: bytes, port: int, tag: bytes | None = None) -> None: ...
    def peers(self) -> Front: ...
    def put_peer_acl(
        self,
        nodes: list[tuple[bytes, bool, bool]],
        backends: list[tuple[bytes, int, int, list[tuple[bytes, int]], list[tuple[bytes, int]]]],
        keys: list[tuple[int, bytes]],
        require: bool,
    ) -> None: ...
    def drop_backend(self, owner: int) -> None: ...
    def front(self, address: bytes, port: int, any: bool) -> Front: ...  # noqa: A002
    def pair(self, front: Front) -> Pair: ...
    def release(self, thing: Pair | Front) -> bool: ...
    def put_route(
        self,
        front: Front,
        table: SlotTable,
        pairs: Mapping[int, Pair],
        *,
        by_client: bool,
        announce: bool,
        allow: list[tuple[bytes, int]],
        deny: list[tuple[bytes, int]],
    ) -> None: ...
    def collect(self) -> None: ...
    def listen(self, front: Front, fd: int, *, stream: bool, six: bool, thread: int) -> None: ...
    def unlisten(self, front: Front) -> None: ...
    def yield_sockets(self) -> None: ...
    def abort(self) -> None: ...
    def totals(self) -> dict[str, int]: ...
