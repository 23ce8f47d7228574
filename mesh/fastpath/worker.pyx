# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""The loop of one thread, and the commands that other threads post to it and wait for."""

from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from mesh.fastpath.accept cimport accept_one, on_client, on_listener
from mesh.fastpath.choose cimport permitted
from mesh.fastpath.conns cimport conns_reap, ready_take
from mesh.fastpath.pool cimport pool_free
from mesh.fastpath.sessions cimport sessions_reap
from mesh.fastpath.stream cimport pipe_destroy
from mesh.fastpath.sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, SIG_SETMASK, close,
    epoll_create1, epoll_ctl, epoll_event, epoll_wait, eventfd, fp_count, fp_load, fp_longer_slice, fp_now, fp_unlikely,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_create,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, pthread_sigmask, read,
    sigfillset, sigset_t, write)
from mesh.fastpath.tcp cimport conn_end, conn_moved, on_backend, on_timers, resume, service
from mesh.fastpath.types cimport (
    BATCH, DATAGRAM, DEAD, EVENTS, FAIL_DENIED, KIND_BACKEND, KIND_CLIENT, KIND_DATAGRAMS, KIND_LISTENER,
    KIND_SESSION, KIND_WAKE, MOVED, OPEN, OP_ABORT, OP_ENFORCE, OP_FIND, OP_FORGET, OP_LISTEN, OP_QUIT, OP_UNLISTEN, OP_YIELD,
    SCRATCH, caller, conn, frontend, inquiry, listener, pipe, route, session, side)
from mesh.fastpath.udp cimport (
    on_datagrams, on_session, sessions_enforce, sessions_expire, sessions_forget, sessions_leave)

cdef enum:
    QUEUE_MAX = 65536  # connections accepted from a listener that is closed
    SLEEP_MAX = 60000  # ms


cdef void listener_free(worker *w, listener *l) noexcept nogil:
    cdef listener **place = &w.listeners
    while place[0] is not l:
        place = &place[0].next
    place[0] = l.next
    close(l.fd)
    free(l)
    fp_count(&w.totals.listeners, -1)


cdef void disarm(worker *w, listener *l) noexcept nogil:
    if l.armed:
        epoll_ctl(w.epoll, EPOLL_CTL_DEL, l.fd, NULL)
        l.armed = 0


cdef void do_listen(worker *w, listener *l) noexcept nogil:
    cdef epoll_event event
    l.next = w.listeners
    w.listeners = l
    fp_count(&w.totals.listeners, 1)
    event.events = 0 if l.stream and w.paused else EPOLLIN
    event.data.ptr = l
    l.armed = epoll_ctl(w.epoll, EPOLL_CTL_ADD, l.fd, &event) == 0


cdef void do_unlisten(worker *w, frontend *f) noexcept nogil:
    """The frontend is gone: accept what is in its queues, then close its sockets."""
    cdef listener *l = w.listeners
    cdef listener *next
    cdef int i
    while l is not NULL:
        next = l.next
        if l.frontend is f:
            disarm(w, l)
            if l.stream:
                for i in range(QUEUE_MAX):
                    if not accept_one(w, l):
                        break
            else:
                if not l.leaving:
                    on_datagrams(w, l)
                sessions_leave(w, l)
            listener_free(w, l)
        l = next


cdef void do_yield(worker *w, frontend *f) noexcept nogil:
    """Another process shares the sockets: stop reading them. UDP sessions still forward replies."""
    cdef listener *l = w.listeners
    cdef listener *next
    while l is not NULL:
        next = l.next
        if f is NULL or l.frontend is f:
            disarm(w, l)
            l.leaving = 1
            if l.stream or l.sessions == 0:
                listener_free(w, l)
        l = next


cdef void do_abort(worker *w) noexcept nogil:
    while w.all is not NULL:
        conn_end(w, w.all, True)
    sessions_leave(w, NULL)


cdef void do_enforce(worker *w) noexcept nogil:
    """Rules have changed: end what goes on of clients that would not be admitted now."""
    cdef conn *c = w.all
    cdef conn *next
    cdef route *way
    while c is not NULL:
        next = c.next
        if c.frontend.peers is NULL and c.named == 0:  # else the other node asks for its clients, or nobody does
            way = <route *>fp_load(&c.frontend.route)
            if way is not NULL and not permitted(&way.rules, &c.flow.source):
                fp_count(&c.frontend.counts[w.index].failed[FAIL_DENIED], 1)
                conn_end(w, c, True)
        c = next
    sessions_enforce(w)


cdef void do_forget(worker *w, const uint8_t *gone) noexcept nogil:
    """Backends are gone or have moved: end their sessions, and see to the connections of those that have moved."""
    cdef conn *c = w.all
    cdef conn *next
    sessions_forget(w, gone)
    while c is not NULL:
        next = c.next
        if c.tries and not c.passed and not c.remote and c.backend.fd >= 0 and gone[c.tried[c.tries - 1]] == MOVED:
            conn_moved(w, c)
        c = next


