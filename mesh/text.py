# SPDX-License-Identifier: Apache-2.0
"""Text of others on its way to a terminal, a log or JSON: label names, other nodes' words, requests.

A terminal obeys what such a text contains: sequences that clear the screen, set its title or answer in its user's name,
lines that look like the program's own, letters in another order. So whatever leaves the program passes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TextIO

_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(character: str) -> str:
    """As JSON writes it, so that JSON stays JSON."""
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return _SHORT.get(character) or "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def printable(text: str, *, keep: str = "") -> str:
    """A text with its control, format and other invisible characters, and lone surrogates, written as escapes.

    Args:
        keep: characters that stay, such as the newlines of a text of several lines.
    """
    if text.isprintable():
        return str(text)
    return "".join(each if each.isprintable() or each in keep else _escape(each) for each in text)


def printable_all(value: Any) -> Any:
    """The same for all texts in a value of JSON's types, keys included; others stay."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_all(key): printable_all(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [printable_all(each) for each in value]
    return value


class Printable:
    """A text stream on which nothing that is written steers a terminal, whatever command writes it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """See io.TextIOBase.write."""
        return self._stream.write(printable(text, keep="\n\t"))
