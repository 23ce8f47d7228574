# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Moves the bytes of a connection: small messages through a scratch buffer, bulk through a pipe (splice).

Sockets are non-blocking and edge-triggered. Bytes that the other side does not accept wait in `side.buffer` or
`side.pipe` of the side they came from. Nothing more is read from that side until they are gone: back-pressure.
"""

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from mesh.fastpath.epoll cimport unmute
from mesh.fastpath.proto cimport PROXY_HEADER_MAX
from mesh.fastpath.sys cimport (
    EAGAIN, EINTR, F_GETPIPE_SZ, F_SETPIPE_SZ, IPPROTO_TCP, MSG_NOSIGNAL, O_CLOEXEC, O_NONBLOCK, SPLICE_F_MOVE,
    SPLICE_F_NONBLOCK, TCP_NODELAY, close, errno, fcntl, fp_add, fp_count, fp_likely, fp_unlikely, pipe2, recv,
    send, setsockopt, splice)
from mesh.fastpath.types cimport (
    BUDGET, BULK, BULK_MIN, ENDED, HANGUP, KIND_CLIENT, MUTED, NODELAY, PIPE_MIN, PIPE_WANTED, PUMP_BROKEN,
    PUMP_IDLE, PUMP_MORE, READABLE, SCRATCH, SENT, URGENT, WRITABLE, counters)

cdef enum:
    FIRST_SMALL = 512  # a first message up to this size leaves at once without TCP_NODELAY: nothing is in flight


cdef pipe *pipe_get(worker *w) noexcept nogil:
    """An empty pipe, or NULL: the limit, descriptors or the kernel's pipe memory are exhausted."""
    cdef pipe *p = w.pipes
    cdef int size
    if p is not NULL:
        w.pipes = p.next
        fp_count(&w.totals.pipes_used, 1)
        return p
    if w.now < w.pipes_at:
        return NULL
    if fp_add(&w.engine.pipes, 1) >= w.engine.pipes_max:
        fp_add(&w.engine.pipes, -1)
        return NULL
    p = <pipe *>calloc(1, sizeof(pipe))
    if p is not NULL and pipe2(p.fds, O_NONBLOCK | O_CLOEXEC) == 0:
        size = fcntl(p.fds[0], F_SETPIPE_SZ, PIPE_WANTED)
        if size < 0:  # over the user's limit of pipe memory
            size = fcntl(p.fds[0], F_GETPIPE_SZ)
        if size >= PIPE_MIN:
            p.size = size
            fp_count(&w.totals.pipes_open, 1)
            fp_count(&w.totals.pipes_used, 1)
            return p
        close(p.fds[0])
        close(p.fds[1])
    free(p)
    fp_add(&w.engine.pipes, -1)
    fp_count(&w.totals.pipe_failures, 1)
    w.pipes_at = w.now + 1000000000
    return NULL


cdef void pipe_destroy(worker *w, pipe *p) noexcept nogil:
    close(p.fds[0])
    close(p.fds[1])
    free(p)
    fp_add(&w.engine.pipes, -1)
    fp_count(&w.totals.pipes_open, -1)


cdef void pipe_put(worker *w, side *s) noexcept nogil:
    """Return a side's pipe to the pool; one that still holds bytes is closed."""
    cdef pipe *p = s.pipe
    if p is NULL:
        return
    s.pipe = NULL
    fp_count(&w.totals.pipes_used, -1)
    if p.held:
        pipe_destroy(w, p)
        return
    p.next = w.pipes
    w.pipes = p


cdef void buffer_free(worker *w, side *s) noexcept nogil:
    if s.buffer is not NULL:
        free(s.buffer)
        fp_count(&w.totals.buffers_used, -1)
        s.buffer = NULL
    s.start = s.length = 0


cdef bint buffer_append(worker *w, side *s, const void *data, uint32_t length) noexcept nogil:
    """Keep bytes that came from `s`: at most SCRATCH bytes and a PROXY header. False: no memory."""
    if s.buffer is NULL:
        s.buffer = <char *>malloc(SCRATCH + PROXY_HEADER_MAX)
        if s.buffer is NULL:
            return False
        fp_count(&w.totals.buffers_used, 1)
        s.start = s.length = 0
    memcpy(s.buffer + s.start + s.length, data, length)
    s.length += length
    return True


cdef bint pending(const side *s) noexcept nogil:
    return s.length != 0 or (s.pipe is not NULL and s.pipe.held != 0)


cdef void count_bytes(worker *w, conn *c, const side *source, uint32_t n) noexcept nogil:
    cdef counters *counts = &c.pair.counts[w.index]
    if source.kind == KIND_CLIENT:
        fp_count(&counts.bytes_in, n)
    else:
        fp_count(&counts.bytes_out, n)


