# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""All structs of the engine, and who may touch them.

- A `worker` and all that hangs on it (connections, sessions, pipes, listeners) belong to its thread alone.
- `route` and `backend` are immutable once published; a writer swaps the pointer, waits until every thread has passed
  through its loop (worker.pxd: call), and frees the old one.
- `counters` have one writer, their thread; anybody may read them.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mesh._maglev cimport mesh_addr, mesh_flow
from mesh.fastpath.sys cimport (
    epoll_event, in6_addr, iovec, mmsghdr, pthread_cond_t, pthread_mutex_t, pthread_t, sockaddr_in6)

cdef enum:
    SCRATCH = 32768  # bytes read at once; a flow that fills it is bulk, and is spliced from then on
    BULK_LEAST = 8192  # a splice that moves less ends the bulk mode of its flow
    PIPE_WANTED = 1048576
    PIPE_LEAST = 65536
    BUDGET = 16  # rounds of a pump before other flows get their turn
    EVENTS = 256
    ACCEPT_MOST = 64
    ACCEPT_CALM = 16
    TRIES_MOST = 16
    BATCH = 32  # datagrams per system call
    DATAGRAM = 65536
    CONTROL = 128
    CAUSES = 8  # as mesh.datapath.base.Failure, in its order
    BUCKETS = 15
    BACKENDS = 65538
    CHUNK = 64  # connections or sessions allocated at once
    PEER_UDP = 52  # bytes ahead of a datagram that another node hands over
    TAG = 10  # what names a backend to its own node: 8 bytes of its seed, its port in network order

cdef enum:  # conn.stage: what is awaited from another node while connecting
    STAGE_NONE = 0
    STAGE_HEADER = 1  # its header
    STAGE_ANSWER = 2  # its answer to ours

cdef enum:  # Failure, in its order
    FAIL_REFUSED = 0
    FAIL_TIMEOUT = 1
    FAIL_UNREACHABLE = 2
    FAIL_RESET = 3
    FAIL_NO_BACKEND = 4
    FAIL_LIMIT = 5
    FAIL_DENIED = 6
    FAIL_OTHER = 7

cdef enum:  # first byte of whatever an epoll event points at
    KIND_WAKE = 1
    KIND_LISTENER = 2
    KIND_CLIENT = 3
    KIND_BACKEND = 4
    KIND_DATAGRAMS = 5
    KIND_SESSION = 6

cdef enum:  # side.flags
    READABLE = 1
    WRITABLE = 2
    HANGUP = 4  # the peer sent FIN or RST: all that it said is in the queue
    ENDED = 8  # nothing more comes from this side
    SHUT = 16  # nothing more goes to this side
    BULK = 32
    NODELAY = 64
    BROKEN = 128  # this side was reset, or its peer vanished
    SPOKEN = 256  # a first message went to this side
    URGENT = 512  # reads may end early at an urgent mark: a short one proves nothing
    INLINE = 1024  # urgent data is read in its place
    MUTED = 2048  # epoll does not tell of bytes from this side: it is being read without that

cdef enum:  # conn.state
    CONNECTING = 1
    OPEN = 2
    DEAD = 3

cdef enum:  # what a pump says
    PUMP_IDLE = 0
    PUMP_MORE = 1
    PUMP_BROKEN = 2

cdef enum:  # conn.listed
    LIST_NONE = 0
    LIST_CONNECTING = 1
    LIST_YOUNG = 2
    LIST_IDLE = 3

cdef enum:  # command.op
    OP_SYNC = 0
    OP_LISTEN = 1  # argument: listener of this worker
    OP_UNLISTEN = 2  # argument: frontend; accept what is queued, then close
    OP_YIELD = 3  # argument: frontend or NULL for all; stop without touching the queue (the sockets are shared)
    OP_FORGET = 4  # argument: a byte for each backend id, not 0 where its UDP sessions shall end
    OP_ABORT = 5  # reset all connections, end all sessions
    OP_QUIT = 6

cdef struct counters:  # of one pair or frontend in one thread
    uint64_t begun  # attempts to reach the backend, sessions included
    uint64_t ended  # of those, over
    uint64_t opened
    uint64_t closed
    uint64_t retried
    uint64_t failed[CAUSES]
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t packets_in
    uint64_t packets_out
    uint64_t connect[BUCKETS]
    uint64_t connect_ns
    uint64_t pad[7]  # 320 bytes: no cache line is shared by two threads

cdef struct totals:  # of one thread
    uint64_t accept_pauses
    uint64_t accept_errors
    uint64_t udp_evictions
    uint64_t udp_dropped
    uint64_t pipe_failures
    uint64_t peer_connections  # handed over by other nodes
    uint64_t peer_foreign  # callers that are no node of the cluster
    uint64_t peer_malformed
    uint64_t peer_unknown  # for a backend that is not here
    uint64_t connections  # of this thread now; gauges from here on
    uint64_t connecting
    uint64_t sessions
    uint64_t pipes_open
    uint64_t pipes_used
    uint64_t buffers_used
    uint64_t listeners
    uint64_t paused

cdef struct backend:
    uint32_t id
    uint32_t length  # of address: sockaddr_in or sockaddr_in6
    sockaddr_in6 address
    uint8_t near  # hint: the handshake is over when connect() returns
    uint8_t away  # on another node, whose agent is at `address`
    uint8_t tag[TAG]  # for that agent

cdef struct pair:  # a frontend with one backend of it
    counters *counts  # one per thread

cdef struct target:
    pair *pair
    uint32_t backend

