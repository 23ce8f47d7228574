/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where clients' packets come in: tc ingress of every Ethernet interface that faces clients. */
#include "lib/icmp.h"

SEC("tc")
int mesh_ingress(struct __sk_buff *skb)
{
	enum parse_result result;
	struct packet p;
	int action;

	result = parse(skb, &p);
	if (unlikely(result == PARSE_FRAGMENT) && !fragment_ports(&p))
		result = PARSE_FLOW;
	if (likely(result == PARSE_FLOW)) {
		action = serve_flow(skb, &p, 0);
		return unlikely(IS_REFUSAL(action)) ? refuse(skb, &p, action) : action;
	}
	if (result == PARSE_OTHER)
		return TC_ACT_UNSPEC;
	return result == PARSE_ICMP ? serve_icmp(skb, &p, 0) : serve_rest(&p, result);
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
