/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A client's packet, from its frontend to its task. Shared by the interfaces that face clients and by those of local
 * containers, which call ports of their own node (hairpin). */
#ifndef MESH_FORWARD_H
#define MESH_FORWARD_H

#include "fragments.h"
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

/* The tuple by which the task sees the flow. */
INLINE void task_tuple(struct tuple *to, const struct packet *p, const struct mesh_backend *backend, int from)
{
	struct mesh_config *node;

	to->source = p->flow.source;
	to->source_port = p->flow.source_port;
	to->destination = backend->address;
	to->destination_port = backend->port;
	to->flags = to->pad = 0;
	if (from != FROM_TASK)
		return;
	to->flags = MESH_REVNAT_PEER;
	node = config();
	if (!node || !same_address(&to->source, &to->destination))
		return;
	to->source = p->version == 4 ? node->hairpin : node->hairpin6;
	to->flags |= MESH_REVNAT_HAIRPIN;
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

/* The task has another flow of this client address and port. `taken`: as of revnat_update. */
INLINE int collide(const struct packet *p, __u32 frontend, int taken)
{
	count_failed_start(p, frontend, FAILURE(collision));
	return taken > 0 ? verdict(MESH_VERDICT_COLLISION, TC_ACT_SHOT) : REJECT(MESH_VERDICT_COLLISION);
}

/* A packet whose owner is a backend. */
INLINE int forward_to_backend(struct __sk_buff *skb, struct packet *p, struct lb_choice *c, int from)
{
	struct mesh_flow key;
	struct tuple to;
	int taken;

	if (unlikely(is_remote(c->backend)))
		return forward_to_node(skb, p, c, from);
	if (unlikely(is_v4(&c->backend->address) != (p->version == 4)))
		return verdict(MESH_VERDICT_FAMILY, TC_ACT_UNSPEC);
	if (unlikely(is_host_backend(c->backend)))
		return pass_to_host(p, c);
	if (unlikely(p->ttl <= 1))
		return REJECT(MESH_VERDICT_EXPIRED);
	task_tuple(&to, p, c->backend, from);
	if (!c->recent) {
		taken = revnat_update(skb, p, c, &to, skb->ifindex, &key);
		if (unlikely(taken))
			return collide(p, c->frontend, taken);
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
			return from != FROM_CLIENT ? TC_ACT_UNSPEC : tunnel_rx_call(skb);
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
		fragment_store(p);
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

#define EXTENSIONS 8 /* IPv6 extension headers of a packet, at most */

/* Find the ports behind IPv6 extension headers. Returns 1 where there are none (another protocol, a later fragment, for
 * which the first one answers), -1 where the headers are cut off or too many. */
RARE int extension_ports(struct __sk_buff *skb, struct packet *p)
{
	__u8 next, head[4];
	__u32 at;

	if (!p)
		return -1;
	next = p->flow.protocol;
	at = p->l4;
	for (int i = 0; i < EXTENSIONS; i++) {
		if (next == IPPROTO_TCP || next == IPPROTO_UDP) {
			p->flow.protocol = next;
			return at + 4 > L3 + p->length || bpf_skb_load_bytes(skb, at, &p->flow.source_port, 4) ? -1 : 0;
		}
		if (!is_extension(next))
			return 1;
		if (at + 4 > L3 + p->length || bpf_skb_load_bytes(skb, at, head, sizeof(head)))
			return -1;
		if (next == IPPROTO_FRAGMENT && (head[2] || head[3] & 0xf8))
			return 1;
		at += next == IPPROTO_FRAGMENT ? 8u : next == IPPROTO_AH ? (head[1] + 2) * 4u : (head[1] + 1) * 8u;
		next = head[0];
	}
	return -1;
}

/* Whether source rules deny a packet that is not served. It goes to the kernel, and so to whoever else serves the
 * port. */
INLINE int is_denied_to_kernel(const struct packet *p, __u32 id)
{
	struct mesh_frontend *frontend = id ? bpf_map_lookup_elem(&mesh_frontends, &id) : NULL;

	if (likely(!frontend || (!frontend->acl && !(frontend->flags & MESH_FRONTEND_DENY))))
		return 0;
	if (!is_denied(frontend, &p->flow.source))
		return 0;
	count_failed_start(p, id, FAILURE(denied));
	return 1;
}

INLINE __u32 frontend_of(const struct packet *p)
{
	__u32 word = port_word(p->flow.protocol, p->flow.destination_port);

	return word && !(word & MESH_PORT_TUNNEL) ? find_frontend(&p->flow, word) : 0;
}

/* Packets without ports pass unless source rules may deny them, and are counted if they are addressed to us. */
static __noinline int pass_without_ports(struct __sk_buff *skb, struct packet *p, int result)
{
	__u32 id = 0;
	int found;

	if (result == PARSE_MALFORMED) {
		id = frontend_of(p);
		if (!id)
			return TC_ACT_UNSPEC;
		return is_denied_to_kernel(p, id) ? verdict(MESH_VERDICT_DENIED, TC_ACT_SHOT)
						  : verdict(MESH_VERDICT_MALFORMED, TC_ACT_UNSPEC);
	}
	if ((result != PARSE_FRAGMENT && result != PARSE_EXTENSION) || !is_local(&p->flow.destination))
		return TC_ACT_UNSPEC;
	if (result == PARSE_FRAGMENT)
		return verdict(MESH_VERDICT_FRAGMENT, TC_ACT_UNSPEC);
	found = extension_ports(skb, p);
	if (found < 0 && is_guarded())
		return verdict(MESH_VERDICT_NO_PORTS, TC_ACT_SHOT);
	if (!found && is_denied_to_kernel(p, frontend_of(p)))
		return verdict(MESH_VERDICT_DENIED, TC_ACT_SHOT);
	return verdict(MESH_VERDICT_EXTENSION, TC_ACT_UNSPEC);
}

#endif /* MESH_FORWARD_H */
