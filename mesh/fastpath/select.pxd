# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Which backend a flow gets, who may call at all, and how addresses are written. Tables are read, never changed."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from mesh._maglev cimport mesh_addr, mesh_flow, mesh_hash_again, mesh_hash_client, mesh_hash_flow, mesh_slot_of
from mesh.fastpath.sys cimport (
    AF_INET, AF_INET6, EACCES, ECONNREFUSED, ECONNRESET, EHOSTDOWN, EHOSTUNREACH, EMFILE, ENETDOWN, ENETUNREACH,
    ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, EPERM, EPIPE, ETIMEDOUT, fp_load, sockaddr, sockaddr_in, sockaddr_in6)
from mesh.fastpath.types cimport (
    BACKENDS, FAIL_LIMIT, FAIL_OTHER, FAIL_REFUSED, FAIL_RESET, FAIL_TIMEOUT, FAIL_UNREACHABLE, TRIES_MOST, backend,
    engine, frontend, prefix, route, target)


cdef inline void map_v4(mesh_addr *address, const void *four) noexcept nogil:
    memset(address.bytes, 0, 10)
    address.bytes[10] = address.bytes[11] = 0xff
    memcpy(&address.bytes[12], four, 4)


cdef inline bint is_v4(const mesh_addr *address) noexcept nogil:
    cdef uint8_t head[12]
    memset(head, 0, 10)
    head[10] = head[11] = 0xff
    return memcmp(address.bytes, head, 12) == 0


cdef inline void from_sockaddr(const sockaddr_in6 *name, mesh_addr *address, uint16_t *port) noexcept nogil:
    """The address (IPv4 mapped) and port, network order, of a socket address of either family."""
    cdef sockaddr_in four
    if name.sin6_family == AF_INET:
        memcpy(&four, name, sizeof(four))
        map_v4(address, &four.sin_addr)
        port[0] = four.sin_port
    else:
        memcpy(address.bytes, &name.sin6_addr, 16)
        port[0] = name.sin6_port


cdef inline bint within(const prefix *net, const mesh_addr *address) noexcept nogil:
    cdef uint32_t whole = net.bits >> 3
    cdef uint32_t rest = net.bits & 7
    if memcmp(net.address.bytes, address.bytes, whole) != 0:
        return False
    return rest == 0 or ((net.address.bytes[whole] ^ address.bytes[whole]) >> (8 - rest)) == 0


cdef inline bint permitted(const route *way, const mesh_addr *client) noexcept nogil:
    """Deny wins over allow; an empty allow list admits everybody."""
    cdef uint32_t i
    for i in range(way.denies):
        if within(&way.deny[i], client):
            return False
    if way.allows == 0:
        return True
    for i in range(way.allows):
        if within(&way.allow[i], client):
            return True
    return False


cdef inline uint32_t hash_of(const route *way, const mesh_flow *flow) noexcept nogil:
    return mesh_hash_client(&flow.source) if way.by_client else mesh_hash_flow(flow)


cdef inline bint was_tried(const uint32_t *tried, uint32_t count, uint32_t owner) noexcept nogil:
    cdef uint32_t i
    for i in range(count):
        if tried[i] == owner:
            return True
    return False


cdef inline target *choose(engine *e, const route *way, uint32_t hash, uint32_t *again, const uint32_t *tried,
                           uint32_t tries, backend **found) noexcept nogil:
    """The flow's next choice that was not tried, as SlotTable.choices has them: `again`, 0 at first, is where to go on:
    the n of mesh_hash_again, and after the draws the steps of the walk over all targets.

    Returns NULL when nobody is left.
    """
    cdef uint32_t draws = 8 * (e.retries + 1)
    cdef uint32_t n, index
    cdef target *t
    cdef backend *b
    while again[0] < draws + way.ordered:
        n = again[0]
        again[0] += 1
        if n == 0:
            index = way.slots[mesh_slot_of(hash, way.size)]
        elif n < draws:
            index = way.slots[mesh_slot_of(mesh_hash_again(hash, n), way.size)]
        else:
            index = way.order[(mesh_slot_of(hash, way.ordered) + n - draws) % way.ordered]
        if index == 0:
            continue
        t = &way.targets[index]
        if was_tried(tried, tries, t.backend):
            continue
        b = <backend *>fp_load(&e.backends[t.backend])
        if b is NULL:
            continue
        found[0] = b
        return t
    return NULL


cdef inline int cause_of(int error) noexcept nogil:
    """The Failure that an errno of a connecting or established socket stands for."""
    if error == ECONNREFUSED:
        return FAIL_REFUSED
    if error == ETIMEDOUT:
        return FAIL_TIMEOUT
    if error == ECONNRESET or error == EPIPE:
        return FAIL_RESET
    if error == EHOSTUNREACH or error == ENETUNREACH or error == ENETDOWN or error == EHOSTDOWN:
        return FAIL_UNREACHABLE
    if error == EACCES or error == EPERM:
        return FAIL_UNREACHABLE
    if is_scarce(error) or error == EADDRNOTAVAIL:
        return FAIL_LIMIT
    return FAIL_OTHER


cdef inline bint is_scarce(int error) noexcept nogil:
    return error == EMFILE or error == ENFILE or error == ENOBUFS or error == ENOMEM
