# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint32_t

from mesh._maglev cimport mesh_addr, mesh_flow
from mesh.fastpath.types cimport backend, engine, route, rules, target

cdef bint permitted(const rules *lists, const mesh_addr *client) noexcept nogil
cdef uint32_t hash_of(const route *way, const mesh_flow *flow) noexcept nogil
cdef target *choose(engine *e, const route *way, uint32_t hash, uint32_t named, uint32_t *again, const uint32_t *tried,
                    uint32_t tries, backend **found) noexcept nogil
