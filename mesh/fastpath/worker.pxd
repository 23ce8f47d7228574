# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint32_t

from mesh.fastpath.types cimport engine, worker

cdef void post(worker *w, int op, void *argument) noexcept nogil
cdef void await_done(worker *w) noexcept nogil
cdef void poke(worker *w) noexcept nogil
cdef void call(engine *e, int op, void *argument) noexcept nogil
cdef worker *worker_new(engine *e, uint32_t index) noexcept nogil
cdef void worker_free(worker *w) noexcept nogil
cdef bint worker_start(worker *w) noexcept nogil
