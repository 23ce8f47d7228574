/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* THE CONTRACT between the eBPF programs, the Cython extensions and every node of a cluster: structs, owners, verdicts,
 * limits and the version. No functions (hash.h has those), no maps (bpf/lib/maps.h has those).
 *
 * Rules: fixed-width types; explicit, zeroed pads; network byte order is marked by __be types, everything else is host
 * order; an address is always 16 bytes, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2). Sizes and offsets are asserted.
 * Any change of layout or meaning increases MESH_ABI_VERSION; the digest of this file, geneve.h and hash.h is compiled
 * into all artefacts (MESH_ABI_DIGEST) and compared when one opens the other, so a stale build is refused and never
 * works by half.
 */
#ifndef MESH_ABI_H
#define MESH_ABI_H

#include <linux/types.h>

#define MESH_ABI_VERSION 1

/* Owners: what a slot points at. Values from MESH_OWNER_FIRST on are backend ids. */
#define MESH_OWNER_NONE  0u /* no backend: reject the flow */
#define MESH_OWNER_PASS  1u /* pass the packet to the kernel, and so to whoever served the port before */
#define MESH_OWNER_FIRST 2u

/* Set in mesh_slot.previous: the flow cache may hold notes of this slot's flows under an owner that is neither
 * current nor previous, so that a look-up is needed even where the two agree. */
#define MESH_SLOT_TRACKED 0x80000000u
#define MESH_OWNER_MASK   0x7fffffffu

/* Table sizes a service can choose from (all prime: a Maglev permutation visits every slot). */
#define MESH_TABLE_SIZES(X)     X(1021) X(4093) X(16381) X(65537) X(655373)
#define MESH_TABLE_SIZE_DEFAULT 16381u

#define MESH_MAX_BACKENDS  65536u
#define MESH_MAX_FRONTENDS 16384u

/* IPv4 addresses are stored IPv4-mapped. */
struct mesh_addr {
	union {
		__u8 bytes[16];
		__be32 words[4];
		__be64 halves[2];
	};
};
_Static_assert(sizeof(struct mesh_addr) == 16, "mesh_addr is 16 bytes");

/* A flow as the client sees it: the client's address and port, the address and port that it called. */
struct mesh_flow {
	struct mesh_addr source;
	struct mesh_addr destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad[3];
};
_Static_assert(sizeof(struct mesh_flow) == 40, "mesh_flow is 40 bytes");
_Static_assert(__builtin_offsetof(struct mesh_flow, source_port) == 32, "mesh_flow.source_port");

/* One slot of a table. `previous` is the owner that the slot had when it was last without state: a flow that is not in
 * the flow cache and does not start now belongs to it. Equal owners and no MESH_SLOT_TRACKED: no state is needed. */
struct mesh_slot {
	__u32 current;
	__u32 previous;
};
_Static_assert(sizeof(struct mesh_slot) == 8, "mesh_slot is 8 bytes");

/* How a frontend hashes. */
#define MESH_AFFINITY_FLOW   0u /* the 5-tuple */
#define MESH_AFFINITY_CLIENT 1u /* the client's address alone */

/* ---- kernel engine: what user space and the programs share in maps (bpf/lib/maps.h says who writes what) ---- */

/* Where a service's slots are: all tables lie in arenas of MESH_ARENA_SLOTS slots. The whole reference is one aligned
 * 64-bit word and is replaced by one store, so that a packet sees the old table or the new one. */
#define MESH_ARENA_BITS  20u
#define MESH_ARENA_SLOTS (1u << MESH_ARENA_BITS) /* holds the largest table size */
#define MESH_MAX_ARENAS  256u

struct mesh_table {
	__u32 first; /* arena << MESH_ARENA_BITS | index of the table's first slot in it */
	__u32 size;  /* slots, one of MESH_TABLE_SIZES; 0: the frontend is not served, packets pass */
};
_Static_assert(sizeof(struct mesh_table) == 8, "mesh_table is 8 bytes");

