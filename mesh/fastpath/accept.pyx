# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The beginning of a TCP connection: accepted from a client, or handed over by another node."""

from libc.stdint cimport int32_t, uint8_t, uint16_t

from mesh.fastpath.address cimport from_sockaddr, is_own_call, named_owner
from mesh.fastpath.choose cimport hash_of, permitted
from mesh.fastpath.conns cimport conn_new, list_append, list_remove
from mesh.fastpath.epoll cimport watch
from mesh.fastpath.failure cimport cause_of
from mesh.fastpath.peer_acl cimport find_peer_node, local_backend
from mesh.fastpath.proof cimport proof_admits
from mesh.fastpath.proto cimport (
    PEER_ANNOUNCE, PEER_NO, PEER_READ_MAX, is_peer_probe, peer_check, peer_parse, peer_request)
from mesh.fastpath.sockopts cimport set_reset
from mesh.fastpath.stream cimport buffer_append, side_send
from mesh.fastpath.sys cimport (
    EAGAIN, ECONNABORTED, EINTR, EMFILE, MSG_PEEK, SOCK_CLOEXEC, SOCK_NONBLOCK, accept4, close, errno, fp_add,
    fp_count, fp_likely, fp_load, fp_now, fp_unlikely, getsockname, recv, sockaddr, sockaddr_in6, socklen_t)
from mesh.fastpath.tcp cimport (
    answer_peer, attempt, attempt_failed, conn_end, conn_opened, count_failure, dial, note_events, pause, service)
from mesh.fastpath.types cimport (
    ACCEPT_CALM, ACCEPT_MAX, BROKEN, BULK, DEAD, ENDED, FAIL_DENIED, FAIL_LIMIT, FAIL_NO_BACKEND, FAIL_OTHER,
    LIST_CONNECTING, OPEN, READABLE, SCRATCH, SENT, STAGE_HEADER, STAGE_NONE, TRIES_MAX, WRITABLE, backend, engine,
    frontend, peer_acl, peer_backend, peer_node, route)


cdef ssize_t read_early(worker *w, conn *c) noexcept nogil:
    """Read what the client has already sent into the scratch buffer. Returns its length; -1: the client is gone."""
    cdef ssize_t n = recv(c.client.fd, w.scratch, SCRATCH, 0)
    if n < 0:
        return 0 if errno == EAGAIN or errno == EINTR else -1
    if n == 0:
        c.client.flags |= ENDED
    elif n == SCRATCH:
        c.client.flags |= READABLE | BULK
    c.eager = n > 0
    return n


cdef int send_early(worker *w, conn *c, backend *b, uint32_t n) noexcept nogil:
    """Pass on the client's first `n` bytes at once if the handshake with the backend is over (it is on one host).

    Returns 0; the errno of the backend's socket; or -1: no memory. Without recent success only every 64th flow tries.
    """
    cdef ssize_t sent = 0
    cdef int error = 0
    if not c.announce and not c.remote and (b.fast_connect or c.hash & 63 == 0):
        sent = side_send(&c.backend, w.scratch, n)
        if sent < 0:
            error = 0 if errno == EAGAIN else errno
            c.backend.flags &= ~SENT
            sent = 0
        b.fast_connect = sent != 0
    if sent != n and not buffer_append(w, &c.client, w.scratch + sent, n - <uint32_t>sent):
        return -1
    if sent:
        conn_opened(w, c)
        fp_count(&c.pair.counts[w.index].bytes_in, sent)
        if sent != n:
            c.backend.flags &= ~WRITABLE
    return error


cdef void start(worker *w, conn *c, route *way) noexcept nogil:
    """Choose a backend for an accepted connection and connect to it."""
    cdef backend *b
    cdef ssize_t n = read_early(w, c)
    cdef int error = 0
    c.announce = way.announce
    c.hash = hash_of(way, &c.flow)
    if n >= 0:
        b = attempt(w, c, FAIL_NO_BACKEND)
        if b is NULL:
            return
        if n > 0:
            error = send_early(w, c, b, <uint32_t>n)
    if n < 0 or error < 0:
        count_failure(w, c, FAIL_OTHER)
        conn_end(w, c, True)
        return
    if error > 0:
        attempt_failed(w, c, cause_of(error))
        if attempt(w, c, cause_of(error)) is NULL:
            return
    if not watch(w, &c.backend) or not watch(w, &c.client):
        pause(w)
        count_failure(w, c, FAIL_LIMIT)
        conn_end(w, c, True)


cdef void peer_accepted(worker *w, conn *c) noexcept nogil:
    """A connection to the peer port: admit nodes only, then wait for the header."""
    if find_peer_node(w.engine, &c.flow.source) is NULL:
        fp_count(&w.totals.peer_foreign, 1)
        conn_end(w, c, True)
        return
    c.stage = STAGE_HEADER
    c.tries = TRIES_MAX  # only the named backend: the sender tries others
    c.started = fp_now()
    list_append(w, c, LIST_CONNECTING)
    if not watch(w, &c.client):
        pause(w)
        conn_end(w, c, True)
        return
    peer_read(w, c)


