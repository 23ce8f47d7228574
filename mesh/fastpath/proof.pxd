# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint8_t, uint32_t

from mesh._maglev cimport mesh_addr
from mesh.fastpath.types cimport peer_acl, peer_node

cdef enum:  # what is proven; part of the message
    PROOF_TCP = 1  # a flow that is handed over
    PROOF_UDP = 2  # datagrams of a flow, likewise
    PROOF_REPLY = 3  # datagrams of its backend

cdef enum:  # result of proof_check
    PROOF_GOOD = 0
    PROOF_NONE = 1  # by a key that is not known here, too old or too new: as if there were none
    PROOF_BAD = 2  # forged

cdef uint32_t proof_time() noexcept nogil
cdef bint proof_write(const peer_acl *acl, uint8_t kind, const uint8_t *body, uint32_t length, uint32_t now,
                      uint8_t *out) noexcept nogil
cdef int proof_check(const peer_acl *acl, uint8_t kind, const uint8_t *body, uint32_t length, uint32_t now,
                     const uint8_t *proof) noexcept nogil
cdef bint proof_admits(const peer_acl *acl, const peer_node *node, int result) noexcept nogil
