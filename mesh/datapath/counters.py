# SPDX-License-Identifier: Apache-2.0
"""An engine's counters per frontend and backend, stored by column."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar


class Failure(enum.Enum):
    """Why a connection failed, the `cause` label of mesh_connections_failed_total."""

    REFUSED = "refused"  # the backend answered with a reset
    TIMEOUT = "timeout"  # no answer within the connect timeout
    UNREACHABLE = "unreachable"  # an ICMP error, or no route
    RESET = "reset"  # reset by either side after it was established
    NO_BACKEND = "no_backend"  # the frontend has no backend that may be used
    LIMIT = "limit"  # out of descriptors, memory or the configured number of connections
    DENIED = "denied"  # mesh.allow / mesh.deny
    OTHER = "other"
    TOO_BIG = "too_big"  # a datagram larger than the path
    NO_PATH = "no_path"  # the backend's answer has no way back
    COLLISION = "collision"  # no source is free by which the backend could tell the flow from others
    UNANSWERED = "unanswered"  # the client sent its SYN again; mesh_connections_unanswered_total


CONNECT_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0)
"""Upper bounds of the connect-time histogram, seconds; one more bucket follows for +Inf."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Monotonic counters of one frontend or of one backend of it, `active` excepted. opened = closed + active."""

    opened: int = 0  # connections or UDP sessions given to a backend
    closed: int = 0
    active: int = 0
    retried: int = 0  # a further backend was tried; counted for the backend that was left
    failed: Mapping[Failure, int] = field(default_factory=dict)
    bytes_in: int = 0  # from the client
    bytes_out: int = 0  # to the client
    packets_in: int = 0  # datagrams where the proxy engine forwards UDP, packets in the kernel engine
    packets_out: int = 0
    connect_seconds: tuple[int, ...] = ()  # one count per bucket of CONNECT_BUCKETS and +Inf, not cumulative
    connect_seconds_sum: float = 0.0


PLAIN: Final = ("opened", "closed", "retried", "bytes_in", "bytes_out", "packets_in", "packets_out", "connect_ns")


COLUMNS: Final = (*PLAIN, *Failure, *CONNECT_BUCKETS, float("inf"))
"""The columns of a CounterTable, in their order: sums, failures by cause, connect times by bucket."""


_Key = TypeVar("_Key")


class CounterTable(Mapping[_Key, Counters]):
    """Counters by column, so that many rows are read and shown without an object for each. As a mapping it makes them.

    Args:
        order: the keys, row by row. Pass the identical tuple while the rows are the same: readers then keep what they
            derived from it.
        columns: the first few of COLUMNS, or all, with one number per row; those left out are zeros.
    """

    def __init__(self, order: tuple[_Key, ...], columns: Sequence[Sequence[int]]) -> None:
        self.order = order
        self.columns = columns

    @classmethod
    def of(cls, rows: Mapping[_Key, Counters]) -> CounterTable[_Key]:
        """A CounterTable of any mapping; the mapping itself if it is one."""
        if isinstance(rows, CounterTable):
            return rows
        found = list(rows.values())
        columns = [[int(getattr(c, name)) for c in found] for name in PLAIN[:-1]]
        columns.append([round(c.connect_seconds_sum * 1e9) for c in found])
        columns += [[c.failed.get(cause, 0) for c in found] for cause in Failure]
        buckets = len(CONNECT_BUCKETS) + 1
        columns += [list(column) for column in zip(*(c.connect_seconds or (0,) * buckets for c in found), strict=True)]
        return cls(tuple(rows), columns)

    def column(self, number: int) -> Sequence[int]:
        """A column by its place in COLUMNS."""
        return self.columns[number] if number < len(self.columns) else (0,) * len(self.order)

    @functools.cached_property
    def _rows(self) -> dict[_Key, int]:
        return {key: row for row, key in enumerate(self.order)}

    def __getitem__(self, key: _Key) -> Counters:
        row = self._rows[key]
        values = [column[row] for column in self.columns]
        values += [0] * (len(PLAIN) - len(values))
        opened, closed, retried, bytes_in, bytes_out, packets_in, packets_out, connect = values[: len(PLAIN)]
        failed = {cause: n for cause, n in zip(Failure, values[len(PLAIN) :], strict=False) if n}
        return Counters(
            opened=opened,
            closed=closed,
            active=opened - closed,
            retried=retried,
            failed=failed,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            packets_in=packets_in,
            packets_out=packets_out,
            connect_seconds=tuple(values[len(PLAIN) + len(Failure) :]),
            connect_seconds_sum=connect / 1e9,
        )

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def added(
    table: CounterTable[_Key], more: CounterTable[_Key], name: Callable[[_Key], _Key | None]
) -> CounterTable[_Key]:
    """`table` plus the counts of `more`, under the keys that `name` gives its rows; None: a row is left out."""
    moved = {row for column in more.columns if any(column) for row, n in enumerate(column) if n}
    if not moved:
        return table
    rows = {key: row for row, key in enumerate(table.order)}
    columns = [list(table.column(i)) for i in range(len(COLUMNS))]
    sources = [more.column(i) for i in range(len(COLUMNS))]
    for row in sorted(moved):
        key = name(more.order[row])
        if key is None:
            continue
        at = rows.setdefault(key, len(rows))
        for column, source in zip(columns, sources, strict=True):
            if at == len(column):
                column.append(0)
            column[at] += source[row]
    return CounterTable(table.order if len(rows) == len(table.order) else tuple(rows), columns)
