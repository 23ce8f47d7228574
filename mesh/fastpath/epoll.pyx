# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""What epoll tells about a socket: every edge of every direction, from one registration for its whole life.

A source that delivers faster than the other side takes would wake the thread with every segment, in vain: it is muted
until it was read empty.
"""

from libc.stdint cimport uint32_t

from mesh.fastpath.sys cimport (
    EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_MOD, SOL_SOCKET, SO_OOBINLINE,
    epoll_ctl, epoll_event, setsockopt)
from mesh.fastpath.types cimport INLINE, MUTED, URGENT


cdef bint set_interest(worker *w, side *s, int how, uint32_t more) noexcept nogil:
    """Be told of room and of ends, each edge once, and of `more`. False: no memory, or a bound of the user."""
    cdef epoll_event event
    event.events = EPOLLOUT | EPOLLRDHUP | EPOLLET | more
    event.data.ptr = s
    return epoll_ctl(w.epoll, how, s.fd, &event) == 0


cdef bint watch(worker *w, side *s) noexcept nogil:
    """Register a socket. False: no memory, or the user's bound of watched descriptors."""
    return set_interest(w, s, EPOLL_CTL_ADD, EPOLLIN | EPOLLPRI)


cdef void inline_urgent(side *s) noexcept nogil:
    """Let urgent data (RFC 6093: obsolete) be read in its place."""
    cdef int on = 1
    if s.flags & INLINE:
        return
    setsockopt(s.fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
    s.flags |= INLINE


cdef void read_urgent(side *s) noexcept nogil:
    inline_urgent(s)
    s.flags |= URGENT


cdef void mute(worker *w, side *s) noexcept nogil:
    """No news of bytes (a wake-up for urgent ones is one for all, so not of them either), but still of ends."""
    inline_urgent(s)
    if set_interest(w, s, EPOLL_CTL_MOD, 0):
        s.flags |= MUTED


cdef void unmute(worker *w, side *s) noexcept nogil:
    """Once it was read empty. What came since then is told at once."""
    if set_interest(w, s, EPOLL_CTL_MOD, EPOLLIN | EPOLLPRI):
        s.flags &= ~MUTED
