# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The proof that a node knows the swarm's key, in what nodes hand to each other.

PROOF_SIZE bytes: the key's number, Unix seconds (both 4 bytes, network order), and SipHash-2-4 (8 bytes, little endian)
over the kind, those 8 bytes and a body of at most PROOF_BODY bytes. mesh.datapath.proof writes the same in Python.

A proof is valid for PROOF_WINDOW seconds on both sides of its time, so clocks of nodes may differ by that much, and
whoever has recorded one can use it for so long, for the same flow.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from mesh._siphash cimport mesh_siphash24
from mesh.fastpath.sys cimport fp_wall
from mesh.fastpath.types cimport PROOF_BODY, PROOF_SIZE, PROOF_WINDOW, proof_key

cdef enum:
    HEAD = 9  # bytes of the message before the body
    MESSAGE = HEAD + PROOF_BODY


cdef uint32_t proof_time() noexcept nogil:
    """Now, as proofs tell it."""
    return <uint32_t>fp_wall()


cdef void put32(uint8_t *out, uint32_t value) noexcept nogil:
    out[0] = <uint8_t>(value >> 24)
    out[1] = <uint8_t>(value >> 16)
    out[2] = <uint8_t>(value >> 8)
    out[3] = <uint8_t>value


cdef uint32_t get32(const uint8_t *at) noexcept nogil:
    return (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | at[3]


cdef uint64_t proof_mac(const proof_key *key, uint8_t kind, const uint8_t *head, const uint8_t *body,
                        uint32_t length) noexcept nogil:
    cdef uint8_t message[MESSAGE]
    message[0] = kind
    memcpy(message + 1, head, 8)
    memcpy(message + HEAD, body, length)
    return mesh_siphash24(key.secret, message, HEAD + length)


cdef bint proof_write(const peer_acl *acl, uint8_t kind, const uint8_t *body, uint32_t length, uint32_t now,
                      uint8_t *out) noexcept nogil:
    """Write PROOF_SIZE bytes to `out`. False: this node has no key."""
    cdef uint64_t mac
    cdef int i
    if acl is NULL or acl.key_count == 0 or length > PROOF_BODY:
        return False
    put32(out, acl.keys[0].id)
    put32(out + 4, now)
    mac = proof_mac(&acl.keys[0], kind, out, body, length)
    for i in range(8):
        out[8 + i] = <uint8_t>(mac >> (8 * i))
    return True


cdef int proof_check(const peer_acl *acl, uint8_t kind, const uint8_t *body, uint32_t length, uint32_t now,
                     const uint8_t *proof) noexcept nogil:
    """Whether PROOF_SIZE bytes at `proof` prove the body. The comparison takes the same time wherever it fails."""
    cdef uint32_t id = get32(proof)
    cdef uint32_t apart = now - get32(proof + 4)
    cdef uint64_t mac = 0
    cdef uint32_t i
    cdef int k
    if acl is NULL or length > PROOF_BODY:
        return PROOF_NONE
    for k in range(8):
        mac |= <uint64_t>proof[8 + k] << (8 * k)
    for i in range(acl.key_count):
        if acl.keys[i].id == id:
            if (proof_mac(&acl.keys[i], kind, proof, body, length) ^ mac) != 0:
                return PROOF_BAD
            return PROOF_NONE if apart + PROOF_WINDOW > 2 * PROOF_WINDOW else PROOF_GOOD
    return PROOF_NONE


cdef bint proof_admits(const peer_acl *acl, const peer_node *node, int result) noexcept nogil:
    """Whether what a node has sent counts as its own, by the result of `proof_check`."""
    return result == PROOF_GOOD or (result == PROOF_NONE and not node.proves and not acl.require)
