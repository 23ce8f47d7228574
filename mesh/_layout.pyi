# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

_Record = TypeVar("_Record", bound=NamedTuple)
_Bytes = bytes | bytearray | memoryview

class Layout(Generic[_Record]):
    """How one C struct lies in memory, by the names of its members.

    A record is a named tuple with the members of the struct, in its order, without the pads. What is not given is zero,
    as in C. A number is an int whatever its byte order in the struct, an address is an ipaddress object, a member that
    is a struct is its record, and other arrays (a MAC, a seed) are bytes as they are.

    Attributes:
        record: the class of the records.
        name: of the struct in C.
        size: in bytes.
        offsets: of the members, in bytes, for stores into a mapped array and for reading a prefix.
    """

    @property
    def record(self) -> type[_Record]: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def offsets(self) -> Mapping[str, int]: ...
    def pack(self, value: _Record) -> bytes:
        """The struct's bytes, pads zeroed.

        Raises:
            OverflowError: a number does not fit its member.
            ValueError: bytes are not as long as their member.
        """

    def pack_rows(self, values: Iterable[_Record]) -> bytes:
        """An array of structs as bytes. Errors as in `pack`."""

    def unpack(self, data: _Bytes) -> _Record:
        """The record of a struct's bytes.

        Raises:
            ValueError: `data` is not just the struct.
        """

    def unpack_from(self, data: _Bytes, offset: int = 0) -> _Record:
        """The record of the struct that begins at `offset`; what follows it is left alone.

        Raises:
            ValueError: `data` ends before the struct does.
        """

    def unpack_rows(self, data: _Bytes) -> list[_Record]:
        """The records of an array of structs.

        Raises:
            ValueError: `data` is no whole number of structs.
        """

    def load(self, field: str, data: _Bytes, offset: int = 0) -> int:
        """One number of the struct that begins at `offset`. `data` has to reach to this member only.

        Raises:
            KeyError: there is no such member.
            ValueError: `data` ends before it does.
        """

    def column(self, field: str, data: _Bytes, rows: Iterable[int] | None = None) -> list[int]:
        """One number of every struct of an array, or of those in `rows`, in their order. No records are made.

        Raises:
            KeyError: there is no such member.
            IndexError: there is no such row.
        """

    def rows_with(self, field: str, bits: int, data: _Bytes) -> list[int]:
        """The rows of an array of structs in which a number has all of `bits` set."""
