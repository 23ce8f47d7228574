/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The packet that an ICMP error quotes. */
#ifndef MESH_QUOTED_H
#define MESH_QUOTED_H

#include "scratch.h"

/* Its flow, and where it lies. Not 0: it is no TCP or UDP packet, or cut off before its ports. */
INLINE int load_quoted(struct __sk_buff *skb, const struct packet *p, struct icmp_work *w)
{
	struct quoted *q = &w->quoted;

	q->pad = 0;
	q->ip = (__u16)(p->l4 + sizeof(struct icmp));
	if (p->version == 4) {
		if (bpf_skb_load_bytes(skb, q->ip, &w->ip.v4, sizeof(w->ip.v4)) || w->ip.v4.version != 4 ||
		    w->ip.v4.ihl < 5 || (bpf_ntohs(w->ip.v4.frag_off) & IP_OFFSET))
			return -1;
		address_v4(&q->flow.source, w->ip.v4.saddr);
		address_v4(&q->flow.destination, w->ip.v4.daddr);
		q->flow.protocol = w->ip.v4.protocol;
		q->check = w->ip.v4.check;
		q->l4 = (__u16)(q->ip + w->ip.v4.ihl * 4u);
	} else {
		if (bpf_skb_load_bytes(skb, q->ip, &w->ip.v6, sizeof(w->ip.v6)) || w->ip.v6.version != 6)
			return -1;
		__builtin_memcpy(&q->flow.source, &w->ip.v6.saddr, 16);
		__builtin_memcpy(&q->flow.destination, &w->ip.v6.daddr, 16);
		q->flow.protocol = w->ip.v6.nexthdr;
		q->l4 = (__u16)(q->ip + sizeof(w->ip.v6));
	}
	if (q->flow.protocol != IPPROTO_TCP && q->flow.protocol != IPPROTO_UDP)
		return -1;
	if (q->l4 + 8u > L3 + p->length)
		return -1;
	return (int)bpf_skb_load_bytes(skb, q->l4, &q->flow.source_port, 4);
}

#endif /* MESH_QUOTED_H */
