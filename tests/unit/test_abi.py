# SPDX-License-Identifier: Apache-2.0
"""mesh._abi against the headers of the contract: they are read here a second time, into ctypes.

Every struct, member and constant of abi.h and geneve.h has to be there, in the stub too, and to be packed as C has it.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import ipaddress
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh import _abi, netaddr
from mesh._layout import Layout

ROOT = Path(__file__).parents[2]
HEADERS = [ROOT / "bpf/include/mesh" / name for name in ("abi.h", "geneve.h")]
TEXT = re.sub(r"/\*.*?\*/", "", "\n".join(path.read_text() for path in HEADERS), flags=re.DOTALL).replace("\\\n", " ")
NUMBERS = {f"__u{8 * n}": getattr(ctypes, f"c_uint{8 * n}") for n in (1, 2, 4, 8)}
NUMBERS |= {f"__be{8 * n}": getattr(ctypes, f"c_uint{8 * n}").__ctype_be__ for n in (2, 4, 8)}
STRUCTS = {
    name: re.findall(r"(struct mesh_\w+|__\w+)\s+(\w+)(?:\[(\w+)\])?;", body)
    for name, body in re.findall(r"^struct (mesh_\w+) \{\n(.*?)^\};", TEXT, re.DOTALL | re.MULTILINE)
    if name != "mesh_addr"
}
DEFINES = {
    name: text
    for name, text in re.findall(r"^#define (MESH_\w+)[ \t]+(.+)$", TEXT, re.MULTILINE)
    if not name.endswith("_ENUM")
}
STUB = ast.parse((ROOT / "mesh/_abi.pyi").read_text())


def c_type(name: str, count: str) -> Any:
    if name == "struct mesh_addr":
        return ctypes.c_uint8 * 16
    one = c_struct(name.removeprefix("struct ")) if name.startswith("struct") else NUMBERS[name]
    return one * int(DEFINES.get(count, count).split()[0]) if count else one


@functools.cache
def c_struct(name: str) -> type[ctypes.Structure]:
    """The struct as its header has it, by ctypes."""
    fields = [(member, c_type(kind, count)) for kind, member, count in STRUCTS[name]]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def members(name: str) -> list[tuple[str, str, str]]:
    """(type, name, count) of all members but pads."""
    return [member for member in STRUCTS[name] if not re.fullmatch(r"pad\d*", member[1])]


def sample(name: str, random_: random.Random) -> tuple[Any, ctypes.Structure]:
    """A record with values of all kinds, and the same struct made by ctypes."""
    layout, struct = _abi.LAYOUTS[name], c_struct(name)()
    values: dict[str, Any] = {}
    for kind, member, count in members(name):
        field = getattr(c_struct(name), member)
        raw = random_.randbytes(field.size)
        if kind == "struct mesh_addr":
            values[member] = ipaddress.ip_address(raw[12:] if raw[0] & 1 else raw)
            raw = netaddr.pack(values[member])
        elif kind.startswith("struct") and not count:
            values[member], inner = sample(kind.removeprefix("struct "), random_)
            raw = bytes(inner)
        elif count or isinstance(getattr(layout.record(), member), bytes):
            values[member] = raw
        else:
            values[member] = int.from_bytes(raw, "big" if kind.startswith("__be") else sys.byteorder)
            setattr(struct, member, values[member])
            continue
        ctypes.memmove(ctypes.addressof(struct) + field.offset, raw, len(raw))
    return layout.record(**values), struct


def test_the_headers_are_read() -> None:
    assert len(STRUCTS) > 15
    assert ("__be16", "port", "") in STRUCTS["mesh_backend"]
    assert ("struct mesh_addr", "hairpin", "") in STRUCTS["mesh_config"]
    assert len(DEFINES) > 50


def test_every_struct_is_there() -> None:
    assert _abi.LAYOUTS.keys() == STRUCTS.keys()
    assert _abi.ADDRESS_SIZE == netaddr.SIZE == 16


@pytest.mark.parametrize("name", STRUCTS)
def test_members_lie_where_c_has_them(name: str) -> None:
    layout, struct = _abi.LAYOUTS[name], c_struct(name)
    names = [member for _, member, _ in members(name)]
    assert sorted(layout.record._fields) == sorted(names)
    assert layout.size == ctypes.sizeof(struct)
    assert layout.offsets == {member: getattr(struct, member).offset for member in names}


@pytest.mark.parametrize("name", STRUCTS)
def test_packed_as_c_has_it(name: str) -> None:
    layout, random_ = _abi.LAYOUTS[name], random.Random(name)
    pairs = [sample(name, random_) for _ in range(20)]
    records, data = [record for record, _ in pairs], b"".join(bytes(struct) for _, struct in pairs)
    assert layout.pack_rows(records) == data
    assert layout.unpack_rows(data) == records
    assert layout.pack(records[0]) == data[: layout.size]
    assert layout.unpack(data[: layout.size]) == records[0]
    assert layout.unpack_from(data, layout.size) == records[1]
    for field in layout.record._fields:
        if isinstance(getattr(records[0], field), int):
            assert layout.column(field, data) == [getattr(record, field) for record in records]


class Btf:
    """The structs of an object file as clang has laid them out, by libbpf (bpf/btf.h)."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL("libbpf.so.1")
        self._lib.btf__parse.restype = self._lib.btf__type_by_id.restype = ctypes.c_void_p
        self._lib.btf__name_by_offset.restype = ctypes.c_char_p
        self._btf = ctypes.c_void_p(self._lib.btf__parse(str(path).encode(), None))
        assert self._btf.value

    def offsets(self, name: str) -> dict[str, int] | None:
        """Offsets of a struct's members, in bytes; None: the object does not use it."""
        found = self._lib.btf__find_by_name_kind(self._btf, name.encode(), 4)  # BTF_KIND_STRUCT
        if found < 0:
            return None
        head = (ctypes.c_uint32 * 3).from_address(self._lib.btf__type_by_id(self._btf, found))
        assert not head[1] >> 31  # no bit fields
        rows = (ctypes.c_uint32 * 3 * (head[1] & 0xFFFF)).from_address(ctypes.addressof(head) + 12)
        return {self._lib.btf__name_by_offset(self._btf, row[0]).decode(): row[2] // 8 for row in rows}


def test_the_programs_have_members_where_python_has_them() -> None:
    seen = set()
    for path in (ROOT / "mesh/datapath/kernel/objects").glob("*.bpf.o"):
        btf = Btf(path)
        for name, layout in _abi.LAYOUTS.items():
            if (found := btf.offsets(name)) is not None:
                seen.add(name)
                assert {m: at for m, at in found.items() if not re.fullmatch(r"pad\d*", m)} == layout.offsets, path.name
    assert seen == _abi.LAYOUTS.keys() - {"mesh_slot", "mesh_geneve"}  # no map names them


def test_every_constant_is_there() -> None:
    known: dict[str, int] = {}
    for name, text in DEFINES.items():
        known[name] = eval(re.sub(r"\b(0x[0-9a-f]+|\d+)u\b", r"\1", text), {}, known)  # the contract's own text
    found = {f"MESH_{name}": value for name, value in vars(_abi).items() if isinstance(value, int)}
    added = {
        "MESH_ADDRESS_SIZE": 16,
        "MESH_VERDICT_COUNT": len(_abi.VERDICTS),
        "MESH_FRONTEND_TABLE_WORD": _abi.FRONTEND.offsets["table"],
        "MESH_FRONTEND_OPTIONS_WORD": min(_abi.FRONTEND.offsets["flags"], _abi.FRONTEND.offsets["acl"]),
        "MESH_BACKEND_STATE_WORD": 16,
        "MESH_ACL_KEY_RULE_BITS": 32,
    }
    assert found == known | added


def test_every_verdict_is_there() -> None:
    body = re.search(r"#define MESH_VERDICTS\(X\)(.*)", TEXT)
    assert body
    told = re.findall(r'X\((\w+),((?:\s*"[^"]*")+)\)', body[1])
    assert list(_abi.VERDICTS) == [(name, "".join(re.findall(r'"([^"]*)"', text))) for name, text in told]


def test_table_sizes() -> None:
    body = re.search(r"#define MESH_TABLE_SIZES\(X\)(.*)", TEXT)
    assert body
    assert list(_abi.TABLE_SIZES) == [int(size) for size in re.findall(r"X\((\d+)\)", body[1])]


def test_the_stub_says_the_same() -> None:
    declared = {n.target.id for n in STUB.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    records = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    public = {name for name in vars(_abi) if not name.startswith("_")}
    assert declared | records.keys() == public
    for layout in _abi.LAYOUTS.values():
        body = [n for n in records[layout.record.__name__].body if isinstance(n, ast.AnnAssign)]
        types = {ast.unparse(n.target): ast.unparse(n.annotation) for n in body}
        shown = {"IPv4Address": "Address", "IPv6Address": "Address"}
        zeros = {field: type(value).__name__ for field, value in layout.record()._asdict().items()}
        assert types == {field: shown.get(kind, kind) for field, kind in zeros.items()}
        constant = layout.name.removeprefix("mesh_").upper()
        assert getattr(_abi, constant) is layout
        assert f"{constant}: Final[Layout[{layout.record.__name__}]]" in map(ast.unparse, STUB.body)


def test_what_is_not_given_is_zero() -> None:
    assert _abi.BACKEND.pack(_abi.Backend()) == bytes(_abi.BACKEND.size)
    assert _abi.Frontend().table == _abi.Table(0, 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError, match=r"mesh_backend\.port"):
        _abi.BACKEND.pack(_abi.Backend(port=65536))
    with pytest.raises(OverflowError):
        _abi.BACKEND.pack(_abi.Backend(port=-1))
    with pytest.raises(ValueError, match=r"mesh_backend\.mac is 6 bytes, not 4"):
        _abi.BACKEND.pack(_abi.Backend(mac=b"1234"))
    with pytest.raises(TypeError, match="Backend"):
        _abi.BACKEND.pack(_abi.Note())  # type: ignore[arg-type]


def test_what_is_no_struct_is_refused() -> None:
    with pytest.raises(ValueError, match="mesh_note is 16 bytes, not 15"):
        _abi.NOTE.unpack(bytes(15))
    with pytest.raises(ValueError, match="no whole number"):
        _abi.NOTE.unpack_rows(bytes(17))
    with pytest.raises(ValueError, match="not 15"):
        _abi.NOTE.unpack_from(bytes(16), 1)
    with pytest.raises(ValueError, match="not -1"):
        _abi.NOTE.unpack_from(bytes(16), 17)
    with pytest.raises(KeyError):
        _abi.NOTE.column("nothing", bytes(16))
    with pytest.raises(TypeError, match="no number"):
        _abi.BACKEND.column("mac", bytes(64))
    with pytest.raises(IndexError):
        _abi.NOTE.column("owner", bytes(16), [1])
    with pytest.raises(TypeError):
        Layout()


def test_columns() -> None:
    replies = [_abi.Revnat(flags=flags, stamp=stamp) for stamp, flags in enumerate((0xC, 4, 0x1C, 8))]
    data = _abi.REVNAT.pack_rows(replies)
    assert _abi.REVNAT.rows_with("flags", _abi.REVNAT_FIN_IN | _abi.REVNAT_FIN_OUT, data) == [0, 2]
    assert _abi.REVNAT.column("stamp", data, [2, 0]) == [2, 0]
