# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The user-space forwarding engine: threads that carry connections and datagrams with no Python object and no GIL.

This module is its Python API; the engine itself is in mesh/fastpath/. All methods are called from one thread at a time,
except `Pair.read`, `Front.read` and `Engine.totals`, which any thread may call at any time.
"""

import os

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from mesh._maglev cimport MESH_OWNER_FIRST, SlotTable
from mesh.fastpath.counts cimport WIDTH, counters_new, counters_sum, gather
from mesh.fastpath.peer_acl cimport peer_acl_free, peer_acl_new
from mesh.fastpath.sys cimport fp_load, fp_peek, fp_store, pthread_join
from mesh.fastpath.tables cimport backend_new, is_same_backend, route_free, route_index, rules_fill
from mesh.fastpath.types cimport (
    BACKENDS, KIND_DATAGRAMS, KIND_LISTENER, LEFT, MOVED, OP_ABORT, OP_ENFORCE, OP_FIND, OP_FORGET, OP_LISTEN, OP_QUIT,
    OP_SYNC, OP_UNLISTEN, OP_YIELD, TAG_SIZE, TRIES_MAX, backend, caller, counters, engine, frontend, inquiry, listener, pair,
    peer_acl, route, target, totals, worker)
from mesh.fastpath.worker cimport await_done, call, poke, post, worker_free, worker_new, worker_start

RETRIES_MOST = TRIES_MAX - 1
cdef enum:
    LOOKS = 100000  # connections of each thread that `Engine.find` looks at


cdef uint16_t in_network_order(uint16_t port) noexcept:
    cdef uint8_t[2] wire = [port >> 8, port & 0xff]
    cdef uint16_t there
    memcpy(&there, wire, sizeof(there))
    return there


def read_columns(tuple things not None, tuple rows=None):
    """Counters of many Pairs, or of many Fronts, at once: u64 column after column, in the order of base.COLUMNS.

    `rows`: how many of the things, one after the other, are added up in each row; None: one each.
    """
    cdef size_t count = len(things), step = count if rows is None else len(rows), i = 0, row
    cdef uint32_t threads = 0
    cdef Py_ssize_t many
    cdef Pair one
    cdef Front other
    cdef bytearray out = bytearray(WIDTH * step * sizeof(uint64_t))
    cdef uint64_t *into = <uint64_t *><char *>out
    cdef const counters **of = <const counters **>malloc((count + 1) * sizeof(counters *))
    cdef size_t *at = <size_t *>malloc((count + 1) * sizeof(size_t))
    try:
        if of is NULL or at is NULL:
            raise MemoryError
        for i in range(count):
            at[i] = i
            if isinstance(things[i], Pair):
                one = things[i]
                of[i], threads = one.c.counts, one.threads
            else:
                other = things[i]
                of[i], threads = other.c.counts, other.threads
        if rows is not None:
            if sum(rows) != count:
                raise ValueError("rows must account for all things")
            i = 0
            for row in range(step):
                for many in range(rows[row]):
                    at[i] = row
                    i += 1
        with nogil:
            for i in range(count):
                gather(of[i], threads, into + at[i], step)
    finally:
        free(of)
        free(at)
    return out


cdef class Pair:
    """A frontend and one of its backends: the counters of their connections."""

    cdef pair c
    cdef uint32_t threads
    cdef uint32_t routes  # published routes that name it
    cdef Front front  # lives as long as connections of this pair may

    def __cinit__(self, Front front not None):
        self.front = front
        self.threads = front.threads
        self.c.counts = counters_new(self.threads)
        front.members += 1

    def __dealloc__(self):
        free(self.c.counts)

    def read(self):
        return counters_sum(self.c.counts, self.threads)


cdef class Front:
    """A frontend: its route, and the counters of flows that never reached a backend."""

    cdef frontend c
    cdef uint32_t threads
    cdef uint32_t listeners
    cdef uint32_t members  # pairs of it that are not released
    cdef Pair peers  # of the frontend at which other nodes hand flows over
    cdef Pair aside  # of connections that go to whoever else serves the port
    cdef list pairs  # those of the published route: they live as long as it does

    def __cinit__(self, Engine owner not None, bytes address not None, uint16_t port, bint any):
        if len(address) != 16:
            raise ValueError("an address is 16 bytes, IPv4 as IPv4-mapped")
        self.threads = owner.e.threads
        self.c.counts = counters_new(self.threads)
        memcpy(self.c.address.bytes, <const uint8_t *>address, 16)
        self.c.port = in_network_order(port)
        self.c.any = any
        self.pairs = []

    def __dealloc__(self):
        free(self.c.counts)
        route_free(self.c.route)

    def read(self):
        return counters_sum(self.c.counts, self.threads)

    def handed(self):
        return self.peers.read()  # what other nodes have handed over


@cython.no_gc_clear  # __dealloc__ reads the lists of what is to be freed
cdef class Engine:
    """The threads and all that they carry.

    Args:
        threads: how many, at least 1.
        retries: further choices after the first, 0..RETRIES_MOST.
        connect_timeout, idle_timeout (0: never), udp_idle_timeout: seconds.
        udp_sessions, connections, pipes: upper bounds, all threads together.
        ports: first and last source port for connections to backends when the kernel finds none that is free.
        mark: of connections to whoever else serves a port; see put_aside.

    Raises:
        OSError: descriptors or memory for the threads cannot be had.
    """

    cdef engine e
    cdef bint running
    cdef uint32_t started
    cdef set held  # Fronts and Pairs that threads may know of
    cdef list garbage  # addresses of routes that were replaced and may still be read
    cdef list old_peer_acls  # likewise
    cdef list old_backends  # likewise
    cdef uint8_t *gone  # by owner: LEFT or MOVED, for those of old_backends
    cdef uint32_t *index  # by owner, its place in the route that is being made, from 1; zeros between two

    def __cinit__(self, *, uint32_t threads, uint32_t retries, double connect_timeout, double idle_timeout,
                  double udp_idle_timeout, int64_t udp_sessions, int64_t connections, int64_t pipes,
                  tuple ports not None, uint32_t mark=0):
        cdef uint32_t i
        if not 1 <= threads <= 1024 or retries >= TRIES_MAX:
            raise ValueError("threads are 1..1024, retries 0..15")
        self.e.threads = threads
        self.e.retries = retries
        self.e.connect_ns = <uint64_t>(connect_timeout * 1e9)
        self.e.idle_ns = <uint64_t>(idle_timeout * 1e9)
        self.e.udp_idle_ns = <uint64_t>(udp_idle_timeout * 1e9)
        self.e.udp_max = udp_sessions
        secret = os.urandom(sizeof(self.e.secret))
        memcpy(self.e.secret, <const char *>secret, sizeof(self.e.secret))
        self.e.connections_max = connections
        self.e.pipes_max = pipes
        self.e.mark = mark
        first, last = ports
        if not 0 < first <= last < 65536:
            raise ValueError(f"{first}..{last} are no ports")
        self.e.port_first = first
        self.e.port_count = last - first + 1
        self.held = set()
        self.garbage = []
        self.old_peer_acls = []
        self.old_backends = []
        self.gone = <uint8_t *>calloc(BACKENDS, 1)
        self.index = <uint32_t *>calloc(BACKENDS, sizeof(uint32_t))
        self.e.backends = <backend **>calloc(BACKENDS, sizeof(backend *))
        self.e.workers = <worker **>calloc(threads, sizeof(worker *))
        if self.e.backends is NULL or self.e.workers is NULL or self.gone is NULL or self.index is NULL:
            raise MemoryError
        for i in range(threads):
            self.e.workers[i] = worker_new(&self.e, i)
            if self.e.workers[i] is NULL:
                raise OSError("no descriptors or memory for a forwarding thread")
        self.running = True
        for i in range(threads):
            if not worker_start(self.e.workers[i]):
                raise OSError("a forwarding thread could not be started")
            self.started += 1

    def __dealloc__(self):
        cdef uint32_t i
        self.stop()
        if self.e.workers is not NULL:
            for i in range(self.e.threads):
                if self.e.workers[i] is not NULL:
                    worker_free(self.e.workers[i])
            free(self.e.workers)
        if self.e.backends is not NULL:
            for i in range(<uint32_t>BACKENDS):
                free(self.e.backends[i])
            free(self.e.backends)
        self.sweep()
        free(self.gone)
        free(self.index)
        peer_acl_free(self.e.peer_acl)

    cdef void stop(self) noexcept:
        cdef uint32_t i
        if not self.running:
            return
        self.running = False
        with nogil:
            for i in range(self.started):
                post(self.e.workers[i], OP_QUIT, NULL)
            for i in range(self.started):
                pthread_join(self.e.workers[i].thread, NULL)

    cdef void sweep(self) noexcept:
        for address in self.garbage:
            route_free(<route *><size_t>address)
        self.garbage.clear()
        for address in self.old_peer_acls:
            peer_acl_free(<peer_acl *><size_t>address)
        self.old_peer_acls.clear()
        for address in self.old_backends:
            self.gone[(<backend *><size_t>address).id] = 0
            free(<backend *><size_t>address)
        self.old_backends.clear()

    cdef void tell(self, int op, void *argument) noexcept:
        if self.running:
            with nogil:
                call(&self.e, op, argument)

    def close(self):
        """Reset what is open and end the threads; counters stay readable."""
        self.stop()
        self.sweep()

    def put_backend(self, uint32_t owner, bytes address not None, uint16_t port, bytes tag=None):
        """Set the address of an owner. If it had another one, its UDP sessions end with the next `collect`, and its
        connections unless the former address still answers; those that are being made are made to the new one.

        Args:
            tag: of a backend on another node: its name for that node's agent, whose peer port is at `address`.
        """
        cdef backend *b
        cdef backend *old
        if not MESH_OWNER_FIRST <= owner < BACKENDS or len(address) != 16:
            raise ValueError(f"owner {owner} is not within 2..{BACKENDS - 1}, or its address not 16 bytes")
        if tag is not None and len(tag) != TAG_SIZE:
            raise ValueError(f"a tag is {TAG_SIZE} bytes")
        b = backend_new(owner, address, port, tag)
        old = <backend *>fp_load(&self.e.backends[owner])
        if old is not NULL and is_same_backend(old, b):
            free(b)  # only its weight or the like has changed: its sessions stay
            return
        fp_store(&self.e.backends[owner], b)
        if old is not NULL:
            self.forget(old, LEFT if b.remote or old.remote else MOVED)

    def drop_backend(self, uint32_t owner):
        """No new flows. Its UDP sessions end with the next `collect`, its connections by themselves."""
        cdef backend *old
        if not MESH_OWNER_FIRST <= owner < BACKENDS:
            raise ValueError(f"owner {owner} is not within 2..{BACKENDS - 1}")
        old = <backend *>fp_load(&self.e.backends[owner])
        if old is NULL:
            return
        fp_store(&self.e.backends[owner], NULL)
        self.forget(old, LEFT)

    cdef void forget(self, backend *old, uint8_t how):
        self.gone[old.id] = how
        self.old_backends.append(<size_t>old)

    def peers(self):
        """The frontend at which other nodes hand flows over; see `put_peer_acl`. Its `read` counts them."""
        cdef Front made = self.front(bytes(16), 0, True)
        made.peers = self.pair(made)
        made.c.peers = &made.peers.c
        return made

    def put_peer_acl(self, list nodes not None, list backends not None, list keys not None, bint require):
        """Which nodes may hand flows over, and for which backends.

        Args:
            nodes: (16 bytes, whether it proves whatever it sends, whether it checks proofs).
            keys: (number, 16 bytes) of those that are valid; this node proves by the first.
            require: accept nothing unproven, whoever sends it.
            backends: (tag, protocol, owner, allow, deny), sorted; the lists as those of `put_route`, for the clients
                that other nodes name.
        """
        cdef peer_acl *old = <peer_acl *>fp_load(&self.e.peer_acl)
        cdef peer_acl *made
        made = peer_acl_new(nodes, backends, keys, require)
        made.serial = old.serial + 1 if old is not NULL else 1
        fp_store(&self.e.peer_acl, made)
        if old is not NULL:
            self.old_peer_acls.append(<size_t>old)

    def front(self, bytes address not None, uint16_t port, bint any):
        """A new frontend. `port`: as clients call it. `any`: it listens on all addresses; sockets tell the called one."""
        cdef Front made = Front(self, address, port, any)
        self.held.add(made)
        return made

    def pair(self, Front front not None):
        """New counters for a backend of a frontend."""
        cdef Pair made = Pair(front)
        self.held.add(made)
        return made

    def put_aside(self, Front front not None, bint served):
        """Whether somebody else serves the port behind our redirection, which connections with `mark` do not meet: they
        get what no backend can be reached for."""
        if served and front.aside is None:
            front.aside = self.pair(front)
            front.members -= 1  # it lives as long as the frontend does
        fp_store(&front.c.aside, &front.aside.c if served else NULL)

    def release(self, thing not None):
        """Forget a Pair that no route names and no connection uses, or a Front without listeners and pairs; False: it
        is in use. Call `collect` between the put_route that leaves it out and this."""
        cdef Pair one
        if thing not in self.held:
            return True
        if isinstance(thing, Front):
            if (<Front>thing).listeners or (<Front>thing).members:
                return False
            if (<Front>thing).aside is not None:
                counts = (<Front>thing).aside.read()
                if counts[0] != counts[1]:
                    return False
                self.held.discard((<Front>thing).aside)
        else:
            one = thing
            counts = one.read()
            if self.garbage or one.routes or counts[0] != counts[1]:
                return False
            one.front.members -= 1
        self.held.discard(thing)
        return True

    def put_route(self, Front front not None, SlotTable table not None, pairs not None, *, bint by_client,
                  bint announce, list allow not None, list deny not None, bint passing=False):
        """New connections of a frontend go by this table from now on.

        Args:
            pairs: Pair by owner, for every owner that may get connections; slots of others refuse.
            by_client: hash the client's address alone.
            announce: begin every connection with a PROXY protocol v2 header.
            allow, deny: networks as (16 bytes, prefix length of 128), merged and sorted as by mesh.rules. Connections
                and sessions under way meet them with `enforce`.
            passing: connections go to whoever else serves the port; see put_aside.
        """
        cdef route *way = <route *>calloc(1, sizeof(route))
        cdef uint32_t i = 0
        cdef Pair one
        cdef route *old
        try:
            if way is NULL:
                raise MemoryError
            way.targets = <target *>calloc(len(pairs) + 1, sizeof(target))
            if way.targets is NULL:
                raise MemoryError
            for owner, one in pairs.items():
                if not MESH_OWNER_FIRST <= owner < BACKENDS:
                    raise ValueError(f"owner {owner} is not within 2..{BACKENDS - 1}")
                i += 1
                way.targets[i].pair = &one.c
                way.targets[i].backend = owner
                self.index[<uint32_t>owner] = i
            way.count = i
            way.by_client = by_client
            way.announce = announce
            way.passing = passing
            rules_fill(&way.rules, allow, deny)
            route_index(way, table, self.index)
        except BaseException:
            route_free(way)
            raise
        finally:
            for owner in pairs:
                if MESH_OWNER_FIRST <= owner < BACKENDS:
                    self.index[<uint32_t>owner] = 0
        old = <route *>fp_load(&front.c.route)
        fp_store(&front.c.route, way)
        for one in front.pairs:
            one.routes -= 1
        if old is not NULL:
            self.garbage.append(<size_t>old)
        front.pairs = list(pairs.values())
        for one in front.pairs:
            one.routes += 1

    def enforce(self):
        """End the connections and sessions whose clients the published routes do not admit; costs a look at each."""
        self.tell(OP_ENFORCE, NULL)

    def find(self, list callers not None):
        """How accepted connections stand, looking at the newest 100,000 of each thread.

        Args:
            callers: of each the client's address (16 bytes), its port, and the port that it called.

        Returns:
            for each None (no such connection is open), or (the owners that it was given to, in this order, whether the
            last one has taken it, whether it was handed to whoever else serves the port instead).
        """
        cdef inquiry asked
        cdef caller *one
        cdef uint32_t i
        cdef bytes address
        asked.looks = LOOKS
        asked.callers = <caller *>calloc(len(callers) + 1, sizeof(caller))
        asked.by_port = <uint32_t *>calloc(65536, sizeof(uint32_t))
        try:
            if asked.callers is NULL or asked.by_port is NULL:
                raise MemoryError
            for i, (address, port, called) in enumerate(callers):
                if len(address) != sizeof(one.address):
                    raise ValueError("an address is 16 bytes")
                one = &asked.callers[i]
                memcpy(&one.address, <const char *>address, sizeof(one.address))
                one.port = in_network_order(port)
                one.called = in_network_order(called)
                one.next = asked.by_port[one.port]
                asked.by_port[one.port] = i + 1
            self.tell(OP_FIND, &asked)
            found = []
            for i in range(<uint32_t>len(callers)):
                one = &asked.callers[i]
                tried = tuple([one.tried[k] for k in range(min(one.tries, <uint32_t>TRIES_MAX))])
                found.append((tried, bool(one.open), bool(one.passed)) if one.found else None)
            return found
        finally:
            free(asked.callers)
            free(asked.by_port)

    def collect(self):
        """Free what was replaced, once every thread has passed through its loop: one wait for all of it."""
        if self.old_backends:
            self.tell(OP_FORGET, self.gone)
        elif self.garbage or self.old_peer_acls:
            self.tell(OP_SYNC, NULL)
        self.sweep()

    def listen(self, Front front not None, int fd, *, bint stream, bint six, uint32_t thread):
        """Serve a listening socket, which the engine owns from now on, in one thread."""
        cdef listener *l = <listener *>calloc(1, sizeof(listener))
        cdef worker *w = self.e.workers[thread % self.e.threads]
        if l is NULL:
            raise MemoryError
        l.kind = KIND_LISTENER if stream else KIND_DATAGRAMS
        l.stream = stream
        l.six = six
        l.fd = fd
        l.burst = 1
        l.frontend = &front.c
        front.listeners += 1
        with nogil:
            post(w, OP_LISTEN, l)
            await_done(w)

    def unlisten(self, Front front not None):
        """Stop: serve the connections in the queues, then close the sockets. UDP sessions end."""
        if front.listeners:
            self.tell(OP_UNLISTEN, &front.c)
            front.listeners = 0

    def yield_sockets(self):
        """Stop accepting on all frontends; the process that shares the sockets serves their queues."""
        self.tell(OP_YIELD, NULL)

    def leave(self):
        """Answer no more probes of other nodes; serve on."""
        self.e.leaving = 1

    def abort(self):
        """Reset all connections and end all sessions."""
        self.tell(OP_ABORT, NULL)

    def turns(self):
        """How often each thread's loop has turned, and have each turn once more: one that does not hangs. Any thread;
        never blocks."""
        cdef uint32_t i
        found = [fp_peek(&self.e.workers[i].turns) for i in range(self.e.threads)]
        for i in range(self.e.threads if self.running else 0):
            poke(self.e.workers[i])
        return found

    def totals(self):
        """Counters and gauges of all threads by name, and how many connections and sessions there are."""
        cdef totals sum
        cdef totals *t
        cdef uint32_t i
        cdef size_t k
        memset(&sum, 0, sizeof(sum))
        for i in range(self.e.threads):
            t = &self.e.workers[i].totals
            for k in range(sizeof(totals) // sizeof(uint64_t)):
                (<uint64_t *>&sum)[k] += fp_peek(&(<uint64_t *>t)[k])
        return sum
