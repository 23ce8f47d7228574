# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The PROXY protocol's version 2 header (HAProxy, doc/proxy-protocol.txt, section 2.2): who called, and where."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from mesh._maglev cimport mesh_flow
from mesh.fastpath.select cimport is_v4

cdef enum:
    HEADER_MOST = 52


cdef inline uint32_t announce(const mesh_flow *flow, uint8_t *out) noexcept nogil:
    """Write the header of a TCP connection to `out` (HEADER_MOST bytes of room) and return its length."""
    cdef bint four = is_v4(&flow.source) and is_v4(&flow.destination)
    cdef uint32_t size = 4 if four else 16
    cdef uint32_t skip = 16 - size
    memcpy(out, <const char *>b"\r\n\r\n\x00\r\nQUIT\n", 12)
    out[12] = 0x21  # version 2, command PROXY
    out[13] = 0x11 if four else 0x21  # TCP over IPv4 or IPv6
    out[14] = 0
    out[15] = <uint8_t>(2 * size + 4)
    memcpy(out + 16, &flow.source.bytes[skip], size)
    memcpy(out + 16 + size, &flow.destination.bytes[skip], size)
    memcpy(out + 16 + 2 * size, &flow.source_port, 2)
    memcpy(out + 18 + 2 * size, &flow.destination_port, 2)
    return 20 + 2 * size
