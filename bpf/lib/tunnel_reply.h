/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a task to a client that called another node: through the tunnel to that node, or straight to the client where
 * the configuration says so or that node is gone. */
#ifndef MESH_TUNNEL_REPLY_H
#define MESH_TUNNEL_REPLY_H

#include "icmp.h"

/* Whether a task refuses a connection (RFC 9293, 3.5.2: a reset with sequence number 0) for the first time. The client
 * is not told then: its kernel sends its SYN again after a second, by when the tables name another task if this one
 * has ended, or it listens if it has just begun. Of the second time the client is told, and that is counted. */
static __noinline int is_first_reset(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply)
{
	__be32 sequence;

	if (!p || !reply || (p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) != (TCP_RST | TCP_ACK))
		return 0;
	if (p->fragment || reply->flags & MESH_REVNAT_OPENED)
		return 0;
	if (bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &sequence, sizeof(sequence)) || sequence)
		return 0;
	if (reply->flags & MESH_REVNAT_REFUSED)
		count_failure(reply->frontend, FAILURE(refused));
	if (reply->flags & (MESH_REVNAT_REFUSED | REVNAT_CLOSED))
		return 0;
	revnat_add_flags(reply, MESH_REVNAT_REFUSED | REVNAT_CLOSED);
	return 1;
}

/* The task has answered the start of a flow. */
INLINE void answer(struct __sk_buff *skb, const struct packet *p, struct mesh_revnat *reply)
{
	__be32 sequence;

	if (p->fragment || bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &sequence, sizeof(sequence)))
		return;
	reply->sequence = bpf_ntohl(sequence);
	if (!(reply->flags & MESH_REVNAT_ANSWERED))
		revnat_add_flags(reply, MESH_REVNAT_ANSWERED);
}

/* A task's segment that starts or ends its direction of a flow. Returns 1 where it must not be sent. */
INLINE int reply_changes_state(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply)
{
	if (p->tcp_flags & TCP_SYN)
		answer(skb, p, reply);
	if (!(p->tcp_flags & (TCP_FIN | TCP_RST)))
		return 0;
	if (is_first_reset(skb, p, reply))
		return 1;
	revnat_close(reply, closed_by(p, MESH_REVNAT_FIN_OUT));
	return 0;
}

/* How a reply leaves. */
struct reply_path {
	struct tunnel_peer to;
	__u32 ifindex; /* not 0: straight to the client */
	__u32 pad;
	struct mesh_node *path; /* to the node */
};

/* Find it. p->mtu becomes the tunnel's, 0 for none. Returns -1 where there is no path at all. */
static __noinline int find_reply_path(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply,
				      struct reply_path *d)
{
	__u32 id = reply->ifindex & ~MESH_REVNAT_NODE;
	struct mesh_addr *node = bpf_map_lookup_elem(&mesh_node_addrs, &id);
	struct mesh_config *own = config();

	if (!node || !own)
		return -1;
	d->to.node = *node;
	d->to.id.flags = MESH_TUNNEL_REPLY;
	d->to.entropy = (__u32)mesh_hash_flow_wide(&p->flow);
	d->path = bpf_map_lookup_elem(&mesh_nodes, &d->to.node);
	p->mtu = (__u16)path_takes(d->path, is_v4(&d->to.node));
	if (p->mtu && !(own->settings & MESH_SETTING_DIRECT))
		return 0;
	d->ifindex = fib_output(skb, &reply->called, &reply->client);
	return d->ifindex ? 0 : -1;
}

INLINE int send_reply(struct __sk_buff *skb, struct packet *p, struct reply_path *d, __u32 name)
{
	int action;

	if (d->ifindex) {
		count_verdict(name == MESH_VERDICT_TUNNEL_REPLY_TX ? MESH_VERDICT_TUNNEL_DIRECT : name);
		return (int)bpf_redirect_neigh(d->ifindex, NULL, 0, 0);
	}
	action = encap_send(skb, &d->to, p, d->path);
	if (action == TC_ACT_REDIRECT)
		count_verdict(name);
	return action;
}

/* A reply with the called address as its source: everything but sending it. Returns 0, or an action or REJECT. */
static __noinline int prepare_reply(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply,
				    struct reply_path *d)
{
	struct tuple to = {
		.source = reply->called,
		.destination = reply->client,
		.source_port = reply->called_port,
		.destination_port = client_port(reply, p->flow.destination_port),
	};

	if (p->ttl <= 1)
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	if (find_reply_path(skb, p, reply, d)) {
		count_failed_start(p, reply->frontend, FAILURE(no_path));
		return verdict(MESH_VERDICT_TUNNEL_NO_PATH, TC_ACT_SHOT);
	}
	if (!d->ifindex && exceeds_mtu(skb, p)) {
		count_failed_start(p, reply->frontend, FAILURE(too_big));
		return REJECT(MESH_VERDICT_TUNNEL_TOO_BIG);
	}
	if ((p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) && reply_changes_state(skb, p, reply))
		return verdict(MESH_VERDICT_RESET_HELD, TC_ACT_SHOT);
	count_out(reply->frontend, reply->owner, p->length);
	if ((p->mtu && (p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, p->mtu)) || rewrite(skb, p, &to))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	p->flow.source = to.source;
	p->flow.destination = to.destination;
	p->flow.source_port = to.source_port;
	p->flow.destination_port = to.destination_port;
	return 0;
}

/* Likewise an error of a task about a packet of such a client. */
static __noinline int prepare_icmp(struct __sk_buff *skb, struct packet *p, struct reply_path *d)
{
	struct icmp_work *w = icmp_work();
	struct mesh_revnat *reply;

	reply = w ? revnat_of_task_error(skb, p, w) : NULL;
	if (!reply || find_reply_path(skb, p, reply, d))
		return verdict(MESH_VERDICT_TUNNEL_NO_PATH, TC_ACT_SHOT);
	return translate_to_client(skb, p, w, reply) ? verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT) : 0;
}

#endif /* MESH_TUNNEL_REPLY_H */
