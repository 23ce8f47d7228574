# SPDX-License-Identifier: Apache-2.0
"""Errors that a person can act on: each says what was wrong, where, and what to do about it."""


class MeshError(Exception):
    """Base of all errors this package raises on purpose.

    Args:
        message: what is wrong, in one sentence.
        where: the place: a file and line, a label, a socket, a JSON path.
        remedy: what the reader can do about it.
    """

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.remedy})" if self.remedy else text


class ConfigError(MeshError):
    """A configuration file, environment variable or flag cannot be used."""


class ProviderError(MeshError):
    """A source of the desired state is away, or answered what cannot be used; the last good state serves on."""


class DatapathError(MeshError):
    """An engine could not carry out a plan; what was applied before serves on and the plan is retried."""


class BpfError(DatapathError):
    """A bpf(2) or libbpf call failed; the message has the call, the object and the errno's name."""

    errno: int = 0
