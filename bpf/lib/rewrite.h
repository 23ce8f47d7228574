/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Changes addresses, ports and TTL in place, and updates checksums by difference: a wrong checksum stays wrong, and
 * one that the sender left to offload stays so.
 *
 * A change of the pseudo header is told apart from a change of covered bytes, which is what keeps CHECKSUM_PARTIAL and
 * GSO packets right. The helper that does this costs a quarter of all the rest, and is skipped where the checksum
 * shows that it is complete. */
#ifndef MESH_REWRITE_H
#define MESH_REWRITE_H

#include "csum.h"

INLINE int rewrite_v4(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 addresses)
{
	struct iphdr *ip = (void *)(long)skb->data + L3;

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return -1;
	ip->ttl = p->ttl - 1;
	ip->check = next_header_csum(p, addresses);
	ip->saddr = to->source.words[3];
	ip->daddr = to->destination.words[3];
	return 0;
}

/* IPv6 has no header checksum to compensate, so a CHECKSUM_COMPLETE sum has to follow. */
INLINE int rewrite_v6(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 addresses)
{
	struct ipv6hdr *ip = (void *)(long)skb->data + L3;

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return -1;
	ip->hop_limit = p->ttl - 1;
	__builtin_memcpy(&ip->saddr, &to->source, 16);
	__builtin_memcpy(&ip->daddr, &to->destination, 16);
	bpf_csum_update(skb, fold32(addresses + diff16(bpf_htons(p->ttl), bpf_htons(p->ttl - 1))));
	return 0;
}

/* A transport header in the linear part, or NULL. */
INLINE void *transport(struct __sk_buff *skb, const struct packet *p)
{
	void *l4 = (void *)(long)skb->data + (p->l4 & 0x7f);
	__u32 size = p->flow.protocol == IPPROTO_UDP ? 8 : 20;

	if (size == 8)
		return l4 + 8 > (void *)(long)skb->data_end ? NULL : l4;
	return l4 + 20 > (void *)(long)skb->data_end ? NULL : l4;
}

/* Whether the transport checksum may be left to offload (CHECKSUM_PARTIAL). It then holds the sum of the pseudo
 * header, which one complete checksum in 65,536 does, too. */
INLINE int may_be_partial(struct __sk_buff *skb, const struct packet *p, __u16 check)
{
	if (skb->gso_size || p->fragment)
		return 1;
	return csum_equal(check, fold16(fold32(pseudo_sum(p, p->length - (p->l4 - L3), p->flow.protocol))));
}

/* Ports, and the checksum that covers them, by the kernel's helper. How the helper applies the difference of the
 * addresses tells whether the checksum is complete, or stands for the pseudo header alone and must not follow the
 * ports. */
RARE int rewrite_by_helper(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u32 addresses)
{
	int udp;
	__u32 at, diff;
	__u16 sum = fold16(addresses), *check, before;
	__be16 *ports;

	if (!p || !to)
		return -1;
	udp = p->flow.protocol == IPPROTO_UDP;
	at = p->l4 + (udp ? UDP_CHECK : TCP_CHECK);
	if (bpf_skb_load_bytes(skb, at, &before, 2) ||
	    bpf_l4_csum_replace(skb, at, 0, addresses, (udp ? BPF_F_MARK_MANGLED_0 : 0) | BPF_F_PSEUDO_HDR))
		return -1;
	ports = transport(skb, p);
	if (!ports)
		return -1;
	diff = fold32(diff16(p->flow.source_port, to->source_port) +
		      diff16(p->flow.destination_port, to->destination_port));
	ports[0] = to->source_port;
	ports[1] = to->destination_port;
	check = udp ? ports + UDP_CHECK / 2 : ports + TCP_CHECK / 2;
	if ((void *)(check + 1) > (void *)(long)skb->data_end)
		return -1;
	if (unlikely(csum_equal(sum, 0))) /* it does not tell: let the kernel do it */
		return (int)bpf_l4_csum_replace(skb, at, 0, diff, udp ? BPF_F_MARK_MANGLED_0 : 0);
	if (!csum_equal(*check, (__u16)~fold16((__u64)(__u16)~before + sum)))
		return 0;
	sum = (__u16)~fold16((__u64)(__u16) ~*check + diff);
	*check = udp && !sum ? 0xffff : sum;
	return 0;
}

/* Ports, and the checksum that covers them. */
INLINE int rewrite_transport(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 addresses)
{
	int udp = p->flow.protocol == IPPROTO_UDP;
	__be16 *ports = transport(skb, p);
	__u16 *check, sum;
	__u64 diff;

	if (!ports)
		return -1;
	check = udp ? ports + UDP_CHECK / 2 : ports + TCP_CHECK / 2;
	if ((void *)(check + 1) > (void *)(long)skb->data_end) /* for the verifiers of kernels before 6.4 */
		return -1;
	if (udp && !*check) {
		ports[0] = to->source_port;
		ports[1] = to->destination_port;
		return 0;
	}
	if (unlikely(may_be_partial(skb, p, *check)))
		return rewrite_by_helper(skb, p, to, fold32(addresses));
	diff = addresses + diff16(p->flow.source_port, to->source_port) +
	       diff16(p->flow.destination_port, to->destination_port);
	sum = (__u16)~fold16((__u64)(__u16) ~*check + fold32(diff));
	ports[0] = to->source_port;
	ports[1] = to->destination_port;
	*check = udp && !sum ? 0xffff : sum;
	/* The packet's bytes changed by what the pseudo header lost: so does a CHECKSUM_COMPLETE sum. */
	bpf_csum_update(skb, ~fold32(addresses));
	return 0;
}

/* Rewrite a TCP or UDP packet, or a later fragment of one (addresses only). Not 0: nothing, or a part, was done. */
INLINE int rewrite(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	__u64 addresses;

	if (p->version == 4)
		addresses = diff32(p->flow.source.words[3], to->source.words[3]) +
			    diff32(p->flow.destination.words[3], to->destination.words[3]);
	else
		addresses = diff_address(&p->flow.source, &to->source) +
			    diff_address(&p->flow.destination, &to->destination);
	if (likely(p->fragment != 2) && rewrite_transport(skb, p, to, addresses))
		return -1;
	return p->version == 4 ? rewrite_v4(skb, p, to, addresses) : rewrite_v6(skb, p, to, addresses);
}

#endif /* MESH_REWRITE_H */
