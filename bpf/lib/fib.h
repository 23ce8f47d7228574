/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* How packets leave: the next hop of IPv4 packets, cached, and the interface that leads to a client.
 *
 * bpf_redirect_neigh looks up the route of every packet unless it is told the next hop. So the kernel is asked once,
 * and its answer is cached for a moment, until the agent sees routes or rules change. The neighbour's MAC address
 * stays the kernel's business.
 *
 * Every IPv6 packet is looked up: for output, bpf_fib_lookup ignores rules by source address (net/core/filter.c),
 * which bpf_redirect_neigh obeys. */
#ifndef MESH_FIB_H
#define MESH_FIB_H

#include "maps.h"
#include "parse.h"

#define INET           2u  /* AF_INET */
#define INET6          10u /* AF_INET6 */
#define IP_LENGTH      65535u
#define FIB_CACHE_LIFE 128u /* jiffies, 0.13 to 1.3 seconds: how long an answer counts where no agent runs */

/* What the route of a packet depends on. Ports do not count: bpf_redirect_neigh asks without them, too. */
struct fib_query {
	__be32 source;
	__be32 destination;
	__u32 ifindex; /* output interface */
	__u8 protocol;
	__u8 tos; /* without the ECN bits */
	__u8 pad[2];
};

INLINE int fib_entry_matches(const struct fib_entry *decrement_ttl, const struct fib_query *s)
{
	return decrement_ttl->destination == s->destination && decrement_ttl->source == s->source &&
	       decrement_ttl->ifindex == s->ifindex && decrement_ttl->protocol == s->protocol &&
	       decrement_ttl->tos == s->tos;
}

INLINE int fib_entry_is_fresh(const struct fib_entry *decrement_ttl, __u32 routes, __u32 now)
{
	return decrement_ttl->routes == routes && now - decrement_ttl->since < FIB_CACHE_LIFE;
}

/* Ask the kernel for the next hop of packets of `hop`, by its interface. */
static __noinline int fib_lookup(struct __sk_buff *skb, struct fib_entry *decrement_ttl)
{
	struct bpf_fib_lookup path = {.family = INET};
	long found;

	if (!decrement_ttl)
		return 0;
	path.ifindex = decrement_ttl->ifindex;
	path.l4_protocol = decrement_ttl->protocol;
	path.tos = decrement_ttl->tos;
	path.ipv4_src = decrement_ttl->source;
	path.ipv4_dst = decrement_ttl->destination;
	found = bpf_fib_lookup(skb, &path, sizeof(path), BPF_FIB_LOOKUP_OUTPUT);
	decrement_ttl->next = 0;
	if ((found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH) && path.family == INET &&
	    path.ifindex == decrement_ttl->ifindex)
		decrement_ttl->next = path.ipv4_dst;
	return 0;
}

/* Send an IPv4 packet that is ready but for its Ethernet header. Rules may match the mark, which the query cannot
 * carry. */
INLINE int fib_send_v4(struct __sk_buff *skb, const struct fib_query *s)
{
	__u64 ends = ((__u64)s->destination << 32 | s->source) * MESH_K0;
	__u32 zero = 0, index = (__u32)(ends >> (64 - FIB_CACHE_BITS)), now = (__u32)bpf_jiffies64();
	struct bpf_redir_neigh next = {.nh_family = INET};
	struct fib_entry *decrement_ttl = bpf_map_lookup_elem(&fib_cache, &index);
	__u32 *routes = bpf_map_lookup_elem(&mesh_fib_gen, &zero);

	if (unlikely(!decrement_ttl || !routes || skb->mark))
		return (int)bpf_redirect_neigh(s->ifindex, NULL, 0, 0);
	if (unlikely(!fib_entry_matches(decrement_ttl, s) || !fib_entry_is_fresh(decrement_ttl, *routes, now))) {
		decrement_ttl->source = s->source;
		decrement_ttl->destination = s->destination;
		decrement_ttl->ifindex = s->ifindex;
		decrement_ttl->protocol = s->protocol;
		decrement_ttl->tos = s->tos;
		decrement_ttl->routes = *routes;
		decrement_ttl->since = now;
		fib_lookup(skb, decrement_ttl);
	}
	if (unlikely(!decrement_ttl->next))
		return (int)bpf_redirect_neigh(s->ifindex, NULL, 0, 0);
	next.ipv4_nh = decrement_ttl->next;
	return (int)bpf_redirect_neigh(s->ifindex, &next, sizeof(next), 0);
}

/* Send a packet that has these addresses now; `p` is the packet as it arrived. */
INLINE int fib_send(struct __sk_buff *skb, const struct packet *p, const struct mesh_addr *source,
		    const struct mesh_addr *destination, __u32 ifindex)
{
	struct fib_query s = {source->words[3], destination->words[3], ifindex, p->flow.protocol, p->tos, {0}};

	if (unlikely(p->version != 4))
		return (int)bpf_redirect_neigh(ifindex, NULL, 0, 0);
	return fib_send_v4(skb, &s);
}

/* Bytes of the largest IP packet as which a frame's packet leaves: large segments are cut. */
INLINE __u32 wire_size(struct __sk_buff *skb, const struct packet *p)
{
	__u32 header = p->l4 - L3;
	__u8 words = 0;

	if (likely(!skb->gso_size))
		return skb->len - L3;
	if (p->flow.protocol != IPPROTO_TCP)
		return header + (__u32)sizeof(struct udphdr) + skb->gso_size;
	if (bpf_skb_load_bytes(skb, p->l4 + TCP_FLAGS - 1, &words, 1))
		return IP_LENGTH;
	return header + (words >> 4) * 4u + skb->gso_size;
}

/* The interface that leads from an own address to a client. 0: none, or the packet is larger than *mtu, which the route
 * takes. */
INLINE __u32 fib_output(struct __sk_buff *skb, const struct packet *p, const struct mesh_addr *source,
			const struct mesh_addr *destination, __u32 *mtu)
{
	struct bpf_fib_lookup path = {.ifindex = skb->ifindex};
	__u32 size = wire_size(skb, p);
	long found;

	path.tot_len = (__u16)(size < IP_LENGTH ? size : IP_LENGTH);

	if (is_v4(destination)) {
		path.family = INET;
		path.ipv4_src = source->words[3];
		path.ipv4_dst = destination->words[3];
	} else {
		path.family = INET6;
		__builtin_memcpy(path.ipv6_src, source, 16);
		__builtin_memcpy(path.ipv6_dst, destination, 16);
	}
	found = bpf_fib_lookup(skb, &path, sizeof(path), 0);
	if (found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH)
		return path.ifindex;
	if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		*mtu = path.mtu_result;
	return found == BPF_FIB_LKUP_RET_FWD_DISABLED ? skb->ifindex : 0;
}

#endif /* MESH_FIB_H */