/* Value of mesh_ports by protocol and port: the id of the frontend with any address (0: none) and this flag. */
#define MESH_PORT_EXACT    0x80000000u /* some frontend with an address of its own has this port: see mesh_exact */
#define MESH_PORT_TUNNEL   0x40000000u /* UDP: the tunnel's port (geneve.h); no frontend may have it */
#define MESH_PORT_NODES    0x20000000u /* nodes hand over flows here: what containers send to nodes is dropped */
#define MESH_PORT_FRONTEND 0x1fffffffu
#define MESH_PORT_TCP      0u     /* index of a TCP port in mesh_ports: MESH_PORT_TCP + port in host order */
#define MESH_PORT_UDP      65536u /* likewise */

/* mesh_frontend.flags */
#define MESH_FRONTEND_CLIENT       0x1u /* affinity: hash the client's address alone */
#define MESH_FRONTEND_DENY         0x2u /* sources that no entry of the acl covers are denied */
#define MESH_FRONTEND_PASS_IF_NONE 0x4u /* no backend: pass the packet to the kernel instead of rejecting it */
#define MESH_FRONTEND_HOLD         0x8u /* take-over, first seconds: UDP flows without a note stay with PASS */

struct mesh_frontend {
	struct mesh_table table;
	__u32 flags;
	__u32 acl; /* rule set in mesh_acl, 0: none */
};
_Static_assert(sizeof(struct mesh_frontend) == 16, "mesh_frontend is 16 bytes");

/* Key of mesh_exact: frontends with an address of their own. */
struct mesh_frontend_key {
	struct mesh_addr address;
	__be16 port;
	__u8 protocol;
	__u8 pad[5];
};
_Static_assert(sizeof(struct mesh_frontend_key) == 24, "mesh_frontend_key is 24 bytes");

#define MESH_LOOPBACK 1u /* index of the loopback interface, in every network namespace */

/* mesh_backend.state */
#define MESH_BACKEND_FREE     0u /* gone: its flows go to the slot's current owner */
#define MESH_BACKEND_ACTIVE   1u
#define MESH_BACKEND_DRAINING 2u /* keeps its flows, gets no new ones (UDP flows without a note count as new) */

/* A call of this node's own for a task of another node: the socket hook connects it to the fallback proxy, at the port
 * that was called and the IPv4 address MESH_NAMED | owner, which is of loopback and names what was drawn. */
#define MESH_NAMED      0x7f6d0000u /* host order */
#define MESH_NAMED_MASK 0xffff0000u
_Static_assert(MESH_MAX_BACKENDS - 1 <= (__u32)~MESH_NAMED_MASK, "an address names every owner");

/* A backend by owner id. `epoch` changes whenever an id is given to another backend, so that notes of the old one are
 * not taken for the new one's. One that runs on another node has a `seed`: `address` is that node's then, as in
 * mesh_nodes, `seed` and `port` are what the backend is called there (struct mesh_id), `ifindex` and `bridge` are 0.
 * `frontend` has the source rules of the backend's service: they hold for flows that other nodes hand over, whatever
 * frontend those claim to have come to. */
struct mesh_backend {
	struct mesh_addr address;
	__be16 port;
	__u8 protocol;
	__u8 state;
	__u32 epoch;
	__u32 ifindex; /* host side of its veth; 0: unknown, deliver through `bridge` */
	__u32 bridge;  /* interface by which this node reaches it (docker_gwbridge); MESH_LOOPBACK: the node's own */
	__u8 mac[6];   /* of the container's end; zeros: unknown */
	__u8 version; /* on another node: the IP version that the tunnel carries to it, 4 or 6; 0: the peer port does */
	__u8 handed;  /* on another node: 1 if its peer port is shown to take flows, so that calls of own processes go
			 there */
	__be64 seed;  /* not 0: on another node */
	__u32 frontend; /* of this node; 0: not known, or on another node */
	__u32 pad2;
	__u64 networks; /* of mesh_networks: bit (first byte ^ second byte) & 63 of every address in one, as on the wire
			 */
};
_Static_assert(sizeof(struct mesh_backend) == 64, "mesh_backend is 64 bytes");
_Static_assert(__builtin_offsetof(struct mesh_backend, epoch) == 20, "mesh_backend.epoch");
_Static_assert(__builtin_offsetof(struct mesh_backend, mac) == 32, "mesh_backend.mac");
_Static_assert(__builtin_offsetof(struct mesh_backend, seed) == 40, "mesh_backend.seed");
_Static_assert(__builtin_offsetof(struct mesh_backend, networks) == 56, "mesh_backend.networks");

