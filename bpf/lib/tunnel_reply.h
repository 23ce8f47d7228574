/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a task to a client that called another node: the program mesh_depart, behind mesh_task. Through the tunnel to
 * that node; straight to the client where that is set, and where that node is gone.
 */
#ifndef MESH_TUNNEL_REPLY_H
#define MESH_TUNNEL_REPLY_H

#include "icmp.h"

/* Whether a task refuses a connection (RFC 9293, 3.5.2: a reset with sequence number 0) for the first time. The client
 * is not told then: its kernel asks again after a second, by when the tables name another task if this one has ended,
 * or it listens if it has just begun. */
static __noinline int is_first_refusal(struct __sk_buff *skb, struct packet *p, struct mesh_reply *reply)
{
	__be32 sequence;

	if (!p || !reply || (p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) != (TCP_RST | TCP_ACK))
		return 0;
	if (p->fragment || reply->flags & (MESH_REPLY_OPENED | MESH_REPLY_REFUSED | REPLY_CLOSED))
		return 0;
	if (bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &sequence, sizeof(sequence)) || sequence)
		return 0;
	add_flags(reply, MESH_REPLY_REFUSED | REPLY_CLOSED);
	return 1;
}

/* How a reply leaves. */
struct departure {
	struct tunnel_to to;
	__u32 ifindex; /* not 0: straight to the client */
	__u32 pad;
};

/* Find it: p->mtu is the tunnel's, 0 for none. Returns -1 where there is no way at all. */
static __noinline int find_departure(struct __sk_buff *skb, struct packet *p, struct mesh_reply *reply,
				     struct departure *d)
{
	__u32 id = reply->ifindex & ~MESH_REPLY_NODE;
	struct mesh_addr *node = bpf_map_lookup_elem(&mesh_ways, &id);
	struct mesh_config *own = config();

	if (!node || !own)
		return -1;
	d->to.node = *node;
	d->to.id.flags = MESH_TUNNEL_REPLY;
	d->to.entropy = (__u32)mesh_hash_flow_wide(&p->flow);
	p->mtu = (__u16)tunnel_mtu(&d->to.node);
	if (p->mtu && !(own->settings & MESH_SETTING_DIRECT))
		return 0;
	d->ifindex = way_out(skb, &reply->called, &reply->client);
	return d->ifindex ? 0 : -1;
}

INLINE int send_departure(struct __sk_buff *skb, struct packet *p, struct departure *d, __u32 name)
{
	int action;

	if (d->ifindex) {
		count_verdict(name == MESH_VERDICT_TUNNEL_ANSWER ? MESH_VERDICT_TUNNEL_DIRECT : name);
		return (int)bpf_redirect_neigh(d->ifindex, NULL, 0, 0);
	}
	action = tunnel_send(skb, &d->to, p->version);
	if (action == TC_ACT_REDIRECT)
		count_verdict(name);
	return action;
}

/* A reply, as from the address that the client called: all but the sending. Returns 0, or an action or REFUSAL. */
static __noinline int prepare(struct __sk_buff *skb, struct packet *p, struct mesh_reply *reply, struct departure *d)
{
	struct tuple to = {
		.source = reply->called,
		.destination = reply->client,
		.source_port = reply->called_port,
		.destination_port = p->flow.destination_port,
	};

	if (p->ttl <= 1)
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	if (find_departure(skb, p, reply, d))
		return verdict(MESH_VERDICT_TUNNEL_NONE, TC_ACT_SHOT);
	if (!d->ifindex && exceeds(skb, p))
		return REFUSAL(MESH_VERDICT_TUNNEL_TOO_BIG);
	if (p->fragment == 1)
		fragment_ports(p);
	if (p->tcp_flags & (TCP_FIN | TCP_RST)) {
		if (is_first_refusal(skb, p, reply))
			return verdict(MESH_VERDICT_UNANSWERED, TC_ACT_SHOT);
		close_reply(reply, closed_by(p, MESH_REPLY_FIN_OUT));
	}
	count_out(reply->frontend, reply->owner, p->length);
	if ((p->mtu && (p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, p->mtu)) || rewrite(skb, p, &to))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	return 0;
}

/* Likewise an error of a task about a packet of such a client. */
static __noinline int prepare_icmp(struct __sk_buff *skb, struct packet *p, struct departure *d)
{
	struct icmp_work *w = icmp_work();
	struct mesh_reply *reply;

	reply = w ? find_sent(skb, p, w) : NULL;
	if (!reply || find_departure(skb, p, reply, d))
		return verdict(MESH_VERDICT_TUNNEL_NONE, TC_ACT_SHOT);
	return translate_own(skb, p, w, reply) ? verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT) : 0;
}

/* A packet of a task for which mesh_task has found a reverse entry with MESH_REPLY_NODE. */
SEC("tc")
int mesh_depart(struct __sk_buff *skb)
{
	struct departure d = {};
	enum parse_result result;
	struct mesh_reply *reply;
	struct packet p;
	int action;

	result = parse(skb, &p);
	if (result == PARSE_ICMP) {
		action = prepare_icmp(skb, &p, &d);
		return action ? action : send_departure(skb, &p, &d, MESH_VERDICT_ICMP_OUT);
	}
	if (result != PARSE_FLOW && (result != PARSE_FRAGMENT || fragment_ports(&p)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	reply = find_reply(&p.flow);
	if (!reply || !(reply->ifindex & MESH_REPLY_NODE))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	action = prepare(skb, &p, reply, &d);
	if (IS_REFUSAL(action))
		return refuse(skb, &p, action);
	return action ? action : send_departure(skb, &p, &d, MESH_VERDICT_TUNNEL_ANSWER);
}

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} mesh_departures SEC(".maps") = {.values = {(void *)&mesh_depart}};

#endif /* MESH_TUNNEL_REPLY_H */
