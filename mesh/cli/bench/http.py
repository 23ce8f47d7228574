# SPDX-License-Identifier: Apache-2.0
"""As much of HTTP/1.1 as measuring needs (RFC 9112): when an answer is whole, its status, and who gave it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MAX_HEAD: Final = 65536  # bytes
MAX_LINE: Final = 80  # characters kept of what tells backends apart
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: |$)")


def request(host: str, path: str, headers: Sequence[str], *, keep: bool) -> bytes:
    """A GET, as bytes. `headers` are whole lines and win over ours."""
    named = {line.partition(":")[0].strip().lower() for line in headers}
    lines = [f"GET {path or '/'} HTTP/1.1", *headers]
    ours = {"Host": host, "User-Agent": "mesh-bench", "Accept": "*/*", "Connection": "keep-alive" if keep else "close"}
    lines += [f"{name}: {value}" for name, value in ours.items() if name.lower() not in named]
    return "\r\n".join([*lines, "", ""]).encode()


class HttpAnswer:
    """One answer to a GET, fed as it arrives.

    Args:
        by: what `told` is to be: the value of this header, or for `body` the first line of the content.
    """

    def __init__(self, by: str = "") -> None:
        self.status = 0
        self.told = ""
        self.closing = False  # the other end closes the connection after this
        self._by = by.lower()
        self._buffer = b""
        self._head = True
        self._left: int | None = None  # bytes of content still to come; None: until the connection ends
        self._chunked = False

    def feed(self, data: bytes) -> bool:
        """Take bytes; whether the answer is whole now.

        Raises:
            ValueError: this is not HTTP/1.
        """
        self._buffer += data
        while self._head:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD or not b"HTTP/1."[: len(self._buffer)] == self._buffer[:7]:
                    raise ValueError("no HTTP head")
                return False
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._parse(head)
        if self._by == "body" and not self.told and not self._chunked:
            self.told = self._buffer.partition(b"\n")[0][:MAX_LINE].decode("latin-1").strip()
        if self._chunked:
            return self._chunks()
        if self._left is None:
            self._buffer = b""
            return False
        self._left -= len(self._buffer)
        self._buffer = b""
        return self._left <= 0

    def end(self) -> bool:
        """The connection has ended; whether the answer is whole by that."""
        return not self._head and not self._chunked and self._left is None

    def _parse(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        found = _STATUS.match(first)
        if not found:
            raise ValueError("no HTTP status")
        self.status = int(found[2])
        if 100 <= self.status < 200 and self.status != 101:
            return  # another head follows
        fields = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.strip().lower().decode("latin-1")] = value.strip().decode("latin-1")
        connection = fields.get("connection", "" if found[1] == b"1" else "close").lower()
        self.closing = "close" in connection
        self._head = False
        self._chunked = "chunked" in fields.get("transfer-encoding", "").lower()
        if self.status in (204, 304):
            self._left, self._chunked = 0, False
        elif not self._chunked and "content-length" in fields:
            self._left = int(fields["content-length"])
        if self._by and self._by != "body":
            self.told = fields.get(self._by, "")[:MAX_LINE]

    def _chunks(self) -> bool:
        """Take whole chunks off the buffer; whether the last one and its trailers have been seen."""
        while True:
            line, separator, rest = self._buffer.partition(b"\r\n")
            if not separator:
                return False
            size = int(line.partition(b";")[0], 16)
            if not size:
                return rest.startswith(b"\r\n") or b"\r\n\r\n" in rest
            if len(rest) < size + 2:
                return False
            if self._by == "body" and not self.told:
                self.told = rest[:size].partition(b"\n")[0][:MAX_LINE].decode("latin-1").strip()
            self._buffer = rest[size + 2 :]
