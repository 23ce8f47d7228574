# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""All structs of the engine, and who may access them.

- A `worker` and everything reachable from it (connections, sessions, pipes, listeners) belong to its thread.
- `route`, `backend` and `peer_acl` are immutable once published. A writer swaps the pointer, waits until every thread
  has passed through its loop (worker.pyx: call), and frees the old one.
- `counters` and `totals` have one writer, their thread; any thread may read them.

The extension modules hold no state of their own: everything hangs on an `engine`, which Python's `Engine` owns.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mesh._maglev cimport mesh_addr, mesh_flow
from mesh.fastpath.sys cimport (
    epoll_event, in6_addr, iovec, mmsghdr, pthread_cond_t, pthread_mutex_t, pthread_t, sockaddr_in6)

cdef enum:
    SCRATCH = 32768  # bytes per read; a flow that fills it is bulk and is spliced from then on
    BULK_MIN = 8192  # a smaller splice ends the bulk mode of its flow
    PIPE_WANTED = 1048576
    PIPE_MIN = 65536
    BUDGET = 16  # rounds of a pump before other connections get a turn
    EVENTS = 256
    ACCEPT_MAX = 64
    ACCEPT_CALM = 16
    TRIES_MAX = 16
    BATCH = 32  # datagrams per system call
    DATAGRAM = 65536
    CONTROL = 128
    CAUSES = 12  # members of mesh.datapath.base.Failure
    BUCKETS = 15
    BACKENDS = 65538
    CHUNK = 64  # connections or sessions allocated at once
    PEER_UDP_HEAD = 52  # bytes before a datagram that another node hands over, without its proof
    PEER_REPLY_HEAD = 20  # bytes before an answer to such a datagram, with its proof
    PROOF_SIZE = 16  # see proof.pyx
    PEER_HEAD_MAX = PEER_UDP_HEAD + PROOF_SIZE
    PROOF_BODY = 64
    PROOF_WINDOW = 60  # seconds
    PROOF_KEYS = 4
    TAG_SIZE = 10  # names a backend to its own node: 8 bytes of its seed, its port in network order

cdef enum:  # conn.stage: what is expected from another node while connecting
    STAGE_NONE = 0
    STAGE_HEADER = 1  # its header
    STAGE_ANSWER = 2  # its answer to our header

cdef enum:  # mesh.datapath.base.Failure, in its order
    FAIL_REFUSED = 0
    FAIL_TIMEOUT = 1
    FAIL_UNREACHABLE = 2
    FAIL_RESET = 3
    FAIL_NO_BACKEND = 4
    FAIL_LIMIT = 5
    FAIL_DENIED = 6
    FAIL_OTHER = 7

cdef enum:  # first byte of the struct that an epoll event points to
    KIND_WAKE = 1
    KIND_LISTENER = 2
    KIND_CLIENT = 3
    KIND_BACKEND = 4
    KIND_DATAGRAMS = 5
    KIND_SESSION = 6

cdef enum:  # side.flags
    READABLE = 1
    WRITABLE = 2
    HANGUP = 4  # the peer sent FIN or RST: all its bytes are in the receive queue
    ENDED = 8  # read to its end
    SHUT = 16  # shut down for writing
    BULK = 32
    NODELAY = 64
    BROKEN = 128  # this side was reset, or its peer vanished
    SENT = 256  # a first message was sent to this side
    URGENT = 512  # a read may stop at an urgent mark: a short one does not mean an empty queue
    INLINE = 1024  # urgent data is read in line (SO_OOBINLINE)
    MUTED = 2048  # not in epoll for reading: its bytes are read without events

cdef enum:  # conn.state
    CONNECTING = 1
    OPEN = 2
    DEAD = 3

cdef enum:  # why a backend's former address is not used any more
    LEFT = 1  # there is no such backend, or another path leads to it
    MOVED = 2

