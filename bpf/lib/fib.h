/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* By which neighbour IPv4 packets leave. bpf_redirect_neigh looks the route of every packet up unless it is told the
 * next hop. Here the kernel is asked once, and its answer kept for a moment, until the agent sees routes or rules
 * change. Finding the neighbour's MAC stays with the kernel. IPv6 packets are looked up each: asked for their way out,
 * bpf_fib_lookup leaves out rules by source (net/core/filter.c), which bpf_redirect_neigh obeys.
 */
#ifndef MESH_FIB_H
#define MESH_FIB_H

#include "parse.h"
#include "lb.h"

#define HOP_BITS 10
#define HOP_LIFE 128u /* jiffies, 0.13 to 1.3 seconds: how long an answer counts where no agent runs */
#define INET     2u   /* AF_INET */

/* By which neighbour packets between two addresses leave. */
struct next_hop {
	__be32 source;
	__be32 destination;
	__u32 ifindex;
	__u32 routes; /* value of mesh_routes, as of the answer */
	__u32 since;  /* likewise jiffies */
	__be32 next;  /* 0: the kernel finds the way of each packet */
	__u8 protocol;
	__u8 tos;
	__u8 pad[2];
};

/* A cache of this object and each CPU, by a hash of both addresses. Not pinned: other builds may remember other things.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << HOP_BITS);
	__type(key, __u32);
	__type(value, struct next_hop);
} next_hops SEC(".maps");

/* What the way of a packet depends on. Ports do not count: bpf_redirect_neigh asks without them, too. */
struct sending {
	__be32 source;
	__be32 destination;
	__u32 ifindex; /* by which it is to leave */
	__u8 protocol;
	__u8 tos; /* without the ECN bits */
	__u8 pad[2];
};

INLINE int is_hop_of(const struct next_hop *hop, const struct sending *s)
{
	return hop->destination == s->destination && hop->source == s->source && hop->ifindex == s->ifindex &&
	       hop->protocol == s->protocol && hop->tos == s->tos;
}

INLINE int is_hop_fresh(const struct next_hop *hop, __u32 routes, __u32 now)
{
	return hop->routes == routes && now - hop->since < HOP_LIFE;
}

/* Ask the kernel by which neighbour of its interface packets of `hop` leave. */
static __noinline int ask_hop(struct __sk_buff *skb, struct next_hop *hop)
{
	struct bpf_fib_lookup way = {.family = INET};
	long found;

	if (!hop)
		return 0;
	way.ifindex = hop->ifindex;
	way.l4_protocol = hop->protocol;
	way.tos = hop->tos;
	way.ipv4_src = hop->source;
	way.ipv4_dst = hop->destination;
	found = bpf_fib_lookup(skb, &way, sizeof(way), BPF_FIB_LOOKUP_OUTPUT);
	hop->next = 0;
	if ((found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH) && way.family == INET &&
	    way.ifindex == hop->ifindex)
		hop->next = way.ipv4_dst;
	return 0;
}

/* An IPv4 packet that is ready but for its Ethernet header leaves. Rules may go by the mark, which cannot be asked
 * with. */
INLINE int send_v4(struct __sk_buff *skb, const struct sending *s)
{
	__u64 ends = ((__u64)s->destination << 32 | s->source) * MESH_K0;
	__u32 zero = 0, index = (__u32)(ends >> (64 - HOP_BITS)), now = (__u32)bpf_jiffies64();
	struct bpf_redir_neigh next = {.nh_family = INET};
	struct next_hop *hop = bpf_map_lookup_elem(&next_hops, &index);
	__u32 *routes = bpf_map_lookup_elem(&mesh_routes, &zero);

	if (unlikely(!hop || !routes || skb->mark))
		return (int)bpf_redirect_neigh(s->ifindex, NULL, 0, 0);
	if (unlikely(!is_hop_of(hop, s) || !is_hop_fresh(hop, *routes, now))) {
		hop->source = s->source;
		hop->destination = s->destination;
		hop->ifindex = s->ifindex;
		hop->protocol = s->protocol;
		hop->tos = s->tos;
		hop->routes = *routes;
		hop->since = now;
		ask_hop(skb, hop);
	}
	if (unlikely(!hop->next))
		return (int)bpf_redirect_neigh(s->ifindex, NULL, 0, 0);
	next.ipv4_nh = hop->next;
	return (int)bpf_redirect_neigh(s->ifindex, &next, sizeof(next), 0);
}

/* A packet leaves that has these ends now; `p` is it as it came. */
INLINE int send_packet(struct __sk_buff *skb, const struct packet *p, const struct mesh_addr *source,
		       const struct mesh_addr *destination, __u32 ifindex)
{
	struct sending s = {source->words[3], destination->words[3], ifindex, p->flow.protocol, p->tos, {0}};

	if (unlikely(p->version != 4))
		return (int)bpf_redirect_neigh(ifindex, NULL, 0, 0);
	return send_v4(skb, &s);
}

#endif /* MESH_FIB_H */
