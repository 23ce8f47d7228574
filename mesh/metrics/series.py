# SPDX-License-Identifier: Apache-2.0
"""Counters of a CounterTable as sample lines. The text around the numbers is kept while the rows stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Final, Generic, TypeVar

from mesh.datapath.counters import COLUMNS, CONNECT_BUCKETS, PLAIN, CounterTable, Failure
from mesh.incremental import Latest
from mesh.metrics.families import Family

Blocks = dict[Family, bytes]  # sample lines by family, without the last newline
_Key = TypeVar("_Key")
_Rows = tuple[tuple[_Key, ...], Mapping[str, str]]  # the rows' keys, and the services' names by frontend

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_BOUNDS: Final = (*(f"{bound}" for bound in CONNECT_BUCKETS), "+Inf")
_OPENED, _CLOSED, _RETRIED, _IN, _OUT, _PACKETS_IN, _PACKETS_OUT, _SPENT = range(len(PLAIN))
_CONNECT: Final = len(PLAIN) + len(Failure)
_UNANSWERED: Final = COLUMNS.index(Failure.UNANSWERED)


def escape(text: str) -> str:
    """Text as the value of a label."""
    return text.translate(_ESCAPES) if '"' in text or "\\" in text or "\n" in text else text


def labelled(**labels: object) -> str:
    """Labels as they stand between the braces."""
    return ",".join(f'{name}="{escape(str(value))}"' for name, value in labels.items())


class Series(Generic[_Key]):
    """What is exported of the rows of a table.

    Args:
        labels: of all rows, from their keys and the services' names by frontend.
        single: families with one number a row, and the numbers.
        double: families with one number in each direction; the flag: rows that never counted are left out.
        failed, connect: families by cause, and of connect times; rows that never counted are left out.
        histogram: `connect` shows buckets too.
    """

    def __init__(
        self,
        labels: Callable[[Sequence[_Key], Mapping[str, str]], list[str]],
        *,
        single: Mapping[Family, Callable[[CounterTable[_Key]], Sequence[int]]],
        double: Mapping[Family, tuple[int, int, bool]],
        failed: Family,
        connect: Family,
        histogram: bool,
    ) -> None:
        self._label = labels
        self._single = single
        self._double = double
        self._failed = failed
        self._connect = connect
        self._histogram = histogram
        self._text: Latest[_Rows[_Key], tuple[list[str], dict[Family, str]]] = Latest(_same_rows)

    def blocks(self, table: CounterTable[_Key], names: Mapping[str, str]) -> Blocks:
        """The lines of all rows."""
        labels, templates = self._text.of((table.order, names), self._make_text)
        found = {family: _filled(templates[family], of(table)) for family, of in self._single.items()}
        for family, (into, out, sparse) in self._double.items():
            pairs = zip(table.column(into), table.column(out), strict=True)
            if sparse:
                found[family] = "\n".join(_moved(family, labels, pairs)).encode()
            else:
                found[family] = _filled(templates[family], chain.from_iterable(pairs))
        found[self._failed] = "\n".join(self._failures(table, labels)).encode()
        found[self._connect] = "\n".join(self._connects(table, labels)).encode()
        return found

    def _make_text(self, rows: _Rows[_Key]) -> tuple[list[str], dict[Family, str]]:
        """The labels of all rows, and each family's lines with `%d` in place of its numbers.

        Templates are joined, which takes a fraction of the time of a format per row.
        """
        labels = self._label(*rows)
        return labels, self._templates(labels)

    def _templates(self, labels: list[str]) -> dict[Family, str]:
        if "%" in "".join(labels):
            labels = [label.replace("%", "%%") for label in labels]
        if not labels:
            return dict.fromkeys((*self._single, *self._double), "")
        made = {}
        for family in self._single:
            name = f"{family.name}{{"
            made[family] = name + f"}} %d\n{name}".join(labels) + "} %d"
        pieces = [""] * (4 * len(labels))
        pieces[0::4] = pieces[2::4] = labels
        for family, (_, _, sparse) in self._double.items():
            if not sparse:
                name = f"{family.name}{{"
                pieces[1::4] = [f',direction="in"}} %d\n{name}'] * len(labels)
                pieces[3::4] = [f',direction="out"}} %d\n{name}'] * len(labels)
                made[family] = name + "".join(pieces).removesuffix(f"\n{name}")
        return made

    def _failures(self, table: CounterTable[_Key], labels: Sequence[str]) -> Iterable[str]:
        for i, cause in enumerate(Failure):
            column = table.column(len(PLAIN) + i) if cause is not Failure.UNANSWERED else ()
            for label, count in zip(labels, column, strict=True) if any(column) else ():
                if count:
                    yield f'{self._failed.name}{{{label},cause="{cause.value}"}} {count}'

    def _connects(self, table: CounterTable[_Key], labels: Sequence[str]) -> Iterable[str]:
        name = self._connect.name
        buckets = table.columns[_CONNECT:]
        for row, spent in enumerate(table.column(_SPENT) if buckets else ()):
            if not spent:
                continue
            label, counts = labels[row], [bucket[row] for bucket in buckets]
            total = sum(counts)
            if self._histogram:
                for bound, sofar in zip(_BOUNDS, accumulate(counts), strict=True):
                    yield f'{name}_bucket{{{label},le="{bound}"}} {sofar}'
            yield f"{name}_sum{{{label}}} {spent / 1e9}"
            yield f"{name}_count{{{label}}} {total}"


def _same_rows(a: _Rows[_Key], b: _Rows[_Key]) -> bool:
    return a[0] is b[0] and a[1] == b[1]


def _filled(template: str, numbers: Iterable[int]) -> bytes:
    return (template % tuple(numbers)).encode()


def _moved(family: Family, labels: Sequence[str], pairs: Iterable[tuple[int, int]]) -> Iterable[str]:
    for label, (into, out) in zip(labels, pairs, strict=True):
        if into or out:
            yield f'{family.name}{{{label},direction="in"}} {into}'
            yield f'{family.name}{{{label},direction="out"}} {out}'


def opened(table: CounterTable[_Key]) -> Sequence[int]:
    return table.column(_OPENED)


def closed(table: CounterTable[_Key]) -> Sequence[int]:
    return table.column(_CLOSED)


def active(table: CounterTable[_Key]) -> Sequence[int]:
    return [a - b for a, b in zip(table.column(_OPENED), table.column(_CLOSED), strict=True)]


def retried(table: CounterTable[_Key]) -> Sequence[int]:
    return table.column(_RETRIED)


def unanswered(table: CounterTable[_Key]) -> Sequence[int]:
    return table.column(_UNANSWERED)


BYTES: Final = (_IN, _OUT)
PACKETS: Final = (_PACKETS_IN, _PACKETS_OUT)
