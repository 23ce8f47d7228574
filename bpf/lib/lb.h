/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a flow to its owner: frontend, source rules, hash, slot, transition (docs/HASHING.md). */
#ifndef MESH_LB_H
#define MESH_LB_H

#include "address.h"
#include "maps.h"

struct choice {
	struct mesh_backend *backend; /* NULL: NONE or PASS */
	struct mesh_note *noted;      /* the flow cache's word on the flow, where it decided */
	__u64 wide;                   /* hash of the flow, whatever the frontend hashes */
	__u32 verdict;
	__u32 frontend;
	__u32 flags; /* of the frontend */
	__u32 hash;
	__u32 slot;
	__u32 owner;
	__u16 start;  /* the packet starts a flow */
	__u8 note;    /* the flow cache must learn the owner: NOTE_* */
	__u8 trusted; /* source rules do not apply */
	__u32 recent; /* see is_recent */
	__u32 other;  /* an un-noted flow is taken for the previous owner's: the current one, whose it may be (ask.h) */
	__u32 asked;  /* MESH_NOTE_ASKED: its node has to say whether the flow is the owner's */
};

#define REPLY_CLOSED (MESH_REPLY_FIN_IN | MESH_REPLY_FIN_OUT)

#define NOTE_FIRST 1 /* the flow's first packet that needs one: among those that a flood may push out */
#define NOTE_KEEP  2 /* the flow is known to go on */
#define NOTE_AGAIN 3 /* likewise, by its first note */

INLINE struct mesh_config *config(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&mesh_config, &zero);
}

INLINE __u32 stamp_now(void)
{
	return (__u32)(bpf_ktime_get_coarse_ns() >> MESH_STAMP_SHIFT);
}

/* The word of mesh_ports: 0 for what is not ours, in one array look-up. */
INLINE __u32 port_word(__u8 protocol, __be16 port)
{
	__u32 index = (protocol == IPPROTO_TCP ? MESH_PORT_TCP : MESH_PORT_UDP) + bpf_ntohs(port);
	__u32 *word = bpf_map_lookup_elem(&mesh_ports, &index);

	return word ? *(volatile __u32 *)word : 0;
}

INLINE int is_local(const struct mesh_addr *address)
{
	return bpf_map_lookup_elem(&mesh_addresses, address) != NULL;
}

/* The frontend's id at (destination, port, protocol) of a flow whose port's word is known, if the destination is (or
 * was) this node's; 0: none. */
INLINE __u32 frontend_at(const struct mesh_flow *flow, __u32 word)
{
	if (word & MESH_PORT_EXACT) {
		struct mesh_frontend_key key = {
			.address = flow->destination,
			.port = flow->destination_port,
			.protocol = flow->protocol,
		};
		__u32 *id = bpf_map_lookup_elem(&mesh_exact, &key);

		if (id)
			return *id;
	}
	return word & MESH_PORT_FRONTEND;
}

/* The frontend's id at (destination, port, protocol) of a flow whose port's word is known; 0: none. */
INLINE __u32 find_frontend(const struct mesh_flow *flow, __u32 word)
{
	__u32 id = frontend_at(flow, word);

	return id && (id != (word & MESH_PORT_FRONTEND) || is_local(&flow->destination)) ? id : 0;
}

INLINE int is_denied(const struct mesh_frontend *frontend, const struct mesh_addr *source)
{
	struct mesh_acl_key key = {.bits = 32 + 128, .acl = frontend->acl, .source = *source};
	__u32 *rule = bpf_map_lookup_elem(&mesh_acl, &key);

	return rule ? *rule == MESH_ACL_DENY : (frontend->flags & MESH_FRONTEND_DENY) != 0;
}

