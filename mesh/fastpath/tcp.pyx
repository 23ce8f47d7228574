# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The life of a TCP connection: connect, retry, forward, end. A connection belongs to one thread."""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memmove

from mesh.fastpath.choose cimport choose
from mesh.fastpath.conns cimport conn_free_later, list_append, list_remove, ready_append
from mesh.fastpath.epoll cimport mute, read_urgent, watch
from mesh.fastpath.failure cimport cause_of, is_scarce
from mesh.fastpath.proto cimport (
    PEER_HEADER_MAX, PEER_NO, PEER_YES, PROXY_HEADER_MAX, peer_cause, peer_header, proxy_header)
from mesh.fastpath.sockopts cimport allow_reuse, connect_reusing_port, keep_alive, probe_now, set_reset
from mesh.fastpath.stream cimport buffer_append, buffer_free, pending, pipe_put, pump
from mesh.fastpath.sys cimport (
    EADDRNOTAVAIL, EAGAIN, EINPROGRESS, EINTR, EPIPE, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP,
    EPOLL_CTL_MOD, IPPROTO_TCP, MSG_NOSIGNAL, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET,
    SO_ERROR, SO_MARK, TCP_QUICKACK, close, connect, epoll_ctl, epoll_event, errno, fp_add, fp_count, fp_load, fp_now,
    fp_unlikely, getsockopt, recv, send, setsockopt, shutdown, sockaddr, socket, socklen_t)
from mesh.fastpath.tables cimport backend_aside
from mesh.fastpath.types cimport (
    BROKEN, BUCKETS, BULK, CONNECTING, DEAD, ENDED, FAIL_LIMIT, FAIL_OTHER, FAIL_RESET, FAIL_TIMEOUT, HANGUP,
    LIST_CONNECTING, LIST_IDLE, LIST_YOUNG, MUTED, OPEN, PUMP_BROKEN, PUMP_MORE, READABLE, SHUT, STAGE_ANSWER,
    STAGE_HEADER, STAGE_NONE, TAG_SIZE, WRITABLE, counters, engine, listener, pair, peer_acl, route, target)

cdef enum:
    PAUSE_NS = 50000000
    DIALS_MAX = 8


cdef int bucket_of(uint64_t ns) noexcept nogil:
    """Index into mesh.datapath.base.CONNECT_BUCKETS; the last is +Inf."""
    cdef uint64_t[14] bounds = [
        100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 25000000, 50000000, 100000000, 250000000,
        500000000, 1000000000, 3000000000]
    cdef int i
    for i in range(BUCKETS - 1):
        if ns <= bounds[i]:
            return i
    return BUCKETS - 1


cdef void pause(worker *w) noexcept nogil:
    """Stop accepting for PAUSE_NS; clients wait in the kernel's queue."""
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


cdef void resume(worker *w) noexcept nogil:
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


cdef void count_failure(worker *w, conn *c, int cause) noexcept nogil:
    """Count a failure that the client sees."""
    fp_count(&c.frontend.counts[w.index].failed[cause], 1)


cdef void conn_end(worker *w, conn *c, bint reset) noexcept nogil:
    """Close both sides, by a reset or in order. The memory stays valid until the batch of events is over."""
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
    buffer_free(w, &c.client)
    buffer_free(w, &c.backend)
    c.client.fd = c.backend.fd = -1
    c.state = DEAD
    fp_add(&w.engine.connections, -1)
    fp_count(&w.totals.connections, -1)
    conn_free_later(w, c)


cdef void conn_opened(worker *w, conn *c) noexcept nogil:
    """The connection to the backend is established."""
    cdef counters *counts = &c.pair.counts[w.index]
    cdef uint64_t now = fp_now()
    cdef uint64_t took = now - c.started
    c.state = OPEN
    c.backend.flags |= WRITABLE
    fp_count(&w.totals.connecting, -1)
    fp_count(&counts.opened, 1)
    fp_count(&counts.connect[bucket_of(took)], 1)
    fp_count(&counts.connect_ns, took)
    fp_count(&counts.bytes_in, c.client.length)
    list_remove(w, c)
    c.started = now
    if w.engine.idle_ns:
        keep_alive(c.backend.fd)
        list_append(w, c, LIST_IDLE)
    else:
        list_append(w, c, LIST_YOUNG)
    if c.announce and not c.remote and not prepend_proxy_header(w, c):
        c.client.flags |= BROKEN
    if c.frontend.peers is not NULL:
        answer_peer(c, PEER_YES)


cdef bint prepend_proxy_header(worker *w, conn *c) noexcept nogil:
    """Put a PROXY protocol header before the client's first bytes. False: no memory."""
    cdef uint8_t header[PROXY_HEADER_MAX]
    cdef uint32_t length = proxy_header(&c.flow, header)
    if c.client.length:
        memmove(c.client.buffer + length, c.client.buffer + c.client.start, c.client.length)
        memcpy(c.client.buffer, header, length)
        c.client.start = 0
        c.client.length += length
        return True
    return buffer_append(w, &c.client, header, length)


