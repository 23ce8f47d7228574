/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A client's packet, from its frontend to its task. Shared by the interfaces that face clients and by those of local
 * containers, which call ports of their own node (hairpin). */
#ifndef MESH_FORWARD_H
#define MESH_FORWARD_H

#include "lb.h"
#include "reject.h"
#include "revnat.h"
#include "rewrite.h"
#include "second_chance.h"

/* Who sent the packet. */
#define FROM_CLIENT 0
#define FROM_TASK   1 /* the container that has this interface */
#define FROM_BRIDGE 2 /* some container of this node, on a bridge of containers only */

/* Into the task's network namespace, past netfilter, or to the bridge where its veth is not known. */
INLINE int deliver(struct __sk_buff *skb, const struct mesh_backend *backend)
{
	if (likely(backend->ifindex)) {
		if (skb->pkt_type != PACKET_HOST)
			bpf_skb_change_type(skb, PACKET_HOST);
		return (int)bpf_redirect_peer(backend->ifindex, 0);
	}
	return (int)bpf_redirect_neigh(backend->bridge, NULL, 0, 0);
}

/* Towards the client: into its network namespace if it is a container of this node. */
INLINE int deliver_to_client(struct __sk_buff *skb, __u32 ifindex, __u32 peer)
{
	if (likely(!peer))
		return (int)bpf_redirect_neigh(ifindex, NULL, 0, 0);
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return (int)bpf_redirect_peer(ifindex, 0);
}

/* Store the ports of a first fragment, or find those of a later one. Returns 0 when they are known. */
INLINE int fragment_ports(struct packet *p)
{
	struct mesh_fragment_key key = {
		.source = p->flow.source,
		.destination = p->flow.destination,
		.id = p->fragment_id,
		.protocol = p->flow.protocol,
	};
	__be16 ports[2], *known;

	if (p->fragment == 1) {
		ports[0] = p->flow.source_port;
		ports[1] = p->flow.destination_port;
		bpf_map_update_elem(&mesh_fragments, &key, ports, BPF_ANY);
		return 0;
	}
	known = bpf_map_lookup_elem(&mesh_fragments, &key);
	if (!known)
		return -1;
	p->flow.source_port = known[0];
	p->flow.destination_port = known[1];
	return 0;
}

/* The tuple by which the task sees the flow. Returns MESH_REVNAT_* flags. */
INLINE __u16 task_tuple(struct tuple *to, const struct packet *p, const struct mesh_backend *backend, int from)
{
	struct mesh_config *node;

	to->source = p->flow.source;
	to->source_port = p->flow.source_port;
	to->destination = backend->address;
	to->destination_port = backend->port;
	to->pad = 0;
	if (from != FROM_TASK)
		return 0;
	node = config();
	if (!node || !same_address(&to->source, &to->destination))
		return MESH_REVNAT_PEER;
	to->source = p->version == 4 ? node->hairpin : node->hairpin6;
	return MESH_REVNAT_PEER | MESH_REVNAT_HAIRPIN;
}

/* A packet whose owner is a task of another node. A container's own address means nothing there: it belongs to this
 * node, or to another container as well. */
INLINE int forward_to_node(struct __sk_buff *skb, struct packet *p, const struct lb_choice *c, int from)
{
	if (unlikely(!c->backend->version)) { /* the fallback proxy hands it over at the node's peer port */
		if (c->note || c->noted)
			flow_cache_update(&p->flow, c);
		return verdict(MESH_VERDICT_TUNNEL_NO_PATH, TC_ACT_UNSPEC);
	}
	if (c->backend->version != p->version)
		return verdict(MESH_VERDICT_FAMILY, TC_ACT_UNSPEC);
	if (from != FROM_CLIENT)
		return verdict(MESH_VERDICT_TUNNEL_NO_PATH, TC_ACT_UNSPEC);
	if (c->note || c->noted)
		flow_cache_update(&p->flow, c);
	return tunnel_tx_call(skb, c->owner, c->frontend, (__u32)c->wide, c->asked ? MESH_TUNNEL_ASK : 0);
}

/* A packet whose owner is at an address of this node. */
INLINE int pass_to_host(const struct packet *p, const struct lb_choice *c)
{
	if (c->note || c->noted)
		flow_cache_update(&p->flow, c);
	return verdict(MESH_VERDICT_HOST_BACKEND, TC_ACT_UNSPEC);
}

