/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Source translation, the exception: a flow gets another source towards its task where the task could not tell it from
 * another flow of the same client address and port, or would take the client for a neighbour in a network of its own.
 *
 * The entry in reverse NAT is the only state: its key has the source that the task sees, its value the client's own.
 * The ports that a flow may get follow from its hash, so that its packets find the entry, and make a lost one again. */
#ifndef MESH_SNAT_H
#define MESH_SNAT_H

#include "scratch.h"

/* Ports that such flows may get: below those that kernels choose for their own connections (ip_local_port_range). */
#define SNAT_FIRST 1024u
#define SNAT_PORTS 31744u
#define SNAT_TRIES 8u

/* How long, in stamps, a client must have been silent before another flow of its address and port may take the entry.
 */
#define REUSE_TCP 8192u
#define REUSE_UDP 64u
#define OVERDUE   2u /* how long a TCP flow that is not proven keeps a port that was chosen for it from others */

/* The word of mesh_translated for a flow's hash. */
INLINE __u32 *snat_seen(__u64 wide)
{
	__u32 index = (__u32)wide & ((1u << SNAT_BITS) - 1);

	return bpf_map_lookup_elem(&mesh_translated, &index);
}

/* Whether a flow may have been translated before. */
INLINE int snat_may_know(__u64 wide, __u32 now)
{
	__u32 *seen = snat_seen(wide);

	return seen && unlikely(*seen) && (__s32)(now - *seen) < (__s32)REUSE_TCP;
}

/* This node's address by which a task has to see a client, for it has the client's network itself. NULL: none. */
INLINE const struct mesh_addr *snat_gateway(const struct mesh_backend *backend, __u32 owner,
					    const struct mesh_addr *client)
{
	__u32 first = bpf_ntohl(is_v4(client) ? client->words[3] : client->words[0]);
	struct snat_keys *keys;

	if (likely(!(backend->networks >> ((first >> 24 ^ first >> 16) & 63) & 1)))
		return NULL;
	keys = snat_keys();
	if (!keys)
		return NULL;
	keys->network.bits = 32 + 128;
	keys->network.owner = owner;
	keys->network.client = *client;
	return bpf_map_lookup_elem(&mesh_networks, &keys->network);
}

/* Whether an entry is that of this flow, with another source. */
INLINE int snat_is_own(const struct mesh_revnat *reply, const struct mesh_flow *flow)
{
	return (reply->flags & MESH_REVNAT_TRANSLATED) && reply->client_port == flow->source_port &&
	       reply->called_port == flow->destination_port && same_address(&reply->client, &flow->source) &&
	       same_address(&reply->called, &flow->destination);
}

/* Whether an entry is that of this flow. `seen`: the client's port in the entry's key. */
INLINE int revnat_is_of(const struct mesh_revnat *reply, __be16 seen, const struct mesh_flow *flow)
{
	if (unlikely(reply->flags & MESH_REVNAT_TRANSLATED))
		return snat_is_own(reply, flow);
	return seen == flow->source_port && reply->called_port == flow->destination_port &&
	       same_address(&reply->called, &flow->destination);
}

/* The client's port of a reply to the one that the task sees. */
INLINE __be16 client_port(const struct mesh_revnat *reply, __be16 seen)
{
	return unlikely(reply->flags & MESH_REVNAT_TRANSLATED) ? reply->client_port : seen;
}

/* Whether an entry keeps its place from other flows to this backend: it has not ended, and its client was heard within
 * `limit` stamps. */
INLINE int revnat_holds(const struct mesh_revnat *reply, __u32 owner, __u32 epoch, __u32 now, __u32 limit)
{
	return reply && reply->owner == owner && reply->epoch == epoch &&
	       (reply->flags & REVNAT_CLOSED) != REVNAT_CLOSED && now - reply->stamp < limit;
}

#define SNAT_NONE      0    /* the flow has no other source */
#define SNAT_EXHAUSTED (-1) /* all ports are taken */
#define SNAT_WAIT      (-2) /* likewise, one of them by a flow that is not proven */

/* The n-th port that a flow may get. */
INLINE __be16 snat_candidate(__u32 hash, __u32 n)
{
	return bpf_htons((__u16)(SNAT_FIRST + mesh_slot_of(mesh_hash_again(hash, n), SNAT_PORTS)));
}

/* The port by which a task sees a flow from `source`, in network order: the one that it has already, else, with `make`,
 * a free one. Changes nothing. */
RARE int snat_port(const struct mesh_flow *flow, const struct mesh_addr *source, __u32 owner, __u32 make)
{
	struct snat_keys *keys = snat_keys();
	struct mesh_backend *backend;
	struct mesh_revnat *reply;
	struct snat_holder *by;
	struct mesh_flow *key;

	if (!flow || !source || !keys)
		return SNAT_NONE;
	key = &keys->other;
	by = &keys->holder;
	by->owner = owner; /* all that is not of use later is stored at once: the stack has no room */
	by->make = make;
	key->source = *source;
	key->protocol = flow->protocol;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
	by->hash = (__u32)mesh_hash_flow_wide(flow);
	by->now = stamp_now();
	by->proven = flow->protocol == IPPROTO_TCP ? REUSE_TCP : REUSE_UDP;
	by->waiting = flow->protocol == IPPROTO_TCP ? OVERDUE : REUSE_UDP;
	by->chosen = SNAT_EXHAUSTED;
	backend = find_backend(by->owner);
	if (!backend)
		return SNAT_NONE;
	by->epoch = backend->epoch;
	key->destination = backend->address;
	key->destination_port = backend->port;
#pragma clang loop unroll(full)
	for (__u32 n = 1; n <= SNAT_TRIES; n++) {
		key->source_port = snat_candidate(by->hash, n);
		reply = revnat_proven(key);
		if (reply && snat_is_own(reply, flow))
			return key->source_port;
		by->taken = revnat_holds(reply, by->owner, by->epoch, by->now, by->proven);
		reply = bpf_map_lookup_elem(&mesh_revnat_new, key);
		if (reply && snat_is_own(reply, flow))
			return key->source_port;
		if (revnat_holds(reply, by->owner, by->epoch, by->now, by->waiting)) {
			by->taken = 1;
			if (by->chosen == SNAT_EXHAUSTED)
				by->chosen = SNAT_WAIT;
		}
		if (by->chosen <= 0 && !by->taken)
			by->chosen = key->source_port;
	}
	return by->make ? by->chosen : SNAT_NONE;
}

/* Look for a flow among those whose source is translated. `key` becomes that of its entry, or has the source as the
 * task would see it. Returns the entry, or NULL. */
INLINE struct mesh_revnat *snat_find(const struct mesh_flow *flow, struct mesh_flow *key,
				     const struct mesh_backend *backend, __u32 owner)
{
	int port = snat_port(flow, &key->source, owner, 0);
	const struct mesh_addr *gateway;

	if (port <= 0) {
		gateway = snat_gateway(backend, owner, &flow->source);
		if (!gateway)
			return NULL;
		key->source = *gateway;
		port = snat_port(flow, &key->source, owner, 0);
	}
	if (port <= 0)
		return NULL;
	key->source_port = (__be16)port;
	return revnat_find(key);
}

#endif /* MESH_SNAT_H */