cdef void no_delay(side *s) noexcept nogil:
    cdef int on = 1
    setsockopt(s.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
    s.flags |= NODELAY


cdef ssize_t side_send(side *to, const void *data, uint32_t length) noexcept nogil:
    """send(). TCP_NODELAY is set with the second message, so that a short exchange does not pay for it."""
    cdef ssize_t n
    if not to.flags & NODELAY:
        if to.flags & SENT or length > FIRST_SMALL:
            no_delay(to)
        to.flags |= SENT
    n = send(to.fd, data, length, MSG_NOSIGNAL)
    while n < 0 and errno == EINTR:
        n = send(to.fd, data, length, MSG_NOSIGNAL)
    if fp_unlikely(n < <ssize_t>length):
        to.flags &= ~WRITABLE  # epoll reports when there is room
    return n


cdef int flush(worker *w, side *source, side *to) noexcept nogil:
    """Write to `to` what waits for it. PUMP_IDLE: it accepts no more now. PUMP_MORE: nothing waits any more."""
    cdef ssize_t n
    cdef pipe *p = source.pipe
    if not to.flags & WRITABLE:
        return PUMP_IDLE
    if source.length:
        n = side_send(to, source.buffer + source.start, source.length)
        if n < 0:
            return PUMP_IDLE if errno == EAGAIN else PUMP_BROKEN
        source.start += n
        source.length -= n
        if source.length:
            return PUMP_IDLE
        buffer_free(w, source)
    if p is not NULL and p.held:
        if not to.flags & NODELAY:
            no_delay(to)
        while p.held:
            n = splice(p.fds[0], NULL, to.fd, NULL, p.held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
            if n > 0:
                p.held -= n
                continue
            if n < 0 and errno == EINTR:
                continue
            if n < 0 and errno == EAGAIN:
                to.flags &= ~WRITABLE
                return PUMP_IDLE
            return PUMP_BROKEN
    return PUMP_MORE


cdef int read_nothing(side *source, ssize_t n) noexcept nogil:
    """A read returned no bytes: the end, nothing yet, or an error."""
    if n == 0:
        source.flags = (source.flags | ENDED) & ~READABLE
    elif errno == EAGAIN:
        source.flags &= ~READABLE
    elif errno != EINTR:
        return PUMP_BROKEN
    return PUMP_IDLE


cdef int fill_pipe(worker *w, conn *c, side *source) noexcept nogil:
    """Splice into the side's pipe. PUMP_IDLE: nothing came. PUMP_MORE: go on (bytes came, or there is no pipe)."""
    cdef ssize_t n
    if source.pipe is NULL:
        source.pipe = pipe_get(w)
        if source.pipe is NULL:
            source.flags &= ~BULK
            return PUMP_MORE
    n = splice(source.fd, NULL, source.pipe.fds[1], NULL, source.pipe.size, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if n > 0:
        source.pipe.held = <uint32_t>n
        count_bytes(w, c, source, <uint32_t>n)
        if n < BULK_MIN:
            source.flags &= ~BULK
        return PUMP_MORE
    if n == 0 or source.flags & URGENT:
        source.flags &= ~BULK  # splice() stops at an urgent mark as at the end; recv() tells them apart
        return PUMP_MORE
    return read_nothing(source, n)


cdef int forward_once(worker *w, conn *c, side *source, side *to) noexcept nogil:
    """Read once and write at once. PUMP_IDLE: nothing came, or the bytes wait for `to`."""
    cdef ssize_t n = recv(source.fd, w.scratch, SCRATCH, 0)
    cdef ssize_t sent = 0
    if fp_likely(n > 0):
        count_bytes(w, c, source, <uint32_t>n)
        if n == SCRATCH:
            source.flags |= BULK
        elif not source.flags & (URGENT | MUTED):
            # Edge-triggered: a short read has emptied the queue, and after a hang-up nothing follows.
            source.flags &= ~READABLE
            if source.flags & HANGUP:
                source.flags |= ENDED
        if to.flags & WRITABLE:
            sent = side_send(to, w.scratch, <uint32_t>n)
            if sent == n:
                return PUMP_MORE
            if sent < 0:
                if errno != EAGAIN:
                    return PUMP_BROKEN
                sent = 0
        return PUMP_IDLE if buffer_append(w, source, w.scratch + sent, <uint32_t>(n - sent)) else PUMP_BROKEN
    return read_nothing(source, n)


cdef int pump(worker *w, conn *c, side *source, side *to) noexcept nogil:
    """Move what can be moved from `source` to `to`. PUMP_MORE: there is more; others get a turn first."""
    cdef int spent = 0
    cdef int said
    while spent < BUDGET:
        if pending(source):
            said = flush(w, source, to)
            if said != PUMP_MORE:
                return said
        if not source.flags & READABLE:
            break
        if source.flags & BULK:
            spent += 4
            said = fill_pipe(w, c, source)
        else:
            spent += 1
            said = forward_once(w, c, source, to)
        if said == PUMP_BROKEN:
            return PUMP_BROKEN
    if source.pipe is not NULL and source.pipe.held == 0:
        pipe_put(w, source)
    if fp_unlikely(source.flags & (MUTED | READABLE) == MUTED):
        unmute(w, source)
    return PUMP_MORE if spent >= BUDGET and (source.flags & READABLE or pending(source)) else PUMP_IDLE
