/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where clients' packets come in: tc ingress of every Ethernet interface that faces clients. */
#include "lib/encap.h"

int mesh_tunnel(struct __sk_buff *skb);
int mesh_leave(struct __sk_buff *skb);
int mesh_error(struct __sk_buff *skb);
int mesh_ingress(struct __sk_buff *skb);

/* What programs of this object go on with, by GO. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, PROGRAMS);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} mesh_programs SEC(".maps") = {.values = {
					[GO_ARRIVE] = (void *)&mesh_tunnel,
					[GO_LEAVE] = (void *)&mesh_leave,
					[GO_ERROR] = (void *)&mesh_error,
					[GO_AGAIN] = (void *)&mesh_ingress,
				}};

#include "lib/tunnel_rx.h"
#include "lib/tunnel_tx.h"

/* ICMP errors from the clients' side, and from the way to other nodes. */
SEC("tc")
int mesh_error(struct __sk_buff *skb)
{
	struct packet p;
	int action;

	if (parse(skb, &p) != PARSE_ICMP)
		return TC_ACT_UNSPEC;
	action = serve_icmp(skb, &p, FROM_CLIENT);
	if (action <= GO(0))
		bpf_tail_call(skb, &mesh_programs, GO(0) - action);
	return action > GO(0) ? action : verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
}

INLINE int ingress(struct __sk_buff *skb, int from)
{
	int action = GO(GO_ERROR);
	enum parse_result result;
	struct packet p;

	result = parse(skb, &p);
	if (unlikely(result == PARSE_FRAGMENT) && !fragment_ports(&p))
		result = PARSE_FLOW;
	if (likely(result == PARSE_FLOW)) {
		action = serve_flow(skb, &p, from);
		if (likely(!IS_REFUSAL(action)))
			return action;
		if (action > GO(0))
			return refuse(skb, &p, action);
	} else if (result == PARSE_OTHER) {
		return TC_ACT_UNSPEC;
	} else if (result != PARSE_ICMP) {
		return serve_rest(&p, result);
	}
	bpf_tail_call(skb, &mesh_programs, GO(0) - action);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
}

SEC("tc")
int mesh_ingress(struct __sk_buff *skb)
{
	return ingress(skb, FROM_CLIENT);
}

/* In place of mesh_ingress on bridges that have nothing but containers of this node. */
SEC("tc")
int mesh_bridge(struct __sk_buff *skb)
{
	return ingress(skb, FROM_BRIDGE);
}

/* See MESH_EXPLAIN_VERDICT in abi.h. */
SEC("tc")
int mesh_explain(struct __sk_buff *skb)
{
	struct choice c = {.verdict = MESH_VERDICT_COUNT};
	struct packet p;
	__u32 word;

	if (parse(skb, &p) != PARSE_FLOW)
		return TC_ACT_UNSPEC;
	word = port_word(p.flow.protocol, p.flow.destination_port);
	c.frontend = word ? find_frontend(&p.flow, word) : 0;
	c.start = p.flow.protocol == IPPROTO_TCP && (p.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	if (c.frontend) {
		choose(&p.flow, &c);
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
