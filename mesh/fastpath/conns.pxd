# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint8_t

from mesh.fastpath.types cimport conn, frontend, worker

cdef conn *conn_new(worker *w, frontend *f, int fd) noexcept nogil
cdef void conn_free_later(worker *w, conn *c) noexcept nogil
cdef void conns_reap(worker *w) noexcept nogil
cdef void list_append(worker *w, conn *c, uint8_t which) noexcept nogil
cdef void list_remove(worker *w, conn *c) noexcept nogil
cdef void ready_append(worker *w, conn *c) noexcept nogil
cdef conn *ready_take(worker *w) noexcept nogil
