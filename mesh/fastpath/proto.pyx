# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""What goes over the wire ahead of the client's bytes: the PROXY protocol header and the peer protocol of two agents.

PROXY protocol: version 2 (HAProxy, doc/proxy-protocol.txt, section 2.2), with the client's and the called address.

Peer protocol (docs/PROXY.md, "Peer port"), for connections: a PROXY protocol v2 header whose TLV 0xE0 (the first type
for private use) names the backend: TAG_SIZE bytes, then a byte of flags. The answer is one byte: PEER_YES, or PEER_NO
plus the Failure. The client's bytes follow only after PEER_YES, so that the sender can still try another backend.

For datagrams: each has a head of PEER_UDP_HEAD bytes. A session has its own source port, and the backend's answers come
back to that port.

With the swarm's key (proof.pyx): a connection's header has a second TLV, 0xE1, with the proof. To a node that has the
key, a datagram's head begins with MUD2 instead of MUD1 and is followed by the proof, and the answers begin with MUD3 and
a proof, for the flow of the head.

A tag of zeros, which no backend has, is a probe (the agent tests the path to a node). A connection is answered by
PEER_NO + FAIL_NO_BACKEND. A datagram is answered by its first PEER_UDP_HEAD bytes, marked so that no answer is taken
for a probe. A probe without a proof is answered whoever has to prove; one with a proof shows whether it is believed.
An agent that is about to end answers neither (Engine.leave), so that others send nothing more.
"""

from libc.string cimport memcmp, memcpy, memset

from mesh.fastpath.address cimport is_v4, map_v4
from mesh.fastpath.proof cimport PROOF_NONE, PROOF_TCP, proof_check, proof_time, proof_write
from mesh.fastpath.types cimport CAUSES, FAIL_OTHER, PEER_UDP_HEAD


cdef uint32_t proxy_header(const mesh_flow *flow, uint8_t *out) noexcept nogil:
    """Write the version 2 header of a TCP connection to `out` (room for PROXY_HEADER_MAX bytes). Returns its length."""
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


cdef void peer_body(const mesh_flow *flow, const uint8_t *tag, uint8_t flags, uint8_t *out) noexcept nogil:
    """What the proof of a connection is for: PEER_BODY bytes."""
    memcpy(out, tag, TAG_SIZE)
    out[TAG_SIZE] = flags
    memcpy(out + PEER_VALUE, flow.source.bytes, 16)
    memcpy(out + PEER_VALUE + 16, flow.destination.bytes, 16)
    memcpy(out + PEER_VALUE + 32, &flow.source_port, 2)
    memcpy(out + PEER_VALUE + 34, &flow.destination_port, 2)


cdef uint32_t peer_header(const mesh_flow *flow, const uint8_t *tag, bint tell, const peer_acl *acl,
                          uint8_t *out) noexcept nogil:
    """Write the header of a connection to `out` (room for PEER_HEADER_MAX bytes), with a proof if this node has a key.
    Returns its length."""
    cdef uint32_t n = proxy_header(flow, out)
    cdef uint8_t body[PEER_BODY]
    out[n] = PEER_TLV
    out[n + 1] = 0
    out[n + 2] = PEER_VALUE
    memcpy(out + n + 3, tag, TAG_SIZE)
    out[n + 3 + TAG_SIZE] = PEER_ANNOUNCE if tell else 0
    out[15] += 3 + PEER_VALUE
    n += 3 + PEER_VALUE
    peer_body(flow, tag, out[n - 1], body)
    if not proof_write(acl, PROOF_TCP, body, PEER_BODY, proof_time(), out + n + 3):
        return n
    out[n] = PEER_PROOF_TLV
    out[n + 1] = 0
    out[n + 2] = PROOF_SIZE
    out[15] += 3 + PROOF_SIZE
    return n + 3 + PROOF_SIZE


cdef int peer_check(const peer_acl *acl, const peer_request *order) noexcept nogil:
    """The result of `proof_check` for a header that was read."""
    cdef uint8_t body[PEER_BODY]
    if not order.proven:
        return PROOF_NONE
    peer_body(&order.flow, order.tag, order.flags, body)
    return proof_check(acl, PROOF_TCP, body, PEER_BODY, proof_time(), order.proof)


cdef bint find_tag(const uint8_t *at, uint32_t length, peer_request *to) noexcept nogil:
    """Find our TLVs among the TLVs of a header. False: the first is not there, or a TLV is cut short."""
    cdef uint32_t size
    cdef bint found = False
    to.proven = 0
    while length >= 3:
        size = (<uint32_t>at[1] << 8) | at[2]
        if size > length - 3:
            return False
        if at[0] == PEER_TLV:
            if size < PEER_VALUE:
                return False
            memcpy(to.tag, at + 3, TAG_SIZE)
            to.flags = at[3 + TAG_SIZE]
            found = True
        elif at[0] == PEER_PROOF_TLV and size >= PROOF_SIZE:
            memcpy(to.proof, at + 3, PROOF_SIZE)
            to.proven = 1
        at += 3 + size
        length -= 3 + size
    return found


cdef int32_t peer_parse(const uint8_t *data, uint32_t length, peer_request *to) noexcept nogil:
    """Returns the length of the header at `data`; 0: it is incomplete; -1: it is malformed or not ours."""
    cdef uint32_t size, total
    cdef uint32_t head = 12 if length > 12 else length
    if memcmp(data, <const char *>b"\r\n\r\n\x00\r\nQUIT\n", head) != 0:
        return -1
    if length < 16:
        return 0
    total = 16 + ((<uint32_t>data[14] << 8) | data[15])
    if data[12] != 0x21 or (data[13] != 0x11 and data[13] != 0x21) or total > PEER_READ_MAX:
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
    return <int32_t>total if find_tag(data + 20 + 2 * size, total - 20 - 2 * size, to) else -1


cdef void peer_datagram_head(const mesh_flow *flow, const uint8_t *tag, uint8_t *out) noexcept nogil:
    """Write the head of a datagram: "MUD1", the tag, two zeros, addresses, ports."""
    memcpy(out, <const char *>b"MUD1", 4)
    memcpy(out + 4, tag, TAG_SIZE)
    out[14] = out[15] = 0
    memcpy(out + 16, flow.source.bytes, 16)
    memcpy(out + 32, flow.destination.bytes, 16)
    memcpy(out + 48, &flow.source_port, 2)
    memcpy(out + 50, &flow.destination_port, 2)


cdef bint peer_datagram_tag(const uint8_t *data, uint32_t length, uint8_t *tag) noexcept nogil:
    """Read the tag from the head of a datagram. False: it has no head."""
    if length < PEER_UDP_HEAD or memcmp(data, <const char *>b"MUD1", 4) != 0:
        if length < PEER_UDP_HEAD + PROOF_SIZE or memcmp(data, <const char *>b"MUD2", 4) != 0:
            return False
    memcpy(tag, data + PEER_TAG, TAG_SIZE)
    return True


cdef void peer_datagram_client(const uint8_t *head, mesh_addr *client) noexcept nogil:
    """Read the client's address from the head of a datagram."""
    memcpy(client.bytes, head + 16, 16)


cdef bint is_peer_probe(const uint8_t *tag) noexcept nogil:
    """Whether the tag is the one of a probe."""
    cdef int i
    for i in range(TAG_SIZE):
        if tag[i]:
            return False
    return True


cdef int peer_cause(uint8_t answer) noexcept nogil:
    """The Failure of an answer other than PEER_YES."""
    return answer - PEER_NO if PEER_NO <= answer < PEER_NO + CAUSES else FAIL_OTHER
