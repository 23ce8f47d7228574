# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint32_t

from mesh._maglev cimport mesh_flow
from mesh.fastpath.types cimport listener, session, worker

cdef session *session_find(worker *w, const mesh_flow *flow, uint32_t key, const listener *l) noexcept nogil
cdef session *session_new(worker *w) noexcept nogil
cdef void session_link(worker *w, session *s, uint32_t key) noexcept nogil
cdef void session_unlink(worker *w, session *s) noexcept nogil
cdef void session_touch(worker *w, session *s) noexcept nogil
cdef void session_bury(worker *w, session *s) noexcept nogil
cdef void sessions_reap(worker *w) noexcept nogil
