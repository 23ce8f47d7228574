# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False
"""C structs as Python records: every member is stored and loaded by its name, at the place that the compiler gives it.

Descriptions are C tables (mesh/_layout.h). `mesh._abi` has those of the contract, `mesh._linux` those of the kernel's
own interfaces.
"""

from collections import namedtuple
from types import MappingProxyType

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_New, PyTuple_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy, memset

from mesh import netaddr

cdef object pack_address = netaddr.pack
cdef object unpack_address = netaddr.unpack
cdef object new_tuple = tuple.__new__


cdef class Layout:
    """How one C struct lies in memory; see _layout.pyi."""

    def __init__(self):
        raise TypeError("a Layout is the description of a C struct: there is no other way to make one")

    cdef const mesh_member *member(self, str field) except NULL:
        cdef size_t i
        cdef bytes name = field.encode()
        for i in range(self.c.count):
            if name == <bytes>self.c.members[i].name:
                return &self.c.members[i]
        raise KeyError(f"{self.name}.{field}")

    cdef int put(self, char *base, object value) except -1:
        """Store all members; the pads are the caller's."""
        cdef const mesh_member *m
        cdef size_t i
        cdef object item
        cdef bytes raw
        cdef uint64_t number
        if type(value) is not self.record:
            raise TypeError(f"{self.name} is packed from {self.record.__name__}, not {type(value).__name__}")
        for i in range(self.c.count):
            m = &self.c.members[i]
            item = <object>PyTuple_GET_ITEM(value, i)
            if m.kind == MESH_MEMBER_STRUCT:
                (<Layout>self.inner[i]).put(base + m.offset, item)
            elif m.kind == MESH_MEMBER_RAW or m.kind == MESH_MEMBER_ADDRESS:
                raw = pack_address(item) if m.kind == MESH_MEMBER_ADDRESS else bytes(item)
                if <size_t>len(raw) != m.size:
                    raise ValueError(f"{self.name}.{m.name.decode()} is {m.size} bytes, not {len(raw)}")
                memcpy(base + m.offset, PyBytes_AS_STRING(raw), m.size)
            else:
                number = <uint64_t><int64_t>item if m.is_signed else <uint64_t>item
                if not mesh_member_fits(m, number):
                    raise OverflowError(f"{self.name}.{m.name.decode()} is {m.size} bytes: {item} does not fit")
                mesh_member_store(m, base, number)
        return 0

    cdef object take(self, const char *base):
        """Load all members, as a record."""
        cdef const mesh_member *m
        cdef size_t i
        cdef tuple found = PyTuple_New(self.c.count)
        cdef object item
        for i in range(self.c.count):
            m = &self.c.members[i]
            if m.kind == MESH_MEMBER_STRUCT:
                item = (<Layout>self.inner[i]).take(base + m.offset)
            elif m.kind == MESH_MEMBER_RAW:
                item = PyBytes_FromStringAndSize(base + m.offset, m.size)
            elif m.kind == MESH_MEMBER_ADDRESS:
                item = unpack_address(PyBytes_FromStringAndSize(base + m.offset, m.size))
            else:
                item = number_of(m, base)
            Py_INCREF(item)
            PyTuple_SET_ITEM(found, i, item)
        return new_tuple(self.record, found)

    def pack(self, value not None):
        """The struct's bytes, pads zeroed."""
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.size)
        cdef char *base = PyBytes_AS_STRING(out)
        memset(base, 0, self.size)
        self.put(base, value)
        return out

    def pack_rows(self, values not None):
        """An array of structs as bytes."""
        cdef list rows = list(values)
        cdef size_t i, count = len(rows)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, count * self.size)
        cdef char *base = PyBytes_AS_STRING(out)
        memset(base, 0, count * self.size)
        for i in range(count):
            self.put(base + i * self.size, rows[i])
        return out

    def unpack(self, data not None):
        """The record of a struct's bytes."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <size_t>view.len != self.size:
                raise ValueError(f"{self.name} is {self.size} bytes, not {view.len}")
            return self.take(<const char *>view.buf)
        finally:
            PyBuffer_Release(&view)

    def unpack_from(self, data not None, size_t offset=0):
        """The record of the struct that begins at `offset`; what follows it is left alone."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if offset > <size_t>view.len or <size_t>view.len - offset < self.size:
                raise ValueError(f"{self.name} is {self.size} bytes, not {view.len - <Py_ssize_t>offset}")
            return self.take(<const char *>view.buf + offset)
        finally:
            PyBuffer_Release(&view)

    def unpack_rows(self, data not None):
        """The records of an array of structs."""
        cdef Py_buffer view
        cdef size_t i
        cdef list found = []
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.whole(view.len)
            for i in range(view.len // self.size):
                found.append(self.take(<const char *>view.buf + i * self.size))
        finally:
            PyBuffer_Release(&view)
        return found

    cdef int whole(self, Py_ssize_t length) except -1:
        if length % <Py_ssize_t>self.size:
            raise ValueError(f"{length} bytes are no whole number of {self.name}, which is {self.size}")
        return 0

    def load(self, str field not None, data not None, size_t offset=0):
        """One number of the struct that begins at `offset`; `data` has to reach to this member only."""
        cdef const mesh_member *m = self.number_member(field)
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if offset > <size_t>view.len or <size_t>view.len - offset < m.offset + m.size:
                raise ValueError(f"{view.len} bytes end before {self.name}.{field}")
            return number_of(m, <const char *>view.buf + offset)
        finally:
            PyBuffer_Release(&view)

    def column(self, str field not None, data not None, rows=None):
        """One number of every struct of an array, or of those in `rows`."""
        cdef const mesh_member *m = self.number_member(field)
        cdef Py_buffer view
        cdef size_t i, count
        cdef list found = []
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.whole(view.len)
            count = view.len // self.size
            for row in (range(count) if rows is None else rows):
                i = row
                if i >= count:
                    raise IndexError(f"row {i} of {count}")
                found.append(number_of(m, <const char *>view.buf + i * self.size))
        finally:
            PyBuffer_Release(&view)
        return found

    def rows_with(self, str field not None, uint64_t bits, data not None):
        """The rows of an array of structs in which a number has all of `bits` set."""
        cdef const mesh_member *m = self.number_member(field)
        cdef Py_buffer view
        cdef size_t i
        cdef list found = []
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.whole(view.len)
            for i in range(view.len // self.size):
                if mesh_member_load(m, <const char *>view.buf + i * self.size) & bits == bits:
                    found.append(i)
        finally:
            PyBuffer_Release(&view)
        return found

    cdef const mesh_member *number_member(self, str field) except NULL:
        cdef const mesh_member *m = self.member(field)
        if m.kind != MESH_MEMBER_HOST and m.kind != MESH_MEMBER_NETWORK:
            raise TypeError(f"{self.name}.{field} is no number")
        return m


cdef inline object number_of(const mesh_member *m, const char *base):
    cdef uint64_t number = mesh_member_load(m, base)
    return <int64_t>number if m.is_signed else number


cdef object zero(const mesh_member *m, Layout inner):
    """What a member is that is not given, as in C."""
    if m.kind == MESH_MEMBER_STRUCT:
        return inner.record()
    if m.kind == MESH_MEMBER_RAW:
        return bytes(m.size)
    return unpack_address(bytes(m.size)) if m.kind == MESH_MEMBER_ADDRESS else 0


cdef dict layouts(const mesh_layout *table, str module):
    """The Layouts of a table that ends with a NULL, by the struct's name."""
    cdef dict found = {}
    cdef Layout layout
    cdef list names, inner
    cdef size_t i
    while table.name is not NULL:
        layout = Layout.__new__(Layout)
        layout.c, layout.name, layout.size = table, table.name.decode(), table.size
        names = [table.members[i].name.decode() for i in range(table.count)]
        inner = [
            found[table.members[i].type.decode()] if table.members[i].kind == MESH_MEMBER_STRUCT else None
            for i in range(table.count)
        ]
        layout.inner = tuple(inner)
        layout.offsets = MappingProxyType({names[i]: table.members[i].offset for i in range(table.count)})
        defaults = [zero(&table.members[i], inner[i]) for i in range(table.count)]
        layout.record = namedtuple(table.record.decode(), names, defaults=defaults, module=module)
        found[layout.name] = layout
        table += 1
    return found


cdef dict constants(const mesh_constant *table):
    """The constants of a table that ends with a NULL, by name."""
    cdef dict found = {}
    while table.name is not NULL:
        found[table.name.decode()] = table.value
        table += 1
    return found
