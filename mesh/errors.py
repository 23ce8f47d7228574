# SPDX-License-Identifier: Apache-2.0
"""Errors that a person can act on: each says what was wrong, where, and what to do about it."""

import os
import socket
import ssl


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
    """A source of the desired state does not answer, or answers nonsense; the last known state stays."""


class DatapathError(MeshError):
    """An engine could not apply a plan; the last applied state stays and the plan is retried."""


class BpfError(DatapathError):
    """A bpf(2) or libbpf call failed; the message has the call, the object and the errno's name."""

    errno: int = 0


def plain(error: BaseException) -> str:
    """What an error of a connection says, in the system's or OpenSSL's words: no class names, no objects' addresses."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    if isinstance(cause, ssl.SSLError):
        said = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or str(cause)
        return f"no TLS: {said.replace('_', ' ').lower()}"
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, socket.gaierror):
        return os.strerror(cause.errno)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
