# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Addresses of flows (16 bytes, IPv4 mapped) and of sockets."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from mesh._maglev cimport MESH_NAMED, MESH_NAMED_MASK
from mesh.fastpath.sys cimport AF_INET, sockaddr_in


cdef void map_v4(mesh_addr *address, const void *four) noexcept nogil:
    memset(address.bytes, 0, 10)
    address.bytes[10] = address.bytes[11] = 0xff
    memcpy(&address.bytes[12], four, 4)


cdef bint is_v4(const mesh_addr *address) noexcept nogil:
    cdef uint8_t head[12]
    memset(head, 0, 10)
    head[10] = head[11] = 0xff
    return memcmp(address.bytes, head, 12) == 0


cdef void from_sockaddr(const sockaddr_in6 *name, mesh_addr *address, uint16_t *port) noexcept nogil:
    """The address (IPv4 mapped) and port, network order, of a socket address of either family."""
    cdef sockaddr_in four
    if name.sin6_family == AF_INET:
        memcpy(&four, name, sizeof(four))
        map_v4(address, &four.sin_addr)
        port[0] = four.sin_port
    else:
        memcpy(address.bytes, &name.sin6_addr, 16)
        port[0] = name.sin6_port


cdef uint32_t named_owner(const mesh_addr *source, const mesh_addr *called) noexcept nogil:
    """The owner that a call names by its address (MESH_NAMED in abi.h): one of a process of this node. 0: none."""
    cdef const uint8_t *four = &called.bytes[12]
    cdef uint32_t address = <uint32_t>four[0] << 24 | <uint32_t>four[1] << 16 | <uint32_t>four[2] << 8 | four[3]
    if address & MESH_NAMED_MASK != MESH_NAMED or source.bytes[12] != 127:  # of loopback
        return 0
    return address & ~MESH_NAMED_MASK if is_v4(called) and is_v4(source) else 0


cdef bint is_own_call(const mesh_addr *client) noexcept nogil:
    """Whether a flow's client is a process of the node that hands it over, to which source rules do not apply."""
    return is_v4(client) and client.bytes[12] == 127  # of loopback