/* The slot of a hash, read as one word; `size` 0: the frontend has no table. */
INLINE int read_slot(const struct mesh_frontend *frontend, struct choice *c, struct mesh_slot *slot)
{
	union {
		__u64 word;
		struct mesh_table table;
		struct mesh_slot slot;
	} u;
	__u32 arena, index;
	void *slots;
	__u64 *word;

	u.word = *(const volatile __u64 *)&frontend->table;
	if (!u.table.size)
		return -1;
	c->slot = mesh_slot_of(c->hash, u.table.size);
	arena = u.table.first >> MESH_ARENA_BITS;
	index = (u.table.first & (MESH_ARENA_SLOTS - 1)) + c->slot;
	slots = bpf_map_lookup_elem(&mesh_arenas, &arena);
	if (!slots)
		return -1;
	word = bpf_map_lookup_elem(slots, &index);
	if (!word)
		return -1;
	u.word = *(volatile __u64 *)word;
	*slot = u.slot;
	return 0;
}

INLINE struct mesh_backend *find_backend(__u32 owner)
{
	return owner < MESH_OWNER_FIRST ? NULL : bpf_map_lookup_elem(&mesh_backends, &owner);
}

/* Whether a backend runs on another node. */
INLINE int is_away(const struct mesh_backend *backend)
{
	return backend->seed != 0;
}

/* Whether a backend is at an address of this node itself: the programs do not see what it sends. */
INLINE int is_own(const struct mesh_backend *backend)
{
	return !backend->ifindex && backend->bridge == MESH_LOOPBACK;
}

/* Whether an un-noted flow that is not starting may be given to a slot's previous owner. UDP has no start: its flows
 * stay with an active previous owner, leave a draining one, and leave PASS unless the frontend holds. */
INLINE int keeps_flows(__u32 owner, __u8 protocol, __u32 flags)
{
	struct mesh_backend *backend;

	if (owner == MESH_OWNER_NONE)
		return 0;
	if (owner == MESH_OWNER_PASS)
		return protocol == IPPROTO_TCP || (flags & MESH_FRONTEND_HOLD);
	backend = find_backend(owner);
	if (!backend)
		return 0;
	return backend->state == MESH_BACKEND_ACTIVE ||
	       (backend->state == MESH_BACKEND_DRAINING && protocol == IPPROTO_TCP);
}

INLINE int is_note_good(const struct mesh_note *note, __u32 frontend)
{
	struct mesh_backend *backend;

	if ((note->frontend & ~MESH_NOTE_ASKED) != frontend)
		return 0;
	if (note->owner < MESH_OWNER_FIRST)
		return note->owner == MESH_OWNER_PASS;
	backend = find_backend(note->owner);
	return backend && backend->state != MESH_BACKEND_FREE && backend->epoch == note->epoch;
}

#define KNOWN_LIVE 1
#define KNOWN_EDGE 2 /* it has just begun, or it has ended */

/* The flow cache has no word on a flow, be it for want of room, be it that it began on another node: whether the
 * reverse entries know it as one of `owner`'s, a backend of this node. Those that a flood of starts does not push out
 * say KNOWN_LIVE. Returns 0 where none does. */
static __noinline int is_known_of(const struct mesh_flow *flow, __u32 owner)
{
	struct mesh_backend *backend = find_backend(owner);
	struct mesh_config *node = config();
	struct mesh_reply *reply;
	struct mesh_flow *key;
	int known = KNOWN_LIVE;
	__u32 zero = 0;

	key = bpf_map_lookup_elem(&mesh_scratch, &zero);
	if (!flow || !key || !node || !backend || backend->state == MESH_BACKEND_FREE)
		return 0;
	*key = *flow;
	key->destination = backend->address;
	key->destination_port = backend->port;
	if (same_address(&key->source, &key->destination)) /* the task calls itself: see task_tuple */
		key->source = is_v4(&key->destination) ? node->hairpin : node->hairpin6;
	reply = bpf_map_lookup_elem(&mesh_replies, key);
	if (!reply) {
		reply = bpf_map_lookup_elem(&mesh_openings, key);
		known = KNOWN_EDGE;
	}
	if (!reply || reply->owner != owner || reply->epoch != backend->epoch ||
	    reply->called_port != flow->destination_port || !same_address(&reply->called, &flow->destination))
		return 0;
	return (reply->flags & REPLY_CLOSED) == REPLY_CLOSED ? KNOWN_EDGE : known;
}

