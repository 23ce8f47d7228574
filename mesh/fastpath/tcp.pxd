# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from libc.stdint cimport uint8_t, uint32_t

from mesh.fastpath.types cimport backend, conn, side, worker

cdef void pause(worker *w) noexcept nogil
cdef void resume(worker *w) noexcept nogil
cdef void count_failure(worker *w, conn *c, int cause) noexcept nogil
cdef void conn_end(worker *w, conn *c, bint reset) noexcept nogil
cdef void conn_opened(worker *w, conn *c) noexcept nogil
cdef void answer_peer(conn *c, uint8_t what) noexcept nogil
cdef int dial(worker *w, conn *c, backend *b) noexcept nogil
cdef void attempt_failed(worker *w, conn *c, int cause) noexcept nogil
cdef backend *attempt(worker *w, conn *c, int cause) noexcept nogil
cdef void conn_moved(worker *w, conn *c) noexcept nogil
cdef void service(worker *w, conn *c) noexcept nogil
cdef void note_events(worker *w, conn *c, side *s, uint32_t events) noexcept nogil
cdef void on_backend(worker *w, conn *c, uint32_t events) noexcept nogil
cdef void on_timers(worker *w) noexcept nogil
