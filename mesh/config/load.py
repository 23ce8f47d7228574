# SPDX-License-Identifier: Apache-2.0
"""The configuration from file < environment < flags, and the flags themselves. What cannot be used is a ConfigError."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import click

from mesh.config.keys import DEFAULT_CONFIG_FILE, FORMER, KEYS, Config
from mesh.errors import ConfigError
from mesh.model import Problem

PREFIX: Final = "MESH_"
NOT_KEYS: Final = frozenset({"MESH_CONFIG", "MESH_SANITIZE"})  # the file itself; a build option

_TYPES: Final[Mapping[str, type]] = {"str": str, "int": int, "float": float}
_KINDS: Final = {"str": "a string", "int": "a whole number", "float": "a number"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def config_options(function: _Function) -> _Function:
    """Decorate a click command with `--config` and one flag per key; values not given are None. See `load`."""
    for former in FORMER:
        function = click.option(_flag(former), former, hidden=True)(function)
    for name, key in reversed(list(KEYS.items())):
        choices = key.metadata["choices"]
        default = f"{key.default:g}" if key.type == "float" else key.default
        meaning = key.metadata["help"]
        function = click.option(
            _flag(name),
            name,
            metavar="|".join(choices) if choices else str(key.type).replace("str", "text").upper(),
            help=f"{meaning[0].upper()}{meaning[1:]}.  [default: {default if default != '' else 'none'}]",
        )(function)
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help=f"Configuration file, TOML.  [default: {DEFAULT_CONFIG_FILE}, if it exists]",
    )(function)


def load(flags: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Config:
    """The configuration: default < file < environment < flags. Call it again with the same flags to reload.

    Args:
        flags: values by key, None where not given; `config` is the file.
        environ: the environment; None: the process's own.

    Raises:
        ConfigError: a key is unknown (the message names the nearest known one), a value cannot be used, the file
            cannot be read; `where` is the file and line, the variable or the flag.
    """
    environ = os.environ if environ is None else environ
    problems: list[Problem] = []
    named = flags.get("config") or environ.get("MESH_CONFIG")
    file = Path(named) if named else DEFAULT_CONFIG_FILE
    values: dict[str, Any] = {}
    if named or file.exists():
        values |= _renamed(_read(file), str, problems)
    values |= _renamed(_of_environment(environ), _variable, problems)
    given = {name: _Given(text, _flag(name)) for name, text in flags.items() if text is not None}
    values |= _renamed({name: it for name, it in given.items() if name in KEYS or name in FORMER}, _flag, problems)
    config = Config(**values, problems=tuple(problems))
    _ = config.floating, config.managers, config.own_address  # refuses what cannot be used
    for name in ("cluster_port", "tunnel_port"):
        if 0 != getattr(config, name) == config.peer_port:
            said = f"{name} and peer_port are both {config.peer_port}"
            raise ConfigError(said, where="configuration", remedy="each needs its own, the same on all nodes")
    return config


class _Given(NamedTuple):
    """A value as it was written, and where."""

    value: Any
    where: str


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _renamed(given: Mapping[str, _Given], spell: Callable[[str], str], problems: list[Problem]) -> Mapping[str, Any]:
    """Values of one source by the present names of their keys.

    Args:
        spell: how this source writes a key.
        problems: gets one for each former name.

    Raises:
        ConfigError: a value cannot be used, or a key is given by both of its names.
    """
    values = {}
    for name, (value, where) in given.items():
        now = FORMER.get(name, name)
        if now != name:
            if now in given:
                both = f"{spell(name)} is the former name of {spell(now)}, and both are set"
                raise ConfigError(both, where=where, remedy=f"remove {spell(name)}")
            problems.append(Problem(where, f"{spell(name)} is deprecated", f"rename it to {spell(now)}"))
        values[now] = _value(now, value, where)
    return values


def _of_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    values = {}
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and variable not in NOT_KEYS:
            name = variable.removeprefix(PREFIX).lower()
            if name not in KEYS and name not in FORMER:
                near = _nearest(name)
                raise ConfigError("no such key", where=variable, remedy=near and f"did you mean {_variable(near)}?")
            values[name] = _Given(text, variable)
    return values


def _read(file: Path) -> dict[str, _Given]:
    try:
        text = file.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file), remedy="see --config") from error
    except ValueError as error:  # TOML and UTF-8; the message has the line
        raise ConfigError(str(error), where=str(file), remedy="correct the file") from error
    values = {}
    for name, value in table.items():
        match = re.search(rf"^[ \t]*\[?[\"']?{re.escape(name)}\b", text, re.MULTILINE)
        where = f"{file}:{text.count(chr(10), 0, match.start()) + 1}" if match else str(file)
        key = KEYS.get(FORMER.get(name, name))
        if key is None:
            near = _nearest(name)
            remedy = (
                "keys stand at the top, not in tables" if isinstance(value, dict) else near and f"did you mean {near}?"
            )
            raise ConfigError(f"no such key: {name}", where=where, remedy=remedy)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigError(f"{name} must be {_KINDS[str(key.type)]}", where=where)
        if isinstance(value, str) != (key.type == "str"):
            raise ConfigError(f"{name} must be {_KINDS[str(key.type)]}, not {value!r}", where=where)
        values[name] = _Given(value, where)
    return values


def _nearest(name: str) -> str:
    return next(iter(difflib.get_close_matches(name, KEYS, 1, 0.5)), "")


def _value(name: str, given: Any, where: str) -> Any:
    """The value of a key in the key's type, within its bounds."""
    key = KEYS[name]
    kind = str(key.type)
    choices, most = key.metadata["choices"], key.metadata["most"]
    try:
        if kind == "int" and isinstance(given, float) and not given.is_integer():
            raise ValueError
        value = _TYPES[kind](given)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name} must be {_KINDS[kind]}, not {given!r}", where=where) from error
    if choices and value not in choices:
        raise ConfigError(f"{name} is {given!r}, which is none of {', '.join(choices)}", where=where)
    most = 10**9 if most is None else most
    if kind != "str" and not 0 <= value <= most:
        raise ConfigError(f"{name} must be between 0 and {most}, not {given!r}", where=where)
    return value
