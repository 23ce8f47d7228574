# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "mesh/siphash.h" nogil:
    uint64_t mesh_siphash24(const uint8_t *key, const uint8_t *data, uint32_t length)
