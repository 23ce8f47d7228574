# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Which backend a flow gets, and which clients are admitted. Tables are read, never changed."""

from libc.string cimport memcmp

from mesh._maglev cimport mesh_hash_again, mesh_hash_client, mesh_hash_flow, mesh_slot_of
from mesh.fastpath.address cimport is_v4
from mesh.fastpath.sys cimport fp_load
from mesh.fastpath.types cimport prefix


cdef bint within(const prefix *net, const mesh_addr *address) noexcept nogil:
    cdef uint32_t whole = net.bits >> 3
    cdef uint32_t rest = net.bits & 7
    if memcmp(net.address.bytes, address.bytes, whole) != 0:
        return False
    return rest == 0 or ((net.address.bytes[whole] ^ address.bytes[whole]) >> (8 - rest)) == 0


cdef bint is_after(const prefix *net, bint four, const mesh_addr *client) noexcept nogil:
    """Whether a prefix comes after a client's address in the order of the lists."""
    return four if net.four != four else memcmp(net.address.bytes, client.bytes, 16) > 0


cdef bint among(const prefix *nets, uint32_t count, const mesh_addr *client) noexcept nogil:
    """Whether a client is in one of these prefixes: in the last that does not come after it, or in none."""
    cdef bint four = is_v4(client)
    cdef uint32_t low = 0
    cdef uint32_t high = count
    cdef uint32_t middle
    while low < high:
        middle = (low + high) >> 1
        if is_after(&nets[middle], four, client):
            high = middle
        else:
            low = middle + 1
    return low != 0 and nets[low - 1].four == four and within(&nets[low - 1], client)


cdef bint permitted(const rules *lists, const mesh_addr *client) noexcept nogil:
    """Whether the lists admit a client. Deny wins over allow; an empty allow list admits every client."""
    if lists.denies and among(lists.deny, lists.denies, client):
        return False
    return lists.allows == 0 or among(lists.allow, lists.allows, client)


cdef uint32_t hash_of(const route *way, const mesh_flow *flow) noexcept nogil:
    return mesh_hash_client(&flow.source) if way.by_client else mesh_hash_flow(flow)


cdef bint was_tried(const uint32_t *tried, uint32_t count, uint32_t owner) noexcept nogil:
    cdef uint32_t i
    for i in range(count):
        if tried[i] == owner:
            return True
    return False


cdef uint32_t index_of(const route *way, uint32_t owner) noexcept nogil:
    """The index of an owner's target; 0: it has none here."""
    cdef uint32_t i
    for i in range(1, way.count + 1):
        if way.targets[i].backend == owner:
            return i
    return 0


cdef target *choose(engine *e, const route *way, uint32_t hash, uint32_t named, uint32_t *again, const uint32_t *tried,
                    uint32_t tries, backend **found) noexcept nogil:
    """The flow's next choice that was not tried, in the order of SlotTable.choices. NULL: none is left.

    `again` says where to continue, and is 0 for a new flow: the n of mesh_hash_again, then the steps of a walk over all
    targets. `named` is the owner that was drawn already, which comes first; 0: none was.
    """
    cdef uint32_t draws = 8 * (e.retries + 1)
    cdef uint32_t n, index
    cdef target *t
    cdef backend *b
    while again[0] < draws + way.ordered:
        n = again[0]
        again[0] += 1
        if n == 0:
            index = index_of(way, named) if named else way.slots[mesh_slot_of(hash, way.size)]
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
