# SPDX-License-Identifier: Apache-2.0
"""Live connections through the mesh, as the tasks' own sockets see them. Needs root and Debian's python3-bpfcc."""

from __future__ import annotations

import ctypes
import importlib
import ipaddress
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from mesh import netaddr
from mesh.errors import MeshError
from mesh.trace.kernel import kernel_headers
from mesh.trace.program import CLOSE, DROP, OPEN, Event, Key, program

_DEBIAN_PACKAGES: Final = "/usr/lib/python3/dist-packages"
_REFRESH: Final = 1.0  # seconds between looks at the daemon's state
_PAGES: Final = 256  # of the perf buffer, per CPU


@dataclass(frozen=True, slots=True)
class End:
    """Whose local end an address and port are. `backend` is empty where it is a frontend's (proxy engine)."""

    service: str
    frontend: str
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One event for people: times in Unix seconds, durations in seconds, None where it is not known."""

    time: float
    event: str  # open | close | reset | drop
    service: str
    frontend: str
    client: str
    backend: str
    address: str  # the end that saw it
    duration: float | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    rtt_ms: float | None = None
    retransmits: int | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_bcc() -> Any:
    """The bcc module: Debian's package works with any Python 3, PyPI's `bcc` is unrelated.

    Raises:
        MeshError: it is not installed, or another module has its name.
    """
    remedy = "apt install python3-bpfcc (PyPI's bcc is an unrelated package)"
    if _DEBIAN_PACKAGES not in sys.path:
        sys.path.append(_DEBIAN_PACKAGES)
    try:
        module = importlib.import_module("bcc")
    except (ImportError, OSError) as error:
        raise MeshError(f"mesh trace needs bcc: {error}", remedy=remedy) from error
    if not hasattr(module, "BPF"):
        raise MeshError("the installed bcc is not the BPF compiler collection", where=str(module), remedy=remedy)
    return module


def ends_of(state: Mapping[str, Any]) -> dict[tuple[bytes, int], End]:
    """The local ends to follow, from the daemon's `/state`: TCP backends, and frontends on any address."""
    found: dict[tuple[bytes, int], End] = {}
    for service in state.get("services", ()):
        for frontend in service["frontends"]:
            name = frontend["frontend"]
            host_port, _, protocol = name.rpartition("/")
            if protocol == "tcp":
                found[bytes(16), netaddr.split_host_port(host_port)[1]] = End(service["name"], name)
            for target in frontend["targets"]:
                key = (netaddr.pack(ipaddress.ip_address(target["address"])), int(target["port"]))
                found[key] = End(service["name"], name, target.get("name") or target["backend"])
    return found


def _shown(address: bytes, port: int) -> str:
    return netaddr.join_host_port(netaddr.unpack(address), port)


class ConnectionTrace:
    """A running trace. Nothing is loaded before `rows` is iterated and nothing stays after it ends.

    Args:
        read_state: answers the daemon's `/state`; called about once a second.
        keep: says which rows are wanted.
    """

    def __init__(self, read_state: Callable[[], Mapping[str, Any]], keep: Callable[[Row], bool]) -> None:
        self._read_state = read_state
        self._keep = keep
        self._ends: dict[tuple[bytes, int], End] = {}
        self._rows: list[Row] = []
        self._reasons: dict[int, str] = {}
        self.lost = 0  # events that did not fit into the buffer

    def rows(self, seconds: float | None) -> Iterator[Row]:
        """Yield rows as they happen, for `seconds` (None: until the caller stops).

        Raises:
            MeshError: bcc, headers, tracefs, BTF or root is missing; the message says how to get it.
        """
        module = import_bcc()
        text, hooks, self._reasons = program()
        with kernel_headers():
            try:
                bpf = module.BPF(text=text, cflags=["-Wno-everything"])
            except Exception as error:  # bcc raises bare Exception
                raise MeshError(f"bcc could not load its program: {error}", remedy="run as root") from error
        try:
            self._follow(bpf["ends"])
            bpf["events"].open_perf_buffer(self._on_event, page_cnt=_PAGES, lost_cb=self._on_lost)
            for name, function in hooks.items():
                bpf.attach_tracepoint(tp=name, fn_name=function)
            end = None if seconds is None else time.monotonic() + seconds
            refreshed = time.monotonic()
            while end is None or time.monotonic() < end:
                bpf.perf_buffer_poll(timeout=200)
                if time.monotonic() - refreshed >= _REFRESH:
                    self._follow(bpf["ends"])
                    refreshed = time.monotonic()
                yield from self._rows
                self._rows.clear()
        finally:
            bpf.cleanup()

    def _follow(self, table: Any) -> None:
        try:
            wanted = ends_of(self._read_state())
        except MeshError:
            if not self._ends:
                raise
            return  # the daemon is gone: continue with its last state
        for address, port in wanted.keys() - self._ends.keys():
            table[table.Key.from_buffer_copy(bytes(Key((ctypes.c_uint8 * 16)(*address), port)))] = table.Leaf(1)
        for address, port in self._ends.keys() - wanted.keys():
            del table[table.Key.from_buffer_copy(bytes(Key((ctypes.c_uint8 * 16)(*address), port)))]
        self._ends = wanted

    def _on_lost(self, count: int) -> None:
        self.lost += count

    def _on_event(self, _cpu: int, data: Any, _size: int) -> None:
        event = ctypes.cast(data, ctypes.POINTER(Event)).contents
        local = bytes(event.local)
        end = self._ends.get((local, event.local_port)) or self._ends.get((bytes(16), event.local_port))
        if end is None or (event.kind == DROP and event.reason not in self._reasons):
            return
        row = self._row(event, end)
        if self._keep(row):
            self._rows.append(row)

    def _row(self, event: Event, end: End) -> Row:
        values: dict[str, Any] = {
            "time": time.time() - (time.monotonic_ns() - event.time) / 1e9,
            "service": end.service,
            "frontend": end.frontend,
            "backend": end.backend,
            "client": _shown(bytes(event.peer), event.peer_port),
            "address": _shown(bytes(event.local), event.local_port),
        }
        if event.kind == OPEN:
            return Row(event="open", **values)
        if event.kind == CLOSE:
            resets = ["", "sent by this end", "sent by the peer", "sent by both ends"][event.resets & 3]
            fin = 0 if resets else 1  # the kernel counts a FIN as a byte (tcp_rcv_nxt_update, tcp_snd_una_update)
            return Row(
                event="reset" if resets else "close",
                duration=(event.time - event.began) / 1e9 if event.began else None,
                bytes_in=max(0, event.received - fin),
                bytes_out=max(0, event.sent - fin),
                rtt_ms=event.srtt_us / 1e3,
                retransmits=event.retransmits,
                reason=resets,
                **values,
            )
        return Row(event="drop", reason=self._reasons.get(event.reason, str(event.reason)), **values)