/* Key of mesh_networks: longest prefix of (owner, client). `bits` is 32 + the prefix' length on the 16-byte address.
 * The value is the address of this node by which the task sees such a client. */
struct mesh_network_key {
	__u32 bits;
	__u32 owner;
	struct mesh_addr client;
};
_Static_assert(sizeof(struct mesh_network_key) == 24, "mesh_network_key is 24 bytes");

/* Key of mesh_acl: longest prefix of (rule set, source). `bits` is 32 + the prefix' length on the 16-byte address. */
struct mesh_acl_key {
	__u32 bits;
	__u32 acl;
	struct mesh_addr source;
};
_Static_assert(sizeof(struct mesh_acl_key) == 24, "mesh_acl_key is 24 bytes");

#define MESH_ACL_ALLOW 1u
#define MESH_ACL_DENY  2u

/* Stamps are CLOCK_MONOTONIC in nanoseconds >> MESH_STAMP_SHIFT: about seconds, without a division. */
#define MESH_STAMP_SHIFT 30

/* Value of mesh_flows and mesh_flows_new: the owner of a flow whose slot is in transition. `stamp` is when it was last
 * seen. */
struct mesh_note {
	__u32 owner;
	__u32 epoch;    /* of the owner; 0 for PASS */
	__u32 stamp;    /* MESH_STAMP_SHIFT */
	__u32 frontend; /* and MESH_NOTE_ASKED (geneve.h) */
};
_Static_assert(sizeof(struct mesh_note) == 16, "mesh_note is 16 bytes");

/* Key of mesh_revnat is a mesh_flow: source = the client as the task sees it, destination = the backend. */
#define MESH_REVNAT_PEER       0x1u        /* the client is a container of this node: deliver to its veth */
#define MESH_REVNAT_HAIRPIN    0x2u        /* the client is the task itself and sees mesh_config.hairpin as its peer */
#define MESH_REVNAT_FIN_IN     0x4u        /* the client has closed its direction */
#define MESH_REVNAT_FIN_OUT    0x8u        /* the task has closed its direction */
#define MESH_REVNAT_OPENED     0x10u       /* counted in `starts` */
#define MESH_REVNAT_REFUSED    0x20u       /* the task has refused the connection, and the client was not told */
#define MESH_REVNAT_ANSWERED   0x40u       /* the task has answered the start of the flow */
#define MESH_REVNAT_UNANSWERED 0x80u       /* counted as unanswered */
#define MESH_REVNAT_TRANSLATED 0x100u      /* the client has another source than the task sees */
#define MESH_REVNAT_NODE       0x80000000u /* in `ifindex`: the client called another node, the rest is its mesh_node.id */

/* Value of mesh_revnat, mesh_revnat_udp and mesh_revnat_new. */
struct mesh_revnat {
	struct mesh_addr called; /* the address that the client called */
	struct mesh_addr client; /* the client's own address */
	__be16 called_port;
	__u16 flags;
	__u32 ifindex; /* where the client's packets come in, so where replies leave; or MESH_REVNAT_NODE */
	__u16 frontend;
	__be16 client_port; /* the client's own, if MESH_REVNAT_TRANSLATED */
	__u32 owner;
	__u32 epoch;
	__u32 stamp;    /* when the client was last heard, MESH_STAMP_SHIFT */
	__u32 sequence; /* of the task's SYN-ACK, if MESH_REVNAT_ANSWERED */
	__u32 veth;     /* host side of the task's interface, where its replies come out; 0: any */
};
_Static_assert(sizeof(struct mesh_revnat) == 64, "mesh_revnat is 64 bytes");
_Static_assert(MESH_MAX_FRONTENDS <= 65536, "mesh_revnat.frontend holds every id");

