# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The lists that hold connections: all, timers (each ordered by time), ready."""

from mesh.fastpath.pool cimport pool_give, pool_take
from mesh.fastpath.types cimport (
    CONNECTING, KIND_BACKEND, KIND_CLIENT, LIST_CONNECTING, LIST_NONE, LIST_YOUNG, NODELAY, WRITABLE, conn_list)


cdef conn *conn_new(worker *w, frontend *f, int fd) noexcept nogil:
    """A connection of an accepted client, or NULL: no memory."""
    cdef conn *c = <conn *>pool_take(&w.conns)
    if c is NULL:
        return NULL
    c.client.kind = KIND_CLIENT
    c.client.flags = WRITABLE | NODELAY  # the listener's options are inherited
    c.client.fd = fd
    c.client.conn = c
    c.backend.kind = KIND_BACKEND
    c.backend.fd = -1
    c.backend.conn = c
    c.state = CONNECTING
    c.frontend = f
    c.next = w.all
    if w.all is not NULL:
        w.all.previous = c
    w.all = c
    return c


cdef void conn_free_later(worker *w, conn *c) noexcept nogil:
    """Take it off the list of all. Its memory is reused after this batch of events, which may still name it."""
    if c.previous is not NULL:
        c.previous.next = c.next
    else:
        w.all = c.next
    if c.next is not NULL:
        c.next.previous = c.previous
    c.previous = NULL
    c.next = w.dead
    w.dead = c


cdef void conns_reap(worker *w) noexcept nogil:
    """Free the connections that ended during the batch, except those still on the ready list."""
    cdef conn *c = w.dead
    cdef conn *kept = NULL
    cdef conn *next
    while c is not NULL:
        next = c.next
        if c.queued:
            c.next = kept
            kept = c
        else:
            pool_give(&w.conns, c)
        c = next
    w.dead = kept


cdef conn_list *list_of(worker *w, uint8_t which) noexcept nogil:
    if which == LIST_CONNECTING:
        return &w.connecting
    return &w.young if which == LIST_YOUNG else &w.idle


cdef void list_append(worker *w, conn *c, uint8_t which) noexcept nogil:
    cdef conn_list *l = list_of(w, which)
    c.listed = which
    c.timer_next = NULL
    c.timer_previous = l.tail
    if l.tail is not NULL:
        l.tail.timer_next = c
    else:
        l.head = c
    l.tail = c


cdef void list_remove(worker *w, conn *c) noexcept nogil:
    cdef conn_list *l
    if c.listed == LIST_NONE:
        return
    l = list_of(w, c.listed)
    if c.timer_previous is not NULL:
        c.timer_previous.timer_next = c.timer_next
    else:
        l.head = c.timer_next
    if c.timer_next is not NULL:
        c.timer_next.timer_previous = c.timer_previous
    else:
        l.tail = c.timer_previous
    c.listed = LIST_NONE


cdef void ready_append(worker *w, conn *c) noexcept nogil:
    """Give the connection another turn although no event will come."""
    if c.queued:
        return
    c.queued = 1
    c.ready_next = NULL
    if w.ready_tail is not NULL:
        w.ready_tail.ready_next = c
    else:
        w.ready_head = c
    w.ready_tail = c


cdef conn *ready_take(worker *w) noexcept nogil:
    cdef conn *c = w.ready_head
    if c is not NULL:
        w.ready_head = c.ready_next
        if w.ready_head is NULL:
            w.ready_tail = NULL
        c.queued = 0
    return c
