/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where tasks' packets come out: tc ingress of the host side of every local container's interface. Replies get back the
 * address that the client called; what is no reply may be a call of a port of this node.
 */
#include "lib/tunnel_reply.h"

#define MTU_SAFE 1280u /* no interface that carries IPv6 takes less; smaller packets need no look at it */

/* Whether a reply (or one of the segments it will be cut into) is larger than its interface's MTU. Only the kernel's
 * own path tells the task so: such a packet is passed to it as it is. */
static __noinline int is_too_big(struct __sk_buff *skb, __u32 ifindex)
{
	__u32 mtu = 0;

	return bpf_check_mtu(skb, ifindex, &mtu, 0, skb->gso_size ? BPF_MTU_CHK_SEGS : 0) > 0;
}

/* A reply: as from the address that the client called, straight to where the client's packets come in. */
static __noinline int answer(struct __sk_buff *skb, struct packet *p, struct mesh_reply *reply)
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
	if (!peer && unlikely(p->length > MTU_SAFE) && is_too_big(skb, ifindex))
		return verdict(MESH_VERDICT_TOO_BIG, p->dont_fragment ? TC_ACT_UNSPEC : TC_ACT_SHOT);
	if (unlikely(p->fragment == 1))
		fragment_ports(p);
	if (unlikely(p->tcp_flags & (TCP_FIN | TCP_RST))) {
		if (is_first_refusal(skb, p, reply))
			return verdict(MESH_VERDICT_UNANSWERED, TC_ACT_SHOT);
		close_reply(reply, closed_by(p, MESH_REPLY_FIN_OUT));
	}
	count_out(reply->frontend, reply->owner, p->length);
	if (unlikely(rewrite(skb, p, &to)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_REPLY);
	if (likely(!peer))
		return send_packet(skb, p, &to.source, &to.destination, ifindex);
	return hand_back(skb, ifindex, peer);
}

/* An error of a task about a packet that a client sent. -1: not about a flow of ours. */
RARE int answer_icmp(struct __sk_buff *skb, struct packet *p)
{
	struct icmp_work *w = icmp_work();
	struct mesh_reply *reply;
	__u32 ifindex, peer;

	if (!p || !w)
		return -1;
	reply = find_sent(skb, p, w);
	if (!reply)
		return -1;
	ifindex = reply->ifindex;
	if (ifindex & MESH_REPLY_NODE)
		return GO(0);
	peer = reply->flags & MESH_REPLY_PEER;
	if (translate_own(skb, p, w, reply))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_ICMP_OUT);
	return hand_back(skb, ifindex, peer);
}

/* A container calls a port of this node. */
static __noinline int serve_call(struct __sk_buff *skb, struct packet *p)
{
	return p ? serve_flow(skb, p, FROM_TASK) : TC_ACT_UNSPEC;
}

SEC("tc")
int mesh_task(struct __sk_buff *skb)
{
	enum parse_result result;
	struct mesh_reply *reply;
	struct packet p;
	int action;

	result = parse(skb, &p);
	if (result == PARSE_FRAGMENT && !fragment_ports(&p))
		result = PARSE_FLOW;
	if (likely(result == PARSE_FLOW)) {
		reply = find_reply(&p.flow);
		if (likely(reply && !(reply->ifindex & MESH_REPLY_NODE)))
			return answer(skb, &p, reply);
		if (!reply) {
			action = serve_call(skb, &p);
			return IS_REFUSAL(action) ? refuse(skb, &p, action) : action;
		}
		bpf_tail_call(skb, &mesh_departures, 0);
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	}
	if (result == PARSE_OTHER)
		return TC_ACT_UNSPEC;
	if (result != PARSE_ICMP)
		return serve_rest(&p, result);
	action = answer_icmp(skb, &p);
	if (action == GO(0))
		bpf_tail_call(skb, &mesh_departures, 0);
	return action >= 0 ? action : serve_icmp(skb, &p, FROM_TASK);
}
