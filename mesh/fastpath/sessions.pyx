# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""UDP sessions of one thread: by flow (chained hash table), and in order of their last datagram."""

from libc.stdint cimport uint64_t
from libc.string cimport memcmp

from mesh.fastpath.pool cimport pool_give, pool_take
from mesh.fastpath.sys cimport fp_count
from mesh.fastpath.types cimport KIND_SESSION


cdef session *session_find(worker *w, const mesh_flow *flow, uint32_t key, const listener *l) noexcept nogil:
    cdef session *s = w.table[key & (w.buckets - 1)]
    cdef uint64_t others = 0
    while s is not NULL:
        if s.key == key and s.listener is l and memcmp(&s.flow, flow, sizeof(mesh_flow)) == 0:
            break
        s = s.chain
        others += 1
    if others:
        fp_count(&w.totals.udp_chained, others)
    return s


cdef session *session_new(worker *w) noexcept nogil:
    cdef session *s = <session *>pool_take(&w.sessions)
    if s is not NULL:
        s.kind = KIND_SESSION
        s.fd = -1
    return s


cdef void session_queue(worker *w, session *s) noexcept nogil:
    s.newer = NULL
    s.older = w.newest
    if w.newest is not NULL:
        w.newest.newer = s
    else:
        w.oldest = s
    w.newest = s


cdef void session_dequeue(worker *w, session *s) noexcept nogil:
    if s.older is not NULL:
        s.older.newer = s.newer
    else:
        w.oldest = s.newer
    if s.newer is not NULL:
        s.newer.older = s.older
    else:
        w.newest = s.older


cdef void session_link(worker *w, session *s, uint32_t key) noexcept nogil:
    cdef uint32_t bucket = key & (w.buckets - 1)
    s.key = key
    s.seen = w.now
    s.chain = w.table[bucket]
    w.table[bucket] = s
    session_queue(w, s)


cdef void session_unlink(worker *w, session *s) noexcept nogil:
    cdef session **place = &w.table[s.key & (w.buckets - 1)]
    while place[0] is not s:
        place = &place[0].chain
    place[0] = s.chain
    session_dequeue(w, s)


cdef void session_touch(worker *w, session *s) noexcept nogil:
    if s.dead:
        return
    s.seen = w.now
    if w.newest is not s:
        session_dequeue(w, s)
        session_queue(w, s)


cdef void session_bury(worker *w, session *s) noexcept nogil:
    """Free the session when this batch of events is over."""
    s.dead = 1
    s.chain = w.dead_sessions
    w.dead_sessions = s


cdef void sessions_reap(worker *w) noexcept nogil:
    cdef session *s
    while w.dead_sessions is not NULL:
        s = w.dead_sessions
        w.dead_sessions = s.chain
        pool_give(&w.sessions, s)
