# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Which nodes may hand flows over here, and which backends of this node they may name."""

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from mesh.fastpath.sys cimport fp_load
from mesh.fastpath.types cimport TAG_SIZE, peer_backend


cdef bint is_peer_node(engine *e, const mesh_addr *address) noexcept nogil:
    """Whether the address is of a node that may hand flows over."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&e.peer_acl)
    cdef uint32_t i
    if acl is not NULL:
        for i in range(acl.node_count):
            if memcmp(&acl.nodes[i], address, sizeof(mesh_addr)) == 0:
                return True
    return False


cdef backend *local_backend(engine *e, const uint8_t *tag, uint8_t protocol) noexcept nogil:
    """The backend of this node that another node names by its tag, or NULL."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&e.peer_acl)
    cdef uint32_t low = 0
    cdef uint32_t high, middle
    cdef int order
    if acl is NULL:
        return NULL
    high = acl.count
    while low < high:
        middle = (low + high) >> 1
        order = memcmp(acl.backends[middle].tag, tag, TAG_SIZE)
        if order == 0:
            order = <int>acl.backends[middle].protocol - protocol
        if order == 0:
            return <backend *>fp_load(&e.backends[acl.backends[middle].backend])
        if order < 0:
            low = middle + 1
        else:
            high = middle
    return NULL


cdef void peer_acl_free(peer_acl *acl) noexcept nogil:
    if acl is NULL:
        return
    free(acl.nodes)
    free(acl.backends)
    free(acl)


cdef peer_acl *peer_acl_new(list nodes, list backends) except NULL:
    """Nodes are 16 bytes each; backends are (tag, protocol, owner), sorted."""
    cdef peer_acl *acl = <peer_acl *>calloc(1, sizeof(peer_acl))
    cdef bytes given
    cdef uint32_t i
    if acl is NULL:
        raise MemoryError
    acl.nodes = <mesh_addr *>calloc(len(nodes) + 1, sizeof(mesh_addr))
    acl.backends = <peer_backend *>calloc(len(backends) + 1, sizeof(peer_backend))
    if acl.nodes is NULL or acl.backends is NULL:
        peer_acl_free(acl)
        raise MemoryError
    acl.node_count = len(nodes)
    acl.count = len(backends)
    for i in range(acl.node_count):
        given = nodes[i]
        memcpy(acl.nodes[i].bytes, <const uint8_t *>given, 16)
    for i in range(acl.count):
        given, acl.backends[i].protocol, acl.backends[i].backend = backends[i]
        memcpy(acl.backends[i].tag, <const uint8_t *>given, TAG_SIZE)
    return acl
