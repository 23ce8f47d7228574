# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""C-level names of the selection core, for `_fastpath`: the very functions that the eBPF programs compile."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "mesh/abi.h" nogil:
    const uint32_t MESH_ABI_VERSION
    const uint32_t MESH_OWNER_NONE
    const uint32_t MESH_OWNER_PASS
    const uint32_t MESH_OWNER_FIRST
    const uint32_t MESH_SLOT_TRACKED
    const uint32_t MESH_OWNER_MASK
    const uint32_t MESH_NAMED
    const uint32_t MESH_NAMED_MASK

    struct mesh_addr:
        uint8_t bytes[16]

    struct mesh_flow:
        mesh_addr source
        mesh_addr destination
        uint16_t source_port
        uint16_t destination_port
        uint8_t protocol
        uint8_t pad[3]

    struct mesh_slot:
        uint32_t current
        uint32_t previous


cdef extern from "mesh/hash.h" nogil:
    uint32_t mesh_hash_flow(const mesh_flow *flow)
    uint32_t mesh_hash_client(const mesh_addr *source)
    uint32_t mesh_slot_of(uint32_t hash, uint32_t size)
    uint32_t mesh_hash_again(uint32_t hash, uint32_t n)


cdef class SlotTable:
    cdef readonly uint32_t size
    cdef mesh_slot *slots  # `size` of them; never written after construction
    cdef uint32_t *interim  # INTERIM owners per slot that noted flows may still have; NULL: none has any
    cdef readonly bint tracked  # some slot needs the flow cache
    cdef uint32_t *remember(self, size_t index) except? NULL nogil
    cdef list in_order(self)
