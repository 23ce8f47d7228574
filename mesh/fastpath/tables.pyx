# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The immutable tables that threads read, made from Python objects: backends, routes, prefixes."""

from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from mesh._maglev cimport mesh_addr
from mesh.fastpath.address cimport is_v4
from mesh.fastpath.sys cimport AF_INET, AF_INET6, sockaddr_in, sockaddr_in6
from mesh.fastpath.types cimport BACKENDS, TAG_SIZE, prefix


cdef void backend_aside(backend *b, const mesh_addr *called, uint16_t port) noexcept nogil:
    """Make `b` lead to a port (network order) of this node as clients call it."""
    cdef sockaddr_in four
    memset(b, 0, sizeof(backend))
    if is_v4(called):
        memset(&four, 0, sizeof(four))
        four.sin_family = AF_INET
        four.sin_port = port
        memcpy(&four.sin_addr, &called.bytes[12], 4)
        memcpy(&b.address, &four, sizeof(four))
        b.length = sizeof(four)
    else:
        b.address.sin6_family = AF_INET6
        b.address.sin6_port = port
        memcpy(&b.address.sin6_addr, called.bytes, 16)
        b.length = sizeof(sockaddr_in6)


cdef backend *backend_new(uint32_t owner, bytes address, uint16_t port, bytes tag) except NULL:
    """`address`: 16 bytes. `tag`: TAG_SIZE bytes for a backend of another node, else None."""
    cdef backend *b = <backend *>calloc(1, sizeof(backend))
    cdef sockaddr_in four
    cdef mesh_addr mapped
    cdef uint8_t wire[2]
    if b is NULL:
        raise MemoryError
    wire[0] = port >> 8
    wire[1] = port & 0xff
    memcpy(mapped.bytes, <const uint8_t *>address, 16)
    b.id = owner
    b.fast_connect = 1
    if tag is not None:
        b.remote = 1
        memcpy(b.tag, <const uint8_t *>tag, TAG_SIZE)
    if is_v4(&mapped):
        memset(&four, 0, sizeof(four))
        four.sin_family = AF_INET
        memcpy(&four.sin_port, wire, 2)
        memcpy(&four.sin_addr, &mapped.bytes[12], 4)
        memcpy(&b.address, &four, sizeof(four))
        b.length = sizeof(four)
    else:
        b.address.sin6_family = AF_INET6
        memcpy(&b.address.sin6_port, wire, 2)
        memcpy(&b.address.sin6_addr, mapped.bytes, 16)
        b.length = sizeof(sockaddr_in6)
    return b


cdef bint is_same_backend(const backend *one, const backend *other) noexcept nogil:
    """Whether both lead to the same socket address and tag."""
    return (one.length == other.length and memcmp(&one.address, &other.address, sizeof(one.address)) == 0
            and one.remote == other.remote and memcmp(one.tag, other.tag, TAG_SIZE) == 0)


cdef void rules_free(rules *lists) noexcept nogil:
    free(lists.allow)
    free(lists.deny)


cdef void route_free(route *way) noexcept nogil:
    if way is NULL:
        return
    free(way.slots)
    free(way.targets)
    free(way.order)
    rules_free(&way.rules)
    free(way)


cdef prefix *prefixes_new(list nets, uint32_t *count) except? NULL:
    """Networks as (16 bytes, prefix length of 128), in the order of mesh.rules.merged."""
    cdef prefix *out
    cdef bytes address
    cdef uint32_t i
    count[0] = len(nets)
    if not nets:
        return NULL
    out = <prefix *>calloc(len(nets), sizeof(prefix))
    if out is NULL:
        raise MemoryError
    for i in range(count[0]):
        address, bits = nets[i]
        memcpy(out[i].address.bytes, <const uint8_t *>address, 16)
        out[i].bits = bits
        out[i].four = bits >= 96 and is_v4(&out[i].address)
    return out


cdef int rules_fill(rules *lists, list allow, list deny) except -1:
    """Both lists as `prefixes_new` takes them, into zeroed rules."""
    lists.allow = prefixes_new(allow, &lists.allows)
    lists.deny = prefixes_new(deny, &lists.denies)
    return 0


cdef int route_index(route *way, SlotTable table, uint32_t *index) except -1:
    """Slots as indices into the targets, so that a look-up touches four bytes a slot and owners may be renumbered."""
    cdef uint32_t i, owner, at
    cdef uint8_t *met = <uint8_t *>calloc(way.count + 1, 1)
    way.size = table.size
    way.slots = <uint32_t *>malloc(table.size * sizeof(uint32_t))
    way.order = <uint32_t *>malloc((way.count + 1) * sizeof(uint32_t))
    if met is NULL or way.slots is NULL or way.order is NULL:
        free(met)
        raise MemoryError
    met[0] = 1
    with nogil:
        for i in range(table.size):
            owner = table.slots[i].current
            at = index[owner] if owner < BACKENDS else 0
            way.slots[i] = at
            if not met[at]:
                met[at] = 1
                way.order[way.ordered] = at
                way.ordered += 1
    free(met)
    return 0
