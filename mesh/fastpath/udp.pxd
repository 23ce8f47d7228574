# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint8_t, uint32_t

from mesh.fastpath.types cimport listener, session, worker

cdef void on_datagrams(worker *w, listener *l) noexcept nogil
cdef void on_session(worker *w, session *s, uint32_t events) noexcept nogil
cdef void sessions_enforce(worker *w) noexcept nogil
cdef void sessions_expire(worker *w) noexcept nogil
cdef void sessions_forget(worker *w, const uint8_t *gone) noexcept nogil
cdef void sessions_leave(worker *w, listener *l) noexcept nogil
