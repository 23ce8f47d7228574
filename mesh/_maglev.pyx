# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Flow hash, Maglev tables and slot transitions. Links nothing, needs no root.

Sources: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4 (table);
weights as in Envoy's maglev_lb.cc (a backend takes a turn once its share of the rounds allows it). The transition is
this project's own: docs/HASHING.md.
"""

import hashlib

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from mesh._abi import ABI_DIGEST, TABLE_SIZES

cdef extern from "endian.h" nogil:
    uint16_t htobe16(uint16_t value)

cdef extern from *:
    const char *MESH_ABI_DIGEST

if MESH_ABI_DIGEST.decode() != ABI_DIGEST:
    raise ImportError("mesh._maglev and mesh._abi are of different builds: build the package again")

cdef enum:
    INTERIM = 3  # owners remembered per slot besides current and previous
    NEAR = 1024  # owners that a pass over a table keeps apart without asking a Python object
    UNKNOWN = 0xffffffff  # stands for owners that were forgotten: such a slot leaves its transition by `settled` only
    EMPTY = 0  # MESH_OWNER_NONE


def backend_seed(str identity not None):
    """128-bit seed of a backend's permutation, from its identity alone (BLAKE2b, RFC 7693, keyed by purpose)."""
    return hashlib.blake2b(identity.encode(), digest_size=16, person=b"mesh-maglev").digest()


cdef mesh_flow flow_of(bytes source, int source_port, bytes destination, int destination_port, int protocol) except *:
    cdef mesh_flow flow
    if len(source) != 16 or len(destination) != 16:
        raise ValueError("an address is 16 bytes, IPv4 as IPv4-mapped")
    if not (0 <= source_port < 65536 and 0 <= destination_port < 65536 and 0 <= protocol < 256):
        raise ValueError("ports are 0..65535, the protocol 0..255")
    memset(&flow, 0, sizeof(flow))
    memcpy(flow.source.bytes, <const uint8_t *>source, 16)
    memcpy(flow.destination.bytes, <const uint8_t *>destination, 16)
    flow.source_port = htobe16(<uint16_t>source_port)
    flow.destination_port = htobe16(<uint16_t>destination_port)
    flow.protocol = protocol
    return flow


def hash_flow(bytes source not None, int source_port, bytes destination not None, int destination_port, int protocol):
    """32-bit hash of a 5-tuple; addresses are 16 bytes in network order (IPv4-mapped), ports in host order."""
    cdef mesh_flow flow = flow_of(source, source_port, destination, destination_port, protocol)
    return mesh_hash_flow(&flow)


def hash_client(bytes source not None):
    """32-bit hash of a client's 16-byte address alone."""
    cdef mesh_flow flow = flow_of(source, 0, source, 0, 0)
    return mesh_hash_client(&flow.source)


def hash_packed(bytes flow not None, bint client=False):
    """32-bit hash of a flow as a map has it (mesh_flow); `client`: of its source's address alone."""
    cdef mesh_flow key
    if len(flow) != sizeof(key):
        raise ValueError(f"a mesh_flow is {sizeof(key)} bytes, not {len(flow)}")
    memcpy(&key, <const char *>flow, sizeof(key))
    return mesh_hash_client(&key.source) if client else mesh_hash_flow(&key)


def hash_again(uint32_t hash, uint32_t n):
    """The hash of a flow's n-th further choice, n from 1."""
    return mesh_hash_again(hash, n)


def slot_of(uint32_t hash, uint32_t size):
    """The slot of a hash in a table of `size` slots."""
    return mesh_slot_of(hash, size)


cdef struct turn:
    uint32_t owner
    uint32_t next  # next preferred slot
    uint32_t skip
    uint32_t weight
    uint64_t due  # round x max weight at which it may take a slot


cdef int populate(mesh_slot *slots, uint32_t size, turn *turns, size_t count, uint32_t heaviest) noexcept nogil:
    """Fill `current` of all slots. `turns` in canonical order, all weights > 0, count > 0."""
    cdef uint32_t filled = 0, slot
    cdef uint64_t iteration = 0
    cdef size_t i
    cdef turn *t
    while True:
        iteration += 1
        for i in range(count):
            t = &turns[i]
            if iteration * t.weight < t.due:
                continue
            t.due += heaviest
            slot = t.next
            while slots[slot].current != EMPTY:
                slot += t.skip
                if slot >= size:
                    slot -= size
            slots[slot].current = t.owner
            t.next = slot + t.skip
            if t.next >= size:
                t.next -= size
            filled += 1
            if filled == size:
                return 0


