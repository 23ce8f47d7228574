# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from mesh.fastpath.types cimport backend, engine

cdef void keep_alive(int fd) noexcept nogil
cdef void probe_now(int fd) noexcept nogil
cdef void allow_reuse(int fd) noexcept nogil
cdef void set_reset(int fd) noexcept nogil
cdef int connect_reusing_port(engine *e, int fd, backend *b) noexcept nogil