cdef enum:  # result of a pump
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
    OP_UNLISTEN = 2  # argument: frontend; accept the queue, then close
    OP_YIELD = 3  # argument: frontend or NULL for all; stop accepting, leave the queue to who shares the sockets
    OP_FORGET = 4  # argument: a byte for each backend id, nonzero where its UDP sessions end
    OP_ABORT = 5  # reset all connections, end all sessions
    OP_QUIT = 6
    OP_ENFORCE = 7  # end the connections and sessions of clients that are not admitted any more
    OP_FIND = 8  # argument: inquiry

cdef struct counters:  # of one pair or frontend in one thread
    uint64_t begun  # attempts to reach the backend, UDP sessions included
    uint64_t ended  # attempts that are over
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
    uint64_t udp_chained  # sessions of other flows that were looked at in the table of sessions
    uint64_t pipe_failures
    uint64_t passed_connections  # handed to whoever else serves the port
    uint64_t peer_connections  # peer_request over by other nodes
    uint64_t peer_foreign  # from addresses that are no node of the cluster
    uint64_t peer_malformed
    uint64_t peer_unknown  # for a backend that this node does not have
    uint64_t peer_unproven  # without the proof that the node they seem to come from gives
    uint64_t peer_denied  # by source rules, which the node that was called has let through
    uint64_t connections  # gauges from here on
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
    uint8_t fast_connect  # hint: the handshake is over when connect() returns
    uint8_t remote  # on another node, whose agent is at `address`
    uint8_t tag[TAG_SIZE]  # its name for that agent

cdef struct pair:  # a frontend and one of its backends
    counters *counts  # one per thread

cdef struct target:
    pair *pair
    uint32_t backend

cdef struct prefix:  # of IPv4 clients, or of all others
    mesh_addr address
    uint32_t bits  # of 128
    uint32_t four

cdef struct rules:  # which clients are admitted
    prefix *allow  # both lists: IPv4 first, sorted, none within another
    uint32_t allows
    prefix *deny
    uint32_t denies

cdef struct route:  # where new flows of a frontend go
    uint32_t size
    uint32_t *slots  # index into targets; 0: no backend
    target *targets
    uint32_t count
    uint32_t *order  # indices of the targets that have slots, in the order of their first slots
    uint32_t ordered
    uint8_t by_client
    uint8_t announce  # PROXY protocol v2
    uint8_t passing  # no backend can be reached from here: left to whoever else serves the port
    rules rules

cdef struct frontend:
    route *route  # atomic
    counters *counts
    uint16_t port  # network order, as clients call it
    uint8_t any  # listens on all addresses: the called one is asked of the socket
    pair *peers  # of the frontend for other nodes: what their flows count into; else NULL
    pair *aside  # atomic; somebody else serves the port behind our redirection: what goes there counts into; else NULL
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
    pipe *pipe  # read from this side and not yet written to the other, if spliced
    char *buffer  # the same, if received
    uint32_t start
    uint32_t length

cdef struct conn:
    side client
    side backend
    uint8_t state
    uint8_t queued  # on worker.ready
    uint8_t listed  # its timer list
    uint8_t tries
    uint8_t announce  # the backend gets a PROXY protocol header
    uint8_t stage
    uint8_t remote  # towards another node's agent
    uint8_t eager  # bytes are ready to be sent once the backend has answered
    uint8_t unreached  # another node's agent did not answer
    uint8_t passed  # handed to whoever else serves the port
    uint8_t tag[TAG_SIZE]
    uint32_t again  # see choose
    uint32_t named  # likewise
    uint32_t hash
    uint32_t tried[TRIES_MAX]
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
    uint8_t leaving  # yielded: not read, but sessions may still reply through it
    uint8_t stream  # TCP
    uint8_t six  # an IPv6 socket (IPv4 clients are mapped)
    int fd
    uint32_t burst  # connections to take per event
    uint32_t calm  # full bursts until the burst grows
    uint32_t sessions
    frontend *frontend
    listener *next

