# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Counters of a frontend or of one of its backends, a row per thread: written by the threads, summed for Python."""

from libc.string cimport memset
from posix.stdlib cimport posix_memalign

from mesh.fastpath.sys cimport fp_peek


cdef counters *counters_new(uint32_t threads) except NULL:
    cdef void *memory = NULL
    if posix_memalign(&memory, 64, threads * sizeof(counters)) != 0:
        raise MemoryError
    memset(memory, 0, threads * sizeof(counters))
    return <counters *>memory


cdef tuple counters_sum(const counters *of, uint32_t threads):
    """Sums over the threads. Ends are read before beginnings, so that what is open is never negative."""
    cdef uint64_t ended = 0, closed = 0, begun = 0, opened = 0, retried = 0
    cdef uint64_t into = 0, out = 0, packets_in = 0, packets_out = 0, spent = 0
    cdef uint64_t[CAUSES] failed
    cdef uint64_t[BUCKETS] connect
    cdef uint32_t i
    cdef int k
    cdef counters *c
    memset(failed, 0, sizeof(failed))
    memset(connect, 0, sizeof(connect))
    for i in range(threads):
        c = <counters *>&of[i]
        ended += fp_peek(&c.ended)
        closed += fp_peek(&c.closed)
    for i in range(threads):
        c = <counters *>&of[i]
        opened += fp_peek(&c.opened)
        begun += fp_peek(&c.begun)
        retried += fp_peek(&c.retried)
        into += fp_peek(&c.bytes_in)
        out += fp_peek(&c.bytes_out)
        packets_in += fp_peek(&c.packets_in)
        packets_out += fp_peek(&c.packets_out)
        spent += fp_peek(&c.connect_ns)
        for k in range(CAUSES):
            failed[k] += fp_peek(&c.failed[k])
        for k in range(BUCKETS):
            connect[k] += fp_peek(&c.connect[k])
    return (begun, ended, opened, closed, retried, tuple([failed[k] for k in range(CAUSES)]), into, out, packets_in,
            packets_out, tuple([connect[k] for k in range(BUCKETS)]), spent)


cdef void gather(const counters *of, uint32_t threads, uint64_t *out, size_t step) noexcept nogil:
    """Add counters to a row of `out`, one column every `step`. Ends are read before beginnings."""
    cdef uint32_t i
    cdef int k
    cdef counters *c
    for i in range(threads):
        out[step] += fp_peek(&(<counters *>&of[i]).closed)
    for i in range(threads):
        c = <counters *>&of[i]
        out[0] += fp_peek(&c.opened)
        out[2 * step] += fp_peek(&c.retried)
        out[3 * step] += fp_peek(&c.bytes_in)
        out[4 * step] += fp_peek(&c.bytes_out)
        out[5 * step] += fp_peek(&c.packets_in)
        out[6 * step] += fp_peek(&c.packets_out)
        out[7 * step] += fp_peek(&c.connect_ns)
        for k in range(CAUSES):
            out[(PLAIN + k) * step] += fp_peek(&c.failed[k])
        for k in range(BUCKETS):
            out[(PLAIN + CAUSES + k) * step] += fp_peek(&c.connect[k])
