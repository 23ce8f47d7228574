# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint8_t

from mesh._maglev cimport mesh_addr
from mesh.fastpath.types cimport engine, peer_acl, peer_backend, peer_node

cdef peer_node *find_peer_node(engine *e, const mesh_addr *address) noexcept nogil
cdef peer_backend *local_backend(engine *e, const uint8_t *tag, uint8_t protocol) noexcept nogil
cdef void peer_acl_free(peer_acl *acl) noexcept nogil
cdef peer_acl *peer_acl_new(list nodes, list backends, list keys, bint require) except NULL
