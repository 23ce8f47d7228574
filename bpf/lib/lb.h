/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Load balancing: from a flow to its owner, by frontend, source rules, hash, slot and transition (docs/HASHING.md).
 */
#ifndef MESH_LB_H
#define MESH_LB_H

#include "flow_cache.h"

/* The id of the frontend at (destination, port, protocol) of a flow whose port's word is known, if the destination is,
 * or was, this node's. 0: none. */
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

/* The id of the frontend at (destination, port, protocol) of a flow whose port's word is known. 0: none. */
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

/* Read the slot of c->hash, as one word. -1: the frontend has no table. */
INLINE int read_slot(const struct mesh_frontend *frontend, struct lb_choice *c, struct mesh_slot *slot)
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

/* For how many stamps the tables have been orphaned, and 1; 0: they are not. Packets that start no flow use the stored
 * stamp; those that do read the clock, for nothing else may have for a while. */
INLINE __u32 orphaned(const struct lb_choice *c)
{
	__u32 zero = 0, at, since;
	__u32 *heartbeat = bpf_map_lookup_elem(&mesh_heartbeat, &zero);

	if (!heartbeat)
		return 0;
	at = *(volatile __u32 *)heartbeat;
	since = (unlikely(c->start) ? stamp_tick() : mesh_now) - at;
	return likely((__s32)since < 0) || at == MESH_ORPHAN_NEVER ? 0 : since + 1;
}

/* Whether a slot's previous owner gets flows that are not in the flow cache and do not start now. UDP has no start:
 * its flows stay with an active previous owner, and leave a draining one; they leave PASS, unless the frontend holds
 * them. Of orphaned tables they leave every owner once those under way have had time to be noted. */
INLINE int keeps_flows(__u32 owner, __u8 protocol, const struct lb_choice *c)
{
	struct mesh_backend *backend;

	if (owner == MESH_OWNER_NONE)
		return 0;
	if (owner == MESH_OWNER_PASS)
		return protocol == IPPROTO_TCP || (c->flags & MESH_FRONTEND_HOLD);
	if (protocol != IPPROTO_TCP && c->orphaned > MESH_ORPHAN_UDP)
		return 0;
	backend = find_backend(owner);
	if (!backend)
		return 0;
	return backend->state == MESH_BACKEND_ACTIVE ||
	       (backend->state == MESH_BACKEND_DRAINING && protocol == IPPROTO_TCP);
}

/* The owner of a flow whose slot is in transition. `listed` is the slot's current owner in the table, which is
 * slot->current unless the table is orphaned. */
INLINE void lb_choose_in_transition(const struct mesh_flow *flow, const struct mesh_slot *slot, __u32 listed,
				    struct lb_choice *c)
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
		if (!flow_cache_is_valid(note, c->frontend))
			return;
		c->owner = note->owner;
		c->asked = note->frontend & MESH_NOTE_ASKED;
		c->noted = note;
		c->note = 0;
		c->verdict = MESH_VERDICT_NOTED;
		return;
	}
	note = bpf_map_lookup_elem(&mesh_flows_new, flow);
	if (note) {
		c->note = NOTE_FIRST;
		if (!flow_cache_is_valid(note, c->frontend))
			return;
		c->noted = note;
		c->note = note->owner == previous ? 0 : NOTE_PROMOTE;
		c->owner = note->owner;
		c->asked = note->frontend & MESH_NOTE_ASKED;
		c->verdict = MESH_VERDICT_NOTED;
	} else if (revnat_knows(flow, listed) == KNOWN_LIVE) {
		c->owner = listed;
		c->verdict = MESH_VERDICT_NOTED;
	} else {
		c->note = NOTE_FIRST;
		if (!keeps_flows(previous, flow->protocol, c))
			return;
		c->owner = previous;
		c->other = slot->current;
		c->verdict = MESH_VERDICT_KEPT;
	}
}

/* Choose the owner of a flow of frontend `c->frontend`; changes no map. The caller sets `c->start`. */
INLINE void lb_choose(const struct mesh_flow *flow, struct lb_choice *c)
{
	struct mesh_frontend *frontend = bpf_map_lookup_elem(&mesh_frontends, &c->frontend);
	struct mesh_slot slot;
	__u32 listed;

	c->owner = MESH_OWNER_PASS;
	c->verdict = MESH_VERDICT_PASS;
	if (unlikely(!frontend))
		return;
	c->flags = frontend->flags;
	c->wide = mesh_hash_flow_wide(flow);
	c->hash = (__u32)(c->wide >> 32);
	if (c->flags & MESH_FRONTEND_CLIENT)
		c->hash = mesh_hash_client(&flow->source);
	if (unlikely(c->again))
		c->hash = mesh_hash_again(c->hash, c->again);
	if (unlikely(frontend->acl || (c->flags & MESH_FRONTEND_DENY)) && !c->trusted &&
	    is_denied(frontend, &flow->source)) {
		c->owner = MESH_OWNER_NONE;
		c->verdict = MESH_VERDICT_DENIED;
		return;
	}
	if (unlikely(read_slot(frontend, c, &slot)))
		return;
	listed = slot.current;
	c->orphaned = orphaned(c);
	if (unlikely(c->orphaned)) /* handed back: a settled slot's flows have its owner as their previous one */
		slot.current = MESH_OWNER_PASS;
	if (likely(slot.current == slot.previous)) {
		c->owner = slot.current;
		c->verdict = MESH_VERDICT_FORWARD;
	} else {
		lb_choose_in_transition(flow, &slot, listed, c);
	}
	if (c->owner == MESH_OWNER_PASS) {
		c->verdict = unlikely(c->orphaned) && listed != MESH_OWNER_PASS &&
					     (c->verdict == MESH_VERDICT_STARTED || c->verdict == MESH_VERDICT_MOVED)
				     ? MESH_VERDICT_ORPHANED
				     : MESH_VERDICT_PASS;
		return;
	}
	c->backend = find_backend(c->owner);
	if (unlikely(!c->backend || c->backend->state == MESH_BACKEND_FREE)) {
		c->backend = NULL;
		c->owner = MESH_OWNER_NONE;
		c->verdict = c->flags & MESH_FRONTEND_PASS_IF_NONE ? MESH_VERDICT_NO_BACKEND : MESH_VERDICT_REJECTED;
		c->note = 0;
	}
}

#endif /* MESH_LB_H */