cdef void do_find(worker *w, inquiry *asked) noexcept nogil:
    """Say how the connections of some callers stand, those that this thread has."""
    cdef conn *c = w.all
    cdef caller *one
    cdef uint32_t at, left = asked.looks
    while c is not NULL and left:
        at = asked.by_port[c.flow.source_port]
        while at:
            one = &asked.callers[at - 1]
            if (not one.found and one.called == c.frontend.port
                    and memcmp(&one.address, &c.flow.source, sizeof(one.address)) == 0):
                one.open = c.state == OPEN
                one.passed = c.passed
                one.tries = c.tries
                memcpy(one.tried, c.tried, sizeof(one.tried))
                one.found = 1
            at = one.next
        c = c.next
        left -= 1


cdef void listeners_free(worker *w) noexcept nogil:
    while w.listeners is not NULL:
        disarm(w, w.listeners)
        listener_free(w, w.listeners)


cdef void run_command(worker *w) noexcept nogil:
    """Run the posted command, if there is one."""
    cdef uint64_t seen
    cdef int op
    cdef void *argument
    read(w.wake, &seen, sizeof(seen))
    pthread_mutex_lock(&w.mutex)
    if w.posted != w.done:
        op = w.command.op
        argument = w.command.argument
        if op == OP_LISTEN:
            do_listen(w, <listener *>argument)
        elif op == OP_UNLISTEN:
            do_unlisten(w, <frontend *>argument)
        elif op == OP_YIELD:
            do_yield(w, <frontend *>argument)
        elif op == OP_FORGET:
            do_forget(w, <const uint8_t *>argument)
        elif op == OP_ABORT:
            do_abort(w)
        elif op == OP_ENFORCE:
            do_enforce(w)
        elif op == OP_FIND:
            do_find(w, <inquiry *>argument)
        elif op == OP_QUIT:
            do_abort(w)
            listeners_free(w)
            w.quit = 1
        w.done = w.posted
        pthread_cond_broadcast(&w.cond)
    pthread_mutex_unlock(&w.mutex)


cdef void post(worker *w, int op, void *argument) noexcept nogil:
    """Post a command. One at a time: call `await_done` before the next."""
    cdef uint64_t one = 1
    pthread_mutex_lock(&w.mutex)
    w.command.op = op
    w.command.argument = argument
    w.posted += 1
    pthread_mutex_unlock(&w.mutex)
    write(w.wake, &one, sizeof(one))


cdef void poke(worker *w) noexcept nogil:
    """Have the thread turn its loop once more, although there is nothing to do; any thread."""
    cdef uint64_t one = 1
    write(w.wake, &one, sizeof(one))


cdef void await_done(worker *w) noexcept nogil:
    pthread_mutex_lock(&w.mutex)
    while w.posted != w.done:
        pthread_cond_wait(&w.cond, &w.mutex)
    pthread_mutex_unlock(&w.mutex)


cdef void call(engine *e, int op, void *argument) noexcept nogil:
    """Post a command to all threads and wait. Then each has passed through its loop, and none holds an old pointer."""
    cdef uint32_t i
    for i in range(e.threads):
        post(e.workers[i], op, argument)
    for i in range(e.threads):
        await_done(e.workers[i])


cdef int64_t remaining(uint64_t started, uint64_t span, uint64_t now) noexcept nogil:
    return <int64_t>(started + span - now)


cdef int wait_ms(worker *w) noexcept nogil:
    """Milliseconds until the first deadline; -1 without a deadline, which saves the kernel a timer."""
    cdef int64_t nearest = INT64_MAX
    cdef engine *e = w.engine
    if w.ready_head is not NULL:
        return 0
    if w.connecting.head is not NULL:
        nearest = min(nearest, remaining(w.connecting.head.started, e.connect_ns, w.now))
    if w.young.head is not NULL:
        nearest = min(nearest, remaining(w.young.head.started, 1000000000, w.now))
    if w.idle.head is not NULL:
        nearest = min(nearest, remaining(w.idle.head.started, e.idle_ns, w.now))
    if w.oldest is not NULL:
        nearest = min(nearest, remaining(w.oldest.seen, e.udp_idle_ns, w.now))
    if w.paused:
        nearest = min(nearest, remaining(w.resume_at, 0, w.now))
    if nearest == INT64_MAX:
        return -1
    nearest = nearest // 1000000 + 1 if nearest > 0 else 0
    return <int>min(nearest, SLEEP_MAX)


