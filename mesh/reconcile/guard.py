# SPDX-License-Identifier: Apache-2.0
"""Holds back removals that look like a fault of the source rather than an intended change. Pure: time is an argument.

What goes at once: anything that had no new flows before it went (draining, not ready, down, drained), one service or
one backend at a time, and losses of up to `guard_max_removal` of all backends (or services). What is held for
`guard_hold` seconds: a greater loss at once. What is held for longer: the last backends of a service that itself
stays, until another backend comes, until our probes call them dead, or until their address belongs to somebody else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from mesh.config.keys import Config
from mesh.model import Address, DesiredState, Frontend, FrontendState, Health, HealthView, Target

FOREVER: Final = float("inf")
_DEAD: Final = (Health.DOWN, Health.UNREACHED)
Location = tuple[Address, int, str]
Held = tuple[str, str]  # a service's id and a backend's, or "" for the whole service


@dataclass(frozen=True, slots=True)
class Guarded:
    """What to serve after holding back. `held` goes into the next call, to be made at `due` at the latest."""

    desired: DesiredState
    held: Mapping[Held, float] = field(default_factory=lambda: MappingProxyType({}))
    messages: tuple[str, ...] = ()  # what is newly held or let go, for the log

    @property
    def due(self) -> float:
        return min(self.held.values(), default=FOREVER)


@dataclass(slots=True)
class _View:
    """A desired state by service."""

    frontends: dict[str, dict[Frontend, FrontendState]] = field(default_factory=lambda: defaultdict(dict))
    using: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # backends that get new flows
    names: dict[str, str] = field(default_factory=dict)


def _view(desired: DesiredState) -> _View:
    view = _View()
    for frontend, state in desired.frontends.items():
        view.frontends[state.service][frontend] = state
        view.using[state.service].update(target.backend for target in state.targets if target.weight)
        view.names[state.service] = state.service_name
    return view


def guard(
    previous: DesiredState,
    desired: DesiredState,
    held: Mapping[Held, float],
    *,
    health: HealthView,
    now: float,
    config: Config,
) -> Guarded:
    """Put back into `desired` what should not go yet.

    Args:
        previous: what the last call returned, or what the engine was found to hold.
        desired: what compose says now.
        held: until when what is held; of the last call.
        health: a backend that is DOWN by our probes, or that its node does not reach, is never held.
        now: seconds on any monotonic clock, the same as in `held`.
        config: guard_max_removal, guard_hold.
    """
    if not held and _nothing_lost(previous, desired):
        return Guarded(desired)
    old, new = _view(previous), _view(desired)
    services = _missing_services(old, new, held, now, config)
    backends = _missing_backends(old, new, held, health=health, now=now, config=config)
    owners = _owners(desired) if services or backends else {}
    holding = {key: until for key, until in services.items() if _can_stay(key[0], old, desired, owners)}
    holding |= {key: until for key, until in backends.items() if _has_place(key, old, desired, owners)}
    result = _put_back(desired, old, holding, owners)
    names = old.names | new.names
    messages = [
        f"holding back the removal of {_what(key, names)}: "
        + (f"for {config.guard_hold:g} s, too much went at once" if until < FOREVER else "it is the service's last")
        for key, until in sorted(holding.items())
        if key not in held
    ]
    messages += [f"no longer holding back {_what(key, names)}" for key in sorted(held) if key not in holding]
    return Guarded(result, holding, tuple(messages))


def _nothing_lost(previous: DesiredState, desired: DesiredState) -> bool:
    """Whether each frontend is there still with all backends that got new flows; most are the very same object."""
    for frontend, old in previous.frontends.items():
        new = desired.frontends.get(frontend)
        if new is old:
            continue
        if new is None or new.service != old.service:
            return False
        known = {target.backend for target in new.targets}
        if any(target.weight and target.backend not in known for target in old.targets):
            return False
    return True


def _what(key: Held, names: Mapping[str, str]) -> str:
    service, backend = key
    name = names.get(service, service)
    return f"backend {backend} of service {name}" if backend else f"service {name}"


def _hold(missing: set[Held], total: int, held: Mapping[Held, float], now: float, config: Config) -> dict[Held, float]:
    """Which of the missing are held until when: those under way, and new ones where too many went at once."""
    holding = {key: held[key] for key in missing if held.get(key, now) > now and held[key] < FOREVER}
    if len(missing) > 1 and len(missing) > config.guard_max_removal * total:
        holding |= {key: now + config.guard_hold for key in missing if key not in held}
    return holding


def _missing_services(
    old: _View, new: _View, held: Mapping[Held, float], now: float, config: Config
) -> dict[Held, float]:
    in_use = {service for service, using in old.using.items() if using}
    missing = {(service, "") for service in in_use if service not in new.frontends}
    return _hold(missing, len(in_use), held, now, config)


def _missing_backends(
    old: _View, new: _View, held: Mapping[Held, float], *, health: HealthView, now: float, config: Config
) -> dict[Held, float]:
    """Backends in use that vanished although their service is still there."""
    missing: set[Held] = set()
    total = 0
    for service, using in old.using.items():
        total += len(using)
        if service in new.frontends:
            known = {t.backend for state in new.frontends[service].values() for t in state.targets}
            if any(state.passing for state in new.frontends[service].values()):
                continue  # Docker's own mesh has them
            missing |= {(service, backend) for backend in using - known if health.of(backend) not in _DEAD}
    holding = _hold(missing, total, held, now, config)
    for key in missing:
        if not new.using[key[0]]:
            holding[key] = FOREVER
    return holding


def _place(target: Target) -> Location:
    """What only one backend has at a time; on another node that is its own id."""
    return target.address, target.port, target.backend if target.via is not None else ""


def _owners(desired: DesiredState) -> dict[Location, str]:
    return {_place(target): target.backend for state in desired.frontends.values() for target in state.targets}


def _still_its_own(target: Target, owners: Mapping[Location, str]) -> bool:
    """Whether nobody else has the address of a missing backend now: flows must not reach the wrong service."""
    return owners.get(_place(target), target.backend) == target.backend


def _has_place(key: Held, old: _View, desired: DesiredState, owners: Mapping[Location, str]) -> bool:
    """Whether a missing backend can be put back: its frontend is still its service's, its address still its own."""
    service, backend = key
    places = [
        (frontend, target)
        for frontend, state in old.frontends[service].items()
        for target in state.targets
        if target.backend == backend and frontend in desired.frontends
    ]
    return all(_still_its_own(target, owners) for _, target in places) and any(
        desired.frontends[frontend].service == service for frontend, _ in places
    )


def _can_stay(service: str, old: _View, desired: DesiredState, owners: Mapping[Location, str]) -> bool:
    """Whether a missing service can be put back: some port of it is still free, and some backend on it its own."""
    return any(
        frontend not in desired.frontends and any(t.weight and _still_its_own(t, owners) for t in state.targets)
        for frontend, state in old.frontends[service].items()
    )


def _put_back(
    desired: DesiredState, old: _View, holding: Mapping[Held, float], owners: Mapping[Location, str]
) -> DesiredState:
    if not holding:
        return desired
    frontends = dict(desired.frontends)
    for service, backend in sorted(holding):
        for frontend, state in old.frontends[service].items():
            own = tuple(t for t in state.targets if backend in ("", t.backend) and _still_its_own(t, owners))
            if not backend:
                frontends.setdefault(frontend, replace(state, targets=own))
            elif frontend in frontends and frontends[frontend].service == service:
                frontends[frontend] = _with(frontends[frontend], own)
    return replace(desired, frontends=dict(sorted(frontends.items())))


def _with(state: FrontendState, targets: tuple[Target, ...]) -> FrontendState:
    return replace(state, targets=tuple(sorted((*state.targets, *targets), key=lambda t: (t.backend, t.port))))
