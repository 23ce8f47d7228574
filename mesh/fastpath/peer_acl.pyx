# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Which nodes may hand flows over here, and which backends of this node they may name."""

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from mesh.fastpath.sys cimport fp_load
from mesh.fastpath.tables cimport rules_fill, rules_free
from mesh.fastpath.types cimport PROOF_KEYS, TAG_SIZE


cdef peer_node *find_peer_node(engine *e, const mesh_addr *address) noexcept nogil:
    """The node that has an address and may hand flows over, or NULL. Valid until the next batch of events."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&e.peer_acl)
    cdef uint32_t i
    if acl is not NULL:
        for i in range(acl.node_count):
            if memcmp(&acl.nodes[i].address, address, sizeof(mesh_addr)) == 0:
                return &acl.nodes[i]
    return NULL


cdef peer_backend *local_backend(engine *e, const uint8_t *tag, uint8_t protocol) noexcept nogil:
    """The backend of this node that another node names by its tag, or NULL. Valid until the next batch of events."""
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
            return &acl.backends[middle]
        if order < 0:
            low = middle + 1
        else:
            high = middle
    return NULL


cdef void peer_acl_free(peer_acl *acl) noexcept nogil:
    cdef uint32_t i
    if acl is NULL:
        return
    for i in range(acl.count if acl.backends is not NULL else 0):
        rules_free(&acl.backends[i].rules)
    free(acl.nodes)
    free(acl.backends)
    free(acl)


cdef peer_acl *peer_acl_new(list nodes, list backends, list keys, bint require) except NULL:
    """See Engine.put_peer_acl."""
    cdef peer_acl *acl = <peer_acl *>calloc(1, sizeof(peer_acl))
    cdef bytes given
    cdef uint32_t i
    if acl is NULL:
        raise MemoryError
    acl.nodes = <peer_node *>calloc(len(nodes) + 1, sizeof(peer_node))
    acl.backends = <peer_backend *>calloc(len(backends) + 1, sizeof(peer_backend))
    if acl.nodes is NULL or acl.backends is NULL:
        peer_acl_free(acl)
        raise MemoryError
    acl.node_count = len(nodes)
    acl.count = len(backends)
    try:
        for i in range(acl.node_count):
            given, acl.nodes[i].proves, acl.nodes[i].checks = nodes[i]
            memcpy(acl.nodes[i].address.bytes, <const uint8_t *>given, 16)
        acl.require = require
        for i in range(min(len(keys), <int>PROOF_KEYS)):
            acl.keys[i].id, given = keys[i]
            if len(given) != sizeof(acl.keys[i].secret):
                raise ValueError("a key is 16 bytes")
            memcpy(acl.keys[i].secret, <const uint8_t *>given, sizeof(acl.keys[i].secret))
            acl.key_count = i + 1
        for i in range(acl.count):
            given, acl.backends[i].protocol, acl.backends[i].backend, allow, deny = backends[i]
            memcpy(acl.backends[i].tag, <const uint8_t *>given, TAG_SIZE)
            rules_fill(&acl.backends[i].rules, allow, deny)
    except BaseException:
        peer_acl_free(acl)
        raise
    return acl