/* Per-CPU counters of one frontend or one backend. */
struct mesh_counts {
	__u64 packets_in; /* from clients */
	__u64 bytes_in;   /* of the IP packets, headers included */
	__u64 packets_out;
	__u64 bytes_out;
	__u64 starts; /* TCP: the client's second packet was seen, so that a flood does not count; UDP: the first; calls
			 of this node's own processes: the socket was connected */
	__u64 ends;   /* TCP flows closed by both sides or reset; calls of own processes, at once */
};
_Static_assert(sizeof(struct mesh_counts) == 48, "mesh_counts is 48 bytes");

/* Per-CPU failures of one frontend by cause: the label `cause` of mesh_connections_failed_total; `unanswered` has a
 * metric of its own. Packets that would have started a flow are counted: SYNs, also those that a client sends again,
 * and datagrams. */
struct mesh_failures {
	__u64 denied;     /* mesh.allow or mesh.deny denies the source */
	__u64 no_backend; /* the frontend has no backend, or the backend's node does not know it */
	__u64 refused;    /* the client was told that nobody listens */
	__u64 too_big;    /* a datagram is larger than the path */
	__u64 no_path;    /* a task's answer has no way back, neither to the node that was called nor to the client */
	__u64 collision;  /* no source is free by which the task could tell the flow from others */
	__u64 unanswered; /* the client sent its SYN again, and the task had not answered; once for each start */
};
_Static_assert(sizeof(struct mesh_failures) == 56, "mesh_failures is 56 bytes");

/* The one element of mesh_config. */
struct mesh_config {
	__u64 netns_cookie; /* of the host's network namespace (SO_NETNS_COOKIE); 0: socket hooks do nothing */
	struct mesh_addr
		hairpin; /* IPv4: what a task that calls itself sees as its peer; any address that nothing uses */
	struct mesh_addr hairpin6;
	__u32 settings;     /* MESH_SETTING_* */
	__be16 tunnel_port; /* of all nodes; the same one has MESH_PORT_TUNNEL in mesh_ports */
	__u16 error_rate;   /* rate limit for generated ICMP errors, per CPU and second; 0: unlimited */
	__u64 clock;        /* Unix time less CLOCK_MONOTONIC, in nanoseconds */
};
_Static_assert(sizeof(struct mesh_config) == 56, "mesh_config is 56 bytes");

/* Value of mesh_heartbeat: the stamp (MESH_STAMP_SHIFT) from which the tables are orphaned, unless the agent puts it
 * off before. Compared as a signed difference, so that it may wrap. */
#define MESH_ORPHAN_NEVER 0u  /* tables are never orphaned */
#define MESH_ORPHAN_UDP   64u /* stamps for which orphaned UDP flows without a note stay where they are */

/* Mark of the proxy's connections to whoever else serves a port (Docker's own mesh): nothing of ours takes them. */
#define MESH_PASS_MARK 0x6d657368u

#define MESH_SETTING_DIRECT  0x1u /* direct return: replies go straight to clients, whichever node they called */
#define MESH_SETTING_LEAVING 0x2u /* other nodes' trials of the tunnel get no answer: they start no more flows */
#define MESH_SETTING_GUARD   0x4u /* frontends have source rules, or UDP: packets with unknown ports do not pass */

struct mesh_fragment_key {
	struct mesh_addr source;
	struct mesh_addr destination;
	__be32 id;
	__u8 protocol;
	__u8 pad[3];
};
_Static_assert(sizeof(struct mesh_fragment_key) == 40, "mesh_fragment_key is 40 bytes");

