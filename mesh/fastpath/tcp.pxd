# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The life of a TCP connection: accept, choose, connect, try again, forward, end. Each belongs to one thread."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memset

from mesh.fastpath.conns cimport (
    conn_free_later, conn_new, list_append, list_remove, ready_append, set_reset)
from mesh.fastpath.proxyproto cimport HEADER_MOST, announce
from mesh.fastpath.select cimport cause_of, choose, from_sockaddr, hash_of, is_scarce, permitted
from mesh.fastpath.sys cimport (
    AF_INET6, EADDRINUSE, EADDRNOTAVAIL, EAGAIN, ECONNABORTED, EINPROGRESS, EINTR, EPIPE, EPOLLERR, EPOLLET, EPOLLHUP,
    EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_MOD, ETIMEDOUT, MSG_NOSIGNAL, SHUT_WR, SOCK_CLOEXEC,
    SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET, SO_ERROR, SO_OOBINLINE, accept4, close, connect, epoll_ctl, epoll_event, errno, fp_add,
    fp_count, fp_likely, fp_load, fp_now, fp_unlikely, getsockname, getsockopt, recv, setsockopt, shutdown, sockaddr, sockaddr_in6,
    socket, socklen_t)
from mesh.fastpath.keep cimport allow_reuse, connect_reusing, keep_alive
from mesh.fastpath.stream cimport buffer_put, pending, pipe_put, pump, say, store
from mesh.fastpath.types cimport (
    ACCEPT_CALM, ACCEPT_MOST, BROKEN, BUCKETS, BULK, CONNECTING, DEAD, ENDED, FAIL_DENIED, FAIL_LIMIT, FAIL_NO_BACKEND, FAIL_OTHER,
    FAIL_TIMEOUT, HANGUP, KIND_CLIENT, LIST_CONNECTING, LIST_IDLE, LIST_YOUNG, NODELAY, OPEN, PUMP_BROKEN, PUMP_MORE,
    READABLE, SCRATCH, SHUT, SPOKEN, TRIES_MOST, URGENT, WRITABLE, backend, conn, counters, engine, frontend, listener, pair, route,
    side, target, worker)

cdef enum:
    PAUSE_NS = 50000000
    DIALS_MOST = 8


cdef inline int bucket_of(uint64_t ns) noexcept nogil:
    """Index in mesh.datapath.base.CONNECT_BUCKETS, the last for +Inf."""
    cdef uint64_t[14] bounds = [
        100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 25000000, 50000000, 100000000, 250000000,
        500000000, 1000000000, 3000000000]
    cdef int i
    for i in range(BUCKETS - 1):
        if ns <= bounds[i]:
            return i
    return BUCKETS - 1


cdef inline bint watch(worker *w, side *s) noexcept nogil:
    """One registration for the life of the socket: every edge of every direction."""
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLET
    event.data.ptr = s
    return epoll_ctl(w.epoll, EPOLL_CTL_ADD, s.fd, &event) == 0


cdef inline void pause(worker *w) noexcept nogil:
    """Take no more connections for a moment; they wait in the kernel's queue."""
    cdef epoll_event event
    cdef listener *l = w.listeners
    w.resume_at = fp_now() + PAUSE_NS
    if w.paused:
        return
    w.paused = 1
    fp_count(&w.totals.paused, 1)
    fp_count(&w.totals.accept_pauses, 1)
    while l is not NULL:
        if l.armed and l.stream:
            event.events = 0
            event.data.ptr = l
            epoll_ctl(w.epoll, EPOLL_CTL_MOD, l.fd, &event)
        l = l.next


cdef inline void resume(worker *w) noexcept nogil:
    cdef epoll_event event
    cdef listener *l = w.listeners
    w.paused = 0
    fp_count(&w.totals.paused, -1)
    while l is not NULL:
        if l.armed and l.stream:
            event.events = EPOLLIN
            event.data.ptr = l
            epoll_ctl(w.epoll, EPOLL_CTL_MOD, l.fd, &event)
        l = l.next


cdef inline void fail(worker *w, conn *c, int cause) noexcept nogil:
    """Count what the client sees."""
    fp_count(&c.frontend.counts[w.index].failed[cause], 1)


