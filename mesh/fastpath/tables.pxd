# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint16_t, uint32_t

from mesh._maglev cimport SlotTable, mesh_addr
from mesh.fastpath.types cimport backend, route, rules

cdef void backend_aside(backend *b, const mesh_addr *called, uint16_t port) noexcept nogil
cdef backend *backend_new(uint32_t owner, bytes address, uint16_t port, bytes tag) except NULL
cdef bint is_same_backend(const backend *one, const backend *other) noexcept nogil
cdef void route_free(route *way) noexcept nogil
cdef void rules_free(rules *lists) noexcept nogil
cdef int rules_fill(rules *lists, list allow, list deny) except -1
cdef int route_index(route *way, SlotTable table, uint32_t *index) except -1
