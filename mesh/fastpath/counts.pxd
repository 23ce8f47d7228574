# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint32_t, uint64_t

from mesh.fastpath.types cimport BUCKETS, CAUSES, counters

cdef enum:
    PLAIN = 8
    WIDTH = PLAIN + CAUSES + BUCKETS  # columns of mesh.datapath.base.Table


cdef counters *counters_new(uint32_t threads) except NULL
cdef tuple counters_sum(const counters *of, uint32_t threads)
cdef void gather(const counters *of, uint32_t threads, uint64_t *out, size_t step) noexcept nogil
