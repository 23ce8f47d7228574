# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Registration of sockets with epoll: edge-triggered, both directions, once for the life of a socket.

A source that is faster than the other side would wake the thread with every segment for nothing. It is muted until it
has been read empty.
"""

from libc.stdint cimport uint32_t

from mesh.fastpath.sys cimport (
    EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_MOD, SOL_SOCKET, SO_OOBINLINE,
    epoll_ctl, epoll_event, setsockopt)
from mesh.fastpath.types cimport INLINE, MUTED, URGENT


cdef bint set_interest(worker *w, side *s, int how, uint32_t more) noexcept nogil:
    """Ask for edges of writability and of ends, and for `more`. False: no memory, or the user's limit is reached."""
    cdef epoll_event event
    event.events = EPOLLOUT | EPOLLRDHUP | EPOLLET | more
    event.data.ptr = s
    return epoll_ctl(w.epoll, how, s.fd, &event) == 0


cdef bint watch(worker *w, side *s) noexcept nogil:
    """Register a socket. False: no memory, or the user's limit of watched descriptors is reached."""
    return set_interest(w, s, EPOLL_CTL_ADD, EPOLLIN | EPOLLPRI)


cdef void inline_urgent(side *s) noexcept nogil:
    """Read urgent data (deprecated by RFC 6093) in line."""
    cdef int on = 1
    if s.flags & INLINE:
        return
    setsockopt(s.fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
    s.flags |= INLINE


cdef void read_urgent(side *s) noexcept nogil:
    inline_urgent(s)
    s.flags |= URGENT


cdef void mute(worker *w, side *s) noexcept nogil:
    """Stop events for bytes, urgent ones included (each of those wakes the thread too); ends are still reported."""
    inline_urgent(s)
    if set_interest(w, s, EPOLL_CTL_MOD, 0):
        s.flags |= MUTED


cdef void unmute(worker *w, side *s) noexcept nogil:
    """Resume events, after the socket was read empty. Bytes that arrived since are reported at once."""
    if set_interest(w, s, EPOLL_CTL_MOD, EPOLLIN | EPOLLPRI):
        s.flags &= ~MUTED