/* A packet whose owner is a backend. */
INLINE int forward_to_backend(struct __sk_buff *skb, struct packet *p, struct lb_choice *c, int from)
{
	struct tuple to;
	__u16 flags;

	if (unlikely(is_remote(c->backend)))
		return forward_to_node(skb, p, c, from);
	if (unlikely(is_v4(&c->backend->address) != (p->version == 4)))
		return verdict(MESH_VERDICT_FAMILY, TC_ACT_UNSPEC);
	if (unlikely(is_host_backend(c->backend)))
		return pass_to_host(p, c);
	if (unlikely(p->ttl <= 1))
		return REJECT(MESH_VERDICT_EXPIRED);
	flags = task_tuple(&to, p, c->backend, from);
	if (!c->recent && unlikely(revnat_update(p, c, &to, skb->ifindex, flags))) {
		count_failed_start(p, c->frontend, FAILURE(collision));
		return REJECT(MESH_VERDICT_COLLISION);
	}
	if (unlikely(c->note || c->noted))
		flow_cache_update(&p->flow, c);
	if (unlikely(rewrite(skb, p, &to)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_in(c->frontend, c->owner, p->length);
	count_verdict(c->verdict);
	return deliver(skb, c->backend);
}

/* A packet to a port by which nodes hand flows to each other, on an interface of containers: whether it is for a node.
 * Docker gives whatever leaves a container the address of its node, by which other nodes know that one. */
INLINE int is_for_node(const struct packet *p, __u32 word)
{
	if (bpf_map_lookup_elem(&mesh_nodes, &p->flow.destination))
		return 1;
	return !(word & (MESH_PORT_EXACT | MESH_PORT_FRONTEND)) && is_local(&p->flow.destination);
}

/* A TCP or UDP packet with known ports. Returns an action, or a REJECT or TAIL_CALL that the caller has to carry out.
 */
INLINE int forward_flow(struct __sk_buff *skb, struct packet *p, int from)
{
	struct lb_choice c;
	__u32 word;

	word = port_word(p->flow.protocol, p->flow.destination_port);
	if (likely(!word))
		return TC_ACT_UNSPEC;
	if (from != FROM_TASK && skb->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	if (unlikely(word & (MESH_PORT_TUNNEL | MESH_PORT_NODES))) {
		if (from != FROM_CLIENT && (word & MESH_PORT_NODES) && is_for_node(p, word))
			return verdict(MESH_VERDICT_CONTAINER, TC_ACT_SHOT);
		if (word & MESH_PORT_TUNNEL)
			return from != FROM_CLIENT ? TC_ACT_UNSPEC : TAIL_CALL(CALL_TUNNEL_RX);
		if (!(word & (MESH_PORT_EXACT | MESH_PORT_FRONTEND)))
			return TC_ACT_UNSPEC;
	}
	word &= MESH_PORT_EXACT | MESH_PORT_FRONTEND; /* always: so the verifier walks what follows once */
	__builtin_memset(&c, 0, sizeof(c));
	c.frontend = word & MESH_PORT_EXACT ? find_frontend(&p->flow, word) : word;
	if (!c.frontend)
		return TC_ACT_UNSPEC;
	c.start = p->flow.protocol == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	lb_choose(&p->flow, &c);
	c.recent = c.backend && is_recent(p, &c);
	/* The address of a recent flow was looked up before, or belongs to the frontend alone. */
	if (!c.recent && !(word & MESH_PORT_EXACT) && !is_local(&p->flow.destination))
		return TC_ACT_UNSPEC;
	if (unlikely(p->fragment == 1))
		fragment_ports(p);
	if (from == FROM_CLIENT && unlikely(c.other))
		second_chance_ask(p, &c);
	if (likely(c.backend))
		return forward_to_backend(skb, p, &c, from);
	if (c.note || c.noted)
		flow_cache_update(&p->flow, &c);
	if (c.verdict == MESH_VERDICT_REJECTED) {
		count_failed_start(p, c.frontend, FAILURE(no_backend));
		return REJECT(MESH_VERDICT_REJECTED);
	}
	if (c.verdict == MESH_VERDICT_DENIED)
		count_failed_start(p, c.frontend, FAILURE(denied));
	return verdict(c.verdict, c.verdict == MESH_VERDICT_DENIED ? TC_ACT_SHOT : TC_ACT_UNSPEC);
}

/* Packets without ports pass, and are counted if they are addressed to us. */
INLINE int pass_without_ports(const struct packet *p, enum parse_result result)
{
	__u32 word;

	if (result == PARSE_MALFORMED) {
		word = port_word(p->flow.protocol, p->flow.destination_port);
		return word && find_frontend(&p->flow, word) ? verdict(MESH_VERDICT_MALFORMED, TC_ACT_UNSPEC)
							     : TC_ACT_UNSPEC;
	}
	if ((result != PARSE_FRAGMENT && result != PARSE_EXTENSION) || !is_local(&p->flow.destination))
		return TC_ACT_UNSPEC;
	return verdict(result == PARSE_FRAGMENT ? MESH_VERDICT_FRAGMENT : MESH_VERDICT_EXTENSION, TC_ACT_UNSPEC);
}

#endif /* MESH_FORWARD_H */