/* The owner of a flow whose slot is in transition. */
INLINE void choose_in_transition(const struct mesh_flow *flow, const struct mesh_slot *slot, struct choice *c)
{
	__u32 previous = slot->previous & MESH_OWNER_MASK;
	struct mesh_note *note = bpf_map_lookup_elem(&mesh_flows, flow);

	c->owner = slot->current;
	c->note = NOTE_KEEP;
	c->verdict = MESH_VERDICT_STARTED;
	if (c->start) {
		c->note = note ? NOTE_KEEP : NOTE_FIRST;
		return;
	}
	c->verdict = MESH_VERDICT_MOVED;
	if (note) {
		if (!is_note_good(note, c->frontend))
			return;
		c->owner = note->owner;
		c->asked = note->frontend & MESH_NOTE_ASKED;
		c->noted = note;
		c->note = 0;
		c->verdict = MESH_VERDICT_NOTED;
		return;
	}
	note = bpf_map_lookup_elem(&mesh_starts, flow);
	if (note) {
		c->note = NOTE_AGAIN;
		if (!is_note_good(note, c->frontend))
			return;
		c->owner = note->owner;
		c->asked = note->frontend & MESH_NOTE_ASKED;
		c->verdict = MESH_VERDICT_NOTED;
	} else if (is_known_of(flow, slot->current) == KNOWN_LIVE) {
		c->verdict = MESH_VERDICT_NOTED;
	} else {
		c->note = NOTE_FIRST;
		if (!keeps_flows(previous, flow->protocol, c->flags))
			return;
		c->owner = previous;
		c->other = slot->current;
		c->verdict = MESH_VERDICT_KEPT;
	}
}

/* Choose the owner of a flow of frontend `c->frontend`; changes nothing. `c->start` is set by the caller. */
INLINE void choose(const struct mesh_flow *flow, struct choice *c)
{
	struct mesh_frontend *frontend = bpf_map_lookup_elem(&mesh_frontends, &c->frontend);
	struct mesh_slot slot;

	c->owner = MESH_OWNER_PASS;
	c->verdict = MESH_VERDICT_PASS;
	if (unlikely(!frontend))
		return;
	c->flags = frontend->flags;
	c->wide = mesh_hash_flow_wide(flow);
	c->hash = (__u32)(c->wide >> 32);
	if (c->flags & MESH_FRONTEND_CLIENT)
		c->hash = mesh_hash_client(&flow->source);
	if (unlikely(frontend->acl || (c->flags & MESH_FRONTEND_DENY)) && !c->trusted &&
	    is_denied(frontend, &flow->source)) {
		c->owner = MESH_OWNER_NONE;
		c->verdict = MESH_VERDICT_DENIED;
		return;
	}
	if (unlikely(read_slot(frontend, c, &slot)))
		return;
	if (likely(slot.current == slot.previous)) {
		c->owner = slot.current;
		c->verdict = MESH_VERDICT_FORWARD;
	} else {
		choose_in_transition(flow, &slot, c);
	}
	if (c->owner == MESH_OWNER_PASS) {
		c->verdict = MESH_VERDICT_PASS;
		return;
	}
	c->backend = find_backend(c->owner);
	if (unlikely(!c->backend || c->backend->state == MESH_BACKEND_FREE)) {
		c->backend = NULL;
		c->owner = MESH_OWNER_NONE;
		c->verdict = c->flags & MESH_FRONTEND_PASS_IF_NONE ? MESH_VERDICT_NO_BACKEND : MESH_VERDICT_REFUSED;
		c->note = 0;
	}
}

#endif /* MESH_LB_H */
