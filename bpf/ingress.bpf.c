/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where clients' packets come in: tc ingress of every Ethernet interface that faces clients. */
#define MESH_PROVES
#include "lib/tunnel_rx.h"
#include "lib/tunnel_tx.h"

int mesh_tunnel_rx(struct __sk_buff *skb);
int mesh_tunnel_tx(struct __sk_buff *skb);
int mesh_icmp(struct __sk_buff *skb);
int mesh_ingress(struct __sk_buff *skb);
int mesh_guard(struct __sk_buff *skb);
int mesh_early(struct __sk_buff *skb);
int mesh_tunnel_early(struct __sk_buff *skb);
int mesh_bridge(struct __sk_buff *skb);
int mesh_bridge_guard(struct __sk_buff *skb);

/* Programs that those of ingress.bpf.o continue in, by CALL_*. The kernel empties the map when nobody holds or pins it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, CALLS);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} mesh_tail_calls SEC(".maps") = {.values = {
					  [CALL_TUNNEL_RX] = (void *)&mesh_tunnel_rx,
					  [CALL_TUNNEL_TX] = (void *)&mesh_tunnel_tx,
					  [CALL_ICMP] = (void *)&mesh_icmp,
					  [CALL_INGRESS] = (void *)&mesh_ingress,
					  [CALL_GUARD] = (void *)&mesh_guard,
					  [CALL_EARLY] = (void *)&mesh_early,
					  [CALL_BRIDGE] = (void *)&mesh_bridge,
					  [CALL_BR_GUARD] = (void *)&mesh_bridge_guard,
					  [CALL_TUNNEL_EARLY] = (void *)&mesh_tunnel_early,
				  }};

/* Hand a fragment to mesh_early, from which a first one comes back to `program`. */
INLINE int early_call(struct __sk_buff *skb, __u32 program)
{
	skb->cb[0] = program;
	bpf_tail_call(skb, &mesh_tail_calls, CALL_EARLY);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}

INLINE int ingress(struct __sk_buff *skb, int from)
{
	int action = TAIL_CALL(CALL_ICMP);
	enum parse_result result;
	struct packet p;

	result = parse(skb, &p);
	if (unlikely(result == PARSE_FRAGMENT)) {
		if (skb->pkt_type != PACKET_HOST)
			return TC_ACT_UNSPEC;
		if (complete(&p, &result, 0))
			return early_call(skb, from == FROM_CLIENT ? CALL_INGRESS : CALL_BRIDGE);
	}
	if (likely(result == PARSE_FLOW)) {
		action = forward_flow(skb, &p, from);
		if (likely(!IS_REJECT(action)))
			return action;
		if (action > TAIL_CALL(0))
			return reject(skb, &p, action);
	} else if (result == PARSE_OTHER) {
		return TC_ACT_UNSPEC;
	} else if (result != PARSE_ICMP) {
		return pass_without_ports(skb, &p, result);
	}
	bpf_tail_call(skb, &mesh_tail_calls, TAIL_CALL(0) - action);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
}

/* A client's packet, to its task. */
SEC("tc")
int mesh_ingress(struct __sk_buff *skb)
{
	return ingress(skb, FROM_CLIENT);
}

/* A client's packet on a bridge that has only containers of this node: as mesh_ingress, but never through the tunnel.
 */
SEC("tc")
int mesh_bridge(struct __sk_buff *skb)
{
	return ingress(skb, FROM_BRIDGE);
}

