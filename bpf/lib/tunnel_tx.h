/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a client to a task of another node. */
#ifndef MESH_TUNNEL_TX_H
#define MESH_TUNNEL_TX_H

#include "encap.h"

/* A client's packet, or an error about one of its flows, to the node of its owner. Returns an action or a REJECT. */
static __noinline int tunnel_tx(struct __sk_buff *skb, struct packet *p, struct mesh_backend *backend, __u32 entropy,
				__u32 flags)
{
	struct tunnel_peer to = {.node = backend->address, .entropy = entropy};

	to.id.seed[0] = ((__be32 *)&backend->seed)[0];
	to.id.seed[1] = ((__be32 *)&backend->seed)[1];
	to.id.port = backend->port;
	to.id.protocol = backend->protocol;
	to.id.flags = (__u8)flags;
	p->mtu = (__u16)tunnel_mtu(&to.node);
	if (unlikely(!p->mtu))
		return verdict(MESH_VERDICT_TUNNEL_NO_PATH, TC_ACT_UNSPEC);
	if (unlikely(p->ttl <= 1))
		return REJECT(MESH_VERDICT_EXPIRED);
	if (unlikely(exceeds_mtu(skb, p)))
		return REJECT(MESH_VERDICT_TUNNEL_TOO_BIG);
	if ((unlikely(p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, p->mtu)) || decrement_ttl(skb, p))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	return encap_send(skb, &to, p->version);
}

#endif /* MESH_TUNNEL_TX_H */