/* The ports of a fragmented datagram, for the fragments that have none. */
struct mesh_fragment {
	__be16 source_port;
	__be16 destination_port;
	__u32 stamp; /* last fragment (MESH_STAMP_SHIFT) */
};
_Static_assert(sizeof(struct mesh_fragment) == 8, "mesh_fragment is 8 bytes");

/* Key of mesh_udp_revnat: a backend to which an unconnected datagram socket has sent, or another is connected. */
struct mesh_udp_peer {
	__u64 cookie;             /* the socket's */
	struct mesh_addr address; /* the backend's */
	__be16 port;
	__u8 pad[6];
};
_Static_assert(sizeof(struct mesh_udp_peer) == 32, "mesh_udp_peer is 32 bytes");

/* Value of mesh_sk_revnat and mesh_udp_revnat: what a socket called. */
struct mesh_sk_revnat {
	struct mesh_addr called;
	struct mesh_addr backend; /* where it went instead */
	__be16 called_port;
	__be16 backend_port;
	__u32 owner;
	__u32 epoch;
	__u32 frontend;
};
_Static_assert(sizeof(struct mesh_sk_revnat) == 48, "mesh_sk_revnat is 48 bytes");

/* What became of a packet. X(name, help): metrics, docs and code use these names. A packet that is not for a frontend
 * (no frontend has the port, or the destination is not this node's) is not counted: all packets would pay for it. */
