# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint32_t

from mesh.fastpath.types cimport conn, listener, worker

cdef bint accept_one(worker *w, listener *l) noexcept nogil
cdef void on_listener(worker *w, listener *l) noexcept nogil
cdef void on_client(worker *w, conn *c, uint32_t events) noexcept nogil
