# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""UDP: a session per flow, with a socket connected to its backend. Datagrams move in batches, both ways.

SO_REUSEPORT gives all datagrams of a flow to one thread. A reply has the address that the client called as its source.
"""

from libc.stdint cimport uint16_t
from libc.string cimport memcmp, memcpy, memset

from mesh._maglev cimport mesh_addr, mesh_flow, mesh_hash_flow
from mesh.fastpath.address cimport from_sockaddr, is_own_call, map_v4, named_owner
from mesh.fastpath.choose cimport choose, hash_of, permitted
from mesh.fastpath.failure cimport cause_of, is_scarce
from mesh.fastpath.peer_acl cimport find_peer_node, local_backend
from mesh.fastpath.proof cimport (
    PROOF_GOOD, PROOF_NONE, PROOF_REPLY, PROOF_UDP, proof_admits, proof_check, proof_time, proof_write)
from mesh.fastpath.proto cimport (
    PEER_DATAGRAM_BODY, PEER_TAG, is_peer_probe, peer_datagram_client, peer_datagram_head, peer_datagram_tag)
from mesh.fastpath.sessions cimport session_bury, session_find, session_link, session_new, session_touch, session_unlink
from mesh.fastpath.sys cimport (
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, CMSG_SPACE, EAGAIN, EINTR, EPOLLERR, EPOLLET, EPOLLIN,
    EPOLL_CTL_ADD, IPPROTO_IP, IPPROTO_IPV6, IPV6_PKTINFO, IP_PKTINFO, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_CLOEXEC,
    SOCK_DGRAM, SOCK_NONBLOCK, close, cmsghdr, connect, epoll_ctl, epoll_event, errno, fp_add, fp_count, fp_load,
    in6_pktinfo, in_pktinfo, msghdr, recvmmsg, sendmmsg, sockaddr, sockaddr_in6, socket)
from mesh.fastpath.types cimport (
    BATCH, CONTROL, DATAGRAM, FAIL_DENIED, FAIL_LIMIT, FAIL_NO_BACKEND, FAIL_UNREACHABLE, PEER_REPLY_HEAD,
    PEER_UDP_HEAD, PROOF_SIZE, TAG_SIZE,
    TRIES_MAX, backend, counters, datagrams, frontend, pair, peer_acl, peer_backend, peer_node, route, target)

cdef enum:
    ROUNDS = 4  # batches per event


cdef void session_close(worker *w, session *s) noexcept nogil:
    """Close the socket: the session's backend is gone, or the session ends."""
    cdef counters *counts
    if s.fd < 0:
        return
    close(s.fd)
    s.fd = -1
    counts = &s.pair.counts[w.index]
    fp_count(&counts.closed, 1)
    fp_count(&counts.ended, 1)
    s.pair = NULL


cdef void session_end(worker *w, session *s) noexcept nogil:
    session_close(w, s)
    session_unlink(w, s)
    s.listener.sessions -= 1
    fp_add(&w.engine.sessions, -1)
    fp_count(&w.totals.sessions, -1)
    session_bury(w, s)


cdef bint evict(worker *w, session *keep) noexcept nogil:
    """End the least recently used session other than `keep`. False: there is none."""
    cdef session *s = w.oldest
    if s is keep and s is not NULL:
        s = s.newer
    if s is NULL:
        return False
    session_end(w, s)
    fp_count(&w.totals.udp_evictions, 1)
    return True


cdef void prove_head(worker *w, session *s) noexcept nogil:
    """Bring the head for another node's agent up to date: with a proof of this second, if that agent checks proofs."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&w.engine.peer_acl)
    cdef uint32_t now = proof_time()
    cdef peer_node *node
    cdef mesh_addr address
    cdef uint16_t port
    if acl is NULL or (s.serial == acl.serial and (s.proof_at == now or s.head_length == PEER_UDP_HEAD)):
        return
    if s.serial != acl.serial:
        from_sockaddr(&s.node, &address, &port)
        node = find_peer_node(w.engine, &address)
        s.checked = node is not NULL and node.checks
        s.serial = acl.serial
    s.proof_at = now
    s.head_length = PEER_UDP_HEAD
    s.head[3] = 49  # "MUD1"
    if s.checked and proof_write(acl, PROOF_UDP, s.head + PEER_TAG, PEER_DATAGRAM_BODY, now, s.head + PEER_UDP_HEAD):
        s.head[3] = 50  # "MUD2"
        s.head_length = PEER_UDP_HEAD + PROOF_SIZE


cdef void prove_tail(worker *w, session *s) noexcept nogil:
    """Likewise what stands before answers for another node."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&w.engine.peer_acl)
    cdef uint32_t now = proof_time()
    if s.serial == acl.serial and s.proof_at == now:
        return
    s.serial, s.proof_at = acl.serial, now
    memcpy(s.tail, <const char *>b"MUD3", 4)
    proof_write(acl, PROOF_REPLY, s.head + PEER_TAG, PEER_DATAGRAM_BODY, now, s.tail + 4)