cdef struct prefix:
    mesh_addr address
    uint32_t bits  # of 128

cdef struct route:  # where the new connections of a frontend go
    uint32_t size
    uint32_t *slots  # index into targets; 0 is nobody
    target *targets
    uint32_t count
    uint32_t *order  # indices of the targets that have slots, by their first slots
    uint32_t ordered
    uint8_t by_client
    uint8_t announce  # PROXY protocol v2
    prefix *allow
    uint32_t allows
    prefix *deny
    uint32_t denies

cdef struct frontend:
    route *route  # atomic
    counters *counts
    uint16_t port  # network order, as clients call it
    uint8_t any  # listens on all addresses: the called one must be asked for
    pair *peers  # where other nodes hand flows over: what those count into; NULL elsewhere
    mesh_addr address  # the called one, otherwise

cdef struct pipe:
    int fds[2]
    uint32_t size
    uint32_t held  # bytes in it
    pipe *next

cdef struct side:
    uint8_t kind
    uint16_t flags
    int fd
    conn *conn
    pipe *pipe  # what was read from this side and waits for the other, if spliced
    char *buffer  # the same, if read
    uint32_t start
    uint32_t length

cdef struct conn:
    side client
    side backend
    uint8_t state
    uint8_t queued  # on worker.ready
    uint8_t listed  # the timer list it is on
    uint8_t tries
    uint8_t announce  # the backend is told who calls
    uint8_t stage
    uint8_t away  # towards another node's agent
    uint8_t eager  # something is to be sent as soon as the backend has answered
    uint8_t tag[TAG]
    uint32_t again  # see choose
    uint32_t hash
    uint32_t tried[TRIES_MOST]
    frontend *frontend
    pair *pair
    uint64_t started  # ns; of the attempt, then of the opening, then of the last byte
    mesh_flow flow
    conn *timer_next
    conn *timer_previous
    conn *next  # all connections of the worker, or the free list
    conn *previous
    conn *ready_next

cdef struct conn_list:
    conn *head
    conn *tail

cdef struct listener:
    uint8_t kind
    uint8_t armed  # in epoll
    uint8_t leaving  # yielded: no reading, but sessions may still answer through it
    uint8_t stream  # TCP
    uint8_t six  # an IPv6 socket (IPv4 clients are mapped)
    int fd
    uint32_t burst  # connections to take per event
    uint32_t calm  # full bursts until it grows
    uint32_t sessions
    frontend *frontend
    listener *next

cdef struct session:
    uint8_t kind
    uint8_t dead
    uint8_t tries
    int fd  # connected to the backend; -1: the backend refused, the next datagram picks anew
    uint8_t away  # towards another node's agent
    uint8_t tag[TAG]  # of the backend that another node asked for
    uint8_t head[PEER_UDP]  # what goes ahead of each datagram, if away
    uint32_t hash  # by which it is routed
    uint32_t key  # by which it is found
    uint32_t again
    uint32_t tried[TRIES_MOST]
    uint32_t backend
    listener *listener
    pair *pair
    mesh_flow flow
    sockaddr_in6 client  # as the socket wants it
    uint32_t client_length
    uint64_t seen
    session *chain  # same bucket of the table
    session *newer
    session *older

cdef struct datagrams:  # what one recvmmsg or sendmmsg works on
    mmsghdr messages[BATCH]
    iovec vectors[BATCH]
    iovec doubles[BATCH][2]
    sockaddr_in6 names[BATCH]
    char control[BATCH][CONTROL]

cdef struct command:
    int op
    void *argument

cdef struct pool:
    size_t size  # of one thing, bytes; a multiple of a pointer's
    void *free  # first word of each: the next
    void *chunks  # likewise

cdef struct worker:
    uint32_t index
    int epoll
    int wake
    uint8_t quit
    uint8_t paused
    uint8_t wake_kind
    engine *engine
    uint64_t now
    uint64_t resume_at
    uint64_t pipes_at  # when to ask for pipes again after a failure
    char *scratch
    conn *all
    conn *ready_head
    conn *ready_tail
    conn *dead
    pool conns
    pool sessions
    conn_list connecting
    conn_list young
    conn_list idle
    pipe *pipes
    listener *listeners
    session **table
    uint32_t buckets  # a power of two
    session *oldest
    session *newest
    session *dead_sessions
    char *arena  # BATCH x DATAGRAM
    datagrams input
    datagrams output
    session *owner[BATCH]
    epoll_event events[EVENTS]
    totals totals
    command command
    uint64_t posted
    uint64_t done
    pthread_mutex_t mutex
    pthread_cond_t cond
    pthread_t thread

cdef struct place:  # a backend of this node, as other nodes name it
    uint8_t tag[TAG]
    uint8_t protocol
    uint32_t backend

cdef struct doors:  # what other nodes may reach here; immutable
    mesh_addr *nodes
    uint32_t node_count
    place *places  # sorted by tag and protocol
    uint32_t count

cdef struct engine:
    doors *doors  # atomic
    uint32_t threads
    uint32_t retries
    uint32_t port_first  # net.ipv4.ip_local_port_range
    uint32_t port_count
    uint64_t connect_ns
    uint64_t idle_ns
    uint64_t udp_idle_ns
    int64_t udp_most
    int64_t connections_most
    int64_t descriptors_most
    int64_t pipes_most
    int64_t connections  # atomic, all threads
    int64_t sessions  # atomic
    int64_t pipes  # atomic
    backend **backends  # BACKENDS of them, by id; atomic
    worker **workers