/* A packet that is not served, and that the kernel gets: source rules hold for it. */
INLINE int guard(struct __sk_buff *skb, struct packet *p, enum parse_result result, __u32 program)
{
	if (skb->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	if (result == PARSE_FRAGMENT && complete(p, &result, 0))
		return early_call(skb, program);
	if (likely(result == PARSE_FLOW))
		return is_denied_to_kernel(p, frontend_of(p)) ? verdict(MESH_VERDICT_DENIED, TC_ACT_SHOT)
							      : TC_ACT_UNSPEC;
	return pass_without_ports(skb, p, result);
}

/* A packet on an interface that is not served: only source rules hold there. */
SEC("tc")
int mesh_guard(struct __sk_buff *skb)
{
	enum parse_result result;
	struct packet p = {}; /* read, as compilers have it, whatever the result */

	result = parse(skb, &p);
	return result == PARSE_OTHER || result == PARSE_ICMP ? TC_ACT_UNSPEC : guard(skb, &p, result, CALL_GUARD);
}

/* A packet on a bridge of containers that the configuration leaves out: nothing is served there, but containers are
 * kept from the ports by which nodes hand flows to each other, and source rules hold. */
SEC("tc")
int mesh_bridge_guard(struct __sk_buff *skb)
{
	enum parse_result result;
	struct packet p = {}; /* read, as compilers have it, whatever the result */
	__u32 word;

	result = parse(skb, &p);
	if (result == PARSE_OTHER || result == PARSE_ICMP)
		return TC_ACT_UNSPEC;
	if (result == PARSE_FLOW || (result == PARSE_FRAGMENT && p.fragment == 1)) {
		word = port_word(p.flow.protocol, p.flow.destination_port);
		if (unlikely(word & MESH_PORT_NODES) && is_for_node(&p, word))
			return verdict(MESH_VERDICT_CONTAINER, TC_ACT_SHOT);
	}
	return guard(skb, &p, result, CALL_BR_GUARD);
}

/* Whether an IP packet without an Ethernet header is addressed to this node. */
INLINE int is_bare_to_node(struct __sk_buff *skb)
{
	struct mesh_addr destination;
	__be32 v4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, offsetof(struct iphdr, daddr), &v4, sizeof(v4)))
			return 0;
		address_v4(&destination, v4);
	} else if (skb->protocol != bpf_htons(ETH_P_IPV6) ||
		   bpf_skb_load_bytes(skb, offsetof(struct ipv6hdr, daddr), &destination, sizeof(destination))) {
		return 0;
	}
	return is_local(&destination);
}

/* Give a packet for this node an Ethernet header, and continue in a program that expects one. If that lets it pass, the
 * kernel skips the header. */
INLINE int continue_with_ethernet(struct __sk_buff *skb, __u32 program)
{
	__be16 type = (__be16)skb->protocol;

	if (!is_bare_to_node(skb))
		return TC_ACT_UNSPEC;
	if (bpf_skb_change_head(skb, L3, 0) ||
	    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, sizeof(type), 0))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	bpf_tail_call(skb, &mesh_tail_calls, program);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}

/* A client's packet on an interface without Ethernet (WireGuard, tun, PPP): as mesh_ingress. */
SEC("tc")
int mesh_l3(struct __sk_buff *skb)
{
	return continue_with_ethernet(skb, CALL_INGRESS);
}

/* Likewise, as mesh_guard. */
SEC("tc")
int mesh_l3_guard(struct __sk_buff *skb)
{
	return continue_with_ethernet(skb, CALL_GUARD);
}

/* A fragment that came before its first one is kept; a first one has those that came before it come in again. */
SEC("tc")
int mesh_early(struct __sk_buff *skb)
{
	struct packet p;
	int action;

	if (parse(skb, &p) != PARSE_FRAGMENT)
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	action = early_fragment(skb, &p, 1);
	if (action != EARLY_GO_ON)
		return action;
	bpf_tail_call(skb, &mesh_tail_calls, skb->cb[0]);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}

/* An ICMP error from the clients' side, or from the path to another node. */
SEC("tc")
int mesh_icmp(struct __sk_buff *skb)
{
	struct packet p;
	int action;

	if (parse(skb, &p) != PARSE_ICMP)
		return TC_ACT_UNSPEC;
	action = forward_icmp(skb, &p, FROM_CLIENT);
	if (action <= TAIL_CALL(0))
		bpf_tail_call(skb, &mesh_tail_calls, TAIL_CALL(0) - action);
	return action > TAIL_CALL(0) ? action : verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
}