cdef void dispatch(worker *w, epoll_event *event) noexcept nogil:
    cdef void *what = event.data.ptr
    cdef uint8_t kind = (<uint8_t *>what)[0]
    if kind == KIND_BACKEND:
        on_backend(w, (<side *>what).conn, event.events)
    elif kind == KIND_CLIENT:
        on_client(w, (<side *>what).conn, event.events)
    elif kind == KIND_LISTENER:
        on_listener(w, <listener *>what)
    elif kind == KIND_SESSION:
        on_session(w, <session *>what, event.events)
    elif kind == KIND_DATAGRAMS:
        on_datagrams(w, <listener *>what)


cdef void run_ready(worker *w) noexcept nogil:
    """Another turn for the connections that were not finished in their last one."""
    cdef conn *last = w.ready_tail
    cdef conn *c
    if last is NULL:
        return
    while True:
        c = ready_take(w)
        if c is NULL:
            return
        if c.state != DEAD:
            service(w, c)
        if c is last:
            return


cdef void housekeep(worker *w) noexcept nogil:
    on_timers(w)
    if w.oldest is not NULL:
        sessions_expire(w)
    if fp_unlikely(w.paused) and w.resume_at <= w.now and w.engine.connections < w.engine.connections_max:
        resume(w)
    elif fp_unlikely(w.paused) and w.resume_at <= w.now:
        w.resume_at = w.now + 10000000
    conns_reap(w)
    if w.dead_sessions is not NULL:
        sessions_reap(w)


cdef void *loop(void *argument) noexcept nogil:
    """The thread. Events come first, the command last: an event of the batch may point to what the command frees.

    The time slice is longer than that of other threads. So a process that this thread wakes up on its own core by
    sending has the earlier deadline and runs first, and its answer arrives before this thread would sleep. The thread's
    share of the CPU stays the same.
    """
    cdef worker *w = <worker *>argument
    cdef int i, count
    cdef bint commanded
    fp_longer_slice()
    while not w.quit:
        count = epoll_wait(w.epoll, w.events, EVENTS, wait_ms(w))
        fp_count(&w.turns, 1)
        w.now = fp_now()
        commanded = False
        for i in range(count):
            if fp_unlikely(w.events[i].data.ptr == &w.wake_kind):
                commanded = True
            else:
                dispatch(w, &w.events[i])
        run_ready(w)
        housekeep(w)
        if fp_unlikely(commanded):
            run_command(w)
    conns_reap(w)
    return NULL


cdef worker *worker_new(engine *e, uint32_t index) noexcept nogil:
    """The state of a thread that is not started yet. NULL: no memory or descriptors."""
    cdef worker *w = <worker *>calloc(1, sizeof(worker))
    cdef epoll_event event
    if w is NULL:
        return NULL
    w.engine = e
    w.index = index
    w.wake_kind = KIND_WAKE
    w.conns.size = sizeof(conn)
    w.sessions.size = sizeof(session)
    w.buckets = 1024
    while w.buckets < e.udp_max and w.buckets < 65536:
        w.buckets *= 2
    w.epoll = epoll_create1(EPOLL_CLOEXEC)
    w.wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    w.scratch = <char *>malloc(SCRATCH)
    w.arena = <char *>malloc(BATCH * DATAGRAM)
    w.table = <session **>calloc(w.buckets, sizeof(session *))
    pthread_mutex_init(&w.mutex, NULL)
    pthread_cond_init(&w.cond, NULL)
    w.now = fp_now()
    event.events = EPOLLIN
    event.data.ptr = &w.wake_kind
    if (w.epoll < 0 or w.wake < 0 or w.scratch is NULL or w.arena is NULL or w.table is NULL
            or epoll_ctl(w.epoll, EPOLL_CTL_ADD, w.wake, &event) != 0):
        worker_free(w)
        return NULL
    return w


cdef void worker_free(worker *w) noexcept nogil:
    cdef pipe *p
    while w.pipes is not NULL:
        p = w.pipes
        w.pipes = p.next
        pipe_destroy(w, p)
    sessions_reap(w)
    pool_free(&w.conns)
    pool_free(&w.sessions)
    if w.epoll >= 0:
        close(w.epoll)
    if w.wake >= 0:
        close(w.wake)
    free(w.scratch)
    free(w.arena)
    free(w.table)
    pthread_mutex_destroy(&w.mutex)
    pthread_cond_destroy(&w.cond)
    free(w)


cdef bint worker_start(worker *w) noexcept nogil:
    """Start the thread with all signals blocked: Python handles signals, and splice() cannot suppress SIGPIPE."""
    cdef sigset_t all
    cdef sigset_t before
    cdef bint ok
    sigfillset(&all)
    pthread_sigmask(SIG_SETMASK, &all, &before)
    ok = pthread_create(&w.thread, NULL, loop, w) == 0
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return ok