cdef int strip_answers(worker *w, session *s, datagrams *d, int got) noexcept nogil:
    """Strip the proofs off answers of another node, and leave out what has none although it must. Returns how many are
    left."""
    cdef peer_acl *acl = <peer_acl *>fp_load(&w.engine.peer_acl)
    cdef uint32_t now = proof_time()
    cdef uint8_t *data
    cdef int i
    cdef int kept = 0
    for i in range(got):
        data = <uint8_t *>d.vectors[i].iov_base
        if (d.messages[i].msg_len >= PEER_REPLY_HEAD and memcmp(data, <const char *>b"MUD3", 4) == 0
                and proof_check(acl, PROOF_REPLY, s.head + PEER_TAG, PEER_DATAGRAM_BODY, now, data + 4) == PROOF_GOOD):
            s.proven = 1
            d.vectors[kept].iov_base = data + PEER_REPLY_HEAD
            d.messages[kept].msg_len = d.messages[i].msg_len - PEER_REPLY_HEAD
        elif s.proven:
            fp_count(&w.totals.peer_unproven, 1)
            continue
        else:
            d.vectors[kept].iov_base = data
            d.messages[kept].msg_len = d.messages[i].msg_len
        kept += 1
    return kept


cdef int session_dial(worker *w, session *s, backend *b, pair *to) noexcept nogil:
    """Connect a socket to the backend. Returns 0 or the errno."""
    cdef epoll_event event
    cdef int error
    cdef int fd = socket(b.address.sin6_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0 and is_scarce(errno) and evict(w, s):
        fd = socket(b.address.sin6_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return errno
    event.events = EPOLLIN | EPOLLET
    event.data.ptr = s
    if (connect(fd, <const sockaddr *>&b.address, b.length) != 0
            or epoll_ctl(w.epoll, EPOLL_CTL_ADD, fd, &event) != 0):
        error = errno
        close(fd)
        return error
    s.fd = fd
    s.pair = to
    s.node = b.address
    s.remote = b.remote
    if b.remote:
        peer_datagram_head(&s.flow, b.tag, s.head)
        s.head_length = PEER_UDP_HEAD
        s.serial = 0
        prove_head(w, s)
        s.proven = s.head_length > PEER_UDP_HEAD
    fp_count(&to.counts[w.index].begun, 1)
    fp_count(&to.counts[w.index].opened, 1)
    return 0


cdef bint peer_route(worker *w, session *s) noexcept nogil:
    """Connect to the backend of this node that another node names. False: this node does not have it, or the source
    rules do not admit the client there."""
    cdef peer_backend *named = local_backend(w.engine, s.head + PEER_TAG, 17)
    cdef backend *b = <backend *>fp_load(&w.engine.backends[named.backend]) if named is not NULL else NULL
    cdef mesh_addr client
    if b is NULL:
        fp_count(&w.totals.peer_unknown, 1)
        return False
    peer_datagram_client(s.head, &client)
    if not is_own_call(&client) and not permitted(&named.rules, &client):
        fp_count(&w.totals.peer_denied, 1)
        return False
    s.backend = b.id
    return session_dial(w, s, b, s.listener.frontend.peers) == 0


cdef bint session_route(worker *w, session *s) noexcept nogil:
    """Connect the session to its next choice. False: none can be reached; the datagram is dropped."""
    cdef route *way = <route *>fp_load(&s.listener.frontend.route)
    cdef backend *b = NULL
    cdef target *t
    cdef int error = 0
    cdef int cause = FAIL_NO_BACKEND
    cdef bint again = s.tries != 0
    if s.listener.frontend.peers is not NULL:
        return peer_route(w, s)
    while True:
        t = NULL
        if s.tries <= w.engine.retries:
            t = choose(w.engine, way, s.hash, s.named, &s.again, s.tried, s.tries, &b)
        if t is NULL:
            if not again:
                fp_count(&s.listener.frontend.counts[w.index].failed[cause], 1)
                s.tries = 0
                s.again = 0
                return False
            again = False  # all were tried in the session's life: start over
            s.tries = 0
            s.again = 0
            continue
        s.tried[s.tries] = t.backend
        s.tries += 1
        s.backend = t.backend
        error = session_dial(w, s, b, t.pair)
        if error == 0:
            return True
        cause = cause_of(error)
        fp_count(&t.pair.counts[w.index].failed[cause], 1)
        if is_scarce(error):
            fp_count(&s.listener.frontend.counts[w.index].failed[FAIL_LIMIT], 1)
            return False


cdef void session_refused(worker *w, session *s, int error) noexcept nogil:
    """The backend refused (ICMP): close the socket. The next datagram goes to the next choice."""
    cdef counters *counts
    if s.fd < 0:
        return
    counts = &s.pair.counts[w.index]
    fp_count(&counts.failed[cause_of(error)], 1)
    fp_count(&counts.retried, 1)
    session_close(w, s)


cdef void called_address(msghdr *m, mesh_addr *out) noexcept nogil:
    """Read the address that the client called from the control data. Without any, `out` stays as it is."""
    cdef cmsghdr *c = CMSG_FIRSTHDR(m)
    cdef in_pktinfo four
    cdef in6_pktinfo six
    while c is not NULL:
        if c.cmsg_level == IPPROTO_IPV6 and c.cmsg_type == IPV6_PKTINFO:
            memcpy(&six, CMSG_DATA(c), sizeof(six))
            memcpy(out.bytes, &six.ipi6_addr, 16)
        elif c.cmsg_level == IPPROTO_IP and c.cmsg_type == IP_PKTINFO:
            memcpy(&four, CMSG_DATA(c), sizeof(four))
            map_v4(out, &four.ipi_addr)
        c = CMSG_NXTHDR(m, c)


cdef void set_source(msghdr *m, const session *s, char *control) noexcept nogil:
    """Make the address that the client called the source of a reply."""
    cdef cmsghdr *c
    cdef in_pktinfo four
    cdef in6_pktinfo six
    memset(control, 0, CONTROL)
    m.msg_control = control
    if s.listener.six:
        m.msg_controllen = CMSG_SPACE(sizeof(six))
        c = CMSG_FIRSTHDR(m)
        c.cmsg_level = IPPROTO_IPV6
        c.cmsg_type = IPV6_PKTINFO
        c.cmsg_len = CMSG_LEN(sizeof(six))
        memset(&six, 0, sizeof(six))
        memcpy(&six.ipi6_addr, s.flow.destination.bytes, 16)
        if s.client.sin6_scope_id:
            six.ipi6_ifindex = s.client.sin6_scope_id
        memcpy(CMSG_DATA(c), &six, sizeof(six))
    else:
        m.msg_controllen = CMSG_SPACE(sizeof(four))
        c = CMSG_FIRSTHDR(m)
        c.cmsg_level = IPPROTO_IP
        c.cmsg_type = IP_PKTINFO
        c.cmsg_len = CMSG_LEN(sizeof(four))
        memset(&four, 0, sizeof(four))
        memcpy(&four.ipi_spec_dst, &s.flow.destination.bytes[12], 4)
        memcpy(CMSG_DATA(c), &four, sizeof(four))


cdef int datagram_check(worker *w, const uint8_t *data) noexcept nogil:
    """The result of `proof_check` for a whole head."""
    if data[3] != 50:  # "MUD2"
        return PROOF_NONE
    return proof_check(<peer_acl *>fp_load(&w.engine.peer_acl), PROOF_UDP, data + PEER_TAG, PEER_DATAGRAM_BODY,
                       proof_time(), data + PEER_UDP_HEAD)


cdef bint peer_strip_head(worker *w, datagrams *d, int i, const mesh_addr *source, uint8_t *head,
                          uint8_t *answers) noexcept nogil:
    """Move the head of a datagram of another node to `head`. False: not from a node, malformed or unproven.

    `answers`: whether the node that sends it checks proofs.
    """
    cdef uint8_t tag[TAG_SIZE]
    cdef uint8_t *data = <uint8_t *>d.vectors[i].iov_base
    cdef peer_node *node = find_peer_node(w.engine, source)
    cdef uint32_t length = PEER_UDP_HEAD
    cdef int result
    if node is NULL:
        fp_count(&w.totals.peer_foreign, 1)
        return False
    if not peer_datagram_tag(data, d.messages[i].msg_len, tag):
        fp_count(&w.totals.peer_malformed, 1)
        return False
    result = datagram_check(w, data)
    if not proof_admits(<peer_acl *>fp_load(&w.engine.peer_acl), node, result):
        fp_count(&w.totals.peer_unproven, 1)
        return False
    if data[3] == 50:
        length += PROOF_SIZE
    answers[0] = result == PROOF_GOOD
    memcpy(head, data, PEER_UDP_HEAD)
    head[3] = 49  # the same flow, proven or not
    d.vectors[i].iov_base = data + length
    d.messages[i].msg_len -= length
    return True


cdef bint answer_probe(worker *w, listener *l, datagrams *d, int i) noexcept nogil:
    """Answer a probe of another node, unless this one is leaving. False: the datagram is none."""
    cdef uint8_t *data = <uint8_t *>d.vectors[i].iov_base
    cdef mesh_addr source
    cdef uint16_t port
    cdef uint8_t tag[TAG_SIZE]
    cdef peer_node *node
    if not peer_datagram_tag(data, d.messages[i].msg_len, tag) or not is_peer_probe(tag) or data[14]:
        return False
    from_sockaddr(&d.names[i], &source, &port)
    node = find_peer_node(w.engine, &source)
    if node is NULL:
        return False
    if data[3] == 50 and not proof_admits(<peer_acl *>fp_load(&w.engine.peer_acl), node, datagram_check(w, data)):
        return False
    if w.engine.leaving:
        return True
    data[14] = 1
    d.vectors[i].iov_len = PEER_UDP_HEAD
    d.messages[i].msg_hdr.msg_flags = 0  # the control data, as it came, names the address that was called
    sendmmsg(l.fd, &d.messages[i], 1, MSG_DONTWAIT | MSG_NOSIGNAL)
    return True


cdef session *session_of(worker *w, listener *l, datagrams *d, int i) noexcept nogil:
    """The session of a received datagram, made if it is new. NULL: the datagram is refused."""
    cdef frontend *f = l.frontend
    cdef route *way
    cdef mesh_flow flow
    cdef session *s
    cdef msghdr *m = &d.messages[i].msg_hdr
    cdef uint32_t key
    cdef uint32_t named
    cdef uint8_t head[PEER_UDP_HEAD]
    cdef uint8_t answers = 0
    memset(&flow, 0, sizeof(flow))
    flow.destination = f.address
    from_sockaddr(&d.names[i], &flow.source, &flow.source_port)
    if f.any:
        called_address(m, &flow.destination)
    flow.destination_port = f.port
    flow.protocol = 17
    if f.peers is not NULL and not peer_strip_head(w, d, i, &flow.source, head, &answers):
        return NULL
    key = mesh_hash_flow(&flow)
    s = session_find(w, &flow, key, l)
    if s is not NULL and f.peers is not NULL and memcmp(s.head, head, PEER_UDP_HEAD) != 0:
        session_end(w, s)  # the source port was used by another session
        s = NULL
    if s is not NULL:
        s.answers = answers
        return s
    way = <route *>fp_load(&f.route)
    named = named_owner(&flow.source, &flow.destination) if f.any else 0
    if f.peers is NULL and named == 0 and not permitted(&way.rules, &flow.source):
        fp_count(&f.counts[w.index].failed[FAIL_DENIED], 1)
        return NULL
    while fp_add(&w.engine.sessions, 1) >= w.engine.udp_max:
        fp_add(&w.engine.sessions, -1)
        if not evict(w, NULL):
            fp_count(&f.counts[w.index].failed[FAIL_LIMIT], 1)
            return NULL
    s = session_new(w)
    if s is NULL:
        fp_add(&w.engine.sessions, -1)
        fp_count(&f.counts[w.index].failed[FAIL_LIMIT], 1)
        return NULL
    s.flow = flow
    s.named = named
    s.listener = l
    if f.peers is NULL:
        s.hash = hash_of(way, &flow)
    else:
        memcpy(s.head, head, PEER_UDP_HEAD)
    s.answers = answers
    s.client = d.names[i]
    s.client_length = m.msg_namelen
    l.sessions += 1
    fp_count(&w.totals.sessions, 1)
    session_link(w, s, key)
    return s


cdef void fill_messages(worker *w, datagrams *out, session *s, datagrams *d, const int *which, int first,
                        int count) noexcept nogil:
    """Fill in the messages for the session's backend, on this node or another."""
    cdef msghdr *m
    cdef int i
    if s.fd >= 0 and s.remote:
        prove_head(w, s)
    for i in range(first, count):
        m = &out.messages[i].msg_hdr
        memset(m, 0, sizeof(msghdr))
        out.doubles[i][0].iov_base = s.head
        out.doubles[i][0].iov_len = s.head_length
        out.doubles[i][1].iov_base = d.vectors[which[i]].iov_base
        out.doubles[i][1].iov_len = d.messages[which[i]].msg_len
        m.msg_iov = &out.doubles[i][0 if s.remote else 1]
        m.msg_iovlen = 2 if s.remote else 1


cdef void forward(worker *w, session *s, datagrams *d, const int *which, int count) noexcept nogil:
    """Send datagrams of the input batch to the session's backend; after a refusal, to its next choice."""
    cdef datagrams *out = &w.output
    cdef int i, sent
    cdef int done = 0
    cdef int turns = 0
    cdef counters *counts
    fill_messages(w, out, s, d, which, 0, count)
    while done < count:
        if s.fd < 0:
            turns += 1
            if turns > TRIES_MAX or not session_route(w, s):
                break
            fill_messages(w, out, s, d, which, done, count)
        sent = sendmmsg(s.fd, &out.messages[done], count - done, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN or is_scarce(errno):
                break
            if cause_of(errno) <= FAIL_UNREACHABLE:
                session_refused(w, s, errno)
                continue
            fp_count(&w.totals.udp_dropped, 1)  # cannot be sent, for example because of its size
            done += 1
            continue
        counts = &s.pair.counts[w.index]
        fp_count(&counts.packets_in, sent)
        for i in range(done, done + sent):
            fp_count(&counts.bytes_in, out.doubles[i][1].iov_len)
        done += sent
    if done < count:
        fp_count(&w.totals.udp_dropped, count - done)


cdef void prepare(datagrams *d, char *arena) noexcept nogil:
    """Prepare the buffers of one batch, before every receive: the kernel overwrites lengths."""
    cdef int i
    cdef msghdr *m
    for i in range(BATCH):
        d.vectors[i].iov_base = arena + i * DATAGRAM
        d.vectors[i].iov_len = DATAGRAM
        m = &d.messages[i].msg_hdr
        m.msg_name = &d.names[i]
        m.msg_namelen = sizeof(sockaddr_in6)
        m.msg_iov = &d.vectors[i]
        m.msg_iovlen = 1
        m.msg_control = &d.control[i][0]
        m.msg_controllen = CONTROL
        m.msg_flags = 0


cdef void on_datagrams(worker *w, listener *l) noexcept nogil:
    """Forward datagrams of clients."""
    cdef datagrams *d = &w.input
    cdef int which[BATCH]
    cdef int turn, i, j, got, count
    cdef session *s
    for turn in range(ROUNDS):
        prepare(d, w.arena)
        got = recvmmsg(l.fd, d.messages, BATCH, MSG_DONTWAIT, NULL)
        if got <= 0:
            return
        for i in range(got):
            w.owner[i] = NULL
            if l.frontend.peers is not NULL and answer_probe(w, l, d, i):
                continue
            s = session_of(w, l, d, i)
            w.owner[i] = s
            if s is NULL:
                fp_count(&w.totals.udp_dropped, 1)
            else:
                session_touch(w, s)
        for i in range(got):
            s = w.owner[i]
            if s is NULL:
                continue
            count = 0
            for j in range(i, got):
                if w.owner[j] is s:
                    which[count] = j
                    count += 1
                    w.owner[j] = NULL
            if s.dead:  # evicted by a later flow of this batch
                fp_count(&w.totals.udp_dropped, count)
            else:
                forward(w, s, d, which, count)
        if got < BATCH:
            return


cdef void reply(worker *w, session *s, datagrams *d, int got) noexcept nogil:
    """Send the backend's datagrams to the client."""
    cdef datagrams *out = &w.output
    cdef counters *counts = &s.pair.counts[w.index]
    cdef msghdr *m
    cdef int i, sent
    cdef int done = 0
    if s.answers:
        prove_tail(w, s)
    for i in range(got):
        out.doubles[i][0].iov_base = s.tail
        out.doubles[i][0].iov_len = PEER_REPLY_HEAD
        out.doubles[i][1].iov_base = d.vectors[i].iov_base
        out.doubles[i][1].iov_len = d.messages[i].msg_len
        m = &out.messages[i].msg_hdr
        memset(m, 0, sizeof(msghdr))
        m.msg_name = &s.client
        m.msg_namelen = s.client_length
        m.msg_iov = &out.doubles[i][0 if s.answers else 1]
        m.msg_iovlen = 2 if s.answers else 1
        set_source(m, s, &out.control[i][0])
    while done < got:
        sent = sendmmsg(s.listener.fd, &out.messages[done], got - done, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent <= 0:
            if errno == EINTR:
                continue
            fp_count(&w.totals.udp_dropped, 1)  # the client's side is full or refuses: lost, as on a wire
            if errno == EAGAIN:
                fp_count(&w.totals.udp_dropped, got - done - 1)
                return
            done += 1
            continue
        fp_count(&counts.packets_out, sent)
        for i in range(done, done + sent):
            fp_count(&counts.bytes_out, out.doubles[i][1].iov_len)
        done += sent


cdef void on_session(worker *w, session *s, uint32_t events) noexcept nogil:
    """Forward datagrams of a backend, or handle its refusal."""
    cdef datagrams *d = &w.input
    cdef int got
    if s.dead:
        return
    while s.fd >= 0:
        prepare(d, w.arena)
        got = recvmmsg(s.fd, d.messages, BATCH, MSG_DONTWAIT, NULL)
        if got < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                session_refused(w, s, errno)
            return
        if got == 0:
            return
        session_touch(w, s)
        reply(w, s, d, strip_answers(w, s, d, got) if s.remote else got)
        if got < BATCH and not events & EPOLLERR:
            return


cdef void sessions_expire(worker *w) noexcept nogil:
    while w.oldest is not NULL and w.oldest.seen + w.engine.udp_idle_ns <= w.now:
        session_end(w, w.oldest)


cdef void sessions_forget(worker *w, const uint8_t *gone) noexcept nogil:
    """End the sessions of backends that are gone or have moved."""
    cdef session *s = w.oldest
    cdef session *next
    while s is not NULL:
        next = s.newer
        if s.fd >= 0 and gone[s.backend]:
            session_end(w, s)
        s = next


cdef void sessions_enforce(worker *w) noexcept nogil:
    """End the sessions of clients that would not be admitted now."""
    cdef session *s = w.oldest
    cdef session *next
    cdef frontend *f
    cdef route *way
    while s is not NULL:
        next = s.newer
        f = s.listener.frontend
        way = <route *>fp_load(&f.route)
        if f.peers is NULL and s.named == 0 and way is not NULL and not permitted(&way.rules, &s.flow.source):
            fp_count(&f.counts[w.index].failed[FAIL_DENIED], 1)
            session_end(w, s)
        s = next


cdef void sessions_leave(worker *w, listener *l) noexcept nogil:
    """End the sessions of a listener, or of all where it is NULL."""
    cdef session *s = w.oldest
    cdef session *next
    while s is not NULL:
        next = s.newer
        if l is NULL or s.listener is l:
            session_end(w, s)
        s = next