/* A client's packet whose owner is a task of another node: encapsulated, and sent to that node. */
SEC("tc")
int mesh_tunnel_tx(struct __sk_buff *skb)
{
	__u32 owner = skb->cb[0], frontend = skb->cb[1], entropy = skb->cb[2], length;
	struct mesh_backend *backend = find_backend(owner);
	struct packet p;
	int action;

	if (parse(skb, &p) == PARSE_OTHER || !backend || !is_remote(backend))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	length = p.length;
	if (unlikely((p.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) && frontend)
		await_answer(skb, &p, frontend);
	action = tunnel_tx(skb, &p, backend, entropy, skb->cb[3]);
	if (action == REJECT(MESH_VERDICT_TUNNEL_TOO_BIG) && frontend)
		count_failed_start(&p, frontend, FAILURE(too_big));
	if (IS_REJECT(action))
		return reject(skb, &p, action);
	if (likely(action == TC_ACT_REDIRECT)) {
		count_verdict(MESH_VERDICT_TUNNEL_TX);
		if (frontend)
			count_in(frontend, owner, length);
	}
	return action;
}

/* A packet that another node has returned starts over, as if its client had sent it again. */
INLINE int restart(struct __sk_buff *skb, int invalid)
{
	if (invalid)
		return verdict(MESH_VERDICT_TUNNEL_INVALID, TC_ACT_SHOT);
	bpf_tail_call(skb, &mesh_tail_calls, CALL_INGRESS);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}

/* A packet from another node: decapsulated, and sent to its task or to its client. Also an ICMP error about a packet
 * that was sent through the tunnel. */
SEC("tc")
int mesh_tunnel_rx(struct __sk_buff *skb)
{
	struct tunnel_peer from = {};
	struct packet p = {};
	struct mesh_node *path;
	int result, action;

	result = parse(skb, &p);
	if (result == PARSE_FRAGMENT && p.fragment == 1)
		result = PARSE_FLOW;
	if ((result != PARSE_FLOW && result != PARSE_ICMP) || !is_local(&p.flow.destination))
		return TC_ACT_UNSPEC;
	if (result == PARSE_ICMP)
		return learn_path_mtu(skb, &p);
	path = bpf_map_lookup_elem(&mesh_nodes, &p.flow.source);
	if (!path)
		return verdict(MESH_VERDICT_TUNNEL_FOREIGN, TC_ACT_SHOT);
	from.number = path->id;
	result = decap(skb, &p, &from, path);
	if (unlikely(result == DECAP_FRAGMENT)) {
		bpf_tail_call(skb, &mesh_tail_calls, CALL_TUNNEL_EARLY);
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	}
	if (unlikely(result == DECAP_UNPROVEN))
		return verdict(MESH_VERDICT_TUNNEL_UNPROVEN, TC_ACT_SHOT);
	if (from.id.flags & MESH_TUNNEL_REPLY)
		return tunnel_rx_reply(skb, &p, &from, result);
	if (result == PARSE_ICMP && !from.id.flags)
		return tunnel_rx_icmp(skb, &p, &from);
	if (result != PARSE_FLOW)
		return verdict(MESH_VERDICT_TUNNEL_INVALID, TC_ACT_SHOT);
	if (from.id.flags & MESH_TUNNEL_BACK)
		return restart(skb, second_chance_resolve(&p, &from));
	action = tunnel_rx_flow(skb, &p, &from);
	return IS_REJECT(action) ? reject_through_tunnel(skb, &p, &from, action) : action;
}

/* A packet from another node with a fragment inside. It is kept as it came, so that each has its proof looked at. */
SEC("tc")
int mesh_tunnel_early(struct __sk_buff *skb)
{
	struct packet p;
	int action;

	if (parse(skb, &p) != PARSE_FLOW)
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	if (parse_inside(skb, &p) == PARSE_FRAGMENT && is_early(&p)) {
		action = early_fragment(skb, &p, 0);
		if (action != EARLY_GO_ON)
			return action;
	}
	skb->cb[0] = DECAP_ANY;
	bpf_tail_call(skb, &mesh_tail_calls, CALL_TUNNEL_RX);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}

/* The verdict of a flow to a task of this node, where the task sees another source than the client's own. */
INLINE void explain_source(struct packet *p, struct lb_choice *c)
{
	struct tuple to;
	int port;

	if (!c->backend || is_remote(c->backend) || is_host_backend(c->backend) ||
	    is_v4(&c->backend->address) != (p->version == 4))
		return;
	task_tuple(&to, p, c->backend, FROM_CLIENT);
	port = snat_foretell(p, c, &to);
	if (port != SNAT_NONE)
		c->verdict = port > 0 ? MESH_VERDICT_TRANSLATED : MESH_VERDICT_COLLISION;
}

/* Test run only: answers what would become of a packet, and changes nothing (MESH_EXPLAIN_VERDICT in abi.h). */
SEC("tc")
int mesh_explain(struct __sk_buff *skb)
{
	struct lb_choice c = {.verdict = MESH_VERDICT_COUNT};
	struct packet p;
	__u32 word;

	if (parse(skb, &p) != PARSE_FLOW)
		return TC_ACT_UNSPEC;
	word = port_word(p.flow.protocol, p.flow.destination_port);
	c.frontend = word ? find_frontend(&p.flow, word) : 0;
	c.start = p.flow.protocol == IPPROTO_TCP && (p.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	if (c.frontend) {
		lb_choose(&p.flow, &c);
		explain_source(&p, &c);
	} else {
		c.hash = mesh_hash_flow(&p.flow);
		c.slot = mesh_hash_client(&p.flow.source);
	}
	skb->cb[MESH_EXPLAIN_VERDICT] = c.verdict;
	skb->cb[MESH_EXPLAIN_FRONTEND] = c.frontend;
	skb->cb[MESH_EXPLAIN_HASH] = c.hash;
	skb->cb[MESH_EXPLAIN_SLOT] = c.slot;
	skb->cb[MESH_EXPLAIN_OWNER] = c.owner;
	return TC_ACT_UNSPEC;
}
