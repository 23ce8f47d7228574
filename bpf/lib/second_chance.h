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

/* A flow without a note that does not start now, and that lb_choose has given to its slot's previous owner: give it to
 * the current one, if that one knows it or its node can be asked. */
static __noinline void second_chance_ask(const struct packet *p, struct lb_choice *c)
{
	struct mesh_backend *current = find_backend(c->other);
	__u32 *kind = bpf_map_lookup_elem(&mesh_addresses, &p->flow.destination), asked = 0;

	if (p->flow.protocol != IPPROTO_TCP || !kind || *kind != MESH_ADDRESS_FLOATING || !current ||
	    current->state == MESH_BACKEND_FREE)
		return;
	if (is_remote(current)) {
		if (current->version != p->version || !tunnel_mtu(&current->address) ||
		    revnat_knows(&p->flow, c->owner))
			return;
		asked = MESH_NOTE_ASKED;
	} else if (!revnat_knows(&p->flow, c->other)) {
		return;
	}
	c->owner = c->other;
	c->backend = current;
	c->asked = asked;
	c->verdict = MESH_VERDICT_NOTED;
}

/* The node that is asked, for a flow that it does not know: return the packet as it came. */
INLINE int second_chance_return(struct __sk_buff *skb, const struct packet *p, struct tunnel_peer *from)
{
	int action;

	from->id.flags = MESH_TUNNEL_BACK;
	action = encap_send(skb, from, p->version);
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
