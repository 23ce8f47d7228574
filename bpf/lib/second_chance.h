/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A client's packet that a node was asked about (ask.h) and that comes back, for it knows nothing of the flow: both
 * ends of that way.
 */
#ifndef MESH_SECOND_CHANCE_H
#define MESH_SECOND_CHANCE_H

#include "forward.h"

/* What came through the tunnel to be asked about, back as it came. */
INLINE int send_back(struct __sk_buff *skb, const struct packet *p, struct tunnel_to *from)
{
	int action;

	from->id.flags = MESH_TUNNEL_BACK;
	action = tunnel_send(skb, from, p->version);
	if (action == TC_ACT_REDIRECT)
		count_verdict(MESH_VERDICT_TUNNEL_BACK);
	return action;
}

/* Whether a note's owner is the backend whose node has sent a packet of the flow back. */
INLINE int is_asked(const struct mesh_note *note, const struct tunnel_to *from)
{
	struct mesh_backend *backend = find_backend(note->owner);

	return (note->frontend & MESH_NOTE_ASKED) && backend && is_away(backend) &&
	       same_address(&backend->address, &from->node) && ((__be32 *)&backend->seed)[0] == from->id.seed[0] &&
	       ((__be32 *)&backend->seed)[1] == from->id.seed[1];
}

/* A client's packet that this node has asked another one about, and that knows nothing of the flow: the flow is the
 * previous owner's, unless it was noted for somebody else in the meantime. Returns -1 for what is none. */
static __noinline int resolve(struct packet *p, struct tunnel_to *from)
{
	struct choice c = {};
	struct mesh_note *note;
	__u32 word;

	word = port_word(p->flow.protocol, p->flow.destination_port);
	c.frontend = word && !(word & MESH_PORT_TUNNEL) ? find_frontend(&p->flow, word) : 0;
	if (!c.frontend)
		return -1;
	note = bpf_map_lookup_elem(&mesh_flows, &p->flow);
	if (!note)
		note = bpf_map_lookup_elem(&mesh_starts, &p->flow);
	if (note && !is_asked(note, from))
		return 0;
	bpf_map_delete_elem(&mesh_flows, &p->flow);
	bpf_map_delete_elem(&mesh_starts, &p->flow);
	choose(&p->flow, &c);
	note_choice(&p->flow, &c);
	return 0;
}

/* It goes on as if its client had sent it once more, for mesh_ingress. */
INLINE int arrive_back(struct __sk_buff *skb, struct packet *p, struct tunnel_to *from)
{
	if (resolve(p, from))
		return verdict(MESH_VERDICT_TUNNEL_BAD, TC_ACT_SHOT);
	bpf_tail_call(skb, &mesh_programs, GO_AGAIN);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}

#endif /* MESH_SECOND_CHANCE_H */