cdef bint interim_has(const uint32_t *owners, uint32_t owner) noexcept nogil:
    cdef int i
    for i in range(INTERIM):
        if owners[i] == owner:
            return True
    return False


cdef void interim_add(uint32_t *owners, uint32_t owner) noexcept nogil:
    """Remember an owner; when there is no room, remember that something was forgotten."""
    cdef int i
    if interim_has(owners, owner):
        return
    for i in range(INTERIM):
        if owners[i] == EMPTY:
            owners[i] = owner
            return
    owners[INTERIM - 1] = UNKNOWN


cdef inline int add_owner(set found, uint32_t *near, uint32_t owner) except -1:
    """Add an owner that is one, unless `near` (NEAR of them, by number) tells that it is there."""
    if owner != EMPTY and near[owner % NEAR] != owner:
        near[owner % NEAR] = owner
        found.add(owner)
    return 0


cdef class SlotTable:
    """An immutable table of `size` slots, each with its current and its previous owner.

    Made by `build` (no past), `uniform` (one owner everywhere, such as PASS or NONE), `from_slots` (read back from a
    kernel map), and from another table by `transition` and `settled`.
    """

    def __cinit__(self, uint32_t size):
        if size not in TABLE_SIZES:
            raise ValueError(f"a table has one of {TABLE_SIZES} slots, not {size}")
        self.size = size
        self.interim = NULL
        self.tracked = False
        self.slots = <mesh_slot *>calloc(size, sizeof(mesh_slot))
        if self.slots is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.slots)
        free(self.interim)

    @staticmethod
    def uniform(uint32_t size, uint32_t owner):
        """A table in which every slot belongs to `owner`."""
        cdef SlotTable table = SlotTable(size)
        cdef uint32_t i
        for i in range(size):
            table.slots[i].current = table.slots[i].previous = owner
        return table

    @staticmethod
    def build(uint32_t size, backends not None):
        """Build a table from scratch.

        Args:
            size: slots, one of TABLE_SIZES.
            backends: any iterable, in any order, of (seed: 16 bytes of `backend_seed`, owner: int from OWNER_FIRST,
                weight: int 0..65535). Weight 0 gets no slot; with no weight above 0 all slots belong to OWNER_NONE.

        Raises:
            ValueError: two backends with one seed, or a value out of range.
        """
        cdef list entries = sorted([entry for entry in backends if entry[2] != 0])
        cdef size_t count = len(entries), i
        cdef turn *turns
        cdef SlotTable table
        cdef uint32_t heaviest = 0, s
        cdef bytes seed, last = None
        cdef uint64_t low, high
        if count == 0:
            return SlotTable.uniform(size, MESH_OWNER_NONE)
        if count > size:
            raise ValueError(f"{count} backends do not fit in {size} slots; choose a larger mesh.table-size")
        table = SlotTable(size)
        turns = <turn *>malloc(count * sizeof(turn))
        if turns is NULL:
            raise MemoryError
        try:
            for i in range(count):
                seed, owner, weight = entries[i]
                if len(seed) != 16 or seed == last:
                    raise ValueError(f"seed {seed.hex()} is not 16 bytes, or given twice")
                if not MESH_OWNER_FIRST <= owner <= MESH_OWNER_MASK or not 0 < weight <= 65535:
                    raise ValueError(f"owner {owner} or weight {weight} out of range")
                last = seed
                high, low = int.from_bytes(seed[:8], "big"), int.from_bytes(seed[8:], "big")
                turns[i].owner = owner
                turns[i].next = <uint32_t>(high % size)
                turns[i].skip = <uint32_t>(low % (size - 1)) + 1
                turns[i].weight = weight
                turns[i].due = 0
                heaviest = max(heaviest, turns[i].weight)
            for i in range(count):
                turns[i].due = heaviest
            with nogil:
                populate(table.slots, size, turns, count, heaviest)
                for s in range(size):
                    table.slots[s].previous = table.slots[s].current
        finally:
            free(turns)
        return table

    @staticmethod
    def from_slots(bytes slots not None):
        """A table as it stands in a kernel map (mesh_slot array). Which owners its noted flows have is unknown."""
        cdef SlotTable table
        cdef uint32_t i
        if len(slots) % sizeof(mesh_slot):
            raise ValueError(f"{len(slots)} bytes are no whole number of slots")
        table = SlotTable(len(slots) // sizeof(mesh_slot))
        memcpy(table.slots, <const char *>slots, table.size * sizeof(mesh_slot))
        for i in range(table.size):
            if table.slots[i].current != table.slots[i].previous:
                table.slots[i].previous |= MESH_SLOT_TRACKED
                table.tracked = True
                table.remember(i)[0] = UNKNOWN
        return table

    cdef uint32_t *remember(self, size_t index) except? NULL nogil:
        """The interim owners of a slot, to be written: room for those of all slots is made with the first."""
        if self.interim is NULL:
            self.interim = <uint32_t *>calloc(<size_t>self.size * INTERIM, sizeof(uint32_t))
            if self.interim is NULL:
                with gil:
                    raise MemoryError
        return self.interim + index * INTERIM

    def transition(self, SlotTable new not None, gone=frozenset()):
        """The table that leads from this one to `new`: current owners are those of `new`.

        `previous` of a slot stays what it was when the slot was last without state, because every flow that started
        since then was noted. Once that owner is in `gone`, un-noted flows have nobody left and go to the current one.
        A slot is without state again when every owner that its flows could have is gone or is the current one.
        Another size starts afresh: slots are matched by position in hash space, which keeps most flows in place only
        while their owner's slots overlap, so change sizes in quiet hours (docs/HASHING.md).

        Args:
            new: a table without a past, as `build` and `uniform` make it.
            gone: owners that no longer exist.
        """
        cdef SlotTable table
        cdef uint32_t i, source, before, base, current, owner
        cdef int k
        cdef uint32_t owners[INTERIM]
        cdef bint lost, keep
        cdef bint changed = False
        cdef frozenset dead = frozenset(gone)
        cdef uint8_t *is_dead = NULL
        cdef uint32_t dead_top = (max(dead) + 1) if dead else 0
        table = SlotTable(new.size)
        if dead_top:
            is_dead = <uint8_t *>calloc(dead_top, 1)
            if is_dead is NULL:
                raise MemoryError
            for owner in dead:
                is_dead[owner] = 1
        try:
            for i in range(new.size):
                if self.tracked or new.slots[i].current != self.slots[
                        i if new.size == self.size else mesh_slot_source(i, new.size, self.size)].current:
                    changed = True
                    break
            if not changed:
                memcpy(table.slots, new.slots, new.size * sizeof(mesh_slot))
                return table
            with nogil:
                for i in range(new.size):
                    source = i if new.size == self.size else mesh_slot_source(i, new.size, self.size)
                    current = new.slots[i].current
                    before = self.slots[source].current
                    base = self.slots[source].previous & MESH_OWNER_MASK
                    memset(owners, 0, sizeof(owners))
                    if self.interim is not NULL:
                        for k in range(INTERIM):
                            owner = self.interim[<size_t>source * INTERIM + k]
                            if owner != EMPTY and (owner == UNKNOWN or not (owner < dead_top and is_dead[owner])):
                                interim_add(owners, owner)
                    if before != current and before != base:
                        if before != MESH_OWNER_NONE and not (before < dead_top and is_dead[before]):
                            interim_add(owners, before)
                    lost = base == MESH_OWNER_NONE or (base < dead_top and is_dead[base])
                    if lost:
                        base = current
                    keep = base != current
                    for k in range(INTERIM):
                        if owners[k] != EMPTY and owners[k] != current:
                            keep = True
                    if keep:
                        table.slots[i].previous = base | MESH_SLOT_TRACKED
                        table.tracked = True
                        if owners[0] != EMPTY:
                            memcpy(table.remember(i), owners, sizeof(owners))
                    else:
                        table.slots[i].previous = base
                    table.slots[i].current = current
        finally:
            free(is_dead)
        return table

    def settled(self, keep=frozenset()):
        """This table with every slot out of its transition, but for the slots in `keep` (those with live noted flows)."""
        cdef SlotTable table = SlotTable(self.size)
        cdef uint32_t i
        memcpy(table.slots, self.slots, self.size * sizeof(mesh_slot))
        for i in range(self.size):
            if table.slots[i].previous & MESH_SLOT_TRACKED:
                table.slots[i].previous = table.slots[i].current
        for i in keep:
            if i < self.size and self.slots[i].previous & MESH_SLOT_TRACKED:
                table.slots[i].previous = self.slots[i].previous
                table.tracked = True
                if self.interim is not NULL:
                    memcpy(table.remember(i), self.interim + <size_t>i * INTERIM, INTERIM * sizeof(uint32_t))
        return table

    def slot(self, uint32_t index):
        """(current, previous, tracked) of a slot."""
        if index >= self.size:
            raise IndexError(f"slot {index} of {self.size}")
        return (self.slots[index].current, self.slots[index].previous & MESH_OWNER_MASK,
                bool(self.slots[index].previous & MESH_SLOT_TRACKED))

    def choices(self, uint32_t hash, int limit=4):
        """Distinct current owners a flow would be given in turn, the first choice first: first those that its further
        hashes draw (a bounded number of them), then all others that have a slot."""
        cdef list found = []
        cdef list there
        cdef uint32_t n, owner, turn
        for n in range(8 * limit):
            owner = self.slots[mesh_slot_of(mesh_hash_again(hash, n) if n else hash, self.size)].current
            if owner not in found:
                found.append(owner)
                if len(found) == limit:
                    return found
        there = self.in_order()
        turn = mesh_slot_of(hash, <uint32_t>len(there))
        return (found + [o for o in there[turn:] + there[:turn] if o not in found])[:limit]

    cdef list in_order(self):
        """The current owners, NONE excepted, in the order of their first slots."""
        cdef dict found = {}
        cdef uint32_t near[NEAR]
        cdef uint32_t i, owner
        memset(near, 0, sizeof(near))
        for i in range(self.size):
            owner = self.slots[i].current
            if owner != EMPTY and near[owner % NEAR] != owner:
                near[owner % NEAR] = owner
                found[owner] = True
        return list(found)

    def shares(self):
        """Slots by current owner."""
        cdef dict counts = {}
        cdef uint32_t near[NEAR]
        cdef uint32_t sums[NEAR]
        cdef uint32_t i, owner, place
        memset(sums, 0, sizeof(sums))
        for i in range(self.size):
            owner = self.slots[i].current
            place = owner % NEAR
            if sums[place] and near[place] != owner:
                counts[near[place]] = counts.get(near[place], 0) + sums[place]
                sums[place] = 0
            near[place] = owner
            sums[place] += 1
        for place in range(<uint32_t>NEAR):
            if sums[place]:
                counts[near[place]] = counts.get(near[place], 0) + sums[place]
        return counts

    def tracked_slots(self):
        """How many slots need the flow cache."""
        cdef uint32_t i, count = 0
        for i in range(self.size):
            count += (self.slots[i].previous & MESH_SLOT_TRACKED) != 0
        return count

    def owners(self):
        """All owners a flow of this table may have now: current, previous and interim ones (NONE and UNKNOWN excepted)."""
        cdef set found = set()
        cdef uint32_t near[NEAR]
        cdef uint32_t i
        memset(near, 0, sizeof(near))
        for i in range(self.size):
            add_owner(found, near, self.slots[i].current)
            add_owner(found, near, self.slots[i].previous & MESH_OWNER_MASK)
        if self.interim is not NULL:
            for i in range(self.size * INTERIM):
                if self.interim[i] != UNKNOWN:
                    add_owner(found, near, self.interim[i])
        return found

    def to_bytes(self):
        """The slots as the kernel map holds them: `size` x mesh_slot, host byte order."""
        return (<const char *>self.slots)[:self.size * sizeof(mesh_slot)]

    def digest(self, names not None):
        """64 bits over the current owners' identities, equal on all nodes that hold equal tables.

        Args:
            names: identity (str) by owner.
        """
        cdef bytearray text = bytearray(8 * self.size)
        cdef char *at = text
        cdef uint32_t near[NEAR]
        cdef char keys[NEAR][8]
        cdef uint32_t i, owner, place
        cdef bytes key
        memset(near, 0xff, sizeof(near))  # no owner is that
        for i in range(self.size):
            owner = self.slots[i].current
            place = owner % NEAR
            if near[place] != owner:
                name = names.get(owner)
                key = owner.to_bytes(8, "big") if name is None else backend_seed(name)[:8]
                memcpy(keys[place], <const char *>key, 8)
                near[place] = owner
            memcpy(at + 8 * i, keys[place], 8)
        return hashlib.blake2b(text, digest_size=8, person=b"mesh-digest").hexdigest()

    def __eq__(self, other):
        if not isinstance(other, SlotTable):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    __hash__ = None


cdef inline uint32_t mesh_slot_source(uint32_t slot, uint32_t size, uint32_t other_size) noexcept nogil:
    """The slot of a table of another size that covers the middle of this one's share of the hash space."""
    return <uint32_t>(((2 * <uint64_t>slot + 1) * other_size) / (2 * <uint64_t>size))
