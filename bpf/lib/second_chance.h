/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The second chance of a TCP flow that began on another node while its slot was in transition, to an address that has
 * moved here since. That node has a note of it; this one has none. If it belongs to the slot's current owner, that
 * owner's node knows it by reverse NAT.
 *
 * So the packet itself asks that node (MESH_TUNNEL_ASK): it delivers a packet of a flow that it knows, and returns any
 * other (MESH_TUNNEL_BACK). */
#ifndef MESH_SECOND_CHANCE_H
#define MESH_SECOND_CHANCE_H

#include "encap.h"
#include "lb.h"

#define SECOND_CHANCE_KNOWN 1 /* the slot's current owner is a backend of this node, which knows the flow */
#define SECOND_CHANCE_ASK   2 /* its node is to be asked */

/* Whether the current owner gets the packet of a flow that lb_choose has given, for want of a note, to the previous
 * one. 0: no. */
RARE int second_chance(const struct packet *p, __u32 owner, __u32 other)
{
	struct mesh_backend *current = find_backend(other);
	struct mesh_addr called;
	__u32 *kind;

	if (!p || p->flow.protocol != IPPROTO_TCP || !current || current->state == MESH_BACKEND_FREE)
		return 0;
	called = p->flow.destination; /* of the stack, as map keys must be (bpf.h) */
	kind = bpf_map_lookup_elem(&mesh_addresses, &called);
	if (!kind || *kind != MESH_ADDRESS_FLOATING)
		return 0;
	if (!is_remote(current))
		return revnat_knows(&p->flow, other) ? SECOND_CHANCE_KNOWN : 0;
	if (current->version != p->version || !tunnel_mtu(&current->address) || revnat_knows(&p->flow, owner))
		return 0;
	return SECOND_CHANCE_ASK;
}

/* A flow without a note that does not start now, and that lb_choose has given to its slot's previous owner: give it to
 * the current one, if that one knows it or its node can be asked. */
INLINE void second_chance_ask(const struct packet *p, struct lb_choice *c)
{
	int chance = second_chance(p, c->owner, c->other);

	if (!chance)
		return;
	c->owner = c->other;
	c->backend = find_backend(c->other);
	c->asked = chance == SECOND_CHANCE_ASK ? MESH_NOTE_ASKED : 0;
	c->verdict = MESH_VERDICT_NOTED;
}

/* The node that is asked, for a flow that it does not know: return the packet as it came. */
INLINE int second_chance_return(struct __sk_buff *skb, struct packet *p, struct tunnel_peer *from)
{
	int action;

	from->id.flags = MESH_TUNNEL_BACK;
	action = encap_send(skb, from, p, NULL);
	if (action == TC_ACT_REDIRECT)
		count_verdict(MESH_VERDICT_TUNNEL_BACK);
	return action;
}

/* Whether a note's owner is the backend whose node has returned a packet of the flow. */
INLINE int is_note_of_peer(const struct mesh_note *note, const struct tunnel_peer *from)
{
	struct mesh_backend *backend = find_backend(note->owner);

	return (note->frontend & MESH_NOTE_ASKED) && backend && is_remote(backend) &&
	       same_address(&backend->address, &from->node) && ((__be32 *)&backend->seed)[0] == from->id.seed[0] &&
	       ((__be32 *)&backend->seed)[1] == from->id.seed[1];
}

/* The node that has asked, for a packet that was returned: the flow belongs to the previous owner, unless another note
 * was made meanwhile. The packet then starts over in mesh_ingress. Returns -1 for a packet that nobody can have asked
 * about. */
static __noinline __maybe_unused int second_chance_resolve(struct packet *p, struct tunnel_peer *from)
{
	struct lb_choice c = {};
	struct mesh_note *note;
	__u32 word;

	word = port_word(p->flow.protocol, p->flow.destination_port);
	c.frontend = word && !(word & MESH_PORT_TUNNEL) ? find_frontend(&p->flow, word) : 0;
	if (!c.frontend)
		return -1;
	note = bpf_map_lookup_elem(&mesh_flows, &p->flow);
	if (!note)
		note = bpf_map_lookup_elem(&mesh_flows_new, &p->flow);
	if (note && !is_note_of_peer(note, from))
		return 0;
	bpf_map_delete_elem(&mesh_flows, &p->flow);
	bpf_map_delete_elem(&mesh_flows_new, &p->flow);
	lb_choose(&p->flow, &c);
	flow_cache_update(&p->flow, &c);
	return 0;
}

#endif /* MESH_SECOND_CHANCE_H */
