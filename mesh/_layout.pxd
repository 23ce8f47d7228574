# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""C structs for Python, described member by member: mesh/_layout.h."""

from libc.stdint cimport int64_t, uint64_t


cdef extern from "mesh/_layout.h" nogil:
    enum mesh_member_kind:
        MESH_MEMBER_HOST
        MESH_MEMBER_NETWORK
        MESH_MEMBER_RAW
        MESH_MEMBER_ADDRESS
        MESH_MEMBER_STRUCT

    struct mesh_member:
        const char *name
        size_t offset
        size_t size
        mesh_member_kind kind
        bint is_signed
        const char *type

    struct mesh_layout:
        const char *record
        const char *name
        size_t size
        const mesh_member *members
        size_t count

    struct mesh_constant:
        const char *name
        uint64_t value

    void mesh_member_store(const mesh_member *m, char *base, uint64_t value)
    uint64_t mesh_member_load(const mesh_member *m, const char *base)
    bint mesh_member_fits(const mesh_member *m, uint64_t value)


cdef class Layout:
    cdef const mesh_layout *c
    cdef tuple inner  # per member: the Layout of a struct, else None
    cdef readonly object record
    cdef readonly str name
    cdef readonly size_t size
    cdef readonly object offsets
    cdef const mesh_member *member(self, str field) except NULL
    cdef const mesh_member *number_member(self, str field) except NULL
    cdef int whole(self, Py_ssize_t length) except -1
    cdef int put(self, char *base, object value) except -1
    cdef object take(self, const char *base)


cdef dict layouts(const mesh_layout *table, str module)
cdef dict constants(const mesh_constant *table)