#define MESH_VERDICTS(X)                                                                                               \
	X(FORWARD, "forwarded to a task by the slot table alone")                                                      \
	X(NOTED, "forwarded to the owner that the flow cache names")                                                   \
	X(STARTED, "started a flow of a slot in transition: forwarded to the current owner and noted")                 \
	X(KEPT, "flow without a note of a slot in transition: forwarded to the previous owner and noted")              \
	X(MOVED, "flow without a note whose previous owner is gone, or UDP of a draining one: forwarded to the "       \
		 "current owner")                                                                                      \
	X(PASS, "passed to the kernel: the owner is PASS")                                                             \
	X(REPLY, "reply of a task: the called address restored, sent to the client")                                   \
	X(ICMP_IN, "ICMP error about a flow: translated and forwarded to its task")                                    \
	X(ICMP_OUT, "ICMP error of a task: translated and sent to the client")                                         \
	X(SOCKET, "connection or datagram of a process of this node: sent to a task by the socket hook")               \
	X(SOCKET_PASS, "the socket hook left a call alone: the owner is PASS")                                         \
	X(SOCKET_REJECTED, "the socket hook rejected a call: the frontend has no backend")                             \
	X(DENIED, "dropped: mesh.allow or mesh.deny denies the source")                                                \
	X(REJECTED, "no backend: reset or port unreachable sent to the client")                                        \
	X(NO_BACKEND, "no backend: passed to the kernel as configured, or dropped where an answer would be wrong "     \
		      "(fragments, resets)")                                                                           \
	X(FRAGMENT, "passed: a fragment whose first fragment was not seen")                                            \
	X(FAMILY, "passed: the chosen task has no address of the client's IP version")                                 \
	X(EXTENSION, "passed: IPv6 extension headers")                                                                 \
	X(MALFORMED, "passed: truncated or contradictory headers on a frontend's port")                                \
	X(COLLISION, "rejected: the task has a flow of this client address and port, and all other ports that the "    \
		     "flow could get are taken; dropped while one of these flows is not proven")                       \
	X(TRANSLATED, "forwarded to a task that sees another source: it has a flow of this client address and port, "  \
		      "or a network of its own that has the client's address")                                         \
	X(EXPIRED, "dropped: TTL or hop limit exceeded; time exceeded sent to the sender")                             \
	X(TOO_BIG,                                                                                                     \
	  "reply larger than the interface's MTU: passed for the kernel to tell the task, dropped without DF")         \
	X(RATE_LIMITED, "dropped without an ICMP error: the rate limit is reached")                                    \
	X(HOST_BACKEND, "passed: the chosen backend is at an address of this node; the fallback proxy serves it")      \
	X(TUNNEL_TX, "sent through the tunnel to the node of its task")                                                \
	X(TUNNEL_RX, "received through the tunnel, forwarded to a task of this node")                                  \
	X(TUNNEL_REPLY_TX, "reply of a task: sent through the tunnel to the node that the client called")              \
	X(TUNNEL_DIRECT, "reply of a task to a client that called another node: sent straight to the client")          \
	X(TUNNEL_REPLY_RX, "reply received through the tunnel, sent to the client")                                    \
	X(TUNNEL_ICMP, "ICMP error received through the tunnel, translated and forwarded to its task")                 \
	X(TUNNEL_FOREIGN, "dropped: on the tunnel's port, from an address that is no node of the cluster")             \
	X(TUNNEL_INVALID, "dropped: received through the tunnel, but nothing that nodes send")                         \
	X(TUNNEL_NO_BACKEND,                                                                                           \
	  "received through the tunnel for a task that is not here: rejected, the first packet of a flow dropped")     \
	X(TUNNEL_TOO_BIG, "larger than the path to the other node: the sender was told its MTU")                       \
	X(TUNNEL_BACK,                                                                                                 \
	  "received through the tunnel for a task that does not know the flow: returned for another owner")            \
	X(TUNNEL_UNPROVEN,                                                                                             \
	  "dropped: received through the tunnel from a node's address, without the proof that the node gives")         \
	X(TUNNEL_TRIAL, "answer to a trial of the tunnel: left to the agent, which hears it by a packet socket")       \
	X(TUNNEL_PMTU, "ICMP error: the path MTU to another node is said to be lower than was known; the agent looks") \
	X(RESET_HELD,                                                                                                  \
	  "dropped: a task's first reset of a connection; the client's kernel sends its SYN again after a second")     \
	X(TUNNEL_NO_PATH,                                                                                              \
	  "passed: the tunnel does not lead to the task's node, or the caller is a container of this node; replies "   \
	  "are dropped")                                                                                               \
	X(SOCKET_HANDED,                                                                                               \
	  "connection or datagram of a process of this node: sent to the fallback proxy, for a task of another node")  \
	X(ERROR, "passed: a map or helper failed")                                                                     \
	X(ORPHANED, "passed: no agent has kept the tables for orphan_timeout")                                         \
	X(CONTAINER, "dropped: a container's packet to a port by which nodes hand flows to each other")                \
	X(FOREIGN_REPLY, "dropped: a task's address, but from the interface of another container")                     \
	X(NO_PORTS,                                                                                                    \
	  "dropped: ports unknown (a fragment too large to be kept until its first one comes, too many IPv6 "          \
	  "headers), while a frontend has source rules or UDP")                                                        \
	X(EARLY, "kept: a fragment that came before its first one; it comes in again after that")

#define MESH_VERDICT_ENUM(name, help) MESH_VERDICT_##name,
enum mesh_verdict { MESH_VERDICTS(MESH_VERDICT_ENUM) MESH_VERDICT_COUNT };
#undef MESH_VERDICT_ENUM

/* Program mesh_explain (ingress object): run with BPF_PROG_TEST_RUN on a flow's packet it changes nothing and answers
 * in __sk_buff.cb of ctx_out: what would become of the packet now. Where no frontend has the destination, FRONTEND is 0
 * and HASH, SLOT are mesh_hash_flow and mesh_hash_client: the known-answer check at load. */
#define MESH_EXPLAIN_VERDICT  0 /* enum mesh_verdict; MESH_VERDICT_COUNT: not for a frontend */
#define MESH_EXPLAIN_FRONTEND 1
#define MESH_EXPLAIN_HASH     2
#define MESH_EXPLAIN_SLOT     3
#define MESH_EXPLAIN_OWNER    4

#endif /* MESH_ABI_H */
