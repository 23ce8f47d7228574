/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a client to a task of another node: the program mesh_leave, behind mesh_ingress. */
#ifndef MESH_TUNNEL_TX_H
#define MESH_TUNNEL_TX_H

#include "forward.h"

/* A client's packet, or an error about one of its flows, to the node of its owner. Returns an action or a REFUSAL. */
static __noinline int leave(struct __sk_buff *skb, struct packet *p, struct mesh_backend *backend, __u32 entropy,
			    __u32 flags)
{
	struct tunnel_to to = {.node = backend->address, .entropy = entropy};

	to.id.seed[0] = ((__be32 *)&backend->seed)[0];
	to.id.seed[1] = ((__be32 *)&backend->seed)[1];
	to.id.port = backend->port;
	to.id.protocol = backend->protocol;
	to.id.flags = (__u8)flags;
	p->mtu = (__u16)tunnel_mtu(&to.node);
	if (unlikely(!p->mtu))
		return verdict(MESH_VERDICT_TUNNEL_NONE, TC_ACT_UNSPEC);
	if (unlikely(p->ttl <= 1))
		return REFUSAL(MESH_VERDICT_EXPIRED);
	if (unlikely(exceeds(skb, p)))
		return REFUSAL(MESH_VERDICT_TUNNEL_TOO_BIG);
	if ((unlikely(p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, p->mtu)) || hop(skb, p))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	return tunnel_send(skb, &to, p->version);
}

/* A packet that mesh_ingress gives to an owner on another node; leave_for has said which. */
SEC("tc")
int mesh_leave(struct __sk_buff *skb)
{
	__u32 owner = skb->cb[0], frontend = skb->cb[1], entropy = skb->cb[2], length;
	struct mesh_backend *backend = find_backend(owner);
	struct packet p;
	int action;

	if (parse(skb, &p) == PARSE_OTHER || !backend || !is_away(backend))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	length = p.length;
	action = leave(skb, &p, backend, entropy, skb->cb[3]);
	if (IS_REFUSAL(action))
		return refuse(skb, &p, action);
	if (likely(action == TC_ACT_REDIRECT)) {
		count_verdict(MESH_VERDICT_TUNNEL_OUT);
		if (frontend)
			count_in(frontend, owner, length);
	}
	return action;
}

#endif /* MESH_TUNNEL_TX_H */
