/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where tasks' packets come out: tc ingress of the host side of every local container's interface. Replies get back the
 * address that the client called; what is no reply may be a call of a port of this node.
 */
#include "lib/serve.h"

/* A reply: as from the address that the client called, straight to where the client's packets come in. */
INLINE int answer(struct __sk_buff *skb, struct packet *p, struct mesh_reply *reply)
{
	struct tuple to = {
		.source = reply->called,
		.destination = reply->client,
		.source_port = reply->called_port,
		.destination_port = p->flow.destination_port,
	};
	__u32 ifindex = reply->ifindex, peer = reply->flags & MESH_REPLY_PEER;

	if (unlikely(p->ttl <= 1))
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	if (unlikely(p->fragment == 1))
		fragment_ports(p);
	if (unlikely(p->tcp_flags & (TCP_FIN | TCP_RST)))
		close_reply(reply, closed_by(p, MESH_REPLY_FIN_OUT));
	count_out(reply->frontend, reply->owner, p->length);
	if (unlikely(rewrite(skb, p, &to)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_REPLY);
	if (likely(!peer))
		return (int)bpf_redirect_neigh(ifindex, NULL, 0, 0);
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return (int)bpf_redirect_peer(ifindex, 0);
}

SEC("tc")
int mesh_task(struct __sk_buff *skb)
{
	enum parse_result result;
	struct mesh_reply *reply;
	struct packet p;

	result = parse(skb, &p);
	if (result == PARSE_FRAGMENT && !fragment_ports(&p))
		result = PARSE_FLOW;
	if (likely(result == PARSE_FLOW)) {
		reply = find_reply(&p.flow);
		if (likely(reply))
			return answer(skb, &p, reply);
		return serve_flow(skb, &p, 1);
	}
	return result == PARSE_OTHER ? TC_ACT_OK : serve_rest(skb, &p, result, 1);
}
