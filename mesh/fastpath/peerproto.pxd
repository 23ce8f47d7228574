# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""What agents of two nodes say to each other when one hands a connection over (docs/ARCHITECTURE.md, "Between nodes").

A PROXY protocol v2 header with the client's and the called address, whose TLV 0xE0 (the first that is free for private
use) names the backend: TAG bytes, then a byte of flags. The answer is one byte: PEER_YES, or PEER_NO + cause; bytes of
the client follow only after PEER_YES, so that the one who hands over can try another backend.

Datagrams go over one by one, each behind PEER_UDP bytes; a session has a source port of its own, and what the backend
answers comes back to that port as it is.

A tag of zeros, which no backend has, asks whether anybody is there (mesh/datapath/paths/peer_probe.py): a connection gets
PEER_NO + FAIL_NO_BACKEND, a datagram of any size its first PEER_UDP bytes back, marked, so that no answer is a question.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from mesh._maglev cimport mesh_addr, mesh_flow
from mesh.fastpath.proxyproto cimport HEADER_MOST, announce
from mesh.fastpath.select cimport map_v4
from mesh.fastpath.sys cimport fp_load
from mesh.fastpath.types cimport CAUSES, FAIL_OTHER, PEER_UDP, TAG, backend, doors, engine, place

cdef enum:
    PEER_TLV = 0xE0
    PEER_VALUE = TAG + 1
    PEER_MOST = HEADER_MOST + 3 + PEER_VALUE  # bytes that are sent
    PEER_READ = 256  # bytes of a header that are accepted
    PEER_ANNOUNCE = 0x1  # flag: the backend wants a PROXY protocol header
    PEER_YES = 0x06
    PEER_NO = 0x10


cdef struct handed:  # a header that was read
    mesh_flow flow
    uint8_t tag[TAG]
    uint8_t announce


cdef inline uint32_t peer_header(const mesh_flow *flow, const uint8_t *tag, bint tell, uint8_t *out) noexcept nogil:
    """Write a header to `out` (PEER_MOST bytes of room) and return its length."""
    cdef uint32_t n = announce(flow, out)
    out[n] = PEER_TLV
    out[n + 1] = 0
    out[n + 2] = PEER_VALUE
    memcpy(out + n + 3, tag, TAG)
    out[n + 3 + TAG] = PEER_ANNOUNCE if tell else 0
    out[15] += 3 + PEER_VALUE
    return n + 3 + PEER_VALUE


cdef inline bint tags_of(const uint8_t *at, uint32_t length, handed *to) noexcept nogil:
    """Find our TLV among those of a header."""
    cdef uint32_t size
    while length >= 3:
        size = (<uint32_t>at[1] << 8) | at[2]
        if size > length - 3:
            return False
        if at[0] == PEER_TLV:
            if size < PEER_VALUE:
                return False
            memcpy(to.tag, at + 3, TAG)
            to.announce = at[3 + TAG] & PEER_ANNOUNCE
            return True
        at += 3 + size
        length -= 3 + size
    return False


cdef inline int32_t peer_parse(const uint8_t *data, uint32_t length, handed *to) noexcept nogil:
    """The length of the header that `data` begins with; 0: it is not whole yet; -1: it is none of ours."""
    cdef uint32_t size, total
    cdef uint32_t head = 12 if length > 12 else length
    if memcmp(data, <const char *>b"\r\n\r\n\x00\r\nQUIT\n", head) != 0:
        return -1
    if length < 16:
        return 0
    total = 16 + ((<uint32_t>data[14] << 8) | data[15])
    if data[12] != 0x21 or (data[13] != 0x11 and data[13] != 0x21) or total > PEER_READ:
        return -1
    size = 4 if data[13] == 0x11 else 16
    if total < 20 + 2 * size:
        return -1
    if length < total:
        return 0
    memset(&to.flow, 0, sizeof(mesh_flow))
    if size == 4:
        map_v4(&to.flow.source, data + 16)
        map_v4(&to.flow.destination, data + 20)
    else:
        memcpy(to.flow.source.bytes, data + 16, 16)
        memcpy(to.flow.destination.bytes, data + 32, 16)
    memcpy(&to.flow.source_port, data + 16 + 2 * size, 2)
    memcpy(&to.flow.destination_port, data + 18 + 2 * size, 2)
    to.flow.protocol = 6
    return <int32_t>total if tags_of(data + 20 + 2 * size, total - 20 - 2 * size, to) else -1


cdef inline void peer_head(const mesh_flow *flow, const uint8_t *tag, uint8_t *out) noexcept nogil:
    """Write what goes ahead of a datagram: "MUD1", the tag, two zeros, addresses, ports. Answers go back bare."""
    memcpy(out, <const char *>b"MUD1", 4)
    memcpy(out + 4, tag, TAG)
    out[14] = out[15] = 0
    memcpy(out + 16, flow.source.bytes, 16)
    memcpy(out + 32, flow.destination.bytes, 16)
    memcpy(out + 48, &flow.source_port, 2)
    memcpy(out + 50, &flow.destination_port, 2)


cdef inline bint peer_head_of(const uint8_t *data, uint32_t length, uint8_t *tag) noexcept nogil:
    """The tag ahead of a datagram. False: there is none."""
    if length < PEER_UDP or memcmp(data, <const char *>b"MUD1", 4) != 0:
        return False
    memcpy(tag, data + 4, TAG)
    return True


cdef inline bint is_question(const uint8_t *tag) noexcept nogil:
    """Whether a tag names nobody and only asks for a sign of life."""
    cdef int i
    for i in range(TAG):
        if tag[i]:
            return False
    return True


cdef inline int cause_said(uint8_t answer) noexcept nogil:
    """The Failure that an answer other than PEER_YES names."""
    return answer - PEER_NO if PEER_NO <= answer < PEER_NO + CAUSES else FAIL_OTHER


cdef inline bint is_node(engine *e, const mesh_addr *address) noexcept nogil:
    """Whether flows may be handed over from there."""
    cdef doors *d = <doors *>fp_load(&e.doors)
    cdef uint32_t i
    if d is not NULL:
        for i in range(d.node_count):
            if memcmp(&d.nodes[i], address, sizeof(mesh_addr)) == 0:
                return True
    return False


cdef inline backend *backend_here(engine *e, const uint8_t *tag, uint8_t protocol) noexcept nogil:
    """The backend of this node that another node names, or NULL."""
    cdef doors *d = <doors *>fp_load(&e.doors)
    cdef uint32_t low = 0
    cdef uint32_t high, middle
    cdef int order
    if d is NULL:
        return NULL
    high = d.count
    while low < high:
        middle = (low + high) >> 1
        order = memcmp(d.places[middle].tag, tag, TAG)
        if order == 0:
            order = <int>d.places[middle].protocol - protocol
        if order == 0:
            return <backend *>fp_load(&e.backends[d.places[middle].backend])
        if order < 0:
            low = middle + 1
        else:
            high = middle
    return NULL
