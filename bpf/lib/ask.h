/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The second chance of a TCP flow that began on another node while its slot was in transition, to an address that has
 * moved here since: that node has noted it, this one has not. It is the current owner's then, and the current owner's
 * node knows it by its reverse entries. So that node is asked, by the packet itself (MESH_TUNNEL_ASK): it delivers what
 * it knows, and sends back what it does not (MESH_TUNNEL_BACK).
 */
#ifndef MESH_ASK_H
#define MESH_ASK_H

#include "encap.h"

/* An un-noted flow that does not start now and that `choose` has given to its slot's previous owner: give it to the
 * current one if that one knows it or, being asked, can say so. */
static __noinline void ask(const struct packet *p, struct choice *c)
{
	struct mesh_backend *current = find_backend(c->other);
	__u32 *kind = bpf_map_lookup_elem(&mesh_addresses, &p->flow.destination), asked = 0;

	if (p->flow.protocol != IPPROTO_TCP || !kind || *kind != MESH_ADDRESS_FLOATING || !current ||
	    current->state == MESH_BACKEND_FREE)
		return;
	if (is_away(current)) {
		if (current->version != p->version || !tunnel_mtu(&current->address) || is_known_of(&p->flow, c->owner))
			return;
		asked = MESH_NOTE_ASKED;
	} else if (!is_known_of(&p->flow, c->other)) {
		return;
	}
	c->owner = c->other;
	c->backend = current;
	c->asked = asked;
	c->verdict = MESH_VERDICT_NOTED;
}

#endif /* MESH_ASK_H */