cdef struct session:
    uint8_t kind
    uint8_t dead
    uint8_t tries
    int fd  # connected to the backend; -1: it refused, and the next datagram chooses again
    uint8_t remote  # towards another node's agent
    uint8_t proven  # it answers with proofs, and nothing else is taken for its answer
    uint8_t answers  # the other way round: so does this node, to the node that has handed the flow over
    uint8_t checked  # the agent to which it leads checks proofs
    uint32_t proof_at  # time of the proof in `head` or `tail`
    uint64_t serial  # of the peer_acl of that proof; 0: none yet
    uint32_t head_length
    sockaddr_in6 node  # to which it leads
    uint8_t head[PEER_HEAD_MAX]  # sent before each datagram, if remote; or as another node sends it
    uint8_t tail[PEER_REPLY_HEAD]  # sent before each answer
    uint32_t hash  # for the choice of a backend
    uint32_t key  # for the table of sessions
    uint32_t again
    uint32_t named  # see choose
    uint32_t tried[TRIES_MAX]
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

cdef struct datagrams:  # of one recvmmsg or sendmmsg
    mmsghdr messages[BATCH]
    iovec vectors[BATCH]
    iovec doubles[BATCH][2]
    sockaddr_in6 names[BATCH]
    char control[BATCH][CONTROL]

cdef struct caller:  # a client's end of a connection, and how that stands
    mesh_addr address
    uint16_t port  # network order
    uint16_t called  # likewise: the frontend's
    uint32_t next  # the next caller with this port, from 1; 0: none
    uint8_t found
    uint8_t open  # the last backend of `tried`, or whoever it was passed to, has taken it
    uint8_t passed
    uint8_t tries
    uint32_t tried[TRIES_MAX]

cdef struct inquiry:
    caller *callers
    uint32_t *by_port  # 65536: the first caller with this port (as it lies in memory), from 1; 0: none
    uint32_t looks  # at so many connections, the newest first

cdef struct command:
    int op
    void *argument

cdef struct pool:
    size_t size  # of one object, bytes; a multiple of a pointer's
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
    uint64_t turns  # of its loop; one writer, as counters
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
    backend aside  # where the connection goes that is being handed to whoever else serves its port
    session *owner[BATCH]
    epoll_event events[EVENTS]
    totals totals
    command command
    uint64_t posted
    uint64_t done
    pthread_mutex_t mutex
    pthread_cond_t cond
    pthread_t thread

cdef struct peer_backend:  # a backend of this node, as other nodes name it
    uint8_t tag[TAG_SIZE]
    uint8_t protocol
    uint32_t backend
    rules rules

cdef struct peer_node:  # a node that may hand flows over
    mesh_addr address
    uint8_t proves  # it proves whatever it sends
    uint8_t checks  # it understands proofs, and answers with them

cdef struct proof_key:
    uint32_t id
    uint8_t secret[16]

cdef struct peer_acl:  # which nodes may hand flows over, and for which backends; immutable
    uint64_t serial  # from 1, of another one each time
    uint8_t require  # nothing unproven is accepted, whoever sends it
    uint32_t key_count
    proof_key keys[PROOF_KEYS]  # the first proves
    peer_node *nodes
    uint32_t node_count
    peer_backend *backends  # sorted by tag and protocol
    uint32_t count

cdef struct engine:
    peer_acl *peer_acl  # atomic
    uint32_t threads
    uint32_t retries
    uint32_t port_first  # net.ipv4.ip_local_port_range
    uint32_t port_count
    uint64_t connect_ns
    uint64_t idle_ns
    uint64_t udp_idle_ns
    int64_t udp_max
    uint8_t secret[16]  # of the tables of sessions: clients choose the keys
    int64_t connections_max
    int64_t pipes_max
    int64_t connections  # atomic, all threads
    int64_t sessions  # atomic
    int64_t pipes  # atomic
    uint32_t mark  # of connections that our redirection leaves alone
    int32_t leaving  # atomic: other nodes' probes get no answer
    backend **backends  # BACKENDS of them, by id; atomic
    worker **workers