cdef bint is_proven(worker *w, conn *c, const peer_request *order) noexcept nogil:
    """Whether a header comes from the node whose address it comes from, as far as that node has to prove it."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&w.engine.peer_acl)
    cdef peer_node *node = find_peer_node(w.engine, &c.flow.source)
    if is_peer_probe(order.tag) and not order.proven:
        return node is not NULL
    return node is not NULL and proof_admits(acl, node, peer_check(acl, order))


cdef void peer_read(worker *w, conn *c) noexcept nogil:
    """Read the header once it is complete, and nothing after it."""
    cdef peer_request order
    cdef ssize_t n = recv(c.client.fd, w.scratch, PEER_READ_MAX, MSG_PEEK)
    cdef int32_t length
    if n < 0 and (errno == EAGAIN or errno == EINTR):
        return
    length = peer_parse(<const uint8_t *>w.scratch, <uint32_t>n, &order) if n > 0 else -1
    if length == 0:
        return
    if length < 0 or recv(c.client.fd, w.scratch, length, 0) != length:
        fp_count(&w.totals.peer_malformed, 1)
        conn_end(w, c, True)
        return
    if not is_proven(w, c, &order):
        fp_count(&w.totals.peer_unproven, 1)
        conn_end(w, c, True)
        return
    c.stage = STAGE_NONE
    c.flow = order.flow
    c.announce = order.flags & PEER_ANNOUNCE
    c.client.flags |= READABLE  # the client's bytes may be there already
    list_remove(w, c)
    peer_begin(w, c, order.tag)


cdef void peer_begin(worker *w, conn *c, const uint8_t *tag) noexcept nogil:
    """Connect to the backend that the other node names, if the source rules admit the client there."""
    cdef peer_backend *named = local_backend(w.engine, tag, 6)
    cdef backend *b = <backend *>fp_load(&w.engine.backends[named.backend]) if named is not NULL else NULL
    cdef int error
    if b is NULL:
        if not is_peer_probe(tag):
            fp_count(&w.totals.peer_unknown, 1)
        elif w.engine.leaving:
            conn_end(w, c, True)
            return
        answer_peer(c, PEER_NO + FAIL_NO_BACKEND)
        conn_end(w, c, False)
        return
    if not is_own_call(&c.flow.source) and not permitted(&named.rules, &c.flow.source):
        fp_count(&w.totals.peer_denied, 1)
        answer_peer(c, PEER_NO + FAIL_DENIED)
        conn_end(w, c, False)
        return
    fp_count(&w.totals.peer_connections, 1)
    c.pair = c.frontend.peers
    fp_count(&c.pair.counts[w.index].begun, 1)
    error = dial(w, c, b)
    if error == 0:
        list_append(w, c, LIST_CONNECTING)
        if watch(w, &c.backend):
            return
        error = EMFILE
    attempt_failed(w, c, cause_of(error))
    attempt(w, c, cause_of(error))


cdef void accepted(worker *w, listener *l, int fd, const sockaddr_in6 *name) noexcept nogil:
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
    if f.peers is not NULL:
        peer_accepted(w, c)
        return
    c.flow.destination = f.address
    c.flow.destination_port = f.port
    c.flow.protocol = 6
    if f.any and getsockname(fd, <sockaddr *>&called, &length) == 0:
        from_sockaddr(&called, &c.flow.destination, &ignored)
        c.named = named_owner(&c.flow.source, &c.flow.destination)
        if c.named:  # source rules do not apply to this node's own processes
            c.flow.destination = c.flow.source
    if way is NULL or (c.named == 0 and not permitted(&way.rules, &c.flow.source)):
        count_failure(w, c, FAIL_NO_BACKEND if way is NULL else FAIL_DENIED)
        conn_end(w, c, True)
        return
    start(w, c, way)


cdef bint accept_one(worker *w, listener *l) noexcept nogil:
    """Accept one connection. False: the queue is empty, or accepting is paused."""
    cdef engine *e = w.engine
    cdef sockaddr_in6 name
    cdef socklen_t length = sizeof(name)
    cdef int fd
    if fp_unlikely(fp_add(&e.connections, 1) >= e.connections_max):
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


cdef void on_listener(worker *w, listener *l) noexcept nogil:
    """Accept a burst. Its size follows the load, so that a lone connection rarely costs a second accept4."""
    cdef uint32_t taken = 0
    while taken < l.burst:
        if w.paused or not accept_one(w, l):
            l.burst = taken if taken > 1 else 1
            l.calm = ACCEPT_CALM
            return
        taken += 1
    if l.calm:
        l.calm -= 1
    elif l.burst < ACCEPT_MAX:
        l.burst *= 2


cdef void on_client(worker *w, conn *c, uint32_t events) noexcept nogil:
    if c.state == DEAD:
        return
    note_events(w, c, &c.client, events)
    if fp_likely(c.state == OPEN):
        service(w, c)
    elif c.stage == STAGE_HEADER:
        peer_read(w, c)
    elif c.client.flags & BROKEN:  # the client left before the backend had answered
        count_failure(w, c, FAIL_OTHER)
        conn_end(w, c, True)
