# SPDX-License-Identifier: Apache-2.0
"""Service options as plain values and back: one way for the control API, the relay and the journal.

The fields, their types and defaults are those of `model.ServiceOptions`: a new field is carried everywhere without an
edit here. Plain values are what JSON and MessagePack know: text, numbers, booleans, lists, and dicts with text as keys.
Enum members are their values, and networks are text such as "10.0.0.0/8".

Two forms:

- `to_plain`: every field, the health check as a dict. GET /state shows it.
- `to_compact`: the form of the relay and of the journal, which other builds read. Fields that a reader does not know
  are ignored, and those that are absent have their default. The health check is a list of the six fields it has always
  had, because readers demand exactly six; any further field stands beside it as "health.NAME".
"""

from __future__ import annotations

import abc
import ipaddress
import typing
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mesh._abi import TABLE_SIZES
from mesh.model import ServiceOptions

Plain = dict[str, Any]

_CHECK: Final = "health"
_LISTED: Final = ("kind", "path", "interval", "timeout", "rise", "fall")  # of the health check, in the list's order


class _Network(abc.ABC):  # noqa: B024 -- has nothing abstract, it only stands for both kinds
    """An IPv4 or an IPv6 network: msgspec does not take two types of its user's in one union."""


_Network.register(ipaddress.IPv4Network)
_Network.register(ipaddress.IPv6Network)

_FIELDS: Final[Any] = typing.TypedDict(  # type: ignore[misc]
    "_FIELDS", typing.get_type_hints(ServiceOptions, localns={"Network": _Network}), total=False
)


def to_plain(options: ServiceOptions) -> Plain:
    """Every field by name."""
    plain: Plain = msgspec.to_builtins(options, enc_hook=str)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def to_compact(options: ServiceOptions, *, whole: bool = False) -> Plain:
    """The fields by name, as other builds read them.

    Args:
        whole: fields that have their default too; they are left out otherwise.
    """
    compact = _compact(to_plain(options))
    return compact if whole else {name: value for name, value in compact.items() if value != _DEFAULT.get(name)}


def from_compact(compact: Mapping[str, Any]) -> ServiceOptions:
    """The options of a compact form, of this or another build.

    Raises:
        ValueError: a value is of a wrong type or out of range; the message has its place.
    """
    listed = compact.get(_CHECK, _DEFAULT[_CHECK])
    if not isinstance(listed, list) or len(listed) != len(_LISTED):
        raise ValueError(f"health check {listed!r} has not the fields {', '.join(_LISTED)}")
    check = dict(zip(_LISTED, listed, strict=True))
    fields: Plain = {_CHECK: check}
    for name, value in compact.items():
        if name.startswith(f"{_CHECK}."):
            check[name.removeprefix(f"{_CHECK}.")] = value
        elif name != _CHECK:
            fields[name] = value
    options = ServiceOptions(**msgspec.convert(fields, _FIELDS, dec_hook=_network))
    if options.table_size not in TABLE_SIZES:
        raise ValueError(f"table size {options.table_size}")
    return options


def _compact(plain: Plain) -> Plain:
    check = plain[_CHECK]
    more = {f"{_CHECK}.{name}": value for name, value in check.items() if name not in _LISTED}
    return {**plain, _CHECK: [check[name] for name in _LISTED], **more}


def _network(kind: type, value: Any) -> Any:
    if kind is _Network and isinstance(value, str):
        return ipaddress.ip_network(value)
    raise ValueError(f"{value!r} is no {kind.__name__}")


_DEFAULT: Final = _compact(to_plain(ServiceOptions()))