cdef inline void finish(worker *w, conn *c, bint reset) noexcept nogil:
    """End a connection, by a reset of both sides or as it stands. Its memory stays valid until the batch is over."""
    cdef counters *counts
    if c.state == DEAD:
        return
    list_remove(w, c)
    if c.pair is not NULL:
        counts = &c.pair.counts[w.index]
        if c.state == OPEN:
            fp_count(&counts.closed, 1)
        fp_count(&counts.ended, 1)
    if c.state == CONNECTING:
        fp_count(&w.totals.connecting, -1)
    if c.client.fd >= 0:
        if reset:
            set_reset(c.client.fd)
        close(c.client.fd)
    if c.backend.fd >= 0:
        if reset and c.state == OPEN:
            set_reset(c.backend.fd)
        close(c.backend.fd)
    pipe_put(w, &c.client)
    pipe_put(w, &c.backend)
    buffer_put(w, &c.client)
    buffer_put(w, &c.backend)
    c.client.fd = c.backend.fd = -1
    c.state = DEAD
    fp_add(&w.engine.connections, -1)
    fp_count(&w.totals.connections, -1)
    conn_free_later(w, c)


cdef inline void opened(worker *w, conn *c) noexcept nogil:
    """The backend has answered."""
    cdef counters *counts = &c.pair.counts[w.index]
    cdef uint64_t now = fp_now()
    cdef uint64_t took = now - c.started
    c.state = OPEN
    c.backend.flags |= WRITABLE
    fp_count(&w.totals.connecting, -1)
    fp_count(&counts.opened, 1)
    fp_count(&counts.connect[bucket_of(took)], 1)
    fp_count(&counts.connect_ns, took)
    fp_count(&counts.bytes_in, c.client.length - c.header)
    list_remove(w, c)
    c.started = now
    if w.engine.idle_ns:
        keep_alive(c.backend.fd)
        list_append(w, c, LIST_IDLE)
    else:
        list_append(w, c, LIST_YOUNG)


