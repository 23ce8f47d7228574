# SPDX-License-Identifier: Apache-2.0
"""Service options as people write them: `mesh.*` labels of a swarm service, keys of the static file. Pure."""

from __future__ import annotations

import difflib
import enum
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mesh._abi import TABLE_SIZES
from mesh.model import (
    WEIGHT_MAX,
    Address,
    Affinity,
    HealthCheck,
    Locality,
    Network,
    ProbeKind,
    Problem,
    ProxyProtocol,
    ServiceOptions,
    Severity,
)
from mesh.netaddr import usable
from mesh.rules import NOBODY

PREFIX: Final = "mesh."
NODE_WEIGHT: Final = "mesh.weight"
NODE_ADDRESS: Final = "mesh.address"
OF_NODES: Final = (NODE_WEIGHT, NODE_ADDRESS)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)", re.ASCII)
_NEAR_PREFIX = re.compile(r"mesh[-._/:]([a-z][a-z._-]*)", re.ASCII | re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_CHECK: Final = "health."  # prefix of the health check's fields
RULES: Final = ("allow", "deny", "fail-closed")
"""Options that say who is let in: where there is no good value of one that was asked for, nobody is."""
EMPTY: Final = "nobody is let in: write the networks, or remove it to let everybody in"
NONE_ADMITTED: Final = "is set, and no allow says who is let in, so nobody is"
ADMIT: Final = "write the networks into allow"
NO_GOOD: Final = "no good value of it is known"


@dataclass(frozen=True, slots=True)
class _Option:
    """A row of the label table.

    Attributes:
        accepts: what may be written, for people.
        parse: the value of a text; raises ValueError or KeyError where there is none.
        fields: fields of ServiceOptions that `parse` returns a tuple of, those of the health check as "health.NAME".
            Empty: it returns the value of the one field that is named as the label, with "_" for "-".
    """

    accepts: str
    parse: Callable[[str], Any]
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The last good labels of one service: a wrong value keeps what stands here.

    Attributes:
        texts: good values by name without prefix; a name that is absent here and in `unknown` was not set.
        unknown: names of which every value that was seen was wrong.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


class _EntriesError(ValueError):
    """Some entries of a list are wrong; the others can be used."""

    def __init__(self, entries: list[str], rest: tuple[Network, ...]) -> None:
        super().__init__(*entries)
        self.entries, self.rest = entries, rest


def _boolean(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}[
        text.lower()
    ]


def _integer(low: int, high: int) -> _Option:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return _Option(f"a whole number from {low} to {high}", parse)


def _duration(low: float, high: float) -> _Option:
    def parse(text: str) -> float:
        match = _DURATION.fullmatch(text)
        seconds = float(match[1]) * _SECONDS[match[2]] if match else -1.0
        if not low <= seconds <= high:
            raise ValueError(text)
        return seconds

    return _Option(f"a duration from {low:g}s to {high:g}s, such as 2s or 500ms", parse)


def _one_of(kind: type[enum.Enum]) -> _Option:
    return _Option(f"one of: {', '.join(sorted(str(v.value) for v in kind))}", kind)


def _probe(text: str) -> tuple[ProbeKind, str]:
    kind, colon, path = text.partition(":")
    if kind == "http" and not colon:
        return ProbeKind.HTTP, "/"
    if kind == "http" and re.fullmatch(r"/[!-~]*", path):
        return ProbeKind.HTTP, path
    if colon:
        raise ValueError(text)
    return {"tcp": ProbeKind.TCP, "off": ProbeKind.OFF}[kind], "/"


def _networks(text: str) -> tuple[Network, ...]:
    found: list[Network] = []
    wrong: list[str] = []
    for entry in text.replace(",", " ").split():
        try:
            found.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            wrong.append(entry)
    networks = tuple(dict.fromkeys(found))
    if wrong:
        raise _EntriesError(wrong, networks)
    return networks


def _table_size(text: str) -> int:
    return {str(size): size for size in TABLE_SIZES}[text]


_NETWORKS: Final = "networks separated by commas, such as 10.0.0.0/8, 2001:db8::/32"
_OPTIONS: Final[dict[str, _Option]] = {
    "enable": _Option("one of: true, false", _boolean),
    "affinity": _one_of(Affinity),
    "proxy-protocol": _one_of(ProxyProtocol),
    "health": _Option("one of: tcp, http:/path, off", _probe, ("health.kind", "health.path")),
    "health.interval": _duration(0.1, 3600),
    "health.timeout": _duration(0.01, 300),
    "health.rise": _integer(1, 100),
    "health.fall": _integer(1, 100),
    "table-size": _Option(f"one of: {', '.join(map(str, TABLE_SIZES))}", _table_size),
    "locality": _one_of(Locality),
    "allow": _Option(_NETWORKS, _networks),
    "deny": _Option(_NETWORKS, _networks),
    "fail-closed": _Option("one of: true, false", _boolean),
}
"""The label table: a new label is a row here, a field in `mesh.model`, and what makes use of the field."""
KEYS: Final = tuple(_OPTIONS)
"""Names of the options, without prefix."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shorten(text: str, limit: int = 60) -> str:
    """What a user wrote, quoted, at a length that fits a message."""
    return repr(_cut(text, limit))


class _Reader:
    """Reads options from text, and gathers what is wrong with it.

    Args:
        last: the last good values; None: nothing was read before.
    """

    def __init__(self, values: Mapping[str, str], place: Callable[[str], str], last: Accepted | None = None) -> None:
        self._values = values
        self._place = place
        self._last = last
        self._fields: dict[str, Any] = {}
        self._closed = ""  # the rule that lets nobody in
        self._texts: dict[str, str] = {}
        self._unknown: list[str] = []
        self.problems: list[Problem] = []

    @property
    def accepted(self) -> Accepted:
        """What is to be kept where a later value is wrong."""
        return Accepted(self._texts, tuple(self._unknown)) if self._texts or self._unknown else NONE_SET

    def options(self) -> ServiceOptions:
        """The options. Where there is no usable text: the last good one, else the default, or nobody is let in."""
        for key, option in _OPTIONS.items():
            if key in self._values:
                self._read(key, option)
        if self._fields.get("fail_closed") and not self._closed and not self._fields.get("allow"):
            self._closed = "fail-closed"
            self.problems.append(Problem(self._place("fail-closed"), NONE_ADMITTED, ADMIT, Severity.CRITICAL))
        if self._closed:
            self._fields["deny"] = NOBODY
        check = {name: value for name, value in self._fields.items() if name.startswith(_CHECK)}
        own = {name: value for name, value in self._fields.items() if name not in check}
        return ServiceOptions(
            **own, health=HealthCheck(**{name.removeprefix(_CHECK): value for name, value in check.items()})
        )

    def _read(self, key: str, option: _Option) -> None:
        text = self._values[key].strip()
        try:
            self._take(key, option, option.parse(text))
        except _EntriesError as wrong:
            said = [f"{shorten(entry)} is not a network such as 10.0.0.0/8 or 2001:db8::/32" for entry in wrong.entries]
            self._keep(key, option, said, wrong.rest)
        except (ValueError, KeyError):
            self._keep(key, option, [f"{shorten(self._values[key])} is not {option.accepts}"])
        else:
            self._texts[key] = text
            if key == "allow" and not self._fields["allow"]:
                self._closed = key
                self.problems.append(Problem(self._place(key), "is empty", EMPTY, Severity.CRITICAL))

    def _take(self, key: str, option: _Option, value: Any) -> None:
        fields = option.fields or (key.replace("-", "_"),)
        for name, part in zip(fields, value if option.fields else (value,), strict=True):
            self._fields.setdefault(name, part)

    def _keep(self, key: str, option: _Option, said: Sequence[str], rest: tuple[Network, ...] = ()) -> None:
        """What applies in place of a wrong value: the last good one; else nothing is opened by it.

        Args:
            rest: the usable entries of a rule.
        """
        severity = Severity.CRITICAL if key in RULES else Severity.WARNING
        remedy = self._from_last(key, option)
        if not remedy:
            self._unknown.append(key)
            remedy = "the default applies until it is corrected"
            if key == "allow" and rest:
                self._take(key, option, rest)
                remedy = "the other entries apply, nobody else is let in"
            elif key in RULES:
                self._closed, remedy = key, f"nobody is let in until it is corrected: {NO_GOOD}"
        self.problems += [Problem(self._place(key), message, remedy, severity) for message in said]

    def _from_last(self, key: str, option: _Option) -> str:
        """Take the last good value of an option, and say so; empty where there is none."""
        if self._last is None or key in self._last.unknown:
            return ""
        before = self._last.texts.get(key)
        if before is None:
            means = {"allow": ": everybody is let in", "deny": ": nobody is kept out by it"}.get(key, "")
            return f"as before, it counts as not set until it is corrected{means}"
        try:
            value = option.parse(before)
        except (ValueError, KeyError):  # written by another build
            return ""
        self._texts[key] = before
        self._take(key, option, value)
        if key == "allow" and not value:
            self._closed = key
            return EMPTY
        return f"{shorten(before)} stays in force until it is corrected"


NONE_SET: Final = Accepted()


def parse_options(values: Mapping[str, str], place: Callable[[str], str]) -> tuple[ServiceOptions, list[Problem]]:
    """Options from text, and what is wrong with it, where nothing was read before; never raises. See `read_options`."""
    return read_options(values, place)[:2]


def read_options(
    values: Mapping[str, str], place: Callable[[str], str], last: Accepted | None = None
) -> tuple[ServiceOptions, list[Problem], Accepted]:
    """Options from text, what is wrong with it, and what is to be kept of it; never raises.

    Args:
        values: by name without prefix ("affinity", "health.interval"); unknown names are problems.
        place: gives the place of a name, for the message.
        last: the last good values of the same service; None: there are none.
    """
    reader = _Reader(values, place, last)
    options = reader.options()
    for key in sorted(values.keys() - _OPTIONS.keys()):
        near = nearest(key, KEYS)
        remedy = f"did you mean {near}?" if near else f"known: {', '.join(KEYS)}"
        reader.problems.append(Problem(place(key), "unknown option", remedy, _severity(near, values)))
    return options, reader.problems, reader.accepted


def _severity(meant: str, values: Mapping[str, str]) -> Severity:
    """Of a name that is wrong: somebody believes in a rule that nobody keeps, unless it is there as well."""
    return Severity.CRITICAL if meant in RULES and meant not in values else Severity.WARNING


def service_options(
    service: str, labels: Mapping[str, str], last: Accepted | None = None
) -> tuple[ServiceOptions, list[Problem], Accepted]:
    """Options of a swarm service from its labels, what is wrong with them, and what to keep of them as `last` for the
    next time; labels without the prefix `mesh.` are other people's."""
    ours = {k.removeprefix(PREFIX): v for k, v in labels.items() if k.startswith(PREFIX)}
    options, problems, accepted = read_options(ours, lambda key: f"service {service}, label {_cut(PREFIX + key)}", last)
    return options, [*map(_with_prefix, problems), *_wrong_prefix(service, labels, ours)], accepted


def _wrong_prefix(service: str, labels: Mapping[str, str], ours: Mapping[str, str]) -> list[Problem]:
    """Labels that are ours but for their prefix or their case; any other is somebody else's."""
    found = []
    for label in sorted(labels.keys() - {PREFIX + key for key in ours}):
        match = _NEAR_PREFIX.fullmatch(label)
        key = match[1].lower().replace("_", "-") if match else ""
        if key in KEYS:
            where = f"service {service}, label {_cut(label)}"
            found.append(Problem(where, "unknown label", f"did you mean {PREFIX}{key}?", _severity(key, ours)))
    return found


def misplaced(service: str, labels: Mapping[str, str], of_containers: Mapping[str, str]) -> list[Problem]:
    """Labels for mesh that stand on a service's containers and not on the service: there they mean nothing."""
    return [
        Problem(
            f"service {service}, container label {_cut(label)}",
            "means nothing on containers, mesh reads the service's labels",
            "docker service update --label-add, or deploy: labels: in a compose file",
            _severity(label.removeprefix(PREFIX), {key.removeprefix(PREFIX): "" for key in labels}),
        )
        for label in sorted(of_containers)
        if label.startswith(PREFIX) and label not in labels
    ]


def _with_prefix(problem: Problem) -> Problem:
    if not problem.message.startswith("unknown option"):
        return problem
    label = problem.where.rsplit(" ", 1)[-1]
    if label in OF_NODES:
        return Problem(problem.where, "is a label of nodes, not of services", "docker node update --label-add")
    near = nearest(label, [*OF_NODES, *(PREFIX + key for key in KEYS)])
    if near in OF_NODES:
        remedy = f"did you mean {near}? That is a label of nodes, not of services"
        return Problem(problem.where, "unknown label", remedy)
    remedy = f"did you mean {near}?" if near else f"known: {', '.join(PREFIX + key for key in KEYS)}"
    return Problem(problem.where, "unknown label", remedy, problem.severity)


def node_address(node: str, labels: Mapping[str, str]) -> tuple[Address | None, list[Problem]]:
    """Where other nodes reach a node, from its label `mesh.address`; None: it does not say."""
    text = labels.get(NODE_ADDRESS)
    if text is None:
        return None, []
    try:
        address = usable(ipaddress.ip_address(text.strip()))
    except ValueError:
        address = None
    if address is not None:
        return address, []
    where = f"node {node}, label {NODE_ADDRESS}"
    message = f"{shorten(text)} is not an address that other nodes can call"
    return None, [Problem(where, message, "Swarm's address of the node applies until it is corrected")]


def node_weight(node: str, labels: Mapping[str, str], last: int = 1) -> tuple[int, list[Problem]]:
    """Weight of a node from its label `mesh.weight` (default 1; 0: no new flows to its tasks).

    Args:
        last: its weight before, which a wrong value keeps.
    """
    text = labels.get(NODE_WEIGHT)
    option = _integer(0, WEIGHT_MAX)
    problems = []
    weight = 1
    if text is not None:
        try:
            weight = option.parse(text.strip())
        except ValueError:
            weight, remedy = last, f"{last} applies until it is corrected"
            where = f"node {node}, label {NODE_WEIGHT}"
            problems.append(Problem(where, f"{shorten(text)} is not {option.accepts}", remedy))
    for label in sorted(k for k in labels if k.startswith(PREFIX) and k not in OF_NODES):
        remedy = f"a node has {NODE_WEIGHT} and {NODE_ADDRESS}; other labels go on the service"
        problems.append(Problem(f"node {node}, label {_cut(label)}", "unknown label", remedy))
    return weight, problems
