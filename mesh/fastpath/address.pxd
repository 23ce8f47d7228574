# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint16_t, uint32_t

from mesh._maglev cimport mesh_addr
from mesh.fastpath.sys cimport sockaddr_in6

cdef void map_v4(mesh_addr *address, const void *four) noexcept nogil
cdef bint is_v4(const mesh_addr *address) noexcept nogil
cdef void from_sockaddr(const sockaddr_in6 *name, mesh_addr *address, uint16_t *port) noexcept nogil
cdef uint32_t named_owner(const mesh_addr *source, const mesh_addr *called) noexcept nogil
cdef bint is_own_call(const mesh_addr *client) noexcept nogil