cdef void answer_peer(conn *c, uint8_t what) noexcept nogil:
    """Send the result to the node that hands the connection over. One byte always fits."""
    send(c.client.fd, &what, 1, MSG_NOSIGNAL)


cdef void delay_handshake_ack(int fd) noexcept nogil:
    """Send the last acknowledgement of the handshake with the first bytes: one packet less."""
    cdef int off = 0
    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &off, sizeof(off))


cdef int dial(worker *w, conn *c, backend *b) noexcept nogil:
    """Start to connect. Returns 0, or the errno."""
    cdef int fd, error, turn
    cdef bint fresh = True
    c.started = fp_now()
    for turn in range(DIALS_MAX):
        fd = socket(b.address.sin6_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd < 0:
            return errno
        if b == &w.aside and setsockopt(fd, SOL_SOCKET, SO_MARK, &w.engine.mark, sizeof(w.engine.mark)) != 0:
            error = errno
            close(fd)
            return error
        if c.eager or c.announce or b.remote:
            delay_handshake_ack(fd)
        if not fresh:
            error = connect_reusing_port(w.engine, fd, b)
        elif connect(fd, <const sockaddr *>&b.address, b.length) == 0:
            error = 0
        else:
            error = errno
        if error == 0 or error == EINPROGRESS:
            c.backend.fd = fd
            c.backend.flags = 0
            c.stage = STAGE_NONE
            c.remote = b.remote
            memcpy(c.tag, b.tag, TAG_SIZE)
            return 0
        close(fd)
        if error != EADDRNOTAVAIL:
            return error
        fresh = False  # every port towards this backend is in use or in TIME_WAIT
    return error


cdef void attempt_failed(worker *w, conn *c, int cause) noexcept nogil:
    cdef counters *counts = &c.pair.counts[w.index]
    fp_count(&counts.failed[cause], 1)
    fp_count(&counts.ended, 1)
    c.unreached |= c.remote
    if c.backend.fd >= 0:
        close(c.backend.fd)
        c.backend.fd = -1
    list_remove(w, c)


cdef bint pass_on(worker *w, conn *c) noexcept nogil:
    """Nobody can be reached from here: connect to whoever else serves the port (Docker's own mesh), as the kernel
    engine passes such flows. False: nobody does, or it is not for want of a path."""
    cdef pair *aside = <pair *>fp_load(&c.frontend.aside)
    cdef route *way = <route *>fp_load(&c.frontend.route)
    cdef pair *before = c.pair
    cdef int error
    if aside is NULL or way is NULL or c.passed or not (c.unreached or way.passing):
        return False
    c.passed = 1
    c.pair = aside
    fp_count(&w.totals.passed_connections, 1)
    fp_count(&aside.counts[w.index].begun, 1)
    backend_aside(&w.aside, &c.flow.destination, c.frontend.port)
    error = dial(w, c, &w.aside)
    if error == 0:
        list_append(w, c, LIST_CONNECTING)
        return True
    c.remote = 0
    attempt_failed(w, c, cause_of(error))
    c.pair = before
    return False


cdef backend *attempt(worker *w, conn *c, int cause) noexcept nogil:
    """Connect to the flow's next choice; `cause` is why the last one failed. NULL: none is left, and c has ended.

    The socket is not yet registered with epoll. The result is valid until the next batch of events: another thread may
    drop the backend.
    """
    cdef engine *e = w.engine
    cdef route *way
    cdef target *t
    cdef backend *b = NULL
    cdef pair *left = c.pair
    cdef int error
    while c.tries <= e.retries:
        way = <route *>fp_load(&c.frontend.route)
        t = choose(e, way, c.hash, c.named, &c.again, c.tried, c.tries, &b)
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
        c.remote = b.remote
        attempt_failed(w, c, cause)
        if is_scarce(error):
            pause(w)
            break
    if pass_on(w, c):
        return &w.aside
    c.pair = NULL  # all its attempts are counted
    count_failure(w, c, cause)
    if c.frontend.peers is not NULL:  # the node that handed it over tries others
        answer_peer(c, <uint8_t>(PEER_NO + cause))
        conn_end(w, c, False)
    else:
        conn_end(w, c, True)
    return NULL


cdef void retry(worker *w, conn *c, int cause) noexcept nogil:
    """The backend refused or did not answer in time: try the next choice."""
    attempt_failed(w, c, cause)
    if attempt(w, c, cause) is not NULL and not watch(w, &c.backend):
        attempt_failed(w, c, FAIL_LIMIT)
        c.pair = NULL
        count_failure(w, c, FAIL_LIMIT)
        conn_end(w, c, True)


cdef void conn_moved(worker *w, conn *c) noexcept nogil:
    """Its backend is reached at another address now. What is not established yet connects there; what is goes on if
    the former address still answers, and breaks within seconds if it does not."""
    if c.state == CONNECTING:
        c.tries -= 1
        c.again = 0
        retry(w, c, FAIL_OTHER)
    elif c.state == OPEN:
        if c.listed == LIST_YOUNG:  # else it is given longer again
            list_remove(w, c)
        probe_now(c.backend.fd)


cdef int error_of(int fd) noexcept nogil:
    cdef int error = 0
    cdef socklen_t length = sizeof(error)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0:
        return errno
    return error


cdef void end_broken(worker *w, conn *c, int error) noexcept nogil:
    """An established connection was reset, or its peer vanished: reset the other side too."""
    cdef int cause = cause_of(error)
    count_failure(w, c, cause)
    fp_count(&c.pair.counts[w.index].failed[cause], 1)
    conn_end(w, c, True)


cdef void service(worker *w, conn *c) noexcept nogil:
    """Move what can be moved, pass on ends, and close the connection when both directions have ended."""
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
        end_broken(w, c, error)
        return
    no_more = client.flags & ENDED and not pending(client)
    no_reply = behind.flags & ENDED and not pending(behind)
    if no_more and no_reply:
        conn_end(w, c, False)
        return
    if no_more and not behind.flags & SHUT:
        allow_reuse(behind.fd)  # the side that ends first keeps its port in TIME_WAIT
        shutdown(behind.fd, SHUT_WR)
        behind.flags |= SHUT
    if no_reply and not client.flags & SHUT:
        shutdown(client.fd, SHUT_WR)
        client.flags |= SHUT
    if into == PUMP_MORE or out == PUMP_MORE:
        ready_append(w, c)


cdef void note_events(worker *w, conn *c, side *s, uint32_t events) noexcept nogil:
    if fp_unlikely(w.engine.idle_ns != 0) and c.state == OPEN:
        list_remove(w, c)
        c.started = w.now
        list_append(w, c, LIST_IDLE)
    if events & (EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        if fp_unlikely(s.flags & (READABLE | BULK | MUTED | HANGUP) == READABLE | BULK) and pending(s):
            mute(w, s)
        s.flags |= READABLE
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            s.flags |= HANGUP
            if events & EPOLLERR:
                s.flags |= BROKEN
        if fp_unlikely(events & EPOLLPRI):
            read_urgent(s)
    if events & EPOLLOUT:
        s.flags |= WRITABLE


cdef bint hand_over(worker *w, conn *c, uint32_t events) noexcept nogil:
    """The other node's agent is connected: send the header, then wait for its answer. True: it accepted."""
    cdef uint8_t header[PEER_HEADER_MAX]
    cdef uint8_t said = 0
    cdef ssize_t length, n
    if c.stage == STAGE_NONE:
        if not events & EPOLLOUT:
            return False
        length = peer_header(&c.flow, c.tag, c.announce, <peer_acl *>fp_load(&w.engine.peer_acl), header)
        n = send(c.backend.fd, header, length, MSG_NOSIGNAL)
        if n != length:
            retry(w, c, cause_of(errno) if n < 0 else FAIL_OTHER)
            return False
        c.stage = STAGE_ANSWER
    n = recv(c.backend.fd, &said, 1, 0)
    if n < 0 and (errno == EAGAIN or errno == EINTR):
        return False
    if n == 1 and said == PEER_YES:
        c.stage = STAGE_NONE
        return True
    if n == 1:
        c.remote = 0  # it was reached
        retry(w, c, peer_cause(said))
    else:
        retry(w, c, cause_of(errno) if n < 0 else FAIL_RESET)
    return False


cdef void on_backend(worker *w, conn *c, uint32_t events) noexcept nogil:
    cdef int error
    if c.state == DEAD:
        return
    if fp_unlikely(c.state == CONNECTING):
        if events & (EPOLLERR | EPOLLHUP):
            error = error_of(c.backend.fd)
            retry(w, c, cause_of(error))
            return
        if c.remote:
            if not hand_over(w, c, events):
                return
        elif not events & EPOLLOUT:
            return
        conn_opened(w, c)
    note_events(w, c, &c.backend, events)
    service(w, c)


cdef void on_timers(worker *w) noexcept nogil:
    """Connect timeouts, keep-alive for connections older than a second, idle timeouts."""
    cdef engine *e = w.engine
    cdef conn *c = w.connecting.head
    while c is not NULL and c.started + e.connect_ns <= w.now:
        if c.stage == STAGE_HEADER:
            fp_count(&w.totals.peer_malformed, 1)
            conn_end(w, c, True)
        else:
            retry(w, c, FAIL_TIMEOUT)
        c = w.connecting.head
    c = w.young.head
    while c is not NULL and c.started + 1000000000 <= w.now:
        list_remove(w, c)
        keep_alive(c.backend.fd)
        c = w.young.head
    c = w.idle.head
    while c is not NULL and c.started + e.idle_ns <= w.now:
        count_failure(w, c, FAIL_TIMEOUT)
        fp_count(&c.pair.counts[w.index].failed[FAIL_TIMEOUT], 1)
        conn_end(w, c, True)
        c = w.idle.head
