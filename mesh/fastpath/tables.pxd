# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The immutable tables that threads read, made from what Python gives: backends, routes, who may hand flows over."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from mesh._maglev cimport SlotTable, mesh_addr
from mesh.fastpath.select cimport is_v4
from mesh.fastpath.sys cimport AF_INET, AF_INET6, sockaddr_in, sockaddr_in6
from mesh.fastpath.types cimport BACKENDS, TAG, backend, doors, place, prefix, route


cdef inline backend *backend_new(uint32_t owner, bytes address, uint16_t port, bytes tag) except NULL:
    """`address`: 16 bytes. `tag`: TAG bytes where it is on another node, or None."""
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
    b.near = 1
    if tag is not None:
        b.away = 1
        memcpy(b.tag, <const uint8_t *>tag, TAG)
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


cdef inline bint is_same_place(const backend *one, const backend *other) noexcept nogil:
    """Whether connections to the one are connections to the other."""
    return (one.length == other.length and memcmp(&one.address, &other.address, sizeof(one.address)) == 0
            and one.away == other.away and memcmp(one.tag, other.tag, TAG) == 0)


cdef inline void route_free(route *way) noexcept nogil:
    if way is NULL:
        return
    free(way.slots)
    free(way.targets)
    free(way.order)
    free(way.allow)
    free(way.deny)
    free(way)


cdef inline void doors_free(doors *d) noexcept nogil:
    if d is NULL:
        return
    free(d.nodes)
    free(d.places)
    free(d)


cdef inline doors *doors_new(list nodes, list places) except NULL:
    """Nodes as 16 bytes; places as (tag, protocol, owner), sorted."""
    cdef doors *d = <doors *>calloc(1, sizeof(doors))
    cdef bytes given
    cdef uint32_t i
    if d is NULL:
        raise MemoryError
    d.nodes = <mesh_addr *>calloc(len(nodes) + 1, sizeof(mesh_addr))
    d.places = <place *>calloc(len(places) + 1, sizeof(place))
    if d.nodes is NULL or d.places is NULL:
        doors_free(d)
        raise MemoryError
    d.node_count = len(nodes)
    d.count = len(places)
    for i in range(d.node_count):
        given = nodes[i]
        memcpy(d.nodes[i].bytes, <const uint8_t *>given, 16)
    for i in range(d.count):
        given, d.places[i].protocol, d.places[i].backend = places[i]
        memcpy(d.places[i].tag, <const uint8_t *>given, TAG)
    return d


cdef inline prefix *prefixes_new(list nets, uint32_t *count) except? NULL:
    """Networks as (16 bytes, prefix length of 128)."""
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
    return out


cdef inline int route_index(route *way, SlotTable table, uint32_t *index) except -1:
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
