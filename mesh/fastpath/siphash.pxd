# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint64_t


cdef extern from "mesh/fastpath/siphash.h" nogil:
    struct mesh_siphash_key:
        uint64_t words[2]

    uint64_t mesh_siphash(const mesh_siphash_key *key, const void *data, size_t size)
