/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The flow cache: owners of flows whose slot is in transition (docs/HASHING.md), and what a choice of owner consists
 * of. */
#ifndef MESH_FLOW_CACHE_H
#define MESH_FLOW_CACHE_H

#include "snat.h"

#define NOTE_FIRST   1 /* the flow's first packet: its note may be evicted by a flood */
#define NOTE_KEEP    2 /* the flow is known to continue */
#define NOTE_PROMOTE 3 /* likewise, by its first note, if it is proven */

/* The choice of an owner for one packet: what lb_choose is told and what it answers. */
struct lb_choice {
	struct mesh_backend *backend; /* NULL: NONE or PASS */
	struct mesh_note *noted;      /* the note that decided, if any */
	__u64 wide;                   /* hash of the 5-tuple, whatever the frontend hashes */
	__u32 verdict;
	__u32 frontend;
	__u32 flags; /* of the frontend */
	__u32 hash;
	__u32 slot;
	__u32 owner;
	__u32 orphaned; /* 0: an agent keeps the tables; else for how many stamps none has, and 1 */
	__u8 start;     /* the packet starts a flow */
	__u8 note;      /* the flow cache must store the owner: NOTE_* */
	__u8 trusted;   /* source rules do not apply */
	__u8 recent;    /* see is_recent; also: its entry in mesh_revnat was found or made now */
	__u32 again;    /* 0, or the n of mesh_hash_again: a further choice */
	__u32 pad;
	__u32 other; /* the current owner, where a flow without a note was given to the previous one */
	__u32 asked; /* MESH_NOTE_ASKED: the owner's node decides whether the flow is its own */
};

/* Whether a note still counts: its owner lives, and the owner's id has not been reused. */
INLINE int flow_cache_is_valid(const struct mesh_note *note, __u32 frontend)
{
	struct mesh_backend *backend;

	if ((note->frontend & ~MESH_NOTE_ASKED) != frontend)
		return 0;
	if (note->owner < MESH_OWNER_FIRST)
		return note->owner == MESH_OWNER_PASS;
	backend = find_backend(note->owner);
	return backend && backend->state != MESH_BACKEND_FREE && backend->epoch == note->epoch;
}

/* Whether a flow's note may evict others: addresses and ports can be invented, so packets of the client alone prove
 * nothing where the answers are seen. Without a note, UDP flows are given to the same owner as before. */
INLINE int is_proven(const struct mesh_flow *flow, const struct lb_choice *c)
{
	struct mesh_config *node;

	if (flow->protocol != IPPROTO_TCP)
		return 0;
	if (c->recent || !c->backend)
		return 1;
	if (!is_remote(c->backend))
		return is_host_backend(c->backend);
	node = config();
	return !c->backend->version || (node && (node->settings & MESH_SETTING_DIRECT));
}

/* Store what lb_choose decided in transition, or that the flow was seen (one write per stamp). */
INLINE void flow_cache_update(const struct mesh_flow *flow, const struct lb_choice *c)
{
	__u32 now = stamp_now();

	if (c->note && (c->note != NOTE_PROMOTE || is_proven(flow, c))) {
		struct mesh_note note = {
			.owner = c->owner,
			.epoch = c->backend ? c->backend->epoch : 0,
			.stamp = now,
			.frontend = c->frontend | c->asked,
		};

		if (c->note == NOTE_FIRST) {
			bpf_map_update_elem(&mesh_flows_new, flow, &note, BPF_ANY);
			return;
		}
		bpf_map_update_elem(&mesh_flows, flow, &note, BPF_ANY);
		if (c->note == NOTE_PROMOTE)
			bpf_map_delete_elem(&mesh_flows_new, flow);
	} else if (c->noted && c->noted->stamp != now) {
		c->noted->stamp = now;
	}
}

#define KNOWN_LIVE 1
#define KNOWN_EDGE 2 /* it has just begun, or it has ended */

/* Whether the entry with this key is of a flow of this owner, as revnat_knows answers. */
INLINE int revnat_knows_by(const struct mesh_flow *key, const struct mesh_flow *flow, __u32 owner, __u32 epoch)
{
	struct mesh_revnat *reply = revnat_proven(key);
	int known = KNOWN_LIVE;

	if (!reply) {
		reply = bpf_map_lookup_elem(&mesh_revnat_new, key);
		known = KNOWN_EDGE;
	}
	if (!reply || reply->owner != owner || reply->epoch != epoch || !revnat_is_of(reply, key->source_port, flow))
		return 0;
	return (reply->flags & REVNAT_CLOSED) == REVNAT_CLOSED ? KNOWN_EDGE : known;
}

/* The flow cache has no note of a flow, for want of room or because the flow began on another node: whether reverse
 * NAT knows it as a flow of `owner`, a backend of this node. KNOWN_LIVE comes from entries that a flood of starts
 * cannot evict. 0: no. */
RARE int revnat_knows(const struct mesh_flow *flow, __u32 owner)
{
	struct mesh_backend *backend = find_backend(owner);
	struct mesh_config *node = config();
	struct mesh_flow *key;
	__u32 zero = 0;
	int known;

	key = bpf_map_lookup_elem(&scratch_flow, &zero);
	if (!flow || !key || !node || !backend || backend->state == MESH_BACKEND_FREE)
		return 0;
	*key = *flow;
	key->destination = backend->address;
	key->destination_port = backend->port;
	if (same_address(&key->source, &key->destination)) /* hairpin: see task_tuple */
		key->source = is_v4(&key->destination) ? node->hairpin : node->hairpin6;
	known = revnat_knows_by(key, flow, owner, backend->epoch);
	if (likely(known || !snat_may_know(mesh_hash_flow_wide(flow), mesh_now)))
		return known;
	return snat_find(flow, key, backend, owner) ? revnat_knows_by(key, flow, owner, backend->epoch) : 0;
}

#endif /* MESH_FLOW_CACHE_H */
