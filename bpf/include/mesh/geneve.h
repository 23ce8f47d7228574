/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The contract, second part: the tunnel between the nodes' kernel engines, on the wire and in maps. Rules as in abi.h.
 *
 * On the wire: IPv4 or IPv6, UDP (source port 49152 to 65535 by the flow, checksum 0), struct mesh_geneve, the IP
 * packet as the client sent it (destination: what it called), or as the client is to get it (MESH_TUNNEL_REPLY). The
 * outer and the inner IP version need not be the same. The outer source is mesh_node.source: the receiving node has to
 * know this one by it.
 *
 * To a node that knows proofs the option is longer by a struct mesh_proof. */
#ifndef MESH_GENEVE_H
#define MESH_GENEVE_H

#include "abi.h"

/* The id of a backend, the same on all nodes. As key of mesh_ids, which has its owner id on the node where it runs,
 * `flags` is 0. */
struct mesh_id {
	__be32 seed[2]; /* the first 8 bytes of mesh._maglev.backend_seed, as they are */
	__be16 port;    /* on which the backend serves */
	__u8 protocol;
	__u8 flags; /* on the wire: MESH_TUNNEL_* */
};
_Static_assert(sizeof(struct mesh_id) == 12, "mesh_id is 12 bytes");

/* mesh_id.flags, one of them at most. */
#define MESH_TUNNEL_REPLY 0x1u /* from the backend's node to the one that the client called; the rest is 0 */
#define MESH_TUNNEL_ASK   0x2u /* a client's packet that may belong to another owner: return it if unknown */
#define MESH_TUNNEL_BACK  0x4u /* such a packet, returned as it came, with the id of the backend that was asked */

/* In mesh_note.frontend: the owner is the slot's current one, and its node has been asked (MESH_TUNNEL_ASK) whether it
 * knows the flow. The first reply clears it; a returned packet gives the flow to the previous owner. */
#define MESH_NOTE_ASKED 0x80000000u

/* Values of mesh_addresses. */
#define MESH_ADDRESS_OWN      1u
#define MESH_ADDRESS_FLOATING 2u /* flows to it may have begun on another node, before the address moved here */

/* Geneve (RFC 8926) with one critical option of the experimental class. No inner Ethernet header. */
struct mesh_geneve {
	__u8 words; /* version 0; length of the options in words */
	__u8 flags;
	__be16 inner; /* EtherType of the inner packet */
	__be32 vni;   /* 0 */
	__be16 option_class;
	__u8 option_type;
	__u8 option_words;
	struct mesh_id id;
};
_Static_assert(sizeof(struct mesh_geneve) == 24, "mesh_geneve is 24 bytes");

/* Shows that the sender knows a key of the swarm. `mac` is SipHash-2-4 (little-endian), by the key of the two nodes and
 * their direction (struct mesh_node_key), over: source and destination of the inner packet (4 bytes each, of IPv6 16),
 * its ports, protocol, 0, IP version (4 or 6), 0, mesh_geneve.id, and all 32 bits of the epoch in network order.
 * An IPv6 fragment has the protocol that its fragment header names; a later fragment has ports 0. An ICMP error counts
 * as the packet that it quotes, with 1 in place of the first 0. */
struct mesh_proof {
	__be16 key;   /* the last bits of the key's number */
	__be16 epoch; /* the last bits of the epoch: Unix time in nanoseconds >> MESH_EPOCH_SHIFT */
	__be32 mac[2];
};
_Static_assert(sizeof(struct mesh_proof) == 12, "mesh_proof is 12 bytes");

#define MESH_EPOCH_SHIFT  33u /* 8.6 seconds */
#define MESH_HEARD_LIFE   2u  /* epochs for which a node that proves is known to understand proofs */
#define MESH_EPOCH_WINDOW 7   /* epochs: how far from now a proof may be made, either way */

#define MESH_GENEVE_WORDS    4u
#define MESH_PROOF_WORDS     3u /* that a proof adds to both lengths */
#define MESH_GENEVE_CRITICAL 0x40u
#define MESH_GENEVE_CLASS    0xff6du
#define MESH_GENEVE_TYPE     0x81u /* critical */
#define MESH_GENEVE_OPTION   3u
#define MESH_TUNNEL_PORT     6084u       /* unless configured */
#define MESH_TUNNEL_SOURCE   0xc000u     /* and 14 bits of the flow's hash */
#define MESH_TRIAL_ADDRESS   0xc0000008u /* 192.0.0.8, which nothing has (RFC 7600): both inner addresses of a trial */

/* A key of SipHash: its halves as numbers (in its 16 bytes they are little-endian). */
struct mesh_sip_key {
	__u64 first;
	__u64 second;
};
_Static_assert(sizeof(struct mesh_sip_key) == 16, "mesh_sip_key is 16 bytes");

/* A key between this node and another one. Both halves are SipHash-2-4 by the swarm's key over 4, the number of the
 * half (0, 1), and the addresses of sender and receiver. */
struct mesh_node_key {
	__be16 name; /* as mesh_proof.key */
	__u16 valid; /* 0: there is none */
	__u32 pad;
	struct mesh_sip_key sent;  /* of what this node sends */
	struct mesh_sip_key taken; /* of what it gets */
};
_Static_assert(sizeof(struct mesh_node_key) == 40, "mesh_node_key is 40 bytes");

#define MESH_NODE_KEYS 3 /* in use, the one before it, and one that is held before it is used */

/* mesh_node.flags */
#define MESH_NODE_PROVE  0x1u /* what is sent there is proven; else while proofs come from there (MESH_HEARD_LIFE) */
#define MESH_NODE_DEMAND 0x2u /* what comes from there without a proof is dropped */

/* Value of mesh_nodes, by address: another node of the cluster. Only they may send through the tunnel, with that
 * address as source. A node that is gone loses its entry: replies to clients that called it go straight to them. */
struct mesh_node {
	struct mesh_addr source; /* this node's own, of the same IP version, by which that node knows it */
	__u32 ifindex;           /* output interface; the kernel resolves the neighbour or gateway */
	__u32 mtu;               /* of interface and route; 0: the node accepts no tunnel */
	__u32 id;                /* its index in mesh_node_addrs, as long as any entry of mesh_revnat may have it */
	__u32 path_mtu;          /* what the agent has found by probes, lower than `mtu`; 0: none */
	__u32 path_stamp;        /* when, MESH_STAMP_SHIFT; expires after MESH_PATH_LIFE */
	__u32 hint;              /* programs write: an ICMP error says that the path takes no more; 0: none since */
	__u32 flags;             /* MESH_NODE_* */
	__u32 heard;             /* programs write: the epoch in which the last proof was checked; 0: none */
	__u32 unproven;          /* programs write: packets dropped without the proof */
	__u32 pad;
	struct mesh_node_key keys[MESH_NODE_KEYS]; /* first the one to prove by */
};
_Static_assert(sizeof(struct mesh_node) == 176, "mesh_node is 176 bytes");
_Static_assert(__builtin_offsetof(struct mesh_node, path_mtu) == 28, "mesh_node.path_mtu");

#define MESH_PATH_LIFE 600u
#define MESH_MAX_NODES 4096u

#endif /* MESH_GENEVE_H */