cdef inline int dial(worker *w, conn *c, backend *b) noexcept nogil:
    """Start to connect. Returns 0, or the errno."""
    cdef int fd, error, turn
    cdef bint fresh = True
    c.started = fp_now()
    for turn in range(DIALS_MOST):
        fd = socket(b.address.sin6_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd < 0:
            return errno
        if not fresh:
            error = connect_reusing(w.engine, fd, b)
        elif connect(fd, <const sockaddr *>&b.address, b.length) == 0:
            error = 0
        else:
            error = errno
        if error == 0 or error == EINPROGRESS:
            c.backend.fd = fd
            c.backend.flags = 0
            return 0
        close(fd)
        if error != EADDRNOTAVAIL:
            return error
        fresh = False  # every port towards this backend is in use or in TIME_WAIT
    return error


cdef inline void attempt_failed(worker *w, conn *c, int cause) noexcept nogil:
    cdef counters *counts = &c.pair.counts[w.index]
    fp_count(&counts.failed[cause], 1)
    fp_count(&counts.ended, 1)
    if c.backend.fd >= 0:
        close(c.backend.fd)
        c.backend.fd = -1
    list_remove(w, c)


cdef inline backend *attempt(worker *w, conn *c, int cause) noexcept nogil:
    """Connect to the flow's next choice; `cause` is why the one before failed. NULL: nobody is left, c is over.

    The socket is not yet watched. What is returned may be gone at the next event: another thread drops backends.
    """
    cdef engine *e = w.engine
    cdef route *way
    cdef target *t
    cdef backend *b = NULL
    cdef pair *left = c.pair
    cdef int error
    while c.tries <= e.retries:
        way = <route *>fp_load(&c.frontend.route)
        t = choose(e, way, c.hash, &c.again, c.tried, c.tries, &b)
        if t is NULL:
            break
        if left is not NULL:
            fp_count(&left.counts[w.index].retried, 1)
        c.tried[c.tries] = t.backend
        c.tries += 1
        c.pair = left = t.pair
        fp_count(&t.pair.counts[w.index].begun, 1)
        error = dial(w, c, b)
        if error == 0:
            list_append(w, c, LIST_CONNECTING)
            return b
        cause = cause_of(error)
        attempt_failed(w, c, cause)
        if is_scarce(error):
            pause(w)
            break
    c.pair = NULL  # its attempts are all counted
    fail(w, c, cause)
    finish(w, c, True)
    return NULL


cdef inline void retry(worker *w, conn *c, int cause) noexcept nogil:
    """The backend refused, or did not answer in time: on to the next."""
    attempt_failed(w, c, cause)
    if attempt(w, c, cause) is not NULL and not watch(w, &c.backend):
        attempt_failed(w, c, FAIL_LIMIT)
        c.pair = NULL
        fail(w, c, FAIL_LIMIT)
        finish(w, c, True)


cdef inline int error_of(int fd) noexcept nogil:
    cdef int error = 0
    cdef socklen_t length = sizeof(error)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0:
        return errno
    return error


cdef inline void broken(worker *w, conn *c, int error) noexcept nogil:
    """An established connection was reset, or its peer vanished: the other side is reset too."""
    cdef int cause = cause_of(error)
    fail(w, c, cause)
    fp_count(&c.pair.counts[w.index].failed[cause], 1)
    finish(w, c, True)


cdef inline void service(worker *w, conn *c) noexcept nogil:
    """Move what can be moved, pass ends on, end the connection when both directions are over."""
    cdef side *client = &c.client
    cdef side *behind = &c.backend
    cdef int out, into
    cdef int error = 0
    cdef bint no_more, no_reply
    into = pump(w, c, client, behind)
    if into == PUMP_BROKEN:
        error = errno
    out = pump(w, c, behind, client)
    if out == PUMP_BROKEN and error == 0:
        error = errno
    if fp_unlikely((client.flags | behind.flags) & BROKEN):
        error = error_of(client.fd if client.flags & BROKEN else behind.fd) or error or EPIPE
    if fp_unlikely(error != 0):
        broken(w, c, error)
        return
    no_more = client.flags & ENDED and not pending(client)
    no_reply = behind.flags & ENDED and not pending(behind)
    if no_more and no_reply:
        finish(w, c, False)
        return
    if no_more and not behind.flags & SHUT:
        allow_reuse(behind.fd)  # who ends first keeps the port in TIME_WAIT
        shutdown(behind.fd, SHUT_WR)
        behind.flags |= SHUT
    if no_reply and not client.flags & SHUT:
        shutdown(client.fd, SHUT_WR)
        client.flags |= SHUT
    if into == PUMP_MORE or out == PUMP_MORE:
        ready_append(w, c)


cdef inline void urgent(side *s) noexcept nogil:
    """Urgent data (RFC 6093: obsolete) goes on in line, in its place."""
    cdef int on = 1
    setsockopt(s.fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
    s.flags |= URGENT


cdef inline void note(worker *w, conn *c, side *s, uint32_t events) noexcept nogil:
    if fp_unlikely(w.engine.idle_ns != 0) and c.state == OPEN:
        list_remove(w, c)
        c.started = w.now
        list_append(w, c, LIST_IDLE)
    if events & (EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        s.flags |= READABLE
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            s.flags |= HANGUP
            if events & EPOLLERR:
                s.flags |= BROKEN
        if fp_unlikely(events & EPOLLPRI):
            urgent(s)
    if events & EPOLLOUT:
        s.flags |= WRITABLE


cdef inline void on_client(worker *w, conn *c, uint32_t events) noexcept nogil:
    if c.state == DEAD:
        return
    note(w, c, &c.client, events)
    if fp_likely(c.state == OPEN):
        service(w, c)
    elif c.client.flags & BROKEN:  # the client left before the backend had answered
        fail(w, c, FAIL_OTHER)
        finish(w, c, True)


cdef inline void on_backend(worker *w, conn *c, uint32_t events) noexcept nogil:
    cdef int error
    if c.state == DEAD:
        return
    if fp_unlikely(c.state == CONNECTING):
        if events & (EPOLLERR | EPOLLHUP):
            error = error_of(c.backend.fd)
            retry(w, c, cause_of(error))
            return
        if not events & EPOLLOUT:
            return
        opened(w, c)
    note(w, c, &c.backend, events)
    service(w, c)


cdef inline int speak_early(worker *w, conn *c, backend *b) noexcept nogil:
    """Read what the client has sent already. Where the handshake with the backend is over by then (on one host it
    is), pass it on at once. Returns 0, the errno of the backend's socket, or -1: the client is gone."""
    cdef ssize_t n = recv(c.client.fd, w.scratch, SCRATCH, 0)
    cdef ssize_t sent = 0
    cdef int error = 0
    if n < 0:
        return 0 if errno == EAGAIN or errno == EINTR else -1
    if n == 0:
        c.client.flags |= ENDED
        return 0
    if n == SCRATCH:
        c.client.flags |= READABLE | BULK
    if c.header == 0 and (b.near or c.hash & 63 == 0):
        sent = say(&c.backend, w.scratch, <uint32_t>n)
        if sent < 0:
            error = 0 if errno == EAGAIN else errno
            c.backend.flags &= ~SPOKEN
            sent = 0
        b.near = sent != 0
    if sent != n and not store(w, &c.client, w.scratch + sent, <uint32_t>(n - sent)):
        return -1
    if sent:
        opened(w, c)
        fp_count(&c.pair.counts[w.index].bytes_in, sent)
        if sent != n:
            c.backend.flags &= ~WRITABLE
    return error


cdef inline void start(worker *w, conn *c, route *way) noexcept nogil:
    """A connection was accepted: find its backend and begin."""
    cdef char header[HEADER_MOST]
    cdef backend *b
    cdef int error
    if way.announce:
        c.header = announce(&c.flow, <uint8_t *>header)
        if not store(w, &c.client, header, c.header):
            fail(w, c, FAIL_LIMIT)
            finish(w, c, True)
            return
    c.hash = hash_of(way, &c.flow)
    b = attempt(w, c, FAIL_NO_BACKEND)
    if b is NULL:
        return
    error = speak_early(w, c, b)
    if error < 0:
        fail(w, c, FAIL_OTHER)
        finish(w, c, True)
        return
    if error > 0:
        attempt_failed(w, c, cause_of(error))
        if attempt(w, c, cause_of(error)) is NULL:
            return
    if not watch(w, &c.backend) or not watch(w, &c.client):
        pause(w)
        fail(w, c, FAIL_LIMIT)
        finish(w, c, True)


cdef inline void accepted(worker *w, listener *l, int fd, const sockaddr_in6 *name) noexcept nogil:
    cdef frontend *f = l.frontend
    cdef route *way = <route *>fp_load(&f.route)
    cdef conn *c = conn_new(w, f, fd)
    cdef sockaddr_in6 called
    cdef socklen_t length = sizeof(called)
    cdef uint16_t ignored
    if c is NULL:
        fp_add(&w.engine.connections, -1)
        fp_count(&f.counts[w.index].failed[FAIL_LIMIT], 1)
        set_reset(fd)
        close(fd)
        pause(w)
        return
    fp_count(&w.totals.connections, 1)
    fp_count(&w.totals.connecting, 1)
    from_sockaddr(name, &c.flow.source, &c.flow.source_port)
    c.flow.destination = f.address
    c.flow.destination_port = f.port
    c.flow.protocol = 6
    if way is NULL or not permitted(way, &c.flow.source):
        fail(w, c, FAIL_NO_BACKEND if way is NULL else FAIL_DENIED)
        finish(w, c, True)
        return
    if f.any and (way.announce or not way.by_client):
        if getsockname(fd, <sockaddr *>&called, &length) == 0:
            from_sockaddr(&called, &c.flow.destination, &ignored)
    start(w, c, way)


cdef inline bint accept_one(worker *w, listener *l) noexcept nogil:
    """Take one connection from the queue. False: there is none, or none may be taken now."""
    cdef engine *e = w.engine
    cdef sockaddr_in6 name
    cdef socklen_t length = sizeof(name)
    cdef int fd
    if fp_unlikely(fp_add(&e.connections, 1) >= e.connections_most):
        fp_add(&e.connections, -1)
        pause(w)
        return False
    fd = accept4(l.fd, <sockaddr *>&name, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if fp_likely(fd >= 0):
        accepted(w, l, fd, &name)
        return True
    fp_add(&e.connections, -1)
    if errno == EAGAIN:
        return False
    if errno == EINTR or errno == ECONNABORTED:
        return True
    fp_count(&w.totals.accept_errors, 1)
    pause(w)
    return False


cdef inline void on_listener(worker *w, listener *l) noexcept nogil:
    """Accept a batch; its size follows the load, so that lone connections cost few second accept4."""
    cdef uint32_t taken = 0
    while taken < l.burst:
        if w.paused or not accept_one(w, l):
            l.burst = taken if taken > 1 else 1
            l.calm = ACCEPT_CALM
            return
        taken += 1
    if l.calm:
        l.calm -= 1
    elif l.burst < ACCEPT_MOST:
        l.burst *= 2


cdef inline void on_timers(worker *w) noexcept nogil:
    """Connect timeouts, keep-alive for connections that have lasted a second, idle ends."""
    cdef engine *e = w.engine
    cdef conn *c = w.connecting.head
    while c is not NULL and c.started + e.connect_ns <= w.now:
        retry(w, c, FAIL_TIMEOUT)
        c = w.connecting.head
    c = w.young.head
    while c is not NULL and c.started + 1000000000 <= w.now:
        list_remove(w, c)
        keep_alive(c.backend.fd)
        c = w.young.head
    c = w.idle.head
    while c is not NULL and c.started + e.idle_ns <= w.now:
        fail(w, c, FAIL_TIMEOUT)
        fp_count(&c.pair.counts[w.index].failed[FAIL_TIMEOUT], 1)
        finish(w, c, True)
        c = w.idle.head
