# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint32_t

from mesh.fastpath.types cimport conn, pipe, side, worker

cdef void pipe_destroy(worker *w, pipe *p) noexcept nogil
cdef void pipe_put(worker *w, side *s) noexcept nogil
cdef void buffer_free(worker *w, side *s) noexcept nogil
cdef bint buffer_append(worker *w, side *s, const void *data, uint32_t length) noexcept nogil
cdef bint pending(const side *s) noexcept nogil
cdef ssize_t side_send(side *to, const void *data, uint32_t length) noexcept nogil
cdef int pump(worker *w, conn *c, side *source, side *to) noexcept nogil
