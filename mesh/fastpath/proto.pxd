# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport int32_t, uint8_t, uint32_t

from mesh._maglev cimport mesh_addr, mesh_flow
from mesh.fastpath.types cimport PROOF_SIZE, TAG_SIZE, peer_acl

cdef enum:
    PROXY_HEADER_MAX = 52  # bytes of a PROXY protocol header as sent

cdef enum:
    PEER_TLV = 0xE0
    PEER_VALUE = TAG_SIZE + 1
    PEER_TAG = 4  # offset of the tag in the head of a datagram
    PEER_PROOF_TLV = 0xE1
    PEER_HEADER_MAX = PROXY_HEADER_MAX + 3 + PEER_VALUE + 3 + PROOF_SIZE  # bytes of a peer header as sent
    PEER_BODY = PEER_VALUE + 36  # bytes that the proof of a connection is for
    PEER_DATAGRAM_BODY = 48  # likewise of datagrams: the head behind its first PEER_TAG bytes
    PEER_READ_MAX = 256  # bytes of a peer header as accepted
    PEER_ANNOUNCE = 0x1  # flag: the backend wants a PROXY protocol header
    PEER_YES = 0x06
    PEER_NO = 0x10


cdef struct peer_request:  # a header that was read
    mesh_flow flow
    uint8_t tag[TAG_SIZE]
    uint8_t flags
    uint8_t proven  # it has a proof
    uint8_t proof[PROOF_SIZE]


cdef uint32_t proxy_header(const mesh_flow *flow, uint8_t *out) noexcept nogil
cdef uint32_t peer_header(const mesh_flow *flow, const uint8_t *tag, bint tell, const peer_acl *acl,
                          uint8_t *out) noexcept nogil
cdef int peer_check(const peer_acl *acl, const peer_request *order) noexcept nogil
cdef int32_t peer_parse(const uint8_t *data, uint32_t length, peer_request *to) noexcept nogil
cdef void peer_datagram_head(const mesh_flow *flow, const uint8_t *tag, uint8_t *out) noexcept nogil
cdef bint peer_datagram_tag(const uint8_t *data, uint32_t length, uint8_t *tag) noexcept nogil
cdef void peer_datagram_client(const uint8_t *head, mesh_addr *client) noexcept nogil
cdef bint is_peer_probe(const uint8_t *tag) noexcept nogil
cdef int peer_cause(uint8_t answer) noexcept nogil
