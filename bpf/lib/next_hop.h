/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* By which neighbour packets leave. bpf_redirect_neigh looks the route of every packet up unless it is told the next
 * hop. Here the kernel is asked once, and its answer kept for a moment, until the agent sees routes or rules change.
 * Finding the neighbour's MAC stays with the kernel.
 */
#ifndef MESH_NEXT_HOP_H
#define MESH_NEXT_HOP_H

#include "parse.h"
#include "select.h"

#define HOP_BITS 10
#define HOP_LIFE 128u /* jiffies, 0.13 to 1.3 seconds: how long an answer counts where no agent runs */
#define INET     2u   /* AF_INET */
#define INET6    10u  /* AF_INET6 */

/* By which neighbour packets between two addresses leave. */
struct next_hop {
	struct mesh_addr source;
	struct mesh_addr destination;
	struct mesh_addr next; /* IPv4: in the first word */
	__u32 ifindex;
	__u32 routes; /* value of mesh_routes, as of the answer */
	__u32 since;  /* likewise jiffies */
	__u8 protocol;
	__u8 tos;
	__u8 version; /* of `next`; 0: the kernel finds the way of each packet */
	__u8 pad;
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
	const struct mesh_addr *source;
	const struct mesh_addr *destination;
	__u32 ifindex; /* by which it is to leave */
	__u8 version;
	__u8 protocol;
	__u8 tos; /* without the ECN bits */
	__u8 pad;
};

INLINE int is_hop_of(const struct next_hop *hop, const struct sending *s)
{
	return same_address(&hop->destination, s->destination) && same_address(&hop->source, s->source) &&
	       hop->ifindex == s->ifindex && hop->protocol == s->protocol && hop->tos == s->tos;
}

/* Ask the kernel by which neighbour of its interface packets of `hop` leave. `version` is 0 where it names none. */
static __noinline int ask_hop(struct __sk_buff *skb, struct next_hop *hop, __u32 version)
{
	struct bpf_fib_lookup way = {};
	__u32 family = version == 4 ? INET : INET6;
	long found;

	if (!hop)
		return 0;
	way.family = (__u8)family;
	way.ifindex = hop->ifindex;
	way.l4_protocol = hop->protocol;
	if (version == 4) {
		way.tos = hop->tos;
		way.ipv4_src = hop->source.words[3];
		way.ipv4_dst = hop->destination.words[3];
	} else {
		way.flowinfo = bpf_htonl((__u32)hop->tos << 20);
		__builtin_memcpy(way.ipv6_src, &hop->source, 16);
		__builtin_memcpy(way.ipv6_dst, &hop->destination, 16);
	}
	found = bpf_fib_lookup(skb, &way, sizeof(way), BPF_FIB_LOOKUP_OUTPUT);
	hop->version = 0;
	if ((found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH) || way.family != family ||
	    way.ifindex != hop->ifindex)
		return 0;
	__builtin_memcpy(&hop->next, way.ipv6_dst, 16); /* IPv4: the first word */
	hop->version = (__u8)version;
	return 0;
}

INLINE int is_hop_fresh(const struct next_hop *hop, __u32 routes, __u32 now)
{
	return hop->routes == routes && now - hop->since < HOP_LIFE;
}

/* A packet that is ready but for its Ethernet header leaves. Rules may go by the mark, which cannot be asked with. */
INLINE int send_out(struct __sk_buff *skb, const struct sending *s)
{
	__u64 ends = s->destination->halves[1] * MESH_K0 ^ s->source->halves[1] * MESH_K1;
	__u32 zero = 0, index = (__u32)(ends >> (64 - HOP_BITS)), now = (__u32)bpf_jiffies64();
	struct bpf_redir_neigh next = {};
	struct next_hop *hop = bpf_map_lookup_elem(&next_hops, &index);
	__u32 *routes = bpf_map_lookup_elem(&mesh_routes, &zero);

	if (unlikely(!hop || !routes || skb->mark))
		return (int)bpf_redirect_neigh(s->ifindex, NULL, 0, 0);
	if (unlikely(!is_hop_of(hop, s) || !is_hop_fresh(hop, *routes, now))) {
		hop->source = *s->source;
		hop->destination = *s->destination;
		hop->ifindex = s->ifindex;
		hop->protocol = s->protocol;
		hop->tos = s->tos;
		hop->routes = *routes;
		hop->since = now;
		ask_hop(skb, hop, s->version);
	}
	if (unlikely(!hop->version))
		return (int)bpf_redirect_neigh(s->ifindex, NULL, 0, 0);
	next.nh_family = s->version == 4 ? INET : INET6;
	__builtin_memcpy(next.ipv6_nh, &hop->next, 16);
	return (int)bpf_redirect_neigh(s->ifindex, &next, sizeof(next), 0);
}

/* Likewise a packet of a flow, with other ends than the client's packets show. */
INLINE int send_packet(struct __sk_buff *skb, const struct packet *p, const struct mesh_addr *source,
		       const struct mesh_addr *destination, __u32 ifindex)
{
	struct sending s = {source, destination, ifindex, p->version, p->flow.protocol, p->tos, 0};

	return send_out(skb, &s);
}

#endif /* MESH_NEXT_HOP_H */
