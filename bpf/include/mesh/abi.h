/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* THE CONTRACT between the eBPF programs, the Cython extensions and every node of a cluster: structs, owners, verdicts,
 * limits and the version. No functions (hash.h has those), no maps (bpf/lib/maps.h has those).
 *
 * Rules: fixed-width types; explicit, zeroed pads; network byte order is marked by __be types, everything else is host
 * order; an address is always 16 bytes, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2). Sizes and offsets are asserted.
 * Any change of layout or meaning increases MESH_ABI_VERSION; the digest of this file and hash.h is compiled into all
 * artefacts (MESH_ABI_DIGEST) and compared when one opens the other, so a stale build is refused and never half works.
 */
#ifndef MESH_ABI_H
#define MESH_ABI_H

#include <linux/types.h>

#define MESH_ABI_VERSION 1

/* Owners: what a slot points at. Values from MESH_OWNER_FIRST on are backend ids. */
#define MESH_OWNER_NONE  0u /* no backend: refuse the flow */
#define MESH_OWNER_PASS  1u /* leave the packet to the kernel, hence to whoever served the port before */
#define MESH_OWNER_FIRST 2u

/* Set in mesh_slot.previous: flows of this slot may be noted in the flow cache under an owner that is neither current
 * nor previous, so that a look-up is due even where the two agree. */
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

#endif /* MESH_ABI_H */
